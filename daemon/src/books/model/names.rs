//! Holds that are no session's: tickets and names.

use super::*;

impl World {
    pub(super) fn make_ticket(&mut self, a: u8, b: u8, c: u8) {
        let (Some(session), Some(id)) = (self.session(a), self.segment(b)) else { return };
        let extent = self.extent(id, c);
        let mut asked = extent;
        asked.length = asked.length.wrapping_sub(u64::from(c >> 6));
        let made = self.books.make_ticket(session.id, asked, [c; 16]);
        let may = self.leases_of(session.id, id) > 0
            && self.alive.contains(&session.id)
            && self.segments[&id].kind == Kind::Result;
        if may && c >> 6 == 0 && self.holds(session.id) < MAX_HOLDS {
            let number = made.unwrap();
            assert!(self.tickets.iter().all(|t| t.number != number));
            self.tickets.push(Ticketed { number, secret: [c; 16], extent, sender: session.id });
        } else {
            assert!(made.is_err(), "a ticket for what is not held");
        }
    }

    pub(super) fn open_ticket(&mut self, a: u8, b: u8, c: u8) {
        let Some(session) = self.session(a) else { return };
        let Some(ticket) = pick(&self.tickets, b).copied() else { return };
        let mut secret = ticket.secret;
        secret[15] ^= c & 4;
        let opened = self.books.open(session.id, Target::Ticket(ticket.number, secret));
        if c & 4 != 0 {
            assert!(opened.is_err(), "a wrong secret opened a ticket");
            return;
        }
        let taken = opened.is_ok();
        let granted = opened.map(|(granted, _)| granted);
        // The books take the hold first and the ticket after it.
        let lease = self.expect_lease(session.id, ticket.extent, granted);
        assert_eq!(taken, lease.is_some());
        if let Some(lease) = lease {
            self.tickets.retain(|t| t.number != ticket.number);
            if c & 3 == 3 {
                self.books.unlease(session.id, &lease);
                self.unlease(session.id, &lease);
            }
        }
    }

    pub(super) fn publish(&mut self, a: u8, b: u8, c: u8) {
        if let (Some(session), Some(id)) = (self.session(a), self.segment(b)) {
            if self.is_shared(id) {
                return;
            }
            let extent = self.extent(id, 0);
            self.publish_as(session.id, extent, c);
        }
    }

    pub(super) fn publish_as(&mut self, session: u64, extent: Extent, c: u8) -> bool {
        let name = *pick(&NAMES, c).unwrap();
        let replace = c & 4 != 0;
        let origin = Origin { extent, fingerprint: None };
        let who = self.sessions.iter().find(|s| s.id == session).cloned().unwrap();
        let done = self.books.publish(&who, extent, origin, name.to_owned(), replace, MAX_DATASETS);
        let id = extent.segment;
        let there = self.names.get(name).copied();
        let room = if there.is_some() { replace } else { (self.names.len() as u64) < MAX_DATASETS };
        let result = self.segments[&id].kind == Kind::Result;
        if self.leases_of(session, id) == 0 || !result || !room && there != Some(id) {
            assert!(done.is_err(), "published without a hold, a right or room");
            return false;
        }
        assert!(done.is_ok(), "{done:?}");
        if let Some(seen) = self.segments.get_mut(&id) {
            seen.exposed = true;
        }
        self.names.insert(name.to_owned(), id);
        there.into_iter().for_each(|before| self.settle(before));
        true
    }

    pub(super) fn drop_name(&mut self, a: u8) {
        let name = *pick(&NAMES, a).unwrap();
        let dropped = self.books.drop_dataset(name);
        let id = self.names.remove(name);
        assert_eq!(dropped.is_ok(), id.is_some());
        id.into_iter().for_each(|id| self.settle(id));
    }

    pub(super) fn expire(&mut self, c: u8) {
        let ttl = if c & 7 == 0 { Duration::ZERO } else { Duration::MAX };
        self.books.expire_tickets(ttl);
        if ttl.is_zero() {
            for ticket in std::mem::take(&mut self.tickets) {
                self.settle(ticket.extent.segment);
            }
        }
    }
}
