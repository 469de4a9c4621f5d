//! How long a call may go on: its deadline and its caller's wish to stop.

use std::time::{Duration, Instant};

use super::error::ClientError;

/// How often a waiting call asks `interrupted`.
const ASK: Duration = Duration::from_millis(50);
/// The daemon keeps the deadline too, and its error says more: it gets this much longer to say it.
const GRACE: Duration = Duration::from_millis(250);

/// Why a call has to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    Deadline,
    Interrupted,
}

/// Asked again and again while a call works or waits.
pub(super) struct Clock<'a> {
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    interrupted: Option<&'a (dyn Fn() -> bool + Sync)>,
    ask: Instant,
}

impl<'a> Clock<'a> {
    pub(super) fn new(timeout: Option<Duration>, interrupted: Option<&'a (dyn Fn() -> bool + Sync)>) -> Self {
        let now = Instant::now();
        // A time beyond what the clock can say is none at all.
        Self { timeout, deadline: timeout.and_then(|t| now.checked_add(t)), interrupted, ask: now + ASK }
    }

    /// What the caller allowed; nothing stands for no limit.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout.unwrap_or_default()
    }

    /// When the daemon should have answered.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Milliseconds that are left, as `QUANTIZE` says them.
    pub(super) fn milliseconds(&self) -> u32 {
        match self.deadline {
            None => crate::message::NO_TIMEOUT,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now()).as_millis();
                u32::try_from(left).unwrap_or(u32::MAX).min(crate::message::NO_TIMEOUT - 1)
            }
        }
    }

    /// Whether to stop now.
    pub(super) fn check(&mut self) -> Option<Stop> {
        if self.deadline.is_none() && self.interrupted.is_none() {
            return None;
        }
        let now = Instant::now();
        if self.deadline.is_some_and(|deadline| now >= deadline + GRACE) {
            return Some(Stop::Deadline);
        }
        if let Some(interrupted) = self.interrupted
            && now >= self.ask
        {
            self.ask = now + ASK;
            if interrupted() {
                return Some(Stop::Interrupted);
            }
        }
        None
    }

    /// The time is over, and not for the daemon's sake: nobody else has anything to say about it.
    pub(super) fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Until when a wait may last before `check` has to be called again; `None` for as long as it takes.
    pub(super) fn wait_until(&self) -> Option<Instant> {
        let ask = self.interrupted.map(|_| self.ask);
        let end = self.deadline.map(|deadline| deadline + GRACE);
        match (ask, end) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// The same as a length of time, for condition variables.
    pub(super) fn wait_for(&self) -> Duration {
        self.wait_until().map_or(Duration::from_secs(1), |at| at.saturating_duration_since(Instant::now()))
    }

    /// The error of a call that stopped.
    pub(super) fn error(&self, stop: Stop) -> ClientError {
        match stop {
            Stop::Deadline => ClientError::Deadline { timeout: self.timeout() },
            Stop::Interrupted => ClientError::Cancelled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_limit_it_never_stops() {
        let mut clock = Clock::new(None, None);
        assert_eq!(clock.check(), None);
        assert_eq!(clock.wait_until(), None);
        assert_eq!(clock.milliseconds(), u32::MAX);
        assert_eq!(Clock::new(Some(Duration::MAX), None).deadline(), None);
    }

    #[test]
    fn the_daemon_has_longer_than_the_deadline_to_say_why() {
        let mut clock = Clock::new(Some(Duration::ZERO), None);
        assert_eq!(clock.milliseconds(), 0);
        while clock.check().is_none() {
            std::hint::spin_loop();
        }
        assert_eq!(clock.check(), Some(Stop::Deadline));
        assert!(clock.deadline().is_some_and(|at| at.elapsed() >= GRACE));
    }

    #[test]
    fn the_caller_is_asked_now_and_then() {
        let asked = std::sync::atomic::AtomicU32::new(0);
        let stop = || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1;
        let started = Instant::now();
        let mut clock = Clock::new(None, Some(&stop));
        while clock.check().is_none() {
            std::hint::spin_loop();
        }
        assert!(started.elapsed() >= 2 * ASK);
        assert_eq!(asked.into_inner(), 2);
    }
}
