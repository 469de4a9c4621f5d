//! Auto-start: one daemon, however many processes want it at the same moment.

use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::address::ADDRESS_VARIABLE;

/// What is appended to the socket's path for the file that the starting process locks. (The daemon itself locks another one.)
const START_SUFFIX: &str = ".start";
/// The line by which a daemon says that it can be connected to.
const READY: &str = "ready";
/// Most of a failing daemon's output that is kept for the error.
const MAX_OUTPUT: usize = 4 << 10;

/// Children that were started and have not been reaped: a daemon that ends before us would stay a zombie.
static STARTED: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// How a daemon is started when none is running.
///
/// The command serves the address in `SHMQUANT_ADDRESS` and prints the line `ready` to its standard output when it can be
/// connected to. It detaches itself (setsid, working directory, descriptors); until then its output is the client's to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartCommand {
    /// The program.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
}

/// The right to start the daemon of an address, held by one process at a time.
#[derive(Debug)]
pub(super) struct Turn {
    _lock: Flock<File>,
}

impl Turn {
    /// Takes the turn if nobody has it.
    pub(super) fn take(socket: &Path) -> Result<Option<Self>, String> {
        let mut path = socket.as_os_str().to_owned();
        path.push(START_SUFFIX);
        let path = PathBuf::from(path);
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(|e| format!("making the directory {}: {e}", dir.display()))?;
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let file = options.open(&path).map_err(|e| format!("opening {}: {e}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Self { _lock: lock })),
            Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => Ok(None),
            Err((_, errno)) => Err(format!("locking {}: {}", path.display(), errno.desc())),
        }
    }
}

/// Starts the daemon and waits until it is ready. The text of an error says what the daemon said.
pub(super) fn start(command: &StartCommand, socket: &Path, deadline: Instant) -> Result<(), String> {
    let shown = command.program.display();
    let (reader, writer) = std::io::pipe().map_err(|e| format!("making a pipe: {e}"))?;
    // What it has to say before it is ready ends up in the error; afterwards it has a log file of its own.
    let errors = writer.try_clone().map_err(|e| format!("making a pipe: {e}"))?;
    let mut process = Command::new(&command.program);
    process.args(&command.args).env(ADDRESS_VARIABLE, socket);
    process.stdin(Stdio::null()).stdout(writer).stderr(errors);
    let child = process.spawn().map_err(|e| format!("starting {shown}: {e}"))?;
    // The ends for writing went into the child; `process` holds copies.
    drop(process);
    let heard = listen(reader.into(), deadline);
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    started.push(child);
    if let (Heard::Nothing(_), Some(child)) = (&heard, started.last_mut()) {
        // It would stand in the way of the next attempt. Refused only if it has just ended.
        let _ = child.kill();
    }
    let ended = |started: &mut Vec<Child>| match started.last_mut().map(Child::try_wait) {
        Some(Ok(Some(status))) => format!(" ({status})"),
        _ => String::new(),
    };
    match heard {
        Heard::Ready => Ok(()),
        Heard::End(text) => {
            Err(format!("{shown} ended before it was ready{}: {}", ended(&mut started), text.trim()))
        }
        Heard::Nothing(text) => Err(format!("{shown} was not ready in time: {}", text.trim())),
    }
}

/// Reaps daemons that were started from here and have ended.
pub(super) fn reap() {
    // Whoever holds it reaps; and in a forked child the lock may never come back.
    if let Ok(mut started) = STARTED.try_lock() {
        started.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }
}

enum Heard {
    Ready,
    End(String),
    Nothing(String),
}

fn listen(pipe: OwnedFd, deadline: Instant) -> Heard {
    let mut pipe = File::from(pipe);
    let mut text = Vec::new();
    let mut buffer = [0u8; 512];
    let said = |text: &[u8]| String::from_utf8_lossy(text).into_owned();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Heard::Nothing(said(&text));
        }
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => {}
            Err(_) => return Heard::End(said(&text)),
        }
        match pipe.read(&mut buffer) {
            Ok(0) => return Heard::End(said(&text)),
            Ok(n) => text.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return Heard::End(said(&text)),
        }
        let mut lines = text.split(|b| *b == b'\n');
        // What follows the last line break is not a line yet.
        lines.next_back();
        if lines.any(|line| line.trim_ascii() == READY.as_bytes()) {
            return Heard::Ready;
        }
        if text.len() > MAX_OUTPUT {
            text.drain(..text.len() - MAX_OUTPUT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> StartCommand {
        StartCommand { program: "/bin/sh".into(), args: vec!["-c".into(), script.into()] }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn ready_is_a_whole_line_and_the_process_knows_its_address() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a.sock");
        let told = dir.path().join("told");
        let script = format!("echo readying; echo \"$SHMQUANT_ADDRESS\" > {}; echo ready", told.display());
        start(&shell(&script), &socket, soon()).unwrap();
        assert_eq!(std::fs::read_to_string(told).unwrap().trim(), socket.to_str().unwrap());
    }

    #[test]
    fn what_a_failing_daemon_says_is_in_the_error() {
        let error = start(&shell("echo no memory >&2; exit 3"), Path::new("/x"), soon()).unwrap_err();
        assert!(error.contains("no memory") && error.contains("before it was ready"), "{error}");
    }

    #[test]
    fn a_daemon_that_never_gets_ready_is_not_waited_for_beyond_the_deadline() {
        // Where a shell takes longer than that to say a word, it gets longer.
        for milliseconds in [50, 500, 5_000, 50_000] {
            let deadline = Instant::now() + Duration::from_millis(milliseconds);
            let error =
                start(&shell("echo hello; exec tail -f /dev/null"), Path::new("/x"), deadline).unwrap_err();
            assert!(error.contains("not ready in time"), "{error}");
            if error.contains("hello") {
                return;
            }
        }
        panic!("what it said is not in the error");
    }

    #[test]
    fn a_program_that_does_not_exist_is_an_error() {
        let command = StartCommand { program: "/nonexistent/shmquant".into(), args: vec![] };
        assert!(start(&command, Path::new("/x"), soon()).unwrap_err().contains("/nonexistent/shmquant"));
    }

    #[test]
    fn one_process_has_the_turn() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("deep/er/a.sock");
        let first = Turn::take(&socket).unwrap();
        assert!(first.is_some());
        assert!(Turn::take(&socket).unwrap().is_none());
        drop(first);
        // A process that another test has just forked has a copy of the descriptor, and with it the lock, until it execs.
        let until = soon();
        while Turn::take(&socket).unwrap().is_none() {
            assert!(Instant::now() < until, "the turn is never free again");
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}
