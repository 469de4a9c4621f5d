//! Inputs in the hands of clients that give them back too early, name what is not theirs, or write while they are read.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]
#![allow(unsafe_code, reason = "values are written into shared memory, and pages of it are given away")]

mod raw;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use raw::{Client, Lane, Table, daemon, released, rows_of, table};
use shmquant_kernels::{Granularity, Scheme};
use shmquant_protocol::chunks::MIN_WINDOW;
use shmquant_protocol::descriptor::{Body, Place, Values, Way};
use shmquant_protocol::message::{ErrorCode, Extent, Failure, Lease, Message, NO_TIMEOUT, Purpose, Target};
use shmquant_protocol::segment::{Backing, Mapping, SegmentError};

/// An input as it was leased, mapped.
struct Input {
    lease: Lease,
    mapping: Mapping,
}

fn allocate(lane: &mut Lane, bytes: u64) -> Result<(Lease, Option<Mapping>), Failure> {
    let asked = lane.raw.send(&Message::Allocate { bytes, purpose: Purpose::Input, timeout: NO_TIMEOUT });
    match lane.raw.recv().unwrap() {
        (request, Message::Allocated { lease }, fd) if request == asked => {
            assert_eq!(lease.fd, fd.is_some());
            let map = |fd: std::os::fd::OwnedFd| {
                Mapping::inherited(fd.as_fd(), lease.segment_size, Backing::Memfd).unwrap()
            };
            Ok((lease, fd.map(map)))
        }
        (request, Message::Error(e), _) if request == asked => Err(*e),
        other => panic!("{other:?}"),
    }
}

fn input(lane: &mut Lane, values: &[f32]) -> Input {
    let (lease, mapping) = allocate(lane, values.len() as u64 * 4).unwrap();
    let input = Input { lease, mapping: mapping.unwrap() };
    input.write(values);
    input
}

impl Input {
    fn write(&self, values: &[f32]) {
        let start = self.mapping.as_mut_ptr().unwrap();
        assert!(values.len() * 4 <= self.mapping.len());
        // SAFETY: inside the mapping, aligned.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast(), start, values.len() * 4) };
    }
}

fn values(table: &mut Table, item: usize) -> &mut Values {
    match &mut table.descriptor.items[item].body {
        Body::Values(values) => values,
        Body::Keep { .. } => panic!("a kept column"),
    }
}

fn placed(mut table: Table, item: usize, extent: Extent) -> Table {
    values(&mut table, item).way = Way::Placed(Place { extent, offset: 0 });
    table
}

fn rows(n: u64) -> Table {
    table(Scheme::Int8, Granularity::Row, &[(n, 256)])
}

/// The bytes of a result.
fn bytes_of(lane: &Lane, lease: &Lease) -> Vec<u8> {
    let fd = lane.fds[&lease.extent.segment].as_fd();
    let mapping = Mapping::read_only(fd, lease.segment_size, Backing::Memfd).unwrap();
    // SAFETY: inside the mapping; a leased result is not written.
    unsafe { std::slice::from_raw_parts(mapping.as_ptr(), lease.extent.length as usize) }.to_vec()
}

#[test]
fn what_is_read_is_not_used_for_anything_else() {
    let daemon = daemon(|_| {});
    let mut client = Client::new(&daemon);
    let (mut one, mut two) = (client.lane(&daemon, MIN_WINDOW), client.lane(&daemon, 0));
    // The first layer is streamed through several windows, so that the second one is still to be read.
    let plain = table(Scheme::Int8, Granularity::Row, &[(32 << 10, 256), (64, 256)]);
    let (expected, _) = one.quantize(&plain).unwrap();
    let expected = bytes_of(&one, &expected);
    let input = input(&mut two, &plain.values[1]);
    let extent = input.lease.extent;
    let table = placed(table(Scheme::Int8, Granularity::Row, &[(32 << 10, 256), (64, 256)]), 1, extent);
    let running = one.start(&table);
    client.await_stat(|s| s["runs"] == 1);
    client.release(&input.lease);
    client.await_stat(|s| s["leases"] == 1);
    // Given back, and not free: the next input is another one.
    let (other, mapping) = allocate(&mut two, extent.length).unwrap();
    assert_ne!(other.extent.segment, extent.segment);
    assert!(mapping.is_some());
    assert_eq!(client.stat()["bytes_by_use"]["pools"], 0);
    let (lease, _) = one.finish(running, &table).unwrap();
    assert_eq!(bytes_of(&one, &lease), expected);
    // Now it is.
    let (again, _) = allocate(&mut two, extent.length).unwrap();
    assert_eq!((again.extent.segment, again.extent.generation), (extent.segment, extent.generation + 1));
    // And what names its earlier use is told so.
    let error = one.quantize(&table).unwrap_err();
    assert_eq!(error.code, ErrorCode::Gone);
    let fresh = placed(rows(64), 0, again.extent);
    assert!(one.quantize(&fresh).is_ok());
}

#[test]
fn a_client_that_dies_while_its_input_is_read_leaves_nothing() {
    let daemon = daemon(|_| {});
    let mut observer = Client::new(&daemon);
    for _ in 0..5 {
        let client = Client::new(&daemon);
        let (mut one, mut two) = (client.lane(&daemon, MIN_WINDOW), client.lane(&daemon, 0));
        let plain = table(Scheme::Int8, Granularity::Row, &[(32 << 10, 256), (64, 256)]);
        let input = input(&mut two, &plain.values[1]);
        one.start(&placed(plain, 1, input.lease.extent));
        observer.await_stat(|s| s["runs"] == 1);
        drop((client, one, two));
        let none = ["runs", "leases", "lanes", "bytes", "segments"];
        observer.await_stat(|s| none.iter().all(|key| s[key] == 0));
    }
}

#[test]
fn extents_that_are_not_the_clients_or_not_there() {
    let daemon = daemon(|_| {});
    let (mut client, neighbour) = (Client::new(&daemon), Client::new(&daemon));
    let (mut lane, mut other) = (client.lane(&daemon, MIN_WINDOW), neighbour.lane(&daemon, 0));
    let mine = input(&mut lane, &rows(64).values[0]).lease.extent;
    let theirs = input(&mut other, &rows(64).values[0]).lease.extent;
    let window = Extent { segment: lane.segment, generation: 1, offset: 0, length: MIN_WINDOW };
    let gone = [
        theirs,
        window,
        Extent { generation: mine.generation + 1, ..mine },
        Extent { generation: mine.generation - 1, ..mine },
        Extent { segment: u64::MAX, ..mine },
        Extent { length: mine.length + 4096, ..mine },
        Extent { length: u64::MAX, ..mine },
        Extent { offset: 4, ..mine },
        Extent { offset: u64::MAX - 63, length: u64::MAX, ..mine },
    ];
    for extent in gone {
        let error = lane.quantize(&placed(rows(64), 0, extent)).unwrap_err();
        let wraps = extent.offset > mine.length;
        assert!(
            error.code == ErrorCode::Gone || (wraps && error.code == ErrorCode::InvalidInput),
            "{extent:?} {error:?}"
        );
    }
    let invalid: [&dyn Fn(&mut Values); 7] = [
        &|v| v.way = Way::Placed(Place { extent: mine, offset: 4 }),
        &|v| v.way = Way::Placed(Place { extent: mine, offset: u64::MAX - 3 }),
        &|v| v.way = Way::Placed(Place { extent: mine, offset: mine.length }),
        &|v| v.way = Way::Placed(Place { extent: Extent { length: mine.length - 1, ..mine }, offset: 0 }),
        &|v| (v.rows, v.shape) = (63, vec![63, 256]),
        &|v| (v.rows, v.k, v.shape) = (0, 256, vec![0, 256]),
        &|v| (v.null, v.rows, v.k, v.shape) = (true, 0, 0, vec![]),
    ];
    for (i, change) in invalid.iter().enumerate() {
        let mut table = placed(rows(64), 0, mine);
        if i == 4 {
            // Fewer rows in the same place, but not aligned.
            values(&mut table, 0).way = Way::Placed(Place { extent: mine, offset: 2 });
        }
        change(values(&mut table, 0));
        let error = lane.quantize(&table).unwrap_err();
        assert_eq!(
            (error.code, error.column.as_str()),
            (ErrorCode::InvalidInput, "layer.0"),
            "{i} {error:?}"
        );
    }
    // One good extent beside a bad one: the good one is let go.
    let mut two = table(Scheme::Int8, Granularity::Row, &[(64, 256), (64, 256)]);
    values(&mut two, 0).way = Way::Placed(Place { extent: mine, offset: 0 });
    values(&mut two, 1).way = Way::Placed(Place { extent: theirs, offset: 0 });
    assert_eq!(lane.quantize(&two).unwrap_err().code, ErrorCode::Gone);
    // Twice the same, overlapping: they are only read.
    values(&mut two, 1).way = Way::Placed(Place { extent: mine, offset: 0 });
    assert!(lane.quantize(&two).is_ok());
    // What clients write is nothing to publish or to pass on.
    for message in
        [Message::Ticket(mine), Message::Publish { extent: mine, replace: false, name: "mine".to_owned() }]
    {
        assert_eq!(client.ask(&message).unwrap_err().code, ErrorCode::Gone);
    }
    // Its descriptor can be had again, its neighbour's cannot.
    let (reply, fd) = client.ask(&Message::Open(Target::Again(mine))).unwrap();
    assert!(matches!(reply, Message::Opened { lease, .. } if lease.extent == mine) && fd.is_some());
    assert_eq!(client.ask(&Message::Open(Target::Again(theirs))).unwrap_err().code, ErrorCode::Gone);
    // Both holds go, and it is free.
    let lease = Lease { extent: mine, ..Lease::default() };
    client.release(&lease);
    client.release(&lease);
    client.await_stat(|s| s["bytes_by_use"]["inputs"].as_u64() < Some(2 * mine.length));
    assert_eq!(lane.quantize(&placed(rows(64), 0, mine)).unwrap_err().code, ErrorCode::Gone);
    // On the primary nobody waits for memory.
    client.raw.send(&Message::Allocate { bytes: 1, purpose: Purpose::Input, timeout: 0 });
    client.raw.assert_protocol_error();
}

#[test]
fn a_result_can_be_a_source_and_is_only_read() {
    let daemon = daemon(|_| {});
    let client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    // Small ones would share a segment, and be held with it.
    let (lease, _) = lane.quantize(&rows(256)).unwrap();
    let before = bytes_of(&lane, &lease);
    // Whatever is in it: these are floats of some value.
    let mut table = placed(rows(1), 0, lease.extent);
    table.descriptor.specs[0].on_nonfinite = shmquant_kernels::OnNonFinite::Saturate;
    values(&mut table, 0).way = Way::Placed(Place { extent: lease.extent, offset: 64 });
    let (other, _) = lane.quantize(&table).unwrap();
    assert_ne!(other.extent.segment, lease.extent.segment);
    assert_eq!(bytes_of(&lane, &lease), before);
    lane.releases.push(released(&lease, false));
    assert_eq!(lane.quantize(&table).unwrap_err().code, ErrorCode::Gone, "releases go first");
}

#[test]
fn who_writes_while_it_is_read_harms_himself_only() {
    let daemon = daemon(|_| {});
    let (client, neighbour) = (Client::new(&daemon), Client::new(&daemon));
    let (mut lane, mut other) = (client.lane(&daemon, MIN_WINDOW), neighbour.lane(&daemon, 0));
    let plain = rows(16 << 10);
    let input = input(&mut lane, &plain.values[0]);
    let mut table = placed(rows(16 << 10), 0, input.lease.extent);
    table.descriptor.specs[0].on_nonfinite = shmquant_kernels::OnNonFinite::Saturate;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let start = input.mapping.as_mut_ptr().unwrap() as usize;
            let pages = input.mapping.len() / 4096;
            let mut random = fastrand::Rng::with_seed(1);
            while !stop.load(Ordering::Acquire) {
                let (page, number) = (start + random.usize(..pages) * 4096, random.u64(..));
                if random.u8(..8) == 0 {
                    // SAFETY: a whole page of our own mapping; what it held is lost, as is meant here.
                    let done = unsafe { libc::madvise(page as *mut _, 4096, libc::MADV_REMOVE) };
                    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
                }
                for word in 0..512 {
                    // SAFETY: inside the mapping, aligned; nobody here counts on what is there.
                    unsafe { ((page + word * 8) as *mut u64).write_volatile(number) };
                }
            }
        });
        for granularity in [Granularity::Row, Granularity::Tensor, Granularity::Dimension] {
            table.descriptor.specs[0].granularity = granularity;
            for _ in 0..10 {
                let (lease, _) = lane.quantize(&table).unwrap();
                assert_eq!(lane.rows(&lease), 1);
                lane.releases.push(released(&lease, false));
                let (lease, _) = other.quantize(&rows(64)).unwrap();
                assert_eq!(other.rows(&lease), 1);
                other.releases.push(released(&lease, false));
            }
        }
        stop.store(true, Ordering::Release);
    });
}

#[test]
fn holes_are_filled_before_it_is_used_again_and_seals_hold() {
    let daemon = daemon(|_| {});
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 0);
    let (lease, mapping) = allocate(&mut lane, 4 << 20).unwrap();
    let mapping = mapping.unwrap();
    let start = mapping.as_mut_ptr().unwrap();
    // SAFETY: whole pages of our own mapping, which nobody uses.
    let done = unsafe { libc::madvise(start.cast(), 2 << 20, libc::MADV_REMOVE) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    client.release(&lease);
    client.await_stat(|s| s["leases"] == 0);
    let (again, none) = allocate(&mut lane, 4 << 20).unwrap();
    assert!(again.extent.segment == lease.extent.segment && none.is_none());
    let (_, fd) = client.ask(&Message::Open(Target::Again(again.extent))).unwrap();
    let fd = fd.unwrap();
    let stat = nix::sys::stat::fstat(&fd).unwrap();
    assert!(stat.st_blocks * 512 >= 4 << 20, "{} blocks", stat.st_blocks);
    assert!(nix::unistd::ftruncate(&fd, 0).is_err() && nix::unistd::ftruncate(&fd, 64 << 20).is_err());
    // A result's descriptor cannot be mapped for writing, whatever a client believes that it was given.
    let (result, _) = lane.quantize(&rows(64)).unwrap();
    let mapped =
        Mapping::inherited(lane.fds[&result.extent.segment].as_fd(), result.segment_size, Backing::Memfd);
    assert!(matches!(mapped, Err(SegmentError::Os { .. })), "{mapped:?}");
    assert_eq!(rows_of(&lane.fds[&result.extent.segment], &result), 1);
}
