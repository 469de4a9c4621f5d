//! The daemon's handle: starting, connecting, running and stopping.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use nix::sys::epoll::{Epoll, EpollCreateFlags};
use shmquant_protocol::failpoint::failpoint;
use shmquant_protocol::segment::{Backing, InstanceGuard, ignore_sigxfsz, sweep_stale};
use shmquant_protocol::socket::{Connection, Listener};

use crate::config::Config;
use crate::engine::Engine;
use crate::error::DaemonError;
use crate::hub::Hub;
use crate::{reaper, server, watcher};

/// A running daemon. Dropping it stops it.
#[derive(Debug)]
pub struct Daemon {
    hub: Arc<Hub>,
    listener: Option<Arc<Listener>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The process it runs in: a forked child has none of its threads.
    pid: u32,
    // After everything else: segments of this instance have an owner until here.
    _guard: Option<InstanceGuard>,
}

impl Daemon {
    /// Starts a daemon that serves `config.address`.
    pub fn start(config: Config) -> Result<Self, DaemonError> {
        let listener = Arc::new(Listener::bind(&config.address)?);
        failpoint("daemon.bound");
        let daemon = Self::assemble(config, Some(listener.clone()))?;
        failpoint("daemon.assembled");
        let accept = server::start(daemon.hub.clone(), listener)
            .map_err(DaemonError::io("starting the accepting thread"))?;
        daemon.threads.lock().unwrap_or_else(PoisonError::into_inner).push(accept);
        tracing::info!(
            address = %daemon.hub.config.address.display(),
            workers = daemon.hub.config.workers,
            "serving"
        );
        Ok(daemon)
    }

    /// Starts a daemon without an address: it serves who gets a socket from [`connect`](Self::connect).
    pub fn in_process(config: Config) -> Result<Self, DaemonError> {
        Self::assemble(config, None)
    }

    fn assemble(config: Config, listener: Option<Arc<Listener>>) -> Result<Self, DaemonError> {
        let config = config.sane();
        ignore_sigxfsz()?;
        let mut instance = [0; 8];
        getrandom::fill(&mut instance).map_err(|e| DaemonError::Io {
            what: "drawing an instance number",
            error: io::Error::other(e),
        })?;
        let instance = u64::from_le_bytes(instance);
        // With memfds, too: the daemon that was killed may have had the other backing.
        let swept = sweep_stale();
        match &swept {
            Ok(swept) if swept.segments > 0 => {
                tracing::info!("swept {} segments of dead daemons", swept.segments);
            }
            Ok(_) => {}
            Err(error) => tracing::debug!("nothing was swept: {error}"),
        }
        let guard = match config.backing {
            Backing::Memfd => None,
            Backing::Posix => {
                swept?;
                let guard = InstanceGuard::acquire(instance)?;
                failpoint("daemon.announced");
                Some(guard)
            }
        };
        let watch = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(DaemonError::errno("making an epoll instance"))?;
        let engine = Engine::start(config.workers).map_err(DaemonError::io("starting the workers"))?;
        let (send, queue) = mpsc::channel();
        let hub = Arc::new(Hub::new(config, instance, engine, watch, send));
        let daemon =
            Self { hub, listener, threads: Mutex::default(), pid: std::process::id(), _guard: guard };
        let reaper = reaper::start(queue, Arc::downgrade(&daemon.hub))
            .map_err(DaemonError::io("starting the reaper"))?;
        daemon.threads.lock().unwrap_or_else(PoisonError::into_inner).push(reaper);
        let watcher = watcher::start(daemon.hub.clone()).map_err(DaemonError::io("starting the watcher"))?;
        daemon.threads.lock().unwrap_or_else(PoisonError::into_inner).push(watcher);
        Ok(daemon)
    }

    /// One end of a connection that this daemon serves.
    pub fn connect(&self) -> io::Result<OwnedFd> {
        let refused = |why| Err(io::Error::new(io::ErrorKind::ConnectionRefused, why));
        if self.is_forked() {
            return refused("the daemon runs in the process that this one was forked from");
        }
        if self.hub.is_stopping() {
            return refused("the daemon has been stopped");
        }
        let (ours, theirs) = Connection::pair().map_err(io::Error::other)?;
        server::spawn(&self.hub, ours);
        Ok(theirs.into())
    }

    fn is_forked(&self) -> bool {
        std::process::id() != self.pid
    }

    /// Runs until a [`Stopper`] is used, or until nobody has used it for
    /// `config.idle_exit`; then stops.
    pub fn run(self) {
        self.hub.wait_for_stop();
        self.stop();
    }

    /// Lets [`run`](Self::run) return. For other threads, such as one that waits for signals.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.hub.clone())
    }

    /// Stops: refuses new work, gives running requests a moment, then ends all sessions and threads.
    /// What clients have mapped stays theirs until they unmap it.
    pub fn stop(&self) {
        if self.is_forked() {
            // Its threads are not here to be waited for, and its locks may be held by them for ever.
            return;
        }
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        if threads.is_empty() {
            return;
        }
        if let Some(listener) = &self.listener {
            listener.shutdown();
        }
        failpoint("daemon.stopping");
        self.hub.close();
        failpoint("daemon.closed");
        self.hub.engine.stop();
        self.hub.empty();
        failpoint("daemon.emptied");
        self.hub.end_reaper();
        for thread in threads {
            let _ = thread.join();
        }
        tracing::info!("stopped");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.is_forked() {
            // Nor may anything of it be taken down here: it belongs to the parent.
            std::mem::forget(self.hub.clone());
            std::mem::forget((self.listener.take(), self._guard.take()));
            return;
        }
        self.stop();
    }
}

/// Asks a daemon to stop.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<Hub>);

impl Stopper {
    /// Lets the daemon's `run` return.
    pub fn stop(&self) {
        self.0.request_stop();
    }
}
