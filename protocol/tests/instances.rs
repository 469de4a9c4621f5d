//! Instances of daemons with POSIX segments: what a killed one left is swept, what a live one owns is not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests fail by panicking, and a child says that it is through"
)]

mod child;

use std::collections::hash_map::RandomState;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher};
use std::os::fd::AsFd;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use shmquant_protocol::segment::{
    Backing, InstanceGuard, Kind, Segment, SegmentError, SegmentName, sweep_stale,
};
use shmquant_protocol::socket::Connection;

fn fresh_instance() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Sweeps until there is nothing left: another test's sweeper, or a daemon that starts, may have the lock and be at it, and ours
/// leaves it to them.
fn sweep_until_gone(is_there: impl Fn() -> bool) {
    let started = Instant::now();
    loop {
        sweep_stale().unwrap();
        if !is_there() {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "not swept");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

#[test]
fn an_instance_is_announced_once_and_leaves_with_its_last_segment() {
    let instance = fresh_instance();
    let guard = InstanceGuard::acquire(instance).unwrap();
    assert_eq!(guard.instance(), instance);
    let path = guard.path().to_owned();
    assert!(matches!(InstanceGuard::acquire(instance).unwrap_err(), SegmentError::NameTaken { .. }));
    let name = SegmentName { instance, kind: Kind::Result, id: 1 };
    let segment = Segment::create(Backing::Posix, &name, 4096).unwrap();
    sweep_stale().unwrap();
    assert!(path.exists() && segment.path().exists(), "a live instance is not swept");
    // Dropped in the wrong order, as by a panic: the file stays, for a sweep to find what was left.
    let _closed_is_closed = child::no_forks();
    drop(guard);
    sweep_until_gone(|| path.exists() || segment.path().exists());
    drop(segment);

    let guard = InstanceGuard::acquire(instance).unwrap();
    drop(guard);
    assert!(!path.exists());
}

#[test]
fn what_a_killed_daemon_left_is_swept_and_nothing_else() {
    let (ours, theirs) = Connection::pair().unwrap();
    let mut daemon = child::spawn("killed-daemon", theirs.into());
    let mut buf = [0; 64];
    let said = ours.recv(&mut buf, &mut Vec::new()).unwrap();
    let instance = u64::from_le_bytes(buf[..said.len].try_into().unwrap());
    let name = SegmentName { instance: fresh_instance(), kind: Kind::Result, id: 1 };
    let guardless = Segment::create(Backing::Posix, &name, 4096).unwrap();
    let left = || {
        fs::read_dir("/dev/shm")
            .unwrap()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().contains(&format!("{instance:016x}")))
    };
    assert_eq!(left().count(), 4, "three segments and the instance file");
    sweep_stale().unwrap();
    assert_eq!(left().count(), 4, "its owner lives");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    // (Not looked at here: other daemons may start on this host now, and sweep, too.)
    sweep_until_gone(|| left().count() > 0);
    assert!(guardless.path().exists(), "nothing says that its owner is dead");
}

#[test]
fn sweepers_and_starting_daemons_do_not_hurt_each_other() {
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..200 {
                    sweep_stale().unwrap();
                }
            });
            scope.spawn(|| {
                for _ in 0..100 {
                    let guard = InstanceGuard::acquire(fresh_instance()).unwrap();
                    let name = SegmentName { instance: guard.instance(), kind: Kind::Window, id: 0 };
                    let segment = Segment::create(Backing::Posix, &name, 4096).unwrap();
                    assert!(guard.path().exists() && segment.path().exists());
                }
            });
        }
    });
}

#[test]
fn an_instance_file_swept_before_it_was_locked_is_made_anew() {
    // The worst sweeper there can be: it waits for the one moment between making the file and locking it.
    let mut swept = 0;
    for _ in 0..2_000 {
        let instance = fresh_instance();
        let path = format!("/dev/shm/shmquant.{instance:016x}.lock");
        let (running, done) = (Barrier::new(2), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| {
                running.wait();
                while !done.load(Ordering::Relaxed) {
                    let Ok(file) = File::open(&path) else { continue };
                    if let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                        fs::remove_file(&path).unwrap();
                        return 1;
                    }
                }
                0
            });
            running.wait();
            let guard = InstanceGuard::acquire(instance).unwrap();
            done.store(true, Ordering::Relaxed);
            swept += sweeper.join().unwrap();
            assert!(guard.path().exists(), "a guard without its file guards nothing");
        });
        if swept == 3 {
            break;
        }
    }
    println!("the sweeper came in between {swept} times");
}

#[test]
fn child() {
    let Some(role) = child::role() else { return };
    assert_eq!(role, "killed-daemon");
    be_killed();
}

fn be_killed() {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let parent = Connection::from_fd(stdin).unwrap();
    let guard = InstanceGuard::acquire(fresh_instance()).unwrap();
    let _segments = [Kind::Result, Kind::Window, Kind::Input].map(|kind| {
        let name = SegmentName { instance: guard.instance(), kind, id: 9 };
        Segment::create(Backing::Posix, &name, 1 << 16).unwrap()
    });
    parent.send(&guard.instance().to_le_bytes(), &[]).unwrap();
    // Until the parent kills us, or is itself gone.
    let _ = parent.recv(&mut [0; 8], &mut Vec::new());
}
