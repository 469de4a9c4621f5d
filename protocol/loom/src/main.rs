//! The queue of returned holds, `protocol/src/client/returns.rs` as it is, under every order of its atomic steps.
//!
//! `cargo run --release`: an order that loses a hold, gives one twice or leaks one is a panic. That a sleeper is woken is
//! not tried here: it rests on sequential consistency of two variables, which loom does not have.

use std::sync::atomic::{AtomicUsize, Ordering};

use loom::sync::Arc;
use loom::thread;

use message::Release;
use returns::{Return, ReturnQueue};
use segment::Mapping;

mod sync {
    pub(super) use loom::sync::atomic::{AtomicPtr, Ordering};
}

mod message {
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Release {
        pub(crate) segment: u64,
    }
}

mod segment {
    /// Counted like a mapping that is kept.
    #[derive(Debug)]
    pub(crate) struct Mapping;
}

#[path = "../../src/client/returns.rs"]
mod returns;

/// Orders that were tried.
static TRIED: AtomicUsize = AtomicUsize::new(0);

fn hold(segment: u64, mapping: &std::sync::Arc<Mapping>) -> Box<Return> {
    Return::new(Release { segment }, std::sync::Arc::clone(mapping), 0)
}

/// `pushers` threads that push `each`, while this one takes twice: every hold comes out once, whoever is when.
fn pushed_and_taken(pushers: u64, each: u64) {
    let mut model = loom::model::Builder::new();
    // With no bound two pushers of two take hours.
    model.preemption_bound = (pushers * each > 3).then_some(2);
    model.check(move || {
        TRIED.fetch_add(1, Ordering::Relaxed);
        let mapping = std::sync::Arc::new(Mapping);
        let queue = Arc::new(ReturnQueue::default());
        let threads: Vec<_> = (0..pushers)
            .map(|pusher| {
                let (queue, mapping) = (Arc::clone(&queue), std::sync::Arc::clone(&mapping));
                thread::spawn(move || (0..each).for_each(|i| queue.push(hold(pusher * each + i, &mapping))))
            })
            .collect();
        let mut seen: Vec<u64> = Vec::new();
        for _ in 0..2 {
            seen.extend(queue.take().map(|back| (back.release.segment, back.mapping).0));
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        seen.extend(queue.take().map(|back| back.release.segment));
        assert!(queue.is_empty());
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..pushers * each));
        assert_eq!(std::sync::Arc::strong_count(&mapping), 1);
    });
}

/// Two that take at once, as a request and the housekeeping thread may, and a queue that goes with what is in it.
fn taken_by_two() {
    loom::model(|| {
        TRIED.fetch_add(1, Ordering::Relaxed);
        let mapping = std::sync::Arc::new(Mapping);
        let queue = Arc::new(ReturnQueue::default());
        queue.push(hold(0, &mapping));
        let taker = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || queue.take().map(|back| back.release.segment).collect::<Vec<_>>())
        };
        let pusher = {
            let (queue, mapping) = (Arc::clone(&queue), std::sync::Arc::clone(&mapping));
            thread::spawn(move || queue.push(hold(1, &mapping)))
        };
        let mut seen: Vec<_> = queue.take().map(|back| back.release.segment).collect();
        seen.extend(taker.join().unwrap());
        pusher.join().unwrap();
        seen.sort_unstable();
        assert!(seen.windows(2).all(|two| two[0] < two[1]), "{seen:?}");
        drop(queue);
        assert_eq!(std::sync::Arc::strong_count(&mapping), 1);
    });
}

fn main() {
    pushed_and_taken(1, 3);
    pushed_and_taken(2, 1);
    pushed_and_taken(2, 2);
    taken_by_two();
    println!("{} orders", TRIED.load(Ordering::Relaxed));
}
