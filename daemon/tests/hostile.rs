//! Clients that break the protocol, go silent or ask for too much: an error, the end, and nothing left.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]

mod raw;

use std::os::fd::AsFd;

use arrow_schema::{DataType, Field};
use proptest::prelude::*;
use raw::{Client, Lane, Raw, daemon, layer, pause, released};
use shmquant_daemon::Daemon;
use shmquant_protocol::chunks::{ChunkList, MIN_RING, MIN_WINDOW};
use shmquant_protocol::descriptor::{Body, Descriptor, Item, TableKind};
use shmquant_protocol::field::NodeData;
use shmquant_protocol::message::{ErrorCode, Extent, MINOR, Message, NO_TIMEOUT, Quantize, Release, Target};
use shmquant_protocol::socket::{Connection, SocketError};

fn frame(message: &Message) -> Vec<u8> {
    let mut frame = Vec::new();
    message.encode(1, &mut frame);
    frame
}

fn hello() -> Message {
    Message::Hello { minor: MINOR, version: "hostile".to_owned() }
}

fn quantize(descriptor: u64, ready: u32) -> Message {
    let releases = Vec::new();
    Message::Quantize(Quantize { descriptor, ready, timeout: NO_TIMEOUT, named: None, releases, ring: 0 })
}

/// The daemon still serves, and has nothing of anybody but the one who asks.
fn assert_well(daemon: &Daemon) {
    let mut client = Client::new(daemon);
    let mut lane = client.lane(daemon, 0);
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    assert_eq!(lane.rows(&lease), 1);
    drop(lane);
    client.release(&lease);
    let stat = client.await_stat(|s| s["connections"] == 1 && s["lanes"] == 0);
    assert_eq!((&stat["jobs"], &stat["leases"], &stat["sessions"]), (&0.into(), &0.into(), &1.into()));
}

#[test]
fn first_frames_that_are_none() {
    let daemon = daemon(|_| {});
    for first in [
        Message::Stat,
        Message::Bye,
        quantize(0, 0),
        Message::Pong,
        Message::Join { session: 1, token: [0; 16], window: 0 },
    ] {
        let mut raw = Raw::new(&daemon);
        raw.send(&first);
        raw.assert_protocol_error();
    }
    let mut raw = Raw::new(&daemon);
    let mut other_version = frame(&hello());
    other_version[0] = 9;
    raw.connection.send(&other_version, &[]).unwrap();
    let Message::Error(e) = raw.recv().unwrap().1 else { panic!() };
    assert_eq!(e.code, ErrorCode::Version);
    raw.assert_closed();
    assert_well(&daemon);
}

#[test]
fn frames_that_have_no_place() {
    let daemon = daemon(|_| {});
    for message in [
        hello(),
        quantize(10, 0),
        Message::Wrote { chunks: 1 },
        Message::Consumed { chunks: 1 },
        Message::Pong,
        Message::Join { session: 1, token: [0; 16], window: 0 },
    ] {
        let mut client = Client::new(&daemon);
        client.raw.send(&message);
        client.raw.assert_protocol_error();
    }
    // A second request while one runs.
    let client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    lane.start(&layer(8 << 20));
    lane.raw.send(&Message::Ping);
    loop {
        match lane.raw.recv().unwrap().1 {
            Message::Consumed { .. } => {}
            Message::Error(e) if e.code == ErrorCode::Protocol => break,
            other => panic!("{other:?}"),
        }
    }
    lane.raw.assert_closed();
    drop(client);
    assert_well(&daemon);
}

#[test]
fn watermarks_that_lie() {
    let daemon = daemon(|_| {});
    // Back; past the last chunk; and past what the ring has room for, however much of it has been read by now.
    for lie in [-1, i64::from(u32::MAX), 25] {
        let client = Client::new(&daemon);
        let mut lane = client.lane(&daemon, MIN_WINDOW);
        let running = lane.start(&layer(8 << 20));
        assert!(!running.list.resident && running.list.chunks.len() == 32 && running.written < 4);
        let last = running.written as u32;
        let lies = [last, if lie < 0 { last - 1 } else { lie as u32 }];
        for chunks in lies {
            lane.raw.send_as(running.request, &Message::Wrote { chunks });
        }
        loop {
            match lane.raw.recv().unwrap().1 {
                Message::Consumed { .. } => {}
                Message::Error(e) => {
                    assert_eq!(e.code, ErrorCode::Protocol, "{e:?}");
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        lane.raw.assert_closed();
    }
    // With the request: nothing has been read yet.
    let client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    let mut bytes = Vec::new();
    layer(8 << 20).descriptor.encode(&mut bytes).unwrap();
    lane.put(0, &bytes);
    let may = ChunkList::new(&layer(8 << 20).descriptor, bytes.len() as u64, MIN_WINDOW).writable(0);
    lane.raw.send(&quantize(bytes.len() as u64, may as u32 + 1));
    lane.raw.assert_protocol_error();
    // Nor may the ring be so small that a chunk would not fit it.
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    lane.ring = MIN_RING - 64;
    lane.start(&layer(4096));
    lane.raw.assert_protocol_error();
    drop(client);
    assert_well(&daemon);
}

/// Few bytes in so many buffers that they take more room than the window has: small, and streamed all the same.
#[test]
fn very_many_small_buffers_pass_the_ring() {
    const BUFFERS: usize = 65_000;
    let daemon = daemon(|_| {});
    let data = NodeData {
        length: 0,
        null_count: 0,
        // Validity, views, and what views may point to.
        buffers: [vec![0; 2], vec![1; BUFFERS]].concat(),
        children: Vec::new(),
    };
    let field = Field::new("texts", DataType::Utf8View, true);
    let descriptor = Descriptor {
        table: TableKind::Columns,
        rows: 0,
        items: vec![Item { name: "texts".to_owned(), body: Body::Keep { field, data } }],
        ..layer(256).descriptor
    };
    let client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    let mut bytes = Vec::new();
    descriptor.encode(&mut bytes).unwrap();
    lane.put(0, &bytes);
    let list = ChunkList::new(&descriptor, bytes.len() as u64, MIN_WINDOW);
    assert!(!list.resident && list.chunks.len() == BUFFERS);
    let mut written = list.writable(0);
    let request = lane.raw.send(&quantize(bytes.len() as u64, written as u32));
    let lease = loop {
        match lane.raw.recv().unwrap().1 {
            Message::Consumed { chunks } => {
                written = list.writable(chunks as usize);
                lane.raw.send_as(request, &Message::Wrote { chunks: written as u32 });
            }
            Message::Done { lease, .. } => break lease,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(written, BUFFERS);
    lane.releases.push(released(&lease, false));
    assert!(lane.quantize(&layer(4096)).is_ok());
    drop((lane, client));
    assert_well(&daemon);
}

#[test]
fn descriptors_that_lie() {
    // However large the machine is.
    let daemon = daemon(|c| c.budget = Some(1 << 30));
    let mut client = Client::new(&daemon);
    // Longer than it may be: refused, and the lane goes on.
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    for bytes in [MIN_WINDOW / 4 + 1, MIN_WINDOW + 1, u64::MAX] {
        lane.raw.send(&quantize(bytes, 0));
        let Message::Error(e) = lane.raw.recv().unwrap().1 else { panic!() };
        assert_eq!(e.code, ErrorCode::Limit);
    }
    assert!(lane.quantize(&layer(4096)).is_ok());
    // Not a descriptor; more chunks than there are.
    lane.put(0, &[0xFF; 1000]);
    lane.raw.send(&quantize(1000, 0));
    lane.raw.assert_protocol_error();
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    let mut bytes = Vec::new();
    layer(256).descriptor.encode(&mut bytes).unwrap();
    lane.put(0, &bytes);
    lane.raw.send(&quantize(bytes.len() as u64, 2));
    lane.raw.assert_protocol_error();
    // Sizes that nobody has.
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    for rows in [1 << 37, 1 << 33, 1 << 29] {
        let mut huge = layer(256);
        if let shmquant_protocol::descriptor::Body::Values(v) = &mut huge.descriptor.items[0].body {
            (v.rows, v.shape) = (rows, vec![rows as i64, 256]);
        }
        let mut bytes = Vec::new();
        huge.descriptor.encode(&mut bytes).unwrap();
        lane.put(0, &bytes);
        lane.raw.send(&quantize(bytes.len() as u64, 0));
        let Message::Error(e) = lane.raw.recv().unwrap().1 else { panic!() };
        assert_eq!(e.code, ErrorCode::NoRoom, "{e:?}");
    }
    drop(lane);
    client.await_stat(|s| s["lanes"] == 0);
    drop(client);
    assert_well(&daemon);
}

#[test]
fn windows_and_lanes_have_limits() {
    let daemon = daemon(|c| {
        c.max_window = 8 << 20;
        c.max_lanes = 3;
        c.max_sessions = 2;
    });
    let (mut client, other) = (Client::new(&daemon), Client::new(&daemon));
    let mut third = Raw::new(&daemon);
    third.send(&hello());
    let Message::Error(e) = third.recv().unwrap().1 else { panic!() };
    assert_eq!(e.code, ErrorCode::Limit);
    drop((third, other));
    // There are two places, and the one who looks at the end needs one.
    client.await_stat(|s| s["sessions"] == 1);
    let refused = |window| Lane::join(Raw::new(&daemon), &client.welcome, window).err().unwrap().code;
    assert_eq!(refused(9 << 20), ErrorCode::Limit);
    assert_eq!(refused(u64::MAX), ErrorCode::Limit);
    let lanes: Vec<_> = (0..3).map(|_| client.lane(&daemon, 1)).collect();
    assert_eq!(lanes[0].window.len() as u64, MIN_WINDOW);
    assert_eq!(refused(0), ErrorCode::Limit);
    // Another session's token is no token.
    let mut wrong = client.welcome.clone();
    wrong.token[3] ^= 1;
    assert_eq!(Lane::join(Raw::new(&daemon), &wrong, 0).err().unwrap().code, ErrorCode::Protocol);
    drop(lanes);
    drop(client);
    assert_well(&daemon);
}

#[test]
fn holds_have_a_limit() {
    let daemon = daemon(|c| c.max_holds = 3);
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    let (lease, _) = lane.quantize(&layer(256)).unwrap();
    client.ask(&Message::Ticket(lease.extent)).unwrap();
    client.ask(&Message::Open(Target::Again(lease.extent))).unwrap();
    for message in [Message::Ticket(lease.extent), Message::Open(Target::Again(lease.extent))] {
        assert_eq!(client.ask(&message).unwrap_err().code, ErrorCode::Limit);
    }
    assert_eq!(lane.quantize(&layer(256)).unwrap_err().code, ErrorCode::Limit);
    lane.releases.push(released(&lease, false));
    assert!(lane.quantize(&layer(256)).is_ok());
}

#[test]
fn releases_of_what_others_hold_change_nothing() {
    let daemon = daemon(|_| {});
    let (mut a, b) = (Client::new(&daemon), Client::new(&daemon));
    let mut lane = a.lane(&daemon, 0);
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    for message in [
        Message::Release(vec![released(&lease, true); 2000]),
        Message::Release(vec![Release { segment: u64::MAX, generation: 0, tainted: false }]),
        Message::Unmap { segment: lease.extent.segment },
        Message::Unmap { segment: lane.segment },
        Message::Unmap { segment: u64::MAX },
        Message::Cancel { lane: 1, request: 1 },
    ] {
        b.raw.send_as(0, &message);
    }
    let mut b = b;
    for extent in [lease.extent, Extent { length: u64::MAX, ..lease.extent }] {
        for message in [
            Message::Ticket(extent),
            Message::Publish { extent, replace: true, name: "x".to_owned() },
            Message::Open(Target::Again(extent)),
        ] {
            assert_eq!(b.ask(&message).unwrap_err().code, ErrorCode::Gone);
        }
    }
    assert_eq!(a.stat()["leases"], 1);
    assert_eq!(lane.rows(&lease), 1);
    // Unmapping one's own window or result harms nobody else.
    a.raw.send_as(0, &Message::Unmap { segment: lane.segment });
    a.raw.send_as(0, &Message::Unmap { segment: lease.extent.segment });
    // The lane is read by another thread: an answer on the primary says that both were taken.
    a.stat();
    lane.releases.push(released(&lease, false));
    lane.fds.clear();
    let (again, _) = lane.quantize(&layer(4096)).unwrap();
    assert!(again.fd, "mapped anew");
    drop((a, b, lane));
    assert_well(&daemon);
}

#[test]
fn descriptors_and_long_or_empty_frames_do_no_harm() {
    let daemon = daemon(|_| {});
    // A file that nobody else has: other tests of this process open and close descriptors, too.
    let file = tempfile::NamedTempFile::new().unwrap();
    let copies = || {
        let links = std::fs::read_dir("/proc/self/fd").unwrap();
        let links = links.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        links.filter(|link| link == file.path()).count()
    };
    let mut observer = Client::new(&daemon);
    for _ in 0..50 {
        let mut client = Client::new(&daemon);
        client.raw.connection.send(&frame(&Message::Ping), &[file.as_file().as_fd(); 8]).unwrap();
        assert_eq!(client.raw.recv().unwrap().1, Message::Pong);
    }
    observer.await_stat(|s| s["sessions"] == 1);
    assert_eq!(copies(), 1);
    // A frame longer than any, which our own send refuses to make.
    let client = Client::new(&daemon);
    let long = vec![1u8; 100_000];
    let sent = nix::sys::socket::send(
        std::os::fd::AsRawFd::as_raw_fd(&client.raw.connection.as_fd()),
        &long,
        nix::sys::socket::MsgFlags::empty(),
    );
    assert_eq!(sent, Ok(long.len()));
    let mut raw = client.raw;
    raw.assert_protocol_error();
}

#[test]
fn who_does_not_read_is_disconnected() {
    let daemon = daemon(|_| {});
    let client = Client::new(&daemon);
    // Answers pile up until the socket is full; then the daemon ends it, and sending fails here.
    let ping = frame(&Message::Stat);
    loop {
        match client.raw.connection.send(&ping, &[]) {
            Ok(()) | Err(SocketError::PeerNotReading) => pause(),
            Err(SocketError::Closed) => break,
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_well(&daemon);
}

#[test]
fn stopping_with_everybody_at_work() {
    let daemon = daemon(|_| {});
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    lane.start(&layer(8 << 20));
    client.await_stat(|s| s["jobs"] == 1);
    let silent = Raw::new(&daemon);
    daemon.stop();
    client.raw.assert_closed();
    assert!(daemon.connect().is_err());
    // What was read before is still there to be read.
    assert_eq!(lane.rows(&lease), 1);
    drop(silent);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever bytes come after a greeting: the daemon answers or closes, and goes on serving.
    #[test]
    fn any_bytes(
        frames in proptest::collection::vec(
            (0u16..20, proptest::collection::vec(any::<u8>(), 0..200), any::<bool>(), 0usize..120), 1..6),
        on_lane in any::<bool>(),
    ) {
        thread_local! {
            static DAEMON: Daemon = daemon(|c| c.budget = Some(64 << 20));
        }
        DAEMON.with(|daemon| {
            let client = Client::new(daemon);
            let lane = on_lane.then(|| client.lane(daemon, 0));
            let connection: &Connection = lane.as_ref().map_or(&client.raw.connection, |l| &l.raw.connection);
            for (kind, body, tidy, fixed) in frames {
                let mut bytes = vec![0; 16];
                bytes.extend(body);
                if tidy {
                    let len = bytes.len() as u32;
                    bytes[0] = 1;
                    bytes[2..4].copy_from_slice(&kind.to_le_bytes());
                    bytes[4..8].copy_from_slice(&len.to_le_bytes());
                    let fixed = fixed.min(bytes.len() - 16) as u16;
                    bytes[12..14].copy_from_slice(&fixed.to_le_bytes());
                }
                if connection.send(&bytes, &[]).is_err() {
                    break;
                }
            }
            drop((lane, client));
            let mut observer = Client::new(daemon);
            observer.await_stat(|s| s["connections"] == 1 && s["jobs"] == 0 && s["bytes"] == 0);
        });
    }
}
