//! Shared-memory segments: made and owned by the daemon, mapped by clients.
//!
//! Two backings behind one type. A memfd is sealed, so it can neither shrink under a mapper nor, for
//! results, be written by anybody but the daemon; it dies with its last descriptor and mapping. A POSIX
//! segment has a name in `/dev/shm` and none of these guarantees (see [`Backing::Posix`]).
//!
//! Memory is reserved and populated when a segment is made, not when it is used: what cannot be had is a
//! [`SegmentError`] there and never a SIGBUS later.

mod error;
mod huge;
mod instance;
mod limits;
mod mapping;
mod memfd;
mod name;
mod pages;
mod pieces;
mod posix;
mod region;

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

pub use error::SegmentError;
pub use instance::{InstanceGuard, Swept, sweep_stale};
pub(crate) use limits::fd_refused;
pub use limits::ignore_sigxfsz;
pub use mapping::Mapping;
pub use name::{Backing, Kind, SegmentName};
pub use posix::open_read_only;

use limits::{Step, refused};
use pages::Depth;
use region::{Access, Region};

/// A segment with its owner: the daemon.
///
/// `Send` and `Sync`: it owns a descriptor and an address range and hands out raw pointers only. Who may
/// write when is the business of the segment's life cycle, not of this type.
///
/// Dropping one frees its memory if nobody else maps it, which takes milliseconds for large segments: the
/// daemon does it on a thread of its own.
pub struct Segment {
    // Before the mapping and the descriptor, so that a name never outlives what it names.
    _unlink: Option<posix::Unlink>,
    memory: Region,
    fd: OwnedFd,
    name: SegmentName,
    backing: Backing,
}

impl Segment {
    /// Makes a segment: all of its pages reserved, mapped writable here, zero, and for memfds sealed.
    ///
    /// Results and windows are populated too, so that their first use does not fault; inputs may stay unused in large
    /// part and are only reserved, except for huge pages: making these is cheaper than reserving small ones.
    pub fn create(backing: Backing, name: &SegmentName, size: u64) -> Result<Self, SegmentError> {
        let max = isize::MAX as u64;
        let length = match usize::try_from(size) {
            Ok(length) if (1..=max).contains(&size) => length,
            _ => return Err(SegmentError::BadSize { size, max }),
        };
        limits::check_file_size(name, size)?;
        limits::check_room(backing, name, size)?;
        let fail = |step, errno| refused(step, errno, backing, name, size);

        let (unlink, fd) = match backing {
            Backing::Memfd => (None, memfd::create(name, size)?),
            Backing::Posix => {
                let (unlink, fd) = posix::create(name, size)?;
                (Some(unlink), fd)
            }
        };
        ftruncate(&fd, size.cast_signed()).map_err(|errno| fail(Step::Reserve, errno))?;
        let memory =
            Region::map(fd.as_fd(), length, Access::Shared).map_err(|errno| fail(Step::Map, errno))?;
        let depth = match name.kind {
            Kind::Input => Depth::Reserve,
            Kind::Result | Kind::Window => Depth::Populate,
        };
        pages::make(fd.as_fd(), &memory, depth).map_err(|(step, errno)| fail(step, errno))?;
        let fd = match (backing, name.kind) {
            (Backing::Memfd, _) => {
                memfd::seal(fd.as_fd(), name, size)?;
                fd
            }
            // The nearest thing to a seal: what clients are sent cannot be mapped for writing.
            (Backing::Posix, Kind::Result) => open_read_only(name)?,
            (Backing::Posix, _) => fd,
        };
        Ok(Self { _unlink: unlink, memory, fd, name: *name, backing })
    }

    /// Where the segment begins: aligned to a page, valid for [`len`](Self::len) bytes as long as the
    /// segment lives. Client-writable segments change under whoever reads them.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// Its size in bytes, as it was asked for.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Never: there are no segments of zero bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The descriptor that clients are sent.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Its name.
    pub fn name(&self) -> &SegmentName {
        &self.name
    }

    /// Where its bytes live.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// A path by which processes of this user can map it while it lives. It holds nothing: only datasets,
    /// which are never recycled, are to be reached by path.
    pub fn path(&self) -> PathBuf {
        match self.backing {
            Backing::Memfd => format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()).into(),
            Backing::Posix => PathBuf::from(limits::SHM_DIR).join(self.name.to_string()),
        }
    }

    /// Bytes of the segment that have no memory behind them: 0, unless a client punched holes.
    ///
    /// Holes read as zeros and are filled when touched, so they harm nobody but the client's own data. They
    /// are looked for when a segment is recycled, because they cost page faults and were charged as memory.
    pub fn missing_bytes(&self) -> Result<u64, SegmentError> {
        let stat = fstat(&self.fd).map_err(|errno| self.refused(Step::Reserve, errno))?;
        // Blocks count what is swapped out too, which mincore does not.
        let present = u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        Ok((self.len() as u64).saturating_sub(present))
    }

    /// Puts memory behind every byte again, after a client punched holes. Bytes that are there stay.
    pub fn refill(&self) -> Result<(), SegmentError> {
        if !self.name.kind.is_client_writable() {
            let (what, name, backing) = ("refilling a client's holes", self.name, self.backing);
            return Err(SegmentError::Unsupported { what, name, backing });
        }
        pages::refill(self.fd(), &self.memory).map_err(|(step, errno)| self.refused(step, errno))
    }

    fn refused(&self, step: Step, errno: Errno) -> SegmentError {
        refused(step, errno, self.backing, &self.name, self.len() as u64)
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment")
            .field("name", &format_args!("{}", self.name))
            .field("len", &self.len())
            .field("fd", &self.fd.as_raw_fd())
            .field("backing", &self.backing)
            .finish()
    }
}
