//! The session's first connection: requests that are not about values, releases, and the daemon's notices.
//!
//! One thread reads it. It hands replies to the calls that wait for them, drops what the daemon wants unmapped, and gives holds
//! back that no request took along.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::clock::Clock;
use super::error::ClientError;
use super::leases::{Leases, lock};
use crate::failpoint::failpoint;
use crate::message::{MAX_RELEASES, Message};
use crate::socket::{Connection, MAX_FRAME, SocketError};

/// How long a returned hold waits for a request to take it along.
const TICK: Duration = Duration::from_millis(10);
/// Ticks without anything returned after which the thread sleeps until it is woken.
const QUIET: u32 = 50;

/// A reply as it came.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) message: Message,
    pub(super) fds: Vec<OwnedFd>,
}

/// The primary connection of a session.
#[derive(Debug)]
pub(super) struct Primary {
    connection: Connection,
    waiting: Mutex<Waiting>,
    next: AtomicU32,
    /// The owner is done with the session: it ends with the last hold.
    closing: AtomicBool,
}

#[derive(Debug, Default)]
struct Waiting {
    calls: HashMap<u32, mpsc::Sender<Reply>>,
    ended: bool,
}

impl Primary {
    pub(super) fn new(connection: Connection) -> Self {
        let (waiting, closing) = (Mutex::default(), AtomicBool::new(false));
        Self { connection, waiting, next: AtomicU32::new(1), closing }
    }

    /// Whether the connection has ended.
    pub(super) fn ended(&self) -> bool {
        lock(&self.waiting).ended
    }

    /// Breaks the connection off: no call begins any more, the reading thread ends, and with it every waiting call.
    pub(super) fn fail(&self) {
        lock(&self.waiting).ended = true;
        self.connection.shutdown();
    }

    /// Sends something that is not answered.
    pub(super) fn tell(&self, message: &Message, what: &'static str) -> Result<(), ClientError> {
        let mut frame = Vec::new();
        message.encode(0, &mut frame);
        self.connection.send(&frame, &[]).map_err(|e| ClientError::lost(what, e))
    }

    /// Sends a request and waits for its reply.
    pub(super) fn ask(
        &self,
        message: &Message,
        what: &'static str,
        clock: &mut Clock<'_>,
    ) -> Result<Reply, ClientError> {
        let request = self.next.fetch_add(1, Ordering::Relaxed).max(1);
        let (sender, receiver) = mpsc::channel();
        {
            let mut waiting = lock(&self.waiting);
            if waiting.ended {
                return Err(ClientError::lost(what, SocketError::Closed));
            }
            waiting.calls.insert(request, sender);
        }
        let reply = self.exchange(message, request, &receiver, what, clock);
        if let Err(error) = &reply {
            lock(&self.waiting).calls.remove(&request);
            // The reading thread may not have seen the end yet, and the next call must not find this connection again.
            if matches!(error, ClientError::Lost { .. }) {
                self.fail();
            }
        }
        match reply?.into_result() {
            Err(ClientError::Protocol(text)) => {
                self.fail();
                Err(ClientError::Protocol(text))
            }
            result => result,
        }
    }

    fn exchange(
        &self,
        message: &Message,
        request: u32,
        receiver: &mpsc::Receiver<Reply>,
        what: &'static str,
        clock: &mut Clock<'_>,
    ) -> Result<Reply, ClientError> {
        let mut frame = Vec::new();
        message.encode(request, &mut frame);
        loop {
            match self.connection.send_until(&frame, &[], clock.wait_until()) {
                Ok(()) => break,
                Err(SocketError::Deadline { .. }) => {}
                Err(error) => return Err(ClientError::lost(what, error)),
            }
            if let Some(stop) = clock.check() {
                return Err(clock.error(stop));
            }
        }
        failpoint("client.asked");
        loop {
            match receiver.recv_timeout(clock.wait_for()) {
                Ok(reply) => {
                    failpoint("client.answered");
                    return Ok(reply);
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(ClientError::lost(what, SocketError::Closed));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            if let Some(stop) = clock.check() {
                return Err(clock.error(stop));
            }
        }
    }

    /// Lets the session end with its last hold, or at once.
    pub(super) fn close(&self, at_once: bool, leases: &Leases) {
        if at_once {
            // The end of the connection says the same, if this cannot be sent.
            let _ = self.tell(&Message::Bye, "saying goodbye");
            failpoint("client.bye_sent");
            self.fail();
        } else {
            self.closing.store(true, Ordering::SeqCst);
        }
        leases.wake();
    }

    /// The body of the housekeeping thread. It ends with the connection.
    pub(super) fn keep_house(&self, leases: &Leases) {
        let mut buffer = vec![0; MAX_FRAME];
        let mut fds = Vec::new();
        let mut quiet = 0;
        let mut due = Instant::now() + TICK;
        loop {
            if self.wait(leases, quiet >= QUIET, due) {
                quiet = 0;
            }
            if self.read_all(leases, &mut buffer, &mut fds).is_err() {
                break;
            }
            if Instant::now() < due {
                continue;
            }
            due = Instant::now() + TICK;
            match self.give_back(leases) {
                Ok(0) => quiet = (quiet + 1).min(QUIET),
                Ok(_) => quiet = 0,
                Err(()) => break,
            }
            if self.closing.load(Ordering::SeqCst) && leases.live() == 0 {
                let _ = self.tell(&Message::Bye, "saying goodbye");
                failpoint("client.bye_sent");
                break;
            }
        }
        self.connection.shutdown();
        let mut waiting = lock(&self.waiting);
        waiting.ended = true;
        waiting.calls.clear();
        drop(waiting);
        leases.end();
    }

    /// Sleeps until a frame or the next tick; for long, if all is quiet. True if it was woken for returned holds.
    fn wait(&self, leases: &Leases, quiet: bool, due: Instant) -> bool {
        let timeout = if quiet && leases.may_sleep() {
            PollTimeout::NONE
        } else {
            let left = due.saturating_duration_since(Instant::now());
            PollTimeout::try_from(left + Duration::from_micros(500)).unwrap_or(PollTimeout::from(10u8))
        };
        let mut polled = [
            PollFd::new(self.connection.as_fd(), PollFlags::POLLIN),
            PollFd::new(leases.wake_fd().as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return false,
            // Out of kernel memory: try again in a tick.
            Err(_) => std::thread::park_timeout(TICK),
        }
        let woken = polled[1].revents().is_some_and(|events| !events.is_empty());
        if woken {
            // Counted from here: whatever is pushed from now on wakes again.
            let _ = leases.wake_fd().read();
        }
        woken
    }

    fn read_all(&self, leases: &Leases, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<(), ()> {
        loop {
            let len = match self.connection.try_recv(buffer, fds) {
                Ok(Some(received)) => received.len,
                Ok(None) => return Ok(()),
                // The call that waits for it has the descriptors sent again.
                Err(SocketError::FdsLost { len, .. }) => len,
                Err(_) => return Err(()),
            };
            match Message::decode(&buffer[..len]) {
                Ok((_, Message::Unmap { segment })) => {
                    if leases.unmap(segment) {
                        self.unmapped(segment)?;
                    }
                }
                Ok((request, message)) => {
                    // A call that gave up waiting has taken its entry away; a hold in its reply must not stay.
                    let sender = lock(&self.waiting).calls.remove(&request);
                    let reply = Reply { message, fds: std::mem::take(fds) };
                    let unheard = match sender {
                        Some(sender) => sender.send(reply).err().map(|e| e.0),
                        None => Some(reply),
                    };
                    if let Some(Reply { message: Message::Opened { lease, .. }, .. }) = unheard {
                        leases.refuse(&lease);
                    }
                }
                Err(_) => return Err(()),
            }
        }
    }

    /// Sends what was returned; gives its number.
    fn give_back(&self, leases: &Leases) -> Result<usize, ()> {
        let mut sent = 0;
        loop {
            let mut list = Vec::new();
            leases.take(&mut list, MAX_RELEASES);
            if list.is_empty() {
                break;
            }
            let n = list.len();
            let message = Message::Release(list);
            let mut frame = Vec::new();
            message.encode(0, &mut frame);
            match self.connection.send(&frame, &[]) {
                Ok(()) => {
                    failpoint("client.release_sent");
                    sent += n;
                }
                // The daemon has other things to do: at the next tick.
                Err(SocketError::PeerNotReading) => {
                    if let Message::Release(list) = message {
                        leases.untake(list);
                    }
                    return Ok(sent + n);
                }
                Err(_) => return Err(()),
            }
        }
        for segment in leases.left() {
            self.unmapped(segment)?;
            sent += 1;
        }
        Ok(sent)
    }

    fn unmapped(&self, segment: u64) -> Result<(), ()> {
        failpoint("client.unmapped");
        let mut frame = Vec::new();
        Message::Unmap { segment }.encode(0, &mut frame);
        // Waits for a busy daemon; the reading end of a dead one fails at once.
        let deadline = Instant::now() + Duration::from_secs(5);
        self.connection.send_until(&frame, &[], Some(deadline)).map_err(|_| ())?;
        failpoint("client.unmap_answered");
        Ok(())
    }
}

impl Reply {
    /// An `ERROR` as an error.
    fn into_result(self) -> Result<Self, ClientError> {
        match self.message {
            Message::Error(failure) => Err(ClientError::Refused(failure)),
            _ => Ok(self),
        }
    }

    /// The error for a reply that does not answer the request.
    pub(super) fn unexpected(&self, what: &'static str) -> ClientError {
        ClientError::protocol(format!("{what} was answered by {:?}", self.message))
    }
}
