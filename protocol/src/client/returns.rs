//! The queue of holds to give back: pushing is one atomic operation, whatever thread a result's last view ends on.
#![allow(unsafe_code, reason = "an intrusive stack links boxes through raw pointers")]

use std::ptr;
use std::sync::Arc;

use super::sync::{AtomicPtr, Ordering};
use crate::message::Release;
use crate::segment::Mapping;

/// A hold on its way back, with the mapping that it kept, so that nothing is unmapped by whoever drops a view.
#[derive(Debug)]
pub(super) struct Return {
    pub(super) release: Release,
    pub(super) mapping: Arc<Mapping>,
    /// Where the extent is mapped.
    pub(super) address: usize,
    next: *mut Return,
}

// SAFETY: `next` is used by the queue alone, which owns what it points to.
unsafe impl Send for Return {}
// SAFETY: as above; nothing changes through a shared reference.
unsafe impl Sync for Return {}

impl Return {
    /// Made when the hold is taken, so that giving it back needs no memory.
    pub(super) fn new(release: Release, mapping: Arc<Mapping>, address: usize) -> Box<Self> {
        Box::new(Self { release, mapping, address, next: ptr::null_mut() })
    }
}

/// A stack that many push to and whoever comes first empties.
#[derive(Debug, Default)]
pub(super) struct ReturnQueue {
    head: AtomicPtr<Return>,
}

impl ReturnQueue {
    /// Pushes: no lock, no memory, no system call.
    pub(super) fn push(&self, item: Box<Return>) {
        let item = Box::into_raw(item);
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            // SAFETY: from Box::into_raw, and not shared before the exchange succeeds.
            unsafe { (*item).next = head };
            // SeqCst: the pusher's look at "is anybody asleep" comes after it.
            match self.head.compare_exchange_weak(head, item, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Whether there is nothing to take.
    pub(super) fn is_empty(&self) -> bool {
        self.head.load(Ordering::SeqCst).is_null()
    }

    /// Takes all, the newest first. (All at once, so that no item can come back under a taker's eyes.)
    pub(super) fn take(&self) -> Taken {
        Taken { head: self.head.swap(ptr::null_mut(), Ordering::SeqCst) }
    }
}

impl Drop for ReturnQueue {
    fn drop(&mut self) {
        drop(self.take());
    }
}

/// What was taken from a queue.
#[derive(Debug)]
pub(super) struct Taken {
    head: *mut Return,
}

impl Iterator for Taken {
    type Item = Box<Return>;

    fn next(&mut self) -> Option<Box<Return>> {
        if self.head.is_null() {
            return None;
        }
        // SAFETY: from Box::into_raw in `push`, and owned by this value since the swap.
        let item = unsafe { Box::from_raw(self.head) };
        self.head = item.next;
        Some(item)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::os::fd::AsFd;

    use super::*;
    use crate::segment::{Backing, Kind, Segment, SegmentName};

    fn mapping() -> Arc<Mapping> {
        let name = SegmentName { instance: 0xc1, kind: Kind::Result, id: 1 };
        let segment = Segment::create(Backing::Memfd, &name, 4096).unwrap();
        Arc::new(Mapping::read_only(segment.fd().as_fd(), 4096, Backing::Memfd).unwrap())
    }

    #[test]
    fn every_push_of_every_thread_is_taken_once() {
        const EACH: u64 = 20_000;
        let (queue, mapping) = (ReturnQueue::default(), mapping());
        let mut seen = HashSet::new();
        std::thread::scope(|scope| {
            for thread in 0..3u64 {
                let (queue, mapping) = (&queue, &mapping);
                scope.spawn(move || {
                    for i in 0..EACH {
                        let release = Release { segment: thread, generation: i, tainted: false };
                        queue.push(Return::new(release, Arc::clone(mapping), 0));
                    }
                });
            }
            while seen.len() < 3 * EACH as usize {
                for item in queue.take() {
                    assert!(seen.insert((item.release.segment, item.release.generation)));
                }
                std::hint::spin_loop();
            }
        });
        assert!(queue.is_empty());
        assert_eq!(Arc::strong_count(&mapping), 1);
    }

    #[test]
    fn what_nobody_takes_goes_with_the_queue() {
        let (queue, mapping) = (ReturnQueue::default(), mapping());
        for i in 0..3 {
            let release = Release { segment: i, generation: 0, tainted: false };
            queue.push(Return::new(release, Arc::clone(&mapping), 0));
        }
        drop(queue.take().next());
        assert_eq!(Arc::strong_count(&mapping), 1);
        queue.push(Return::new(
            Release { segment: 9, generation: 0, tainted: false },
            Arc::clone(&mapping),
            0,
        ));
        drop(queue);
        assert_eq!(Arc::strong_count(&mapping), 1);
    }
}
