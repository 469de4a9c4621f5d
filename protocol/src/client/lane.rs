//! Lanes: connections for one request at a time, each with its window, handed to whichever thread calls.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::clock::{Clock, Stop};
use super::error::ClientError;
use super::leases::lock;
use super::session::Link;
use super::window::Window;
use crate::chunks::MIN_WINDOW;
use crate::failpoint::failpoint;
use crate::message::{ErrorCode, Message};
use crate::socket::{Connection, MAX_FRAME, SocketError};

/// How long a daemon may take to answer `JOIN`.
const JOIN_TIME: Duration = Duration::from_secs(10);

/// One more connection of a session, with its window.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) wire: Wire,
    pub(super) window: Window,
    /// Scratch for descriptors, kept between requests.
    pub(super) scratch: Vec<u8>,
    /// What the daemon advised when it last streamed: bytes of the ring, 0 for all of the window.
    pub(super) ring: u64,
}

/// A lane's connection.
#[derive(Debug)]
pub(super) struct Wire {
    connection: Connection,
    /// The lane's number at the daemon.
    pub(super) lane: u32,
    /// The running request's number.
    pub(super) request: u32,
    /// Descriptors that came with the last frame.
    pub(super) fds: Vec<OwnedFd>,
    frame: Vec<u8>,
    buffer: Vec<u8>,
    noted: Option<usize>,
}

/// What came in on a lane.
#[derive(Debug)]
pub(super) enum Event {
    /// Chunks below this one may be overwritten.
    Consumed(u32),
    /// The answer; its descriptors are in [`Wire::fds`].
    Reply(Message),
}

impl Lane {
    fn open(link: &Link, window: u64, clock: &mut Clock<'_>) -> Result<Self, ClientError> {
        const WHAT: &str = "opening a lane";
        let latest = Instant::now() + JOIN_TIME;
        let limit = clock.deadline().map_or(latest, |deadline| deadline.min(latest));
        let timeout = clock.timeout();
        let lost = |error| match error {
            SocketError::Deadline { .. } if limit < latest => ClientError::Deadline { timeout },
            error => ClientError::lost(WHAT, error),
        };
        let connection = link.address().connect(limit).map_err(lost)?;
        failpoint("client.lane_connected");
        let mut frame = Vec::new();
        let (session, token) = (link.welcome().session, link.welcome().token);
        Message::Join { session, token, window }.encode(1, &mut frame);
        connection.send_until(&frame, &[], Some(limit)).map_err(lost)?;
        failpoint("client.join_sent");
        let (mut buffer, mut fds) = (vec![0; MAX_FRAME], Vec::new());
        // The daemon may have to wait for the window's memory.
        let received = loop {
            let until = clock.wait_until().map_or(limit, |ask| ask.min(limit));
            match connection.recv_spin(&mut buffer, &mut fds, Duration::ZERO, Some(until)) {
                Err(SocketError::Deadline { .. }) if until < limit => {
                    if let Some(stop) = clock.check() {
                        return Err(clock.error(stop));
                    }
                }
                received => break received,
            }
        };
        let len = received.map_err(lost)?.len;
        failpoint("client.join_received");
        let (_, message) = Message::decode(&buffer[..len]).map_err(|e| ClientError::broken(&e))?;
        let (id, size) = match message {
            Message::Joined { lane, size, .. } => (lane, size),
            // A daemon that does not know the session is another one than it was, or has given the session up.
            Message::Error(failure)
                if matches!(failure.code, ErrorCode::Protocol | ErrorCode::NotFound | ErrorCode::Gone) =>
            {
                return Err(ClientError::lost(WHAT, SocketError::Closed));
            }
            Message::Error(failure) => return Err(ClientError::Refused(failure)),
            other => return Err(ClientError::protocol(format!("JOIN was answered by {other:?}"))),
        };
        let Some(fd) = fds.pop().filter(|_| size >= MIN_WINDOW) else {
            return Err(ClientError::protocol(format!("lane {id} came with a window of {size} bytes")));
        };
        let window = Window::map(fd.as_fd(), size, link.leases().backing())?;
        failpoint("client.window_mapped");
        let noted = link.descriptors().put(connection.as_fd().as_raw_fd());
        let wire = Wire { connection, lane: id, request: 1, fds, frame, buffer, noted };
        Ok(Self { wire, window, scratch: Vec::new(), ring: 0 })
    }

    /// Writes the descriptor in [`scratch`](Self::scratch) to the window's start. False if there is no room for it.
    pub(super) fn write_descriptor(&mut self) -> bool {
        if cfg!(debug_assertions) {
            let (half, _) = self.scratch.split_at(self.scratch.len() / 2);
            let _ = self.window.write(half);
            failpoint("client.descriptor_half_written");
        }
        self.window.write(&self.scratch)
    }

    fn close(self, link: &Link) {
        link.descriptors().clear(self.wire.noted);
        // A forked child may hold a copy of the socket: closing ours would not end it.
        self.wire.connection.shutdown();
    }
}

impl Wire {
    /// Begins the next request: its number.
    pub(super) fn begin(&mut self) -> u32 {
        self.request = self.request.wrapping_add(1).max(1);
        self.request
    }

    /// Sends a message of the running request.
    pub(super) fn send(&mut self, message: &Message, clock: &mut Clock<'_>) -> Result<(), ClientError> {
        message.encode(self.request, &mut self.frame);
        loop {
            match self.connection.send_until(&self.frame, &[], clock.wait_until()) {
                Ok(()) => return Ok(()),
                Err(SocketError::Deadline { .. }) => {}
                Err(error) => return Err(ClientError::lost("sending a request", error)),
            }
            if let Some(stop) = clock.check() {
                return Err(clock.error(stop));
            }
        }
    }

    /// Sends a message that is not answered, ahead of the next request.
    pub(super) fn tell(&mut self, message: &Message, clock: &mut Clock<'_>) -> Result<(), ClientError> {
        let request = std::mem::take(&mut self.request);
        let sent = self.send(message, clock);
        self.request = request;
        sent
    }

    /// What has come, if anything has.
    pub(super) fn look(&mut self) -> Result<Option<Event>, ClientError> {
        let received = self.connection.try_recv(&mut self.buffer, &mut self.fds);
        match received {
            Ok(None) => Ok(None),
            Ok(Some(received)) => self.event(received.len).map(Some),
            Err(SocketError::FdsLost { len, .. }) => self.event(len).map(Some),
            Err(error) => Err(ClientError::lost("waiting for a result", error)),
        }
    }

    /// Waits for what comes next: asks for it again and again for as long as `spin`, then sleeps. `None` at `until`.
    pub(super) fn wait(
        &mut self,
        spin: Duration,
        until: Option<Instant>,
    ) -> Result<Option<Event>, ClientError> {
        let received = self.connection.recv_spin(&mut self.buffer, &mut self.fds, spin, until);
        match received {
            Ok(received) => self.event(received.len).map(Some),
            Err(SocketError::FdsLost { len, .. }) => self.event(len).map(Some),
            Err(SocketError::Deadline { .. }) => Ok(None),
            Err(error) => Err(ClientError::lost("waiting for a result", error)),
        }
    }

    fn event(&self, len: usize) -> Result<Event, ClientError> {
        let frame = self.buffer.get(..len).unwrap_or_default();
        let (request, message) = Message::decode(frame).map_err(|e| ClientError::broken(&e))?;
        match message {
            // A daemon that could not read the request's number answers 0.
            Message::Error(_) if request == 0 => Ok(Event::Reply(message)),
            _ if request != self.request => {
                Err(ClientError::protocol(format!("request {} was answered as {request}", self.request)))
            }
            Message::Consumed { chunks } => Ok(Event::Consumed(chunks)),
            other => Ok(Event::Reply(other)),
        }
    }
}

/// The lanes of a session.
#[derive(Debug)]
pub(super) struct Lanes {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// The one used last is taken first: its window is warm.
    idle: Vec<Lane>,
    open: u32,
    most: u32,
    /// Calls that wait for a lane: without any, nobody is woken, which would be a system call.
    waiting: u32,
    ended: bool,
}

impl Lanes {
    pub(super) fn new(most: u32) -> Self {
        let state = State { idle: Vec::new(), open: 0, most: most.max(1), waiting: 0, ended: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// A lane with a window of at least `need` bytes; waits while all are busy.
    pub(super) fn take<'a>(
        &'a self,
        link: &'a Link,
        need: u64,
        clock: &mut Clock<'_>,
    ) -> Result<Borrowed<'a>, ClientError> {
        let mut state = lock(&self.state);
        loop {
            if state.ended {
                return Err(ClientError::lost("taking a lane", SocketError::Closed));
            }
            if let Some(at) = state.idle.iter().rposition(|lane| lane.window.len() >= need) {
                let lane = state.idle.remove(at);
                return Ok(Borrowed { link, lane: Some(lane), whole: true });
            }
            if state.open >= state.most && !state.idle.is_empty() {
                let small = state.idle.remove(0);
                state.open -= 1;
                small.close(link);
            }
            if state.open < state.most {
                state.open += 1;
                drop(state);
                match self.grow(link, need, clock)? {
                    Some(lane) => return Ok(Borrowed { link, lane: Some(lane), whole: true }),
                    None => {
                        state = lock(&self.state);
                        continue;
                    }
                }
            }
            let wait = clock.wait_for();
            state.waiting += 1;
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
            state.waiting -= 1;
            if let Some(stop) = clock.check() {
                return Err(clock.error(stop));
            }
        }
    }

    /// Opens the lane that was counted already. `None` if the daemon allows no more, but there are others.
    fn grow(&self, link: &Link, need: u64, clock: &mut Clock<'_>) -> Result<Option<Lane>, ClientError> {
        let usual = if link.window() == 0 { link.welcome().window } else { link.window() };
        let window = if need > usual { need } else { link.window() };
        let opened = loop {
            match Lane::open(link, window, clock) {
                // The daemon waits for a window's memory for a while; this call may have longer.
                Err(ClientError::Refused(failure)) if failure.code == ErrorCode::Deadline => {
                    match clock.check() {
                        Some(Stop::Interrupted) => break Err(clock.error(Stop::Interrupted)),
                        None if clock.deadline().is_none_or(|deadline| Instant::now() < deadline) => {}
                        _ => break Err(ClientError::Refused(failure)),
                    }
                }
                opened => break opened,
            }
        };
        let error = match opened {
            Ok(lane) if lane.window.len() >= need => return Ok(Some(lane)),
            Ok(lane) => {
                let got = lane.window.len();
                lane.close(link);
                ClientError::TooLarge { bytes: need / 4, most: got / 4 }
            }
            Err(error) => error,
        };
        let mut state = lock(&self.state);
        state.open -= 1;
        let others = state.open > 0;
        let limited = matches!(&error, ClientError::Refused(f) if f.code == ErrorCode::Limit);
        if limited && others {
            state.most = state.open;
            return Ok(None);
        }
        drop(state);
        self.changed.notify_all();
        if matches!(error, ClientError::Lost { .. } | ClientError::Protocol(_)) {
            link.fail();
        }
        Err(error)
    }

    fn put(&self, link: &Link, lane: Lane, whole: bool) {
        let mut state = lock(&self.state);
        let waited_for = state.waiting > 0;
        if whole && !state.ended {
            state.idle.push(lane);
            drop(state);
        } else {
            state.open -= 1;
            drop(state);
            lane.close(link);
        }
        if waited_for {
            self.changed.notify_one();
        }
    }

    /// Closes the lanes that no call uses, for their descriptors. True if there were any.
    pub(super) fn close_idle(&self, link: &Link) -> bool {
        let mut state = lock(&self.state);
        let idle = std::mem::take(&mut state.idle);
        state.open -= idle.len() as u32;
        drop(state);
        let some = !idle.is_empty();
        idle.into_iter().for_each(|lane| lane.close(link));
        self.changed.notify_all();
        some
    }

    /// Closes all lanes; those in use when their call is over.
    pub(super) fn end(&self, link: &Link) {
        lock(&self.state).ended = true;
        self.close_idle(link);
    }
}

/// A lane in use: back to the others when dropped, or closed if its request did not come to an end.
#[derive(Debug)]
pub(super) struct Borrowed<'a> {
    link: &'a Link,
    lane: Option<Lane>,
    /// No request is under way.
    whole: bool,
}

impl Borrowed<'_> {
    /// The lane, which from now on is closed on drop unless [`finished`](Self::finished) is said.
    pub(super) fn start(&mut self) -> Option<&mut Lane> {
        self.whole = false;
        self.lane.as_mut()
    }

    /// The request has been answered.
    pub(super) fn finished(&mut self) {
        self.whole = true;
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        let Some(lane) = self.lane.take() else { return };
        if self.link.is_ours() {
            self.link.lanes().put(self.link, lane, self.whole);
        } else {
            // Forked in the middle of a call: the socket and the window are the parent's.
            std::mem::forget(lane);
        }
    }
}
