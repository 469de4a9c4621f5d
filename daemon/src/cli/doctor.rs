//! `shmquant doctor`: whether this host and this process give what a daemon needs, and what to do where not.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;
use nix::unistd::geteuid;
use serde_json::json;
use shmquant_protocol::segment::{Backing, Kind, Mapping, Segment, SegmentName};
use shmquant_protocol::socket::{Connection, LOCK_SUFFIX};

use super::error::CliError;
use super::link::Link;
use super::text::clean;
use super::units;
use crate::config::Config;
use crate::headroom::{Headroom, host_total};

/// Below this there is hardly room for one window and one result.
const LEAST: u64 = 32 << 20;
/// From this on nothing is said.
const ENOUGH: u64 = 256 << 20;

/// Check whether this host gives what a daemon needs
///
/// Looks and tries, changes nothing, needs no daemon. Limits are those of the shell that asks; a daemon that was
/// started elsewhere has its own. Ends with 1 if something is wrong that a daemon cannot work with.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Ok,
    Warn,
    Fail,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// What one look found.
#[derive(Debug)]
struct Check {
    name: &'static str,
    state: State,
    found: String,
    /// What to do; empty if there is nothing to do.
    todo: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: State::Ok, found: found.into(), todo: String::new() }
    }

    fn warn(name: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { name, state: State::Warn, found: found.into(), todo: todo.into() }
    }

    fn fail(name: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { name, state: State::Fail, found: found.into(), todo: todo.into() }
    }
}

pub(super) fn run(args: &Args, link: &Link, out: &mut dyn Write) -> Result<(), CliError> {
    let mut checks = vec![kernel()];
    checks.extend(segments());
    checks.extend([pidfd(), descriptors(), file_size(), mappings(), address_space()]);
    checks.extend([shm_size(), shm_names(), directory(link.path()), socket(link.path())]);
    checks.extend([memory(), cgroup(), remove_ipc(), pid_namespace()]);
    let worst = checks.iter().map(|check| check.state).max().unwrap_or(State::Ok);
    if args.json {
        let all: Vec<_> = checks
            .iter()
            .map(|c| json!({"check": c.name, "state": c.state.word(), "found": c.found, "do": c.todo}))
            .collect();
        writeln!(out, "{:#}", json!({ "state": worst.word(), "checks": all })).map_err(CliError::Stdout)?;
    } else {
        for check in &checks {
            writeln!(out, "{:<4}  {:<16} {}", check.state.word(), check.name, clean(&check.found))
                .map_err(CliError::Stdout)?;
            if !check.todo.is_empty() {
                writeln!(out, "{:24}{}", "", clean(&check.todo)).map_err(CliError::Stdout)?;
            }
        }
    }
    let failed: Vec<_> = checks.iter().filter(|c| c.state == State::Fail).map(|c| c.name).collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(CliError::told(
        format!("a daemon cannot work here: {}", failed.join(", ")),
        "`shmquant doctor` says at each of them what to do",
    ))
}

fn kernel() -> Check {
    const NAME: &str = "kernel";
    let Ok(system) = uname() else {
        return Check::fail(NAME, "uname is refused", "allow it in the sandbox");
    };
    let release = system.release().to_string_lossy().into_owned();
    let found = format!("{} {release}", system.sysname().to_string_lossy());
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (5, 14) {
        Check::ok(NAME, found)
    } else {
        Check::fail(NAME, found, "Linux 5.14 or later is needed (MADV_POPULATE_WRITE, F_SEAL_FUTURE_WRITE)")
    }
}

/// Makes a result segment as a daemon does, and tries what no client may be able to do with it.
fn segments() -> Vec<Check> {
    let name = SegmentName { instance: u64::from(std::process::id()), kind: Kind::Result, id: 1 };
    let segment = match Segment::create(Backing::Memfd, &name, 64 << 10) {
        Ok(segment) => segment,
        Err(error) => {
            let todo = "a sandbox or an old kernel refuses memfd_create, fallocate, MADV_POPULATE_WRITE or seals: \
                        allow them, or use `serve --backing posix`";
            return vec![Check::fail("segments", error.to_string(), todo)];
        }
    };
    let mut checks = vec![Check::ok("segments", "memfd is made, reserved, populated and sealed")];
    let size = segment.len() as u64;
    let writable = Mapping::read_write(segment.fd(), size, Backing::Memfd).is_ok()
        || File::options().write(true).open(segment.path()).and_then(|mut file| file.write_all(b"x")).is_ok()
        || nix::unistd::ftruncate(segment.fd(), 0).is_ok();
    let readable = Mapping::read_only(segment.fd(), size, Backing::Memfd).is_ok();
    checks.push(if writable {
        Check::fail(
            "seals",
            "a sealed result can still be written",
            "the kernel or a sandbox takes F_SEAL_FUTURE_WRITE and does not keep it: run on another one",
        )
    } else if !readable {
        Check::fail("seals", "a sealed result cannot be mapped for reading", "allow shared mappings")
    } else {
        Check::ok("seals", "a sealed result can be read, and neither written, mapped writable nor truncated")
    });
    let exec = fcntl(segment.fd(), FcntlArg::F_GET_SEALS).is_ok_and(|seals| seals & libc::F_SEAL_EXEC != 0);
    checks.push(if exec {
        Check::ok("noexec", "memfds are sealed against execution")
    } else {
        Check::warn(
            "noexec",
            "MFD_NOEXEC_SEAL is not known here",
            "nothing depends on it; it comes with Linux 6.3",
        )
    });
    checks
}

fn pidfd() -> Check {
    const NAME: &str = "pidfd";
    let watched = Connection::pair().and_then(|(one, _other)| one.peer_pidfd());
    match watched {
        Ok(_) => Check::ok(NAME, "the death of a client is noticed by its pidfd"),
        Err(error) => Check::fail(
            NAME,
            error.to_string(),
            "allow pidfd_open (Linux 5.3 or later), e.g. in seccomp's profile",
        ),
    }
}

/// A soft limit; `None` without one.
fn limit(resource: Resource) -> Option<u64> {
    getrlimit(resource).ok().map(|(soft, _)| soft).filter(|soft| *soft != RLIM_INFINITY)
}

fn descriptors() -> Check {
    const NAME: &str = "descriptors";
    // One for each segment, one for each connection and each client's pidfd.
    match limit(Resource::RLIMIT_NOFILE) {
        None => Check::ok(NAME, "no limit"),
        Some(n) if n >= 1024 => Check::ok(NAME, format!("RLIMIT_NOFILE is {}", units::count(n))),
        Some(n) => {
            let found = format!("RLIMIT_NOFILE is {}", units::count(n));
            let todo = "each live result, connection and client takes one in the daemon: `ulimit -n 4096`";
            if n < 64 { Check::fail(NAME, found, todo) } else { Check::warn(NAME, found, todo) }
        }
    }
}

fn file_size() -> Check {
    const NAME: &str = "file size";
    match limit(Resource::RLIMIT_FSIZE) {
        None => Check::ok(NAME, "no limit"),
        Some(n) => {
            let found = format!("RLIMIT_FSIZE is {}: no segment can be larger", units::bytes(n));
            let todo = "`ulimit -f unlimited`";
            if n < Config::default().window {
                Check::fail(NAME, found, todo)
            } else {
                Check::warn(NAME, found, todo)
            }
        }
    }
}

fn mappings() -> Check {
    const NAME: &str = "mappings";
    match fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|n| n.trim().parse::<u64>().ok()) {
        None => Check::warn(NAME, "vm.max_map_count cannot be read", "mount /proc"),
        Some(n) if n >= 65_530 => Check::ok(NAME, format!("vm.max_map_count is {}", units::count(n))),
        Some(n) => Check::warn(
            NAME,
            format!("vm.max_map_count is {}", units::count(n)),
            "each live result takes one in the daemon: `sysctl vm.max_map_count=65530`",
        ),
    }
}

fn address_space() -> Check {
    const NAME: &str = "address space";
    match limit(Resource::RLIMIT_AS) {
        None => Check::ok(NAME, "no limit"),
        Some(n) => Check::warn(
            NAME,
            format!("RLIMIT_AS is {}", units::bytes(n)),
            "all segments of a process have to fit beside everything else: `ulimit -v unlimited`",
        ),
    }
}

fn shm_size() -> Check {
    const NAME: &str = "/dev/shm";
    let Ok(stat) = statvfs("/dev/shm") else {
        return Check::warn(NAME, "is not there", "only `serve --backing posix` needs it");
    };
    let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
    let (size, free) = (bytes(stat.blocks()), bytes(stat.blocks_available()));
    let found = format!("{} free of {}", units::bytes(free), units::bytes(size));
    if free >= ENOUGH {
        Check::ok(NAME, found)
    } else {
        let todo = "it limits `serve --backing posix` only (docker: --shm-size); the default does not use it";
        Check::warn(NAME, found, todo)
    }
}

/// Names that dead daemons with POSIX segments left. The next daemon with that backing sweeps them.
fn shm_names() -> Check {
    const NAME: &str = "names in /dev/shm";
    let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    let ours = geteuid().as_raw();
    let own: Vec<(String, u64)> = entries
        .filter_map(|entry| {
            let meta = entry.metadata().ok().filter(|meta| meta.uid() == ours)?;
            Some((entry.file_name().into_string().ok()?, meta.blocks() * 512))
        })
        .filter(|(name, _)| name.starts_with("shmquant."))
        .collect();
    let locks: Vec<&str> = own.iter().filter_map(|(name, _)| name.strip_suffix(".lock")).collect();
    let dead: Vec<&str> = locks
        .iter()
        .copied()
        .filter(|stem| is_unlocked(&PathBuf::from(format!("/dev/shm/{stem}.lock"))))
        .collect();
    let (mut stale, mut orphans) = ((0, 0), (0, 0));
    for (name, bytes) in own.iter().filter(|(name, _)| name.parse::<SegmentName>().is_ok()) {
        let owner = |stem: &&str| name.strip_prefix(*stem).is_some_and(|rest| rest.starts_with('.'));
        let count = match (dead.iter().any(owner), locks.iter().any(owner)) {
            (true, _) => &mut stale,
            (false, false) => &mut orphans,
            (false, true) => continue,
        };
        *count = (count.0 + 1, count.1 + bytes);
    }
    if orphans.0 > 0 {
        let found = format!("{} without an owner's file, {}", orphans.0, units::bytes(orphans.1));
        return Check::warn(
            NAME,
            found,
            "nothing proves that they are nobody's: remove /dev/shm/shmquant.* by hand",
        );
    }
    if dead.is_empty() {
        return Check::ok(NAME, format!("{} living owners, nothing left behind", locks.len()));
    }
    let (segments, bytes) = stale;
    let found = format!("{} dead daemons left {segments} segments, {}", dead.len(), units::bytes(bytes));
    Check::warn(NAME, found, "the next `shmquant serve --backing posix` removes them")
}

/// Whether nobody holds the lock on a file; a file that cannot be asked counts as held.
fn is_unlocked(path: &Path) -> bool {
    let Ok(file) = File::options().read(true).write(true).open(path) else { return false };
    // A shared lock: two doctors at once do not take one another for a daemon. Dropped at once.
    Flock::lock(file, FlockArg::LockSharedNonblock).is_ok()
}

fn directory(socket: &Path) -> Check {
    const NAME: &str = "directory";
    let dir = socket.parent().unwrap_or(Path::new("."));
    let shown = dir.display();
    let ours = geteuid().as_raw();
    let todo = "name another socket with --address or SHMQUANT_ADDRESS, or make the directory yours alone: `chmod 700`";
    match fs::metadata(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Check::ok(NAME, format!("{shown} will be made"))
        }
        Err(error) => Check::fail(NAME, format!("{shown}: {error}"), todo),
        Ok(meta) if !meta.is_dir() => Check::fail(NAME, format!("{shown} is no directory"), todo),
        Ok(meta) if meta.uid() != ours => {
            Check::fail(NAME, format!("{shown} belongs to user {}, not {ours}", meta.uid()), todo)
        }
        Ok(meta) if meta.mode() & 0o077 != 0 => {
            Check::fail(NAME, format!("{shown} has mode {:o}", meta.mode() & 0o7777), todo)
        }
        Ok(_) => Check::ok(NAME, format!("{shown} is this user's alone")),
    }
}

fn socket(path: &Path) -> Check {
    const NAME: &str = "daemon";
    let shown = path.display();
    let mut lock = path.as_os_str().to_owned();
    lock.push(LOCK_SUFFIX);
    let unlocked = is_unlocked(Path::new(&lock));
    match fs::symlink_metadata(path) {
        Err(_) if Path::new(&lock).exists() && !unlocked => Check::warn(
            NAME,
            format!("{shown} is gone, and its daemon lives"),
            "somebody removed the socket: end that daemon by its process id, the next use starts another",
        ),
        Err(_) => Check::ok(NAME, "none runs; the next use starts one"),
        Ok(meta) if !meta.file_type().is_socket() => Check::fail(
            NAME,
            format!("{shown} is no socket"),
            "name another path with --address or SHMQUANT_ADDRESS, or remove that file",
        ),
        Ok(_) => match Connection::connect(path) {
            Ok(connection) => match connection.peer_cred() {
                // The kernel has no number for a process of a namespace that this one does not see.
                Ok(peer) if peer.pid == 0 => Check::fail(
                    NAME,
                    format!("at {shown} runs in another PID namespace"),
                    "share the PID namespace: a daemon has to watch its clients' processes",
                ),
                Ok(peer) => Check::ok(NAME, format!("process {} serves {shown}", peer.pid)),
                Err(error) => Check::fail(NAME, error.to_string(), ""),
            },
            Err(error) if unlocked || !Path::new(&lock).exists() => Check::warn(
                NAME,
                format!("{shown} is left of a dead daemon ({error})"),
                "nothing: the next daemon takes its place",
            ),
            Err(error) => Check::fail(
                NAME,
                format!("at {shown} does not take connections: {error}"),
                "look at shmquant.log beside the socket; end it by its process id if it hangs",
            ),
        },
    }
}

fn memory() -> Check {
    const NAME: &str = "memory";
    let (free, all) = (Headroom::read(Backing::Memfd).host, host_total());
    let found = format!("{} available of {}", units::bytes(free), units::bytes(all));
    // A quarter of what is available stays the host's.
    match free / 4 * 3 {
        room if room < LEAST => Check::fail(NAME, found, "free memory: not even a window and a result fit"),
        room if room < ENOUGH => Check::warn(NAME, found, "results beyond a few hundred MiB will be refused"),
        _ => Check::ok(NAME, found),
    }
}

fn cgroup() -> Check {
    const NAME: &str = "cgroup";
    let todo =
        "pages of results are charged to the daemon's group: raise its memory limit (docker: --memory)";
    match Headroom::read(Backing::Memfd).cgroup {
        None => Check::ok(NAME, "no memory limit"),
        Some(room) => {
            let found = format!("{} more until the memory limit", units::bytes(room));
            match room {
                room if room < LEAST => Check::fail(NAME, found, todo),
                room if room < ENOUGH => Check::warn(NAME, found, todo),
                _ => Check::ok(NAME, found),
            }
        }
    }
}

/// systemd-logind removes the shared memory files of a user who logs out, unless it is told not to.
fn remove_ipc() -> Check {
    const NAME: &str = "RemoveIPC";
    if !Path::new("/run/systemd/system").exists() {
        return Check::ok(NAME, "no systemd here");
    }
    // Users below this number are systems' own and are spared (systemd's SYSTEM_UID_MAX).
    if geteuid().as_raw() < 1000 {
        return Check::ok(NAME, "does not concern users of the system");
    }
    let mut files =
        vec![PathBuf::from("/usr/lib/systemd/logind.conf"), PathBuf::from("/etc/systemd/logind.conf")];
    for dir in ["/usr/lib/systemd/logind.conf.d", "/etc/systemd/logind.conf.d", "/run/systemd/logind.conf.d"]
    {
        let mut found: Vec<_> =
            fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        found.sort();
        files.extend(found);
    }
    let mut value = "yes".to_owned();
    for text in files.iter().filter_map(|file| fs::read_to_string(file).ok()) {
        if let Some(last) = text.lines().rev().find_map(|line| line.trim().strip_prefix("RemoveIPC=")) {
            last.trim().clone_into(&mut value);
        }
    }
    if matches!(value.to_ascii_lowercase().as_str(), "no" | "off" | "false" | "0" | "n" | "f") {
        return Check::ok(NAME, "is off");
    }
    Check::warn(
        NAME,
        "is on: at the user's last logout the names of `serve --backing posix` go",
        "RemoveIPC=no in logind.conf, or `loginctl enable-linger`; the default backing has no names",
    )
}

/// A daemon watches processes by their numbers: it needs to see them.
fn pid_namespace() -> Check {
    const NAME: &str = "PID namespace";
    let status = match fs::read_to_string("/proc/self/status") {
        Ok(status) => status,
        Err(error) => return Check::fail(NAME, format!("/proc/self/status: {error}"), "mount /proc"),
    };
    let namespace = fs::read_link("/proc/self/ns/pid")
        .map_or_else(|error| error.to_string(), |link| link.to_string_lossy().into_owned());
    let seen = status.lines().find_map(|line| line.strip_prefix("Pid:")).map(str::trim);
    if seen != Some(std::process::id().to_string().as_str()) {
        return Check::fail(
            NAME,
            format!("{namespace}, and /proc is another's"),
            "mount /proc of this PID namespace (`unshare --mount-proc`)",
        );
    }
    Check::ok(NAME, format!("{namespace}; daemon and clients have to share it"))
}
