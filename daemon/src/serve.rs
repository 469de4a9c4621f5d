//! `shmquant serve`: a daemon as a process of its own, in the foreground or detached from who started it.
#![allow(unsafe_code, reason = "descriptors 0 to 2 are replaced and all others closed by number")]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{chdir, setsid};
use shmquant_protocol::failpoint::failpoint;
use shmquant_protocol::socket::SocketError;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use crate::daemon::Daemon;
use crate::error::DaemonError;

/// What is written to standard output, on a line of its own, once clients can connect.
pub const READY: &str = "ready";

/// What `shmquant serve` does: serves until a signal or idleness ends it.
///
/// Once the socket is bound it writes `ready` to standard output; detached, it does so also when another
/// daemon serves the address already, which is as good to who waits for the line, and standard output and
/// error go to the log file from then on.
pub fn serve_main(config: Config) -> Result<(), DaemonError> {
    if config.detach {
        leave_caller()?;
    }
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.map_err(DaemonError::errno("ignoring SIGPIPE"))?;
    raise_fd_limit();
    let mut signals =
        Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(DaemonError::io("listening to signals"))?;
    let log = open_log(&config)?;
    let log_copy = log.as_ref().and_then(|log| log.try_clone().ok());
    start_logging(&config.log_filter, log_copy);
    let detach = config.detach;
    let daemon = match Daemon::start(config) {
        Err(DaemonError::Socket(SocketError::AlreadyServed { path })) if detach => {
            tracing::info!("another daemon serves {}", path.display());
            return say_ready();
        }
        daemon => daemon?,
    };
    failpoint("daemon.serving");
    say_ready()?;
    if detach {
        redirect(log.as_ref())?;
    }
    let stopper = daemon.stopper();
    let handle = signals.handle();
    let waiter = std::thread::Builder::new().name("shmq-signals".to_owned()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            tracing::info!("signal {signal}: stopping");
            stopper.stop();
        }
    });
    let waiter = waiter.map_err(DaemonError::io("starting the signal thread"))?;
    daemon.run();
    handle.close();
    let _ = waiter.join();
    Ok(())
}

/// Leaves the session, the directory and the descriptors of whoever started this process.
fn leave_caller() -> Result<(), DaemonError> {
    // Refused only to a group leader, which is on its own already.
    let _ = setsid();
    chdir("/").map_err(DaemonError::errno("leaving the directory"))?;
    // SAFETY: called before anything of ours is opened. Descriptors from 3 on belong to whoever started this
    // process, nothing here uses them.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } != 0 {
        tracing::debug!("inherited descriptors stay open: {}", io::Error::last_os_error());
    }
    Ok(())
}

/// Every segment takes a descriptor.
fn raise_fd_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn open_log(config: &Config) -> Result<Option<File>, DaemonError> {
    let path = match (&config.log, config.detach) {
        (Some(path), _) => path.clone(),
        (None, false) => return Ok(None),
        (None, true) => match config.address.parent() {
            Some(dir) => dir.join("shmquant.log"),
            None => PathBuf::from("/dev/null"),
        },
    };
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        // The socket's directory may not be there yet. The listener checks who owns it.
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(dir).map_err(DaemonError::io("making the log's directory"))?;
    }
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options.open(&path).map(Some).map_err(DaemonError::io("opening the log"))
}

fn start_logging(filter: &str, log: Option<File>) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    // A host process may have set up logging already: then that is used.
    let _ = match log {
        Some(log) => builder.with_ansi(false).with_writer(std::sync::Mutex::new(log)).try_init(),
        None => builder.with_ansi(false).with_writer(std::sync::Mutex::new(Stderr)).try_init(),
    };
}

/// Standard error, as long as somebody reads it. Whoever logs serves clients too, and must not wait for a reader
/// of logs: a line for which a pipe has no room is lost.
#[derive(Debug)]
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        let mut polled = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            // What is ready takes this much without waiting; only daemon lines go here, one at a time.
            let (head, _) = line.split_at(line.len().min(libc::PIPE_BUF));
            stderr.lock().write_all(head)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn say_ready() -> Result<(), DaemonError> {
    let mut out = io::stdout();
    match writeln!(out, "{READY}").and_then(|()| out.flush()) {
        // Nobody waits for the line any more.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(DaemonError::io("saying that the daemon is ready")),
    }
}

/// Standard input becomes empty, standard output and error go to the log: whoever waits for the end of our
/// output sees it now.
fn redirect(log: Option<&File>) -> Result<(), DaemonError> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = null.map_err(DaemonError::io("opening /dev/null"))?;
    let out = log.unwrap_or(&null).as_raw_fd();
    for (from, to) in [(null.as_raw_fd(), 0), (out, 1), (out, 2)] {
        // SAFETY: both descriptors are open; what `to` was is replaced, and nothing here owns 0 to 2.
        if unsafe { libc::dup2(from, to) } < 0 {
            return Err(DaemonError::Io {
                what: "redirecting standard output",
                error: io::Error::last_os_error(),
            });
        }
    }
    Ok(())
}
