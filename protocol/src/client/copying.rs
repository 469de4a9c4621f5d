//! Threads that help a call to encode and copy, kept between calls.
#![allow(
    unsafe_code,
    reason = "a borrowed closure is lent to threads that outlive the call, for the time of the call"
)]

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::leases::lock;

/// Most threads that work for one call, the caller included: a few already read as fast as common memory is.
const MOST: usize = 4;

type Body = dyn Fn() + Sync;

/// A pool of threads, started when first needed.
#[derive(Debug)]
pub(super) struct Helpers {
    shared: Arc<Shared>,
    threads: usize,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// One entry for each helper that a call still wants.
    wanted: VecDeque<Arc<Task>>,
    started: usize,
    ended: bool,
}

#[derive(Debug)]
struct Task {
    body: *const Body,
    inside: Mutex<Inside>,
}

// SAFETY: `body` is Sync, and `Lent` keeps it borrowed while a helper can be inside.
unsafe impl Send for Task {}
// SAFETY: as above.
unsafe impl Sync for Task {}

#[derive(Debug, Default)]
struct Inside {
    helpers: usize,
    panic: Option<PanicPayload>,
}

struct PanicPayload(Box<dyn Any + Send>);

impl std::fmt::Debug for PanicPayload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PanicPayload")
    }
}

impl Helpers {
    pub(super) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { shared: Arc::default(), threads: cores.min(MOST) - 1 }
    }

    /// Runs `body` on the helper threads that are free and `main` on this one. Returns when `main` is over and all helpers have
    /// left `body`, which `main` has to tell them to. A panic of a helper becomes the caller's.
    pub(super) fn with<R>(&self, body: &(dyn Fn() + Sync), main: impl FnOnce() -> R) -> R {
        if self.threads == 0 {
            return main();
        }
        // SAFETY: only the lifetime is changed. `Lent` waits, on every way out, until no helper is inside the body and none can
        // still come.
        let body = unsafe { std::mem::transmute::<*const (dyn Fn() + Sync + '_), *const Body>(body) };
        let task = Arc::new(Task { body, inside: Mutex::default() });
        let lent = Lent { shared: &self.shared, task };
        self.shared.offer(&lent.task, self.threads);
        let result = main();
        let panic = lent.take_back();
        drop(lent);
        if let Some(PanicPayload(payload)) = panic {
            resume_unwind(payload);
        }
        result
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        lock(&self.shared.state).ended = true;
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn offer(self: &Arc<Self>, task: &Arc<Task>, helpers: usize) {
        let mut state = lock(&self.state);
        while state.started < helpers {
            let shared = Arc::clone(self);
            let made =
                std::thread::Builder::new().name("shmquant-copy".to_owned()).spawn(move || shared.help());
            // Without threads to be had, the caller copies alone.
            if made.is_err() {
                break;
            }
            state.started += 1;
        }
        state.wanted.extend(std::iter::repeat_n(Arc::clone(task), helpers));
        drop(state);
        self.work.notify_all();
    }

    fn help(&self) {
        let mut state = lock(&self.state);
        loop {
            if state.ended {
                return;
            }
            let Some(task) = state.wanted.pop_front() else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            // Still under the pool's lock: whoever takes the task back sees either the entry or the helper.
            lock(&task.inside).helpers += 1;
            drop(state);
            // SAFETY: `Lent::take_back` waits until `helpers` is 0 again, so the body is still borrowed.
            let body = unsafe { &*task.body };
            let panic = catch_unwind(AssertUnwindSafe(body)).err();
            state = lock(&self.state);
            let mut inside = lock(&task.inside);
            inside.helpers -= 1;
            if let Some(panic) = panic {
                inside.panic.get_or_insert(PanicPayload(panic));
            }
            drop(inside);
            self.left.notify_all();
        }
    }
}

struct Lent<'a> {
    shared: &'a Shared,
    task: Arc<Task>,
}

impl Lent<'_> {
    fn take_back(&self) -> Option<PanicPayload> {
        let mut state = lock(&self.shared.state);
        state.wanted.retain(|task| !Arc::ptr_eq(task, &self.task));
        loop {
            {
                let mut inside = lock(&self.task.inside);
                if inside.helpers == 0 {
                    return inside.panic.take();
                }
            }
            state = self.shared.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        drop(self.take_back());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    fn helpers(threads: usize) -> Helpers {
        Helpers { shared: Arc::default(), threads }
    }

    #[test]
    fn all_helpers_have_left_when_it_returns() {
        let pool = helpers(3);
        for round in 0..50 {
            let (inside, came) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let stop = AtomicBool::new(false);
            let body = || {
                inside.fetch_add(1, Ordering::SeqCst);
                came.fetch_add(1, Ordering::SeqCst);
                while !stop.load(Ordering::SeqCst) {
                    std::thread::park_timeout(std::time::Duration::from_micros(200));
                }
                inside.fetch_sub(1, Ordering::SeqCst);
            };
            let result = pool.with(&body, || {
                while came.load(Ordering::SeqCst) < 2 {
                    std::thread::park_timeout(std::time::Duration::from_micros(200));
                }
                stop.store(true, Ordering::SeqCst);
                round
            });
            assert_eq!(result, round);
            assert_eq!(inside.load(Ordering::SeqCst), 0);
        }
    }

    #[test]
    fn a_helpers_panic_is_the_callers() {
        let pool = helpers(1);
        let failed = AtomicBool::new(false);
        let body = || {
            failed.store(true, Ordering::SeqCst);
            panic!("source failed");
        };
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.with(&body, || {
                while !failed.load(Ordering::SeqCst) {
                    std::thread::park_timeout(std::time::Duration::from_micros(200));
                }
            });
        }));
        assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"source failed"));
        // The thread lives on.
        let again = AtomicBool::new(false);
        pool.with(&|| again.store(true, Ordering::SeqCst), || {
            while !again.load(Ordering::SeqCst) {
                std::thread::park_timeout(std::time::Duration::from_micros(200));
            }
        });
    }

    #[test]
    fn two_calls_share_the_threads() {
        let pool = helpers(1);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let n = AtomicUsize::new(0);
                        let body = || {
                            n.fetch_add(1, Ordering::SeqCst);
                        };
                        pool.with(&body, || ());
                        assert!(n.into_inner() <= 1);
                    }
                });
            }
        });
    }
}
