//! The idle memory of one session, by size class.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use shmquant_protocol::segment::Kind;

/// Smallest class.
pub(crate) const SMALLEST: u64 = 64 << 10;

/// From here on a class may not waste a quarter: the pages that nobody needs would cost milliseconds to make.
const LARGE: u64 = 16 << 20;

/// The class of a result: at least 64 KiB, 4 steps per doubling, 16 where it is large. `None` if it passes 2^62.
pub(crate) fn class_of(bytes: u64) -> Option<u64> {
    if bytes <= SMALLEST {
        return Some(SMALLEST);
    }
    if bytes > 1 << 62 {
        return None;
    }
    let steps = if bytes <= LARGE { 4 } else { 16 };
    // The largest power of two below `bytes`, in so many parts.
    let step = (1u64 << (63 - (bytes - 1).leading_zeros())) / steps;
    Some(bytes.next_multiple_of(step))
}

#[derive(Debug, Clone, Copy)]
struct Idle {
    id: u64,
    since: Instant,
}

/// Free segments of a session. Which state they are in is the registry's business; this only finds them.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    /// By what they are (inputs or results) and their size.
    classes: BTreeMap<(bool, u64), Vec<Idle>>,
    bytes: u64,
}

impl Pool {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn put(&mut self, id: u64, kind: Kind, size: u64) {
        self.classes.entry((kind == Kind::Input, size)).or_default().push(Idle { id, since: Instant::now() });
        self.bytes += size;
    }

    /// The segment that was used last of the smallest class that fits and is at most twice as large.
    pub(crate) fn take(&mut self, kind: Kind, size: u64) -> Option<u64> {
        let input = kind == Kind::Input;
        let fits = (input, size)..=(input, size.saturating_mul(2));
        let ((_, class), idle) = self.classes.range_mut(fits).find(|(_, list)| !list.is_empty())?;
        let id = idle.pop()?.id;
        self.bytes -= class;
        Some(id)
    }

    /// The segment that has been idle longest of those that the bound lets go.
    pub(crate) fn take_oldest(&mut self, idle_for: Duration) -> Option<(u64, u64)> {
        let now = Instant::now();
        // Each list is in the order of time: the first one is its oldest.
        let oldest =
            self.classes.iter().filter_map(|(class, list)| list.first().map(|i| (i.since, *class))).min();
        let (since, class) = oldest?;
        if now.duration_since(since) < idle_for {
            return None;
        }
        let list = self.classes.get_mut(&class)?;
        let idle = list.remove(0);
        if list.is_empty() {
            self.classes.remove(&class);
        }
        self.bytes -= class.1;
        Some((idle.id, class.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_waste_a_quarter_and_large_ones_a_sixteenth() {
        let kib = |n: u64| n << 10;
        for (bytes, class) in
            [(1, 64), (64, 64), (65, 80), (80, 80), (81, 96), (97, 112), (113, 128), (128, 128), (129, 160)]
        {
            assert_eq!(class_of(kib(bytes)), Some(kib(class)), "{bytes} KiB");
        }
        for bytes in [1, 65_537, 1 << 20, LARGE, LARGE + 1, (1 << 30) + 1, 12_345_678_901] {
            let class = class_of(bytes).unwrap();
            assert!(class >= bytes && class.is_multiple_of(4096), "{bytes} {class}");
            let waste = bytes / if bytes > LARGE { 16 } else { 4 };
            assert!(class == SMALLEST || class - bytes <= waste, "{bytes} {class}");
        }
        assert_eq!((class_of(LARGE), class_of(LARGE + 1)), (Some(LARGE), Some(LARGE + (1 << 20))));
        assert_eq!(class_of(u64::MAX), None);
    }

    #[test]
    fn the_hottest_fit_is_taken_and_the_oldest_goes() {
        let mut pool = Pool::default();
        for (id, size) in [(1, 100), (2, 100), (3, 150), (4, 500)] {
            pool.put(id, Kind::Result, size);
        }
        assert_eq!(pool.take(Kind::Input, 100), None, "clients may write to inputs");
        assert_eq!(pool.take(Kind::Result, 100), Some(2));
        assert_eq!(pool.take(Kind::Result, 120), Some(3));
        assert_eq!(pool.take(Kind::Result, 120), None, "500 is more than twice as large");
        assert_eq!(pool.take_oldest(Duration::from_secs(9)), None);
        assert_eq!(pool.take_oldest(Duration::ZERO), Some((1, 100)));
        assert_eq!(pool.take_oldest(Duration::ZERO), Some((4, 500)));
        assert_eq!((pool.take_oldest(Duration::ZERO), pool.bytes()), (None, 0));
    }
}
