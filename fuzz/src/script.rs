//! Fuzz body for sequences: the bytes are a script of what some clients of one daemon do.
//!
//! They know what a client knows (their leases, tickets, windows) and use it in any order, with any part of it changed.
//! Whatever they do, a bystander is served, and nothing is left when they have gone.
#![allow(unsafe_code, reason = "a client writes what it likes into its own window")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a body reports")]

use std::cell::RefCell;
use std::os::fd::AsFd;

use shmquant_daemon::Daemon;
use shmquant_protocol::chunks::{MIN_RING, MIN_WINDOW};
use shmquant_protocol::message::{
    Extent, Lease, Listing, MAX_FRAME, Message, NO_TIMEOUT, Naming, Quantize, Release, Target, Welcome,
};
use shmquant_protocol::segment::{Backing, Mapping};
use shmquant_protocol::socket::Connection;

use crate::raw::{Client, Raw, Table, daemon, layer};

const NAMES: [&str; 4] = ["a", "b", "", "a longer name"];
/// Bytes of memory that all of them together may take.
const BUDGET: u64 = 48 << 20;

thread_local! {
    static DAEMON: RefCell<Option<Daemon>> = const { RefCell::new(None) };
    static TABLES: [Table; 3] = [layer(256), layer(65_536), layer(2 << 20)];
}

struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn word(&mut self) -> u64 {
        let mut bytes = [0; 8];
        bytes.fill_with(|| self.byte());
        u64::from_le_bytes(bytes)
    }
}

struct Lane {
    raw: Raw,
    window: Mapping,
}

impl Lane {
    fn put(&self, at: u64, bytes: &[u8]) {
        let window = self.window.as_mut_ptr().unwrap();
        assert!(at as usize + bytes.len() <= self.window.len());
        // SAFETY: inside the mapping, checked; the bytes are private. The daemon may read there at the same time, which
        // is what is tried.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), window.add(at as usize), bytes.len()) };
    }
}

/// What one of the clients has, and all that any of them has learnt.
#[derive(Default)]
struct World {
    clients: Vec<Client>,
    lanes: Vec<Lane>,
    known: Vec<Lease>,
    tickets: Vec<(u64, [u8; 16])>,
    welcomes: Vec<Welcome>,
}

/// Runs a script.
pub(crate) fn sessions(data: &[u8]) {
    DAEMON.with_borrow_mut(|slot| {
        let daemon = slot.get_or_insert_with(|| {
            daemon(|c| {
                c.budget = Some(BUDGET);
                c.max_lanes = 3;
                c.max_sessions = 6;
                c.max_holds = 20;
                c.max_datasets = 3;
            })
        });
        let mut bystander = Client::new(daemon);
        let mut script = Script(data);
        let mut world = World::default();
        for _ in 0..400 {
            if script.0.is_empty() {
                break;
            }
            world.step(daemon, &mut script);
        }
        assert_eq!(bystander.ask(&Message::Ping).unwrap().0, Message::Pong);
        drop(world);
        for name in NAMES.into_iter().filter(|name| !name.is_empty()) {
            let _ = bystander.ask(&Message::Drop { name: name.to_owned() });
        }
        let gone = |key: &str, stat: &serde_json::Value| stat[key] == 0;
        let stat = bystander.await_stat(|s| {
            let tickets = s["tickets"].as_u64().unwrap();
            let empty =
                ["lanes", "leases", "jobs", "runs", "waiting", "datasets"].iter().all(|key| gone(key, s));
            s["connections"] == 1 && empty && (tickets > 0 || gone("bytes", s) && gone("segments", s))
        });
        assert_eq!(stat["sessions"], 1);
        // Tickets hold for an hour: begin anew.
        if stat["tickets"] != 0 || stat["fds"].as_u64().unwrap() > 400 {
            drop(bystander);
            *slot = None;
        }
    });
}

impl World {
    fn step(&mut self, daemon: &Daemon, script: &mut Script<'_>) {
        match script.byte() % 16 {
            0 => self.greet(daemon),
            1 => self.join(daemon, script),
            2..=4 => self.quantize(script),
            5 => self.garbage(script),
            6..=10 => self.say(script),
            11 => self.scribble(script),
            12 => self.leave(script),
            13 => self.wait(script),
            _ => self.listen(),
        }
    }

    fn greet(&mut self, daemon: &Daemon) {
        if self.clients.len() < 3 {
            let client = Client::new(daemon);
            self.welcomes.push(client.welcome.clone());
            self.clients.push(client);
        }
    }

    fn join(&mut self, daemon: &Daemon, script: &mut Script<'_>) {
        let Some(welcome) = pick(&self.welcomes, script.byte()) else { return };
        let mut welcome = welcome.clone();
        welcome.token[0] ^= script.byte() >> 5;
        if self.lanes.len() >= 3 {
            return;
        }
        let mut raw = Raw::new(daemon);
        raw.send(&Message::Join { session: welcome.session, token: welcome.token, window: MIN_WINDOW });
        // Closed, or refused, if its session ends meanwhile.
        if let Ok((_, Message::Joined { size, .. }, Some(fd))) = raw.recv() {
            let window = Mapping::read_write(fd.as_fd(), size, Backing::Memfd).unwrap();
            self.lanes.push(Lane { raw, window });
        }
    }

    /// A good table, with something wrong now and then: the watermark, the length, the name.
    fn quantize(&mut self, script: &mut Script<'_>) {
        let (at, which, odd) = (script.byte(), script.byte(), script.byte());
        let lanes = self.lanes.len();
        let Some(lane) = self.lanes.get_mut(usize::from(at) % lanes.max(1)) else { return };
        TABLES.with(|tables| {
            let table = &tables[usize::from(which) % 3];
            let mut bytes = Vec::new();
            table.descriptor.encode(&mut bytes).unwrap();
            if odd & 1 != 0 {
                let changed = usize::from(script.byte()) % bytes.len();
                bytes[changed] = script.byte();
            }
            lane.put(0, &bytes);
            let all = table.values[0].len() as u64 * 4 / (1 << 20) + 1;
            let ready = match odd & 6 {
                0 => all as u32 - 1,
                2 => u32::from(script.byte()),
                _ => 1,
            };
            let named = (odd & 24 == 24).then(|| Naming {
                name: NAMES[usize::from(odd >> 5) % 4].to_owned(),
                replace: odd & 128 != 0,
                digest: [which; 16],
            });
            let releases = self.known.iter().take(usize::from(odd >> 6)).map(|l| release(l, odd & 32 != 0));
            let message = Message::Quantize(Quantize {
                descriptor: bytes.len() as u64,
                ready,
                timeout: if odd & 8 == 0 { 5 } else { NO_TIMEOUT },
                named,
                releases: releases.collect(),
                // Left out, too small, and as it should be.
                ring: [0, 0, 4096, MIN_RING][usize::from(which) % 4],
            });
            say(&lane.raw.connection, u32::from(at), &message);
        });
    }

    fn garbage(&mut self, script: &mut Script<'_>) {
        let (at, kind, len) = (script.byte(), script.byte(), script.byte());
        let mut frame = vec![0; 16];
        frame.extend((0..len).map(|_| script.byte()));
        let len = frame.len() as u32;
        frame[0] = 1;
        frame[2] = kind % 18;
        frame[4..8].copy_from_slice(&len.to_le_bytes());
        frame[12] = script.byte();
        if let Some(connection) = self.connection(at) {
            let _ = connection.send(&frame, &[]);
        }
    }

    fn say(&mut self, script: &mut Script<'_>) {
        let (at, what, which, change) = (script.byte(), script.byte(), script.byte(), script.byte());
        let lease = pick(&self.known, which).copied().unwrap_or_default();
        let mut extent = lease.extent;
        match change {
            1 => extent.generation = extent.generation.wrapping_sub(1),
            2 => extent.segment = script.word(),
            3 => extent.length = script.word(),
            4 => extent.offset = extent.length.wrapping_neg(),
            5 => extent = Extent { offset: script.word(), ..extent },
            _ => {}
        }
        let name = NAMES[usize::from(change >> 6)].to_owned();
        let (ticket, mut secret) = pick(&self.tickets, which).copied().unwrap_or_default();
        secret[3] ^= u8::from(change == 6);
        let message = match what % 16 {
            0 => Message::Release(vec![release(&lease, change & 7 == 7); 1 + usize::from(change >> 4)]),
            1 => Message::Release(vec![release(&Lease { extent, ..lease }, false)]),
            2 => Message::Unmap { segment: extent.segment },
            3 => Message::Open(Target::Again(extent)),
            4 => Message::Open(Target::Name(name)),
            5 => Message::Open(Target::Ticket(ticket, secret)),
            6 | 7 => Message::Publish { extent, replace: change & 8 != 0, name },
            8 => Message::Drop { name },
            9 => Message::Cancel { lane: u32::from(which % 4), request: u32::from(change) },
            10 => Message::Wrote { chunks: u32::from(change) },
            11 => Message::List { cursor: script.word(), what: Listing::Datasets },
            12 if change & 1 == 0 => Message::List { cursor: u64::from(change), what: Listing::Results },
            12 => Message::List { cursor: u64::from(change), what: Listing::Inputs },
            13 if change > 250 => Message::Bye,
            13 => Message::List { cursor: 0, what: Listing::Sessions },
            14 if change > 200 => Message::Ticket(extent),
            14 => Message::Stat,
            _ => Message::Ping,
        };
        if let Some(connection) = self.connection(at) {
            say(connection, u32::from(which), &message);
        }
    }

    fn scribble(&mut self, script: &mut Script<'_>) {
        let (at, from, len, what) = (script.byte(), script.byte(), script.byte(), script.byte());
        if let Some(lane) = pick(&self.lanes, at) {
            // The descriptor is the most rewarding place.
            let from = if from < 128 { u64::from(from) } else { u64::from(from) << 12 };
            lane.put(from, &vec![what; usize::from(len) * 16]);
        }
    }

    fn leave(&mut self, script: &mut Script<'_>) {
        let at = usize::from(script.byte());
        if at & 1 == 0 && !self.lanes.is_empty() {
            drop(self.lanes.swap_remove(at / 2 % self.lanes.len()));
        } else if !self.clients.is_empty() {
            drop(self.clients.swap_remove(at / 2 % self.clients.len()));
        }
    }

    /// Lets the daemon get so far: everything said before on a primary has been worked on.
    fn wait(&mut self, script: &mut Script<'_>) {
        let at = usize::from(script.byte());
        let clients = self.clients.len();
        if let Some(client) = self.clients.get_mut(at % clients.max(1)) {
            say(&client.raw.connection, u32::MAX, &Message::Ping);
            let mut buffer = vec![0; MAX_FRAME];
            let mut fds = Vec::new();
            while let Ok(received) = client.raw.connection.recv(&mut buffer, &mut fds) {
                fds.clear();
                let (request, message) = Message::decode(&buffer[..received.len]).unwrap();
                learn(&mut self.known, &mut self.tickets, &message);
                if request == u32::MAX {
                    break;
                }
            }
        }
    }

    /// Takes note of what has been answered by now.
    fn listen(&mut self) {
        let mut buffer = vec![0; MAX_FRAME];
        let mut fds = Vec::new();
        let primaries = self.clients.iter().map(|c| &c.raw.connection);
        for connection in primaries.chain(self.lanes.iter().map(|l| &l.raw.connection)) {
            while let Ok(Some(received)) = connection.try_recv(&mut buffer, &mut fds) {
                fds.clear();
                let (_, message) = Message::decode(&buffer[..received.len]).unwrap();
                learn(&mut self.known, &mut self.tickets, &message);
            }
        }
    }

    fn connection(&self, at: u8) -> Option<&Connection> {
        let primaries = self.clients.iter().map(|c| &c.raw.connection);
        let all: Vec<_> = primaries.chain(self.lanes.iter().map(|l| &l.raw.connection)).collect();
        pick(&all, at).copied()
    }
}

fn pick<T>(list: &[T], at: u8) -> Option<&T> {
    list.get(usize::from(at) % list.len().max(1))
}

fn release(lease: &Lease, tainted: bool) -> Release {
    Release { segment: lease.extent.segment, generation: lease.extent.generation, tainted }
}

/// Says it if anybody listens.
fn say(connection: &Connection, request: u32, message: &Message) {
    let mut frame = Vec::new();
    message.encode(request, &mut frame);
    let _ = connection.send(&frame, &[]);
}

fn learn(known: &mut Vec<Lease>, tickets: &mut Vec<(u64, [u8; 16])>, message: &Message) {
    match message {
        Message::Done { lease, .. } | Message::Opened { lease, .. } => known.push(*lease),
        Message::Ticketed { ticket, secret } => tickets.push((*ticket, *secret)),
        Message::Error(failure) => {
            assert!(failure.code != shmquant_protocol::message::ErrorCode::Internal, "{failure:?}");
        }
        _ => {}
    }
}
