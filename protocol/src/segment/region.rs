//! A mapping of shared memory, at an address that huge pages can be mapped at.
#![allow(unsafe_code, reason = "mapping, unmapping and advising memory are unsafe calls")]

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Bytes of a huge page, and what the address of one has to be a multiple of: 2 MiB on x86-64, and on aarch64 with pages
/// of 4 KiB. Where huge pages are larger the kernel refuses to make any of this size, and all stays as if there were none.
pub(super) const HUGE: usize = 2 << 20;

/// How often an aligned place is looked for: other threads of the process map and unmap meanwhile.
const TRIES: u32 = 8;

/// Linux 6.1 and later, 6.1 also for shared memory. libc has it for glibc only; the number is the same everywhere.
const MADV_COLLAPSE: i32 = 25;

/// What the pages of a region may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Reading.
    ReadOnly,
    /// Reading and writing what all others see.
    Shared,
    /// Reading, and writing into copies of its own.
    Private,
}

/// What the kernel can be asked to do with pages. None of it changes a byte, or takes one away.
#[derive(Debug, Clone, Copy)]
pub(super) enum Advice {
    /// Keep the mapping from forked children.
    DontFork,
    /// Map pages for reading.
    PopulateRead,
    /// Make pages, and map them for writing; an error where a write would be SIGBUS.
    PopulateWrite,
    /// Put huge pages in the place of whole pieces of 2 MiB, also of holes in them.
    Collapse,
}

/// The first bytes of an object, mapped into this process and unmapped when dropped.
///
/// Where it is long enough for a huge page its address is a multiple of one, if there is such a place: then huge pages
/// are mapped as what they are (one fault for 2 MiB instead of 512, and no page tables below).
#[derive(Debug)]
pub(super) struct Region {
    start: NonNull<c_void>,
    len: NonZeroUsize,
}

// SAFETY: it owns an address range and hands out raw pointers only; the kernel's calls on it are safe from any thread.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps the first `len` bytes of the object. Whether they exist is the caller's to know.
    pub(super) fn map(fd: BorrowedFd<'_>, len: usize, access: Access) -> Result<Self, Errno> {
        let len = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        if len.get() >= HUGE {
            for _ in 0..TRIES {
                let Some(place) = free_place(len) else { break };
                let region = Self::map_at(Some(place), fd, len, access)?;
                if (region.start.as_ptr() as usize).is_multiple_of(HUGE) {
                    return Ok(region);
                }
            }
        }
        Self::map_at(None, fd, len, access)
    }

    fn map_at(
        place: Option<NonZeroUsize>,
        fd: BorrowedFd<'_>,
        len: NonZeroUsize,
        access: Access,
    ) -> Result<Self, Errno> {
        let (prot, flags) = match access {
            Access::ReadOnly => (ProtFlags::PROT_READ, MapFlags::MAP_SHARED),
            Access::Shared => (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED),
            // Without swap reservation: nearly all of the pages will never be copied.
            Access::Private => (
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            ),
        };
        // SAFETY: without MAP_FIXED the place is a wish: the kernel maps elsewhere rather than over what is there.
        let start = unsafe { mmap(place, len, prot, flags, fd, 0) }?;
        Ok(Self { start, len })
    }

    /// Where it begins: aligned to a page.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    /// Bytes that are mapped.
    pub(super) fn len(&self) -> usize {
        self.len.get()
    }

    /// Advises on all of it.
    pub(super) fn advise(&self, advice: Advice) -> Result<(), Errno> {
        self.advise_range(advice, 0, self.len())
    }

    /// Advises on the pages of a range, which begins at a page. Made again where a signal ended it.
    pub(super) fn advise_range(&self, advice: Advice, offset: usize, len: usize) -> Result<(), Errno> {
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(Errno::EINVAL);
        }
        let advice = match advice {
            Advice::DontFork => libc::MADV_DONTFORK,
            Advice::PopulateRead => libc::MADV_POPULATE_READ,
            Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
            Advice::Collapse => MADV_COLLAPSE,
        };
        unless_interrupted(|| {
            // SAFETY: the range lies in the mapping (checked), and none of these changes what its bytes are.
            let done = unsafe { libc::madvise(self.start.as_ptr().byte_add(offset), len, advice) };
            Errno::result(done).map(drop)
        })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, and whoever got a pointer into it knows that it ends here.
        let _ = unsafe { munmap(self.start, self.len.get()) };
    }
}

/// Makes a call that a signal ended again.
pub(super) fn unless_interrupted(call: impl Fn() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// An aligned address at which so many bytes were free a moment ago, `None` if there is none.
///
/// It is given back before it is used. Mapping over a reservation instead would need no second try, but where that fails
/// some kernels have unmapped the reservation by then: whoever cleans up would unmap what another thread mapped there.
fn free_place(len: NonZeroUsize) -> Option<NonZeroUsize> {
    let room = len.checked_add(HUGE)?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: a new mapping at a place of the kernel's choice replaces nothing.
    let free = unsafe { mmap_anonymous(None, room, ProtFlags::PROT_NONE, flags) }.ok()?;
    // SAFETY: exactly what was just mapped; nobody else knows of it.
    unsafe { munmap(free, room.get()) }.ok()?;
    NonZeroUsize::new((free.as_ptr() as usize).next_multiple_of(HUGE))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn regions_are_aligned_where_a_huge_page_fits() {
        let file = tempfile::tempfile().unwrap();
        for len in [HUGE, HUGE + 1, 7 * HUGE - 1] {
            file.set_len(len as u64).unwrap();
            for access in [Access::ReadOnly, Access::Shared, Access::Private] {
                // Several at once: the second one's place is not the first one's again.
                let regions = [0; 3].map(|_| Region::map(file.as_fd(), len, access).unwrap());
                for region in &regions {
                    assert_eq!((region.as_ptr() as usize % HUGE, region.len()), (0, len));
                }
            }
        }
        assert_eq!(Region::map(file.as_fd(), 0, Access::Shared).unwrap_err(), Errno::EINVAL);
    }

    #[test]
    fn advice_stays_inside() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let region = Region::map(file.as_fd(), 8192, Access::Shared).unwrap();
        assert_eq!(region.advise(Advice::PopulateRead), Ok(()));
        assert_eq!(region.advise_range(Advice::PopulateRead, 4096, 4096), Ok(()));
        for (offset, len) in [(0, 8193), (4096, 4097), (8192, 1), (usize::MAX, 2)] {
            assert_eq!(region.advise_range(Advice::PopulateRead, offset, len), Err(Errno::EINVAL));
        }
    }

    #[test]
    fn a_call_that_a_signal_ended_is_made_again() {
        let left = AtomicU64::new(3);
        let call = || if left.fetch_sub(1, Ordering::Relaxed) > 1 { Err(Errno::EINTR) } else { Ok(()) };
        assert_eq!(unless_interrupted(call), Ok(()));
        assert_eq!(left.into_inner(), 0);
    }
}
