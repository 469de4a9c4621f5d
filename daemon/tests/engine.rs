//! The engine on work that says what was done when.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shmquant_daemon::engine::{Engine, Observer, Outcome, Work};

const PATIENCE: Duration = Duration::from_secs(20);

/// Work whose chunks are written down; chunk `gate` waits for a word.
struct Noted {
    name: char,
    len: usize,
    barrier_every: usize,
    gate: Option<(usize, Mutex<Receiver<()>>)>,
    panics_at: Option<usize>,
    stops_after: usize,
    log: Arc<Mutex<Vec<(char, usize)>>>,
    done: Mutex<HashSet<usize>>,
    ran: AtomicUsize,
}

impl Noted {
    fn new(name: char, len: usize, log: &Arc<Mutex<Vec<(char, usize)>>>) -> Self {
        Self {
            name,
            len,
            barrier_every: 0,
            gate: None,
            panics_at: None,
            stops_after: usize::MAX,
            log: log.clone(),
            done: Mutex::default(),
            ran: AtomicUsize::new(0),
        }
    }
}

impl Work for Noted {
    fn len(&self) -> usize {
        self.len
    }

    fn barrier(&self, chunk: usize) -> usize {
        chunk.checked_div(self.barrier_every).map_or(0, |block| block * self.barrier_every)
    }

    fn run(&self, chunk: usize) {
        self.log.lock().unwrap().push((self.name, chunk));
        if let Some((at, word)) = &self.gate
            && *at == chunk
        {
            word.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        }
        if self.panics_at == Some(chunk) {
            panic!("as asked");
        }
        let mut done = self.done.lock().unwrap();
        assert!((0..self.barrier(chunk)).all(|before| done.contains(&before)), "chunk {chunk} was too early");
        assert!(done.insert(chunk), "chunk {chunk} ran twice");
        self.ran.fetch_add(1, Ordering::SeqCst);
    }

    fn stop_early(&self) -> bool {
        self.ran.load(Ordering::SeqCst) >= self.stops_after
    }
}

struct Told(Mutex<Sender<()>>);

impl Observer for Told {
    fn progress(&self, _: usize) {}

    fn ended(&self) {
        self.0.lock().unwrap().send(()).unwrap();
    }
}

fn told() -> (Arc<Told>, Receiver<()>) {
    let (send, end) = channel();
    (Arc::new(Told(Mutex::new(send))), end)
}

#[test]
fn barriers_and_watermarks_hold_on_many_workers() {
    let engine = Engine::start(4).unwrap();
    let log = Arc::default();
    let mut work = Noted::new('a', 1000, &log);
    work.barrier_every = 37;
    let work = Arc::new(work);
    let (observer, end) = told();
    let run = engine.submit(1, work.clone(), 0, observer);
    for ready in [1, 500, 400, 1000] {
        engine.ready(&run, ready);
    }
    end.recv_timeout(PATIENCE).unwrap();
    assert_eq!((run.outcome(), run.watermark()), (Outcome::Complete, 1000));
    assert_eq!(work.done.lock().unwrap().len(), 1000);
    assert_eq!(engine.runs(), 0);
}

#[test]
fn a_long_run_does_not_hold_up_another_session() {
    let engine = Engine::start(1).unwrap();
    let log = Arc::default();
    let (open, word) = channel();
    let mut long = Noted::new('a', 50, &log);
    long.gate = Some((0, Mutex::new(word)));
    let (a, a_end) = told();
    let (b, b_end) = told();
    engine.submit(1, Arc::new(long), 50, a);
    // While its first chunk is held, another session brings a short one, and its own session a second one.
    engine.submit(2, Arc::new(Noted::new('b', 3, &log)), 3, b);
    let (c, c_end) = told();
    engine.submit(1, Arc::new(Noted::new('c', 3, &log)), 3, c);
    open.send(()).unwrap();
    for end in [a_end, b_end, c_end] {
        end.recv_timeout(PATIENCE).unwrap();
    }
    let log = log.lock().unwrap();
    let last = |name| log.iter().rposition(|(n, _)| *n == name).unwrap();
    assert!(last('b') <= 8, "{log:?}");
    assert!(last('c') <= 14, "{log:?}");
    assert_eq!(last('a'), log.len() - 1);
}

#[test]
fn cancelled_broken_and_early_runs_end_once_nothing_runs() {
    let engine = Engine::start(2).unwrap();
    let log = Arc::default();
    let (open, word) = channel();
    let mut held = Noted::new('a', 100, &log);
    held.gate = Some((5, Mutex::new(word)));
    let (observer, end) = told();
    let held = Arc::new(held);
    let run = engine.submit(1, held.clone(), 6, observer);
    engine.cancel(&run);
    engine.ready(&run, 100);
    // Either it was cancelled before chunk 5 began, or that chunk is waited for.
    open.send(()).unwrap();
    end.recv_timeout(PATIENCE).unwrap();
    assert_eq!(run.outcome(), Outcome::Cancelled);
    assert!(held.ran.load(Ordering::SeqCst) <= 6);

    let mut broken = Noted::new('b', 100, &log);
    broken.panics_at = Some(10);
    let (observer, end) = told();
    let run = engine.submit(1, Arc::new(broken), 100, observer);
    end.recv_timeout(PATIENCE).unwrap();
    assert_eq!(run.outcome(), Outcome::Broken);

    let mut early = Noted::new('c', 100, &log);
    early.stops_after = 7;
    let early = Arc::new(early);
    let (observer, end) = told();
    let run = engine.submit(1, early.clone(), 100, observer);
    end.recv_timeout(PATIENCE).unwrap();
    assert_eq!(run.outcome(), Outcome::Complete);
    assert!((7..10).contains(&early.ran.load(Ordering::SeqCst)));

    // The workers are as good as before.
    let (observer, end) = told();
    let run = engine.submit(2, Arc::new(Noted::new('d', 100, &log)), 100, observer);
    end.recv_timeout(PATIENCE).unwrap();
    assert_eq!((run.outcome(), engine.runs(), engine.is_busy()), (Outcome::Complete, 0, false));
}
