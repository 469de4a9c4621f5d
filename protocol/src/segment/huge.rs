//! Huge pages behind a new segment, where the kernel gives them.
//!
//! A page of 2 MiB takes 0.12 ms to make, nearly all of it for clearing; the 512 small ones in its place take 1 ms, for
//! reserving, clearing and mapping each. Freeing it takes next to nothing, and so does mapping it in a client.
//!
//! `MADV_COLLAPSE` is the way that asks for no setting of the host: it works with `shmem_enabled=never`, the default, and
//! leaves `deny` to those who want none. It is tried only while nobody else knows of the segment, so that
//! no client has a hand in it. Reserving and populating follow in any case: they find little left to do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::resource::{UsageWho, getrusage};

use super::pieces;
use super::region::{Advice, HUGE, Region};

/// Bytes for one call: each waits for every core to put its new pages where all can find them, so a few pages at once; but not
/// many, since slow ones are found out between calls.
const BATCH: u64 = 4 << 20;

/// How often a call is made that found a page in use by another part of the kernel.
const TRIES: u32 = 4;

/// Microseconds of processor time for a huge page, on average since the segment was begun, past which the rest gets small
/// ones: twice what these take. It happens where the kernel has to move pages to get 2 MiB in one piece, and where a virtual
/// machine's host has taken free memory back and gives it anew: 5 ms for 2 MiB, while small pages are found among those
/// that were in use a moment ago.
const DEAR: u64 = 2000;

/// Makes huge pages of the whole pieces of 2 MiB of a new segment, as far as that is cheap; says how many bytes they are.
pub(super) fn make(memory: &Region) -> u64 {
    make_with(
        memory.len() as u64,
        // Pieces without any page are refused. Writing to one could be SIGBUS; populating it is an error instead.
        |offset| memory.advise_range(Advice::PopulateWrite, offset as usize, 1),
        |offset, len| memory.advise_range(Advice::Collapse, offset as usize, len as usize),
        processor_time,
    )
}

/// [`make`] with these steps and this clock. Whatever they refuse ends it: an old kernel or a setting (`EINVAL`), no 2 MiB in one
/// piece (`ENOMEM`), a memory cgroup near its limit (`EBUSY`). The next segment tries again, which takes microseconds where
/// the kernel knows of no huge pages; remembering a refusal would keep for good what passes, such as a full /dev/shm.
pub(super) fn make_with(
    len: u64,
    touch: impl Fn(u64) -> Result<(), Errno> + Sync,
    collapse: impl Fn(u64, u64) -> Result<(), Errno> + Sync,
    clock: impl Fn() -> Duration + Sync,
) -> u64 {
    let huge = HUGE as u64;
    let whole = len / huge * huge;
    let (made, micros) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = |offset: u64, len: u64| {
        let before = clock();
        (offset..offset + len).step_by(HUGE).try_for_each(&touch)?;
        patiently(|| collapse(offset, len))?;
        let spent = clock().saturating_sub(before).as_micros() as u64;
        let spent = micros.fetch_add(spent, Ordering::Relaxed) + spent;
        let pages = (made.fetch_add(len, Ordering::Relaxed) + len) / huge;
        if spent > pages * DEAR { Err(Errno::ETIME) } else { Ok(()) }
    };
    // Ended or not: what has been made is all there is to know.
    let _ = pieces::each(whole, BATCH, pieces::threads_for(whole.div_ceil(BATCH)), work);
    made.into_inner()
}

/// Processor time of this thread: where cores are busy, waiting for one must not look like slow memory.
fn processor_time() -> Duration {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_THREAD) else { return Duration::ZERO };
    let (user, system) = (usage.user_time(), usage.system_time());
    let micros = (user.tv_sec() + system.tv_sec()) * 1_000_000 + user.tv_usec() + system.tv_usec();
    Duration::from_micros(micros.unsigned_abs())
}

fn patiently(call: impl Fn() -> Result<(), Errno>) -> Result<(), Errno> {
    for _ in 1..TRIES {
        match call() {
            Err(Errno::EAGAIN) => {}
            result => return result,
        }
    }
    call()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeSet;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU32;

    use super::*;

    const PAGE: u64 = HUGE as u64;

    #[test]
    fn whole_pieces_are_touched_and_collapsed_in_batches() {
        for (len, batches) in [
            (1, vec![]),
            (PAGE - 1, vec![]),
            (PAGE, vec![(0, PAGE)]),
            (2 * PAGE + 5, vec![(0, 2 * PAGE)]),
            (2 * BATCH + 2 * PAGE - 1, vec![(0, BATCH), (BATCH, BATCH), (2 * BATCH, PAGE)]),
        ] {
            let (touched, collapsed) = (Mutex::new(BTreeSet::new()), Mutex::new(BTreeSet::new()));
            let touch = |offset| {
                assert!(touched.lock().unwrap().insert(offset));
                Ok(())
            };
            let collapse = |offset, len| {
                let touched = touched.lock().unwrap();
                assert!((offset..offset + len).step_by(HUGE).all(|piece| touched.contains(&piece)));
                assert!(collapsed.lock().unwrap().insert((offset, len)));
                Ok(())
            };
            assert_eq!(make_with(len, touch, collapse, || Duration::ZERO), len / PAGE * PAGE);
            assert_eq!(collapsed.into_inner().unwrap(), batches.into_iter().collect());
            assert_eq!(touched.into_inner().unwrap().len() as u64, len / PAGE);
        }
    }

    #[test]
    fn a_refusal_ends_it() {
        for errno in [Errno::EINVAL, Errno::ENOMEM, Errno::EBUSY, Errno::EPERM] {
            let calls = AtomicU32::new(0);
            let collapse = |offset, _| {
                calls.fetch_add(1, Ordering::Relaxed);
                if offset == 0 { Ok(()) } else { Err(errno) }
            };
            assert_eq!(make_with(500 * BATCH, |_| Ok(()), collapse, || Duration::ZERO), BATCH);
            assert!(calls.into_inner() <= 3, "two threads may each have begun one");
        }
        let touch = |offset| if offset < BATCH { Ok(()) } else { Err(Errno::EFAULT) };
        assert_eq!(make_with(500 * BATCH, touch, |_, _| Ok(()), || Duration::ZERO), BATCH);
    }

    #[test]
    fn pages_in_use_are_waited_for_and_not_for_ever() {
        for (busy, made) in [(1, PAGE), (TRIES - 1, PAGE), (TRIES, 0), (u32::MAX, 0)] {
            let calls = AtomicU32::new(0);
            let collapse = |_, _| {
                if calls.fetch_add(1, Ordering::Relaxed) < busy { Err(Errno::EAGAIN) } else { Ok(()) }
            };
            assert_eq!(make_with(PAGE, |_| Ok(()), collapse, || Duration::ZERO), made);
            assert!(calls.into_inner() <= TRIES);
        }
    }

    #[test]
    fn pages_that_are_dearer_than_small_ones_end_it() {
        thread_local!(static SPENT: Cell<u64> = const { Cell::new(0) });
        let pages = BATCH / PAGE;
        let make = |micros: fn(u64) -> u64| {
            let collapse = |offset, _| {
                SPENT.set(SPENT.get() + micros(offset / BATCH));
                Ok(())
            };
            make_with(500 * BATCH, |_| Ok(()), collapse, || Duration::from_micros(SPENT.get())) / BATCH
        };
        assert_eq!(make(|_| BATCH / PAGE * DEAR), 500, "as dear as they may be");
        assert!((1..=2).contains(&make(|_| BATCH / PAGE * DEAR + 1)), "one of each thread");
        // A few are borne by those before them.
        assert_eq!(make(|batch| if batch % 10 == 9 { 15_000 } else { 200 }), 500);
        let made = make(|batch| if batch >= 100 { 2 * 5000 } else { 200 });
        // (What 100 have saved) / (what each costs too much), and one more of each thread.
        let borne = 100 * (pages * DEAR - 200) / (2 * 5000 - pages * DEAR);
        assert!((100 + borne..=102 + borne).contains(&made), "{made}, {borne}");
    }

    #[test]
    fn the_clock_runs_with_work() {
        let before = processor_time();
        while processor_time() == before {}
        assert!(processor_time() > before);
    }
}
