//! Fuzz bodies for what is parsed: frames, descriptors, chunk lists, plans. Any bytes go in; a panic is a bug.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed expectation is how a body reports"
)]

use std::sync::Arc;

use arrow_ipc::reader::FileReader;
use shmquant_daemon::engine::Work;
use shmquant_daemon::job::{Job, Sources};
use shmquant_daemon::memory::Memory;
use shmquant_daemon::plan::Plan;
use shmquant_protocol::chunks::{CHUNK_BYTES, Chunk, ChunkList, MIN_RING, MIN_WINDOW};
use shmquant_protocol::descriptor::{Body, Descriptor, Item, Way};
use shmquant_protocol::message::{ErrorCode, MAX_FRAME, Message};

use crate::tables::Heap;

/// Largest result that is planned here.
const MOST: u64 = 256 << 10;
const WINDOW: u64 = MIN_WINDOW;

/// One datagram. What is understood is said again in one way only.
pub(crate) fn frames(data: &[u8]) {
    let Ok((request, message)) = Message::decode(data) else { return };
    let (mut first, mut second) = (Vec::new(), Vec::new());
    message.encode(request, &mut first);
    // A fixed part shorter than ours is filled up.
    assert!(first.len() <= MAX_FRAME + 64, "{} bytes of {}", first.len(), data.len());
    let (again, decoded) = Message::decode(&first).expect("our own frame");
    assert_eq!(again, request);
    decoded.encode(again, &mut second);
    assert_eq!(first, second);
}

/// A descriptor, and the chunk lists of what it describes if that is not too much.
pub(crate) fn descriptors(data: &[u8]) {
    let Ok(descriptor) = Descriptor::decode(data) else { return };
    let mut bytes = Vec::new();
    descriptor.encode(&mut bytes).expect("what was read can be said");
    // What says nothing is left out: a dictionary's child has a name, and a key may come twice.
    assert!(bytes.len() <= data.len(), "{} bytes of {}", bytes.len(), data.len());
    assert_eq!(Descriptor::decode(&bytes).expect("our own descriptor"), descriptor);
    let mut again = Vec::new();
    descriptor.encode(&mut again).expect("what was said once");
    assert_eq!(again, bytes);
    if input_bytes(&descriptor).is_none_or(|bytes| bytes > 1 << 30) {
        return;
    }
    for window in [MIN_WINDOW, MIN_WINDOW + 4096, 4 * MIN_WINDOW] {
        let bytes = data.len() as u64;
        if bytes <= window / 4 {
            for ring in [0, MIN_RING, MIN_RING + 4160] {
                check_list(&ChunkList::with_ring(&descriptor, bytes, window, ring), bytes, window);
            }
        }
    }
}

/// Bytes that would cross the window, at most.
fn input_bytes(descriptor: &Descriptor) -> Option<u64> {
    fn kept(data: &shmquant_protocol::field::NodeData) -> Option<u64> {
        let own = data.buffers.iter().try_fold(0u64, |sum, n| sum.checked_add(*n))?;
        data.children.iter().try_fold(own, |sum, child| sum.checked_add(kept(child)?))
    }
    descriptor.items.iter().try_fold(0u64, |sum, item| {
        let bytes = match &item.body {
            Body::Keep { data, .. } => kept(data)?,
            // Rows of few values take a chunk each when they are long enough: bounded by their bytes, too.
            Body::Values(v) => v.rows.checked_mul(v.k.max(1))?.checked_mul(9)?,
        };
        sum.checked_add(bytes)
    })
}

/// Every chunk lies in the ring, none over another that is still to be read, and the stream comes to its end.
fn check_list(list: &ChunkList, descriptor: u64, window: u64) {
    let end = list.base + list.capacity;
    assert!(list.base >= descriptor && end <= window);
    for chunk in &list.chunks {
        assert!(
            chunk.bytes <= CHUNK_BYTES && chunk.at >= list.base && chunk.at + chunk.bytes <= end,
            "{chunk:?}"
        );
        assert!(list.resident || !chunk.shared, "{chunk:?}");
    }
    let apart = |a: &Chunk, b: &Chunk| a.at + a.bytes <= b.at || b.at + b.bytes <= a.at;
    if list.resident {
        let mut places: Vec<&Chunk> = list.chunks.iter().filter(|c| !c.shared).collect();
        places.sort_by_key(|c| (c.at, c.bytes));
        assert!(places.windows(2).all(|two| apart(two[0], two[1])));
        return;
    }
    // In steps, so that long lists take linear time.
    let (mut consumed, mut written) = (0, 0);
    while consumed < list.chunks.len() {
        let writable = list.writable(consumed);
        assert!(writable > consumed && writable >= written, "stuck at {consumed} of {}", list.chunks.len());
        written = writable;
        let live = &list.chunks[consumed..written.min(consumed + 8)];
        let both = |i: usize| live[i + 1..].iter().all(|other| apart(&live[i], other));
        assert!((0..live.len()).all(both), "one chunk over another");
        consumed += (written - consumed).div_ceil(2);
    }
}

/// Memory for values that lie in extents; `None` if that would be much.
fn sources(descriptor: &Descriptor) -> Option<Sources> {
    let mut ends = std::collections::HashMap::new();
    for (_, values, place) in descriptor.places() {
        let end = place.extent.offset.checked_add(place.offset)?.checked_add(values.bytes())?;
        let most: &mut u64 = ends.entry(place.extent.segment).or_default();
        *most = end.max(*most);
    }
    let bounded = ends.values().all(|end| *end <= WINDOW) && ends.len() <= 8;
    bounded.then(|| ends.iter().map(|(id, end)| (*id, Heap::new(*end, 0x3C) as Arc<dyn Memory>)).collect())
}

/// `u16 length`, a descriptor, then what a hostile client has in its window while the request is worked on. Whatever it
/// is, what comes out is refused or a valid Arrow file.
pub(crate) fn planner(data: &[u8]) {
    let Some((length, rest)) = data.split_first_chunk::<2>() else { return };
    let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let (bytes, values) = rest.split_at(length);
    let Ok(descriptor) = Descriptor::decode(bytes) else { return };
    for limit in [i32::MAX as u64, 1000] {
        let plan = Plan::with_offset_limit(descriptor.clone(), bytes.len() as u64, WINDOW, 0, MOST, limit);
        let plan = match plan {
            Ok(plan) => Arc::new(plan),
            Err(failure) => {
                assert!(failure.code != ErrorCode::Internal, "{failure:?}");
                continue;
            }
        };
        assert!(plan.result_bytes() <= MOST);
        check_list(plan.chunks(), bytes.len() as u64, WINDOW);
        if plan.chunks().chunks.len() > 256 {
            continue;
        }
        let Some(sources) = sources(plan.descriptor()) else { continue };
        let (window, result) = (Heap::new(WINDOW, 0), Heap::new(plan.result_bytes(), 0xA5));
        let job = Job::new(Arc::clone(&plan), window.clone(), &sources, result.clone(), 0)
            .expect("room for the result");
        let mut left = values.iter().copied().cycle();
        for (i, chunk) in plan.chunks().chunks.iter().enumerate() {
            // Also where a second pass was to find what the first one saw.
            if !values.is_empty() {
                let some: Vec<u8> = left.by_ref().take((chunk.bytes as usize).min(4096)).collect();
                window.write(chunk.at, &some);
            }
            job.run(i);
        }
        match job.complete() {
            Ok(complete) => {
                let file = result.read(0, complete.length);
                let reader = FileReader::try_new(std::io::Cursor::new(file), None).expect("an Arrow file");
                for batch in reader {
                    let batch = batch.expect("a record batch");
                    batch
                        .columns()
                        .iter()
                        .for_each(|c| c.to_data().validate_full().expect("valid Arrow data"));
                }
            }
            Err(failure) => {
                let lies = plan.descriptor().items.iter().any(is_encoded);
                let refused =
                    failure.code == ErrorCode::InvalidInput || (lies && failure.code == ErrorCode::Protocol);
                assert!(refused, "{failure:?}");
            }
        }
    }
}

/// Whether its codes are what the client says they are.
fn is_encoded(item: &Item) -> bool {
    matches!(&item.body, Body::Values(values) if values.way == Way::Encoded)
}
