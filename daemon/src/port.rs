//! A connection with its buffers: one thread receives and answers here.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use shmquant_protocol::message::{ErrorCode, Failure, MAX_FRAME, Message};
use shmquant_protocol::socket::{Connection, SocketError};

use crate::error::{Trouble, fitted};
use crate::hub::{Hub, SPIN};
use crate::memory::SegmentMemory;

/// Receives requests and sends replies.
#[derive(Debug)]
pub(crate) struct Port<'a> {
    pub(crate) connection: &'a Connection,
    frame: Box<[u8]>,
    out: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// How many receives are still to sleep at once.
    rest: u32,
    /// How many there were to be the last time.
    last_rest: u32,
}

/// Most receives that sleep at once before polling is tried again.
const LONGEST_REST: u32 = 64;

/// A frame: its request number, and its message or what is wrong with it.
pub(crate) type Incoming = (u32, Result<Message, Trouble>);

impl<'a> Port<'a> {
    pub(crate) fn new(connection: &'a Connection) -> Self {
        let frame = vec![0; MAX_FRAME].into_boxed_slice();
        Self { connection, frame, out: Vec::with_capacity(1024), fds: Vec::new(), rest: 0, last_rest: 0 }
    }

    /// The next frame, however long it takes; polls for it first if there is a permit and it has paid lately.
    ///
    /// On the client's own core it never pays: the client cannot go on before this thread sleeps.
    pub(crate) fn recv(&mut self, poll: Option<&Hub>) -> Result<Incoming, Trouble> {
        let permit = match self.rest {
            0 => poll.and_then(Hub::spin),
            _ => None,
        };
        self.rest = self.rest.saturating_sub(1);
        let received = match permit {
            None => Err(SocketError::Deadline { what: "polling" }),
            Some(_) => {
                let until = Some(Instant::now() + SPIN);
                let received = self.connection.recv_spin(&mut self.frame, &mut self.fds, SPIN, until);
                self.last_rest = match received {
                    Err(SocketError::Deadline { .. }) => (self.last_rest * 2).clamp(1, LONGEST_REST),
                    _ => 0,
                };
                self.rest = self.last_rest;
                received
            }
        };
        drop(permit);
        let received = match received {
            Err(SocketError::Deadline { .. }) => self.connection.recv(&mut self.frame, &mut self.fds),
            received => received,
        };
        self.decode(received.map(|r| r.len))
    }

    /// The first frame of a connection, which has to come soon.
    pub(crate) fn recv_within(&mut self, patience: Duration) -> Result<Incoming, Trouble> {
        let until = Some(Instant::now() + patience);
        let received = self.connection.recv_spin(&mut self.frame, &mut self.fds, Duration::ZERO, until);
        self.decode(received.map(|r| r.len))
    }

    /// The next frame if there is one.
    pub(crate) fn try_recv(&mut self) -> Result<Option<Incoming>, Trouble> {
        match self.connection.try_recv(&mut self.frame, &mut self.fds) {
            Ok(None) => Ok(None),
            Ok(Some(received)) => self.decode(Ok(received.len)).map(Some),
            Err(error) => self.decode(Err(error)).map(Some),
        }
    }

    fn decode(&mut self, received: Result<usize, SocketError>) -> Result<Incoming, Trouble> {
        // No request has descriptors; whatever came is closed.
        self.fds.clear();
        let len = match received {
            Ok(len) => len,
            Err(error) => {
                return match Trouble::from(error) {
                    Trouble::Lost => Err(Trouble::Lost),
                    refused => Ok((0, Err(refused))),
                };
            }
        };
        let frame = &self.frame[..len];
        match Message::decode(frame) {
            Ok((request, message)) => Ok((request, Ok(message))),
            Err(error) => {
                // So that the asker can tell which of its frames was wrong, if it got as far as the number.
                let number = frame.get(8..12).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
                Ok((number, Err(error.into())))
            }
        }
    }

    /// Sends a reply, with a segment's descriptor if there is one.
    pub(crate) fn send(
        &mut self,
        request: u32,
        message: &Message,
        memory: Option<&SegmentMemory>,
    ) -> Result<(), SocketError> {
        message.encode(request, &mut self.out);
        match memory.and_then(SegmentMemory::fd) {
            Some(fd) => self.connection.send(&self.out, &[fd]),
            None => self.connection.send(&self.out, &[]),
        }
    }

    /// Answers with an error. `Err` if the connection has to end, which it has after `PROTOCOL`.
    pub(crate) fn refuse(&mut self, request: u32, trouble: Trouble) -> Result<(), Trouble> {
        let Trouble::Refused(failure) = trouble else { return Err(Trouble::Lost) };
        let last = matches!(failure.code, ErrorCode::Protocol | ErrorCode::Version);
        if last {
            tracing::debug!("a peer broke the protocol: {}", failure.message);
        }
        let failure: Failure = fitted(*failure);
        self.send(request, &Message::Error(Box::new(failure)), None)?;
        if last { Err(Trouble::Lost) } else { Ok(()) }
    }
}
