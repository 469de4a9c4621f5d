//! Memory of segments as jobs and lanes see it: mapped while somebody holds it, freed by the reaper.
//!
//! Raw copies in and out of client-writable memory live here, so that nothing else needs `unsafe` for them.
#![allow(unsafe_code, reason = "client-writable memory is read and written through raw pointers only")]

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::mpsc::Sender;

use shmquant_protocol::segment::{Segment, SegmentError};

use crate::reaper::Dead;

/// Memory of a segment that stays mapped while this lives; dropping the last one hands the segment to the
/// reaper thread.
pub trait Memory: Send + Sync {
    /// Where it begins: aligned to a page, valid for [`len`](Self::len) bytes.
    fn as_ptr(&self) -> *mut u8;
    /// Bytes.
    fn len(&self) -> usize;
    /// Never: there are no segments of zero bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A segment that jobs, the registry and replies share.
#[derive(Debug)]
pub(crate) struct SegmentMemory {
    segment: Option<Segment>,
    // Taken out of nothing: as long as any memory lives, the reaper's queue does.
    reaper: Sender<Dead>,
}

impl SegmentMemory {
    pub(crate) fn new(segment: Segment, reaper: Sender<Dead>) -> Self {
        Self { segment: Some(segment), reaper }
    }

    /// The descriptor that clients are sent.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.segment.as_ref().map(Segment::fd)
    }

    /// Puts memory behind what a client took out of it.
    pub(crate) fn make_whole(&self) -> Result<(), SegmentError> {
        match &self.segment {
            Some(segment) if segment.missing_bytes()? > 0 => segment.refill(),
            _ => Ok(()),
        }
    }

    /// A path that maps it, for datasets.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        self.segment.as_ref().map(Segment::path)
    }
}

impl Memory for SegmentMemory {
    fn as_ptr(&self) -> *mut u8 {
        self.segment.as_ref().map_or(std::ptr::null_mut(), Segment::as_ptr)
    }

    fn len(&self) -> usize {
        self.segment.as_ref().map_or(0, Segment::len)
    }
}

impl Drop for SegmentMemory {
    fn drop(&mut self) {
        if let Some(segment) = self.segment.take() {
            // Without a reaper (the daemon is gone) the segment comes back in the error and goes here.
            let _ = self.reaper.send(Dead::Segment(segment));
        }
    }
}

/// Copies `len` bytes from `at` on of memory that a client may be writing to into private memory; false if
/// they are not there.
pub(crate) fn copy_out(memory: &dyn Memory, at: usize, len: usize, out: &mut Vec<u8>) -> bool {
    out.clear();
    if at.checked_add(len).is_none_or(|end| end > memory.len()) || out.try_reserve_exact(len).is_err() {
        return false;
    }
    // SAFETY: both sides have `len` bytes (checked, reserved), the first from `at` on, and do not overlap: one is a private
    // allocation. Bytes that change meanwhile are copied in one state or another, and only the copy is
    // looked at; u8 has no invalid values. The length is set to what was written.
    unsafe {
        std::ptr::copy_nonoverlapping(memory.as_ptr().wrapping_add(at).cast_const(), out.as_mut_ptr(), len);
        out.set_len(len);
    }
    true
}

/// Copies `bytes` to the start of a client's memory; false if there is not room for them.
pub(crate) fn copy_in(memory: &dyn Memory, bytes: &[u8]) -> bool {
    if bytes.len() > memory.len() {
        return false;
    }
    // SAFETY: the mapping is writable and has room for the bytes (checked); a private slice does not
    // overlap with it.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.as_ptr(), bytes.len()) };
    true
}

/// In debug builds, overwrites recycled memory, so that a reader or a job that counts on what was there
/// before is found out.
pub(crate) fn poison(memory: &dyn Memory) {
    if cfg!(debug_assertions) {
        // SAFETY: the mapping is writable for its whole length, and the caller is the only one who may
        // write: the segment has just become `filling`.
        unsafe { std::ptr::write_bytes(memory.as_ptr(), 0xA5, memory.len()) };
    }
}
