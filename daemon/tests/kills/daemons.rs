//! The daemon is killed at every step: clients get an error and the next daemon, readers keep their bytes.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError, mpsc};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use shmquant_protocol::client::{ClientError, Held, Options, Session, StartCommand};
use shmquant_protocol::failpoint;

use crate::clients::{USUAL_KILLS, kills};
use crate::layers::Layers;
use crate::life::{LARGE, live};
use crate::native::{check, session_at};
use crate::place::{OPTIONS, PATIENCE, Place, Served, Witness, program, wait_until};

/// Rounds of life in which a daemon has to come by any of its failpoints.
const ROUNDS: u64 = 10;

/// Points that a daemon only comes by when it starts, and by some only with POSIX segments.
const STARTING: &[&str] = &["daemon.bound", "daemon.assembled", "daemon.serving"];
const STARTING_POSIX: &[&str] = &["daemon.sweeping", "daemon.announced"];
/// Points that a daemon comes by when it is told to stop.
const STOPPING: &[&str] = &["daemon.stopping", "daemon.closed", "daemon.emptied"];

/// Starts daemons that can be armed while they run, by the file `arm`.
fn start_command(place: &Place, backing: &str) -> StartCommand {
    let mut args: Vec<OsString> =
        vec![format!("{}=@{}", failpoint::VARIABLE, place.path("arm").display()).into()];
    // Should the test fail, they end by themselves.
    let words = [program(), "serve", "--detached", "--idle-exit", "20s", "--backing", backing];
    args.extend(words.iter().chain(OPTIONS).map(Into::into));
    StartCommand { program: "/usr/bin/env".into(), args }
}

fn stat(session: &Session) -> Value {
    serde_json::from_str(&session.stat().unwrap()).unwrap()
}

fn pid_of(session: &Session) -> i32 {
    stat(session)["pid"].as_i64().unwrap().try_into().unwrap()
}

/// Kills the daemon of the moment if the test fails: with datasets it would stay for ever.
struct Current(Cell<i32>);

impl Current {
    fn is(&self, own: &Session) -> i32 {
        self.0.set(pid_of(own));
        self.0.get()
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let pid = self.0.get();
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if std::thread::panicking() && line.contains("--detached") {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn wait_for_end(pid: i32) {
    wait_until("the daemon ends", || if is_alive(pid) { Err(format!("{pid} is alive")) } else { Ok(()) });
}

/// Names in `/dev/shm` of one daemon.
fn left_in_shm(instance: u64) -> Vec<String> {
    let entries = fs::read_dir("/dev/shm").unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    entries.filter(|name| name.contains(&format!("{instance:016x}"))).collect()
}

/// Those who wait here for a sweep, and those who kill daemons in the middle of theirs: not at the same time, for a daemon
/// that finds another one sweeping leaves it to that one.
static SWEEPING: Mutex<()> = Mutex::new(());

/// The next daemon has started, so what a dead one left by name is gone, or a daemon of another test is just about to remove it.
fn wait_until_swept(instance: u64, after: &str) {
    wait_until(&format!("{after}: not swept"), || {
        let left = left_in_shm(instance);
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
}

/// From now on the daemon dies at a point: `name` or `name:3`.
fn arm(place: &Place, point: &str) {
    // Renamed into its place, so that no half of it can be read.
    fs::write(place.path("arming"), point).unwrap();
    fs::rename(place.path("arming"), place.path("arm")).unwrap();
}

/// A daemon has died at the point and at no other.
fn disarm(hit: &Path, point: &str) {
    assert_eq!(fs::read_to_string(hit).unwrap(), point);
    fs::remove_file(hit).unwrap();
}

fn stop(own: &Session) {
    let pid = pid_of(own);
    own.close();
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    wait_for_end(pid);
}

/// The next call may still meet the connection to the dead daemon; the one after it does not.
fn reach_the_next(own: &Session, point: &str) {
    own.ping().or_else(|_| own.ping()).unwrap_or_else(|e| panic!("{point}: {e}"));
}

/// Lives and lives until the daemon dies; its error, or `None` if it came by no failpoint.
fn live_until_it_dies(path: &Path, hit: &Path) -> Option<ClientError> {
    for round in 0..ROUNDS {
        let session = session_at(path, None);
        let ended = live(&session, round, None, &|_| {});
        // Ending is a part of life, and has failpoints of its own.
        session.close();
        if let Err(error) = ended {
            return Some(error);
        }
        if hit.exists() {
            // It died after the last answer; whoever asks now hears of it.
            return session_error(path);
        }
    }
    None
}

fn session_error(path: &Path) -> Option<ClientError> {
    let mut error = None;
    wait_until("nobody answers", || {
        error = session_at(path, None).ping().err();
        if error.is_some() { Ok(()) } else { Err("somebody answers".to_owned()) }
    });
    error
}

/// Kills daemon after daemon, each at one of the names.
fn kill_at(backing: &str, names: &[&str]) {
    let place = Place::new();
    let (path, hit) = (place.socket(), place.path("arm.hit"));
    let own = session_at(&path, Some(start_command(&place, backing)));
    let current = Current(Cell::new(0));
    let mut held_before: Vec<Witness> = Vec::new();
    for name in names {
        let witness = Witness::new(own.clone());
        let large: Held = own.quantize(&Layers::new(LARGE), &Options::default()).unwrap().held;
        own.publish(&large, "kept", false).unwrap();
        let (pid, instance) = (current.is(&own), own.connect().unwrap().instance);

        arm(&place, name);
        let (send, receive) = mpsc::channel();
        let lives = {
            let (path, hit) = (path.clone(), hit.clone());
            std::thread::spawn(move || send.send(live_until_it_dies(&path, &hit)))
        };
        let error = receive.recv_timeout(PATIENCE).unwrap_or_else(|e| panic!("{name}: a client hangs: {e}"));
        lives.join().unwrap().unwrap();
        let error = error.unwrap_or_else(|| panic!("{name}: no daemon came by it"));
        let typed = matches!(error, ClientError::Lost { .. } | ClientError::Connect { .. });
        assert!(typed, "{name}: {error} ({error:?})");
        assert!(hit.exists(), "{name}: it lives, but a client got: {error}");
        disarm(&hit, name);
        wait_for_end(pid);

        // Who reads goes on reading.
        witness.check();
        check(&large, LARGE);
        if backing == "memfd" {
            assert_eq!(left_in_shm(instance), Vec::<String>::new(), "{name}");
        }
        let mut left: Vec<_> =
            fs::read_dir(place.path("run")).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        let known = ["shmquant.log", "shmquant.sock", "shmquant.sock.lock", "shmquant.sock.start"];
        assert!(left.iter().all(|file| known.iter().any(|k| file == k)), "{name}: {left:?}");

        // The next call starts the next daemon, which knows nothing of the last one.
        reach_the_next(&own, name);
        current.is(&own);
        assert_ne!(own.connect().unwrap().instance, instance, "{name}");
        wait_until_swept(instance, name);
        witness.check();
        check(&large, LARGE);
        let error = own.publish(&large, "again", false).unwrap_err();
        assert!(matches!(error, ClientError::OtherSession { .. }), "{name}: {error}");
        drop(large);
        held_before.push(witness);
        let stat = stat(&own);
        assert_eq!(
            (&stat["leases"], &stat["datasets"], &stat["stray_releases"]),
            (&0.into(), &0.into(), &0.into())
        );
    }
    // Through all these deaths.
    held_before.iter().for_each(Witness::check);
    drop(held_before);
    stop(&own);
}

/// Kills daemons that are about to serve or to stop.
fn kill_at_its_ends(backing: &str, starting: &[&str]) {
    let place = Place::new();
    let hit = place.path("arm.hit");
    let own = session_at(&place.socket(), Some(start_command(&place, backing)));
    let current = Current(Cell::new(0));
    for name in starting.iter().chain(STOPPING) {
        let witness = Witness::new(own.clone());
        let more: Vec<Witness> = (0..3).map(|_| Witness::new(own.clone())).collect();
        own.publish(&witness.held, "kept", false).unwrap();
        let (pid, instance) = (current.is(&own), own.connect().unwrap().instance);
        arm(&place, name);
        if STOPPING.contains(name) {
            kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
            wait_for_end(pid);
        } else {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
            wait_for_end(pid);
            // Its successor dies before it serves, and whoever wanted it is told.
            wait_until("a daemon dies on its way", || {
                match own.ping() {
                    // Somebody else's daemon was faster to sweep: there has to be something to sweep again.
                    Ok(()) if *name == "daemon.sweeping" => {
                        Witness::new(own.clone()).check();
                        let pid = current.is(&own);
                        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
                        wait_for_end(pid);
                    }
                    Ok(()) => panic!("{name}: no daemon came by it"),
                    Err(ClientError::Lost { .. }) => {}
                    Err(ClientError::Connect { what, .. }) => {
                        assert!(what.contains("before it was ready"), "{what}")
                    }
                    Err(error) => panic!("{name}: {error}"),
                }
                if hit.exists() { Ok(()) } else { Err("none died".to_owned()) }
            });
        }
        disarm(&hit, name);
        reach_the_next(&own, name);
        current.is(&own);
        assert_ne!(own.connect().unwrap().instance, instance, "{name}");
        wait_until_swept(instance, name);
        witness.check();
        more.iter().for_each(Witness::check);
    }
    stop(&own);
}

fn serving_points() -> Vec<&'static str> {
    let ends = [STARTING, STARTING_POSIX, STOPPING].concat();
    failpoint::ALL.iter().copied().filter(|n| n.starts_with("daemon.") && !ends.contains(n)).collect()
}

#[test]
fn a_daemon_killed_anywhere_harms_nobody() {
    kill_at("memfd", &serving_points());
}

#[test]
fn a_daemon_killed_later_harms_nobody_either() {
    let rounds = (kills() / USUAL_KILLS).max(1);
    for round in 0..rounds {
        let points: Vec<String> = serving_points()
            .iter()
            .enumerate()
            .map(|(i, name)| format!("{name}:{}", 2 + (i + 5 * round) % 7))
            .collect();
        kill_at("memfd", &points.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

#[test]
fn a_daemon_killed_while_it_starts_or_stops_harms_nobody() {
    kill_at_its_ends("memfd", STARTING);
    let _alone = SWEEPING.lock().unwrap_or_else(PoisonError::into_inner);
    kill_at_its_ends("posix", &[STARTING, STARTING_POSIX].concat());
}

#[test]
fn what_a_killed_daemon_leaves_by_name_is_swept_by_the_next() {
    let _alone = SWEEPING.lock().unwrap_or_else(PoisonError::into_inner);
    let names = [
        "daemon.window_made",
        "daemon.segment_made",
        "daemon.chunk_ended",
        "daemon.leased",
        "daemon.retired",
    ];
    kill_at("posix", &names);
}

#[test]
fn a_daemon_with_memfds_sweeps_what_one_with_names_left() {
    let _alone = SWEEPING.lock().unwrap_or_else(PoisonError::into_inner);
    let place = Place::new();
    let mut command = place.command();
    command.args(["--backing", "posix"]);
    let served = Served::start(command);
    let witness = Witness::new(session_at(&place.socket(), None));
    let instance = witness.session.connect().unwrap().instance;
    assert!(!left_in_shm(instance).is_empty());
    drop(served);
    let _next = Served::start(place.command());
    wait_until_swept(instance, "with memfds");
    witness.check();
}

#[test]
fn a_second_daemon_never_harms_a_living_one() {
    let place = Place::new();
    let served = Served::start(place.command());
    let witness = Witness::new(session_at(&place.socket(), None));
    for _ in 0..3 {
        let output = place.command().stderr(std::process::Stdio::piped()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains("already serves"), "{text}");
        assert!(!String::from_utf8_lossy(&output.stdout).contains("ready"));
        witness.check();
        witness.session.ping().unwrap();
        assert_eq!(pid_of(&witness.session), served.pid().cast_signed());
        // The address leads to it, too, not only the connection from before.
        assert_eq!(pid_of(&session_at(&place.socket(), None)), served.pid().cast_signed());
    }

    // It dies, and several want its place: one gets it.
    drop(served);
    let mut racers: Vec<_> = (0..4).map(|_| place.command().spawn().unwrap()).collect();
    let mut winner = None;
    wait_until("one serves", || {
        winner = session_at(&place.socket(), None).stat().ok();
        if winner.is_some() { Ok(()) } else { Err("nobody serves".to_owned()) }
    });
    let pid = serde_json::from_str::<Value>(&winner.unwrap()).unwrap()["pid"].as_u64().unwrap();
    let at = racers.iter().position(|racer| u64::from(racer.id()) == pid).unwrap();
    let winner = Served(racers.swap_remove(at));
    for racer in racers {
        let output = racer.wait_with_output().unwrap();
        assert!(!output.status.success());
    }
    witness.check();
    let next = Witness::new(session_at(&place.socket(), None));
    assert_eq!(pid_of(&next.session), winner.pid().cast_signed());
}
