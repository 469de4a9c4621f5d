//! Which thread writes which chunk, and how far the window is written without a gap.
#![allow(unsafe_code, reason = "chunks are disjoint parts of a window")]

use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::error::ClientError;
use super::leases::lock;
use super::source::Source;
use super::window::Window;
use crate::chunks::ChunkList;

/// Bytes that a thread takes at a time: several small chunks, or one large one.
const RUN: u64 = 256 << 10;

/// The values of one request on their way into a window.
pub(super) struct Filling<'a> {
    list: &'a ChunkList,
    source: &'a dyn Source,
    window: &'a Window,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The first chunk that nobody has taken.
    next: usize,
    /// The first chunk that may not be written yet.
    limit: usize,
    /// First chunks of the runs that are being written: few, one a thread.
    running: Vec<usize>,
    stopped: bool,
    /// The source panicked: its chunk will never be written.
    failed: bool,
}

impl<'a> Filling<'a> {
    /// Nothing is written yet. Fails if a chunk would not lie in the window, which only a wrong list can cause.
    pub(super) fn new(
        list: &'a ChunkList,
        source: &'a dyn Source,
        window: &'a Window,
    ) -> Result<Self, ClientError> {
        let inside = |at: u64, bytes: u64| at.checked_add(bytes).is_some_and(|end| end <= window.len());
        let all = list
            .chunks
            .iter()
            .all(|c| c.at >= list.base && inside(c.at, c.bytes) && c.bytes <= list.capacity);
        if !all {
            return Err(ClientError::TooLarge { bytes: list.base, most: window.len() / 4 });
        }
        let state = State {
            next: 0,
            limit: list.writable(0),
            running: Vec::with_capacity(8),
            stopped: false,
            failed: false,
        };
        Ok(Self { list, source, window, state: Mutex::new(state), changed: Condvar::new() })
    }

    /// The daemon is done with all chunks below `consumed`.
    pub(super) fn consumed(&self, consumed: usize) {
        let limit = self.list.writable(consumed);
        let mut state = lock(&self.state);
        if limit > state.limit {
            state.limit = limit;
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Nothing more is to be written. Runs that have begun are finished.
    pub(super) fn stop(&self) {
        lock(&self.state).stopped = true;
        self.changed.notify_all();
    }

    /// Writes one run. False if there is none to take now.
    pub(super) fn step(&self) -> bool {
        let run = self.claim(&mut lock(&self.state));
        match run {
            Some(run) => {
                self.write(run);
                true
            }
            None => false,
        }
    }

    /// What a helping thread does until all is written or it is stopped.
    pub(super) fn help(&self) {
        loop {
            let mut state = lock(&self.state);
            let run = loop {
                if state.stopped || state.next >= self.list.chunks.len() {
                    return;
                }
                match self.claim(&mut state) {
                    Some(run) => break run,
                    None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(state);
            self.write(run);
        }
    }

    /// All chunks below this one are in the window; `None` if the source panicked on some thread.
    pub(super) fn watermark(&self) -> Option<usize> {
        let state = lock(&self.state);
        (!state.failed).then(|| state.running.iter().copied().min().unwrap_or(state.next))
    }

    /// Waits a little for other threads that are writing. False if there are none.
    pub(super) fn wait_for_others(&self, at_most: Duration) -> bool {
        let state = lock(&self.state);
        if state.running.is_empty() {
            return false;
        }
        drop(self.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner));
        true
    }

    fn claim(&self, state: &mut State) -> Option<Range<usize>> {
        let first = state.next;
        let mut bytes = 0;
        while state.next < state.limit && bytes < RUN && !state.stopped {
            let chunk = self.list.chunks.get(state.next)?;
            bytes += if chunk.shared { 0 } else { chunk.bytes };
            state.next += 1;
        }
        if first == state.next {
            return None;
        }
        state.running.push(first);
        Some(first..state.next)
    }

    fn write(&self, run: Range<usize>) {
        let first = run.start;
        // Taken off the list on every way out: a source that panics must not leave others waiting.
        let _done = Done { filling: self, first };
        for chunk in self.list.chunks.get(run).unwrap_or_default() {
            if chunk.shared || chunk.bytes == 0 {
                continue;
            }
            // SAFETY: a chunk is taken by one thread, and the list gives those that may be written at the same time (none of
            // which the daemon has yet to consume) disjoint places.
            if let Some(part) = unsafe { self.window.part(chunk.at, chunk.bytes) } {
                self.source.fill(chunk, part);
            }
        }
    }
}

struct Done<'a, 'b> {
    filling: &'a Filling<'b>,
    first: usize,
}

impl Drop for Done<'_, '_> {
    fn drop(&mut self) {
        let mut state = lock(&self.filling.state);
        state.running.retain(|first| *first != self.first);
        if std::thread::panicking() {
            // What was not written must never be announced.
            state.stopped = true;
            state.failed = true;
        }
        drop(state);
        self.filling.changed.notify_all();
    }
}
