//! `shmquant serve`: the daemon itself.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shmquant_protocol::client::{Session, StartCommand};
use shmquant_protocol::segment::Backing;
use shmquant_protocol::socket::{Connection, SocketError};

use super::error::CliError;
use super::link::Link;
use super::units;
use crate::config::Config;
use crate::error::DaemonError;

/// Run the daemon
///
/// It is started on first use, so this is for those who want it to be set up in their own way, or to stay.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where segments live: anonymous sealed memory, or names in /dev/shm for peers that trust each other
    #[arg(long, default_value = "memfd", value_name = "memfd|posix")]
    backing: Backing,

    /// Most shared memory [default: a share of what the host and the cgroup have]
    #[arg(long, value_parser = units::parse_bytes, value_name = "SIZE")]
    budget: Option<u64>,

    /// Threads that quantize [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,

    /// Memory through which codes and columns cross, for each thread of a client [default: 8MiB]
    #[arg(long, value_parser = units::parse_bytes, value_name = "SIZE")]
    window: Option<u64>,

    /// Largest window that a client may ask for [default: 256MiB]
    #[arg(long, value_parser = units::parse_bytes, value_name = "SIZE")]
    max_window: Option<u64>,

    /// Most processes that may be connected [default: 1024]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_sessions: Option<u32>,

    /// Most requests that one process may run at once [default: 64]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_lanes: Option<u32>,

    /// End after having been unused for so long [default: never]
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    idle_exit: Option<Duration>,

    /// Sleep at once instead of polling shortly: slower answers, less processor time
    #[arg(long)]
    no_poll: bool,

    /// Run in the background, in a process of its own
    #[arg(long)]
    detach: bool,

    /// This process is that process: it leaves the session, directory and descriptors of who started it
    #[arg(long, hide = true, conflicts_with = "detach")]
    detached: bool,

    /// Log file [default: standard error; with --detach shmquant.log beside the socket]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,

    /// What is logged
    #[arg(long, default_value = "info", env = "SHMQUANT_LOG", value_name = "FILTER")]
    log_filter: String,
}

/// Tells a process that it was started to be a daemon and nothing else.
pub(super) const DETACHED: &str = "--detached";

pub(super) fn run(args: Args, link: &Link) -> Result<(), CliError> {
    if args.detach {
        return detach(&args, link);
    }
    let default = Config::default();
    let window = args.window.unwrap_or(default.window);
    let config = Config {
        address: link.path().to_owned(),
        backing: args.backing,
        budget: args.budget,
        workers: args.workers.map_or(default.workers, usize::from),
        window,
        max_window: args.max_window.unwrap_or(default.max_window).max(window),
        max_sessions: args.max_sessions.unwrap_or(default.max_sessions),
        max_lanes: args.max_lanes.unwrap_or(default.max_lanes),
        poll: !args.no_poll,
        idle_exit: args.idle_exit,
        detach: args.detached,
        log: args.log.as_deref().map(absolute),
        log_filter: args.log_filter,
        ..default
    };
    Ok(crate::serve_main(config)?)
}

/// Starts another process that serves, and waits until it does.
fn detach(args: &Args, link: &Link) -> Result<(), CliError> {
    if Connection::connect(link.path()).is_ok() {
        return Err(DaemonError::Socket(SocketError::AlreadyServed { path: link.path().to_owned() }).into());
    }
    let session = Session::new(link.config(Some(args.command(link.start()))));
    session.connect()?;
    let stat = super::status::parse(&session.stat()?)?;
    session.close();
    eprintln!("daemon {} serves {}", stat["pid"], link.path().display());
    Ok(())
}

impl Args {
    /// `start`, with these options instead of its own.
    fn command(&self, start: &StartCommand) -> StartCommand {
        let own = start.args.iter().take_while(|arg| *arg != "serve").cloned();
        let mut args: Vec<OsString> = own.chain(["serve".into(), DETACHED.into()]).collect();
        let mut option = |name: &str, value: Option<OsString>| {
            if let Some(value) = value {
                args.extend([name.into(), value]);
            }
        };
        let number = |n: Option<u64>| n.map(|n| n.to_string().into());
        option("--backing", Some(self.backing.to_string().into()));
        option("--budget", number(self.budget));
        option("--workers", number(self.workers.map(u64::from)));
        option("--window", number(self.window));
        option("--max-window", number(self.max_window));
        option("--max-sessions", number(self.max_sessions.map(u64::from)));
        option("--max-lanes", number(self.max_lanes.map(u64::from)));
        option("--idle-exit", self.idle_exit.map(|time| format!("{}ms", time.as_millis()).into()));
        option("--log", self.log.as_ref().map(|path| absolute(path).into()));
        option("--log-filter", Some(self.log_filter.clone().into()));
        if self.no_poll {
            args.push("--no-poll".into());
        }
        StartCommand { program: start.program.clone(), args }
    }
}

/// The daemon works in another directory.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
