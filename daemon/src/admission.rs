//! Admission: every growth of shared memory is proven to fit before it is promised.
//!
//! A request that does not fit waits its turn, sessions in turn, until memory comes free or its deadline
//! passes, unless only the asker itself could free what it waits for: that is refused at once.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use shmquant_protocol::message::{ErrorCode, Failure};
use shmquant_protocol::segment::Kind;

use crate::books::Books;
use crate::error::clipped;
use crate::headroom::Headroom;
use crate::life::{Life, ResultLife};

/// Growths up to this size may use the reserve and need not queue.
const SMALL: u64 = 1 << 20;
/// Most bytes kept back for small growths.
const MOST_RESERVE: u64 = 64 << 20;

/// Idle segments that go at once where a limit of the process is met.
const SHED: usize = 16;

/// Who waits and what has been promised.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    waiting: Vec<Waiter>,
    numbers: u64,
    grants: u64,
    /// Promised, but not in the registry yet.
    growing: u64,
    /// All bytes that were ever promised.
    promised: u64,
    /// Budget at the last look.
    limit: u64,
    pub(crate) refused: u64,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    session: u64,
}

/// A request for memory, kept over its attempts.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) session: u64,
    pub(crate) bytes: u64,
    pub(crate) deadline: Option<Instant>,
    /// For a window, without which none of the lane's requests can even be asked.
    pub(crate) window: bool,
    /// How long a session with several lanes may wait for what only its own threads could free.
    pub(crate) grace: Duration,
    since: Instant,
    number: Option<u64>,
}

impl Asked {
    pub(crate) fn new(session: u64, bytes: u64, deadline: Option<Instant>) -> Self {
        let (window, grace, since, number) = (false, Duration::ZERO, Instant::now(), None);
        Self { session, bytes, deadline, window, grace, since, number }
    }
}

/// What was promised when the headroom was read: promises made since are not in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Snapshot {
    growing: u64,
    promised: u64,
}

/// What becomes of an attempt.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// The bytes are promised: make the segment, then call [`Books::grown`].
    Granted,
    /// Not now.
    Wait,
    /// Never, or not in time.
    Refused(Box<Failure>),
}

impl Admission {
    /// Bytes of shared memory there may be, at the last look.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    pub(crate) fn growing(&self) -> u64 {
        self.growing
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

impl Books {
    /// To be taken before the headroom is read.
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot { growing: self.admission.growing, promised: self.admission.promised }
    }

    /// Bytes that count against the budget.
    pub(crate) fn charged(&self) -> u64 {
        self.registry.bytes() + self.admission.growing
    }

    /// The budget by a fresh look at the system.
    pub(crate) fn look(&mut self, budget: Option<u64>, seen: Headroom, at: Snapshot) -> u64 {
        let a = &self.admission;
        let in_flight = at.growing + (a.promised - at.promised);
        let resident = self.registry.bytes();
        // A quarter of what the host could give stays the host's.
        let host = (seen.host.saturating_add(resident) / 4 * 3).saturating_sub(resident);
        let growth = host.min(seen.hard()).saturating_sub(in_flight);
        let limit = self.charged().saturating_add(growth);
        self.admission.limit = budget.map_or(limit, |b| b.min(limit));
        self.admission.limit
    }

    /// One attempt to grow by what is asked.
    pub(crate) fn admit(
        &mut self,
        asked: &mut Asked,
        budget: Option<u64>,
        seen: Headroom,
        at: Snapshot,
    ) -> Verdict {
        let limit = self.look(budget, seen, at);
        let small = asked.bytes <= SMALL;
        let reserve = if small { 0 } else { (limit / 32).min(MOST_RESERVE) };
        let usable = limit.saturating_sub(reserve).saturating_sub(self.charged());
        let first = small || self.is_first(asked);
        if first && asked.bytes <= usable {
            self.withdraw(asked);
            let a = &mut self.admission;
            a.growing += asked.bytes;
            a.promised += asked.bytes;
            a.grants += 1;
            let grant = a.grants;
            if let Some(account) = self.sessions.get_mut(&asked.session) {
                account.last_grant = grant;
            }
            // There may be room for the next one, too.
            self.wake_waiting();
            return Verdict::Granted;
        }
        let stuck = self.stuck_bytes(asked.session);
        if asked.bytes > limit.saturating_sub(reserve).saturating_sub(stuck) {
            let several = self.sessions.get(&asked.session).is_some_and(|a| a.lanes.len() > 1);
            if !several || stuck == 0 || asked.since.elapsed() >= asked.grace {
                return self.refuse(asked, limit, reserve, ErrorCode::NoRoom);
            }
        }
        if asked.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return self.refuse(asked, limit, reserve, ErrorCode::Deadline);
        }
        if asked.number.is_none() {
            let a = &mut self.admission;
            a.numbers += 1;
            asked.number = Some(a.numbers);
            a.waiting.push(Waiter { number: a.numbers, session: asked.session });
        }
        if small || self.is_first(asked) {
            let need = asked.bytes.saturating_sub(usable).saturating_sub(self.registry.leaving());
            self.take_back_idle(asked.session, need);
        }
        Verdict::Wait
    }

    /// Gives up waiting, or was served.
    pub(crate) fn withdraw(&mut self, asked: &mut Asked) {
        if let Some(number) = asked.number.take() {
            self.admission.waiting.retain(|w| w.number != number);
            self.wake_waiting();
        }
    }

    /// The promised bytes are in the registry now, or will not come.
    pub(crate) fn grown(&mut self, bytes: u64) {
        self.admission.growing -= bytes;
        self.wake_waiting();
    }

    /// Sessions in turn: who was served longest ago goes first; within a session, who came first. A window does
    /// not wait for a result of its own session: another thread's small requests would wait with it.
    pub(crate) fn is_first(&self, asked: &Asked) -> bool {
        let served = |session| self.sessions.get(&session).map_or(0, |a| a.last_grant);
        let mine = (served(asked.session), asked.number.unwrap_or(u64::MAX));
        let waiting = self.admission.waiting.iter();
        let mut others = waiting.filter(|w| !(asked.window && w.session == asked.session));
        others.all(|w| (served(w.session), w.number) >= mine)
    }

    /// Retires idle memory: the asker's own first, then that of who has most of it.
    fn take_back_idle(&mut self, session: u64, need: u64) {
        let mut got = 0;
        while got < need {
            let own = self.sessions.get_mut(&session).and_then(|a| a.pool.take_oldest(Duration::ZERO));
            let idle = own.or_else(|| {
                let most = self.sessions.values_mut().max_by_key(|a| a.pool.bytes())?;
                most.pool.take_oldest(Duration::ZERO)
            });
            let Some((id, size)) = idle else { break };
            self.retire(id);
            got += size;
        }
    }

    /// Retires some of the segments that have been idle longest, of whoever has most of them; false if none is idle.
    pub(crate) fn retire_idle(&mut self) -> bool {
        let mut some = false;
        for _ in 0..SHED {
            let most = self.sessions.values_mut().max_by_key(|a| a.pool.bytes());
            let Some((id, _)) = most.and_then(|a| a.pool.take_oldest(Duration::ZERO)) else { break };
            self.retire(id);
            some = true;
        }
        some
    }

    /// Bytes that will not come free while the session waits: what it holds itself, and datasets.
    fn stuck_bytes(&self, session: u64) -> u64 {
        let own = self.sessions.get(&session).map_or(0, |account| {
            let entries = account.segments.iter().filter_map(|id| self.registry.get(*id));
            let held = entries.filter(|e| {
                e.leases_of(session) > 0
                    || (e.kind == Kind::Window && !e.life.is_retired() && e.home == session)
            });
            held.map(|e| e.size).sum()
        });
        let named = self.catalog.after(0).filter_map(|(_, d)| self.registry.get(d.extent.segment));
        let named: HashMap<u64, u64> =
            named.filter(|e| e.leases_of(session) == 0).map(|e| (e.id, e.size)).collect();
        own + named.values().sum::<u64>()
    }

    fn refuse(&mut self, asked: &mut Asked, limit: u64, reserve: u64, code: ErrorCode) -> Verdict {
        self.withdraw(asked);
        self.admission.refused += 1;
        Verdict::Refused(Box::new(self.shortage(asked, limit, reserve, code)))
    }

    /// Says what is short, with the numbers, and who holds what.
    fn shortage(&self, asked: &Asked, limit: u64, reserve: u64, code: ErrorCode) -> Failure {
        let mut of = HashMap::<u64, (u64, u64)>::new();
        let mut oldest = None::<Instant>;
        let (mut named, mut sent, mut sent_bytes) = (0, 0, 0);
        for entry in self.registry.iter().filter(|e| e.life == Life::Result(ResultLife::Complete)) {
            named += if entry.datasets > 0 { entry.size } else { 0 };
            if entry.is_on_its_way() {
                sent += 1;
                sent_bytes += entry.size;
            }
            for (session, holds) in &entry.leases {
                let (count, bytes) = of.entry(*session).or_default();
                *count += if entry.shared { u64::from(*holds) } else { 1 };
                *bytes += entry.size;
                if *session == asked.session {
                    oldest = Some(oldest.map_or(entry.since, |o| o.min(entry.since)));
                }
            }
        }
        let (count, bytes) = of.remove(&asked.session).unwrap_or_default();
        let mut text = format!("no room for {}", size(asked.bytes));
        let _ = write!(text, ": {} of {} are in use", size(self.charged()), size(limit));
        if reserve > 0 {
            let _ = write!(text, " ({} more is kept for small results)", size(reserve));
        }
        if code == ErrorCode::Deadline {
            let _ = write!(text, "; waited {} ms", asked.since.elapsed().as_millis());
        }
        if let Some(oldest) = oldest {
            let age = oldest.elapsed().as_secs();
            let _ = write!(text, "; you hold {count} results, {}, oldest {age} s", size(bytes));
        }
        let own = self.registry.iter().filter(|e| e.is_input() && e.leases_of(asked.session) > 0);
        let inputs: u64 = own.map(|e| e.size).sum();
        if inputs > 0 {
            let _ = write!(text, "; your inputs take {}", size(inputs));
        }
        let mut others: Vec<_> = of.into_iter().collect();
        others.sort_by_key(|(_, (_, bytes))| std::cmp::Reverse(*bytes));
        for (session, (count, bytes)) in others.iter().take(3) {
            if let Some(account) = self.sessions.get(session) {
                let who = clipped(account.session.command.clone(), 60);
                let pid = account.session.pid;
                let _ = write!(text, "; process {pid} ({who}) holds {count} results, {}", size(*bytes));
            }
        }
        if named > 0 {
            let _ = write!(text, "; datasets take {}", size(named));
        }
        if sent > 0 {
            let _ =
                write!(text, "; tickets that nobody has opened hold {sent} results, {}", size(sent_bytes));
        }
        // A client that is stopped, or does not read, keeps what it was asked to unmap.
        let mut leaving = HashMap::<u64, u64>::new();
        for entry in self.registry.iter().filter(|e| e.life.is_retired()) {
            for session in &entry.mapped {
                *leaving.entry(*session).or_default() += entry.size;
            }
        }
        let most = leaving.into_iter().max_by_key(|(_, bytes)| *bytes);
        if let Some((session, bytes)) = most
            && let Some(account) = self.sessions.get(&session)
        {
            let _ = write!(text, "; process {} still has to unmap {}", account.session.pid, size(bytes));
        }
        let hint = if count > 0 {
            format!("you hold {count} results, {}: release them", size(bytes))
        } else if inputs > 0 {
            format!("your inputs take {}: let go of those that are not needed", size(inputs))
        } else if named > 0 {
            "drop datasets that are not needed (`shmquant ls` lists them, `q.drop(name)` drops one)"
                .to_owned()
        } else if sent > 0 {
            "load the pickled results that are on their way; what nobody loads is free when its ticket expires"
                .to_owned()
        } else {
            "quantize in smaller pieces, or give the daemon a larger budget or more memory".to_owned()
        };
        Failure::new(code, text, hint)
    }
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}
