//! Small results that share a segment.

use super::*;
use crate::memory::Memory;

/// What a job writes.
pub(super) struct Part<'a>(pub(super) &'a Taken);

impl Memory for Part<'_> {
    fn as_ptr(&self) -> *mut u8 {
        self.0.memory.as_ptr().wrapping_add(self.0.offset as usize)
    }

    fn len(&self) -> usize {
        self.0.memory.len() - self.0.offset as usize
    }
}

impl World {
    pub(super) fn is_shared(&self, id: u64) -> bool {
        self.books.registry.get(id).is_some_and(|entry| entry.shared)
    }

    /// Half of the results are small: their segment takes the next ones, too.
    pub(super) fn share(&mut self, session: u64, taken: &Taken, c: u8) {
        if c & 8 == 0 {
            self.books.share(session, taken, 60);
            if self.alive.contains(&session) {
                self.open.insert(session, (taken.id, 64));
            }
        }
    }

    /// One more small result in the open segment.
    pub(super) fn small(&mut self, a: u8) {
        let Some(session) = self.session(a) else { return };
        let taken = self.books.take_part(session.id, 960);
        assert_eq!(taken.is_ok(), self.alive.contains(&session.id));
        let open = self.open.get(&session.id).copied();
        let open = open.filter(|(id, end)| {
            let seen = &self.segments[id];
            assert!(matches!(seen.state, State::Filling | State::Complete), "{seen:?} is open");
            !seen.exposed && end + 960 <= seen.size
        });
        let taken = taken.ok().flatten();
        assert_eq!(taken.as_ref().map(|t| (t.id, t.offset)), open);
        let Some(taken) = taken else { return };
        self.open.insert(session.id, (taken.id, taken.offset + 960));
        self.jobs.push(taken);
    }
}
