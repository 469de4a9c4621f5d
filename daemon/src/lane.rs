//! A lane: one more connection of a session, with a window, working on one request at a time.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use shmquant_kernels::NoFlushing;
use shmquant_protocol::chunks::MIN_WINDOW;
use shmquant_protocol::failpoint::failpoint;
use shmquant_protocol::message::{ErrorCode, Message, NO_TIMEOUT};
use shmquant_protocol::segment::Kind;
use shmquant_protocol::socket::Connection;

use crate::error::Trouble;
use crate::growth::{Wanted, obtain};
use crate::hub::Hub;
use crate::inputs::{self, Asked};
use crate::life::WindowLife;
use crate::memory::SegmentMemory;
use crate::port::Port;
use crate::quantize::{self, Flow};
use crate::requests::{self, Answer};
use crate::session::Session;
use crate::wake::Wake;

/// How long a lane waits for its window.
const WINDOW_PATIENCE: Duration = Duration::from_secs(5);

/// A lane as other threads see it.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) id: u32,
    pub(crate) session: Arc<Session>,
    pub(crate) connection: Arc<Connection>,
    /// Raised when something happened that a working lane may wait for.
    pub(crate) wake: Wake,
    /// Request that was cancelled last, in the lower half; 0 if none was. A cancellation may overtake its
    /// request, since they travel on two sockets.
    cancelled: AtomicU64,
}

impl Lane {
    /// Cancels a request, whether or not it has arrived already.
    pub(crate) fn cancel(&self, request: u32) {
        self.cancelled.store(1 << 32 | u64::from(request), Ordering::Release);
        self.wake.signal();
    }

    fn is_cancelled(&self, request: u32) -> bool {
        self.cancelled.load(Ordering::Acquire) == (1 << 32 | u64::from(request))
    }
}

/// A lane's window.
#[derive(Debug)]
pub(crate) struct Window {
    pub(crate) id: u64,
    pub(crate) memory: Arc<SegmentMemory>,
    pub(crate) size: u64,
}

/// What `JOIN` says.
#[derive(Debug)]
pub(crate) struct Join {
    pub(crate) session: u64,
    pub(crate) token: [u8; 16],
    pub(crate) window: u64,
}

/// Serves a connection that began with `JOIN`, to its end.
pub(crate) fn serve(
    hub: &Arc<Hub>,
    connection: &Arc<Connection>,
    port: &mut Port<'_>,
    request: u32,
    join: &Join,
) -> Result<(), Trouble> {
    let lane = match enter(hub, connection, join) {
        Ok(lane) => lane,
        Err(trouble) => return port.refuse(request, trouble),
    };
    let mut end = End { hub, lane: &lane, window: None };
    failpoint("daemon.lane_entered");
    let window = match make_window(hub, &lane, port, request, join.window) {
        Ok(window) => window,
        Err(trouble) => return port.refuse(request, trouble),
    };
    end.window = Some(window.id);
    let joined = Message::Joined { lane: lane.id, segment: window.id, generation: 1, size: window.size };
    port.send(request, &joined, Some(&window.memory))?;
    failpoint("daemon.joined");
    let _exact = NoFlushing::new();
    let mut kept = quantize::Kept::default();
    loop {
        let (request, message) = port.recv(Some(hub))?;
        match message {
            Err(trouble) => port.refuse(request, trouble)?,
            // Sent before the reply to their request arrived.
            Ok(Message::Wrote { .. } | Message::Cancel { .. }) => {}
            Ok(Message::Quantize(asked)) => {
                hub.books().move_window(window.id, WindowLife::Submitted)?;
                failpoint("daemon.quantize_received");
                let mut current = Current::new(hub, &lane, port, request);
                let answer = quantize::quantize(&mut current, &window, asked, &mut kept);
                hub.books().move_window(window.id, WindowLife::Writing)?;
                requests::deliver(hub, &lane.session, port, request, answer)?;
                kept.shrink();
            }
            Ok(Message::Allocate { bytes, purpose, timeout }) => {
                let mut current = Current::new(hub, &lane, port, request);
                let answer = inputs::allocate(&mut current, Asked { bytes, purpose, timeout });
                requests::deliver(hub, &lane.session, port, request, answer)?;
            }
            Ok(message) => requests::serve(hub, &lane.session, port, request, message)?,
        }
    }
}

fn enter(hub: &Hub, connection: &Arc<Connection>, join: &Join) -> Result<Arc<Lane>, Trouble> {
    let cred = connection.require_same_user()?;
    if hub.is_stopping() {
        return Err(stopping());
    }
    let wake = Wake::new().map_err(|errno| {
        Trouble::new(ErrorCode::Limit, format!("no lane can be made: {}", errno.desc()), "")
    })?;
    let mut books = hub.books();
    let session = match books.account(join.session) {
        Ok(account) if account.session.token == join.token && account.session.pid == cred.pid => {
            account.session.clone()
        }
        _ => return Err(Trouble::protocol("JOIN names no session of this process")),
    };
    let id = books.next_lane(session.id, hub.config.max_lanes)?;
    let connection = connection.clone();
    let lane = Arc::new(Lane { id, session, connection, wake, cancelled: AtomicU64::new(0) });
    books.add_lane(join.session, lane.clone())?;
    Ok(lane)
}

fn make_window(
    hub: &Hub,
    lane: &Arc<Lane>,
    port: &mut Port<'_>,
    request: u32,
    wanted: u64,
) -> Result<Window, Trouble> {
    let size = if wanted == 0 { hub.config.window } else { wanted.max(MIN_WINDOW) };
    if size > hub.config.max_window {
        return Err(Trouble::new(
            ErrorCode::Limit,
            format!("a window of {size} bytes is larger than the largest, {} bytes", hub.config.max_window),
            "",
        ));
    }
    let size = size.next_multiple_of(4096).min(hub.config.max_window);
    let mut current = Current::new(hub, lane, port, request);
    let patience = Some(Instant::now() + WINDOW_PATIENCE);
    let made = obtain(&mut current, Wanted { kind: Kind::Window, size, pooled: false }, patience)?;
    let memory = made.taken.memory.clone();
    Ok(Window { id: made.keep(), memory, size })
}

/// Ends a lane when its thread leaves. Requests do not outlive [`quantize::quantize`], so none is left.
struct End<'a> {
    hub: &'a Hub,
    lane: &'a Arc<Lane>,
    window: Option<u64>,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        let mut books = self.hub.books();
        books.remove_lane(self.lane.session.id, self.lane.id);
        if let Some(window) = self.window {
            books.retire(window);
        }
        drop(books);
        failpoint("daemon.lane_ended");
    }
}

/// The request that a lane works on: everything that it may wait for comes through here.
pub(crate) struct Current<'a, 'p> {
    pub(crate) hub: &'a Hub,
    pub(crate) lane: &'a Arc<Lane>,
    pub(crate) port: &'a mut Port<'p>,
    pub(crate) request: u32,
    /// How its values pass through the window; `None` until it is planned.
    pub(crate) flow: Option<Arc<Flow>>,
    /// Chunks that the client has written.
    pub(crate) ready: usize,
    pub(crate) cancelled: bool,
}

impl<'a, 'p> Current<'a, 'p> {
    fn new(hub: &'a Hub, lane: &'a Arc<Lane>, port: &'a mut Port<'p>, request: u32) -> Self {
        Self { hub, lane, port, request, flow: None, ready: 0, cancelled: lane.is_cancelled(request) }
    }

    /// Waits until the client says something, the lane is woken or the time comes; notes what happened.
    pub(crate) fn wait(&mut self, until: Option<Instant>) -> Result<(), Trouble> {
        match self.port.try_recv()? {
            Some((request, message)) => self.heard(request, message?)?,
            None => {
                let left = until.map(|until| until.saturating_duration_since(Instant::now()));
                let mut polled = [
                    PollFd::new(self.lane.connection.as_fd(), PollFlags::POLLIN),
                    PollFd::new(self.lane.wake.as_fd(), PollFlags::POLLIN),
                ];
                match ppoll(&mut polled, left.map(TimeSpec::from_duration), None) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(errno) => {
                        tracing::error!("waiting for a client: {}", errno.desc());
                        return Err(Trouble::Lost);
                    }
                }
                if polled[1].any().unwrap_or(false) {
                    self.lane.wake.clear();
                }
            }
        }
        self.cancelled |= self.lane.is_cancelled(self.request);
        Ok(())
    }

    /// Waits for a wake-up only: the client is not listened to any more.
    pub(crate) fn wait_deaf(&self) {
        let mut polled = [PollFd::new(self.lane.wake.as_fd(), PollFlags::POLLIN)];
        let _ = ppoll(&mut polled, None, None);
        self.lane.wake.clear();
    }

    fn heard(&mut self, request: u32, message: Message) -> Result<(), Trouble> {
        match message {
            // Of a request that has been answered.
            Message::Wrote { .. } if request != self.request => Ok(()),
            Message::Wrote { chunks } => self.wrote(chunks),
            Message::Cancel { request, .. } => {
                self.cancelled |= request == self.request;
                Ok(())
            }
            _ => Err(Trouble::protocol("a lane works on one request at a time")),
        }
    }

    /// Takes the client's watermark, which may not pass what the window has room for: what lies there would be
    /// something else by now.
    pub(crate) fn wrote(&mut self, chunks: u32) -> Result<(), Trouble> {
        let chunks = chunks as usize;
        let most = self.flow.as_ref().map_or(0, |flow| flow.writable());
        if chunks < self.ready || chunks > most {
            let ready = self.ready;
            return Err(Trouble::protocol(format!(
                "WROTE {chunks} after {ready}, of {most} that may be written"
            )));
        }
        self.ready = chunks;
        Ok(())
    }

    /// Fails if the client wants no answer any more.
    pub(crate) fn go_on(&self) -> Result<(), Trouble> {
        if self.cancelled {
            return Err(Trouble::new(ErrorCode::Cancelled, "the request was cancelled", ""));
        }
        if self.hub.is_stopping() { Err(stopping()) } else { Ok(()) }
    }
}

/// When a client has waited for as many milliseconds as it said it would.
pub(crate) fn deadline(timeout: u32) -> Option<Instant> {
    (timeout != NO_TIMEOUT).then(|| Instant::now() + Duration::from_millis(u64::from(timeout)))
}

pub(crate) fn stopping() -> Trouble {
    Trouble::new(ErrorCode::Stopping, "the daemon is stopping", "try again: the next use starts a new one")
}

/// What a lane's request is answered with.
pub(crate) type Answered = Result<Answer, Trouble>;
