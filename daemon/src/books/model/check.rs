//! What the books must be after each step, by the model.

use super::*;
use crate::memory::{Memory, copy_out};

impl World {
    fn check(&mut self, retired_before: &BTreeSet<u64>) {
        let cap = self.books.admission.limit() / 4;
        self.check_entries(cap);
        self.check_effects(retired_before);
        self.check_accounts(cap);
        let books = &self.books;
        let sizes = |retired: bool| {
            let all = self.segments.values().filter(move |s| !retired || s.state == State::Retired);
            all.map(|s| s.size).sum::<u64>()
        };
        assert_eq!(books.registry.len(), self.segments.len());
        assert_eq!(books.registry.bytes(), sizes(false));
        assert_eq!(books.registry.leaving(), sizes(true));
        assert_eq!(books.admission.growing(), self.growths.iter().map(|(_, size)| size).sum::<u64>());
        assert_eq!(books.admission.waiting(), 0);
        assert_eq!(books.counters.stray_releases, self.stray);
        assert_eq!(books.tickets.len(), self.tickets.len());
        let orphans = self.tickets.iter().filter(|t| !books.sessions.contains_key(&t.sender)).count();
        assert_eq!(books.tickets.orphans(), orphans);
        let names = books.catalog.after(0).map(|(_, d)| (d.name.clone(), d.extent.segment));
        assert_eq!(names.collect::<BTreeMap<_, _>>(), self.names);
    }

    fn check_entries(&mut self, cap: u64) {
        let evicting: BTreeMap<u64, u64> = self.alive.iter().map(|s| (*s, self.free_bytes(*s))).collect();
        let mut buffer = Vec::new();
        for (id, seen) in &mut self.segments {
            let Some(entry) = self.books.registry.get(*id) else {
                // Idle memory that was given up may be gone already when nobody else maps it.
                assert!(
                    seen.state == State::Retired && seen.reaped && seen.mapped.is_empty(),
                    "lost {seen:?}"
                );
                continue;
            };
            let over = self.taken_back || evicting.get(&seen.home).is_some_and(|free| *free > cap);
            if seen.state == State::Free && entry.life.is_retired() && over {
                seen.state = State::Retired;
            }
            let life = match seen.state {
                State::Free => "free",
                State::Filling => "filling",
                State::Complete => "complete",
                State::Retired => "retired",
                State::Input if seen.readers > 0 => "submitted",
                State::Input | State::Window => "writing",
            };
            assert_eq!(entry.life.word(), life, "segment {id}: {seen:?} {entry:?}");
            assert_eq!(entry.leases.iter().copied().collect::<BTreeMap<_, _>>(), seen.leases, "{id}");
            assert_eq!(entry.mapped.iter().copied().collect::<BTreeSet<_>>(), seen.mapped, "{id}");
            assert_eq!(entry.mapped.len(), seen.mapped.len(), "{id} is mapped twice by one session");
            let tickets = self.tickets.iter().filter(|t| t.extent.segment == *id).count();
            let datasets = self.names.values().filter(|s| *s == id).count();
            assert_eq!((entry.tickets as usize, entry.datasets as usize), (tickets, datasets), "{id}");
            assert_eq!(entry.generation, seen.generation, "{id}");
            assert_eq!((entry.home, entry.size), (seen.home, seen.size), "{id}");
            assert_eq!((entry.kind, entry.readers), (seen.kind, seen.readers), "{id}");
            assert_eq!(entry.exposed, seen.exposed, "{id}");
            let writers = self.jobs.iter().filter(|taken| taken.id == *id).count();
            assert_eq!(entry.writers as usize, writers, "{id}");
            assert_eq!(entry.memory.is_none(), seen.state == State::Retired, "{id}");
            assert!(!(seen.reaped && seen.mapped.is_empty()), "{id} is kept for nobody");
            if seen.state == State::Complete
                && let Some(memory) = &entry.memory
            {
                assert_eq!(memory.len() as u64, seen.size);
                for (offset, canary) in &seen.parts {
                    assert!(copy_out(&**memory, *offset as usize, 8, &mut buffer));
                    assert_eq!(buffer, canary.to_le_bytes(), "{id} was written at {offset} while it is held");
                }
            }
        }
        self.segments.retain(|_, s| !(s.state == State::Retired && s.reaped && s.mapped.is_empty()));
        self.taken_back = false;
    }

    fn free_bytes(&self, session: u64) -> u64 {
        let free = self.segments.values().filter(|s| s.state == State::Free && s.home == session);
        free.map(|s| s.size).sum()
    }

    /// Who maps what has just been given up is told so, once.
    fn check_effects(&mut self, retired_before: &BTreeSet<u64>) {
        let effects = std::mem::take(&mut self.books.effects);
        let told: BTreeSet<_> = effects.notices.iter().map(|(session, id)| (session.id, *id)).collect();
        assert_eq!(told.len(), effects.notices.len(), "told twice");
        let retired =
            self.segments.iter().filter(|(id, s)| s.state == State::Retired && !retired_before.contains(id));
        let expected = retired.flat_map(|(id, s)| s.mapped.iter().map(move |session| (*session, *id)));
        let expected: BTreeSet<_> = expected.filter(|(session, _)| self.alive.contains(session)).collect();
        assert_eq!(told, expected);
    }

    fn check_accounts(&self, cap: u64) {
        assert_eq!(self.books.sessions.keys().copied().collect::<BTreeSet<_>>(), self.alive);
        for (session, account) in &self.books.sessions {
            assert_eq!(account.holds, self.holds(*session), "holds of {session}");
            assert_eq!(account.pool.bytes(), self.free_bytes(*session), "pool of {session}");
            assert!(account.pool.bytes() <= cap, "pool of {session}");
            assert_eq!(account.open.map(|open| (open.id, open.end)), self.open.get(session).copied());
            let has = |s: &Seen| s.mapped.contains(session) || s.leases.contains_key(session);
            let has = self.segments.iter().filter(|(_, s)| has(s)).map(|(id, _)| *id);
            let noted = account.segments.iter().copied().collect::<BTreeSet<_>>();
            assert_eq!(noted, has.collect::<BTreeSet<_>>(), "segments of {session}");
        }
    }

    pub(super) fn checked(&mut self, step: impl FnOnce(&mut Self)) {
        let retired = self.segments.iter().filter(|(_, s)| s.state == State::Retired);
        let retired = retired.map(|(id, _)| *id).collect();
        step(self);
        self.check(&retired);
    }

    /// Everybody leaves, in whatever order things are found: nothing may be left.
    pub(super) fn end(&mut self) {
        while let Some(session) = self.alive.first().copied() {
            let at = self.sessions.iter().position(|s| s.id == session).unwrap();
            self.checked(|w| w.end_session(at as u8));
        }
        while !self.growths.is_empty() {
            self.checked(|w| w.grow(0, 0));
        }
        while !self.jobs.is_empty() {
            let finish = self.jobs.len().is_multiple_of(2);
            self.checked(|w| if finish { w.finish(0, 1, 0) } else { w.abort(0) });
        }
        while !self.pins.is_empty() {
            self.checked(|w| w.unpin(0));
        }
        while !self.windows.is_empty() {
            self.checked(|w| w.window(0, 1));
        }
        while !self.ended.is_empty() {
            self.checked(|w| w.forget(0));
        }
        self.checked(|w| w.expire(0));
        for name in 0..NAMES.len() as u8 {
            self.checked(|w| w.drop_name(name));
        }
        while !self.segments.is_empty() {
            let before = self.segments.len();
            self.checked(Self::reap);
            assert!(self.segments.len() < before, "what is held by nobody stays: {:?}", self.segments);
        }
        assert_eq!((self.books.charged(), self.books.registry.leaving()), (0, 0));
        assert_eq!(self.books.tickets.len() + self.books.catalog.len(), 0);
    }
}
