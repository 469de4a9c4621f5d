//! Small results share a segment; each is still written once, held as long as it is wanted and never written again.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]

mod descriptors;
mod raw;

use std::collections::BTreeSet;
use std::fs::File;

use arrow_ipc::reader::FileReader;
use raw::{Client, Lane, daemon, layer, released};
use shmquant_protocol::chunks::MIN_WINDOW;
use shmquant_protocol::message::{ErrorCode, Extent, Lease, Listing, Message, NO_TIMEOUT, Purpose, Target};
use shmquant_protocol::segment::{Backing, Mapping};

/// A result's bytes as they are now.
fn bytes_of(lane: &Lane, lease: &Lease) -> Vec<u8> {
    use std::os::fd::AsFd;
    let fd = lane.fds[&lease.extent.segment].as_fd();
    let mapping = Mapping::read_only(fd, lease.segment_size, Backing::Memfd).unwrap();
    let mut bytes = vec![0; lease.extent.length as usize];
    // SAFETY: inside the mapping, which Mapping's size and the daemon's lease say; a leased result is not written.
    #[allow(unsafe_code, reason = "shared memory is read through its address")]
    unsafe {
        let at = mapping.as_ptr().add(lease.extent.offset as usize);
        std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), bytes.len());
    }
    bytes
}

fn opened(client: &mut Client, target: Target) -> Result<Lease, ErrorCode> {
    match client.ask(&Message::Open(target)) {
        Ok((Message::Opened { lease, .. }, _)) => Ok(lease),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.code),
    }
}

#[test]
fn thousands_of_live_results_take_few_segments() {
    let daemon = daemon(|_| {});
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    let before = client.stat();
    let descriptors = descriptors::of(&before);
    let mut held = Vec::new();
    for n in 0..3000 {
        let (lease, _) = lane.quantize(&layer(64 + n % 512)).unwrap();
        assert_eq!(lease.extent.offset % 64, 0);
        held.push((lease, bytes_of(&lane, &lease)));
    }
    let stat = client.stat();
    let more = |key: &str| stat[key].as_u64().unwrap() - before[key].as_u64().unwrap();
    assert_eq!(more("leases"), 3000);
    assert!(more("segments") <= 120, "{stat:#}");
    // The daemon's and this client's.
    assert_eq!(descriptors::of(&stat) as u64, descriptors as u64 + 2 * more("segments"), "{stat:#}");
    // Each has its own place, and is what it was.
    let mut places: Vec<Extent> = held.iter().map(|(lease, _)| lease.extent).collect();
    places.sort_by_key(|e| (e.segment, e.offset));
    assert!(
        places.windows(2).all(|w| w[0].segment != w[1].segment || w[0].offset + w[0].length <= w[1].offset)
    );
    for (lease, bytes) in &held {
        assert!(&bytes_of(&lane, lease) == bytes, "{lease:?} was written again");
    }
    // What nobody holds is used again as a whole, and not before.
    let kept = held.swap_remove(1500);
    for some in held.chunks(1000) {
        let list = some.iter().map(|(lease, _)| released(lease, false)).collect();
        client.raw.send_as(0, &Message::Release(list));
    }
    client.await_stat(|s| s["leases"] == 1);
    let generation = kept.0.extent.generation;
    for _ in 0..500 {
        let (lease, _) = lane.quantize(&layer(300)).unwrap();
        let same = lease.extent.segment == kept.0.extent.segment;
        assert!(
            !same || lease.extent.generation == generation && lease.extent.offset != kept.0.extent.offset
        );
        lane.releases.push(released(&lease, false));
        assert!(bytes_of(&lane, &kept.0) == kept.1);
    }
    assert!(client.stat()["recycled"].as_u64() > Some(0));
}

#[test]
fn what_another_session_maps_takes_nothing_new() {
    let daemon = daemon(|_| {});
    let (mut a, mut b) = (Client::new(&daemon), Client::new(&daemon));
    let mut lane = a.lane(&daemon, MIN_WINDOW);
    let (first, _) = lane.quantize(&layer(100)).unwrap();
    let (second, _) = lane.quantize(&layer(100)).unwrap();
    assert_eq!(first.extent.segment, second.extent.segment);
    let Message::Ticketed { ticket, secret } = a.ask(&Message::Ticket(second.extent)).unwrap().0 else {
        panic!()
    };
    let theirs = opened(&mut b, Target::Ticket(ticket, secret)).unwrap();
    assert_eq!(theirs.extent, second.extent);
    let (third, _) = lane.quantize(&layer(100)).unwrap();
    assert_ne!(third.extent.segment, first.extent.segment);
    // An extent that is none, in a segment that is held.
    for extent in [
        Extent { offset: 64, ..first.extent },
        Extent { length: first.extent.length - 8, ..first.extent },
        Extent { offset: u64::MAX, ..first.extent },
    ] {
        for message in [
            Message::Ticket(extent),
            Message::Publish { extent, replace: false, name: "x".to_owned() },
            Message::Open(Target::Again(extent)),
        ] {
            assert_eq!(a.ask(&message).unwrap_err().code, ErrorCode::Gone);
        }
    }
    // Both have to let go of all of it.
    a.release(&first);
    a.release(&second);
    b.release(&theirs);
    assert_eq!(a.await_notice(), first.extent.segment);
    assert_eq!(b.await_notice(), first.extent.segment);
}

#[test]
fn what_is_published_gets_a_segment_of_its_own() {
    let daemon = daemon(|_| {});
    let (mut a, mut b) = (Client::new(&daemon), Client::new(&daemon));
    let mut lane = a.lane(&daemon, MIN_WINDOW);
    lane.quantize(&layer(100)).unwrap();
    let (lease, _) = lane.quantize(&layer(200)).unwrap();
    assert!(lease.extent.offset > 0);
    let publish =
        |name: &str| Message::Publish { extent: lease.extent, replace: false, name: name.to_owned() };
    for _ in 0..2 {
        // Once more is the same.
        a.ask(&publish("x")).unwrap();
    }
    a.ask(&publish("y")).unwrap();
    let dataset = opened(&mut b, Target::Name("x".to_owned())).unwrap();
    assert!(dataset.dataset && dataset.extent.offset == 0 && dataset.extent.segment != lease.extent.segment);
    let Message::Listed { entries, .. } =
        a.ask(&Message::List { cursor: 0, what: Listing::Datasets }).unwrap().0
    else {
        panic!()
    };
    let paths: BTreeSet<String> = entries
        .iter()
        .map(|text| {
            serde_json::from_str::<serde_json::Value>(text).unwrap()["path"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(paths.len(), 2);
    for path in paths {
        // The whole segment is the file.
        let rows: usize = FileReader::try_new(File::open(path).unwrap(), None)
            .unwrap()
            .map(|b| b.unwrap().num_rows())
            .sum();
        assert_eq!(rows, 1);
    }
    for name in ["x", "y"] {
        a.ask(&Message::Drop { name: name.to_owned() }).unwrap();
    }
    b.release(&dataset);
    // Nothing but the two results and their segment is left.
    let segment = b.await_notice();
    b.raw.send_as(0, &Message::Unmap { segment });
    let stat = a.await_stat(|s| s["segments"] == 2);
    assert_eq!((&stat["leases"], &stat["datasets"]), (&2.into(), &0.into()));
}

#[test]
fn memory_is_made_ready_for_small_results_too() {
    let daemon = daemon(|_| {});
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    lane.raw.send(&Message::Allocate { bytes: 1000, purpose: Purpose::Warm, timeout: NO_TIMEOUT });
    assert!(matches!(lane.raw.recv().unwrap().1, Message::Allocated { .. }));
    let before = client.stat();
    lane.quantize(&layer(100)).unwrap();
    let after = client.stat();
    assert_eq!((&after["segments"], &after["recycled"]), (&before["segments"], &1.into()));
}

#[test]
fn a_copy_for_a_name_needs_room_like_anything_else() {
    let daemon = daemon(|c| {
        c.budget = Some(MIN_WINDOW + (256 << 10));
        c.pool_divisor = 1;
    });
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    let (lease, _) = lane.quantize(&layer(200)).unwrap();
    let publish = Message::Publish { extent: lease.extent, replace: false, name: "x".to_owned() };
    let error = client.ask(&publish).unwrap_err();
    assert_eq!(error.code, ErrorCode::NoRoom, "{error:?}");
    assert!(error.hint.contains("release them"), "{error:?}");
    let stat = client.stat();
    assert_eq!((&stat["datasets"], &stat["leases"], &stat["waiting"]), (&0.into(), &1.into(), &0.into()));
    // It is as before, and can be used.
    assert_eq!(lane.rows(&lease), 1);
    client.release(&lease);
}
