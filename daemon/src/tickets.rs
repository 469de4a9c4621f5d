//! Tickets: holds that travel inside a pickle. Charged to the sender, consumed by the first `OPEN`.
//!
//! Those whose sender has ended are orphans. All of them together may be as many as one session's holds: past that, whoever
//! left most loses its oldest.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use shmquant_protocol::message::Extent;

/// One outstanding ticket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticket {
    secret: [u8; 16],
    pub(crate) extent: Extent,
    /// The session that sent it.
    pub(crate) sender: u64,
    made: Instant,
}

/// All tickets, by number, which is also their age.
#[derive(Debug, Default)]
pub(crate) struct Tickets {
    tickets: BTreeMap<u64, Ticket>,
    senders: HashMap<u64, Sender>,
    orphans: usize,
    last: u64,
}

/// Who has tickets outstanding.
#[derive(Debug, Default)]
struct Sender {
    numbers: BTreeSet<u64>,
    ended: bool,
}

impl Tickets {
    pub(crate) fn add(&mut self, secret: [u8; 16], extent: Extent, sender: u64) -> u64 {
        self.last += 1;
        self.tickets.insert(self.last, Ticket { secret, extent, sender, made: Instant::now() });
        self.senders.entry(sender).or_default().numbers.insert(self.last);
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
        let ticket = self.tickets.remove(&number)?;
        if let Some(sender) = self.senders.get_mut(&ticket.sender) {
            sender.numbers.remove(&number);
            self.orphans -= usize::from(sender.ended);
            if sender.numbers.is_empty() {
                self.senders.remove(&ticket.sender);
            }
        }
        Some(ticket)
    }

    /// Takes out one ticket older than `ttl`.
    pub(crate) fn take_expired(&mut self, ttl: Duration) -> Option<Ticket> {
        let (number, oldest) = self.tickets.first_key_value()?;
        if oldest.made.elapsed() < ttl {
            return None;
        }
        self.remove(*number)
    }

    /// A session has ended: what it sent is charged to nobody else.
    pub(crate) fn sender_ended(&mut self, session: u64) {
        if let Some(sender) = self.senders.get_mut(&session) {
            sender.ended = true;
            self.orphans += sender.numbers.len();
        }
    }

    /// Takes out tickets of the ended sender that left most, its oldest ones, if there are more than `most` orphans: at most
    /// `batch`, and at most half of them, since another one may have left most then.
    pub(crate) fn take_orphans(&mut self, most: u64, batch: usize) -> Vec<Ticket> {
        let over = self.orphans.saturating_sub(usize::try_from(most).unwrap_or(usize::MAX));
        let ended = self.senders.values().filter(|sender| sender.ended);
        let Some(largest) = ended.max_by_key(|sender| sender.numbers.len()).filter(|_| over > 0) else {
            return Vec::new();
        };
        let n = over.min(batch).min(largest.numbers.len().div_ceil(2));
        let numbers: Vec<u64> = largest.numbers.iter().take(n).copied().collect();
        numbers.into_iter().filter_map(|number| self.remove(number)).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.tickets.len()
    }

    /// Tickets whose sender has ended.
    pub(crate) fn orphans(&self) -> usize {
        self.orphans
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_left_most_loses_its_oldest() {
        let mut tickets = Tickets::default();
        let mut add = |sender, n: u64| {
            (0..n)
                .map(|segment| tickets.add([0; 16], Extent { segment, ..Extent::default() }, sender))
                .collect::<Vec<u64>>()
        };
        let (many, few, alive) = (add(1, 40), add(2, 3), add(3, 50));
        for ended in [1, 2, 9] {
            tickets.sender_ended(ended);
        }
        assert_eq!((tickets.len(), tickets.orphans()), (93, 43));
        assert!(tickets.take_orphans(43, 100).is_empty());
        let mut gone = Vec::new();
        loop {
            let batch = tickets.take_orphans(6, 8);
            assert!(batch.len() <= 8 && batch.iter().all(|t| t.sender == 1));
            if batch.is_empty() {
                break;
            }
            gone.extend(batch);
        }
        assert_eq!(tickets.orphans(), 6);
        assert!(gone.iter().map(|t| t.extent.segment).eq(0..37), "the oldest ones");
        let left = |numbers: &[u64]| numbers.iter().filter(|n| tickets.find(**n, &[0; 16]).is_some()).count();
        assert_eq!((left(&many), left(&few), left(&alive)), (3, 3, 50));
        // Opened or expired, they are no orphans any more.
        assert!(tickets.remove(few[0]).is_some());
        while tickets.take_expired(Duration::ZERO).is_some() {}
        assert_eq!((tickets.len(), tickets.orphans(), tickets.senders.len()), (0, 0, 0));
    }
}
