//! Tickets: holds that travel inside a pickle. Charged to the sender, consumed by the first `OPEN`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// One outstanding ticket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticket {
    secret: [u8; 16],
    pub(crate) segment: u64,
    pub(crate) generation: u64,
    /// The session that sent it.
    pub(crate) sender: u64,
    made: Instant,
}

/// All tickets, by number, which is also their age.
#[derive(Debug, Default)]
pub(crate) struct Tickets {
    tickets: BTreeMap<u64, Ticket>,
    last: u64,
}

impl Tickets {
    pub(crate) fn add(&mut self, secret: [u8; 16], segment: u64, generation: u64, sender: u64) -> u64 {
        self.last += 1;
        self.tickets.insert(self.last, Ticket { secret, segment, generation, sender, made: Instant::now() });
        self.last
    }

    /// Looks at a ticket, if the secret is the right one.
    pub(crate) fn find(&self, number: u64, secret: &[u8; 16]) -> Option<Ticket> {
        let ticket = self.tickets.get(&number)?;
        // Not a secret against a measuring peer (all are one user); still, no early end.
        let differ = ticket.secret.iter().zip(secret).fold(0, |acc, (a, b)| acc | (a ^ b));
        (differ == 0).then_some(*ticket)
    }

    pub(crate) fn remove(&mut self, number: u64) -> Option<Ticket> {
        self.tickets.remove(&number)
    }

    /// Takes out one ticket older than `ttl`.
    pub(crate) fn take_expired(&mut self, ttl: Duration) -> Option<Ticket> {
        let (number, oldest) = self.tickets.first_key_value()?;
        if oldest.made.elapsed() < ttl {
            return None;
        }
        let number = *number;
        self.tickets.remove(&number)
    }

    pub(crate) fn len(&self) -> usize {
        self.tickets.len()
    }
}
