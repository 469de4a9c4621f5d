//! Whether a call asks for its reply again and again, or sleeps at once.
//!
//! A sleeping daemon takes longer to wake than it takes to work on a small request, and so does a sleeping client. If
//! both give up polling sooner than that, each always finds the other asleep: the client has to hold out longer.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Most requests that sleep before polling is tried again.
const LONGEST_REST: u32 = 64;

/// Polling of one session: by one call at a time, and seldom while it does not pay.
#[derive(Debug)]
pub(super) struct Polling {
    most: Duration,
    taken: AtomicBool,
    /// Requests that are still to sleep at once.
    rest: AtomicU32,
    /// How many there were to be the last time.
    last_rest: AtomicU32,
}

impl Polling {
    /// Polls for at most so long; zero is never.
    pub(super) fn new(most: Duration) -> Self {
        Self { most, taken: AtomicBool::new(false), rest: AtomicU32::new(0), last_rest: AtomicU32::new(0) }
    }

    /// The right to poll, unless another call has it or it has not paid lately.
    pub(super) fn take(&self) -> Option<Turn<'_>> {
        if self.most.is_zero() || self.taken.swap(true, Ordering::Acquire) {
            return None;
        }
        // From here on this is the only call that changes the counts.
        let rest = self.rest.load(Ordering::Relaxed);
        if rest > 0 {
            self.rest.store(rest - 1, Ordering::Relaxed);
            self.taken.store(false, Ordering::Release);
            return None;
        }
        Some(Turn { polling: self, since: Instant::now() })
    }
}

/// The right to poll for one reply, from now on until it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    polling: &'a Polling,
    since: Instant,
}

impl Turn<'_> {
    /// How long to poll.
    pub(super) fn length(&self) -> Duration {
        self.polling.most
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let Polling { most, taken, rest, last_rest } = self.polling;
        let next = match self.since.elapsed() <= *most {
            true => 0,
            false => (last_rest.load(Ordering::Relaxed) * 2).clamp(1, LONGEST_REST),
        };
        rest.store(next, Ordering::Relaxed);
        last_rest.store(next, Ordering::Relaxed);
        taken.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_call_at_a_time_and_none_if_it_is_off() {
        assert!(Polling::new(Duration::ZERO).take().is_none());
        let polling = Polling::new(Duration::from_secs(3600));
        let turn = polling.take().unwrap();
        assert!(polling.take().is_none());
        drop(turn);
        assert!(polling.take().is_some());
    }

    #[test]
    fn it_rests_longer_the_longer_it_has_not_paid() {
        let polling = Polling::new(Duration::from_nanos(1));
        let mut rests = Vec::new();
        for _ in 0..9 {
            let turn = polling.take().unwrap();
            while turn.since.elapsed() <= polling.most {
                std::hint::spin_loop();
            }
            drop(turn);
            let rest = polling.rest.load(Ordering::Relaxed);
            rests.push(rest);
            (0..rest).for_each(|_| assert!(polling.take().is_none()));
        }
        assert_eq!(rests, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
        // One that pays ends it.
        let mut turn = polling.take().unwrap();
        turn.since = Instant::now() + Duration::from_secs(3600);
        drop(turn);
        assert!(polling.take().is_some());
    }
}
