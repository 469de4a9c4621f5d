//! Work on the bytes of a segment, cut into pieces, by more than one thread where that pays.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// More would wait for each other and for the memory.
const THREADS: usize = 2;

/// How many threads there may be for this many pieces.
pub(super) fn threads_for(pieces: u64) -> usize {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    cores.min(THREADS).min(usize::try_from(pieces).unwrap_or(THREADS)).max(1)
}

/// Does `work` once for each piece, given as offset and length; by `threads` threads, or fewer where there may be no more.
/// After a refusal nobody begins another piece.
pub(super) fn each<E: Send>(
    size: u64,
    piece: u64,
    threads: usize,
    work: impl Fn(u64, u64) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let next = AtomicU64::new(0);
    let run = || {
        loop {
            let offset = next.fetch_add(piece, Ordering::Relaxed);
            if offset >= size {
                return Ok(());
            }
            if let Err(refusal) = work(offset, piece.min(size - offset)) {
                next.store(size, Ordering::Relaxed);
                return Err(refusal);
            }
        }
    };
    thread::scope(|scope| {
        let spawn = || thread::Builder::new().name("pages".to_owned()).spawn_scoped(scope, run).ok();
        let others: Vec<_> = (1..threads).filter_map(|_| spawn()).collect();
        let mine = run();
        others.into_iter().fold(mine, |result, other| match other.join() {
            Ok(done) => result.and(done),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn pieces_cover_everything_once_whoever_works_on_them() {
        for piece in [4096, 2 << 20] {
            for size in [1, piece - 1, piece, piece + 1, 5 * piece - 1] {
                for threads in [1, 3] {
                    let done = Mutex::new(BTreeSet::new());
                    let work = |offset, length| {
                        assert!(done.lock().unwrap().insert((offset, length)));
                        Ok::<_, ()>(())
                    };
                    assert_eq!(each(size, piece, threads, work), Ok(()));
                    let done = done.into_inner().unwrap();
                    assert_eq!(done.len() as u64, size.div_ceil(piece));
                    let end = done.iter().fold(0, |end, (offset, length)| {
                        assert_eq!(*offset, end);
                        end + length
                    });
                    assert_eq!(end, size);
                }
            }
        }
    }

    #[test]
    fn nothing_is_begun_after_a_refusal() {
        let begun = AtomicU64::new(0);
        let work = |offset, _| {
            begun.fetch_add(1, Ordering::Relaxed);
            if offset == 4 { Err("no") } else { Ok(()) }
        };
        assert_eq!(each(100, 4, 1, work), Err("no"));
        assert_eq!(begun.into_inner(), 2);
        assert_eq!(each(100, 4, 2, |_, _| Err("no")), Err("no"));
    }

    #[test]
    fn there_is_always_a_thread_and_never_one_without_work() {
        assert_eq!((threads_for(0), threads_for(1)), (1, 1));
        assert!((1..=THREADS).contains(&threads_for(u64::MAX)));
    }
}
