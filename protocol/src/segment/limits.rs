//! The limits of the process and the host: asked before they are met where meeting them kills, and read
//! again when the kernel refuses, so that an error says which limit it was.
#![allow(unsafe_code, reason = "ignoring a signal is unsafe in nix, because a handler might not be safe")]

use std::fs;
use std::io::Read;

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::statvfs::statvfs;

use super::{Backing, SegmentError, SegmentName};

/// Directory of the POSIX segments.
pub(super) const SHM_DIR: &str = "/dev/shm";

/// From this many bytes on, making a segment takes so long that asking for free memory first is for nothing.
const WORTH_ASKING: u64 = 16 << 20;

/// Ignores `SIGXFSZ` in this process: growing a segment over `RLIMIT_FSIZE` is then an error, not death.
///
/// The daemon calls it once, at its start. (Python does the same for every process it runs in.)
pub fn ignore_sigxfsz() -> Result<(), SegmentError> {
    // SAFETY: SIG_IGN runs no code of ours, so there is nothing that could be unsafe in a signal's context.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }
        .map(drop)
        .map_err(|errno| SegmentError::Os { what: "ignoring SIGXFSZ".to_owned(), errno })
}

/// What the kernel was asked for when it refused.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    /// A new object: memfd_create, shm_open.
    Create,
    /// Its size, its pages.
    Reserve,
    /// A mapping of it.
    Map,
    /// Touching its pages through the mapping.
    Populate,
    /// Seals.
    Seal,
}

impl Step {
    fn verb(self) -> &'static str {
        match self {
            Step::Create => "creating",
            Step::Reserve => "reserving the pages of",
            Step::Map => "mapping",
            Step::Populate => "populating",
            Step::Seal => "sealing",
        }
    }
}

/// The soft limit of a resource, `None` when there is none.
pub(super) fn soft_limit(resource: Resource) -> Option<u64> {
    match getrlimit(resource) {
        Ok((soft, _)) if soft != RLIM_INFINITY => Some(soft),
        _ => None,
    }
}

/// Refuses a size over `RLIMIT_FSIZE` before the kernel does it with a signal.
pub(super) fn check_file_size(name: &SegmentName, size: u64) -> Result<(), SegmentError> {
    match soft_limit(Resource::RLIMIT_FSIZE) {
        Some(limit) if size > limit => Err(SegmentError::FileSizeLimit { name: *name, size, limit }),
        _ => Ok(()),
    }
}

/// Refuses a size that cannot be had at all, before the kernel tries: it takes page after page until there
/// is none left, and the host suffers or kills somebody meanwhile.
///
/// This keeps an absurd size harmless. Whether a sane one fits beside everything else is for admission.
pub(super) fn check_room(backing: Backing, name: &SegmentName, size: u64) -> Result<(), SegmentError> {
    let available = match backing {
        Backing::Memfd if size < WORTH_ASKING => None,
        Backing::Memfd => available_memory(),
        Backing::Posix => available_in_shm(),
    };
    if available.is_some_and(|available| size > available) {
        return Err(no_room(backing, name, size));
    }
    Ok(())
}

/// The typed error for a refusal met while `name` was being made.
pub(super) fn refused(
    step: Step,
    errno: Errno,
    backing: Backing,
    name: &SegmentName,
    size: u64,
) -> SegmentError {
    match (errno, step) {
        (Errno::EEXIST, Step::Create) => SegmentError::NameTaken { name: name.to_string() },
        (Errno::ENOMEM, Step::Map) => map_refused(format!("mapping segment {name}"), size, errno),
        // EFAULT: a page could not be made while populating, which is what SIGBUS would have meant.
        (Errno::ENOSPC | Errno::ENOMEM, _) | (Errno::EFAULT, Step::Populate) => no_room(backing, name, size),
        (Errno::EFBIG, _) => SegmentError::FileSizeLimit {
            name: *name,
            size,
            limit: soft_limit(Resource::RLIMIT_FSIZE).unwrap_or(i64::MAX as u64),
        },
        _ => fd_refused(format!("{} segment {name}", step.verb()), errno),
    }
}

/// The typed error for a refused new descriptor, or [`SegmentError::Os`].
pub(crate) fn fd_refused(what: String, errno: Errno) -> SegmentError {
    match errno {
        Errno::EMFILE => {
            SegmentError::FdLimit { what, limit: soft_limit(Resource::RLIMIT_NOFILE).unwrap_or(0) }
        }
        Errno::ENFILE => {
            SegmentError::SystemFdLimit { what, limit: read_number("/proc/sys/fs/file-max").unwrap_or(0) }
        }
        _ => SegmentError::Os { what, errno },
    }
}

/// The typed error for a refused mapping: too many of them, too little address space, or [`SegmentError::Os`].
pub(super) fn map_refused(what: String, size: u64, errno: Errno) -> SegmentError {
    if errno != Errno::ENOMEM {
        return SegmentError::Os { what, errno };
    }
    // The count is read after the refusal and other threads unmap meanwhile: a little below is still that.
    if let (Some(maps), Some(limit)) = (count_maps(), read_number("/proc/sys/vm/max_map_count"))
        && maps + maps / 64 >= limit
    {
        return SegmentError::MapLimit { what, maps, limit };
    }
    SegmentError::AddressSpace { what, size, limit: soft_limit(Resource::RLIMIT_AS) }
}

fn no_room(backing: Backing, name: &SegmentName, size: u64) -> SegmentError {
    let (place, available, hint) = match backing {
        Backing::Memfd => (
            "memory",
            available_memory(),
            "hint: release results, or give the daemon's cgroup and host more memory",
        ),
        Backing::Posix => (
            SHM_DIR,
            available_in_shm(),
            "hint: enlarge /dev/shm (docker: --shm-size), or use the memfd backing, which it does not limit",
        ),
    };
    SegmentError::NoRoom { name: *name, size, available, place, hint }
}

fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let bytes = |key| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim_end().parse().ok()?;
        kib.checked_mul(1024)
    };
    Some(bytes("MemAvailable:")? + bytes("SwapFree:").unwrap_or(0))
}

fn available_in_shm() -> Option<u64> {
    let stat = statvfs(SHM_DIR).ok()?;
    stat.blocks_available().checked_mul(stat.fragment_size())
}

fn count_maps() -> Option<u64> {
    let mut maps = fs::File::open("/proc/self/maps").ok()?;
    // Not from the heap: there may be no address space left, and a refused allocation is the end of the process.
    let mut part = [0; 4096];
    let mut count = 0;
    loop {
        let read = maps.read(&mut part).ok()?;
        if read == 0 {
            return Some(count);
        }
        count += part.iter().take(read).filter(|byte| **byte == b'\n').count() as u64;
    }
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
