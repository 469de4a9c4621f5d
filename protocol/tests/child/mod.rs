//! Runs a part of a test in a process of its own: the test binary itself, told its role by the environment.
#![allow(dead_code, reason = "every test binary has its own copy and uses a part of it")]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

const ROLE: &str = "SHMQUANT_TEST_ROLE";

/// The role of this process, `None` in the process that runs the tests.
pub(crate) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// A command that runs the binary's test `child`, which looks up its [`role`] and plays it.
pub(crate) fn command(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]).env(ROLE, role);
    command
}

/// Starts a child whose standard input is the given descriptor.
pub(crate) fn spawn(role: &str, stdin: OwnedFd) -> Child {
    start(command(role).stdin(Stdio::from(stdin)))
}

fn start(command: &mut Command) -> Child {
    let _alone = FORKS.write().unwrap_or_else(PoisonError::into_inner);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

static FORKS: RwLock<()> = RwLock::new(());

/// While this is held, no other test starts a child. Between fork and exec a child has every descriptor of this process: one
/// that is closed here is not closed, nor is its lock free, for as long as that takes.
pub(crate) fn no_forks() -> RwLockReadGuard<'static, ()> {
    FORKS.read().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a child and fails with its output unless it played its role to the end.
pub(crate) fn expect_success(role: &str, child: Child) {
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let text = format!("{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{role}: {}\n{text}", output.status);
    assert!(said.contains(&done(role)), "{role} did nothing\n{text}");
}

/// Plays a role to its end in a child and waits for it.
pub(crate) fn play(role: &str) {
    expect_success(role, start(command(role).stdin(Stdio::null())));
}

/// Plays a role where /dev/shm has only so much room (`7m`): in a mount namespace of its own, which needs root or user
/// namespaces; without these it is skipped, and says so.
pub(crate) fn play_beside_small_dev_shm(role: &str, size: &str) {
    let small = |run: &mut Command| {
        let (program, args) =
            (run.get_program().to_owned(), run.get_args().map(ToOwned::to_owned).collect::<Vec<_>>());
        let mut command = Command::new("unshare");
        command.args(["--mount", "--map-root-user", "sh", "-c"]);
        command.arg(format!("mount -t tmpfs -o size={size} tmpfs /dev/shm && exec \"$0\" \"$@\""));
        command.arg(program).args(args).stdin(Stdio::null());
        command.envs(run.get_envs().filter_map(|(key, value)| Some((key, value?))));
        command
    };
    match small(&mut Command::new("true")).output() {
        Ok(output) if output.status.success() => {
            expect_success(role, start(&mut small(&mut command(role))));
        }
        refused => println!("skipped: a small /dev/shm cannot be mounted here ({refused:?})"),
    }
}

/// What a child prints when it is through, so that one that did not play its role cannot pass.
pub(crate) fn done(role: &str) -> String {
    format!("role {role} done")
}

/// Runs something while this process can open no more than `free` descriptors, and tells it the limit.
/// For children only: the limit is the whole process's.
pub(crate) fn with_free_fds<T>(free: usize, run: impl FnOnce(u64) -> T) -> T {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    // The lowest free number is always taken, so that after `free` more opens this one would be next.
    // (There may be others in use above, inherited from whoever started the tests.)
    let taken: Vec<File> = (0..=free).map(|_| File::open("/dev/null").unwrap()).collect();
    let limit = u64::try_from(taken.last().unwrap().as_raw_fd()).unwrap();
    drop(taken);
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
    let result = run(limit);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    result
}
