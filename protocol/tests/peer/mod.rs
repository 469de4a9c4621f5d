//! A daemon's side of the protocol, spoken by a test sentence by sentence.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a step that fails is how a test fails")]

#[path = "../layers/mod.rs"]
pub(crate) mod layers;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use layers::Layers;
use shmquant_protocol::chunks::MIN_WINDOW;
use shmquant_protocol::client::{Address, ClientError, Config, Options, Quantized, Session};
use shmquant_protocol::message::{Extent, Lease, MINOR, Message, Quantize, Release, Welcome};
use shmquant_protocol::segment::{Backing, Kind, Segment, SegmentName};
use shmquant_protocol::socket::{Connection, SocketError};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The daemon's end of one connection, driven by a test.
pub(crate) struct Peer(pub(crate) Connection);

impl Peer {
    pub(crate) fn hear(&self) -> (u32, Message) {
        let (mut buffer, mut fds) = (vec![0; 1 << 16], Vec::new());
        let deadline = Some(Instant::now() + PATIENCE);
        let received = self.0.recv_spin(&mut buffer, &mut fds, Duration::ZERO, deadline).unwrap();
        Message::decode(&buffer[..received.len]).unwrap()
    }

    pub(crate) fn say(&self, request: u32, message: &Message, fds: &[BorrowedFd<'_>]) {
        let mut frame = Vec::new();
        message.encode(request, &mut frame);
        self.0.send(&frame, fds).unwrap();
    }

    /// The next request, after what was left of one that was answered early.
    pub(crate) fn hear_quantize(&self) -> (u32, Quantize) {
        loop {
            match self.hear() {
                (request, Message::Quantize(quantize)) => return (request, quantize),
                (_, Message::Wrote { .. }) => {}
                other => panic!("{other:?} came instead of QUANTIZE"),
            }
        }
    }

    pub(crate) fn hear_releases(&self, n: usize) -> Vec<Release> {
        let mut all = Vec::new();
        while all.len() < n {
            match self.hear() {
                (0, Message::Release(list)) => all.extend(list),
                other => panic!("{other:?} came instead of RELEASE"),
            }
        }
        all
    }

    pub(crate) fn has_ended(&self) -> bool {
        let (mut buffer, mut fds) = (vec![0; 1 << 16], Vec::new());
        let deadline = Some(Instant::now() + PATIENCE);
        loop {
            match self.0.recv_spin(&mut buffer, &mut fds, Duration::ZERO, deadline) {
                Ok(_) => {}
                Err(SocketError::Closed) => return true,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// The connections that a session makes.
pub(crate) struct Daemon(mpsc::Receiver<Peer>);

impl Daemon {
    pub(crate) fn accept(&self) -> Peer {
        self.0.recv_timeout(PATIENCE).unwrap()
    }

    pub(crate) fn primary(&self) -> Peer {
        let peer = self.accept();
        let (request, message) = peer.hear();
        assert!(matches!(message, Message::Hello { minor: MINOR, .. }), "{message:?}");
        peer.say(request, &Message::Welcome(welcome()), &[]);
        peer
    }

    pub(crate) fn lane(&self) -> Peer {
        let peer = self.accept();
        let (request, message) = peer.hear();
        assert_eq!(message, Message::Join { session: 5, token: [7; 16], window: 0 });
        let name = SegmentName { instance: 0xfa, kind: Kind::Window, id: 1 };
        let window = Segment::create(Backing::Memfd, &name, MIN_WINDOW).unwrap();
        let joined = Message::Joined { lane: 3, segment: 1, generation: 1, size: MIN_WINDOW };
        peer.say(request, &joined, &[window.fd().as_fd()]);
        peer
    }
}

pub(crate) fn welcome() -> Welcome {
    Welcome {
        minor: MINOR,
        posix: false,
        instance: 0xfa,
        session: 5,
        token: [7; 16],
        window: MIN_WINDOW,
        max_window: MIN_WINDOW,
        max_lanes: 2,
        poll: 0,
        version: "9.9.9".to_owned(),
    }
}

pub(crate) fn session() -> (Session, Daemon) {
    let (sender, receiver) = mpsc::channel();
    let address = Address::InProcess(Arc::new(move || {
        let (ours, theirs) = Connection::pair().map_err(std::io::Error::other)?;
        sender.send(Peer(ours)).map_err(std::io::Error::other)?;
        Ok(OwnedFd::from(theirs))
    }));
    (
        Session::new(Config { address, start: None, window: None, max_lanes: None, poll: None }),
        Daemon(receiver),
    )
}

pub(crate) fn result(id: u64, fill: u8) -> Segment {
    let name = SegmentName { instance: 0xfa, kind: Kind::Result, id };
    let segment = Segment::create(Backing::Memfd, &name, 8192).unwrap();
    write(&segment, fill);
    segment
}

#[allow(unsafe_code, reason = "a segment is written through its address")]
pub(crate) fn write(segment: &Segment, fill: u8) {
    // SAFETY: the segment's own memory, which nobody reads now.
    unsafe { std::ptr::write_bytes(segment.as_ptr(), fill, segment.len()) }
}

pub(crate) fn lease(segment: u64, generation: u64, fd: bool) -> Lease {
    let extent = Extent { segment, generation, offset: 64, length: 1000 };
    Lease { extent, segment_size: 8192, fd, dataset: false }
}

pub(crate) fn done(lease: Lease) -> Message {
    Message::Done { lease, report: 0, ring: 0 }
}

pub(crate) type Call = JoinHandle<Result<Quantized, ClientError>>;

/// Quantizes on a thread of its own.
pub(crate) fn call(session: &Session, layers: Layers, timeout: Option<Duration>) -> Call {
    let session = session.clone();
    std::thread::spawn(move || session.quantize(&layers, &Options { timeout, ..Options::default() }))
}

pub(crate) fn small() -> Layers {
    Layers::new(&[1000])
}

/// More than the window holds.
pub(crate) fn large() -> Layers {
    Layers::new(&[4 << 20])
}
