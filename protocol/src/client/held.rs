//! One hold on a result.
#![allow(unsafe_code, reason = "a slice of mapped memory is made from its address")]

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::fork::Mark;
use super::leases::{Leases, Origin};
use super::returns::Return;
use crate::message::{Extent, Lease};
use crate::segment::{Kind, Mapping, SegmentName};

/// One hold on an extent: an Arrow IPC file in shared memory that stays as it is for as long as this lives, whatever becomes of
/// the session or the daemon.
///
/// Dropping it gives the hold back; that neither blocks nor allocates nor takes a lock.
pub struct Held {
    leases: Arc<Leases>,
    /// `Some` until it is dropped.
    back: Option<Box<Return>>,
    address: *const u8,
    extent: Extent,
    dataset: AtomicBool,
    name: OnceLock<String>,
    created: bool,
    kind: Kind,
    mark: Mark,
}

// SAFETY: the memory at `address` is kept mapped by `back`; everything else is Send and Sync.
unsafe impl Send for Held {}
// SAFETY: as above.
unsafe impl Sync for Held {}

impl Held {
    /// The caller has checked that the extent lies inside the mapping.
    pub(super) fn new(
        leases: Arc<Leases>,
        back: Box<Return>,
        lease: &Lease,
        origin: &Origin<'_>,
        mark: Mark,
    ) -> Self {
        let Lease { extent, dataset, .. } = *lease;
        let inside =
            extent.offset.checked_add(extent.length).is_some_and(|end| end <= back.mapping.len() as u64);
        assert!(inside, "the extent was compared with its mapping");
        let address = back.mapping.as_ptr().wrapping_add(extent.offset as usize);
        let Origin { name, created, kind } = *origin;
        let name = if name.is_empty() { OnceLock::new() } else { OnceLock::from(name.to_owned()) };
        let dataset = AtomicBool::new(dataset);
        Self { leases, back: Some(back), address, extent, dataset, name, created, kind, mark }
    }

    /// Where the bytes begin, valid for [`len`](Self::len) bytes while this lives.
    pub fn as_ptr(&self) -> *const u8 {
        self.address
    }

    /// Bytes of the result.
    pub fn len(&self) -> usize {
        self.extent.length as usize
    }

    /// Whether it has no bytes (a result has at least its schema).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes: one Arrow IPC file.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `new` compared the extent with the mapping, which `back` keeps. The mapping is read-only and the daemon writes
        // an extent only before it is leased and after every hold on it was given back. (POSIX segments: peers are trusted.)
        unsafe { std::slice::from_raw_parts(self.address, self.len()) }
    }

    /// Which extent it is.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// The name of its segment, as `/proc/<pid>/maps` shows it.
    pub fn segment_name(&self) -> String {
        SegmentName { instance: self.leases.instance(), kind: self.kind, id: self.extent.segment }.to_string()
    }

    /// Whether it is published, and so never recycled.
    pub fn is_dataset(&self) -> bool {
        self.dataset.load(Ordering::Relaxed)
    }

    /// The name under which it was made, opened or published.
    pub fn name(&self) -> Option<&str> {
        self.name.get().map(String::as_str)
    }

    /// Whether this very call computed it (a named result may have existed already).
    pub fn created(&self) -> bool {
        self.created
    }

    /// The whole segment's mapping, for whoever wants another view of it.
    pub fn mapping(&self) -> Option<&Mapping> {
        self.back.as_ref().map(|back| &*back.mapping)
    }

    pub(super) fn published(&self, name: &str) {
        self.dataset.store(true, Ordering::Relaxed);
        // It may have had a name before; the first one stays.
        let _ = self.name.set(name.to_owned());
    }

    pub(super) fn is_of(&self, leases: &Arc<Leases>) -> bool {
        Arc::ptr_eq(&self.leases, leases)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(mut back) = self.back.take() {
            back.release.tainted = self.mark.forked();
            self.leases.give_back(back);
        }
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held")
            .field("segment", &self.segment_name())
            .field("extent", &self.extent)
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}
