//! The registry: every segment there is, its state, its holds and who maps it.
//!
//! Holds of a result are leases (counted by session), the pin of the job that fills it, the requests that read values
//! from it, tickets and dataset names; of an input, leases and requests. When the last one goes, the memory is used again on proof or retired; `books.rs` decides that,
//! because it needs the session, too.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use shmquant_protocol::message::Extent;
use shmquant_protocol::segment::Kind;

use crate::life::{IllegalMove, Life, ResultLife, WindowLife};
use crate::memory::SegmentMemory;

/// A complete result inside a segment, or the part of an input that its client may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// One segment.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    /// Counts the uses of the memory, from 1.
    pub(crate) generation: u64,
    pub(crate) size: u64,
    pub(crate) life: Life,
    /// The session it was made for, in whose pool it may lie.
    pub(crate) home: u64,
    /// Gone once retired; the segment itself lives until the last job lets go.
    pub(crate) memory: Option<Arc<SegmentMemory>>,
    /// What is complete in it: one result or input at 0, or several small results.
    pub(crate) parts: Vec<Part>,
    /// Small results of its session share it.
    pub(crate) shared: bool,
    /// Holds by session.
    pub(crate) leases: Vec<(u64, u32)>,
    /// Jobs that write here; 1 also if it is about to be given out.
    pub(crate) writers: u32,
    /// Requests that read values here.
    pub(crate) readers: u32,
    pub(crate) tickets: u32,
    pub(crate) datasets: u32,
    /// Somebody else may have seen it, or may still map it: it is never used again.
    pub(crate) exposed: bool,
    /// Sessions that were sent the descriptor and have not said `UNMAP`.
    pub(crate) mapped: Vec<u64>,
    /// The reaper has freed the daemon's own mapping.
    pub(crate) reaped: bool,
    /// When it came into its present state.
    pub(crate) since: Instant,
    pub(crate) created: SystemTime,
}

impl Entry {
    /// Whether this is a complete extent of it.
    pub(crate) fn has(&self, extent: &Extent) -> bool {
        let Extent { segment, generation, offset, length } = *extent;
        (segment, generation) == (self.id, self.generation)
            // The newest are asked for most.
            && self.parts.iter().rev().any(|part| *part == Part { offset, length })
    }

    /// Bytes of all that is complete in it.
    pub(crate) fn length(&self) -> u64 {
        self.parts.iter().map(|part| part.length).sum()
    }

    /// Takes a step of the life cycle.
    pub(crate) fn go(&mut self, to: Life) -> Result<(), IllegalMove> {
        self.life = self.life.moved(to)?;
        self.since = Instant::now();
        Ok(())
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.life == Life::Result(ResultLife::Complete)
    }

    pub(crate) fn is_input(&self) -> bool {
        self.kind == Kind::Input
    }

    /// Whether sessions may hold it: a complete result, or an input that is in use.
    pub(crate) fn is_leasable(&self) -> bool {
        let in_use = [WindowLife::Writing, WindowLife::Submitted].map(Life::Window);
        self.is_complete() || (self.is_input() && in_use.contains(&self.life))
    }

    /// Whether it lies in its session's pool.
    pub(crate) fn is_free(&self) -> bool {
        matches!(self.life, Life::Result(ResultLife::Free) | Life::Window(WindowLife::Free))
    }

    pub(crate) fn is_held(&self) -> bool {
        !self.leases.is_empty()
            || self.writers > 0
            || self.readers > 0
            || self.tickets > 0
            || self.datasets > 0
    }

    /// Whether nothing but tickets holds it: nobody reads it, and it has no name.
    pub(crate) fn is_on_its_way(&self) -> bool {
        self.tickets > 0 && self.leases.is_empty() && self.datasets == 0
    }

    /// Holds of one session.
    pub(crate) fn leases_of(&self, session: u64) -> u32 {
        self.leases.iter().find(|(s, _)| *s == session).map_or(0, |(_, n)| *n)
    }

    pub(crate) fn add_lease(&mut self, session: u64) {
        match self.leases.iter_mut().find(|(s, _)| *s == session) {
            Some((_, n)) => *n = n.saturating_add(1),
            None => self.leases.push((session, 1)),
        }
    }

    /// Takes one hold back, if the session has one.
    pub(crate) fn drop_lease(&mut self, session: u64) {
        let Some(at) = self.leases.iter().position(|(s, _)| *s == session) else { return };
        self.leases[at].1 -= 1;
        if self.leases[at].1 == 0 {
            self.leases.swap_remove(at);
        }
    }

    /// Whether nothing of it is left but this entry.
    fn is_gone(&self) -> bool {
        self.life.is_retired() && self.reaped && self.mapped.is_empty()
    }
}

/// All segments, by id.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    entries: HashMap<u64, Entry>,
    last_id: u64,
    /// Bytes of all entries, retired ones that are still mapped somewhere included.
    bytes: u64,
    /// Bytes of retired entries: on their way out.
    leaving: u64,
}

impl Registry {
    /// A number for the next segment, never given again.
    pub(crate) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    pub(crate) fn insert(&mut self, entry: Entry) {
        self.bytes += entry.size;
        self.entries.insert(entry.id, entry);
    }

    pub(crate) fn get(&self, id: u64) -> Option<&Entry> {
        self.entries.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Entry> {
        self.entries.get_mut(&id)
    }

    /// The complete result that an extent's segment and generation name.
    pub(crate) fn complete_mut(&mut self, id: u64, generation: u64) -> Option<&mut Entry> {
        self.entries.get_mut(&id).filter(|e| e.generation == generation && e.is_complete())
    }

    /// The result or input that an extent's segment and generation name, while sessions may hold it.
    pub(crate) fn leased_mut(&mut self, id: u64, generation: u64) -> Option<&mut Entry> {
        self.entries.get_mut(&id).filter(|e| e.generation == generation && e.is_leasable())
    }

    /// Notes that an entry has just been retired.
    pub(crate) fn note_leaving(&mut self, size: u64) {
        self.leaving += size;
    }

    /// Takes the entry out if nobody has anything of it any more; true if bytes came free.
    pub(crate) fn remove_if_gone(&mut self, id: u64) -> bool {
        let gone = self.entries.get(&id).is_some_and(Entry::is_gone);
        if gone && let Some(entry) = self.entries.remove(&id) {
            self.bytes -= entry.size;
            self.leaving -= entry.size;
        }
        gone
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn leaving(&self) -> u64 {
        self.leaving
    }
}
