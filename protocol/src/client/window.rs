//! A lane's window: the memory through which everything reaches the daemon.
#![allow(unsafe_code, reason = "disjoint parts of one mapping are written by several threads")]

use crate::segment::{Backing, Mapping, SegmentError};
use std::os::fd::BorrowedFd;

/// A segment that this process writes and the daemon reads.
#[derive(Debug)]
pub(super) struct Window {
    mapping: Mapping,
    address: *mut u8,
}

// SAFETY: it owns its mapping; writing is `unsafe fn part`, whose callers keep parts disjoint.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// Maps a window of `size` bytes. A forked child does not have it.
    pub(super) fn map(fd: BorrowedFd<'_>, size: u64, backing: Backing) -> Result<Self, SegmentError> {
        let mapping = Mapping::read_write(fd, size, backing)?;
        // Else the first large request pays 1 µs a page. All that is lost without it is that time.
        let _ = mapping.prefault();
        match mapping.as_mut_ptr() {
            Some(address) => Ok(Self { mapping, address }),
            None => Err(SegmentError::BadSize { size, max: 0 }),
        }
    }

    /// Its bytes.
    pub(super) fn len(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// `len` bytes at `at`, if they lie inside.
    ///
    /// # Safety
    /// No other part given out at the same time overlaps it. (That the daemon may read it meanwhile is no matter: it copies what it
    /// parses and trusts no value.)
    #[allow(clippy::mut_from_ref, reason = "the contract keeps parts disjoint")]
    pub(super) unsafe fn part(&self, at: u64, len: u64) -> Option<&mut [u8]> {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.len());
        // SAFETY: inside the mapping, which lives as long as the borrow; disjoint by contract. Shared memory is initialised.
        inside.then(|| unsafe { std::slice::from_raw_parts_mut(self.address.add(at as usize), len as usize) })
    }

    /// Writes bytes at the start, while no part is given out. False if they do not fit.
    pub(super) fn write(&mut self, bytes: &[u8]) -> bool {
        // SAFETY: `&mut self`: there is no other part.
        match unsafe { self.part(0, bytes.len() as u64) } {
            Some(part) => {
                part.copy_from_slice(bytes);
                true
            }
            None => false,
        }
    }

    /// Copies the first `len` bytes out, if there are so many.
    pub(super) fn read(&mut self, len: u64) -> Option<Vec<u8>> {
        // SAFETY: `&mut self`: there is no other part.
        unsafe { self.part(0, len) }.map(|part| part.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::segment::{Kind, Segment, SegmentName};

    #[test]
    fn parts_lie_inside_or_do_not_exist() {
        let name = SegmentName { instance: 0xc1, kind: Kind::Window, id: 2 };
        let segment = Segment::create(Backing::Memfd, &name, 4096).unwrap();
        let mut window = Window::map(segment.fd().as_fd(), 4096, Backing::Memfd).unwrap();
        assert!(window.write(b"abc") && !window.write(&[0; 4097]));
        assert_eq!(window.read(3).unwrap(), b"abc");
        assert!(window.read(4097).is_none());
        // SAFETY: one part at a time.
        unsafe {
            assert_eq!(window.part(4000, 96).map(|p| p.len()), Some(96));
            assert!(window.part(4000, 97).is_none());
            assert!(window.part(u64::MAX, 2).is_none());
        }
    }
}
