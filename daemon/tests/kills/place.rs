//! A daemon in a process and a directory of its own, and what the kernel and the daemon itself say that it has.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use shmquant_protocol::client::{Held, Options, Session};
use tempfile::TempDir;

use crate::layers::Layers;
use crate::native::{check, session_at};

/// How long a condition may take to come true before the test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The options of every daemon here.
pub(crate) const OPTIONS: &[&str] = &["--window", "4MiB", "--workers", "2", "--budget", "512MiB"];

/// The daemon's program.
pub(crate) fn program() -> &'static str {
    env!("CARGO_BIN_EXE_shmquant")
}

/// A directory for one daemon.
pub(crate) struct Place {
    dir: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("run/shmquant.sock")
    }

    /// `shmquant serve` with this place's address; its standard output is a pipe.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(program());
        command.arg("serve").args(OPTIONS);
        self.prepare(&mut command);
        command
    }

    pub(crate) fn prepare(&self, command: &mut Command) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("stderr")).unwrap();
        command.env("SHMQUANT_ADDRESS", self.socket()).env_remove("SHMQUANT_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    }
}

/// A daemon that this process started; killed if the test fails.
pub(crate) struct Served(pub(crate) Child);

impl Served {
    /// Starts it and waits until it can be connected to.
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // Behind the name of a test, if it is one that serves.
        assert!(lines.any(|line| line.unwrap().ends_with("ready")), "it ended before it was ready");
        Self(child)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Between two looks. (Yielding instead starves others for seconds on some kernels when many tests do it at a time.)
pub(crate) fn pause() {
    std::thread::park_timeout(Duration::from_millis(1));
}

/// Looks at something again and again until it is as it should be.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> Result<(), String>) {
    let started = Instant::now();
    while let Err(state) = holds() {
        assert!(started.elapsed() < PATIENCE, "{what}: {state}");
        pause();
    }
}

/// Everything that a daemon has of which a client's death must leave nothing.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Holdings {
    /// Counters of `STAT`.
    counters: BTreeMap<String, Value>,
    /// What its descriptors are, sorted.
    fds: Vec<String>,
    /// The segments it maps, sorted.
    mapped: Vec<String>,
    threads: String,
}

impl Holdings {
    pub(crate) fn of(session: &Session, pid: u32) -> Self {
        const COUNTERS: [&str; 12] = [
            "bytes",
            "bytes_by_use",
            "segments",
            "sessions",
            "lanes",
            "leases",
            "tickets",
            "datasets",
            "waiting",
            "jobs",
            "runs",
            "connections",
        ];
        let stat: Value = serde_json::from_str(&session.stat().unwrap()).unwrap();
        assert_eq!(stat["pid"], pid);
        let counters = COUNTERS.map(|name| {
            assert!(!stat[name].is_null(), "STAT does not say {name}: {stat}");
            (name.to_owned(), stat[name].clone())
        });
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        // Sockets are told by their inode, and one that was closed meanwhile has none. Segments have numbers, and another one
        // may be as good: what has been idle for a minute is given back and made anew.
        let kind = |target: PathBuf| {
            let text = target.to_string_lossy().into_owned();
            let kind = text.split_once(":[").map(|(kind, _)| kind.to_owned());
            kind.or_else(|| segment_kind(&text)).unwrap_or(text)
        };
        let mut fds: Vec<String> =
            fds.map(|fd| fs::read_link(fd.unwrap().path()).map_or_else(|e| e.to_string(), kind)).collect();
        fds.sort();
        let mut mapped: Vec<String> = maps(pid).lines().filter_map(segment_kind).collect();
        mapped.sort();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let threads = status.lines().find(|line| line.starts_with("Threads:")).unwrap().to_owned();
        Self { counters: counters.into(), fds, mapped, threads }
    }

    /// What it has at rest: the thread that has sent a reply is not through with it when the reply is here.
    pub(crate) fn at_rest(session: &Session, pid: u32, between: impl Fn()) -> Self {
        let mut last = Self::of(session, pid);
        wait_until("the daemon comes to rest", || {
            between();
            let now = Self::of(session, pid);
            let rests = now == last && now.counters["jobs"] == 0 && now.counters["runs"] == 0;
            last = now;
            if rests { Ok(()) } else { Err(format!("{last:?}")) }
        });
        last
    }

    /// Connections that the daemon serves.
    pub(crate) fn connections(&self) -> Option<u64> {
        self.counters["connections"].as_u64()
    }

    /// Waits until the daemon has this again, no less and no more.
    pub(crate) fn wait_for(&self, session: &Session, pid: u32, after: &str) {
        wait_until(&format!("{after}: something is left behind"), || {
            let now = Self::of(session, pid);
            if now == *self { Ok(()) } else { Err(format!("\nbefore {self:?}\nnow    {now:?}")) }
        });
    }
}

/// `shmquant.<instance>.<kind>` of a text with a segment's name in it.
fn segment_kind(text: &str) -> Option<String> {
    let name = &text[text.find("shmquant.")?..];
    let mut parts = name.split('.').take(3);
    Some(format!("{}.{}.{}", parts.next()?, parts.next()?, parts.next()?))
}

/// The memory map of a process.
pub(crate) fn maps(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/maps")).unwrap()
}

/// Memory of a process that is nobody else's, in KiB.
pub(crate) fn private_kib(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Somebody who holds a result while others die.
pub(crate) struct Witness {
    pub(crate) session: Session,
    pub(crate) held: Held,
    sum: u64,
    sizes: Vec<u64>,
}

impl Witness {
    pub(crate) fn new(session: Session) -> Self {
        let sizes = vec![100_000, 7, 2550];
        let held = session.quantize(&Layers::new(&sizes), &Options::default()).unwrap().held;
        let sum = sum(&held);
        let witness = Self { session, held, sum, sizes };
        witness.check();
        witness
    }

    /// The result is what it was, byte by byte.
    pub(crate) fn check(&self) {
        assert_eq!(sum(&self.held), self.sum);
        check(&self.held, &self.sizes);
    }

    /// Checks another hold on the same result.
    pub(crate) fn check_copy(&self, copy: &Held) {
        assert_eq!(sum(copy), self.sum);
    }
}

fn sum(held: &Held) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(held.as_slice());
    hasher.finish()
}

/// Somebody who goes on working beside those who die.
pub(crate) struct Neighbour(Session);

impl Neighbour {
    pub(crate) fn new(path: &Path) -> Self {
        Self(session_at(path, None))
    }

    pub(crate) fn work(&self) {
        for sizes in [&[5000, 1][..], &[255_000; 6]] {
            let held = self.0.quantize(&Layers::new(sizes), &Options::default()).unwrap().held;
            check(&held, sizes);
            drop(held);
            // So that it always is the same memory: with two requests at once there would be two pieces.
            let id = self.0.connect().unwrap().session;
            wait_until("a hold goes back", || {
                let all = self.0.list(shmquant_protocol::message::Listing::Sessions).unwrap();
                let mine = all.iter().map(|text| serde_json::from_str::<Value>(text).unwrap());
                let mine = mine.into_iter().find(|entry| entry["session"] == id).unwrap();
                if mine["results"] == 0 { Ok(()) } else { Err(mine.to_string()) }
            });
        }
    }
}
