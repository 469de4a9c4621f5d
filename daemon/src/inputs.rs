//! `ALLOC`: memory that a client writes its values to, and memory made ready ahead of results; and the hold that a
//! request has on the values that it reads where they lie.

use std::sync::Arc;
use std::time::Instant;

use shmquant_protocol::descriptor::Descriptor;
use shmquant_protocol::failpoint::failpoint;
use shmquant_protocol::message::{ErrorCode, Extent, Lease, Message, Purpose};
use shmquant_protocol::segment::Kind;

use crate::admission::size;
use crate::books::{Books, Granted, gone};
use crate::error::Trouble;
use crate::growth::{Wanted, obtain};
use crate::hub::Hub;
use crate::job::Sources;
use crate::lane::{Answered, Current, deadline};
use crate::life::{Life, WindowLife};
use crate::memory::SegmentMemory;
use crate::pool::class_of;
use crate::registry::Part;
use crate::requests::Answer;
use crate::shared;

/// What `ALLOC` says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) bytes: u64,
    pub(crate) purpose: Purpose,
    pub(crate) timeout: u32,
}

/// Works on one `ALLOC` to its answer.
pub(crate) fn allocate(current: &mut Current<'_, '_>, asked: Asked) -> Answered {
    let bytes = asked.bytes;
    if bytes == 0 {
        return Err(Trouble::new(ErrorCode::InvalidInput, "there is no memory of 0 bytes", ""));
    }
    let Some(class) = class_of(bytes) else {
        return Err(Trouble::new(ErrorCode::NoRoom, format!("no memory of {bytes} bytes can exist"), ""));
    };
    let deadline = deadline(asked.timeout);
    match asked.purpose {
        Purpose::Input => input(current, bytes, class, deadline),
        // Small results lie together in a larger segment.
        Purpose::Warm if bytes <= shared::MOST => warm(current, bytes, shared::SEGMENT, deadline),
        Purpose::Warm => warm(current, bytes, class, deadline),
    }
}

fn input(current: &mut Current<'_, '_>, bytes: u64, class: u64, deadline: Option<Instant>) -> Answered {
    let hub = current.hub;
    let session = current.lane.session.id;
    let made = loop {
        let wanted = Wanted { kind: Kind::Input, size: class, pooled: true };
        let made = obtain(current, wanted, deadline)?;
        // What the client took out of it while it was its own was charged as memory all the same.
        match made.taken.memory.make_whole() {
            Ok(()) => break made,
            Err(error) => {
                tracing::warn!(session, "an input cannot be used again: {error}");
                hub.books().discard(made.keep());
            }
        }
    };
    failpoint("daemon.input_made");
    let mut books = hub.books();
    let granted = books.offer(session, made.keep(), bytes)?;
    drop(books);
    failpoint("daemon.allocated");
    Ok(Answer::leased(Message::Allocated { lease: granted.lease }, granted))
}

fn warm(current: &mut Current<'_, '_>, bytes: u64, class: u64, deadline: Option<Instant>) -> Answered {
    let cap = current.hub.books().pool_cap();
    if class > cap {
        let text = format!("{} cannot be kept ready: a session keeps at most {}", size(bytes), size(cap));
        let hint = "warm less, or give the daemon a larger budget";
        return Err(Trouble::new(ErrorCode::NoRoom, text, hint));
    }
    // Goes to the session's pool, where it may just have come from.
    drop(obtain(current, Wanted { kind: Kind::Result, size: class, pooled: true }, deadline)?);
    failpoint("daemon.warmed");
    Ok(Answer::plain(Message::Allocated { lease: Lease::default() }))
}

/// The extents in which a request's values lie: none of them is used for anything else while this lives, even if the
/// client gives it back.
pub(crate) struct Pins<'a> {
    hub: &'a Hub,
    ids: Vec<u64>,
    pub(crate) sources: Sources,
}

impl<'a> Pins<'a> {
    /// Fails with `GONE` unless the session holds them all.
    pub(crate) fn new(hub: &'a Hub, session: u64, descriptor: &Descriptor) -> Result<Self, Trouble> {
        let mut it = Self { hub, ids: Vec::new(), sources: Sources::new() };
        let mut places = descriptor.places().peekable();
        if places.peek().is_none() {
            return Ok(it);
        }
        let mut books = hub.books();
        let done = places.try_for_each(|(_, _, place)| {
            let memory = books.pin(session, place.extent)?;
            it.ids.push(place.extent.segment);
            it.sources.insert(place.extent.segment, memory);
            Ok(())
        });
        // Before what was pinned is let go, which takes the lock.
        drop(books);
        failpoint("daemon.pinned");
        done.map(|()| it)
    }

    /// Takes care of one that [`Books::pin`] has given.
    pub(crate) fn pinned(hub: &'a Hub, id: u64) -> Self {
        Self { hub, ids: vec![id], sources: Sources::new() }
    }
}

impl Drop for Pins<'_> {
    fn drop(&mut self) {
        if !self.ids.is_empty() {
            let mut books = self.hub.books();
            self.ids.drain(..).for_each(|id| books.unpin(id));
        }
    }
}

impl Books {
    /// Leases an input to its session, which may write its first `bytes` bytes.
    pub(crate) fn offer(&mut self, session: u64, id: u64, bytes: u64) -> Result<Granted, Trouble> {
        let entry = self.registry.get_mut(id).ok_or(Trouble::Lost)?;
        entry.writers = 0;
        entry.parts = vec![Part { offset: 0, length: bytes }];
        let extent = Extent { segment: id, generation: entry.generation, offset: 0, length: bytes };
        let granted = self.lease(session, extent);
        if granted.is_err() {
            self.settle(id);
        }
        granted
    }

    /// Gives up a segment that was not given to anybody.
    pub(crate) fn discard(&mut self, id: u64) {
        if let Some(entry) = self.registry.get_mut(id) {
            entry.writers = 0;
            self.retire(id);
        }
    }

    /// Holds an extent of the session's for a request that reads it.
    pub(crate) fn pin(&mut self, session: u64, extent: Extent) -> Result<Arc<SegmentMemory>, Trouble> {
        let entry = self.registry.leased_mut(extent.segment, extent.generation);
        let entry = entry.filter(|e| e.leases_of(session) > 0 && e.has(&extent)).ok_or_else(gone)?;
        let memory = entry.memory.clone().ok_or_else(gone)?;
        if entry.readers == 0 && entry.is_input() {
            entry.go(Life::Window(WindowLife::Submitted))?;
        }
        entry.readers += 1;
        Ok(memory)
    }

    /// The request has read what it had to.
    pub(crate) fn unpin(&mut self, id: u64) {
        let Some(entry) = self.registry.get_mut(id) else { return };
        entry.readers = entry.readers.saturating_sub(1);
        if entry.readers == 0
            && entry.is_input()
            && let Err(error) = entry.go(Life::Window(WindowLife::Writing))
        {
            tracing::error!("{error}");
        }
        failpoint("daemon.unpinned");
        self.settle(id);
    }
}
