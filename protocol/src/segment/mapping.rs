//! A client's view of a segment it was sent.

use std::fmt;
use std::os::fd::BorrowedFd;

use nix::sys::stat::fstat;

use super::limits::map_refused;
use super::region::{Access, Advice, Region};
use super::{Backing, SegmentError, memfd};

/// A segment mapped into this process, unmapped when dropped.
///
/// `Send` and `Sync`: it owns an address range and hands out raw pointers only. Whoever dereferences one
/// answers for the ordering, which the protocol's messages give.
pub struct Mapping {
    memory: Region,
    access: Access,
}

impl Mapping {
    /// Maps the first `len` bytes for reading only.
    ///
    /// Refuses what could end in SIGBUS: an object shorter than `len`, and for memfds one that can shrink.
    /// (A POSIX segment can always be truncated by another process of the same user.)
    pub fn read_only(fd: BorrowedFd<'_>, len: u64, backing: Backing) -> Result<Self, SegmentError> {
        Self::map(fd, len, backing, Access::ReadOnly)
    }

    /// Maps an input for writing. A forked child shares it, as it shares every other shared mapping of its parent.
    pub fn inherited(fd: BorrowedFd<'_>, len: u64, backing: Backing) -> Result<Self, SegmentError> {
        Self::map(fd, len, backing, Access::Shared)
    }

    /// Maps a window for writing. A forked child does not inherit the mapping.
    pub fn read_write(fd: BorrowedFd<'_>, len: u64, backing: Backing) -> Result<Self, SegmentError> {
        let mapping = Self::inherited(fd, len, backing)?;
        mapping.advise(Advice::DontFork, "keeping a window from forked children")?;
        Ok(mapping)
    }

    /// Maps a result so that writing is harmless: a written page becomes this process's own copy.
    ///
    /// For consumers that insist on writable memory, such as torch. Pages that were never written keep
    /// following the segment.
    pub fn private_writable(fd: BorrowedFd<'_>, len: u64, backing: Backing) -> Result<Self, SegmentError> {
        Self::map(fd, len, backing, Access::Private)
    }

    /// Where the mapping begins: aligned to a page, valid for [`len`](Self::len) bytes.
    pub fn as_ptr(&self) -> *const u8 {
        self.memory.as_ptr()
    }

    /// Where to write, `None` for a read-only mapping (writing there would be SIGSEGV).
    pub fn as_mut_ptr(&self) -> Option<*mut u8> {
        (self.access != Access::ReadOnly).then(|| self.memory.as_ptr())
    }

    /// Bytes that are mapped.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Never: nothing of zero bytes is mapped.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Maps all pages now, so that the first use does not fault. A hint: failing changes nothing.
    pub fn prefault(&self) -> Result<(), SegmentError> {
        // Populating a private mapping for writing would copy every page of it. Shared pages that are there already
        // are mapped writable by reading, too, many at a time: half of what populating for writing takes.
        self.advise(Advice::PopulateRead, "prefaulting a mapping")
    }

    fn map(fd: BorrowedFd<'_>, len: u64, backing: Backing, access: Access) -> Result<Self, SegmentError> {
        let length = check(fd, len, backing)?;
        match Region::map(fd, length, access) {
            Ok(memory) => Ok(Self { memory, access }),
            Err(errno) => Err(map_refused("mapping a segment".to_owned(), len, errno)),
        }
    }

    fn advise(&self, advice: Advice, what: &str) -> Result<(), SegmentError> {
        self.memory.advise(advice).map_err(|errno| SegmentError::Os { what: what.to_owned(), errno })
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("address", &self.as_ptr())
            .field("len", &self.len())
            .field("access", &self.access)
            .finish()
    }
}

/// Whether every one of the `len` bytes can be touched without SIGBUS, now and later.
fn check(fd: BorrowedFd<'_>, len: u64, backing: Backing) -> Result<usize, SegmentError> {
    let max = isize::MAX as u64;
    let length = match usize::try_from(len) {
        Ok(length) if (1..=max).contains(&len) => length,
        _ => return Err(SegmentError::BadSize { size: len, max }),
    };
    // Seals before size: once it cannot shrink, the size that is seen stays.
    if backing == Backing::Memfd {
        memfd::check_cannot_shrink(fd)?;
    }
    let stat =
        fstat(fd).map_err(|errno| SegmentError::Os { what: "looking at a segment".to_owned(), errno })?;
    let actual = u64::try_from(stat.st_size).unwrap_or(0);
    if actual < len { Err(SegmentError::TooShort { expected: len, actual }) } else { Ok(length) }
}
