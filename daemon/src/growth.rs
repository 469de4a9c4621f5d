//! Memory for requests: out of their session's pool, or made anew when admission has granted it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shmquant_protocol::failpoint::failpoint;
use shmquant_protocol::segment::Kind;

use crate::admission::{Asked, Verdict};
use crate::books::Taken;
use crate::error::Trouble;
use crate::headroom::Headroom;
use crate::hub::Hub;
use crate::lane::{Current, Lane, stopping};

/// While a lane waits for memory, the host's own state is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The segment that a request needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) kind: Kind,
    pub(crate) size: u64,
    /// A free one of the session's own will do.
    pub(crate) pooled: bool,
}

/// A segment that nobody has seen yet: goes to its session's pool unless it is kept.
pub(crate) struct Made<'a> {
    hub: &'a Hub,
    pub(crate) taken: Taken,
    armed: bool,
}

impl<'a> Made<'a> {
    pub(crate) fn new(hub: &'a Hub, taken: Taken) -> Self {
        Self { hub, taken, armed: true }
    }

    /// Its number; whoever asks for it takes care of it from now on.
    pub(crate) fn keep(mut self) -> u64 {
        self.armed = false;
        self.taken.id
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.hub.books().abort(self.taken.id);
            failpoint("daemon.aborted");
        }
    }
}

/// Takes a segment from the pool, or waits until one may be made, or until the pool has one.
pub(crate) fn obtain<'a>(
    current: &mut Current<'a, '_>,
    wanted: Wanted,
    deadline: Option<Instant>,
) -> Result<Made<'a>, Trouble> {
    let (hub, lane) = (current.hub, current.lane);
    let session = lane.session.id;
    if wanted.pooled
        && let Some(taken) = hub.books().take_pooled(session, wanted.kind, wanted.size)?
    {
        return Ok(Made::new(hub, taken));
    }
    current.go_on()?;
    let mut asked = Asked::new(session, wanted.size, deadline);
    asked.window = wanted.kind == Kind::Window;
    let turn = Turn { hub, lane: Some(lane), asked };
    turn.grow(wanted, |asked| {
        let soon = Instant::now() + LOOK_AGAIN;
        current.wait(Some(asked.deadline.map_or(soon, |deadline| deadline.min(soon))))?;
        current.go_on()
    })
}

/// Makes a segment for a result at once, or not at all.
pub(crate) fn obtain_now(hub: &Hub, session: u64, size: u64) -> Result<Made<'_>, Trouble> {
    if hub.is_stopping() {
        return Err(stopping());
    }
    let turn = Turn { hub, lane: None, asked: Asked::new(session, size, None) };
    turn.grow(Wanted { kind: Kind::Result, size, pooled: false }, |asked| {
        // What is idle makes room; without any, the next try is the last.
        if !hub.shed_idle() {
            asked.deadline = Some(Instant::now());
        }
        if hub.is_stopping() { Err(stopping()) } else { Ok(()) }
    })
}

/// A request's attempts to grow, and its place in the queue: given up when it stops trying for whatever reason.
struct Turn<'a> {
    hub: &'a Hub,
    /// Woken while it waits.
    lane: Option<&'a Arc<Lane>>,
    asked: Asked,
}

impl<'a> Turn<'a> {
    /// Tries until there is a verdict; `wait` comes between two attempts.
    fn grow(
        mut self,
        wanted: Wanted,
        mut wait: impl FnMut(&mut Asked) -> Result<(), Trouble>,
    ) -> Result<Made<'a>, Trouble> {
        let hub = self.hub;
        self.asked.grace = hub.config.grace;
        loop {
            let at = hub.books().snapshot();
            let seen = Headroom::read(hub.config.backing);
            let verdict = {
                let mut books = hub.books();
                books.account(self.asked.session)?;
                if wanted.pooled
                    && books.is_first(&self.asked)
                    && let Some(taken) = books.take_pooled(self.asked.session, wanted.kind, wanted.size)?
                {
                    return Ok(Made::new(hub, taken));
                }
                let verdict = books.admit(&mut self.asked, hub.config.budget, seen, at);
                if let (Verdict::Wait, Some(lane)) = (&verdict, self.lane) {
                    books.add_waiting(lane);
                }
                verdict
            };
            match verdict {
                Verdict::Granted => return self.make(wanted),
                Verdict::Refused(failure) => return Err(Trouble::Refused(failure)),
                Verdict::Wait => wait(&mut self.asked)?,
            }
        }
    }

    fn make(&self, wanted: Wanted) -> Result<Made<'a>, Trouble> {
        failpoint("daemon.admitted");
        let (hub, Wanted { kind, size, .. }) = (self.hub, wanted);
        let made = hub.make_segment(kind, size);
        let mut books = hub.books();
        let entered = made.map_err(Trouble::from).and_then(|(id, memory)| {
            failpoint(if kind == Kind::Window { "daemon.window_made" } else { "daemon.segment_made" });
            books.enter(id, self.asked.session, kind, memory)
        });
        // Under the same lock: its bytes never count twice, nor, for a moment, not at all.
        books.grown(size);
        drop(books);
        Ok(Made::new(hub, entered?))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut books = self.hub.books();
        books.withdraw(&mut self.asked);
        if let Some(lane) = self.lane {
            books.remove_waiting(lane);
        }
    }
}
