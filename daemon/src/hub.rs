//! The hub: what all threads of one daemon share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::epoll::Epoll;
use shmquant_protocol::segment::{Kind, Segment, SegmentError, SegmentName};
use shmquant_protocol::socket::Connection;

use crate::books::{Books, Locked};
use crate::config::Config;
use crate::engine::Engine;
use crate::memory::SegmentMemory;
use crate::reaper::Dead;

/// Shared by connections, watcher, reaper and the handle.
#[derive(Debug)]
pub(crate) struct Hub {
    pub(crate) config: Config,
    pub(crate) instance: u64,
    pub(crate) engine: Engine,
    pub(crate) started: Instant,
    /// Memory of the host.
    host_bytes: u64,
    /// Watches the pidfds of all clients; the data of an event is the session's id.
    pub(crate) watch: Epoll,
    /// Requests that are being worked on.
    pub(crate) jobs: AtomicUsize,
    books: Mutex<Books>,
    reaper: Sender<Dead>,
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
    emptied: Condvar,
    last_connection: AtomicU64,
    spinning: AtomicUsize,
    spinners: usize,
    stopping: AtomicBool,
    stop: (Mutex<bool>, Condvar),
}

impl Hub {
    pub(crate) fn new(
        config: Config,
        instance: u64,
        engine: Engine,
        watch: Epoll,
        reaper: Sender<Dead>,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let books = Books::new(config.pool_divisor, config.max_holds);
        Self {
            instance,
            engine,
            watch,
            reaper,
            started: Instant::now(),
            host_bytes: crate::headroom::host_total(),
            jobs: AtomicUsize::new(0),
            books: Mutex::new(books),
            connections: Mutex::default(),
            emptied: Condvar::new(),
            last_connection: AtomicU64::new(0),
            spinning: AtomicUsize::new(0),
            // A spinning thread keeps a core from working: one on small machines, few on large ones.
            spinners: if config.poll && cores > 1 { (cores / 4).max(1) } else { 0 },
            stopping: AtomicBool::new(false),
            stop: Default::default(),
            config,
        }
    }

    /// Takes the lock on the books.
    pub(crate) fn books(&self) -> Locked<'_> {
        Locked::new(lock(&self.books))
    }

    /// Makes a segment whose bytes have been promised. Where a limit of this process is met, idle memory goes
    /// first: it takes descriptors and mappings that are of more use here.
    pub(crate) fn make_segment(
        &self,
        kind: Kind,
        size: u64,
    ) -> Result<(u64, Arc<SegmentMemory>), SegmentError> {
        let id = self.books().registry.next_id();
        let name = SegmentName { instance: self.instance, kind, id };
        let segment = loop {
            match Segment::create(self.config.backing, &name, size) {
                Err(
                    SegmentError::FdLimit { .. }
                    | SegmentError::MapLimit { .. }
                    | SegmentError::AddressSpace { .. }
                    | SegmentError::NoRoom { .. },
                ) if self.shed_idle() => {}
                made => break made?,
            }
        };
        Ok((id, Arc::new(SegmentMemory::new(segment, self.reaper.clone()))))
    }

    /// Frees a part of the memory that nobody uses, and waits until it is gone; false if there was none.
    pub(crate) fn shed_idle(&self) -> bool {
        if !self.books().retire_idle() {
            return false;
        }
        let (gone, wait) = channel();
        self.reaper.send(Dead::Until(gone)).is_ok() && wait.recv().is_ok()
    }

    /// A result larger than this is refused before anything is made for it.
    pub(crate) fn most_result(&self) -> u64 {
        self.config.budget.unwrap_or(self.host_bytes)
    }

    /// Lets the caller poll shortly, unless too many do or there is work to do.
    pub(crate) fn spin(&self) -> Option<Spin<'_>> {
        if self.engine.is_busy() || self.spinning.load(Ordering::Relaxed) >= self.spinners {
            return None;
        }
        self.spinning.fetch_add(1, Ordering::Relaxed);
        Some(Spin(self))
    }

    /// Microseconds a client may poll.
    pub(crate) fn poll_micros(&self) -> u32 {
        if self.spinners > 0 { CLIENT_SPIN.as_micros() as u32 } else { 0 }
    }

    // Connections.

    /// Enters a connection; `None` when there are too many or the daemon is stopping.
    pub(crate) fn enter(&self, connection: Arc<Connection>) -> Option<u64> {
        let most = self.config.max_sessions as usize * 4 + 1024;
        let mut connections = lock(&self.connections);
        if self.is_stopping() || connections.len() >= most {
            return None;
        }
        let id = self.last_connection.fetch_add(1, Ordering::Relaxed);
        connections.insert(id, connection);
        Some(id)
    }

    pub(crate) fn leave(&self, id: u64) {
        let mut connections = lock(&self.connections);
        connections.remove(&id);
        if connections.is_empty() {
            self.emptied.notify_all();
        }
    }

    pub(crate) fn connections(&self) -> usize {
        lock(&self.connections).len()
    }

    // Stopping.

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Asks whoever waits in [`wait_for_stop`](Self::wait_for_stop) to stop the daemon.
    pub(crate) fn request_stop(&self) {
        *lock(&self.stop.0) = true;
        self.stop.1.notify_all();
    }

    pub(crate) fn wait_for_stop(&self) {
        let mut stop = lock(&self.stop.0);
        while !*stop {
            stop = self.stop.1.wait(stop).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Refuses new work, gives running requests a moment, ends all connections and waits for their threads.
    pub(crate) fn close(&self) {
        self.stopping.store(true, Ordering::Release);
        let patience = Instant::now() + Duration::from_secs(2);
        let mut connections = lock(&self.connections);
        while self.jobs.load(Ordering::Acquire) > 0 && Instant::now() < patience {
            let wait = Duration::from_millis(10);
            connections =
                self.emptied.wait_timeout(connections, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        while !connections.is_empty() {
            for connection in connections.values() {
                connection.shutdown();
            }
            let wait = Duration::from_millis(100);
            connections =
                self.emptied.wait_timeout(connections, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Retires whatever is left: datasets, tickets. Everybody has gone by now.
    pub(crate) fn empty(&self) {
        self.books().retire_all();
    }

    /// Lets the reaper end after what it has been given.
    pub(crate) fn end_reaper(&self) {
        let _ = self.reaper.send(Dead::Stop);
    }
}

/// How long a thread may poll.
pub(crate) const SPIN: Duration = Duration::from_micros(50);
/// How long a client may poll: longer than it takes to wake a lane of ours and to work on a small request, or both sides
/// would find each other asleep for ever.
const CLIENT_SPIN: Duration = Duration::from_micros(200);

/// The permit to poll.
#[derive(Debug)]
pub(crate) struct Spin<'a>(&'a Hub);

impl Drop for Spin<'_> {
    fn drop(&mut self) {
        self.0.spinning.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Nothing of ours panics under these locks, and what they protect is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
