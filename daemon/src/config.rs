//! What a daemon can be told. The client hears in `Welcome` what concerns it.

use std::path::PathBuf;
use std::time::Duration;

use shmquant_protocol::chunks::MIN_WINDOW;
use shmquant_protocol::client::default_address;
use shmquant_protocol::segment::Backing;

/// How a daemon is set up. `Default` is what `shmquant serve` does without options.
#[derive(Debug, Clone)]
pub struct Config {
    /// The socket's path.
    pub address: PathBuf,
    /// Where segments live.
    pub backing: Backing,
    /// Most bytes of shared memory; `None`: a share of what the host and the cgroup have.
    pub budget: Option<u64>,
    /// Threads that quantize.
    pub workers: usize,
    /// Bytes of a lane's window when the client does not say.
    pub window: u64,
    /// Largest window a client may ask for.
    pub max_window: u64,
    /// Most lanes of a session.
    pub max_lanes: u32,
    /// Most sessions.
    pub max_sessions: u32,
    /// Most holds (leases and tickets) of a session.
    pub max_holds: u64,
    /// Most datasets in the catalog.
    pub max_datasets: u64,
    /// Poll shortly before sleeping, which answers sooner and costs processor time.
    pub poll: bool,
    /// End when there has been no session and no catalog hold for so long.
    pub idle_exit: Option<Duration>,
    /// Part of the budget that the idle memory of one session may take: a divisor (4 = a quarter).
    pub pool_divisor: u64,
    /// Idle memory is given back to the host after so long.
    pub pool_idle: Duration,
    /// A request waits so long for memory that only other threads of its own process could free.
    pub grace: Duration,
    /// A ticket that nobody opened is removed after so long.
    pub ticket_ttl: Duration,
    /// `serve_main`: leave the caller's session, directory and descriptors, and log to a file.
    pub detach: bool,
    /// `serve_main`: the log file (detached default: `shmquant.log` beside the socket).
    pub log: Option<PathBuf>,
    /// `serve_main`: what is logged, in the syntax of `RUST_LOG`.
    pub log_filter: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: default_address(),
            backing: Backing::Memfd,
            budget: None,
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            window: 8 << 20,
            max_window: 256 << 20,
            max_lanes: 64,
            max_sessions: 1024,
            max_holds: 1 << 18,
            max_datasets: 1 << 14,
            poll: true,
            idle_exit: None,
            pool_divisor: 4,
            pool_idle: Duration::from_secs(60),
            grace: Duration::from_millis(300),
            ticket_ttl: Duration::from_secs(3600),
            detach: false,
            log: None,
            log_filter: "info".to_owned(),
        }
    }
}

impl Config {
    /// Puts values that cannot work into their range.
    pub(crate) fn sane(mut self) -> Self {
        self.workers = self.workers.clamp(1, 1024);
        self.max_window = self.max_window.max(MIN_WINDOW);
        self.window = self.window.clamp(MIN_WINDOW, self.max_window);
        self.max_lanes = self.max_lanes.max(1);
        self.max_sessions = self.max_sessions.max(1);
        self.pool_divisor = self.pool_divisor.max(1);
        self
    }
}
