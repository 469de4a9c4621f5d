//! A session: one client process. Its primary connection is served here.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use nix::sys::epoll::{EpollEvent, EpollFlags};
use shmquant_protocol::failpoint::failpoint;
use shmquant_protocol::message::{ErrorCode, MINOR, Message, Welcome};
use shmquant_protocol::segment::Backing;
use shmquant_protocol::socket::{Connection, SocketError};

use crate::error::{Trouble, clipped};
use crate::hub::Hub;
use crate::port::Port;
use crate::requests;

/// Segments and tickets an ended session gives back before others get the lock.
const BATCH: usize = 256;

/// Who a session is. What it has is in the books.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) token: [u8; 16],
    pub(crate) pid: i32,
    pub(crate) command: String,
    pub(crate) started: SystemTime,
    pub(crate) connection: Arc<Connection>,
    /// Watched for as long as the session lives; `None` where the process cannot be watched from here.
    pidfd: Option<OwnedFd>,
}

impl Session {
    /// A session of this process that nobody watches.
    #[cfg(test)]
    pub(crate) fn unwatched(id: u64, connection: Arc<Connection>) -> Arc<Self> {
        let (pid, started) = (std::process::id() as i32, SystemTime::now());
        Arc::new(Self { id, token: [0; 16], pid, command: String::new(), started, connection, pidfd: None })
    }

    /// The watcher has heard of the process's end.
    pub(crate) fn unwatch(&self, hub: &Hub) {
        if let Some(pidfd) = &self.pidfd {
            let _ = hub.watch.delete(pidfd);
        }
    }

    /// Asks the client to unmap a segment that is given up.
    pub(crate) fn ask_unmap(&self, segment: u64) {
        let mut frame = Vec::with_capacity(32);
        Message::Unmap { segment }.encode(0, &mut frame);
        match self.connection.send(&frame, &[]) {
            Ok(()) | Err(SocketError::Closed) => failpoint("daemon.unmap_sent"),
            Err(error) => {
                tracing::warn!(session = self.id, pid = self.pid, "disconnected: {error}");
                self.connection.shutdown();
            }
        }
    }
}

/// Serves a connection that began with `HELLO`, to its end.
pub(crate) fn serve(
    hub: &Arc<Hub>,
    connection: &Arc<Connection>,
    port: &mut Port<'_>,
    request: u32,
) -> Result<(), Trouble> {
    let session = match open(hub, connection) {
        Ok(session) => session,
        Err(trouble) => return port.refuse(request, trouble),
    };
    let _end = End { hub, session: session.id };
    failpoint("daemon.session_opened");
    let welcome = Message::Welcome(Welcome {
        minor: MINOR,
        posix: hub.config.backing == Backing::Posix,
        instance: hub.instance,
        session: session.id,
        token: session.token,
        window: hub.config.window,
        max_window: hub.config.max_window,
        max_lanes: hub.config.max_lanes,
        poll: hub.poll_micros(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    });
    port.send(request, &welcome, None)?;
    failpoint("daemon.welcomed");
    loop {
        let (request, message) = port.recv(None)?;
        let message = match message {
            Ok(message) => message,
            Err(trouble) => {
                port.refuse(request, trouble)?;
                continue;
            }
        };
        match message {
            Message::Bye => return Ok(()),
            Message::Cancel { lane, request } => {
                let books = hub.books();
                let account = books.sessions.get(&session.id).ok_or(Trouble::Lost)?;
                if let Some(lane) = account.lanes.get(&lane) {
                    lane.cancel(request);
                }
            }
            message => requests::serve(hub, &session, port, request, message)?,
        }
    }
}

fn open(hub: &Arc<Hub>, connection: &Arc<Connection>) -> Result<Arc<Session>, Trouble> {
    let cred = connection.require_same_user()?;
    let pidfd = match connection.peer_pidfd() {
        Ok(pidfd) => Some(pidfd),
        Err(SocketError::PeerGone) => return Err(Trouble::Lost),
        Err(error) => {
            tracing::warn!(pid = cred.pid, "a client's death will be noticed by its sockets only: {error}");
            None
        }
    };
    let mut token = [0; 16];
    random(&mut token)?;
    // Not under the lock: it is read from the client's own memory, and takes as long as the client's memory does.
    let command = command_of(cred.pid);
    let session = {
        let mut books = hub.books();
        if books.sessions.len() >= hub.config.max_sessions as usize {
            return Err(Trouble::new(
                ErrorCode::Limit,
                format!("{} processes are connected, which is the most there can be", books.sessions.len()),
                "start the daemon with a larger --max-sessions",
            ));
        }
        let session = Arc::new(Session {
            id: books.next_session(),
            token,
            pid: cred.pid,
            command,
            started: SystemTime::now(),
            connection: connection.clone(),
            pidfd,
        });
        books.add_session(session.clone());
        session
    };
    if let Some(pidfd) = &session.pidfd {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, session.id);
        if let Err(errno) = hub.watch.add(pidfd, event) {
            tracing::warn!(session = session.id, "cannot watch the client's process: {errno}");
        }
    }
    tracing::info!(session = session.id, pid = session.pid, command = session.command, "session opened");
    Ok(session)
}

/// Ends a session when its primary's thread leaves: closes its lanes, gives back what it had.
struct End<'a> {
    hub: &'a Hub,
    session: u64,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        let (lanes, segments) = {
            let mut books = self.hub.books();
            let lanes: Vec<_> = match books.account(self.session) {
                Ok(account) => account.lanes.values().cloned().collect(),
                Err(_) => Vec::new(),
            };
            (lanes, books.end_session(self.session))
        };
        failpoint("daemon.session_ended");
        for lane in lanes {
            lane.connection.shutdown();
            lane.wake.signal();
        }
        for batch in segments.chunks(BATCH) {
            let mut books = self.hub.books();
            for id in batch {
                books.forget(self.session, *id);
            }
        }
        while self.hub.books().drop_orphans(BATCH) {}
        failpoint("daemon.session_forgotten");
        tracing::info!(session = self.session, segments = segments.len(), "session ended");
    }
}

/// Counts a request for as long as it is worked on.
pub(crate) struct Busy<'a>(&'a Hub);

impl<'a> Busy<'a> {
    pub(crate) fn new(hub: &'a Hub) -> Self {
        hub.jobs.fetch_add(1, Ordering::AcqRel);
        Self(hub)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.jobs.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Fills a token or a secret.
pub(crate) fn random(bytes: &mut [u8]) -> Result<(), Trouble> {
    getrandom::fill(bytes)
        .map_err(|e| Trouble::new(ErrorCode::Internal, format!("no random numbers: {e}"), ""))
}

/// The command line of a process, for people.
fn command_of(pid: i32) -> String {
    let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return String::new() };
    let line = &line[..line.len().min(400)];
    let words: Vec<_> =
        line.split(|b| *b == 0).filter(|w| !w.is_empty()).map(String::from_utf8_lossy).collect();
    clipped(words.join(" "), 200)
}
