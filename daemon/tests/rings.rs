//! Rings: requests that stream beside each other are told to use less of their windows, and may.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]

mod raw;

use raw::{Client, Lane, Table, daemon, layer, released, table};
use shmquant_daemon::Daemon;
use shmquant_kernels::{Granularity, Scheme};
use shmquant_protocol::chunks::{MIN_RING, MIN_WINDOW};

/// Four times the smallest window.
fn streamed() -> Table {
    layer(4 << 20)
}

/// The result's bytes, which are given back.
fn bytes_of(lane: &mut Lane, table: &Table) -> Vec<u8> {
    let (lease, _) = lane.quantize(table).unwrap();
    let bytes = lane.bytes(&lease);
    lane.releases.push(released(&lease, false));
    bytes
}

/// Another session's request, whose values do not come until it is told to finish.
struct Other {
    lane: Lane,
    running: raw::Running,
    _client: Client,
}

impl Other {
    fn begin(daemon: &Daemon) -> Self {
        let client = Client::new(daemon);
        let mut lane = client.lane(daemon, MIN_WINDOW);
        let running = lane.start(&streamed());
        Self { lane, running, _client: client }
    }

    fn finish(mut self) -> u64 {
        self.lane.finish(self.running, &streamed()).unwrap();
        self.lane.advised
    }
}

#[test]
fn the_more_requests_stream_the_smaller_a_ring_is_advised() {
    let daemon = daemon(|_| {});
    let mut client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, MIN_WINDOW);
    bytes_of(&mut lane, &streamed());
    assert_eq!(lane.advised, 0, "alone");

    let mut others = Vec::new();
    for (n, wanted) in [(1, 4 << 20), (3, 4 << 20), (7, 2 << 20), (9, MIN_RING)] {
        others.extend((others.len()..n).map(|_| Other::begin(&daemon)));
        client.await_stat(|s| s["runs"] == n);
        bytes_of(&mut lane, &streamed());
        assert_eq!(lane.advised, wanted, "beside {n}");
        // What fits the window needs no ring, and says nothing about one.
        bytes_of(&mut lane, &layer(512 << 10));
        assert_eq!(lane.advised, 0);
    }
    for left in (0..others.len()).rev() {
        others.pop().unwrap().finish();
        client.await_stat(|s| s["runs"] == left);
    }
    bytes_of(&mut lane, &streamed());
    assert_eq!(lane.advised, 0, "alone again");
}

#[test]
fn a_ring_changes_no_byte_of_a_result() {
    let daemon = daemon(|_| {});
    let client = Client::new(&daemon);
    let mut lane = client.lane(&daemon, 2 * MIN_WINDOW);
    for table in [
        streamed(),
        layer(8 << 20),
        table(Scheme::Int4, Granularity::Tensor, &[(4096, 1024)]),
        table(Scheme::Int8, Granularity::Dimension, &[(4096, 1024), (300, 7), (4096, 512)]),
        table(Scheme::Int2, Granularity::Group, &[(4096, 1000), (1, 300_000)]),
    ] {
        lane.ring = 0;
        let whole = bytes_of(&mut lane, &table);
        let rounds = lane.consumed.len();
        // The same plan twice, rings that are no multiple of anything, one larger than the window.
        for ring in [MIN_RING, MIN_RING, MIN_RING + 64 * 1013 + 1, 3 << 20, 1 << 40] {
            lane.ring = ring;
            assert_eq!(bytes_of(&mut lane, &table), whole, "{ring}");
            assert!(ring != MIN_RING || lane.consumed.len() > rounds, "{:?}", lane.consumed);
        }
    }
}
