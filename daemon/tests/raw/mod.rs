//! A minimal client on the protocol crate's frames: nothing between a test and what goes over the socket.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]
#![allow(unsafe_code, reason = "values are copied into a window, results read where they lie")]

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use arrow_ipc::reader::FileReader;
use serde_json::Value;
use shmquant_daemon::{Config, Daemon};
use shmquant_kernels::{Affine, FloatType, Granularity, Mapping as Sign, OnNonFinite, Scheme};
use shmquant_protocol::chunks::{ChunkList, MIN_WINDOW};
use shmquant_protocol::descriptor::{Body, Descriptor, Item, Role, Spec, TableKind, Values, Way};
use shmquant_protocol::message::{
    ErrorCode, Failure, Lease, MAX_FRAME, MINOR, Message, NO_TIMEOUT, Naming, Quantize, Release, Welcome,
};
use shmquant_protocol::segment::{Backing, Mapping};
use shmquant_protocol::socket::{Connection, SocketError};

/// No answer within this time is a failed test.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn daemon(change: impl FnOnce(&mut Config)) -> Daemon {
    let mut config = Config { workers: 2, window: MIN_WINDOW, ..Config::default() };
    change(&mut config);
    Daemon::in_process(config).unwrap()
}

pub(crate) struct Raw {
    pub(crate) connection: Connection,
    frame: Vec<u8>,
    next: u32,
}

impl Raw {
    pub(crate) fn new(daemon: &Daemon) -> Self {
        Self::over(Connection::from_fd(daemon.connect().unwrap()).unwrap())
    }

    pub(crate) fn over(connection: Connection) -> Self {
        Self { connection, frame: vec![0; MAX_FRAME], next: 1 }
    }

    pub(crate) fn send(&mut self, message: &Message) -> u32 {
        let request = self.next;
        self.next += 1;
        self.send_as(request, message);
        request
    }

    pub(crate) fn send_as(&self, request: u32, message: &Message) {
        let mut frame = Vec::new();
        message.encode(request, &mut frame);
        self.connection.send(&frame, &[]).unwrap();
    }

    pub(crate) fn recv(&mut self) -> Result<(u32, Message, Option<OwnedFd>), SocketError> {
        let mut fds = Vec::new();
        let until = Some(Instant::now() + PATIENCE);
        let got = self.connection.recv_spin(&mut self.frame, &mut fds, Duration::ZERO, until)?;
        let (request, message) = Message::decode(&self.frame[..got.len]).unwrap();
        Ok((request, message, fds.pop()))
    }

    /// The daemon has closed the connection, after whatever it still had to say.
    pub(crate) fn assert_closed(&mut self) {
        loop {
            match self.recv() {
                Err(SocketError::Closed) => return,
                Ok((_, Message::Unmap { .. } | Message::Error(_), _)) => {}
                other => panic!("not closed: {other:?}"),
            }
        }
    }

    pub(crate) fn assert_protocol_error(&mut self) {
        match self.recv().unwrap().1 {
            Message::Error(e) if e.code == ErrorCode::Protocol => {}
            other => panic!("{other:?}"),
        }
        self.assert_closed();
    }
}

/// Between two looks. (Yielding instead starves others for seconds on some kernels when many tests do it at a time.)
pub(crate) fn pause() {
    std::thread::park_timeout(Duration::from_micros(200));
}

/// A session with its primary.
pub(crate) struct Client {
    pub raw: Raw,
    pub(crate) welcome: Welcome,
    /// Segments the daemon asked to unmap, not answered yet.
    pub(crate) notices: VecDeque<u64>,
}

impl Client {
    pub(crate) fn new(daemon: &Daemon) -> Self {
        Self::over(Raw::new(daemon))
    }

    pub(crate) fn over(raw: Raw) -> Self {
        Self::greet(raw).unwrap()
    }

    /// Says `HELLO` to a daemon that may be about to end.
    pub(crate) fn greet(mut raw: Raw) -> Result<Self, SocketError> {
        let mut frame = Vec::new();
        Message::Hello { minor: MINOR, version: "test".to_owned() }.encode(raw.next, &mut frame);
        raw.next += 1;
        raw.connection.send(&frame, &[])?;
        match raw.recv()?.1 {
            Message::Welcome(welcome) => Ok(Self { raw, welcome, notices: VecDeque::new() }),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn ask(&mut self, message: &Message) -> Result<(Message, Option<OwnedFd>), Failure> {
        let asked = self.raw.send(message);
        loop {
            match self.raw.recv().unwrap() {
                (0, Message::Unmap { segment }, None) => self.notices.push_back(segment),
                (request, Message::Error(e), _) if request == asked => return Err(*e),
                (request, message, fd) if request == asked => return Ok((message, fd)),
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn stat(&mut self) -> Value {
        match self.ask(&Message::Stat).unwrap().0 {
            Message::Stats(text) => serde_json::from_str(&text).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Asks for the daemon's state until it is as wanted.
    pub(crate) fn await_stat(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            self.answer_notices();
            let stat = self.stat();
            if wanted(&stat) {
                return stat;
            }
            assert!(Instant::now() < until, "never as wanted: {stat:#}");
            pause();
        }
    }

    /// Says `UNMAP` to everything the daemon asked for.
    pub(crate) fn answer_notices(&mut self) {
        while let Some(segment) = self.notices.pop_front() {
            self.raw.send_as(0, &Message::Unmap { segment });
        }
    }

    /// Waits for a notice.
    pub(crate) fn await_notice(&mut self) -> u64 {
        loop {
            if let Some(segment) = self.notices.pop_front() {
                return segment;
            }
            match self.raw.recv().unwrap() {
                (0, Message::Unmap { segment }, None) => self.notices.push_back(segment),
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn release(&mut self, lease: &Lease) {
        self.raw.send_as(0, &Message::Release(vec![released(lease, false)]));
    }

    pub(crate) fn lane(&self, daemon: &Daemon, window: u64) -> Lane {
        Lane::join(Raw::new(daemon), &self.welcome, window).unwrap()
    }
}

pub(crate) fn released(lease: &Lease, tainted: bool) -> Release {
    Release { segment: lease.extent.segment, generation: lease.extent.generation, tainted }
}

/// A lane with its window mapped.
pub(crate) struct Lane {
    pub raw: Raw,
    pub(crate) id: u32,
    pub(crate) window: Mapping,
    pub(crate) segment: u64,
    /// Descriptors of results by segment.
    pub(crate) fds: HashMap<u64, OwnedFd>,
    pub(crate) releases: Vec<Release>,
    pub(crate) timeout: u32,
    pub(crate) named: Option<Naming>,
    /// Watermarks the daemon has sent for the running request.
    pub(crate) consumed: Vec<u32>,
    /// Bytes of the ring to be used; 0 for all of the window.
    pub(crate) ring: u64,
    /// What the daemon advised last.
    pub(crate) advised: u64,
}

impl Lane {
    pub(crate) fn join(mut raw: Raw, welcome: &Welcome, window: u64) -> Result<Self, Failure> {
        raw.send(&Message::Join { session: welcome.session, token: welcome.token, window });
        match raw.recv().unwrap() {
            (_, Message::Joined { lane, segment, generation: 1, size }, Some(fd)) => {
                let window = Mapping::read_write(fd.as_fd(), size, Backing::Memfd).unwrap();
                let (fds, releases) = (HashMap::new(), Vec::new());
                let (timeout, named, consumed) = (NO_TIMEOUT, None, Vec::new());
                let (ring, advised) = (0, 0);
                Ok(Self {
                    raw,
                    id: lane,
                    window,
                    segment,
                    fds,
                    releases,
                    timeout,
                    named,
                    consumed,
                    ring,
                    advised,
                })
            }
            (_, Message::Error(e), _) => Err(*e),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        let window = self.window.as_mut_ptr().unwrap();
        assert!(at as usize + bytes.len() <= self.window.len());
        // SAFETY: inside the mapping, checked; the bytes are private.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), window.add(at as usize), bytes.len()) };
    }

    /// Writes the descriptor and as many chunks as fit, and sends `QUANTIZE`.
    pub(crate) fn start(&mut self, table: &Table) -> Running {
        let mut bytes = Vec::new();
        table.descriptor.encode(&mut bytes).unwrap();
        let list =
            ChunkList::with_ring(&table.descriptor, bytes.len() as u64, self.window.len() as u64, self.ring);
        self.put(0, &bytes);
        let mut running = Running { request: 0, list, written: 0, consumed: 0 };
        running.write(self, table);
        running.request = self.raw.send(&Message::Quantize(Quantize {
            descriptor: bytes.len() as u64,
            ready: running.written as u32,
            timeout: self.timeout,
            named: self.named.take(),
            releases: std::mem::take(&mut self.releases),
            ring: self.ring,
        }));
        self.consumed.clear();
        running
    }

    /// Streams to the end.
    pub(crate) fn finish(&mut self, mut running: Running, table: &Table) -> Result<(Lease, u64), Failure> {
        loop {
            match self.raw.recv().unwrap() {
                (request, Message::Consumed { chunks }, None) if request == running.request => {
                    assert!(chunks as usize > running.consumed, "a watermark went back");
                    self.consumed.push(chunks);
                    running.consumed = chunks as usize;
                    let before = running.written;
                    running.write(self, table);
                    if running.written > before {
                        self.raw.send_as(request, &Message::Wrote { chunks: running.written as u32 });
                    }
                }
                (request, Message::Done { lease, report, ring }, fd) if request == running.request => {
                    self.advised = ring;
                    assert_eq!(lease.fd, fd.is_some());
                    if let Some(fd) = fd {
                        assert!(self.fds.insert(lease.extent.segment, fd).is_none(), "sent twice");
                    }
                    return Ok((lease, report));
                }
                (request, Message::Error(e), _) if request == running.request => return Err(*e),
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn quantize(&mut self, table: &Table) -> Result<(Lease, u64), Failure> {
        let running = self.start(table);
        self.finish(running, table)
    }

    /// The result's file.
    pub(crate) fn bytes(&self, lease: &Lease) -> Vec<u8> {
        bytes_of(&self.fds[&lease.extent.segment], lease)
    }

    /// Rows of the result's file.
    pub(crate) fn rows(&self, lease: &Lease) -> usize {
        rows_of(&self.fds[&lease.extent.segment], lease)
    }
}

/// The bytes of a result's file.
pub(crate) fn bytes_of(fd: &OwnedFd, lease: &Lease) -> Vec<u8> {
    let mapping = Mapping::read_only(fd.as_fd(), lease.segment_size, Backing::Memfd).unwrap();
    let at = lease.extent.offset as usize..(lease.extent.offset + lease.extent.length) as usize;
    assert!(at.end <= mapping.len());
    // SAFETY: inside the mapping; a leased result is not written.
    unsafe { std::slice::from_raw_parts(mapping.as_ptr().add(at.start), at.len()) }.to_vec()
}

/// Reads a result as Arrow does: rows in it.
pub(crate) fn rows_of(fd: &OwnedFd, lease: &Lease) -> usize {
    let reader = FileReader::try_new(std::io::Cursor::new(bytes_of(fd, lease)), None).unwrap();
    reader.map(|batch| batch.unwrap().num_rows()).sum()
}

pub(crate) struct Running {
    pub(crate) request: u32,
    pub(crate) list: ChunkList,
    pub(crate) written: usize,
    pub(crate) consumed: usize,
}

impl Running {
    pub(crate) fn write(&mut self, lane: &Lane, table: &Table) {
        let until = self.list.writable(self.consumed);
        for chunk in &self.list.chunks[self.written..until] {
            if !chunk.shared && chunk.bytes > 0 {
                let values = &table.values[chunk.item as usize];
                let first = chunk.first as usize;
                let bytes: Vec<u8> = values[first..first + chunk.count as usize]
                    .iter()
                    .flat_map(|v| v.to_le_bytes())
                    .collect();
                assert_eq!(bytes.len() as u64, chunk.bytes);
                lane.put(chunk.at, &bytes);
            }
        }
        self.written = until;
    }
}

/// Layers of f32 values.
#[derive(Clone)]
pub(crate) struct Table {
    pub(crate) descriptor: Descriptor,
    pub(crate) values: Vec<Vec<f32>>,
}

pub(crate) fn table(scheme: Scheme, granularity: Granularity, layers: &[(u64, u64)]) -> Table {
    let spec = Spec {
        affine: Some(Affine::new(scheme, Some(Sign::Symmetric)).unwrap()),
        granularity,
        on_nonfinite: OnNonFinite::Error,
        packed: false,
        group_size: if granularity == Granularity::Group { 128 } else { 0 },
    };
    let items = layers.iter().enumerate().map(|(i, (rows, k))| Item {
        name: format!("layer.{i}"),
        body: Body::Values(Values {
            role: Role::Layer,
            spec: 0,
            dtype: FloatType::F32,
            null: false,
            rows: *rows,
            k: *k,
            null_count: 0,
            shape: vec![*rows as i64, *k as i64],
            params: None,
            way: Way::Streamed,
        }),
    });
    let descriptor = Descriptor {
        table: TableKind::Layers { large_names: false },
        metrics: false,
        continue_on_error: false,
        specs: vec![spec],
        metadata: Default::default(),
        rows: layers.len() as u64,
        items: items.collect(),
    };
    let value = |i: u64| ((i.wrapping_mul(2_654_435_761) >> 7) % 2001) as f32 / 1000.0 - 1.0;
    let values = layers.iter().map(|(rows, k)| (0..rows * k).map(value).collect());
    Table { descriptor, values: values.collect() }
}

/// One layer of `n` values in rows of 256.
pub(crate) fn layer(n: u64) -> Table {
    table(Scheme::Int8, Granularity::Row, &[(n / 256, 256)])
}

/// Values of the report: `n` of each item.
pub(crate) fn report(lane: &Lane, bytes: u64) -> Vec<u64> {
    // SAFETY: inside the window (the daemon wrote there), which nobody writes now.
    let bytes = unsafe { std::slice::from_raw_parts(lane.window.as_ptr(), bytes as usize) };
    bytes.chunks(80).map(|item| u64::from_le_bytes(item[..8].try_into().unwrap())).collect()
}
