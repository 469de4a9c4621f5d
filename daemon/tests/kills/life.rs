//! The whole life of a client, every step of both life cycles at least once.
#![allow(unsafe_code, reason = "values are written to shared memory")]

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use shmquant_protocol::chunks::{Action, Chunk};
use shmquant_protocol::client::{ClientError, Input, Options, Session, Source};
use shmquant_protocol::descriptor::Descriptor;
use shmquant_protocol::failpoint;
use shmquant_protocol::message::Naming;

use crate::layers::Layers;
use crate::native::check;
use crate::place::pause;

/// Layers of one small request, one round trip.
pub(crate) const SMALL: &[u64] = &[1000, 255, 510];
/// Layers of a request that is streamed: twice the window of 4 MiB.
pub(crate) const LARGE: &[u64] = &[255_000; 8];

/// Layers whose codes go round in the same window.
pub(crate) const LARGER: &[u64] = &[255_000; 20];

/// Number and secret.
pub(crate) type Ticket = (u64, [u8; 16]);

/// How often this process has come by a failpoint.
pub(crate) fn passed(name: &str) -> u64 {
    failpoint::passed().iter().find(|(n, _)| *n == name).map_or(0, |(_, count)| *count)
}

/// A source whose fifth chunk takes until the call is to be asked whether to go on, which is some time after it began.
struct Slow {
    layers: Layers,
    started: OnceLock<Instant>,
}

impl Source for Slow {
    fn descriptor(&self) -> &Descriptor {
        self.layers.descriptor()
    }

    fn fill(&self, chunk: &Chunk, out: &mut [u8]) {
        self.layers.fill(chunk, out);
        // From here and not from before the call: that can be any time ago when the call begins.
        while chunk.item >= 4 && self.started.get_or_init(Instant::now).elapsed() < Duration::from_millis(60)
        {
            pause();
        }
    }
}

/// Layers whose values are in memory that the daemon has, too.
struct Placed {
    layers: Layers,
    places: Vec<(usize, usize)>,
    _input: Input,
}

impl Placed {
    fn new(session: &Session, sizes: &[u64]) -> Result<Self, ClientError> {
        let layers = Layers::new(sizes);
        let room: u64 = sizes.iter().map(|k| (k * 4).next_multiple_of(64)).sum();
        let input = session.allocate(room, None, None)?;
        let (mut at, mut places) = (0, Vec::new());
        for (item, k) in (0..).zip(sizes) {
            let bytes = k * 4;
            let chunk = Chunk {
                item,
                action: Action::Fused,
                first: 0,
                count: *k,
                bytes,
                work: bytes,
                at: 0,
                start: 0,
                shared: false,
            };
            let place = input.as_ptr().wrapping_add(at);
            // SAFETY: inside the input, which nobody reads yet.
            layers.fill(&chunk, unsafe { std::slice::from_raw_parts_mut(place, bytes as usize) });
            places.push((place as usize, bytes as usize));
            at += bytes.next_multiple_of(64) as usize;
        }
        Ok(Self { layers, places, _input: input })
    }
}

impl Source for Placed {
    fn descriptor(&self) -> &Descriptor {
        self.layers.descriptor()
    }

    fn fill(&self, chunk: &Chunk, out: &mut [u8]) {
        self.layers.fill(chunk, out);
    }

    fn lies_at(&self, item: usize) -> Option<(usize, usize)> {
        self.places.get(item).copied()
    }
}

/// Lives once: everything a client can do, its results held, shared and given back. `say` hears what others have to know.
pub(crate) fn live(
    session: &Session,
    number: u64,
    given: Option<Ticket>,
    say: &dyn Fn(String),
) -> Result<(), ClientError> {
    let answered = passed("client.unmap_answered");
    let given = given.map(|(ticket, secret)| session.open_ticket(ticket, secret)).transpose()?;
    say("opened".to_owned());
    let small = session.quantize(&Layers::new(SMALL), &Options::default())?.held;
    check(&small, SMALL);
    let large = session.quantize(&Layers::new(LARGE), &Options::default())?.held;
    check(&large, LARGE);

    // Nothing has been given back so far: no other thread of this process can meet a failpoint while the ticket is on its way.
    let (ticket, secret) = session.ticket(&small)?;
    say(format!("ticket {ticket} {}", u128::from_le_bytes(secret)));

    let slow = Slow { layers: Layers::new(&[255_000; 12]), started: OnceLock::new() };
    let options = Options { interrupted: Some(&|| true), ..Options::default() };
    match session.quantize(&slow, &options) {
        Err(ClientError::Cancelled) => {}
        Err(error) => return Err(error),
        Ok(_) => panic!("a call that was interrupted has a result"),
    }

    for sizes in [SMALL, LARGER] {
        check(&session.quantize(&Layers::encoded(sizes), &Options::default())?.held, sizes);
    }
    session.warm(1 << 20, None, None)?;
    for sizes in [SMALL, LARGE] {
        let placed = Placed::new(session, sizes)?;
        let done = session.quantize(&placed, &Options::default())?;
        check(&done.held, sizes);
        assert_eq!(done.bytes_copied, 0);
    }

    let shared = session.quantize(&Layers::new(SMALL), &Options::default())?.held;
    let first = format!("life-{number}/a");
    session.publish(&shared, &first, false)?;
    say("published".to_owned());
    let naming = Naming { name: format!("life-{number}/b"), replace: false, digest: [7; 16] };
    let options = Options { named: Some(naming), ..Options::default() };
    let named = session.quantize(&Layers::new(SMALL), &options)?.held;
    let opened = session.open(&first)?;
    check(&opened, SMALL);
    assert_eq!(opened.name(), Some(first.as_str()));
    say("dropping".to_owned());
    session.drop_dataset(&first)?;
    session.drop_dataset(&format!("life-{number}/b"))?;
    check(&named, SMALL);
    drop((named, opened, shared, given, small, large));

    // Two lanes, and memory that is used again.
    let both = std::thread::scope(|scope| {
        let again = || -> Result<(), ClientError> {
            for sizes in [SMALL, LARGE, SMALL] {
                check(&session.quantize(&Layers::new(sizes), &Options::default())?.held, sizes);
            }
            Ok(())
        };
        let threads = [scope.spawn(again), scope.spawn(again)];
        threads.map(|thread| thread.join().unwrap())
    });
    both.into_iter().collect::<Result<(), _>>()?;
    // What was shared is unmapped when the daemon asks for it.
    while passed("client.unmap_answered") == answered {
        session.ping()?;
        pause();
    }
    Ok(())
}
