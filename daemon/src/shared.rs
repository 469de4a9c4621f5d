//! Small results share a segment: a descriptor and two mappings each would otherwise bound how many can live.
//!
//! A session fills one such segment after the other. Each result is an extent of its own, written once, behind all
//! that were written before; the segment is used again, or given up, as a whole, when nobody holds anything of it. So one
//! small result that is kept keeps its whole segment.

use shmquant_protocol::failpoint::failpoint;
use shmquant_protocol::message::Extent;

use crate::books::{Books, Taken, gone};
use crate::catalog::Origin;
use crate::ending;
use crate::error::Trouble;
use crate::growth::obtain_now;
use crate::hub::Hub;
use crate::inputs::Pins;
use crate::memory::{copy_in, copy_out};
use crate::session::Session;

/// Results of at most so many bytes share a segment.
pub(crate) const MOST: u64 = 32 << 10;
/// Size of a segment that is shared.
pub(crate) const SEGMENT: u64 = 256 << 10;
/// Where a result may begin.
const ALIGNMENT: u64 = 64;

/// The segment that takes a session's next small result.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Open {
    pub(crate) id: u64,
    /// What lies before is used.
    pub(crate) end: u64,
}

impl Books {
    /// Room for a small result in the segment that is open; `None` if there is none.
    pub(crate) fn take_part(&mut self, session: u64, bytes: u64) -> Result<Option<Taken>, Trouble> {
        let Some(open) = self.account(session)?.open else { return Ok(None) };
        // Whoever else maps it has no business with what comes later.
        let entry = self.registry.get_mut(open.id).filter(|e| e.shared && !e.exposed);
        let end = open.end.checked_add(bytes.next_multiple_of(ALIGNMENT));
        let (Some(entry), Some(end)) = (entry, end) else { return Ok(None) };
        let Some(memory) = entry.memory.clone().filter(|_| end <= entry.size) else { return Ok(None) };
        entry.writers += 1;
        let taken = Taken { id: open.id, memory, offset: open.end, recycled: false };
        self.account(session)?.open = Some(Open { end, ..open });
        Ok(Some(taken))
    }

    /// Has a segment, which `taken` is the first part of, take the session's next small results, too.
    pub(crate) fn share(&mut self, session: u64, taken: &Taken, bytes: u64) {
        let Some(entry) = self.registry.get_mut(taken.id) else { return };
        entry.shared = true;
        let open = Open { id: taken.id, end: bytes.next_multiple_of(ALIGNMENT) };
        if let Ok(account) = self.account(session) {
            account.open = Some(open);
        }
    }
}

/// Publishes a result that the session leases. A dataset is a segment of its own, which can be mapped by its path: one that
/// shares its segment is copied, which takes a few microseconds.
pub(crate) fn publish(
    hub: &Hub,
    session: &Session,
    extent: Extent,
    name: String,
    replace: bool,
) -> Result<(), Trouble> {
    let most = hub.config.max_datasets;
    let origin = Origin { extent, fingerprint: None };
    let mut books = hub.books();
    if !books.registry.get(extent.segment).is_some_and(|entry| entry.shared) {
        return books.publish(session, extent, origin, name, replace, most);
    }
    // What is read meanwhile is not used again.
    let memory = books.pin(session.id, extent)?;
    let done = books.is_published(&origin, &name, replace, most);
    drop(books);
    let _pin = Pins::pinned(hub, extent.segment);
    if done? {
        return Ok(());
    }
    let mut bytes = Vec::new();
    if !copy_out(&*memory, extent.offset as usize, extent.length as usize, &mut bytes) {
        return Err(gone());
    }
    let size = extent.length.next_multiple_of(4096);
    let made = obtain_now(hub, session.id, size)?;
    let memory = &*made.taken.memory;
    let length = copy_in(memory, &bytes).then(|| ending::repeat(memory, extent.length)).flatten();
    failpoint("daemon.copied");
    let length = length.ok_or_else(gone)?;
    let mut books = hub.books();
    let copy = books.complete(&made.taken, length)?;
    let id = made.keep();
    // Nobody but its name will hold it.
    let published = books.lease(session.id, copy).and_then(|granted| {
        let done = books.publish(session, copy, origin, name, replace, most);
        books.unlease(session.id, &granted.lease);
        done
    });
    books.settle(id);
    published
}
