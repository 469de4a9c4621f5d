//! `shmquant stop`: ends the daemon, unless it holds what nobody else does.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmquant_protocol::socket::{Connection, SocketError};

use super::error::CliError;
use super::link::Link;
use super::units;
use crate::error::DaemonError;

/// Stop the daemon
///
/// Datasets live in its memory and go with it, so it is refused while there are any, unless --force is given. What processes have mapped stays readable to them.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Stop it even though datasets are lost by that
    #[arg(long)]
    force: bool,

    /// How long to wait for its end
    #[arg(long, default_value = "10s", value_parser = units::parse_duration, value_name = "TIME")]
    timeout: Duration,
}

pub(super) fn run(args: &Args, link: &Link) -> Result<(), CliError> {
    let connection = match Connection::connect(link.path()) {
        Ok(connection) => connection,
        // What was asked for is already the case. A dead daemon's socket file counts as nobody.
        Err(SocketError::NotListening { path }) => {
            eprintln!("no daemon is running at {}", path.display());
            return Ok(());
        }
        Err(error) => return Err(DaemonError::Socket(error).into()),
    };
    let pid = connection.require_same_user().map_err(DaemonError::Socket)?.pid;
    if pid <= 1 {
        return Err(CliError::told(
            "the daemon is of another pid namespace, so it cannot be signalled from here",
            "stop it from inside its own container",
        ));
    }
    let process = connection.peer_pidfd().map_err(DaemonError::Socket)?;
    if !args.force {
        let session = link.running();
        let datasets = super::status::datasets(&session.stat()?)?;
        session.close();
        if datasets > 0 {
            return Err(CliError::told(
                format!("the daemon (pid {pid}) holds {}", units::plural(datasets, "dataset")),
                "`shmquant ls` shows what would be lost; `shmquant stop --force` stops it all the same",
            ));
        }
    }
    drop(connection);
    match kill(Pid::from_raw(pid), Signal::SIGTERM) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => {
            let path = format!("/proc/{pid}");
            return Err(CliError::io(Path::new(&path), "cannot signal the daemon")(errno.into()));
        }
    }
    let ended = wait(process.as_fd(), Instant::now() + args.timeout)
        .map_err(|errno| CliError::io(link.path(), "cannot wait for the daemon")(errno.into()))?;
    if !ended {
        return Err(CliError::told(
            format!("the daemon (pid {pid}) has not ended after {} s", args.timeout.as_secs_f64()),
            format!("look into its log; `kill -9 {pid}` loses nothing but what is in its memory"),
        ));
    }
    eprintln!("stopped the daemon (pid {pid})");
    Ok(())
}

/// Whether the process of `pidfd` has ended by the deadline.
fn wait(pidfd: impl AsFd, deadline: Instant) -> Result<bool, Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno),
        }
    }
}
