//! Which addresses of this process lie in extents that its session holds.

use std::collections::BTreeMap;

use crate::descriptor::Place;
use crate::message::{Extent, Release};

/// Held extents by the address at which they are mapped.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    of: BTreeMap<usize, Range>,
}

#[derive(Debug)]
struct Range {
    extent: Extent,
    /// How often it is held.
    holds: u64,
}

impl Ranges {
    /// Notes one more hold on an extent that is mapped at `address`.
    pub(super) fn add(&mut self, address: usize, extent: Extent) {
        let range = self.of.entry(address).or_insert(Range { extent, holds: 0 });
        if range.extent != extent {
            // An earlier use of the same memory.
            *range = Range { extent, holds: 0 };
        }
        range.holds += 1;
    }

    /// Takes one hold back.
    pub(super) fn remove(&mut self, address: usize, release: &Release) {
        let Some(range) = self.of.get_mut(&address) else { return };
        if (range.extent.segment, range.extent.generation) != (release.segment, release.generation) {
            return;
        }
        range.holds -= 1;
        if range.holds == 0 {
            self.of.remove(&address);
        }
    }

    /// Where `[address, address + bytes)` lies; `None` unless all of it is in one extent.
    pub(super) fn find(&self, address: usize, bytes: usize) -> Option<Place> {
        let (start, Range { extent, .. }) = self.of.range(..=address).next_back()?;
        let offset = (address - start) as u64;
        let end = offset.checked_add(bytes as u64)?;
        (end <= extent.length).then_some(Place { extent: *extent, offset })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.of.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(extent: &Extent) -> Release {
        Release { segment: extent.segment, generation: extent.generation, tainted: false }
    }

    #[test]
    fn only_what_lies_inside_one_held_extent_is_found() {
        let mut ranges = Ranges::default();
        let first = Extent { segment: 1, generation: 1, offset: 0, length: 100 };
        let second = Extent { segment: 2, generation: 5, offset: 64, length: 10 };
        ranges.add(1000, first);
        ranges.add(5160, second);
        assert_eq!(ranges.find(1000, 100), Some(Place { extent: first, offset: 0 }));
        assert_eq!(ranges.find(1099, 1), Some(Place { extent: first, offset: 99 }));
        for (address, bytes) in [(999, 1), (1000, 101), (1099, 2), (1100, 0x7fff_ffff), (1200, 1), (5159, 1)]
        {
            assert_eq!(ranges.find(address, bytes), None, "{address} {bytes}");
        }
        assert_eq!(ranges.find(5160, 10), Some(Place { extent: second, offset: 0 }));
        assert_eq!(ranges.find(usize::MAX, usize::MAX), None);
    }

    #[test]
    fn an_extent_is_known_until_its_last_hold_goes() {
        let mut ranges = Ranges::default();
        let old = Extent { segment: 1, generation: 1, offset: 0, length: 100 };
        let new = Extent { generation: 2, ..old };
        ranges.add(1000, old);
        ranges.add(1000, old);
        ranges.remove(1000, &release(&old));
        assert!(ranges.find(1000, 100).is_some());
        // The memory was used again; what comes back late is of the earlier use.
        ranges.add(1000, new);
        ranges.remove(1000, &release(&old));
        assert_eq!(ranges.find(1000, 1), Some(Place { extent: new, offset: 0 }));
        ranges.remove(1000, &release(&new));
        ranges.remove(1000, &release(&new));
        assert!(ranges.is_empty());
    }
}
