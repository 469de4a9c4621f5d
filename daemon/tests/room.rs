//! Admission: who gets memory, who waits, who is refused, and what they are told.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]

mod raw;

use std::time::{Duration, Instant};

use raw::{Client, daemon, layer, released};
use shmquant_protocol::message::{ErrorCode, Listing, Message, NO_TIMEOUT, Naming, Target};

const MIB: u64 = 1 << 20;

/// A budget with room for some windows of 4 MiB and some results of about 8 MiB.
fn budget(mib: u64) -> impl FnOnce(&mut shmquant_daemon::Config) {
    move |config| {
        config.budget = Some(mib * MIB);
        // Idle memory may be everything: what is measured here is taking it back.
        config.pool_divisor = 1;
    }
}

fn big() -> raw::Table {
    layer(8 * MIB)
}

#[test]
fn what_only_the_caller_could_free_is_refused_at_once() {
    let daemon = daemon(budget(30));
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    let (first, _) = lane.quantize(&big()).unwrap();
    let (second, _) = lane.quantize(&big()).unwrap();
    // No deadline: waiting would be for ever.
    let failure = lane.quantize(&big()).unwrap_err();
    assert_eq!(failure.code, ErrorCode::NoRoom);
    let size = (first.segment_size + second.segment_size) as f64 / MIB as f64;
    assert!(failure.message.contains(&format!("you hold 2 results, {size:.1} MiB, oldest ")), "{failure:?}");
    assert!(
        failure.message.contains("no room for ") && failure.message.contains("of 30.0 MiB"),
        "{failure:?}"
    );
    assert_eq!(failure.hint, format!("you hold 2 results, {size:.1} MiB: release them"));
    // The lane and what was there before are fine.
    lane.releases.push(released(&first, false));
    let (third, _) = lane.quantize(&big()).unwrap();
    assert_eq!(third.extent.segment, first.extent.segment);
    assert_eq!(client.stat()["refused"], 1);
}

#[test]
fn what_can_never_fit_is_refused_whoever_holds_what() {
    let daemon = daemon(budget(10));
    let client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    let failure = lane.quantize(&layer(32 * MIB)).unwrap_err();
    assert_eq!(failure.code, ErrorCode::NoRoom, "{failure:?}");
    assert!(lane.quantize(&layer(MIB)).is_ok());
}

#[test]
fn waiting_for_others_ends_with_their_release_or_the_deadline() {
    let daemon = daemon(budget(24));
    let (mut a, b) = (Client::new(&daemon), Client::new(&daemon));
    let (mut one, mut two) = (a.lane(&daemon, 0), b.lane(&daemon, 0));
    let (held, _) = one.quantize(&big()).unwrap();
    two.timeout = 50;
    let began = Instant::now();
    let failure = two.quantize(&big()).unwrap_err();
    assert!(began.elapsed() >= Duration::from_millis(50));
    assert_eq!(failure.code, ErrorCode::Deadline);
    let pid = std::process::id();
    assert!(failure.message.contains(&format!("process {pid} (")), "{failure:?}");
    assert!(
        failure.message.contains("holds 1 results, ") && failure.message.contains("waited "),
        "{failure:?}"
    );

    two.timeout = 20_000;
    let table = big();
    let running = two.start(&table);
    a.await_stat(|s| s["waiting"] == 1);
    // Released into a's pool, and taken back from there: a is asked to unmap it.
    a.release(&held);
    assert_eq!(a.await_notice(), held.extent.segment);
    assert_eq!(a.stat()["waiting"], 1, "not before a has answered");
    a.notices.push_back(held.extent.segment);
    a.answer_notices();
    let (lease, _) = two.finish(running, &table).unwrap();
    assert_eq!(two.rows(&lease), 1);
}

#[test]
fn idle_memory_of_the_dead_is_free_at_once() {
    let daemon = daemon(budget(24));
    let (mut observer, a) = (Client::new(&daemon), Client::new(&daemon));
    let mut one = a.lane(&daemon, 0);
    one.quantize(&big()).unwrap();
    let b = Client::new(&daemon);
    let mut two = b.lane(&daemon, 0);
    let table = big();
    let running = two.start(&table);
    observer.await_stat(|s| s["waiting"] == 1);
    drop(a);
    assert!(two.finish(running, &table).is_ok());
}

#[test]
fn a_waiting_request_can_be_cancelled_and_its_lane_can_end() {
    let daemon = daemon(budget(24));
    let (mut a, b) = (Client::new(&daemon), Client::new(&daemon));
    let (mut one, mut two) = (a.lane(&daemon, 0), b.lane(&daemon, 0));
    one.quantize(&big()).unwrap();
    let table = big();
    let running = two.start(&table);
    a.await_stat(|s| s["waiting"] == 1);
    b.raw.send_as(0, &Message::Cancel { lane: two.id, request: running.request });
    assert_eq!(two.finish(running, &table).unwrap_err().code, ErrorCode::Cancelled);
    a.await_stat(|s| s["waiting"] == 0);
    two.start(&table);
    a.await_stat(|s| s["waiting"] == 1);
    drop(two);
    a.await_stat(|s| s["waiting"] == 0 && s["jobs"] == 0 && s["lanes"] == 1);
}

#[test]
fn small_requests_pass_a_long_queue() {
    let daemon = daemon(budget(32));
    let (mut a, b, c) = (Client::new(&daemon), Client::new(&daemon), Client::new(&daemon));
    let (mut one, mut two, mut three) = (a.lane(&daemon, 0), b.lane(&daemon, 0), c.lane(&daemon, 0));
    let (held, _) = one.quantize(&layer(14 * MIB)).unwrap();
    let table = layer(14 * MIB);
    let running = two.start(&table);
    a.await_stat(|s| s["waiting"] == 1);
    for _ in 0..4 {
        three.quantize(&layer(64 << 10)).unwrap();
    }
    a.release(&held);
    a.await_stat(|s| s["waiting"] == 0);
    assert!(two.finish(running, &table).is_ok());
}

#[test]
fn a_window_does_not_wait_for_results_of_its_own_session() {
    let daemon = daemon(budget(32));
    let (mut a, b) = (Client::new(&daemon), Client::new(&daemon));
    let (mut one, mut two) = (a.lane(&daemon, 0), b.lane(&daemon, 0));
    let (held, _) = one.quantize(&layer(14 * MIB)).unwrap();
    let table = layer(14 * MIB);
    let running = two.start(&table);
    a.await_stat(|s| s["waiting"] == 1);
    // Another thread of the process that waits: there is room for its window, and for what it asks.
    let mut three = b.lane(&daemon, 0);
    three.quantize(&layer(64 << 10)).unwrap();
    assert_eq!(a.stat()["waiting"], 1);
    drop(three);
    a.release(&held);
    a.await_stat(|s| s["waiting"] == 0);
    assert!(two.finish(running, &table).is_ok());
}

#[test]
fn a_dataset_waits_behind_earlier_results_of_its_own_session() {
    let daemon = daemon(budget(40));
    let mut holder = Client::new(&daemon);
    let mut lane = holder.lane(&daemon, 0);
    let (held, _) = lane.quantize(&layer(12 * MIB)).unwrap();
    let mut client = Client::new(&daemon);
    let (mut one, mut two) = (client.lane(&daemon, 0), client.lane(&daemon, 0));
    let large = layer(20 * MIB);
    let first = one.start(&large);
    client.await_stat(|s| s["waiting"] == 1);
    // There is room for it, but then the first one would have to wait for it, too.
    two.named = Some(Naming { name: "later".to_owned(), replace: false, digest: [1; 16] });
    two.timeout = 50;
    assert_eq!(two.quantize(&layer(2 * MIB)).unwrap_err().code, ErrorCode::Deadline);
    two.timeout = NO_TIMEOUT;
    let table = layer(2 * MIB);
    let second = two.start(&table);
    client.await_stat(|s| s["waiting"] == 2);
    holder.release(&held);
    assert_eq!(holder.await_notice(), held.extent.segment);
    holder.raw.send_as(0, &Message::Unmap { segment: held.extent.segment });
    assert!(one.finish(first, &large).is_ok() && two.finish(second, &table).is_ok());
}

#[test]
fn sessions_take_turns() {
    let daemon = daemon(budget(38));
    let mut holder = Client::new(&daemon);
    let mut lane = holder.lane(&daemon, 0);
    let (held, _) = lane.quantize(&layer(10 * MIB)).unwrap();
    // One session queues twice before another one queues once.
    let (mut a, mut b) = (Client::new(&daemon), Client::new(&daemon));
    let (mut a1, mut a2, mut b1) = (a.lane(&daemon, 0), a.lane(&daemon, 0), b.lane(&daemon, 0));
    let table = layer(10 * MIB);
    let first = a1.start(&table);
    holder.await_stat(|s| s["waiting"] == 1);
    let second = a2.start(&table);
    holder.await_stat(|s| s["waiting"] == 2);
    let third = b1.start(&table);
    holder.await_stat(|s| s["waiting"] == 3);
    holder.release(&held);
    holder.await_stat(|s| s["waiting"] == 2);
    let (lease, _) = a1.finish(first, &table).unwrap();
    // The other session's turn, although the second request of the first one came before.
    a.release(&lease);
    assert_eq!(a.await_notice(), lease.extent.segment);
    a.raw.send_as(0, &Message::Unmap { segment: lease.extent.segment });
    let (lease, _) = b1.finish(third, &table).unwrap();
    assert_eq!(holder.stat()["waiting"], 1);
    b.release(&lease);
    assert_eq!(b.await_notice(), lease.extent.segment);
    b.raw.send_as(0, &Message::Unmap { segment: lease.extent.segment });
    assert!(a2.finish(second, &table).is_ok());
}

#[test]
fn who_waits_takes_what_its_own_session_lets_go() {
    let daemon = daemon(|config| {
        budget(28)(config);
        // However late this thread comes to let go: a busy machine may take longer than the usual time.
        config.grace = Duration::from_secs(3600);
    });
    let mut client = Client::new(&daemon);
    let (mut one, mut two) = (client.lane(&daemon, 0), client.lane(&daemon, 0));
    let (held, _) = one.quantize(&layer(10 * MIB)).unwrap();
    let table = layer(10 * MIB);
    let running = two.start(&table);
    client.await_stat(|s| s["waiting"] == 1);
    // Another thread of the process lets go within the time that several lanes are given.
    client.release(&held);
    let (lease, _) = two.finish(running, &table).unwrap();
    assert_eq!(lease.extent.segment, held.extent.segment);
}

#[test]
fn who_waits_for_its_own_session_is_refused_when_nothing_comes() {
    let daemon = daemon(budget(28));
    let client = Client::new(&daemon);
    let (mut one, mut two) = (client.lane(&daemon, 0), client.lane(&daemon, 0));
    one.quantize(&layer(10 * MIB)).unwrap();
    let asked = Instant::now();
    assert_eq!(two.quantize(&layer(10 * MIB)).unwrap_err().code, ErrorCode::NoRoom);
    assert!(asked.elapsed() >= shmquant_daemon::Config::default().grace);
}

#[test]
fn datasets_are_named_as_what_takes_the_room() {
    let daemon = daemon(budget(20));
    let client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    lane.named = Some(Naming { name: "big".to_owned(), replace: false, digest: [1; 16] });
    let (lease, _) = lane.quantize(&big()).unwrap();
    lane.releases.push(released(&lease, false));
    let failure = lane.quantize(&big()).unwrap_err();
    assert_eq!(failure.code, ErrorCode::NoRoom);
    assert!(failure.message.contains("datasets take 8.1 MiB"), "{failure:?}");
    assert!(failure.hint.contains("q.drop(name)"), "{failure:?}");
}

#[test]
fn tickets_that_nobody_opened_are_named_as_what_takes_the_room() {
    let daemon = daemon(budget(24));
    let mut sender = Client::new(&daemon);
    let mut lane = sender.lane(&daemon, 0);
    let (lease, _) = lane.quantize(&big()).unwrap();
    let Message::Ticketed { ticket, secret } = sender.ask(&Message::Ticket(lease.extent)).unwrap().0 else {
        panic!()
    };
    drop((sender, lane));
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    client.await_stat(|s| s["orphans"] == 1 && s["sessions"] == 1);
    lane.timeout = 50;
    let failure = lane.quantize(&layer(14 * MIB)).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Deadline, "somebody may open it in time");
    let text = "tickets that nobody has opened hold 1 results, ";
    assert!(failure.message.contains(text) && failure.hint.contains("pickled"), "{failure:?}");
    // Opened and released, it makes room for who waits.
    lane.timeout = NO_TIMEOUT;
    let table = layer(14 * MIB);
    let running = lane.start(&table);
    client.await_stat(|s| s["waiting"] == 1);
    let mut receiver = Client::new(&daemon);
    match receiver.ask(&Message::Open(Target::Ticket(ticket, secret))).unwrap().0 {
        Message::Opened { lease, .. } => receiver.release(&lease),
        other => panic!("{other:?}"),
    }
    assert_eq!(receiver.await_notice(), lease.extent.segment);
    receiver.notices.push_back(lease.extent.segment);
    receiver.answer_notices();
    assert!(lane.finish(running, &table).is_ok());
}

/// It is not disconnected: what it maps is in use, stopped or not. Others get what is left, and are told who has the rest.
#[test]
fn who_never_unmaps_keeps_its_memory_and_is_named() {
    let daemon = daemon(budget(40));
    let silent = Client::new(&daemon);
    let mut lane = silent.lane(&daemon, 0);
    let mut sizes = 0;
    for _ in 0..2 {
        let (lease, _) = lane.quantize(&big()).unwrap();
        lane.releases.push(released(&lease, true));
        sizes += lease.segment_size;
    }
    // With the last request both have been given back, tainted: they are retired, and it never says UNMAP.
    lane.quantize(&layer(256)).unwrap();
    let neighbour = Client::new(&daemon);
    let mut other = neighbour.lane(&daemon, 0);
    let mut observer = Client::new(&daemon);
    assert_eq!(observer.stat()["bytes_by_use"]["leaving"], sizes);
    for _ in 0..3 {
        let (lease, _) = other.quantize(&big()).unwrap();
        other.releases.push(released(&lease, false));
    }
    other.timeout = 50;
    let failure = other.quantize(&layer(20 * MIB)).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Deadline);
    let text =
        format!("process {} still has to unmap {:.1} MiB", std::process::id(), sizes as f64 / MIB as f64);
    assert!(failure.message.contains(&text), "{failure:?}");
    // Whoever waits for it gets it with its end.
    other.timeout = NO_TIMEOUT;
    let table = layer(20 * MIB);
    let running = other.start(&table);
    observer.await_stat(|s| s["waiting"] == 1);
    drop((silent, lane));
    assert!(other.finish(running, &table).is_ok());
}

#[test]
fn idle_memory_decays() {
    let daemon = daemon(|c| c.pool_idle = Duration::ZERO);
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    let before = client.stat()["bytes"].as_u64().unwrap();
    client.release(&lease);
    client.await_stat(|s| s["bytes"].as_u64() == Some(before - lease.segment_size));
}

#[test]
fn a_pool_is_capped() {
    let daemon = daemon(|c| {
        c.budget = Some(40 * MIB);
        c.pool_divisor = 4;
    });
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    let (a, _) = lane.quantize(&layer(7 * MIB)).unwrap();
    let (b, _) = lane.quantize(&layer(7 * MIB)).unwrap();
    client.release(&a);
    client.release(&b);
    // Only one of them fits into a quarter of the budget: the older one goes.
    assert_eq!(client.await_notice(), a.extent.segment);
    let stat = client.stat();
    assert_eq!(stat["bytes_by_use"]["pools"], b.segment_size);
}

#[test]
fn lists_say_who_holds_what() {
    let daemon = daemon(|_| {});
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    let mut list = |what| match client.ask(&Message::List { cursor: 0, what }).unwrap().0 {
        Message::Listed { cursor: 0, entries } => {
            let parsed = entries.iter().map(|e| serde_json::from_str::<serde_json::Value>(e).unwrap());
            parsed.collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    let results = list(Listing::Results);
    assert_eq!(results.len(), 1);
    assert_eq!(results[0]["segment"], lease.extent.segment);
    assert_eq!(results[0]["holders"], serde_json::json!([std::process::id()]));
    assert_eq!(list(Listing::Inputs), Vec::<serde_json::Value>::new());
    let sessions = list(Listing::Sessions);
    assert_eq!((sessions.len(), &sessions[0]["results"], &sessions[0]["lanes"]), (1, &1.into(), &1.into()));
    assert_eq!(sessions[0]["pid"], std::process::id());
    assert!(sessions[0]["command"].as_str().unwrap().contains("room"));
}

#[test]
fn long_lists_come_in_pages() {
    let daemon = daemon(|_| {});
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    let name = |i: usize| format!("{i:04}{}", "\u{1}".repeat(600));
    for i in 0..60 {
        client.ask(&Message::Publish { extent: lease.extent, replace: false, name: name(i) }).unwrap();
    }
    let (mut cursor, mut pages, mut names) = (0, 0, Vec::new());
    loop {
        let list = Message::List { cursor, what: Listing::Datasets };
        let Message::Listed { cursor: next, entries } = client.ask(&list).unwrap().0 else { panic!() };
        names.extend(entries.iter().map(|e| {
            serde_json::from_str::<serde_json::Value>(e).unwrap()["name"].as_str().unwrap().to_owned()
        }));
        pages += 1;
        cursor = next;
        if next == 0 {
            break;
        }
    }
    assert!(pages > 1);
    assert_eq!(names, (0..60).map(name).collect::<Vec<_>>());
}
