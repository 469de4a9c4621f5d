//! Inputs, and the requests that read values where they lie.

use super::*;

impl World {
    /// As a lane does for `ALLOC`.
    pub(super) fn input(&mut self, a: u8, b: u8) {
        let Some(session) = self.session(a) else { return };
        if self.segments.values().filter(|s| s.kind == Kind::Input).count() >= 6 {
            return;
        }
        let size = *pick(&SIZES, b).unwrap();
        let taken = self.books.take_pooled(session.id, Kind::Input, size);
        assert_eq!(taken.is_ok(), self.alive.contains(&session.id));
        let Ok(taken) = taken else { return };
        let id = match taken {
            Some(taken) => {
                let seen = self.segments.get_mut(&taken.id).unwrap();
                assert!(seen.state == State::Free && seen.kind == Kind::Input, "{seen:?} was used again");
                assert!(!seen.exposed && seen.home == session.id && seen.readers == 0, "{seen:?}");
                seen.generation += 1;
                taken.id
            }
            None => {
                self.assert_none_free(session.id, Kind::Input, size);
                let (id, memory) = self.make(Kind::Input, size);
                self.books.enter(id, session.id, Kind::Input, memory).unwrap();
                self.enter(id, Kind::Input, session.id, size, State::Input);
                id
            }
        };
        self.segments.get_mut(&id).unwrap().state = State::Input;
        let granted = self.books.offer(session.id, id, 64);
        let extent = self.extent(id, 0);
        if self.expect_lease(session.id, extent, granted).is_none() {
            self.settle(id);
        }
    }

    pub(super) fn pin(&mut self, a: u8, b: u8, c: u8) {
        let (Some(session), Some(id)) = (self.session(a), self.segment(b)) else { return };
        let mut extent = self.extent(id, c);
        extent.generation = extent.generation.wrapping_sub(u64::from(c & 3 == 3));
        extent.length = extent.length.wrapping_sub(u64::from(c >> 6));
        let held = self.leases_of(session.id, id) > 0;
        let pinned = self.books.pin(session.id, extent);
        assert_eq!(pinned.is_ok(), held && c & 3 != 3 && c >> 6 == 0, "{:?}", self.segments[&id]);
        if pinned.is_ok() {
            self.segments.get_mut(&id).unwrap().readers += 1;
            self.pins.push(id);
        }
    }

    pub(super) fn unpin(&mut self, a: u8) {
        if self.pins.is_empty() {
            return;
        }
        let id = self.pins.swap_remove(usize::from(a) % self.pins.len());
        self.books.unpin(id);
        self.segments.get_mut(&id).unwrap().readers -= 1;
        self.settle(id);
    }
}
