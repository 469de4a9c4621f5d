//! What can go short or wrong around a segment, each with the numbers that tell which limit it was.

use nix::errno::Errno;
use thiserror::Error;

use super::{Backing, SegmentName};

/// Why a segment or a mapping of one could not be made.
///
/// Nothing is left behind when one of these is returned: no descriptor, no mapping, no name.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SegmentError {
    /// The text is not a segment's name or one of its parts. The fault of whoever wrote it.
    #[error("{text:?} is not a {what}")]
    BadName {
        /// The text as it was given.
        text: String,
        /// What was expected instead.
        what: &'static str,
    },

    /// Zero bytes, or more than an address space holds. The caller's fault.
    #[error("a segment of {size} bytes cannot exist (1 to {max} bytes can)")]
    BadSize {
        /// The size that was asked for.
        size: u64,
        /// The largest size that can be asked for.
        max: u64,
    },

    /// The memory is not there: the host is out of memory, or the mount of `/dev/shm` is full.
    #[error(
        "no room for {size} bytes of segment {name}: {} free in {place}\n{hint}",
        bytes_or_unknown(*.available)
    )]
    NoRoom {
        /// The segment that was to be made.
        name: SegmentName,
        /// Its size in bytes.
        size: u64,
        /// Bytes that are free there, where the system tells.
        available: Option<u64>,
        /// Where the memory comes from: "memory" or "/dev/shm".
        place: &'static str,
        /// What to do about it.
        hint: &'static str,
    },

    /// `RLIMIT_FSIZE` of this process is smaller than the segment.
    #[error(
        "segment {name} of {size} bytes is over this process's file size limit of {limit} bytes\n\
         hint: raise it with `ulimit -f unlimited` (LimitFSIZE= in a systemd unit)"
    )]
    FileSizeLimit {
        /// The segment that was to be made.
        name: SegmentName,
        /// Its size in bytes.
        size: u64,
        /// `RLIMIT_FSIZE`, in bytes.
        limit: u64,
    },

    /// This process has no file descriptor left (`RLIMIT_NOFILE`).
    #[error(
        "{what}: this process has used all {limit} of its file descriptors\n\
         hint: raise the limit with `ulimit -n` (LimitNOFILE= in a systemd unit)"
    )]
    FdLimit {
        /// What needed the descriptor.
        what: String,
        /// `RLIMIT_NOFILE`.
        limit: u64,
    },

    /// The whole host has no file descriptor left (`fs.file-max`).
    #[error("{what}: the host has used all of its file descriptors (fs.file-max = {limit})")]
    SystemFdLimit {
        /// What needed the descriptor.
        what: String,
        /// `fs.file-max`, 0 where it cannot be read.
        limit: u64,
    },

    /// This process has as many mappings as the kernel allows (`vm.max_map_count`).
    #[error(
        "{what}: this process has {maps} mappings and vm.max_map_count is {limit}\n\
         hint: raise it with `sysctl vm.max_map_count={}`", .limit * 4
    )]
    MapLimit {
        /// What was to be mapped.
        what: String,
        /// Mappings this process has.
        maps: u64,
        /// `vm.max_map_count`.
        limit: u64,
    },

    /// The address space of this process is full or capped (`RLIMIT_AS`).
    #[error(
        "{what}: no address space for {size} bytes (address space limit: {})\n\
         hint: raise it with `ulimit -v unlimited` (LimitAS= in a systemd unit)",
        bytes_or_unknown(*.limit)
    )]
    AddressSpace {
        /// What was to be mapped.
        what: String,
        /// Bytes that were to be mapped.
        size: u64,
        /// `RLIMIT_AS`, `None` when it is unlimited.
        limit: Option<u64>,
    },

    /// There already is a segment of this name. Ids are never reused, so somebody else made it.
    #[error("a segment named {name} exists already")]
    NameTaken {
        /// The name.
        name: String,
    },

    /// No segment of this name exists (any more).
    #[error("no segment is named {name}: its owner has ended or has given it up")]
    NotFound {
        /// The name.
        name: SegmentName,
    },

    /// The object behind the descriptor is shorter than the peer says: mapping it would end in SIGBUS.
    #[error("the descriptor holds {actual} bytes but {expected} were announced")]
    TooShort {
        /// Bytes that were announced.
        expected: u64,
        /// Bytes that are there.
        actual: u64,
    },

    /// The descriptor can still shrink, or is no memfd at all: mapping it could end in SIGBUS.
    #[error("the descriptor is not a sealed memfd (seals {seals:#x}): it could shrink under a reader")]
    NotSealed {
        /// What `F_GET_SEALS` said, 0 where the object knows no seals.
        seals: i32,
    },

    /// The operation makes no sense on this kind of segment. A fault of the calling code.
    #[error("{what} is not possible on segment {name}, a {} one", .backing)]
    Unsupported {
        /// What was asked.
        what: &'static str,
        /// Of which segment.
        name: SegmentName,
        /// Its backing.
        backing: Backing,
    },

    /// Any other refusal of the kernel.
    #[error("{what}: {}", .errno.desc())]
    Os {
        /// What was tried.
        what: String,
        /// How the kernel refused.
        errno: Errno,
    },
}

fn bytes_or_unknown(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "unknown".to_owned(), |bytes| format!("{bytes} bytes"))
}
