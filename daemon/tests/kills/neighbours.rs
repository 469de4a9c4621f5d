//! A client is killed on whom a neighbour waits, or whose sockets somebody else holds: the neighbour gets what it had.

use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;

use serde_json::Value;
use shmquant_protocol::chunks::Chunk;
use shmquant_protocol::client::{Held, Options, Session, Source};
use shmquant_protocol::descriptor::Descriptor;

use crate::clients::role;
use crate::layers::Layers;
use crate::life::SMALL;
use crate::native::{check, session_at};
use crate::place::{Holdings, PATIENCE, Place, Served, Witness, program, wait_until};

/// The part a child plays.
const PART: &str = "SHMQUANT_TEST_PART";
/// The role of all of them.
pub(crate) const ROLE: &str = "neighbour";

/// Layers whose codes take so many MiB, nearly.
fn mib(n: u64) -> Vec<u64> {
    vec![255_000; (n << 20) as usize / 255_100]
}

/// Plays a part until somebody ends it.
pub(crate) fn play() {
    let path = std::env::var_os("SHMQUANT_ADDRESS").unwrap();
    let session = session_at(Path::new(&path), None);
    let part = std::env::var(PART).unwrap();
    let held: Option<Held> = match part.as_str() {
        "holds" => Some(quantize(&session, &Layers::new(&mib(32)))),
        "fills" => Some(quantize(&session, &Stopping(Layers::new(&mib(32))))),
        "queues" => {
            say("there");
            Some(quantize(&session, &Layers::new(&mib(44))))
        }
        "has a child" => Some(quantize(&session, &Layers::new(SMALL))),
        part => panic!("{part}"),
    };
    match part.as_str() {
        "has a child" => say(&format!("child {}", leave_sockets().id())),
        _ => say("there"),
    }
    loop {
        std::thread::park();
        assert!(held.is_some());
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{text}").and_then(|()| out.flush()).unwrap();
}

fn quantize(session: &Session, source: &dyn Source) -> Held {
    session.quantize(source, &Options::default()).unwrap().held
}

/// Never ends in the middle of its values, while its result is being filled.
struct Stopping(Layers);

impl Source for Stopping {
    fn descriptor(&self) -> &Descriptor {
        self.0.descriptor()
    }

    fn fill(&self, chunk: &Chunk, out: &mut [u8]) {
        self.0.fill(chunk, out);
        if chunk.item == 40 {
            say("there");
            loop {
                std::thread::park();
            }
        }
    }
}

/// A process that has this one's sockets and ends with its standard input.
#[allow(unsafe_code, reason = "descriptors are passed on by number between fork and exec")]
fn leave_sockets() -> Child {
    let sockets: Vec<i32> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("socket:")))
        .map(|path| path.file_name().unwrap().to_str().unwrap().parse().unwrap())
        .collect();
    assert!(sockets.len() >= 2, "a primary and a lane: {sockets:?}");
    let keep = move || {
        for fd in &sockets {
            // SAFETY: takes numbers and gives one; the descriptors are this process's own.
            unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) };
        }
        Ok(())
    };
    let mut command = Command::new("cat");
    command.stdin(Stdio::inherit()).stdout(Stdio::null());
    // SAFETY: `fcntl` may be called between fork and exec, and nothing else is.
    unsafe { command.pre_exec(keep) };
    command.spawn().unwrap()
}

/// A child in its part.
struct Player {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Player {
    fn start(path: &Path, part: &str) -> Self {
        let mut command = role(ROLE);
        command.env(PART, part).env("SHMQUANT_ADDRESS", path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Waits until it says something that begins so; the rest of it.
    fn await_line(&mut self, begin: &str) -> String {
        let line = self.lines.find_map(|line| line.unwrap().strip_prefix(begin).map(str::to_owned));
        line.unwrap_or_else(|| panic!("it ended before it said {begin:?}"))
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A daemon with room for 64 MiB in all.
fn narrow(place: &Place) -> Served {
    let mut command = Command::new(program());
    command.args(["serve", "--window", "4MiB", "--workers", "2", "--budget", "64MiB"]);
    place.prepare(&mut command);
    Served::start(command)
}

fn stat(session: &Session) -> Value {
    serde_json::from_str(&session.stat().unwrap()).unwrap()
}

fn await_waiting(observer: &Session, n: u64) {
    wait_until("somebody waits", || {
        let stat = stat(observer);
        if stat["waiting"] == n { Ok(()) } else { Err(stat.to_string()) }
    });
}

/// Asks for `mib(n)` with no deadline, on a thread of its own; the answer comes through the channel.
fn ask(path: &Path, n: u64) -> mpsc::Receiver<Held> {
    let (send, receive) = mpsc::channel();
    let session = session_at(path, None);
    std::thread::spawn(move || {
        let held = quantize(&session, &Layers::new(&mib(n)));
        send.send(held).unwrap();
    });
    receive
}

#[test]
fn what_only_a_killed_client_held_goes_to_who_waits_for_it() {
    let place = Place::new();
    let served = narrow(&place);
    let observer = session_at(&place.socket(), None);
    for part in ["holds", "fills"] {
        let mut client = Player::start(&place.socket(), part);
        client.await_line("there");
        let neighbour = ask(&place.socket(), 32);
        await_waiting(&observer, 1);
        assert!(neighbour.try_recv().is_err());
        client.kill();
        let held = neighbour.recv_timeout(PATIENCE).unwrap_or_else(|e| panic!("{part}: {e}"));
        check(&held, &mib(32));
        drop(held);
        wait_until("all is given back", || {
            let stat = stat(&observer);
            if stat["sessions"] == 1 && stat["bytes"] == 0 { Ok(()) } else { Err(stat.to_string()) }
        });
    }
    drop(served);
}

#[test]
fn who_is_killed_in_the_queue_holds_nobody_up() {
    let place = Place::new();
    let _served = narrow(&place);
    let observer = session_at(&place.socket(), None);
    let held = quantize(&observer, &Layers::new(&mib(16)));
    let mut first = Player::start(&place.socket(), "queues");
    first.await_line("there");
    await_waiting(&observer, 1);
    // There is room for this one, but not before its turn.
    let second = ask(&place.socket(), 20);
    await_waiting(&observer, 2);
    first.kill();
    let got = second.recv_timeout(PATIENCE).unwrap();
    check(&got, &mib(20));
    check(&held, &mib(16));
}

#[test]
fn a_session_ends_with_its_process_though_another_one_has_its_sockets() {
    let place = Place::new();
    let served = Served::start(place.command());
    let witness = Witness::new(session_at(&place.socket(), None));
    let base = Holdings::at_rest(&witness.session, served.pid(), || {});
    let mut client = Player::start(&place.socket(), "has a child");
    let child = client.await_line("child ");
    let sockets = || {
        let fds = fs::read_dir(format!("/proc/{child}/fd")).unwrap();
        let links = fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        links.filter(|to| to.to_string_lossy().starts_with("socket:")).count()
    };
    assert!(sockets() >= 2);
    assert_eq!(stat(&witness.session)["sessions"], 2);
    // Kept open here, so that the child of the child goes on.
    let stdin = client.child.stdin.take();
    client.kill();
    base.wait_for(&witness.session, served.pid(), "its sockets are open elsewhere");
    assert!(sockets() >= 2, "all the time");
    witness.check();
    drop(stdin);
}
