//! What a client makes of a daemon that stumbles, stalls or lies: a typed error, never a hang or a wrong byte.

mod peer;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use peer::{call, done, large, lease, result, session, small, write};
use shmquant_protocol::chunks::{ChunkList, MIN_RING, MIN_WINDOW};
use shmquant_protocol::client::{ClientError, Options, Source};
use shmquant_protocol::message::{ErrorCode, Failure, Lease, Message, Release, Target};

#[test]
fn an_end_before_the_answer_to_hello_means_another_try() {
    let (session, daemon) = session();
    let connecting = std::thread::spawn(move || session.connect());
    drop(daemon.accept());
    let second = daemon.accept();
    let (request, _) = second.hear();
    let stopping = Failure::new(ErrorCode::Stopping, "going down", "");
    second.say(request, &Message::Error(Box::new(stopping)), &[]);
    let _third = daemon.primary();
    assert_eq!(connecting.join().unwrap().unwrap().version, "9.9.9");
}

#[test]
fn a_small_table_is_in_the_window_before_the_request_and_its_hold_comes_back() {
    let (session, daemon) = session();
    let running = call(&session, small(), Some(Duration::from_secs(3600)));
    let primary = daemon.primary();
    let lane = daemon.lane();
    let (request, quantize) = lane.hear_quantize();
    assert_eq!((quantize.ready, quantize.releases.len()), (1, 0));
    // What is left of it, on a machine that may have been busy for a minute.
    assert!((3_540_000..=3_600_000).contains(&quantize.timeout), "{}", quantize.timeout);
    let segment = result(11, 1);
    lane.say(request, &done(lease(11, 1, true)), &[segment.fd()]);
    let held = running.join().unwrap().unwrap().held;
    assert!(held.as_slice().iter().all(|b| *b == 1) && held.len() == 1000);
    assert_eq!(held.segment_name(), "shmquant.00000000000000fa.result.11");
    assert_eq!(held.mapping().unwrap().as_ptr().wrapping_add(64), held.as_ptr());
    drop(held);
    let list = primary.hear_releases(1);
    assert_eq!(list, [Release { segment: 11, generation: 1, tainted: false }]);

    // The same segment again, without its descriptor: the mapping was kept.
    let running = call(&session, small(), None);
    let (request, quantize) = lane.hear_quantize();
    assert_eq!(quantize.timeout, u32::MAX);
    write(&segment, 2);
    lane.say(request, &done(lease(11, 2, false)), &[]);
    let held = running.join().unwrap().unwrap().held;
    assert!(held.as_slice().iter().all(|b| *b == 2));
    drop(held);
    let running = call(&session, small(), None);
    // Taken along, or sent before by the housekeeping thread if that was faster.
    let (request, quantize) = lane.hear_quantize();
    let list = if quantize.releases.is_empty() { primary.hear_releases(1) } else { quantize.releases };
    assert_eq!(list, [Release { segment: 11, generation: 2, tainted: false }]);

    // A generation that has passed.
    lane.say(request, &done(lease(11, 1, false)), &[]);
    let error = running.join().unwrap().unwrap_err();
    assert!(matches!(&error, ClientError::Protocol(text) if text.contains("generation 2")), "{error}");
    assert!(primary.has_ended() && lane.has_ended());
}

#[test]
fn leases_that_do_not_fit_their_segment_are_refused() {
    let wrong = |change: fn(&mut Lease)| {
        let mut lease = lease(12, 1, true);
        change(&mut lease);
        lease
    };
    for (lease, text) in [
        (wrong(|l| l.extent.length = 8192), "which has 8192"),
        (wrong(|l| l.extent.offset = u64::MAX - 5), "which has 8192"),
        (wrong(|l| l.segment_size = 1 << 40), "holds 8192 bytes"),
        (wrong(|l| l.segment_size = 1 << 63), "cannot exist"),
    ] {
        let (session, daemon) = session();
        let running = call(&session, small(), None);
        let _primary = daemon.primary();
        let lane = daemon.lane();
        let (request, _) = lane.hear_quantize();
        let segment = result(12, 1);
        lane.say(request, &done(lease), &[segment.fd()]);
        let error = running.join().unwrap().unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn a_ring_that_was_advised_is_used_from_the_next_request_on() {
    let (session, daemon) = session();
    let running = call(&session, large(), None);
    let _primary = daemon.primary();
    let lane = daemon.lane();
    let segment = result(12, 1);
    let advice = |fd, generation, ring| Message::Done { lease: lease(12, generation, fd), report: 0, ring };
    let (request, quantize) = lane.hear_quantize();
    assert_eq!(quantize.ring, 0);
    lane.say(request, &advice(true, 1, MIN_RING), &[segment.fd()]);
    running.join().unwrap().unwrap();

    // What takes no round in the window changes nothing.
    let running = call(&session, small(), None);
    let (request, quantize) = lane.hear_quantize();
    assert_eq!(quantize.ring, MIN_RING);
    lane.say(request, &advice(false, 2, 0), &[]);
    running.join().unwrap().unwrap();

    let running = call(&session, large(), None);
    let (request, quantize) = lane.hear_quantize();
    assert_eq!((quantize.ring, quantize.ready), (MIN_RING, 0));
    let source = large();
    let list = ChunkList::with_ring(source.descriptor(), quantize.descriptor, MIN_WINDOW, quantize.ring);
    let most = list.writable(0);
    assert!(most < ChunkList::new(source.descriptor(), quantize.descriptor, MIN_WINDOW).writable(0));
    let mut wrote = 0;
    while wrote < most {
        let (_, Message::Wrote { chunks }) = lane.hear() else { panic!("not a WROTE") };
        wrote = chunks as usize;
    }
    assert_eq!(wrote, most);
    // Too small for a chunk.
    lane.say(request, &advice(false, 3, MIN_RING - 64), &[]);
    let error = running.join().unwrap().unwrap_err();
    assert!(matches!(&error, ClientError::Protocol(text) if text.contains("ring of 2097088")), "{error}");
}

#[test]
fn a_descriptor_that_could_shrink_is_not_mapped() {
    let (session, daemon) = session();
    let running = call(&session, small(), None);
    let primary = daemon.primary();
    let lane = daemon.lane();
    let (request, _) = lane.hear_quantize();
    let file = tempfile::tempfile().unwrap();
    file.set_len(8192).unwrap();
    lane.say(request, &done(lease(13, 1, true)), &[file.as_fd()]);
    let error = running.join().unwrap().unwrap_err();
    assert!(matches!(error, ClientError::Segment(_)), "{error}");
    // The hold is not kept.
    assert_eq!(primary.hear_releases(1)[0].segment, 13);
}

#[test]
fn a_lost_descriptor_is_asked_for_again_and_its_second_hold_given_back() {
    let (session, daemon) = session();
    let running = call(&session, small(), None);
    let primary = daemon.primary();
    let lane = daemon.lane();
    let (request, _) = lane.hear_quantize();
    lane.say(request, &done(lease(14, 3, true)), &[]);
    let (request, message) = primary.hear();
    assert_eq!(message, Message::Open(Target::Again(lease(14, 3, true).extent)));
    // Its lane was free, and its descriptor is room for another.
    assert!(lane.has_ended());
    let segment = result(14, 9);
    let opened = Message::Opened { lease: lease(14, 3, true), name: String::new() };
    primary.say(request, &opened, &[segment.fd()]);
    let held = running.join().unwrap().unwrap().held;
    assert_eq!(primary.hear_releases(1), [Release { segment: 14, generation: 3, tainted: false }]);
    assert!(held.as_slice().iter().all(|b| *b == 9));
    drop(held);
    assert_eq!(primary.hear_releases(1).len(), 1);
}

#[test]
fn a_refusal_in_the_middle_of_the_values_ends_the_call_and_not_the_lane() {
    let (session, daemon) = session();
    let mut peers = None;
    for round in 0..2 {
        let running = call(&session, large(), None);
        let (_, lane) = &*peers.get_or_insert_with(|| (daemon.primary(), daemon.lane()));
        let (request, quantize) = lane.hear_quantize();
        assert_eq!(quantize.ready, 0);
        let (_, first) = lane.hear();
        assert!(matches!(first, Message::Wrote { chunks: 1.. }), "{first:?}");
        let mut failure = Failure::new(ErrorCode::NoRoom, "no room for 9 bytes", "wait");
        failure.row = round;
        lane.say(request, &Message::Error(Box::new(failure)), &[]);
        let error = running.join().unwrap().unwrap_err();
        assert!(matches!(&error, ClientError::Refused(f) if f.row == round), "{error}");
        assert_eq!(error.to_string(), "no room for 9 bytes\nhint: wait");
        assert_eq!(error.code(), Some(ErrorCode::NoRoom));
    }
}

#[test]
fn consumed_beyond_what_was_written_is_a_breach() {
    let (session, daemon) = session();
    let running = call(&session, large(), None);
    let primary = daemon.primary();
    let lane = daemon.lane();
    let (request, _) = lane.hear_quantize();
    lane.say(request, &Message::Consumed { chunks: 16 }, &[]);
    let error = running.join().unwrap().unwrap_err();
    assert!(matches!(&error, ClientError::Protocol(text) if text.contains("CONSUMED 16")), "{error}");
    assert!(lane.has_ended() && primary.has_ended());
}

#[test]
fn the_window_is_filled_to_its_end_and_again_as_it_is_consumed() {
    let (session, daemon) = session();
    let running = call(&session, large(), None);
    let _primary = daemon.primary();
    let lane = daemon.lane();
    let (request, _) = lane.hear_quantize();
    let mut written = 0;
    // 16 chunks of 1 MiB go through a ring that holds three beside the descriptor.
    while written < 16 {
        let (r, message) = lane.hear();
        let Message::Wrote { chunks } = message else { panic!("{message:?}") };
        assert!(r == request && chunks > written && chunks <= written + 3, "{chunks} after {written}");
        if chunks % 3 == 0 || chunks == 16 {
            lane.say(request, &Message::Consumed { chunks }, &[]);
        }
        written = chunks;
    }
    let segment = result(15, 4);
    lane.say(request, &done(lease(15, 1, true)), &[segment.fd()]);
    assert_eq!(running.join().unwrap().unwrap().held.as_slice()[999], 4);
}

#[test]
fn a_silent_daemon_is_cancelled_at_the_deadline_on_the_primary() {
    let (session, daemon) = session();
    // A call without a deadline makes the connections: of the second one's time nothing is spent on them.
    let running = call(&session, small(), None);
    let primary = daemon.primary();
    let lane = daemon.lane();
    let (request, _) = lane.hear_quantize();
    let refused = Failure::new(ErrorCode::Unsupported, "not today", "");
    lane.say(request, &Message::Error(Box::new(refused)), &[]);
    assert!(running.join().unwrap().is_err());
    let running = call(&session, small(), Some(Duration::from_secs(1)));
    let (request, _) = lane.hear_quantize();
    assert_eq!(primary.hear(), (0, Message::Cancel { lane: 3, request }));
    let failure = Failure::new(ErrorCode::Cancelled, "cancelled", "");
    lane.say(request, &Message::Error(Box::new(failure)), &[]);
    let error = running.join().unwrap().unwrap_err();
    assert!(matches!(error, ClientError::Deadline { timeout } if timeout.as_secs() == 1), "{error}");
}

#[test]
fn an_interrupted_stream_is_cancelled_on_its_lane_and_a_late_result_is_given_back() {
    let (session, daemon) = session();
    let stop = Arc::new(AtomicBool::new(false));
    let running = {
        let (session, stop) = (session.clone(), stop.clone());
        std::thread::spawn(move || {
            let interrupted = || stop.load(Ordering::SeqCst);
            let options = Options { interrupted: Some(&interrupted), ..Options::default() };
            session.quantize(&large(), &options)
        })
    };
    let primary = daemon.primary();
    let lane = daemon.lane();
    let (request, _) = lane.hear_quantize();
    stop.store(true, Ordering::SeqCst);
    loop {
        match lane.hear() {
            (_, Message::Wrote { .. }) => {}
            (r, message) => {
                assert_eq!((r, message), (request, Message::Cancel { lane: 3, request }));
                break;
            }
        }
    }
    let segment = result(16, 4);
    lane.say(request, &done(lease(16, 1, true)), &[segment.fd()]);
    assert!(matches!(running.join().unwrap(), Err(ClientError::Cancelled)));
    assert_eq!(primary.hear_releases(1)[0].segment, 16);
}

#[test]
fn unmap_waits_for_the_last_view() {
    let (session, daemon) = session();
    let running = call(&session, small(), None);
    let primary = daemon.primary();
    let lane = daemon.lane();
    let (request, _) = lane.hear_quantize();
    let segment = result(17, 4);
    lane.say(request, &done(lease(17, 1, true)), &[segment.fd()]);
    let held = running.join().unwrap().unwrap().held;
    primary.say(0, &Message::Unmap { segment: 17 }, &[]);
    primary.say(0, &Message::Unmap { segment: 99 }, &[]);
    // The segment that it never had is answered at once, the other one is still read.
    assert_eq!(primary.hear(), (0, Message::Unmap { segment: 99 }));
    assert!(held.as_slice().iter().all(|b| *b == 4));
    drop(held);
    let mut seen = vec![primary.hear().1, primary.hear().1];
    seen.sort_by_key(|m| matches!(m, Message::Unmap { .. }));
    assert!(matches!(&seen[0], Message::Release(list) if list.len() == 1), "{seen:?}");
    assert_eq!(seen[1], Message::Unmap { segment: 17 });
}

#[test]
fn a_result_outlives_its_daemon_and_its_session() {
    let (session, daemon) = session();
    let running = call(&session, small(), None);
    let primary = daemon.primary();
    let lane = daemon.lane();
    let (request, _) = lane.hear_quantize();
    {
        let segment = result(18, 6);
        lane.say(request, &done(lease(18, 1, true)), &[segment.fd()]);
    }
    let held = running.join().unwrap().unwrap().held;
    // The daemon dies with a request running.
    let running = call(&session, small(), None);
    lane.hear_quantize();
    drop((primary, lane));
    assert!(matches!(running.join().unwrap(), Err(ClientError::Lost { .. })));
    assert!(held.as_slice().iter().all(|b| *b == 6));

    // The next call connects anew; the old result cannot be passed on there.
    let other = session.clone();
    let asked = std::thread::spawn(move || other.ping());
    let primary = daemon.primary();
    let (request, message) = primary.hear();
    assert_eq!(message, Message::Ping);
    primary.say(request, &Message::Pong, &[]);
    asked.join().unwrap().unwrap();
    assert!(matches!(session.ticket(&held), Err(ClientError::OtherSession { .. })));
    drop(session);
    assert!(primary.has_ended());
    assert!(held.as_slice().iter().all(|b| *b == 6));
}

#[test]
fn a_session_whose_owner_is_gone_ends_with_its_last_hold() {
    let (session, daemon) = session();
    let running = call(&session, small(), None);
    let primary = daemon.primary();
    let lane = daemon.lane();
    let (request, _) = lane.hear_quantize();
    let segment = result(19, 6);
    lane.say(request, &done(lease(19, 1, true)), &[segment.fd()]);
    let held = running.join().unwrap().unwrap().held;
    drop(session);
    assert!(lane.has_ended());
    drop(held);
    assert_eq!(primary.hear_releases(1)[0].segment, 19);
    assert_eq!(primary.hear(), (0, Message::Bye));
    assert!(primary.has_ended());
}

#[test]
fn a_closed_session_says_so() {
    let (session, daemon) = session();
    let connecting = session.clone();
    let connecting = std::thread::spawn(move || connecting.connect());
    let primary = daemon.primary();
    connecting.join().unwrap().unwrap();
    session.close();
    assert_eq!(primary.hear(), (0, Message::Bye));
    assert!(matches!(session.ping(), Err(ClientError::Closed)));
}

#[test]
fn hundreds_of_holds_go_back_in_few_frames() {
    let (session, daemon) = session();
    let connecting = session.clone();
    let connecting = std::thread::spawn(move || connecting.connect());
    let primary = daemon.primary();
    connecting.join().unwrap().unwrap();
    let segment = result(21, 6);
    let opening = session.clone();
    let opened =
        std::thread::spawn(move || (0..3000).map(|_| opening.open("set").unwrap()).collect::<Vec<_>>());
    for i in 0..3000 {
        let (request, message) = primary.hear();
        assert_eq!(message, Message::Open(Target::Name("set".to_owned())));
        let lease = Lease { dataset: true, ..lease(21, 1, i == 0) };
        let fds = [segment.fd()];
        primary.say(request, &Message::Opened { lease, name: "set".to_owned() }, &fds[..usize::from(i == 0)]);
    }
    let held = opened.join().unwrap();
    assert!(held.iter().all(|h| h.is_dataset() && h.name() == Some("set") && !h.created()));
    drop(held);
    let list = primary.hear_releases(3000);
    assert_eq!(list.len(), 3000);
}
