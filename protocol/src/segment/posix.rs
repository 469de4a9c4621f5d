//! The POSIX backing: named segments in `/dev/shm`, for peers that trust each other.
//!
//! Weaker than a memfd, and documented so: there are no seals on a mount, so another process of the same
//! user can truncate a segment (the mapper then gets SIGBUS) or open it for writing.

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::mman::{shm_open, shm_unlink};
use nix::sys::stat::Mode;
use nix::unistd::dup;
use shared_memory::{ShmemConf, ShmemError};

use super::limits::{Step, fd_refused, refused};
use super::{Backing, SegmentError, SegmentName};

/// A name in `/dev/shm` that goes when this value does.
#[derive(Debug)]
pub(super) struct Unlink(SegmentName);

impl Drop for Unlink {
    fn drop(&mut self) {
        // Somebody may have swept it already; there is nobody to tell either way.
        let _ = shm_unlink(path_of(&self.0).as_str());
    }
}

/// A new segment of `size` bytes, not yet reserved: its name and a descriptor to write through.
pub(super) fn create(name: &SegmentName, size: u64) -> Result<(Unlink, OwnedFd), SegmentError> {
    let fail = |step, errno| refused(step, errno, Backing::Posix, name, size);
    // shared_memory takes descriptor 0 for "none" and would neither close nor unlink it.
    let _zero = occupy_fd_zero().map_err(|errno| fail(Step::Create, errno))?;
    let length = usize::try_from(size).map_err(|_| fail(Step::Create, Errno::EFBIG))?;
    let mut made =
        ShmemConf::new().os_id(path_of(name)).size(length).create().map_err(|error| match error {
            ShmemError::MappingIdExists => fail(Step::Create, Errno::EEXIST),
            // From shm_open or from mmap: only the latter runs out of memory.
            ShmemError::MapCreateFailed(code) => match Errno::from_raw(code.cast_signed()) {
                Errno::ENOMEM => fail(Step::Map, Errno::ENOMEM),
                errno => fail(Step::Create, errno),
            },
            ShmemError::UnknownOsError(code) => fail(Step::Reserve, Errno::from_raw(code.cast_signed())),
            other => {
                SegmentError::Os { what: format!("creating segment {name}: {other}"), errno: Errno::EIO }
            }
        })?;
    // The name is ours from here on; the crate's own mapping and descriptor go with `made`, because ours
    // is made after the pages are reserved.
    let unlink = Unlink(*name);
    made.set_owner(false);
    drop(made);
    let fd = shm_open(path_of(name).as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| fail(Step::Create, errno))?;
    Ok((unlink, fd))
}

/// Opens a POSIX segment by its name, for reading only.
pub fn open_read_only(name: &SegmentName) -> Result<OwnedFd, SegmentError> {
    shm_open(path_of(name).as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(|errno| {
        match errno {
            Errno::ENOENT => SegmentError::NotFound { name: *name },
            errno => fd_refused(format!("opening segment {name}"), errno),
        }
    })
}

/// Takes descriptor 0 for as long as the value lives, if this process runs without one.
fn occupy_fd_zero() -> Result<Option<OwnedFd>, Errno> {
    match dup(std::io::stdin()) {
        Err(Errno::EBADF) => match File::open("/dev/null") {
            Ok(null) => Ok(Some(null.into())),
            Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
        },
        Err(errno) => Err(errno),
        Ok(_) => Ok(None),
    }
}

fn path_of(name: &SegmentName) -> String {
    format!("/{name}")
}
