//! Whole sessions over real sockets: quantize, lease, recycle, share, end.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]

mod raw;

use raw::{Client, Lane, Raw, Table, daemon, layer, released, report, rows_of, table};
use shmquant_kernels::{Granularity, Scheme};
use shmquant_protocol::chunks::MIN_WINDOW;
use shmquant_protocol::message::{ErrorCode, Extent, Listing, Message, Naming, Target};
use shmquant_protocol::socket::Connection;

fn naming(name: &str, digest: u8, replace: bool) -> Option<Naming> {
    Some(Naming { name: name.to_owned(), replace, digest: [digest; 16] })
}

fn open(
    client: &mut Client,
    target: Target,
) -> Result<(shmquant_protocol::message::Lease, String), ErrorCode> {
    match client.ask(&Message::Open(target)) {
        Ok((Message::Opened { lease, name }, fd)) => {
            assert_eq!(lease.fd, fd.is_some());
            Ok((lease, name))
        }
        Ok(other) => panic!("{other:?}"),
        Err(e) => Err(e.code),
    }
}

#[test]
fn small_results_are_recycled_with_the_next_generation() {
    let daemon = daemon(|_| {});
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    let table = layer(4096);
    let (first, bytes) = lane.quantize(&table).unwrap();
    assert_eq!(report(&lane, bytes), [4096]);
    assert_eq!((lane.rows(&first), first.extent.generation, first.fd), (1, 1, true));
    let mut last = first;
    for generation in 2..=20 {
        // Released with the next request: same memory, no descriptor.
        lane.releases.push(released(&last, false));
        let (next, _) = lane.quantize(&table).unwrap();
        assert_eq!((next.extent.segment, next.extent.generation), (first.extent.segment, generation));
        assert!(!next.fd);
        assert_eq!(lane.rows(&next), 1);
        last = next;
    }
    let stat = client.stat();
    assert_eq!((&stat["recycled"], &stat["leases"], &stat["retired"]), (&19.into(), &1.into(), &0.into()));
    // The old generation is gone for good.
    assert_eq!(open(&mut client, Target::Again(first.extent)), Err(ErrorCode::Gone));
    let Message::Error(_) = Message::Error(Box::new(client.ask(&Message::Ticket(first.extent)).unwrap_err()))
    else {
        unreachable!()
    };
}

#[test]
fn large_tables_stream_through_the_window() {
    let daemon = daemon(|_| {});
    let client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    // Row-wise in one pass, and a whole-tensor range, which streams twice.
    for granularity in [Granularity::Row, Granularity::Tensor, Granularity::Group] {
        let table = table(Scheme::Int8, granularity, &[(3000, 1024), (17, 256), (2500, 512)]);
        let (lease, bytes) = lane.quantize(&table).unwrap();
        assert_eq!(report(&lane, bytes), [3000 * 1024, 17 * 256, 2500 * 512], "{granularity:?}");
        assert_eq!(lane.rows(&lease), 3);
        assert!(lane.consumed.len() > 1, "{granularity:?} was resident");
    }
}

#[test]
fn results_do_not_depend_on_threads_or_streaming() {
    let bytes_of = |workers: usize, window: u64| {
        let daemon = daemon(|c| c.workers = workers);
        let client = Client::new(&daemon);
        let mut lane = client.lane(&daemon, window);
        let table = table(Scheme::Int4, Granularity::Group, &[(1500, 1024), (3, 128)]);
        let (lease, _) = lane.quantize(&table).unwrap();
        let fd = &lane.fds[&lease.extent.segment];
        let mut bytes = vec![0; lease.extent.length as usize];
        let file = std::fs::File::from(fd.try_clone().unwrap());
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        bytes
    };
    let one = bytes_of(1, 64 << 20);
    assert!(one == bytes_of(4, 64 << 20), "threads change the result");
    assert!(one == bytes_of(3, MIN_WINDOW), "streaming changes the result");
}

#[test]
fn what_another_session_has_seen_is_never_used_again() {
    let daemon = daemon(|_| {});
    let (mut a, mut b) = (Client::new(&daemon), Client::new(&daemon));
    let mut lane = a.lane(&daemon, 0);
    let table = layer(4096);
    let (lease, _) = lane.quantize(&table).unwrap();
    let Message::Ticketed { ticket, secret } = a.ask(&Message::Ticket(lease.extent)).unwrap().0 else {
        panic!()
    };
    assert_eq!(open(&mut b, Target::Ticket(ticket, [9; 16])).err(), Some(ErrorCode::NotFound));
    let (opened, name) = open(&mut b, Target::Ticket(ticket, secret)).unwrap();
    assert_eq!((opened.extent, opened.fd, name.as_str()), (lease.extent, true, ""));
    assert_eq!(open(&mut b, Target::Ticket(ticket, secret)).err(), Some(ErrorCode::NotFound));
    a.release(&lease);
    b.release(&opened);
    // Both map it: both are asked to unmap it, and only then do its bytes count as free.
    let bytes = a.stat()["bytes"].as_u64().unwrap();
    assert_eq!(a.await_notice(), lease.extent.segment);
    assert_eq!(b.await_notice(), lease.extent.segment);
    a.raw.send_as(0, &Message::Unmap { segment: lease.extent.segment });
    assert_eq!(a.stat()["bytes"], bytes);
    b.raw.send_as(0, &Message::Unmap { segment: lease.extent.segment });
    b.await_stat(|s| s["bytes"].as_u64() == Some(bytes - lease.segment_size));
    let (next, _) = lane.quantize(&table).unwrap();
    assert_ne!(next.extent.segment, lease.extent.segment);
}

#[test]
fn a_ticket_outlives_its_sender_and_comes_home() {
    let daemon = daemon(|_| {});
    let mut observer = Client::new(&daemon);
    let (ticket, secret) = {
        let mut a = Client::new(&daemon);
        let mut lane = a.lane(&daemon, 0);
        let (lease, _) = lane.quantize(&layer(4096)).unwrap();
        match a.ask(&Message::Ticket(lease.extent)).unwrap().0 {
            Message::Ticketed { ticket, secret } => (ticket, secret),
            other => panic!("{other:?}"),
        }
    };
    observer.await_stat(|s| s["sessions"] == 1 && s["tickets"] == 1 && s["leases"] == 0);
    let (lease, _) = open(&mut observer, Target::Ticket(ticket, secret)).unwrap();
    observer.release(&lease);
    observer.await_stat(|s| s["bytes"] == 0 && s["segments"] == 0 && s["tickets"] == 0);
}

#[test]
fn tickets_of_ended_processes_are_counted_and_limited_together() {
    let daemon = daemon(|c| c.max_holds = 8);
    let mut observer = Client::new(&daemon);
    let mut sent = Vec::new();
    // Two make tickets of a result of their own and end: together they may leave as many as one session.
    for (round, tickets) in [(1, 3), (2, 6)] {
        let mut sender = Client::new(&daemon);
        let mut lane = sender.lane(&daemon, 0);
        let (lease, _) = lane.quantize(&layer(4096)).unwrap();
        for _ in 0..tickets {
            match sender.ask(&Message::Ticket(lease.extent)).unwrap().0 {
                Message::Ticketed { ticket, secret } => sent.push(Target::Ticket(ticket, secret)),
                other => panic!("{other:?}"),
            }
        }
        let stat = observer.await_stat(|s| s["tickets"] == sent.len());
        assert_eq!(stat["orphans"], sent.len() - tickets);
        drop((sender, lane));
        let stat = observer.await_stat(|s| s["sessions"] == 1 && s["orphans"] == sent.len().min(8));
        assert_eq!(stat["bytes_by_use"]["tickets"], round * lease.segment_size);
    }
    // The one more than that was the oldest of who left most.
    let stat = observer.stat();
    assert_eq!((&stat["tickets"], &stat["expired_tickets"]), (&8.into(), &1.into()));
    for (at, ticket) in sent.into_iter().enumerate() {
        let opened = open(&mut observer, ticket);
        assert_eq!(opened.is_ok(), at != 3, "ticket {at}");
        if let Ok((lease, _)) = opened {
            observer.release(&lease);
        }
    }
    observer.await_stat(|s| s["bytes"] == 0 && s["tickets"] == 0 && s["orphans"] == 0);
}

#[test]
fn a_ticket_to_oneself_leaves_the_memory_reusable() {
    let daemon = daemon(|_| {});
    let mut a = Client::new(&daemon);
    let mut lane = a.lane(&daemon, 0);
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    let Message::Ticketed { ticket, secret } = a.ask(&Message::Ticket(lease.extent)).unwrap().0 else {
        panic!()
    };
    a.release(&lease);
    let (again, _) = open(&mut a, Target::Ticket(ticket, secret)).unwrap();
    assert_eq!((again.extent, again.fd), (lease.extent, false));
    lane.releases = vec![released(&again, false)];
    let (next, _) = lane.quantize(&layer(4096)).unwrap();
    assert_eq!(next.extent.segment, lease.extent.segment);
}

#[test]
fn tickets_expire_and_take_only_their_own_hold() {
    let daemon = daemon(|c| c.ticket_ttl = std::time::Duration::ZERO);
    let mut a = Client::new(&daemon);
    let mut lane = a.lane(&daemon, 0);
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    a.ask(&Message::Ticket(lease.extent)).unwrap();
    let stat = a.await_stat(|s| s["tickets"] == 0);
    assert_eq!((&stat["expired_tickets"], &stat["leases"]), (&1.into(), &1.into()));
    assert_eq!(lane.rows(&lease), 1);
}

#[test]
fn a_tainted_release_retires() {
    let daemon = daemon(|_| {});
    let mut a = Client::new(&daemon);
    let mut lane = a.lane(&daemon, 0);
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    lane.releases = vec![released(&lease, true)];
    let (next, _) = lane.quantize(&layer(4096)).unwrap();
    assert_ne!(next.extent.segment, lease.extent.segment);
    assert_eq!(a.await_notice(), lease.extent.segment);
}

#[test]
fn holds_are_counted() {
    let daemon = daemon(|_| {});
    let mut a = Client::new(&daemon);
    let mut lane = a.lane(&daemon, 0);
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    let (again, _) = open(&mut a, Target::Again(lease.extent)).unwrap();
    assert!(again.fd, "asked for again");
    a.release(&lease);
    assert_eq!(a.stat()["leases"], 1);
    a.release(&lease);
    // One too many: nothing happens, except that it is counted.
    a.release(&lease);
    let stat = a.stat();
    assert_eq!((&stat["leases"], &stat["stray_releases"]), (&0.into(), &1.into()));
}

#[test]
fn names_are_made_once_shared_replaced_and_dropped() {
    let daemon = daemon(|_| {});
    let (mut a, mut b) = (Client::new(&daemon), Client::new(&daemon));
    let (mut one, mut two) = (a.lane(&daemon, 0), b.lane(&daemon, 0));
    let table = layer(4096);
    one.named = naming("m/int8", 1, false);
    let (made, bytes) = one.quantize(&table).unwrap();
    assert!(made.dataset && bytes > 0);
    // The same spec and source: the same dataset.
    two.named = naming("m/int8", 1, false);
    let (same, bytes) = two.quantize(&table).unwrap();
    assert_eq!((same.extent, same.dataset, same.fd, bytes), (made.extent, true, true, 0));
    // Another source.
    two.named = naming("m/int8", 2, false);
    assert_eq!(two.quantize(&table).unwrap_err().code, ErrorCode::NameExists);
    two.named = naming("m/int8", 2, true);
    let (replaced, _) = two.quantize(&table).unwrap();
    assert_ne!(replaced.extent.segment, made.extent.segment);
    // Old leases live on; the name shows the new one.
    assert_eq!(one.rows(&made), 1);
    let (opened, name) = open(&mut a, Target::Name("m/int8".to_owned())).unwrap();
    assert_eq!((opened.extent, name.as_str(), opened.dataset), (replaced.extent, "m/int8", true));
    let Message::Listed { entries, cursor: 0 } =
        a.ask(&Message::List { cursor: 0, what: Listing::Datasets }).unwrap().0
    else {
        panic!()
    };
    let entry: serde_json::Value = serde_json::from_str(&entries[0]).unwrap();
    assert_eq!((entries.len(), &entry["name"], &entry["state"]), (1, &"m/int8".into(), &"complete".into()));
    // Anybody of this user can map it by its path.
    let path = entry["path"].as_str().unwrap();
    let file = std::fs::File::open(path).unwrap();
    assert_eq!(rows_of(&file.into(), &opened), 1);
    a.ask(&Message::Drop { name: "m/int8".to_owned() }).unwrap();
    assert_eq!(a.ask(&Message::Drop { name: "m/int8".to_owned() }).unwrap_err().code, ErrorCode::NotFound);
    assert_eq!(open(&mut b, Target::Name("m/int8".to_owned())).err(), Some(ErrorCode::NotFound));
    // Still leased.
    assert_eq!(rows_of(&two.fds[&replaced.extent.segment], &replaced), 1);
}

#[test]
fn a_dataset_takes_no_more_than_its_own_size() {
    let daemon = daemon(|_| {});
    let client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    // A free segment that is larger waits in the pool.
    let (free, _) = lane.quantize(&layer(3 << 20)).unwrap();
    lane.releases.push(released(&free, false));
    lane.named = naming("small", 1, false);
    let (made, _) = lane.quantize(&layer(2 << 20)).unwrap();
    assert_ne!(made.extent.segment, free.extent.segment);
    assert!(made.segment_size - made.extent.length < 4096, "{made:?}");
}

#[test]
fn requests_for_one_name_at_a_time_give_one_dataset() {
    let daemon = daemon(|_| {});
    let observer = &mut Client::new(&daemon);
    let extents = std::thread::scope(|scope| {
        let ask = || {
            let client = Client::new(&daemon);
            let mut lane = client.lane(&daemon, MIN_WINDOW);
            lane.named = naming("big", 7, false);
            // What is streamed for nothing is ignored.
            let (lease, _) = lane.quantize(&layer(4 << 20)).unwrap();
            assert!(lease.dataset);
            lease.extent
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(extents.iter().all(|e| *e == extents[0]), "{extents:?}");
    observer.await_stat(|s| s["sessions"] == 1 && s["segments"] == 1 && s["datasets"] == 1);
}

#[test]
fn a_flight_that_fails_lets_the_next_one_try() {
    let daemon = daemon(|_| {});
    let (mut a, b) = (Client::new(&daemon), Client::new(&daemon));
    let (mut one, mut two) = (a.lane(&daemon, 0), b.lane(&daemon, 0));
    let mut faulty = layer(4 << 20);
    let good = layer(4 << 20);
    one.named = naming("x", 1, false);
    let flying = one.start(&faulty);
    a.await_stat(|s| s["jobs"] == 1);
    two.named = naming("x", 1, false);
    let waiting = two.start(&good);
    a.await_stat(|s| s["jobs"] == 2);
    faulty.values[0][5_000] = f32::NAN;
    // Its first chunk was written already; the next ones have a NaN only if it comes later: put it last.
    *faulty.values[0].last_mut().unwrap() = f32::NAN;
    assert_eq!(one.finish(flying, &faulty).unwrap_err().code, ErrorCode::InvalidInput);
    let (lease, bytes) = two.finish(waiting, &good).unwrap();
    assert!(lease.dataset && bytes > 0, "made by the one that waited");
}

#[test]
fn publishing_a_lease() {
    let daemon = daemon(|_| {});
    let mut a = Client::new(&daemon);
    let mut lane = a.lane(&daemon, 0);
    // Smaller ones would share a segment, and be copied.
    let (lease, _) = lane.quantize(&layer(40_000)).unwrap();
    let (other, _) = lane.quantize(&layer(80_000)).unwrap();
    let publish = |extent, replace| Message::Publish { extent, replace, name: "p".to_owned() };
    a.ask(&publish(lease.extent, false)).unwrap();
    a.ask(&publish(lease.extent, false)).unwrap();
    assert_eq!(a.ask(&publish(other.extent, false)).unwrap_err().code, ErrorCode::NameExists);
    let unknown = Extent { segment: 999, ..lease.extent };
    assert_eq!(a.ask(&publish(unknown, true)).unwrap_err().code, ErrorCode::Gone);
    a.ask(&publish(other.extent, true)).unwrap();
    a.release(&lease);
    assert_eq!(a.await_notice(), lease.extent.segment, "published once, never recycled");
    a.release(&other);
    assert_eq!(a.stat()["datasets"], 1);
    assert_eq!(open(&mut a, Target::Name("p".to_owned())).unwrap().0.extent, other.extent);
}

#[test]
fn the_end_of_a_session_gives_everything_back() {
    let daemon = daemon(|_| {});
    let mut observer = Client::new(&daemon);
    let before = observer.stat();
    for how in 0..4 {
        let mut client = Client::new(&daemon);
        let mut lane = client.lane(&daemon, 0);
        let (lease, _) = lane.quantize(&layer(4096)).unwrap();
        let (other, _) = lane.quantize(&layer(1 << 20)).unwrap();
        client.release(&lease);
        client.ask(&Message::Ping).unwrap();
        match how {
            0 => drop(client),
            1 => {
                client.raw.send_as(0, &Message::Bye);
                client.raw.assert_closed();
                lane.raw.assert_closed();
            }
            // In the middle of a stream.
            2 => {
                let big = layer(8 << 20);
                lane.start(&big);
                observer.await_stat(|s| s["jobs"] == 1);
                drop(client);
                assert!(lane.raw.recv().is_err() || lane.rows(&other) == 1);
            }
            _ => {
                drop(lane);
                observer.await_stat(|s| s["lanes"] == 0);
                drop(client);
            }
        }
        let after = observer.await_stat(|s| s["connections"] == 1 && s["segments"] == 0);
        for key in ["bytes", "segments", "sessions", "lanes", "leases", "tickets", "datasets", "jobs", "runs"]
        {
            assert_eq!(after[key], before[key], "{key} after {how}");
        }
    }
}

#[test]
fn cancelling_in_the_middle_of_a_stream() {
    let daemon = daemon(|_| {});
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    let big = layer(8 << 20);
    for on_the_lane in [true, false] {
        let running = lane.start(&big);
        let cancel = Message::Cancel { lane: lane.id, request: running.request };
        if on_the_lane {
            lane.raw.send_as(0, &cancel);
        } else {
            client.raw.send_as(0, &cancel);
            // The primary is read by another thread, which might come too late if the values went on at once.
            client.ask(&Message::Ping).unwrap();
        }
        assert_eq!(lane.finish(running, &big).unwrap_err().code, ErrorCode::Cancelled);
        // The lane goes on, and what the job had is there to use.
        let (lease, _) = lane.quantize(&layer(4096)).unwrap();
        lane.releases.push(released(&lease, false));
    }
    let stat = client.await_stat(|s| s["jobs"] == 0);
    assert_eq!((&stat["leases"], &stat["runs"]), (&1.into(), &0.into()));
    // A cancellation that overtakes its request is not lost.
    let next = lane.start(&layer(256)).request;
    lane.raw.recv().unwrap();
    client.raw.send_as(0, &Message::Cancel { lane: lane.id, request: next + 1 });
    client.ask(&Message::Ping).unwrap();
    let running = lane.start(&big);
    assert_eq!(running.request, next + 1);
    assert_eq!(lane.finish(running, &big).unwrap_err().code, ErrorCode::Cancelled);
}

#[test]
fn the_end_of_a_lane_ends_its_request_only() {
    let daemon = daemon(|_| {});
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    lane.start(&layer(8 << 20));
    let window = lane.segment;
    client.await_stat(|s| s["jobs"] == 1);
    drop(lane);
    // Its window is given up. A client that has unmapped it with the lane says so at once.
    assert_eq!(client.await_notice(), window);
    let charged = client.stat()["bytes"].as_u64().unwrap();
    client.raw.send_as(0, &Message::Unmap { segment: window });
    let done = |s: &serde_json::Value| s["bytes"].as_u64() == Some(charged - MIN_WINDOW);
    let stat = client.await_stat(|s| s["lanes"] == 0 && s["jobs"] == 0 && s["runs"] == 0 && done(s));
    assert_eq!(stat["leases"], 1);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    lane.releases.push(released(&lease, false));
    assert_eq!(lane.quantize(&layer(4096)).unwrap().0.extent.segment, lease.extent.segment);
}

#[test]
fn faults_in_the_data_are_told_with_their_place() {
    let daemon = daemon(|_| {});
    let client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    for n in [4096, 4 << 20] {
        let mut bad = layer(n);
        for at in [n as usize - 3, 700, 701] {
            bad.values[0][at] = f32::INFINITY;
        }
        let failure = lane.quantize(&bad).unwrap_err();
        assert_eq!((failure.code, failure.index, failure.count), (ErrorCode::InvalidInput, 700, 3));
        assert!(
            failure.message.contains("NaN or Inf at index 700 (3 in all, the first is inf)"),
            "{}",
            failure.message
        );
        assert_eq!(failure.column, "layer.0");
    }
    assert!(lane.quantize(&layer(4096)).is_ok());
}

#[test]
fn many_threads_of_many_sessions() {
    let daemon = daemon(|c| c.workers = 2);
    let mut observer = Client::new(&daemon);
    std::thread::scope(|scope| {
        for session in 0..3u64 {
            let daemon = &daemon;
            scope.spawn(move || {
                let client = Client::new(daemon);
                std::thread::scope(|scope| {
                    for lane in 0..3u64 {
                        let client = &client;
                        scope.spawn(move || {
                            let mut lane_client = client.lane(daemon, MIN_WINDOW);
                            for round in 0..6 {
                                let n = 256 << ((session + lane + round) % 5 * 3);
                                let table: Table = layer(n);
                                let (lease, bytes) = lane_client.quantize(&table).unwrap();
                                assert_eq!(report(&lane_client, bytes), [n]);
                                lane_client.releases.push(released(&lease, false));
                            }
                        });
                    }
                });
            });
        }
    });
    observer.await_stat(|s| s["connections"] == 1 && s["bytes"] == 0 && s["jobs"] == 0);
}

#[test]
fn an_address_is_served_and_a_dead_session_s_lanes_close() {
    let dir = tempfile::tempdir().unwrap();
    let address = dir.path().join("private/d.sock");
    let config = shmquant_daemon::Config { address: address.clone(), workers: 1, ..Default::default() };
    let daemon = shmquant_daemon::Daemon::start(config.clone()).unwrap();
    assert!(shmquant_daemon::Daemon::start(config).is_err(), "one daemon an address");
    let connect = || Raw::over(Connection::connect(&address).unwrap());
    let client = Client::over(connect());
    let mut lane = Lane::join(connect(), &client.welcome, 0).unwrap();
    assert!(lane.quantize(&layer(4096)).is_ok());
    drop(client);
    lane.raw.assert_closed();
    daemon.stop();
    assert!(Connection::connect(&address).is_err());
}
