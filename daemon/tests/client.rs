//! The Rust client with a real daemon.
#![allow(clippy::unwrap_used, reason = "a step that fails is how a test fails")]

#[path = "../../protocol/tests/layers/mod.rs"]
mod layers;
mod native;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use layers::Layers;
use native::{check, daemon, session, session_at};
use shmquant_daemon::{Config, Daemon};
use shmquant_protocol::chunks::{Chunk, MIN_WINDOW};
use shmquant_protocol::client::{ClientError, Held, Options, Session, Source, StartCommand};
use shmquant_protocol::descriptor::Descriptor;
use shmquant_protocol::message::{ErrorCode, Listing, Naming};

const ROLE: &str = "SHMQUANT_TEST_ROLE";

fn config() -> Config {
    Config { workers: 2, window: MIN_WINDOW, ..Config::default() }
}

#[test]
fn a_small_table_comes_back_with_its_report() {
    let daemon = daemon(config());
    let session = session(&daemon);
    let sizes = [1000, 255, 510];
    let seen = AtomicU64::new(0);
    let progress = |done: u64, of: u64| {
        assert_eq!(of, (1000 + 255 + 510) * 4);
        seen.store(done, Ordering::Relaxed);
    };
    let options = Options { progress: Some(&progress), ..Options::default() };
    let result = session.quantize(&Layers::new(&sizes), &options).unwrap();
    check(&result.held, &sizes);
    assert!(result.held.created() && !result.held.is_dataset() && result.held.name().is_none());
    assert_eq!(result.report.iter().map(|r| r.n).collect::<Vec<_>>(), sizes);
    assert!(result.report[0].mse.is_nan());
    assert_eq!(seen.into_inner(), (1000 + 255 + 510) * 4);
}

#[test]
fn a_table_of_many_windows_is_streamed_whole() {
    let daemon = daemon(config());
    let session = session(&daemon);
    // Layers larger than a chunk and smaller ones, 75 MiB in all through a window of 4 MiB.
    let sizes: Vec<u64> = (0..60).map(|i| 255 * (1 + (i * i * 37) % 2600)).collect();
    assert!(sizes.iter().sum::<u64>() * 4 > 10 * MIN_WINDOW);
    // Rows longer than a chunk cross twice: for their range, and for their codes.
    let (last, all) = (AtomicU64::new(0), AtomicU64::new(0));
    let progress = |done: u64, of: u64| {
        assert!(last.swap(done, Ordering::Relaxed) <= done && done <= of);
        all.store(of, Ordering::Relaxed);
    };
    let options = Options { progress: Some(&progress), ..Options::default() };
    for _ in 0..3 {
        last.store(0, Ordering::Relaxed);
        let result = session.quantize(&Layers::new(&sizes), &options).unwrap();
        check(&result.held, &sizes);
        assert_eq!(last.load(Ordering::Relaxed), all.load(Ordering::Relaxed));
        assert!(all.load(Ordering::Relaxed) >= sizes.iter().sum::<u64>() * 4);
    }
}

#[test]
fn the_steady_state_needs_no_new_memory() {
    let daemon = daemon(config());
    let session = session(&daemon);
    let mut places = HashSet::new();
    for generation in 1..=100 {
        let held = session.quantize(&Layers::new(&[100_000]), &Options::default()).unwrap().held;
        assert_eq!(held.extent().generation, generation);
        places.insert((held.extent().segment, held.as_ptr() as usize));
        drop(held);
        // The housekeeping thread may send the hold beside the next request, which may be first, and gets other memory then.
        await_no_lease(&session);
    }
    assert_eq!(places.len(), 1, "{places:?}");
}

/// Waits until what was let go of here has arrived at the daemon.
fn await_no_lease(session: &Session) {
    let started = Instant::now();
    loop {
        let stat: serde_json::Value = serde_json::from_str(&session.stat().unwrap()).unwrap();
        if stat["leases"] == 0 {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "{stat}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

#[test]
fn threads_share_the_lanes() {
    let daemon = daemon(Config { max_lanes: 3, ..config() });
    let session = session(&daemon);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let session = session.clone();
            scope.spawn(move || {
                for round in 0..10 {
                    let sizes =
                        [thread * 1000 + 1, 255 * (round + 1), if round == 5 { 2 << 20 } else { 9000 }];
                    let held = session.quantize(&Layers::new(&sizes), &Options::default()).unwrap().held;
                    // Layers that do not reach both ends of the range have another scale.
                    if thread > 0 {
                        check(&held, &sizes);
                    }
                }
            });
        }
    });
    let sessions = session.list(Listing::Sessions).unwrap();
    assert_eq!(sessions.len(), 1, "{sessions:?}");
}

/// Counts its chunks.
struct Counting {
    layers: Layers,
    filled: AtomicU64,
    at_chunk: Box<dyn Fn(u64) + Sync>,
}

impl Counting {
    fn new(sizes: &[u64], at_chunk: impl Fn(u64) + Sync + 'static) -> Self {
        Self { layers: Layers::new(sizes), filled: AtomicU64::new(0), at_chunk: Box::new(at_chunk) }
    }
}

impl Source for Counting {
    fn descriptor(&self) -> &Descriptor {
        self.layers.descriptor()
    }

    fn fill(&self, chunk: &Chunk, out: &mut [u8]) {
        self.layers.fill(chunk, out);
        (self.at_chunk)(self.filled.fetch_add(1, Ordering::SeqCst));
    }
}

#[test]
fn holds_go_back_though_the_request_that_took_them_along_was_never_sent() {
    let daemon = daemon(config());
    let session = session(&daemon);
    let failing = Counting::new(&[5000], |_| panic!("a source that fails"));
    for _ in 0..20 {
        drop(session.quantize(&Layers::new(&[5000]), &Options::default()).unwrap());
        // At once, so that this request takes the hold along and not the next tick.
        let failed = catch_unwind(AssertUnwindSafe(|| session.quantize(&failing, &Options::default())));
        assert!(failed.is_err());
    }
    await_no_lease(&session);
}

#[test]
fn an_interrupted_call_ends_and_the_session_goes_on() {
    let daemon = daemon(config());
    let session = session(&daemon);
    let begun = Arc::new(AtomicBool::new(false));
    let source = {
        let begun = begun.clone();
        // From the sixth chunk on the source is slower than any patience, but it is a source that goes on.
        Counting::new(&[1 << 29], move |n| {
            if n >= 6 {
                begun.store(true, Ordering::SeqCst);
                std::thread::park_timeout(Duration::from_micros(200));
            }
        })
    };
    let interrupted = || begun.load(Ordering::SeqCst);
    let options = Options { interrupted: Some(&interrupted), ..Options::default() };
    let error = session.quantize(&source, &options).unwrap_err();
    assert!(matches!(error, ClientError::Cancelled), "{error}");
    assert!(source.filled.into_inner() < 2048);
    let held = session.quantize(&Layers::new(&[5000]), &Options::default()).unwrap().held;
    check(&held, &[5000]);
}

#[test]
fn a_deadline_passes_while_others_have_the_memory() {
    let daemon = daemon(Config { budget: Some(48 << 20), ..config() });
    let (first, second) = (session(&daemon), session(&daemon));
    let held: Vec<Held> = (0..2)
        .map(|_| first.quantize(&Layers::new(&[12 << 20]), &Options::default()).unwrap().held)
        .collect();
    // Of the time below nothing is spent on connecting.
    drop(second.quantize(&Layers::new(&[1000]), &Options::default()).unwrap());
    let options = Options { timeout: Some(Duration::from_millis(200)), ..Options::default() };
    let error = second.quantize(&Layers::new(&[16 << 20]), &options).unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Deadline), "{error}");
    drop(held);
    let result = second.quantize(&Layers::new(&[16 << 20]), &Options::default()).unwrap();
    check(&result.held, &[16 << 20]);
}

#[test]
fn a_refusal_names_the_layer_and_leaves_the_lane_usable() {
    struct Nan(Layers);
    impl Source for Nan {
        fn descriptor(&self) -> &Descriptor {
            self.0.descriptor()
        }
        fn fill(&self, chunk: &Chunk, out: &mut [u8]) {
            self.0.fill(chunk, out);
            if chunk.item == 1 {
                out[28..32].copy_from_slice(&f32::NAN.to_le_bytes());
            }
        }
    }
    let daemon = daemon(config());
    let session = session(&daemon);
    for sizes in [vec![1000, 1000], vec![8 << 20, 1000, 1 << 20]] {
        let error = session.quantize(&Nan(Layers::new(&sizes)), &Options::default()).unwrap_err();
        let ClientError::Refused(failure) = &error else { panic!("{error}") };
        assert_eq!((failure.code, failure.index, failure.count), (ErrorCode::InvalidInput, 7, 1));
        assert!(error.to_string().contains("layer 1"), "{error}");
    }
    check(&session.quantize(&Layers::new(&[777]), &Options::default()).unwrap().held, &[777]);
}

#[test]
fn results_are_published_opened_and_passed_on() {
    let daemon = daemon(config());
    let (first, second) = (session(&daemon), session(&daemon));
    let sizes = [4000, 300];
    let naming = |digest| Naming { name: "models/a".to_owned(), replace: false, digest: [digest; 16] };
    let named = |digest| Options { named: Some(naming(digest)), ..Options::default() };
    let made = first.quantize(&Layers::new(&sizes), &named(1)).unwrap();
    assert!(made.held.created() && made.held.is_dataset() && made.held.name() == Some("models/a"));
    let found = second.quantize(&Layers::new(&sizes), &named(1)).unwrap();
    assert!(!found.held.created() && found.report.is_empty());
    assert_eq!(found.held.extent(), made.held.extent());
    let error = second.quantize(&Layers::new(&sizes), &named(2)).unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NameExists), "{error}");

    let opened = second.open("models/a").unwrap();
    assert_eq!(opened.as_slice(), made.held.as_slice());
    check(&opened, &sizes);
    let plain = first.quantize(&Layers::new(&[600]), &Options::default()).unwrap().held;
    let (ticket, secret) = first.ticket(&plain).unwrap();
    assert!(matches!(second.ticket(&plain), Err(ClientError::OtherSession { .. })));
    check(&second.open_ticket(ticket, secret).unwrap(), &[600]);
    assert_eq!(second.open_ticket(ticket, secret).unwrap_err().code(), Some(ErrorCode::NotFound));
    first.publish(&plain, "models/b", false).unwrap();
    assert!(plain.is_dataset() && plain.name() == Some("models/b"));
    assert_eq!(second.list(Listing::Datasets).unwrap().len(), 2);
    second.drop_dataset("models/b").unwrap();
    assert_eq!(second.open("models/b").unwrap_err().code(), Some(ErrorCode::NotFound));
    check(&plain, &[600]);
    second.ping().unwrap();
    assert!(first.stat().unwrap().starts_with('{'));
}

#[test]
fn a_result_outlives_the_daemon_and_the_session_finds_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run").join("a.sock");
    let serve = || Daemon::start(Config { address: path.clone(), ..config() }).unwrap();
    let session = session_at(&path, None);
    let error = session.connect().unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");

    let first = serve();
    let held = session.quantize(&Layers::new(&[9000]), &Options::default()).unwrap().held;
    let instance = session.connect().unwrap().instance;
    // It stops while values are on their way.
    let (stopping, stopped) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let running = {
        let (session, stopping, stopped) = (session.clone(), stopping.clone(), stopped.clone());
        std::thread::spawn(move || {
            let source = Counting::new(&[1 << 29], move |n| {
                if n == 4 {
                    stopping.store(true, Ordering::SeqCst);
                }
                // Running requests are given a moment, in which a fast machine gets through any table.
                while n > 4 && !stopped.load(Ordering::SeqCst) {
                    std::thread::park_timeout(Duration::from_micros(200));
                }
            });
            session.quantize(&source, &Options::default())
        })
    };
    while !stopping.load(Ordering::SeqCst) {
        std::thread::park_timeout(Duration::from_micros(200));
    }
    first.stop();
    stopped.store(true, Ordering::SeqCst);
    let error = running.join().unwrap().unwrap_err();
    let stopped = matches!(&error, ClientError::Lost { .. }) || error.code() == Some(ErrorCode::Stopping);
    assert!(stopped, "{error}");
    drop(first);
    check(&held, &[9000]);

    let _second = serve();
    let again = session.quantize(&Layers::new(&[900]), &Options::default()).unwrap().held;
    check(&again, &[900]);
    assert_ne!(session.connect().unwrap().instance, instance);
    assert!(matches!(session.publish(&held, "old", false), Err(ClientError::OtherSession { .. })));
    check(&held, &[9000]);
}

#[test]
fn a_descriptor_for_a_larger_window_gets_one() {
    let daemon = daemon(config());
    let session = session(&daemon);
    // 40,000 layers: their description alone is larger than a quarter of the usual window.
    let sizes = vec![255; 40_000];
    let result = session.quantize(&Layers::new(&sizes), &Options::default()).unwrap();
    check(&result.held, &sizes);
    assert_eq!(result.report.len(), sizes.len());
}

/// Plays the daemon for the test below, in a process of its own.
#[test]
fn child() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let config = Config { idle_exit: Some(Duration::from_millis(300)), ..config() };
    let Ok(daemon) = Daemon::start(config) else { std::process::exit(3) };
    use std::io::Write;
    std::io::stdout().write_all(b"\nready\n").unwrap();
    std::io::stdout().flush().unwrap();
    daemon.run();
}

#[test]
fn of_many_that_start_a_daemon_at_once_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shmquant").join("a.sock");
    let program = "/usr/bin/env".into();
    let exe = std::env::current_exe().unwrap().into_os_string();
    let words = ["--exact", "child", "--nocapture", "--test-threads=1"].map(Into::into);
    let args = [format!("{ROLE}=daemon").into(), exe].into_iter().chain(words).collect();
    let command = StartCommand { program, args };
    let started: Vec<(Session, u64)> = std::thread::scope(|scope| {
        let start = || {
            let session = session_at(&path, Some(command.clone()));
            let held = session.quantize(&Layers::new(&[600]), &Options::default()).unwrap().held;
            check(&held, &[600]);
            let instance = session.connect().unwrap().instance;
            // Kept until all have come: with the last session the daemon would end before one that is late.
            (session, instance)
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let instances: HashSet<u64> = started.iter().map(|(_, instance)| *instance).collect();
    assert_eq!(instances.len(), 1);
}
