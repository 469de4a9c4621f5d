//! The engine: one pool of workers for all sessions, served chunk by chunk in turn.
//!
//! The chunks of a run are started in their order, each as soon as it is written (`ready`) and its barrier
//! has passed; they end in any order. The watermark is the number of chunks below which all have ended.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use shmquant_kernels::NoFlushing;
use shmquant_protocol::failpoint::failpoint;

/// Chunked work. `run` never panics; faults are kept inside until `complete`.
pub trait Work: Send + Sync {
    /// The number of chunks.
    fn len(&self) -> usize;
    /// Nothing to do.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The chunk may start only when all chunks below this index have ended (0: at once).
    fn barrier(&self, chunk: usize) -> usize;
    /// Does one chunk.
    fn run(&self, chunk: usize);
    /// No further chunk needs to run.
    fn stop_early(&self) -> bool {
        false
    }
}

/// Who wants to know how a run gets on. Called by workers, without any lock of the engine.
pub trait Observer: Send + Sync {
    /// All chunks below `watermark` have ended. Calls of several workers may overtake each other.
    fn progress(&self, watermark: usize);
    /// No chunk runs and none will.
    fn ended(&self);
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It has not.
    Running,
    /// Every chunk ran, or the work stopped early.
    Complete,
    /// It was cancelled.
    Cancelled,
    /// A chunk panicked: a bug of ours.
    Broken,
}

/// A handle on submitted work.
#[derive(Debug)]
pub struct Run {
    id: u64,
    watermark: AtomicUsize,
    outcome: AtomicU8,
}

impl Run {
    /// How it ended, if it has.
    pub fn outcome(&self) -> Outcome {
        match self.outcome.load(Ordering::Acquire) {
            0 => Outcome::Running,
            1 => Outcome::Complete,
            2 => Outcome::Cancelled,
            _ => Outcome::Broken,
        }
    }

    /// All chunks below this have ended.
    pub fn watermark(&self) -> usize {
        self.watermark.load(Ordering::Acquire)
    }
}

/// The pool of workers.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    stopped: AtomicBool,
    /// Chunks that are ready but not started, roughly: what pollers look at before they spin.
    waiting: AtomicUsize,
}

#[derive(Default)]
struct Queue {
    runs: HashMap<u64, State>,
    /// One entry a session that has chunks to start, with its runs in turn.
    turns: VecDeque<(u64, VecDeque<u64>)>,
    idle: usize,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("runs", &self.runs.len()).field("turns", &self.turns).finish()
    }
}

struct State {
    run: Arc<Run>,
    session: u64,
    work: Arc<dyn Work>,
    observer: Arc<dyn Observer>,
    len: usize,
    next: usize,
    ready: usize,
    watermark: usize,
    /// Ended chunks above the watermark.
    late: BTreeSet<usize>,
    running: usize,
    queued: bool,
    cancelled: bool,
    broken: bool,
}

impl State {
    fn startable(&self) -> bool {
        !self.cancelled
            && !self.broken
            && self.next < self.ready.min(self.len)
            && self.work.barrier(self.next) <= self.watermark
            && !self.work.stop_early()
    }

    fn outcome(&self) -> Outcome {
        if self.running > 0 {
            Outcome::Running
        } else if self.broken {
            Outcome::Broken
        } else if self.watermark == self.len || self.work.stop_early() {
            Outcome::Complete
        } else if self.cancelled {
            Outcome::Cancelled
        } else {
            Outcome::Running
        }
    }

    fn end(&mut self, chunk: usize) -> bool {
        self.running -= 1;
        if chunk != self.watermark {
            self.late.insert(chunk);
            return false;
        }
        self.watermark += 1;
        while self.late.remove(&self.watermark) {
            self.watermark += 1;
        }
        self.run.watermark.store(self.watermark, Ordering::Release);
        true
    }
}

impl Queue {
    /// Puts a run into its session's turn if it has a chunk to start; true if it has.
    fn enqueue(&mut self, id: u64) -> bool {
        let Some(state) = self.runs.get_mut(&id) else { return false };
        if state.queued || !state.startable() {
            return state.queued;
        }
        state.queued = true;
        let session = state.session;
        match self.turns.iter_mut().find(|(s, _)| *s == session) {
            Some((_, runs)) => runs.push_back(id),
            None => self.turns.push_back((session, VecDeque::from([id]))),
        }
        true
    }

    /// Starts the next chunk: one of each session in turn, one of each of its runs in turn.
    fn start_next(&mut self) -> Option<(u64, usize, Arc<dyn Work>)> {
        while let Some((session, mut runs)) = self.turns.pop_front() {
            let Some(id) = runs.pop_front() else { continue };
            let mut started = None;
            if let Some(state) = self.runs.get_mut(&id) {
                if state.startable() {
                    started = Some((id, state.next, state.work.clone()));
                    state.next += 1;
                    state.running += 1;
                }
                state.queued = state.startable();
                if state.queued {
                    runs.push_back(id);
                }
            }
            if !runs.is_empty() {
                self.turns.push_back((session, runs));
            }
            if started.is_some() {
                return started;
            }
        }
        None
    }

    /// Takes a run out if it has ended.
    fn take_ended(&mut self, id: u64) -> Option<Arc<dyn Observer>> {
        let outcome = self.runs.get(&id)?.outcome();
        if outcome == Outcome::Running {
            return None;
        }
        let state = self.runs.remove(&id)?;
        // Its place in a turn, if any, is skipped when that turn comes.
        state.run.outcome.store(
            match outcome {
                Outcome::Running => 0,
                Outcome::Complete => 1,
                Outcome::Cancelled => 2,
                Outcome::Broken => 3,
            },
            Ordering::Release,
        );
        Some(state.observer)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing of ours panics under this lock; if it did, the counts are still consistent enough to go on.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes as many workers as there can be use for.
    fn wake(&self, queue: &Queue) {
        self.waiting.store(queue.turns.len(), Ordering::Relaxed);
        match queue.turns.len() {
            0 => {}
            _ if queue.idle == 0 => {}
            _ => self.work.notify_all(),
        }
    }

    fn worker(&self) {
        let _exact = NoFlushing::new();
        let mut queue = self.lock();
        while !self.stopped.load(Ordering::Acquire) {
            let started = queue.start_next();
            self.waiting.store(queue.turns.len(), Ordering::Relaxed);
            let Some((id, chunk, work)) = started else {
                queue.idle += 1;
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
                continue;
            };
            drop(queue);
            failpoint("daemon.chunk_started");
            let fine = catch_unwind(AssertUnwindSafe(|| work.run(chunk))).is_ok();
            failpoint("daemon.chunk_ended");
            drop(work);
            queue = self.lock();
            let Some(state) = queue.runs.get_mut(&id) else { continue };
            state.broken |= !fine;
            let moved = state.end(chunk).then(|| (state.observer.clone(), state.watermark));
            let ended = queue.take_ended(id);
            // What a barrier held back may have several chunks for several workers.
            if ended.is_none() && queue.enqueue(id) {
                self.wake(&queue);
            }
            if moved.is_some() || ended.is_some() {
                drop(queue);
                if let (Some((observer, watermark)), None) = (moved, &ended) {
                    observer.progress(watermark);
                }
                if let Some(observer) = ended {
                    observer.ended();
                }
                queue = self.lock();
            }
        }
    }
}

impl Engine {
    /// Starts the workers.
    pub fn start(workers: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            stopped: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
        });
        let engine = Self { shared, workers: Mutex::default(), next: AtomicU64::new(1) };
        for index in 0..workers.max(1) {
            let shared = engine.shared.clone();
            let worker = Builder::new().name(format!("shmq-work-{index}")).spawn(move || shared.worker())?;
            engine.workers.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
        }
        Ok(engine)
    }

    /// Hands over work whose first `ready` chunks may be read.
    pub fn submit(
        &self,
        session: u64,
        work: Arc<dyn Work>,
        ready: usize,
        observer: Arc<dyn Observer>,
    ) -> Arc<Run> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let run = Arc::new(Run { id, watermark: AtomicUsize::new(0), outcome: AtomicU8::new(0) });
        let len = work.len();
        let state = State {
            run: run.clone(),
            session,
            work,
            observer,
            len,
            next: 0,
            ready,
            watermark: 0,
            late: BTreeSet::new(),
            running: 0,
            queued: false,
            cancelled: false,
            broken: false,
        };
        let mut queue = self.shared.lock();
        queue.runs.insert(id, state);
        self.go_on(queue, id);
        run
    }

    /// All chunks below `ready` may be read now.
    pub fn ready(&self, run: &Run, ready: usize) {
        let mut queue = self.shared.lock();
        if let Some(state) = queue.runs.get_mut(&run.id) {
            state.ready = state.ready.max(ready);
        }
        self.go_on(queue, run.id);
    }

    /// Starts no further chunk; the run ends when those that run have ended.
    pub fn cancel(&self, run: &Run) {
        let mut queue = self.shared.lock();
        if let Some(state) = queue.runs.get_mut(&run.id) {
            state.cancelled = true;
        }
        self.go_on(queue, run.id);
    }

    /// Chunks wait for a worker: whoever would poll had better sleep.
    pub fn is_busy(&self) -> bool {
        self.shared.waiting.load(Ordering::Relaxed) > 0
    }

    /// Runs that have not ended.
    pub fn runs(&self) -> usize {
        self.shared.lock().runs.len()
    }

    /// Ends the workers, each after the chunk it is at.
    pub fn stop(&self) {
        {
            // Under the lock, so that no worker misses it between looking and sleeping.
            let _queue = self.shared.lock();
            self.shared.stopped.store(true, Ordering::Release);
            self.shared.work.notify_all();
        }
        let workers = std::mem::take(&mut *self.workers.lock().unwrap_or_else(PoisonError::into_inner));
        for worker in workers {
            let _ = worker.join();
        }
    }

    fn go_on(&self, mut queue: MutexGuard<'_, Queue>, id: u64) {
        let ended = queue.take_ended(id);
        if ended.is_none() && queue.enqueue(id) {
            self.shared.wake(&queue);
        }
        drop(queue);
        if let Some(observer) = ended {
            observer.ended();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}
