//! The books against a model: random histories of sessions, results, windows, tickets and datasets.
//!
//! The model says what each call must answer and what the state must be after it. Only which idle memory is given
//! up for want of room is left to the books; that it was idle is checked.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender, channel};

use proptest::prelude::*;
use shmquant_protocol::message::Target;
use shmquant_protocol::segment::{Backing, Kind, Segment, SegmentName};
use shmquant_protocol::socket::Connection;

use super::*;
use crate::admission::{Asked, Verdict};
use crate::catalog::Origin;
use crate::headroom::Headroom;
use crate::memory::copy_in;
use crate::reaper::Dead;

mod check;
mod inputs;
mod names;
mod shared;

use shared::Part;

const BUDGET: u64 = 256 << 10;
const MAX_HOLDS: u64 = 8;
const MAX_DATASETS: u64 = 3;
/// The last one is larger than a session's pool may be.
const SIZES: [u64; 4] = [4096, 8192, 12288, 96 << 10];
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Filling,
    Complete,
    Retired,
    /// A window that has not been given up.
    Window,
    /// An input that its session may write.
    Input,
}

/// A segment as the model has it.
#[derive(Debug)]
struct Seen {
    kind: Kind,
    home: u64,
    size: u64,
    generation: u64,
    state: State,
    leases: BTreeMap<u64, u32>,
    mapped: BTreeSet<u64>,
    /// Requests that read values here.
    readers: u32,
    exposed: bool,
    reaped: bool,
    /// Where results were completed, and what was written there: nothing else may be read until it is used again.
    parts: Vec<(u64, u64)>,
}

#[derive(Debug, Clone, Copy)]
struct Ticketed {
    number: u64,
    secret: [u8; 16],
    extent: Extent,
    sender: u64,
}

/// The books, what belongs to the threads around them, and the model.
struct World {
    books: Books,
    reaper: (Sender<Dead>, Receiver<Dead>),
    sessions: Vec<Arc<Session>>,
    /// Ended, with what is still to be forgotten.
    ended: Vec<(u64, Vec<u64>)>,
    growths: Vec<(u64, u64)>,
    jobs: Vec<Taken>,
    windows: Vec<(u64, Arc<SegmentMemory>)>,
    pins: Vec<u64>,

    alive: BTreeSet<u64>,
    /// Where the next small result of a session goes.
    open: BTreeMap<u64, (u64, u64)>,
    segments: BTreeMap<u64, Seen>,
    tickets: Vec<Ticketed>,
    names: BTreeMap<String, u64>,
    stray: u64,
    canaries: u64,
    /// The next check may find idle memory given up.
    taken_back: bool,
    headroom: Headroom,
}

/// One step: what is done, and with which of the things there are.
type Step = (u8, u8, u8, u8);

fn pick<T>(list: &[T], at: u8) -> Option<&T> {
    list.get(usize::from(at) % list.len().max(1))
}

impl World {
    fn new() -> Self {
        let headroom = Headroom { host: 1 << 40, cgroup: None, files: None };
        Self {
            books: Books::new(4, MAX_HOLDS),
            reaper: channel(),
            sessions: Vec::new(),
            ended: Vec::new(),
            growths: Vec::new(),
            jobs: Vec::new(),
            windows: Vec::new(),
            pins: Vec::new(),
            alive: BTreeSet::new(),
            open: BTreeMap::new(),
            segments: BTreeMap::new(),
            tickets: Vec::new(),
            names: BTreeMap::new(),
            stray: 0,
            canaries: 0,
            taken_back: false,
            headroom,
        }
    }

    /// Any session that ever was: threads of an ended one may be late.
    fn session(&self, at: u8) -> Option<Arc<Session>> {
        pick(&self.sessions, at).cloned()
    }

    fn segment(&self, at: u8) -> Option<u64> {
        let ids: Vec<u64> = self.segments.keys().copied().collect();
        pick(&ids, at).copied()
    }

    fn holds(&self, session: u64) -> u64 {
        let leases = self.segments.values().filter_map(|s| s.leases.get(&session));
        let tickets = self.tickets.iter().filter(|t| t.sender == session).count() as u64;
        leases.map(|n| u64::from(*n)).sum::<u64>() + tickets
    }

    /// One of the extents of a segment, if it has any.
    fn extent(&self, id: u64, at: u8) -> Extent {
        let seen = &self.segments[&id];
        let (offset, length) = match seen.state {
            State::Input => (0, 64),
            _ => pick(&seen.parts, at).map_or((0, 0), |(offset, _)| (*offset, 64)),
        };
        Extent { segment: id, generation: seen.generation, offset, length }
    }

    fn writers(&self, id: u64) -> usize {
        self.jobs.iter().filter(|taken| taken.id == id).count()
    }

    fn leases_of(&self, session: u64, id: u64) -> u32 {
        self.segments[&id].leases.get(&session).copied().unwrap_or(0)
    }

    // What the model makes of a step.

    /// The last hold may have gone: free on proof, otherwise retired.
    fn settle(&mut self, id: u64) {
        let named = self.names.values().any(|s| *s == id);
        let ticketed = self.tickets.iter().any(|t| t.extent.segment == id);
        let written = self.writers(id) > 0;
        let Some(seen) = self.segments.get_mut(&id) else { return };
        let leasable = matches!(seen.state, State::Complete | State::Input);
        if !leasable || named || ticketed || written || seen.readers > 0 || !seen.leases.is_empty() {
            return;
        }
        let cap = self.books.admission.limit() / 4;
        let proven = !seen.exposed && self.alive.contains(&seen.home) && seen.size <= cap;
        seen.state = if proven { State::Free } else { State::Retired };
        self.open.retain(|_, (open, _)| *open != id);
    }

    fn expect_lease(
        &mut self,
        session: u64,
        extent: Extent,
        granted: Result<Granted, Trouble>,
    ) -> Option<Lease> {
        let id = extent.segment;
        let full = self.holds(session) >= MAX_HOLDS;
        let dataset = self.names.values().any(|s| *s == id);
        let alive = self.alive.contains(&session);
        let leasable = |s: &&mut Seen| matches!(s.state, State::Complete | State::Input);
        let seen = self.segments.get_mut(&id).filter(leasable);
        let Some(seen) = seen.filter(|_| alive && !full) else {
            assert!(granted.is_err(), "leased to nobody or what is not there: {granted:?}");
            return None;
        };
        let granted = granted.unwrap();
        let fd = seen.mapped.insert(session);
        *seen.leases.entry(session).or_default() += 1;
        seen.exposed |= session != seen.home;
        let expected = Lease { extent, segment_size: seen.size, fd, dataset };
        assert_eq!(granted.lease, expected);
        assert_eq!(granted.memory.is_some(), fd);
        Some(granted.lease)
    }

    // Steps.

    fn step(&mut self, step: Step) {
        let (what, a, b, c) = step;
        match what {
            0 => self.open_session(),
            1 => self.end_session(a),
            2 => self.forget(a),
            3 | 4 => self.allocate(a, b, c),
            5 => self.grow(a, c),
            6..=8 => self.finish(a, b, c),
            9 => self.abort(a),
            10 => self.open_name(a, b, c),
            11 => self.open_again(a, b, c),
            12 => self.make_ticket(a, b, c),
            13 => self.open_ticket(a, b, c),
            14..=17 => self.release(a, b, c),
            18 => self.unmap(a, b),
            19 => self.publish(a, b, c),
            20 => self.drop_name(a),
            21 | 22 => self.reap(),
            23 => self.expire(c),
            24 => self.window(a, b),
            26..=28 => self.input(a, b),
            29 | 30 => self.pin(a, b, c),
            31 => self.unpin(a),
            32..=34 => self.small(a),
            _ => self.decay(a),
        }
    }

    fn open_session(&mut self) {
        if self.alive.len() < 4 {
            let (ours, _theirs) = Connection::pair().unwrap();
            let session = Session::unwatched(self.books.next_session(), Arc::new(ours));
            self.books.add_session(session.clone());
            assert!(self.alive.insert(session.id), "a number was given twice");
            self.sessions.push(session);
        }
    }

    fn end_session(&mut self, a: u8) {
        let Some(session) = self.session(a) else { return };
        let segments = self.books.end_session(session.id);
        self.open.remove(&session.id);
        if self.alive.remove(&session.id) {
            self.ended.push((session.id, segments));
        } else {
            assert!(segments.is_empty());
        }
    }

    fn forget(&mut self, a: u8) {
        if self.ended.is_empty() {
            return;
        }
        let at = usize::from(a) % self.ended.len();
        let session = self.ended[at].0;
        let Some(id) = self.ended[at].1.pop() else {
            self.ended.swap_remove(at);
            return;
        };
        self.books.forget(session, id);
        let Some(seen) = self.segments.get_mut(&id) else { return };
        seen.exposed |= seen.leases.remove(&session).is_some();
        seen.mapped.remove(&session);
        if seen.home == session && seen.state == State::Free {
            seen.state = State::Retired;
        }
        self.settle(id);
    }

    fn allocate(&mut self, a: u8, b: u8, c: u8) {
        let Some(session) = self.session(a) else { return };
        let size = *pick(&SIZES, b).unwrap();
        let alive = self.alive.contains(&session.id);
        let taken = self.books.take_pooled(session.id, Kind::Result, size);
        assert_eq!(taken.is_ok(), alive);
        let Ok(taken) = taken else { return };
        if let Some(taken) = taken {
            let seen = self.segments.get_mut(&taken.id).unwrap();
            assert!(taken.recycled && seen.state == State::Free, "{seen:?} was used again");
            assert_eq!(seen.kind, Kind::Result, "clients may write there");
            assert!(!seen.exposed && seen.home == session.id && seen.leases.is_empty(), "{seen:?}");
            assert!((size..=2 * size).contains(&seen.size), "{seen:?}");
            seen.state = State::Filling;
            seen.generation += 1;
            seen.parts.clear();
            self.share(session.id, &taken, c);
            self.jobs.push(taken);
            return;
        }
        self.assert_none_free(session.id, Kind::Result, size);
        let at = self.books.snapshot();
        let mut asked = Asked::new(session.id, size, None);
        asked.grace = Duration::from_secs(3600);
        self.taken_back = true;
        match self.books.admit(&mut asked, Some(BUDGET), self.headroom, at) {
            Verdict::Granted => {
                assert!(self.books.charged() <= BUDGET, "more was promised than there is");
                self.growths.push((session.id, size));
                if c & 1 == 0 {
                    self.grow(u8::MAX, 0);
                }
            }
            Verdict::Wait => self.books.withdraw(&mut asked),
            Verdict::Refused(_) => {}
        }
    }

    fn assert_none_free(&self, session: u64, kind: Kind, size: u64) {
        let fits = |s: &&Seen| s.state == State::Free && (s.home, s.kind) == (session, kind);
        let free = self.segments.values().filter(fits).find(|s| (size..=2 * size).contains(&s.size));
        assert!(free.is_none(), "{free:?} was not found");
    }

    fn make(&mut self, kind: Kind, size: u64) -> (u64, Arc<SegmentMemory>) {
        let id = self.books.registry.next_id();
        let name = SegmentName { instance: 0xb0, kind, id };
        let segment = Segment::create(Backing::Memfd, &name, size).unwrap();
        (id, Arc::new(SegmentMemory::new(segment, self.reaper.0.clone())))
    }

    fn enter(&mut self, id: u64, kind: Kind, home: u64, size: u64, state: State) {
        let seen = Seen {
            kind,
            home,
            size,
            generation: 1,
            state,
            leases: BTreeMap::new(),
            mapped: BTreeSet::new(),
            readers: 0,
            exposed: false,
            reaped: false,
            parts: Vec::new(),
        };
        assert!(self.segments.insert(id, seen).is_none(), "a number was given twice");
    }

    /// A promised segment is made, or it fails. Its session may have ended meanwhile.
    fn grow(&mut self, a: u8, c: u8) {
        if self.growths.is_empty() {
            return;
        }
        let at = if a == u8::MAX { self.growths.len() - 1 } else { usize::from(a) % self.growths.len() };
        let (session, size) = self.growths.swap_remove(at);
        if c & 2 == 0 {
            let (id, memory) = self.make(Kind::Result, size);
            let taken = self.books.enter(id, session, Kind::Result, memory).unwrap();
            self.enter(id, Kind::Result, session, size, State::Filling);
            self.share(session, &taken, c);
            self.jobs.push(taken);
        }
        self.books.grown(size);
    }

    /// As a lane does at the end of a job.
    fn finish(&mut self, a: u8, b: u8, c: u8) {
        if self.jobs.is_empty() {
            return;
        }
        let taken = self.jobs.swap_remove(usize::from(a) % self.jobs.len());
        self.canaries += 1;
        assert!(copy_in(&Part(&taken), &self.canaries.to_le_bytes()));
        let shared = self.is_shared(taken.id);
        let seen = self.segments.get_mut(&taken.id).unwrap();
        assert!(seen.state == State::Filling || seen.state == State::Complete && shared, "{seen:?}");
        seen.state = State::Complete;
        seen.parts.push((taken.offset, self.canaries));
        let home = seen.home;
        let extent = self.books.complete(&taken, 64).unwrap();
        let granted = self.books.lease(home, extent);
        let Some(lease) = self.expect_lease(home, extent, granted) else {
            self.books.settle(taken.id);
            return self.settle(taken.id);
        };
        if b & 3 == 0 && !self.is_shared(taken.id) && !self.publish_as(home, lease.extent, c) {
            self.books.unlease(home, &lease);
            self.unlease(home, &lease);
        }
    }

    fn abort(&mut self, a: u8) {
        if self.jobs.is_empty() {
            return;
        }
        let taken = self.jobs.swap_remove(usize::from(a) % self.jobs.len());
        self.books.abort(taken.id);
        let seen = self.segments.get_mut(&taken.id).unwrap();
        // Nobody has seen it: the same proof as for a result without holds.
        let others = self.jobs.iter().any(|job| job.id == taken.id);
        if seen.state == State::Filling && !others {
            seen.state = State::Complete;
        }
        self.settle(taken.id);
    }

    fn unlease(&mut self, session: u64, lease: &Lease) {
        let seen = self.segments.get_mut(&lease.extent.segment).unwrap();
        if lease.fd {
            seen.mapped.remove(&session);
        }
        self.give_back(session, lease.extent.segment);
    }

    fn give_back(&mut self, session: u64, id: u64) {
        let leases = &mut self.segments.get_mut(&id).unwrap().leases;
        let n = leases.get_mut(&session).unwrap();
        *n -= 1;
        if *n == 0 {
            leases.remove(&session);
        }
        self.settle(id);
    }

    /// What every way to open has in common; now and then the reply does not arrive.
    fn opened(&mut self, session: u64, extent: Extent, granted: Result<Granted, Trouble>, c: u8) {
        if let Some(lease) = self.expect_lease(session, extent, granted)
            && c & 3 == 3
        {
            self.books.unlease(session, &lease);
            self.unlease(session, &lease);
        }
    }

    fn open_name(&mut self, a: u8, b: u8, c: u8) {
        let Some(session) = self.session(a) else { return };
        let name = *pick(&NAMES, b).unwrap();
        let opened = self.books.open(session.id, Target::Name(name.to_owned()));
        match self.names.get(name) {
            Some(id) => {
                let extent = self.extent(*id, 0);
                self.opened(session.id, extent, opened.map(|(granted, _)| granted), c);
            }
            None => assert!(opened.is_err()),
        }
    }

    fn open_again(&mut self, a: u8, b: u8, c: u8) {
        let (Some(session), Some(id)) = (self.session(a), self.segment(b)) else { return };
        let held = self.extent(id, c);
        let mut extent = held;
        extent.generation = extent.generation.wrapping_sub(u64::from(c >> 6));
        let opened = self.books.open(session.id, Target::Again(extent)).map(|(granted, _)| granted);
        if c >> 6 != 0 || self.leases_of(session.id, id) == 0 {
            assert!(opened.is_err(), "opened again what was not held");
            return;
        }
        if opened.is_ok()
            && let Some(seen) = self.segments.get_mut(&id)
        {
            seen.mapped.remove(&session.id);
        }
        self.opened(session.id, held, opened, c);
    }

    fn release(&mut self, a: u8, b: u8, c: u8) {
        let (Some(session), Some(id)) = (self.session(a), self.segment(b)) else { return };
        let stale = u64::from(c & 7 == 7);
        let generation = self.segments[&id].generation - stale;
        let tainted = c & 24 == 24;
        self.books.release(session.id, Release { segment: id, generation, tainted });
        if stale > 0 || self.leases_of(session.id, id) == 0 {
            self.stray += 1;
            return;
        }
        if let Some(seen) = self.segments.get_mut(&id) {
            seen.exposed |= tainted;
        }
        self.give_back(session.id, id);
    }

    fn unmap(&mut self, a: u8, b: u8) {
        let (Some(session), Some(id)) = (self.session(a), self.segment(b)) else { return };
        self.books.unmapped(session.id, id);
        if let Some(seen) = self.segments.get_mut(&id) {
            seen.mapped.remove(&session.id);
        }
    }

    fn reap(&mut self) {
        if let Ok(Dead::Segment(segment)) = self.reaper.1.try_recv() {
            let id = segment.name().id;
            drop(segment);
            self.books.reaped(id);
            let seen = self.segments.get_mut(&id).unwrap();
            assert_eq!(seen.state, State::Retired, "unmapped while it may be used");
            seen.reaped = true;
        }
    }

    fn window(&mut self, a: u8, b: u8) {
        let Some(session) = self.session(a) else { return };
        if b & 1 == 0 && self.windows.len() < 3 {
            let (id, memory) = self.make(Kind::Window, 4096);
            self.books.enter(id, session.id, Kind::Window, memory.clone()).unwrap();
            self.enter(id, Kind::Window, session.id, 4096, State::Window);
            if self.alive.contains(&session.id) {
                self.segments.get_mut(&id).unwrap().mapped.insert(session.id);
            }
            self.windows.push((id, memory));
        } else if let Some((id, memory)) = self.windows.pop() {
            self.books.move_window(id, WindowLife::Submitted).unwrap();
            if b & 2 == 0 {
                self.books.move_window(id, WindowLife::Writing).unwrap();
            }
            self.books.retire(id);
            self.segments.get_mut(&id).unwrap().state = State::Retired;
            drop(memory);
        }
    }

    /// As the watcher does with memory that has been idle for long.
    fn decay(&mut self, a: u8) {
        let Some(session) = self.session(a) else { return };
        let Ok(account) = self.books.account(session.id) else { return };
        if let Some((id, _)) = account.pool.take_oldest(Duration::ZERO) {
            self.books.retire(id);
            let seen = self.segments.get_mut(&id).unwrap();
            assert!(seen.state == State::Free && seen.home == session.id, "{seen:?}");
            seen.state = State::Retired;
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((0u8..35, any::<u8>(), any::<u8>(), any::<u8>()), 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_is_kept_as_the_model_keeps_it(steps in steps()) {
        let mut world = World::new();
        for _ in 0..2 {
            world.checked(World::open_session);
        }
        for step in steps {
            world.checked(|w| w.step(step));
        }
        world.end();
    }
}
