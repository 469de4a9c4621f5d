//! Memory behind the pages of a segment: reserved, so that nothing can run out later, and mapped.
//!
//! First touch is by far the dearest thing that happens to a segment: about 3 µs a page, half of it for reserving,
//! half for clearing and mapping. The kernel reserves pages of one file for one thread at a time and lets others clear
//! and map meanwhile. So two threads take half of the time (256 MiB: 107 ms instead of 197), more would wait.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::limits::Step;
use super::region::{Advice, Region, unless_interrupted};

/// Pages are made in pieces of this many bytes. A signal makes the kernel throw away the piece it was in.
const PIECE: u64 = 2 << 20;
const THREADS: usize = 2;

/// What could not be done, and why.
pub(super) type Refusal = (Step, Errno);

/// Reserves the pages, which `ftruncate` does not.
pub(super) fn reserve(fd: BorrowedFd<'_>, size: u64) -> Result<(), Refusal> {
    Pieces::of(size).make(|offset, length| reserve_piece(fd, offset, length))
}

/// Reserves all pages and maps them for writing. (`MAP_POPULATE` would leave the first write of each page a fault.)
pub(super) fn reserve_and_populate(fd: BorrowedFd<'_>, memory: &Region) -> Result<(), Refusal> {
    let pieces = Pieces::of(memory.len() as u64);
    let make = || {
        pieces.make(|offset, length| {
            reserve_piece(fd, offset, length)?;
            populate_piece(memory, offset, length)
        })
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let others = cores.min(THREADS).min(pieces.count()) - 1;
    thread::scope(|scope| {
        // Where there may be no more threads, this one does it all.
        let spawn = || thread::Builder::new().name("populate".to_owned()).spawn_scoped(scope, make).ok();
        let others: Vec<_> = (0..others).filter_map(|_| spawn()).collect();
        let mine = make();
        others.into_iter().fold(mine, |result, other| match other.join() {
            Ok(made) => result.and(made),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

/// The pieces that nobody has begun yet.
struct Pieces {
    size: u64,
    next: AtomicU64,
}

impl Pieces {
    fn of(size: u64) -> Self {
        Self { size, next: AtomicU64::new(0) }
    }

    fn count(&self) -> usize {
        usize::try_from(self.size.div_ceil(PIECE)).unwrap_or(usize::MAX).max(1)
    }

    /// Makes one after the other, as long as there are any. After a refusal nobody begins another.
    fn make(&self, piece: impl Fn(u64, u64) -> Result<(), Refusal>) -> Result<(), Refusal> {
        loop {
            let offset = self.next.fetch_add(PIECE, Ordering::Relaxed);
            if offset >= self.size {
                return Ok(());
            }
            if let Err(refusal) = piece(offset, PIECE.min(self.size - offset)) {
                self.next.store(self.size, Ordering::Relaxed);
                return Err(refusal);
            }
        }
    }
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
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn pieces_cover_everything_once_whoever_makes_them() {
        for size in [1, 4096, PIECE, PIECE + 1, 5 * PIECE - 1] {
            let pieces = Pieces::of(size);
            let made = Mutex::new(BTreeSet::new());
            thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        pieces.make(|offset, length| {
                            assert!(made.lock().unwrap().insert((offset, length)));
                            Ok(())
                        })
                    });
                }
            });
            let made = made.into_inner().unwrap();
            assert_eq!(made.len(), pieces.count());
            let end = made.iter().fold(0, |end, (offset, length)| {
                assert_eq!(*offset, end);
                end + length
            });
            assert_eq!(end, size);
        }
    }

    #[test]
    fn nothing_is_begun_after_a_refusal() {
        let pieces = Pieces::of(10 * PIECE);
        let refused = pieces.make(|offset, _| {
            assert!(offset <= PIECE);
            if offset == PIECE { Err((Step::Reserve, Errno::ENOSPC)) } else { Ok(()) }
        });
        assert!(matches!(refused, Err((Step::Reserve, Errno::ENOSPC))));
        let after = pieces.make(|_, _| panic!("a piece after a refusal"));
        assert!(after.is_ok());
    }
}
