//! The books: registry, sessions, catalog and tickets, under one lock with short sections.
//!
//! Nothing under the lock blocks or frees memory. What has to follow (notices to clients, unmapping, waking
//! lanes) is noted as an effect and happens when the lock is let go.

use std::collections::{BTreeMap, HashSet};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use shmquant_protocol::failpoint::failpoint;
use shmquant_protocol::message::{ErrorCode, Extent, Lease, Release};
use shmquant_protocol::segment::Kind;

use crate::admission::Admission;
use crate::catalog::Catalog;
use crate::error::Trouble;
use crate::lane::Lane;
use crate::life::{Life, ResultLife, WindowLife};
use crate::memory::{Memory, SegmentMemory};
use crate::pool::Pool;
use crate::registry::{Entry, Part, Registry};
use crate::session::Session;
use crate::shared::Open;
use crate::tickets::Tickets;

/// Everything that the lock protects.
#[derive(Debug, Default)]
pub(crate) struct Books {
    pub(crate) registry: Registry,
    pub(crate) sessions: BTreeMap<u64, Account>,
    pub(crate) catalog: Catalog,
    pub(crate) tickets: Tickets,
    pub(crate) admission: Admission,
    pub(crate) counters: Counters,
    /// Lanes that wait for memory or for a name.
    waiting: Vec<Arc<Lane>>,
    effects: Effects,
    last_session: u64,
    pool_divisor: u64,
    max_holds: u64,
}

/// What a session has.
#[derive(Debug)]
pub(crate) struct Account {
    pub(crate) session: Arc<Session>,
    pub(crate) lanes: BTreeMap<u32, Arc<Lane>>,
    last_lane: u32,
    pub(crate) pool: Pool,
    /// Where its next small result goes.
    pub(crate) open: Option<Open>,
    /// Segments that it leases or maps.
    pub(crate) segments: HashSet<u64>,
    /// Leases and outstanding tickets.
    pub(crate) holds: u64,
    /// Serial number of the last growth it was granted.
    pub(crate) last_grant: u64,
}

/// What happened since the start; only ever grows.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counters {
    pub(crate) recycled: u64,
    pub(crate) retired: u64,
    pub(crate) requests: u64,
    /// Bytes of values that came through windows.
    pub(crate) bytes_copied: u64,
    /// Bytes of values that were read where they lay.
    pub(crate) bytes_shared: u64,
    pub(crate) stray_releases: u64,
    pub(crate) expired_tickets: u64,
}

#[derive(Debug, Default)]
struct Effects {
    notices: Vec<(Arc<Session>, u64)>,
    drops: Vec<Arc<SegmentMemory>>,
    woken: Vec<Arc<Lane>>,
}

/// Memory as a job gets it to fill, or as it is before a client gets it.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) id: u64,
    pub(crate) memory: Arc<SegmentMemory>,
    /// Where what is made of it begins.
    pub(crate) offset: u64,
    /// It was used before.
    pub(crate) recycled: bool,
}

/// A lease and, if this session has not had it yet, the memory whose descriptor goes with it.
#[derive(Debug)]
pub(crate) struct Granted {
    pub(crate) lease: Lease,
    pub(crate) memory: Option<Arc<SegmentMemory>>,
}

impl Books {
    pub(crate) fn new(pool_divisor: u64, max_holds: u64) -> Self {
        Self { pool_divisor, max_holds, ..Self::default() }
    }

    // Sessions and lanes.

    pub(crate) fn next_session(&mut self) -> u64 {
        self.last_session += 1;
        self.last_session
    }

    pub(crate) fn add_session(&mut self, session: Arc<Session>) {
        let account = Account {
            session: session.clone(),
            lanes: BTreeMap::new(),
            last_lane: 0,
            pool: Pool::default(),
            open: None,
            segments: HashSet::new(),
            holds: 0,
            last_grant: 0,
        };
        self.sessions.insert(session.id, account);
    }

    pub(crate) fn account(&mut self, session: u64) -> Result<&mut Account, Trouble> {
        self.sessions.get_mut(&session).ok_or(Trouble::Lost)
    }

    /// Ends a session: from here on it gets nothing more. What it had is to be given to
    /// [`forget`](Self::forget), in batches so that others get the lock in between.
    pub(crate) fn end_session(&mut self, session: u64) -> Vec<u64> {
        let Some(mut account) = self.sessions.remove(&session) else { return Vec::new() };
        let mut segments = std::mem::take(&mut account.segments);
        while let Some((id, _)) = account.pool.take_oldest(Duration::ZERO) {
            segments.insert(id);
        }
        self.tickets.sender_ended(session);
        self.wake_waiting();
        segments.into_iter().collect()
    }

    /// Takes from a segment what an ended session had of it.
    pub(crate) fn forget(&mut self, session: u64, id: u64) {
        let Some(entry) = self.registry.get_mut(id) else { return };
        let held = entry.leases.len();
        entry.leases.retain(|(s, _)| *s != session);
        // Not released by its holder: somebody may still look at it.
        entry.exposed |= entry.leases.len() != held;
        entry.mapped.retain(|s| *s != session);
        if entry.home == session && entry.is_free() {
            self.retire(id);
        }
        self.settle(id);
        self.clean(id);
    }

    pub(crate) fn next_lane(&mut self, session: u64, most: u32) -> Result<u32, Trouble> {
        let account = self.account(session)?;
        if account.lanes.len() >= most as usize {
            return Err(Trouble::new(
                ErrorCode::Limit,
                format!("this session has {most} lanes, which is the most there can be"),
                "share lanes between threads, or start the daemon with a larger --max-lanes",
            ));
        }
        account.last_lane += 1;
        Ok(account.last_lane)
    }

    pub(crate) fn add_lane(&mut self, session: u64, lane: Arc<Lane>) -> Result<(), Trouble> {
        self.account(session)?.lanes.insert(lane.id, lane);
        Ok(())
    }

    pub(crate) fn remove_lane(&mut self, session: u64, lane: u32) {
        if let Some(account) = self.sessions.get_mut(&session) {
            account.lanes.remove(&lane);
        }
    }

    // Segments.

    /// Enters a new segment: one that a job fills, one that is about to be leased, or a lane's window, which the session
    /// maps with the reply.
    pub(crate) fn enter(
        &mut self,
        id: u64,
        home: u64,
        kind: Kind,
        memory: Arc<SegmentMemory>,
    ) -> Result<Taken, Trouble> {
        let mut entry = new_entry(id, home, kind, memory.clone());
        entry.go(in_use(kind))?;
        if kind != Kind::Window {
            entry.writers = 1;
        } else if let Some(account) = self.sessions.get_mut(&home) {
            account.segments.insert(id);
            entry.mapped.push(home);
        }
        self.registry.insert(entry);
        Ok(Taken { id, memory, offset: 0, recycled: false })
    }

    // Windows.

    pub(crate) fn move_window(&mut self, id: u64, to: WindowLife) -> Result<(), Trouble> {
        match self.registry.get_mut(id) {
            Some(entry) => Ok(entry.go(Life::Window(to))?),
            None => Err(Trouble::Lost),
        }
    }

    // Results.

    /// A free segment of the session's own, for a job to fill or, an input, for the client.
    pub(crate) fn take_pooled(
        &mut self,
        session: u64,
        kind: Kind,
        size: u64,
    ) -> Result<Option<Taken>, Trouble> {
        let Some(id) = self.account(session)?.pool.take(kind, size) else { return Ok(None) };
        let Some(entry) = self.registry.get_mut(id) else { return Ok(None) };
        let Some(memory) = entry.memory.clone() else { return Ok(None) };
        entry.go(in_use(kind))?;
        entry.generation += 1;
        entry.parts.clear();
        entry.shared = false;
        entry.writers = 1;
        entry.created = SystemTime::now();
        self.counters.recycled += 1;
        Ok(Some(Taken { id, memory, offset: 0, recycled: true }))
    }

    /// The job has written everything.
    pub(crate) fn complete(&mut self, taken: &Taken, length: u64) -> Result<Extent, Trouble> {
        let Some(entry) = self.registry.get_mut(taken.id) else { return Err(Trouble::Lost) };
        // The first one of several makes the segment complete; others follow where nobody has read.
        if !entry.is_complete() {
            entry.go(Life::Result(ResultLife::Complete))?;
        }
        entry.writers = entry.writers.saturating_sub(1);
        let part = Part { offset: taken.offset, length };
        entry.parts.push(part);
        Ok(Extent { segment: entry.id, generation: entry.generation, offset: part.offset, length })
    }

    /// The job has failed; nobody has ever seen what it wrote.
    pub(crate) fn abort(&mut self, id: u64) {
        let Some(entry) = self.registry.get_mut(id) else { return };
        entry.writers = entry.writers.saturating_sub(1);
        if !entry.is_held() {
            self.free_or_retire(id);
        }
    }

    /// Gives a session one more hold on a complete result, or on an input of its own.
    pub(crate) fn lease(&mut self, session: u64, extent: Extent) -> Result<Granted, Trouble> {
        let id = extent.segment;
        let most = self.max_holds;
        let account = self.sessions.get_mut(&session).ok_or(Trouble::Lost)?;
        if account.holds >= most {
            return Err(too_many_holds(most));
        }
        let entry =
            self.registry.get_mut(id).filter(|e| e.is_leasable() && e.has(&extent)).ok_or_else(gone)?;
        entry.add_lease(session);
        entry.exposed |= session != entry.home;
        account.holds += 1;
        account.segments.insert(id);
        let fd = !entry.mapped.contains(&session);
        if fd {
            entry.mapped.push(session);
        }
        let lease = Lease { extent, segment_size: entry.size, fd, dataset: entry.datasets > 0 };
        Ok(Granted { lease, memory: entry.memory.clone().filter(|_| fd) })
    }

    /// Takes back a hold whose reply did not reach the session.
    pub(crate) fn unlease(&mut self, session: u64, granted: &Lease) {
        if granted.fd
            && let Some(entry) = self.registry.get_mut(granted.extent.segment)
        {
            entry.mapped.retain(|s| *s != session);
        }
        let Extent { segment, generation, .. } = granted.extent;
        self.release(session, Release { segment, generation, tainted: false });
    }

    /// Takes one hold back.
    pub(crate) fn release(&mut self, session: u64, release: Release) {
        let entry = self.registry.leased_mut(release.segment, release.generation);
        let Some(entry) = entry.filter(|e| e.leases_of(session) > 0) else {
            // Nothing is harmed by it, but it is worth knowing.
            self.counters.stray_releases += 1;
            tracing::debug!(session, release.segment, release.generation, "a release of what is not held");
            return;
        };
        entry.drop_lease(session);
        entry.exposed |= release.tainted;
        let has_it = entry.leases_of(session) > 0 || entry.mapped.contains(&session);
        if let Some(account) = self.sessions.get_mut(&session) {
            account.holds = account.holds.saturating_sub(1);
            if !has_it {
                account.segments.remove(&release.segment);
            }
        }
        failpoint("daemon.released");
        self.settle(release.segment);
    }

    /// The session has unmapped a segment.
    pub(crate) fn unmapped(&mut self, session: u64, id: u64) {
        if let Some(entry) = self.registry.get_mut(id) {
            entry.mapped.retain(|s| *s != session);
            if entry.leases_of(session) == 0
                && let Some(account) = self.sessions.get_mut(&session)
            {
                account.segments.remove(&id);
            }
            self.clean(id);
            failpoint("daemon.unmapped");
        }
    }

    /// The daemon's own mapping is gone.
    pub(crate) fn reaped(&mut self, id: u64) {
        if let Some(entry) = self.registry.get_mut(id) {
            entry.reaped = true;
            self.clean(id);
            failpoint("daemon.reaped");
        }
    }

    /// What becomes of a result or input whose last hold may have gone.
    pub(crate) fn settle(&mut self, id: u64) {
        let Some(entry) = self.registry.get_mut(id) else { return };
        if entry.is_leasable() && !entry.is_held() {
            self.free_or_retire(id);
        }
    }

    /// Recycle on proof, otherwise retire.
    fn free_or_retire(&mut self, id: u64) {
        let cap = self.pool_cap();
        let Some(entry) = self.registry.get_mut(id) else { return };
        let home = entry.home;
        let fits = entry.kind != Kind::Window && !entry.exposed && entry.size <= cap;
        let account = self.sessions.get_mut(&home).filter(|_| fits);
        let Some(account) = account else { return self.retire(id) };
        let free = match entry.life {
            Life::Result(_) => Life::Result(ResultLife::Free),
            Life::Window(_) => Life::Window(WindowLife::Free),
        };
        if let Err(error) = entry.go(free) {
            tracing::error!("{error}");
            return;
        }
        account.pool.put(id, entry.kind, entry.size);
        account.open.take_if(|open| open.id == id);
        failpoint("daemon.recycled");
        let mut over = Vec::new();
        while account.pool.bytes() > cap
            && let Some((oldest, _)) = account.pool.take_oldest(Duration::ZERO)
        {
            over.push(oldest);
        }
        for oldest in over {
            self.retire(oldest);
        }
        self.wake_waiting();
    }

    /// Gives a segment up: unmaps it here, asks those who map it to do so, too.
    pub(crate) fn retire(&mut self, id: u64) {
        let Some(entry) = self.registry.get_mut(id) else { return };
        let gone = match entry.life {
            Life::Result(_) => entry.go(Life::Result(ResultLife::Retired)),
            Life::Window(WindowLife::Free) => entry.go(Life::Window(WindowLife::Retired)),
            Life::Window(_) => entry
                .go(Life::Window(WindowLife::Free))
                .and_then(|()| entry.go(Life::Window(WindowLife::Retired))),
        };
        if let Err(error) = gone {
            tracing::error!("{error}");
            return;
        }
        let (size, home) = (entry.size, entry.home);
        self.effects.drops.extend(entry.memory.take());
        for session in &entry.mapped {
            if let Some(account) = self.sessions.get(session) {
                self.effects.notices.push((account.session.clone(), id));
            }
        }
        if let Some(account) = self.sessions.get_mut(&home) {
            account.open.take_if(|open| open.id == id);
        }
        self.counters.retired += 1;
        self.registry.note_leaving(size);
        failpoint("daemon.retired");
    }

    /// Gives up everything, when the daemon stops.
    pub(crate) fn retire_all(&mut self) {
        let left: Vec<_> = self.registry.iter().filter(|e| !e.life.is_retired()).map(|e| e.id).collect();
        for id in left {
            self.retire(id);
        }
    }

    fn clean(&mut self, id: u64) {
        if self.registry.remove_if_gone(id) {
            self.wake_waiting();
        }
    }

    // Waiting lanes.

    pub(crate) fn add_waiting(&mut self, lane: &Arc<Lane>) {
        if !self.waiting.iter().any(|l| Arc::ptr_eq(l, lane)) {
            self.waiting.push(lane.clone());
        }
    }

    pub(crate) fn remove_waiting(&mut self, lane: &Arc<Lane>) {
        self.waiting.retain(|l| !Arc::ptr_eq(l, lane));
    }

    /// Memory or a name may have come free.
    pub(crate) fn wake_waiting(&mut self) {
        if !self.waiting.is_empty() {
            self.effects.woken.clone_from(&self.waiting);
        }
    }

    /// Most bytes that a session's pool may have.
    pub(crate) fn pool_cap(&self) -> u64 {
        self.admission.limit() / self.pool_divisor.max(1)
    }

    pub(crate) fn max_holds(&self) -> u64 {
        self.max_holds
    }
}

/// The lock on the books. Letting it go carries out the effects.
pub(crate) struct Locked<'a>(Option<MutexGuard<'a, Books>>);

impl<'a> Locked<'a> {
    pub(crate) fn new(guard: MutexGuard<'a, Books>) -> Self {
        Self(Some(guard))
    }
}

impl Deref for Locked<'_> {
    type Target = Books;

    fn deref(&self) -> &Books {
        match &self.0 {
            Some(books) => books,
            None => unreachable!("taken when dropped only"),
        }
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Books {
        match &mut self.0 {
            Some(books) => books,
            None => unreachable!("taken when dropped only"),
        }
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let Some(mut books) = self.0.take() else { return };
        let effects = std::mem::take(&mut books.effects);
        drop(books);
        for (session, segment) in effects.notices {
            session.ask_unmap(segment);
        }
        for lane in effects.woken {
            lane.wake.signal();
        }
        // Last: the sends to the reaper, one for each segment that nobody else holds.
        drop(effects.drops);
    }
}

pub(crate) fn gone() -> Trouble {
    Trouble::new(
        ErrorCode::Gone,
        "this result or input is not held by the session any more, or never was",
        "quantize again, or open the dataset by its name",
    )
}

pub(crate) fn too_many_holds(most: u64) -> Trouble {
    Trouble::new(
        ErrorCode::Limit,
        format!("this session holds {most} results and tickets, which is the most there can be"),
        "release results that are not needed any more",
    )
}

/// The state in which a segment is given out.
fn in_use(kind: Kind) -> Life {
    match kind {
        Kind::Result => Life::Result(ResultLife::Filling),
        Kind::Window | Kind::Input => Life::Window(WindowLife::Writing),
    }
}

/// A segment that is free, and not in any pool.
fn new_entry(id: u64, home: u64, kind: Kind, memory: Arc<SegmentMemory>) -> Entry {
    Entry {
        id,
        kind,
        generation: 1,
        size: memory.len() as u64,
        life: match kind {
            Kind::Result => Life::Result(ResultLife::Free),
            Kind::Window | Kind::Input => Life::Window(WindowLife::Free),
        },
        home,
        memory: Some(memory),
        parts: Vec::new(),
        shared: false,
        leases: Vec::new(),
        writers: 0,
        readers: 0,
        tickets: 0,
        datasets: 0,
        exposed: false,
        mapped: Vec::new(),
        reaped: false,
        since: Instant::now(),
        created: SystemTime::now(),
    }
}

#[cfg(test)]
mod model;
