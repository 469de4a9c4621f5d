//! Memory behind the pages of a segment: reserved, so that nothing can run out later, and mapped.
//!
//! First touch is by far the dearest thing that happens to a segment. Huge pages make it several times cheaper and come
//! first; what is left after them takes 2 to 3 µs a page, half of it for reserving, half for clearing and mapping. The kernel
//! reserves pages of one file for one thread at a time and lets others clear and map meanwhile. So two threads take
//! less time (256 MiB without huge pages: 97 ms instead of 135), more would wait.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::limits::Step;
use super::region::{Advice, Region, unless_interrupted};
use super::{huge, pieces};

/// Pages are made in pieces of this many bytes. A signal makes the kernel throw away the piece it was in.
const PIECE: u64 = 2 << 20;

/// What could not be done, and why.
pub(super) type Refusal = (Step, Errno);

/// How far the pages of a new segment are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// Reserved, which `ftruncate` does not do.
    Reserve,
    /// Mapped for writing, too. (`MAP_POPULATE` would leave the first write of each page a fault.)
    Populate,
}

/// Makes the pages of a new segment that nobody else knows of yet: huge ones where the kernel gives them.
pub(super) fn make(fd: BorrowedFd<'_>, memory: &Region, depth: Depth) -> Result<(), Refusal> {
    finish(fd, memory, huge::make(memory), depth)
}

/// Makes the pages that are missing, without huge ones.
pub(super) fn refill(fd: BorrowedFd<'_>, memory: &Region) -> Result<(), Refusal> {
    finish(fd, memory, 0, Depth::Populate)
}

/// Makes all pages that are not there. Of `made` bytes it is said that they are: the number of threads depends on it, and
/// nothing else.
fn finish(fd: BorrowedFd<'_>, memory: &Region, made: u64, depth: Depth) -> Result<(), Refusal> {
    let size = memory.len() as u64;
    let threads = match depth {
        // They would wait for each other.
        Depth::Reserve => 1,
        Depth::Populate => pieces::threads_for(size.saturating_sub(made).div_ceil(PIECE)),
    };
    pieces::each(size, PIECE, threads, |offset, length| {
        reserve_piece(fd, offset, length)?;
        match depth {
            Depth::Reserve => Ok(()),
            Depth::Populate => populate_piece(memory, offset, length),
        }
    })
}

fn reserve_piece(fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<(), Refusal> {
    let (offset, length) = (offset.cast_signed(), length.cast_signed());
    unless_interrupted(|| fallocate(fd, FallocateFlags::empty(), offset, length))
        .map_err(|errno| (Step::Reserve, errno))
}

fn populate_piece(memory: &Region, offset: u64, length: u64) -> Result<(), Refusal> {
    // Both are within the mapping, whose length is a usize.
    let (offset, length) = (offset as usize, length as usize);
    memory.advise_range(Advice::PopulateWrite, offset, length).map_err(|errno| (Step::Populate, errno))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::time::Duration;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::stat::fstat;
    use nix::unistd::{ftruncate, read};

    use super::*;
    use crate::segment::region::Access;

    const LEN: u64 = (39 << 20) + 5;
    const WHOLE: u64 = 38 << 20;

    type Collapse = fn(&Region, u64, u64) -> Result<(), Errno>;

    /// Makes the pages of a file of `LEN` bytes and checks that all of them are there, and zero.
    fn check(touching: bool, collapse: Collapse, most: u64, depth: Depth) {
        let fd = memfd_create("pages", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&fd, LEN as i64).unwrap();
        let memory = Region::map(fd.as_fd(), LEN as usize, Access::Shared).unwrap();
        let touch = |offset: u64| {
            if touching {
                memory.advise_range(Advice::PopulateWrite, offset as usize, 1)
            } else {
                Err(Errno::EFAULT)
            }
        };
        let collapse = |offset, len| collapse(&memory, offset, len);
        let made = huge::make_with(LEN, touch, collapse, || Duration::ZERO);
        assert!(made <= most && (touching || made == 0), "{made} of {most}");
        finish(fd.as_fd(), &memory, made, depth).unwrap();
        assert_eq!(fstat(&fd).unwrap().st_blocks * 512, LEN.next_multiple_of(4096) as i64);
        let mut bytes = vec![1; LEN as usize];
        assert_eq!(read(&fd, &mut bytes), Ok(LEN as usize));
        assert!(bytes.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_huge_pages_leave_out_is_made_all_the_same() {
        let collapse = |memory: &Region, offset: u64, len: u64| {
            memory.advise_range(Advice::Collapse, offset as usize, len as usize)
        };
        let real: Collapse = collapse;
        let never: Collapse = |_, _, _| Err(Errno::EINVAL);
        let half: Collapse = |memory, offset, len| {
            if offset >= 16 << 20 {
                return Err(Errno::ENOMEM);
            }
            memory.advise_range(Advice::Collapse, offset as usize, len as usize)
        };
        // Says that it has done what it has not.
        let liar: Collapse = |_, _, _| Ok(());
        for (collapse, most) in [(real, WHOLE), (never, 0), (half, 16 << 20), (liar, WHOLE)] {
            for touching in [true, false] {
                for depth in [Depth::Reserve, Depth::Populate] {
                    check(touching, collapse, most, depth);
                }
            }
        }
    }
}
