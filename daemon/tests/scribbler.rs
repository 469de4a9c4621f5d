//! Clients that work against the daemon while it reads, for long and in numbers, beside one that behaves: it is served
//! throughout, and nothing has grown when the others have gone.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]
#![allow(
    unsafe_code,
    reason = "a hostile client writes into its window behind its own back and gives pages away"
)]

mod heap;
mod raw;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use fastrand::Rng;
use raw::{Client, Lane, Raw, Table, daemon, layer, pause, released, rows_of, table};
use shmquant_daemon::Daemon;
use shmquant_kernels::{Granularity, Scheme};
use shmquant_protocol::chunks::MIN_WINDOW;
use shmquant_protocol::descriptor::{Body, Way};
use shmquant_protocol::message::{
    ErrorCode, Extent, MAX_FRAME, MINOR, Message, NO_TIMEOUT, Quantize, Release, Target,
};
use shmquant_protocol::segment::Mapping;
use shmquant_protocol::socket::{Connection, SocketError};

/// What is measured is the whole process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Lets the others end, also when this thread ends by a panic: a failed test must not wait for them.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// How many times a loop goes round; `SHMQUANT_HOSTILE_ROUNDS` is the factor of a thorough run.
fn rounds(usual: u64) -> u64 {
    let factor = std::env::var("SHMQUANT_HOSTILE_ROUNDS").ok().and_then(|n| n.parse::<u64>().ok());
    usual * factor.unwrap_or(1)
}

/// A client that behaves: each of its requests has to succeed, and its results are what they should be.
fn bystander(daemon: &Daemon, stop: &AtomicBool) -> u64 {
    let mut client = Client::new(daemon);
    let mut lane = client.lane(daemon, MIN_WINDOW);
    let tables = [layer(4096), layer(2 << 20)];
    let mut served = 0;
    while !stop.load(Ordering::Acquire) || served == 0 {
        let table = &tables[served as usize % 2];
        let (lease, report) = lane.quantize(table).unwrap();
        assert_eq!(raw::report(&lane, report), [table.values[0].len() as u64]);
        assert_eq!(lane.rows(&lease), 1);
        assert_eq!(client.ask(&Message::Ping).unwrap().0, Message::Pong);
        lane.releases.push(released(&lease, false));
        // The descriptors are kept as a client keeps them: until it is asked.
        client.answer_notices();
        served += 1;
    }
    drop(lane);
    client.raw.send_as(0, &Message::Bye);
    client.raw.assert_closed();
    served
}

/// Runs what is hostile beside a bystander, and looks afterwards for what is left. `attack` is run three times: what the
/// first two take for good (lists that have grown, threads' memory) must be enough for the third.
fn beside(daemon: &Daemon, attack: impl Fn(u64)) {
    let quiet = |daemon: &Daemon| {
        let mut observer = Client::new(daemon);
        let stat = observer.await_stat(|s| {
            let none =
                ["jobs", "runs", "lanes", "leases", "tickets", "datasets", "waiting", "bytes", "segments"];
            none.iter().all(|key| s[key] == 0) && s["connections"] == 1 && s["sessions"] == 1
        });
        // While the observer is still there: its own connection takes as much each time, and ends beside us.
        (stat["fds"].as_u64().unwrap(), heap::in_use())
    };
    let mut seen = Vec::new();
    for time in 0..3 {
        let stop = AtomicBool::new(false);
        let served = std::thread::scope(|scope| {
            let other = scope.spawn(|| bystander(daemon, &stop));
            let ending = Ending(&stop);
            attack(time);
            drop(ending);
            other.join().unwrap()
        });
        assert!(served > 0);
        seen.push(quiet(daemon));
    }
    assert!(seen[2].0 <= seen[1].0 + 2, "descriptors: {seen:?}");
    assert!(seen[2].1 < seen[1].1 + (64 << 10), "memory: {seen:?}");
}

/// Rewrites a window and takes its pages away until it is told to stop.
fn scribble(window: &Mapping, stop: &AtomicBool, rounds: &AtomicU64, seed: u64) {
    const NUMBERS: [u64; 6] =
        [0, u64::MAX, 0x7FC0_0000_7FC0_0000, 0x7F80_0000_FF80_0000, 1, 0x3144_5153_3144_5153];
    let mut random = Rng::with_seed(seed);
    let base = window.as_mut_ptr().unwrap();
    let pages = window.len() as u64 / 4096;
    while !stop.load(Ordering::Acquire) {
        let page = match random.u64(..3) {
            // The descriptor and the first chunks.
            0 => random.u64(..4),
            _ => random.u64(..pages),
        };
        let number = NUMBERS[random.usize(..6)];
        if random.u64(..4) == 0 {
            let count = 1 + random.u64(..(pages - page).min(64));
            // SAFETY: whole pages of our own mapping, which stays mapped. What they held is lost, as is meant here.
            let done = unsafe {
                libc::madvise(base.add(page as usize * 4096).cast(), count as usize * 4096, libc::MADV_REMOVE)
            };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        } else {
            for word in 0..512 {
                // SAFETY: inside the mapping, aligned. Others read and write it, too: nobody here counts on anything.
                unsafe { base.add(page as usize * 4096 + word * 8).cast::<u64>().write_volatile(number) };
            }
        }
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// What came of requests whose window nobody could rely on.
#[derive(Debug, Default)]
struct Outcomes {
    done: u64,
    refused: u64,
    disconnected: u64,
}

/// Sends the request again and again while its window is scribbled upon.
fn quantize_scribbled(daemon: &Daemon, table: &Table, times: u64, seed: u64) -> Outcomes {
    let mut client = Client::new(daemon);
    let mut outcomes = Outcomes::default();
    let mut lane = client.lane(daemon, MIN_WINDOW);
    let mut left = times;
    // A descriptor comes once in a session, whichever lane asked first.
    let mut fds = std::collections::HashMap::new();
    while left > 0 {
        let (stop, wrote) = (AtomicBool::new(false), AtomicU64::new(0));
        // A second view of the window: the first one is at work.
        std::thread::scope(|scope| {
            let window = &lane.window;
            let seed = seed + left;
            let (stop, wrote) = (&stop, &wrote);
            let ending = Ending(stop);
            let scribbler = scope.spawn(move || scribble(window, stop, wrote, seed));
            let connection = &lane.raw.connection;
            let mut held: Vec<Release> = Vec::new();
            let fds = &mut fds;
            while left > 0 {
                left -= 1;
                match attempt(connection, &lane, table, &mut held, fds) {
                    Attempt::Done => outcomes.done += 1,
                    Attempt::Refused => outcomes.refused += 1,
                    Attempt::Disconnected => {
                        outcomes.disconnected += 1;
                        break;
                    }
                }
            }
            // Nobody must be able to say that the window was left in peace.
            while wrote.load(Ordering::Relaxed) < 50 {
                pause();
            }
            drop(ending);
            scribbler.join().unwrap();
        });
        // The windows of lanes that have ended are charged until this client has let go of them.
        client.ask(&Message::Ping).unwrap();
        client.answer_notices();
        lane = client.lane(daemon, MIN_WINDOW);
    }
    outcomes
}

enum Attempt {
    Done,
    Refused,
    Disconnected,
}

fn attempt(
    connection: &Connection,
    lane: &Lane,
    table: &Table,
    held: &mut Vec<Release>,
    fds: &mut std::collections::HashMap<u64, std::os::fd::OwnedFd>,
) -> Attempt {
    let mut bytes = Vec::new();
    table.descriptor.encode(&mut bytes).unwrap();
    let list = shmquant_protocol::chunks::ChunkList::new(
        &table.descriptor,
        bytes.len() as u64,
        lane.window.len() as u64,
    );
    lane.put(0, &bytes);
    let mut written = list.writable(0);
    let releases = std::mem::take(held);
    let (descriptor, ready) = (bytes.len() as u64, written as u32);
    let message = Message::Quantize(Quantize {
        descriptor,
        ready,
        timeout: NO_TIMEOUT,
        named: None,
        releases,
        ring: 0,
    });
    let mut frame = Vec::new();
    message.encode(7, &mut frame);
    if connection.send(&frame, &[]).is_err() {
        return Attempt::Disconnected;
    }
    let (mut buffer, mut got) = (vec![0; MAX_FRAME], Vec::new());
    loop {
        let Ok(received) = connection.recv(&mut buffer, &mut got) else { return Attempt::Disconnected };
        match Message::decode(&buffer[..received.len]).unwrap().1 {
            // The values come from the scribbler alone.
            Message::Consumed { chunks } => {
                let until = list.writable(chunks as usize);
                if until > written {
                    written = until;
                    Message::Wrote { chunks: written as u32 }.encode(7, &mut frame);
                    if connection.send(&frame, &[]).is_err() {
                        return Attempt::Disconnected;
                    }
                }
            }
            Message::Done { lease, .. } => {
                if let Some(fd) = got.pop() {
                    fds.insert(lease.extent.segment, fd);
                }
                // Whatever the values were: a whole file that says what it should say about its shape.
                assert!(rows_of(&fds[&lease.extent.segment], &lease) > 0);
                held.push(released(&lease, false));
                return Attempt::Done;
            }
            Message::Error(failure) => match failure.code {
                // The descriptor was overwritten before it was copied, into none at all.
                ErrorCode::Protocol => return Attempt::Disconnected,
                ErrorCode::InvalidInput | ErrorCode::Unsupported | ErrorCode::NoRoom | ErrorCode::Limit => {
                    return Attempt::Refused;
                }
                _ => panic!("{failure:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn windows_that_change_and_vanish_while_they_are_read() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let daemon = daemon(|c| c.budget = Some(512 << 20));
    // One that fits the window, one that is streamed, one that takes two passes in place, one streamed twice; rows
    // whose errors are counted, groups whose parameters come from values that have changed by the time they are used.
    let mut tables = vec![
        layer(512 << 10),
        layer(4 << 20),
        table(Scheme::Int4, Granularity::Tensor, &[(2048, 256)]),
        table(Scheme::Int8, Granularity::Dimension, &[(4096, 1024)]),
        table(Scheme::Int2, Granularity::Group, &[(1024, 512), (64, 256), (1, 300_000)]),
    ];
    for (i, table) in tables.iter_mut().enumerate() {
        table.descriptor.metrics = i % 2 == 0;
        // With the other policies a request would end at the first NaN, and little would be read.
        table.descriptor.specs[0].on_nonfinite = match i % 3 {
            0 => shmquant_kernels::OnNonFinite::Saturate,
            1 => shmquant_kernels::OnNonFinite::Null,
            _ => shmquant_kernels::OnNonFinite::Error,
        };
    }
    // The same by clients that encode, or say so.
    let encoded = tables.clone().into_iter().map(|mut table| {
        for item in &mut table.descriptor.items {
            if let Body::Values(values) = &mut item.body {
                values.way = Way::Encoded;
            }
        }
        table
    });
    tables.extend(encoded.collect::<Vec<_>>());
    let total = Mutex::new(Outcomes::default());
    beside(&daemon, |time| {
        std::thread::scope(|scope| {
            for half in 0..2 {
                let (daemon, tables, total) = (&daemon, &tables, &total);
                scope.spawn(move || {
                    for (i, table) in tables.iter().enumerate().filter(|(i, _)| i % 2 == half) {
                        let got =
                            quantize_scribbled(daemon, table, rounds(20), 1 + time * 1000 + i as u64 * 100);
                        let mut total = total.lock().unwrap();
                        total.done += got.done;
                        total.refused += got.refused;
                        total.disconnected += got.disconnected;
                    }
                });
            }
        });
    });
    let total = total.into_inner().unwrap();
    println!("{total:?}");
    assert!(total.done > 0 && total.disconnected + total.refused > 0, "{total:?}");
}

/// 500 that say nothing, and one that asks and never reads.
#[test]
fn the_silent_and_the_deaf() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let daemon = daemon(|_| {});
    beside(&daemon, |_| {
        let silent: Vec<_> = (0..500).map(|_| Raw::new(&daemon)).collect();
        let deaf = Client::new(&daemon);
        let mut frame = Vec::new();
        Message::List { cursor: 0, what: shmquant_protocol::message::Listing::Sessions }
            .encode(1, &mut frame);
        loop {
            match deaf.raw.connection.send(&frame, &[]) {
                Ok(()) | Err(SocketError::PeerNotReading) => pause(),
                Err(SocketError::Closed) => break,
                Err(other) => panic!("{other:?}"),
            }
        }
        // A lane that is told of its progress and does not listen, while its values come.
        let client = Client::new(&daemon);
        let mut lane = client.lane(&daemon, MIN_WINDOW);
        let running = lane.start(&layer(16 << 20));
        for chunks in running.written as u32..running.list.chunks.len() as u32 {
            let mut frame = Vec::new();
            Message::Wrote { chunks }.encode(running.request, &mut frame);
            match lane.raw.connection.send(&frame, &[]) {
                Ok(()) | Err(SocketError::PeerNotReading | SocketError::Closed) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
        drop(silent);
    });
}

/// Extents of others, old ones, and ranges that wrap around, in every message that takes one.
#[test]
fn extents_that_are_not_theirs() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let daemon = daemon(|_| {});
    let mut owner = Client::new(&daemon);
    let mut lane = owner.lane(&daemon, MIN_WINDOW);
    let (lease, _) = lane.quantize(&layer(65_536)).unwrap();
    let (named, _) = lane.quantize(&layer(4096)).unwrap();
    let name = "theirs".to_owned();
    owner.ask(&Message::Publish { extent: named.extent, replace: false, name: name.clone() }).unwrap();
    let own = lease.extent;
    let mut wrong = vec![own, named.extent];
    for change in [1, 64, own.length, u64::MAX - own.length, u64::MAX - own.length + 1, u64::MAX, 1 << 63] {
        wrong.push(Extent { offset: change, ..own });
        wrong.push(Extent { length: own.length.wrapping_add(change), ..own });
        wrong.push(Extent { offset: change, length: change.wrapping_neg(), ..own });
        wrong.push(Extent { generation: own.generation.wrapping_add(change), ..own });
        wrong.push(Extent { segment: own.segment.wrapping_add(change), ..own });
    }
    wrong.push(Extent { segment: lane.segment, generation: 1, offset: 0, length: MIN_WINDOW });
    let mut thief = Client::new(&daemon);
    for (i, extent) in wrong.iter().enumerate() {
        for message in [
            Message::Ticket(*extent),
            Message::Publish { extent: *extent, replace: true, name: name.clone() },
            Message::Publish { extent: *extent, replace: true, name: format!("mine {i}") },
            Message::Open(Target::Again(*extent)),
        ] {
            assert_eq!(thief.ask(&message).unwrap_err().code, ErrorCode::Gone, "{message:?}");
        }
        let release = Release { segment: extent.segment, generation: extent.generation, tainted: true };
        thief.raw.send_as(0, &Message::Release(vec![release; 3]));
        thief.raw.send_as(0, &Message::Unmap { segment: extent.segment });
    }
    // The owner itself cannot widen what it holds, either.
    for extent in wrong.iter().skip(2).filter(|e| e.segment == own.segment && e.generation == own.generation)
    {
        for message in [
            Message::Ticket(*extent),
            Message::Publish { extent: *extent, replace: true, name: "wider".to_owned() },
        ] {
            assert_eq!(owner.ask(&message).unwrap_err().code, ErrorCode::Gone, "{message:?}");
        }
    }
    let stat = owner.stat();
    assert_eq!((&stat["leases"], &stat["datasets"], &stat["tickets"]), (&2.into(), &1.into(), &0.into()));
    assert_eq!(lane.rows(&lease), 1);
    // Nothing was tainted by strangers: the memory is used again.
    let recycled = stat["recycled"].as_u64().unwrap();
    lane.releases.push(released(&lease, false));
    lane.quantize(&layer(65_536)).unwrap();
    assert_eq!(owner.stat()["recycled"], recycled + 1);
}

/// A frame as somebody might send it who knows the protocol's shape and little else.
fn any_message(random: &mut Rng, welcome: &shmquant_protocol::message::Welcome, frame: &mut Vec<u8>) {
    let extent = Extent {
        segment: random.u64(..40),
        generation: random.u64(..4),
        offset: if random.u64(..3) == 0 { random.u64(..) } else { 0 },
        length: random.u64(..) >> random.u64(..64),
    };
    let name = ["a", "b", "c"][random.usize(..3)].to_owned();
    let release = Release { segment: extent.segment, generation: extent.generation, tainted: random.bool() };
    let message = match random.u64(..40) {
        0..=5 => Message::Release(vec![release; random.usize(..5)]),
        6..=10 => Message::Unmap { segment: extent.segment },
        11..=15 => Message::Cancel { lane: random.u32(..4), request: random.u32(..9) },
        16..=19 => Message::Open(Target::Again(extent)),
        20..=22 => Message::Open(Target::Name(name)),
        23..=24 => Message::Open(Target::Ticket(random.u64(..9), [0; 16])),
        25..=26 => Message::Ticket(extent),
        27..=28 => Message::Publish { extent, replace: true, name },
        29 => Message::Drop { name },
        30 => Message::List {
            cursor: random.u64(..) >> random.u64(..64),
            what: shmquant_protocol::message::Listing::Results,
        },
        31 => Message::Stat,
        32..=36 => Message::Ping,
        37 => Message::Hello { minor: MINOR, version: String::new() },
        38 => Message::Join { session: welcome.session, token: welcome.token, window: random.u64(..) },
        _ => Message::Wrote { chunks: random.u32(..) },
    };
    message.encode(random.u32(..), frame);
    // Most of them as they are, so that a connection lives for some; the others changed in one place.
    if random.u64(..60) == 0 {
        let at = random.usize(..frame.len());
        frame[at] = random.u8(..);
    }
}

/// A million messages in the thorough run (`SHMQUANT_HOSTILE_ROUNDS=17`), 60,000 of them else.
#[test]
fn many_messages_of_no_sense() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let daemon = daemon(|c| c.budget = Some(256 << 20));
    let sent = AtomicU64::new(0);
    let each = rounds(10_000);
    beside(&daemon, |time| {
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (daemon, sent) = (&daemon, &sent);
                scope.spawn(move || {
                    let mut random = Rng::with_seed(1 + time * 2 + thread);
                    let mut left = each;
                    while left > 0 {
                        left -= connection_of_nonsense(daemon, &mut random, left.min(500));
                    }
                    sent.fetch_add(each, Ordering::Relaxed);
                });
            }
        });
    });
    assert_eq!(sent.into_inner(), 6 * each);
}

/// Sends up to `most` messages on a connection and reads what comes; gives how many were sent before it ended.
fn connection_of_nonsense(daemon: &Daemon, random: &mut Rng, most: u64) -> u64 {
    let client = Client::new(daemon);
    let lane = if random.u64(..4) == 0 { Some(client.lane(daemon, MIN_WINDOW)) } else { None };
    let connection = lane.as_ref().map_or(&client.raw.connection, |lane| &lane.raw.connection);
    let (mut frame, mut buffer, mut fds) = (Vec::new(), vec![0; MAX_FRAME], Vec::new());
    for sent in 0..most {
        any_message(random, &client.welcome, &mut frame);
        match connection.send(&frame, &[]) {
            Ok(()) | Err(SocketError::PeerNotReading) => {}
            Err(_) => return sent + 1,
        }
        // Reads now and then only, but often enough to be kept.
        while sent % 16 == 0
            && let Ok(Some(received)) = connection.try_recv(&mut buffer, &mut fds)
        {
            let (_, message) = Message::decode(&buffer[..received.len]).unwrap();
            if let Message::Error(failure) = message {
                assert!(failure.code != ErrorCode::Internal, "{failure:?}");
            }
        }
    }
    most
}

#[test]
fn who_is_refused_does_not_wait() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let daemon = daemon(|c| c.max_sessions = 1);
    let client = Client::new(&daemon);
    for _ in 0..200 {
        let mut raw = Raw::new(&daemon);
        raw.send(&Message::Hello { minor: MINOR, version: String::new() });
        match raw.recv() {
            Ok((_, Message::Error(failure), _)) => assert_eq!(failure.code, ErrorCode::Limit),
            other => panic!("{other:?}"),
        }
        raw.assert_closed();
    }
    drop(client);
}
