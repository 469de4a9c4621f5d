//! The messages of PROTOCOL.md sections 1 to 3 as types, and their only encoder and decoder.

mod parts;

pub(crate) use parts::{read_extent, write_extent};

use crate::wire::{Reader, WireError, Writer};
use parts::{
    FLAG_NAMED, FLAG_REPLACE, read_failure, read_lease, read_name, read_quantize, read_releases, read_target,
    write_lease, write_releases,
};

/// The protocol's major version: first byte of every frame and part of the socket's name.
pub const MAJOR: u8 = 1;
/// The protocol's minor version.
pub const MINOR: u32 = 0;
/// Bytes of the frame header.
pub const HEADER: usize = 16;
/// Largest frame.
pub const MAX_FRAME: usize = 65_536;
/// Most file descriptors in one frame.
pub const MAX_FDS: usize = 8;
/// `timeout` value for "wait as long as it takes".
pub const NO_TIMEOUT: u32 = u32::MAX;
/// Most releases in one frame.
pub const MAX_RELEASES: usize = 2_000;
/// Longest name of a dataset, in bytes.
pub const MAX_NAME: usize = 1_024;

/// `(segment, generation, offset, length)`: the unit of state, naming and holding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Extent {
    /// Segment id, never reused by the daemon.
    pub segment: u64,
    /// Which use of the segment's memory is meant.
    pub generation: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// A session's right to map and read an extent, as a reply hands it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lease {
    /// What may be read.
    pub extent: Extent,
    /// Size of the whole segment, for mapping it.
    pub segment_size: u64,
    /// The segment's descriptor came with this reply.
    pub fd: bool,
    /// The extent is a dataset: never recycled.
    pub dataset: bool,
}

/// One hold given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release {
    /// Segment id.
    pub segment: u64,
    /// Its generation.
    pub generation: u64,
    /// Another process may still map the memory (a fork): it must be retired.
    pub tainted: bool,
}

/// What `OPEN` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A dataset's name.
    Name(String),
    /// A ticket and its secret.
    Ticket(u64, [u8; 16]),
    /// The descriptor of an extent that this session already leases.
    Again(Extent),
}

/// What `LIST` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listing {
    /// Datasets of the catalog.
    Datasets,
    /// Leased results of all sessions.
    Results,
    /// Sessions.
    Sessions,
    /// Inputs that sessions hold.
    Inputs,
}

/// What `ALLOC` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Memory that the client writes its values to.
    Input,
    /// Memory that the session's pool keeps for a result to come.
    Warm,
}

/// Error codes of PROTOCOL.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the table in PROTOCOL.md section 3 says what each is")]
pub enum ErrorCode {
    Protocol = 1,
    Version = 2,
    InvalidInput = 3,
    Unsupported = 4,
    NoRoom = 5,
    Deadline = 6,
    Cancelled = 7,
    NotFound = 8,
    NameExists = 9,
    Gone = 10,
    Internal = 11,
    Stopping = 12,
    Limit = 13,
}

impl ErrorCode {
    const ALL: [Self; 13] = [
        Self::Protocol,
        Self::Version,
        Self::InvalidInput,
        Self::Unsupported,
        Self::NoRoom,
        Self::Deadline,
        Self::Cancelled,
        Self::NotFound,
        Self::NameExists,
        Self::Gone,
        Self::Internal,
        Self::Stopping,
        Self::Limit,
    ];
}

/// The body of an `ERROR` reply.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// Which kind.
    pub code: ErrorCode,
    /// Row of the column, or of the layer.
    pub row: u64,
    /// Element's index in the row (columns) or in the layer.
    pub index: u64,
    /// How many values are at fault.
    pub count: u64,
    /// The first of them.
    pub value: f64,
    /// What happened, with which value.
    pub message: String,
    /// What to do.
    pub hint: String,
    /// Column or layer name, empty if none is at fault.
    pub column: String,
}

impl Failure {
    /// A failure that concerns no single value.
    pub fn new(code: ErrorCode, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            code,
            row: 0,
            index: 0,
            count: 0,
            value: 0.0,
            message: message.into(),
            hint: hint.into(),
            column: String::new(),
        }
    }
}

/// Everything that crosses the socket.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields are drawn in PROTOCOL.md section 3, under the same names")]
pub enum Message {
    Hello { minor: u32, version: String },
    Welcome(Welcome),
    Join { session: u64, token: [u8; 16], window: u64 },
    Joined { lane: u32, segment: u64, generation: u64, size: u64 },
    Quantize(Quantize),
    Done { lease: Lease, report: u64, ring: u64 },
    Wrote { chunks: u32 },
    Consumed { chunks: u32 },
    Cancel { lane: u32, request: u32 },
    Release(Vec<Release>),
    Unmap { segment: u64 },
    Open(Target),
    Opened { lease: Lease, name: String },
    Ticket(Extent),
    Ticketed { ticket: u64, secret: [u8; 16] },
    Publish { extent: Extent, replace: bool, name: String },
    Published,
    Allocate { bytes: u64, purpose: Purpose, timeout: u32 },
    Allocated { lease: Lease },
    Drop { name: String },
    Dropped,
    List { cursor: u64, what: Listing },
    Listed { cursor: u64, entries: Vec<String> },
    Stat,
    Stats(String),
    Ping,
    Pong,
    Bye,
    Error(Box<Failure>),
}

/// The reply to `HELLO`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields are drawn in PROTOCOL.md section 3, under the same names")]
pub struct Welcome {
    pub minor: u32,
    pub posix: bool,
    pub instance: u64,
    pub session: u64,
    pub token: [u8; 16],
    pub window: u64,
    pub max_window: u64,
    pub max_lanes: u32,
    pub poll: u32,
    pub version: String,
}

/// A `QUANTIZE` request; its descriptor lies in the lane's window.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields are drawn in PROTOCOL.md section 3, under the same names")]
pub struct Quantize {
    pub descriptor: u64,
    pub ready: u32,
    pub timeout: u32,
    pub named: Option<Naming>,
    pub releases: Vec<Release>,
    pub ring: u64,
}

/// Where a `QUANTIZE` publishes its result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Naming {
    /// The dataset's name.
    pub name: String,
    /// Take the place of another dataset of that name.
    pub replace: bool,
    /// Digest of the source values: the same spec and digest find the existing dataset.
    pub digest: [u8; 16],
}

const REPLY: u16 = 0x8000;

impl Message {
    /// Appends the frame of this message to `out` (which is cleared first).
    pub fn encode(&self, request: u32, out: &mut Vec<u8>) {
        out.clear();
        out.resize(HEADER, 0);
        let mut w = Writer::new(out);
        let kind = match self {
            Self::Hello { minor, .. } => {
                w.u32(*minor).u32(0);
                1
            }
            Self::Welcome(m) => {
                w.u32(m.minor).u32(u32::from(m.posix)).u64(m.instance).u64(m.session).raw(&m.token);
                w.u64(m.window).u64(m.max_window).u32(m.max_lanes).u32(m.poll);
                1 | REPLY
            }
            Self::Join { session, token, window } => {
                w.u64(*session).raw(token).u64(*window);
                2
            }
            Self::Joined { lane, segment, generation, size } => {
                w.u32(*lane).u32(0).u64(*segment).u64(*generation).u64(*size);
                2 | REPLY
            }
            Self::Quantize(m) => {
                let flags =
                    m.named.as_ref().map_or(0, |n| FLAG_NAMED | if n.replace { FLAG_REPLACE } else { 0 });
                w.u64(m.descriptor).u32(m.ready).u32(m.timeout).u32(flags).u32(m.releases.len() as u32);
                w.raw(&m.named.as_ref().map_or([0; 16], |n| n.digest)).u64(m.ring);
                3
            }
            Self::Done { lease, report, ring } => {
                write_lease(&mut w, lease);
                w.u64(*report).u64(*ring);
                3 | REPLY
            }
            Self::Wrote { chunks } => {
                w.u32(*chunks);
                4
            }
            Self::Consumed { chunks } => {
                w.u32(*chunks);
                5
            }
            Self::Cancel { lane, request } => {
                w.u32(*lane).u32(*request);
                6
            }
            Self::Release(list) => {
                w.u32(list.len() as u32).u32(0);
                7
            }
            Self::Unmap { segment } => {
                w.u64(*segment);
                8
            }
            Self::Open(target) => {
                let (kind, ticket, secret, extent) = match target {
                    Target::Name(_) => (0, 0, [0; 16], Extent::default()),
                    Target::Ticket(ticket, secret) => (1, *ticket, *secret, Extent::default()),
                    Target::Again(extent) => (2, 0, [0; 16], *extent),
                };
                w.u32(kind).u32(0).u64(ticket).raw(&secret);
                write_extent(&mut w, &extent);
                9
            }
            Self::Opened { lease, .. } => {
                write_lease(&mut w, lease);
                9 | REPLY
            }
            Self::Ticket(extent) => {
                write_extent(&mut w, extent);
                10
            }
            Self::Ticketed { ticket, secret } => {
                w.u64(*ticket).raw(secret);
                10 | REPLY
            }
            Self::Publish { extent, replace, .. } => {
                write_extent(&mut w, extent);
                w.u32(if *replace { FLAG_REPLACE } else { 0 }).u32(0);
                11
            }
            Self::Published => 11 | REPLY,
            Self::Allocate { bytes, purpose, timeout } => {
                w.u64(*bytes).u32(*purpose as u32).u32(*timeout);
                12
            }
            Self::Allocated { lease } => {
                write_lease(&mut w, lease);
                12 | REPLY
            }
            Self::Drop { .. } => 13,
            Self::Dropped => 13 | REPLY,
            Self::List { cursor, what } => {
                w.u64(*cursor).u32(*what as u32).u32(0);
                14
            }
            Self::Listed { cursor, entries } => {
                w.u64(*cursor).u32(entries.len() as u32).u32(0);
                14 | REPLY
            }
            Self::Stat => 15,
            Self::Stats(_) => 15 | REPLY,
            Self::Ping => 16,
            Self::Pong => 16 | REPLY,
            Self::Bye => 17,
            Self::Error(e) => {
                w.u32(e.code as u32).u32(0).u64(e.row).u64(e.index).u64(e.count).f64(e.value);
                0xFFFF
            }
        };
        let fixed = out.len() - HEADER;
        self.encode_tail(out);
        let length = out.len() as u32;
        out[0] = MAJOR;
        out[2..4].copy_from_slice(&kind.to_le_bytes());
        out[4..8].copy_from_slice(&length.to_le_bytes());
        out[8..12].copy_from_slice(&request.to_le_bytes());
        out[12..14].copy_from_slice(&(fixed as u16).to_le_bytes());
    }

    fn encode_tail(&self, out: &mut Vec<u8>) {
        let mut w = Writer::new(out);
        match self {
            Self::Hello { version, .. } | Self::Welcome(Welcome { version, .. }) => {
                w.string(version);
            }
            Self::Quantize(m) => {
                write_releases(&mut w, &m.releases);
                if let Some(named) = &m.named {
                    w.string(&named.name);
                }
            }
            Self::Release(list) => write_releases(&mut w, list),
            Self::Open(Target::Name(name))
            | Self::Opened { name, .. }
            | Self::Publish { name, .. }
            | Self::Drop { name } => {
                w.string(name);
            }
            Self::Listed { entries, .. } => {
                for entry in entries {
                    w.string(entry);
                }
            }
            Self::Stats(text) => {
                w.string(text);
            }
            Self::Error(e) => {
                w.string(&e.message).string(&e.hint).string(&e.column);
            }
            _ => {}
        }
    }

    /// Parses one frame; gives the request number and the message.
    pub fn decode(frame: &[u8]) -> Result<(u32, Self), WireError> {
        let mut header = Reader::new(frame);
        let version = header.u8("version")?;
        if version != MAJOR {
            return Err(WireError::Value { what: "version", value: u64::from(version) });
        }
        header.u8("reserved")?;
        let kind = header.u16("type")?;
        let length = header.u32("length")?;
        if length as usize != frame.len() {
            return Err(WireError::Value { what: "length", value: u64::from(length) });
        }
        let request = header.u32("request")?;
        let fixed_len = header.u16("fixed")?;
        header.u16("reserved")?;
        let fixed = header.bytes(u64::from(fixed_len), "fixed part")?;
        // A shorter fixed part comes from an older peer: its missing fields are zero.
        let mut padded = [0u8; 128];
        let known = fixed.len().min(padded.len());
        padded[..known].copy_from_slice(&fixed[..known]);
        let message = Self::decode_body(kind, &mut Reader::new(&padded), &mut header)?;
        header.finish()?;
        Ok((request, message))
    }

    fn decode_body(kind: u16, f: &mut Reader<'_>, tail: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(match kind {
            1 => Self::Hello { minor: f.u32("minor")?, version: tail.string("version")?.to_owned() },
            0x8001 => Self::Welcome(Welcome {
                minor: f.u32("minor")?,
                posix: f.u32("backing")? != 0,
                instance: f.u64("instance")?,
                session: f.u64("session")?,
                token: f.key("token")?,
                window: f.u64("window")?,
                max_window: f.u64("max_window")?,
                max_lanes: f.u32("max_lanes")?,
                poll: f.u32("poll")?,
                version: tail.string("version")?.to_owned(),
            }),
            2 => Self::Join { session: f.u64("session")?, token: f.key("token")?, window: f.u64("window")? },
            0x8002 => {
                let lane = f.u32("lane")?;
                f.u32("reserved")?;
                Self::Joined {
                    lane,
                    segment: f.u64("segment")?,
                    generation: f.u64("generation")?,
                    size: f.u64("size")?,
                }
            }
            3 => Self::Quantize(read_quantize(f, tail)?),
            0x8003 => Self::Done { lease: read_lease(f)?, report: f.u64("report")?, ring: f.u64("ring")? },
            4 => Self::Wrote { chunks: f.u32("chunks")? },
            5 => Self::Consumed { chunks: f.u32("chunks")? },
            6 => Self::Cancel { lane: f.u32("lane")?, request: f.u32("request")? },
            7 => Self::Release({
                let n = f.u32("n")?;
                read_releases(n, tail)?
            }),
            8 => Self::Unmap { segment: f.u64("segment")? },
            9 => Self::Open(read_target(f, tail)?),
            0x8009 => Self::Opened { lease: read_lease(f)?, name: tail.string("name")?.to_owned() },
            10 => Self::Ticket(read_extent(f)?),
            0x800A => Self::Ticketed { ticket: f.u64("ticket")?, secret: f.key("secret")? },
            11 => {
                let extent = read_extent(f)?;
                let replace = f.u32("flags")? & FLAG_REPLACE != 0;
                Self::Publish { extent, replace, name: read_name(tail)? }
            }
            0x800B => Self::Published,
            12 => Self::Allocate {
                bytes: f.u64("bytes")?,
                purpose: match f.u32("purpose")? {
                    0 => Purpose::Input,
                    1 => Purpose::Warm,
                    value => return Err(WireError::Value { what: "purpose", value: u64::from(value) }),
                },
                timeout: f.u32("timeout")?,
            },
            0x800C => Self::Allocated { lease: read_lease(f)? },
            13 => Self::Drop { name: read_name(tail)? },
            0x800D => Self::Dropped,
            14 => Self::List {
                cursor: f.u64("cursor")?,
                what: match f.u32("what")? {
                    0 => Listing::Datasets,
                    1 => Listing::Results,
                    2 => Listing::Sessions,
                    3 => Listing::Inputs,
                    value => return Err(WireError::Value { what: "what", value: u64::from(value) }),
                },
            },
            0x800E => {
                let cursor = f.u64("cursor")?;
                let n = u64::from(f.u32("n")?);
                let n = tail.count(n, 4, "entries")?;
                let entries = (0..n).map(|_| tail.string("entry").map(str::to_owned));
                Self::Listed { cursor, entries: entries.collect::<Result<_, _>>()? }
            }
            15 => Self::Stat,
            0x800F => Self::Stats(tail.string("statistics")?.to_owned()),
            16 => Self::Ping,
            0x8010 => Self::Pong,
            17 => Self::Bye,
            0xFFFF => Self::Error(Box::new(read_failure(f, tail)?)),
            _ => return Err(WireError::Value { what: "type", value: u64::from(kind) }),
        })
    }
}
