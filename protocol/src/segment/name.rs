//! The names of segments: `shmquant.<instance>.<kind>.<id>`.

use std::fmt;
use std::str::FromStr;

use super::SegmentError;

/// First part of every name.
pub(super) const PREFIX: &str = "shmquant.";

/// Where the bytes of a segment live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Backing {
    /// An anonymous, sealed memfd: nothing to leave behind, read-only for every client.
    #[default]
    Memfd,
    /// A POSIX named segment in `/dev/shm`, for peers that trust each other: no seals, so another process of
    /// the same user may write to it or truncate it.
    Posix,
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Backing::Memfd => "memfd",
            Backing::Posix => "posix",
        })
    }
}

impl FromStr for Backing {
    type Err = SegmentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "memfd" => Ok(Backing::Memfd),
            "posix" => Ok(Backing::Posix),
            _ => Err(SegmentError::BadName { text: text.to_owned(), what: "backing (memfd or posix)" }),
        }
    }
}

/// What a segment is for, and by that who may write to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Holds results: the daemon writes, clients only read.
    Result,
    /// The window of a lane: the client writes values, the daemon reads them.
    Window,
    /// Memory a client allocated for its input: the client writes, the daemon reads.
    Input,
}

impl Kind {
    /// Whether clients get to write to segments of this kind.
    pub fn is_client_writable(self) -> bool {
        !matches!(self, Kind::Result)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Result => "result",
            Kind::Window => "window",
            Kind::Input => "input",
        })
    }
}

impl FromStr for Kind {
    type Err = SegmentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "result" => Ok(Kind::Result),
            "window" => Ok(Kind::Window),
            "input" => Ok(Kind::Input),
            _ => Err(SegmentError::BadName { text: text.to_owned(), what: "kind of segment" }),
        }
    }
}

/// The name of one segment, unique on the host for ever: an instance never hands out an id twice.
///
/// A memfd carries it (it is what `/proc/*/maps` shows), a POSIX segment is found by it.
///
/// ```
/// use shmquant_protocol::segment::{Kind, SegmentName};
/// let name = SegmentName { instance: 0xbeef, kind: Kind::Result, id: 17 };
/// assert_eq!(name.to_string(), "shmquant.000000000000beef.result.17");
/// assert_eq!(name.to_string().parse::<SegmentName>()?, name);
/// # Ok::<(), shmquant_protocol::segment::SegmentError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SegmentName {
    /// The daemon that made it; drawn at random when a daemon starts.
    pub instance: u64,
    /// What it is for.
    pub kind: Kind,
    /// Its number within the instance.
    pub id: u64,
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{:016x}.{}.{}", self.instance, self.kind, self.id)
    }
}

impl FromStr for SegmentName {
    type Err = SegmentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| SegmentError::BadName { text: text.to_owned(), what: "segment's name" })
    }
}

fn parse(text: &str) -> Option<SegmentName> {
    let (instance, rest) = text.strip_prefix(PREFIX)?.split_once('.')?;
    let (kind, id) = rest.split_once('.')?;
    // Only the one spelling that Display gives: two names of one segment would be two files.
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_digit()) || (id.len() > 1 && id.starts_with('0')) {
        return None;
    }
    Some(SegmentName { instance: parse_instance(instance)?, kind: kind.parse().ok()?, id: id.parse().ok()? })
}

/// The number behind 16 lower-case hex digits, and nothing else.
pub(super) fn parse_instance(text: &str) -> Option<u64> {
    let canonical = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if canonical { u64::from_str_radix(text, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_one_spelling() {
        for kind in [Kind::Result, Kind::Window, Kind::Input] {
            for (instance, id) in [(0, 0), (u64::MAX, u64::MAX), (0x00ff, 7)] {
                let name = SegmentName { instance, kind, id };
                assert_eq!(name.to_string().parse::<SegmentName>().ok(), Some(name));
            }
        }
        for bad in [
            "",
            "shmquant.",
            "shmquant.00000000000000ff.result",
            "shmquant.00000000000000ff.result.",
            "shmquant.00000000000000ff.result.07",
            "shmquant.00000000000000ff.result.+7",
            "shmquant.00000000000000ff.result.7.8",
            "shmquant.00000000000000FF.result.7",
            "shmquant.ff.result.7",
            "shmquant.00000000000000ff.lock.7",
            "shmquant.00000000000000ff.result.18446744073709551616",
            "shmquant.+0000000000000ff.result.7",
            "/shmquant.00000000000000ff.result.7",
        ] {
            assert!(bad.parse::<SegmentName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn words_survive_the_round_trip() {
        for backing in [Backing::Memfd, Backing::Posix] {
            assert_eq!(backing.to_string().parse::<Backing>().ok(), Some(backing));
        }
        assert!("Memfd".parse::<Backing>().is_err());
    }
}
