//! The plans of a lane's last requests: who sends tables of one shape one after the other has them planned once.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Plan;

/// Most plans that a lane keeps.
const MOST: usize = 4;
/// The longest descriptor whose plan is kept.
const LONGEST: usize = 64 << 10;
/// Most chunks of a plan that is kept: what takes longer to work through than this is not worth remembering.
const MOST_CHUNKS: usize = 4096;

/// Plans by the bytes of their descriptors and their rings, for one size of window: if these are equal, the plans are.
#[derive(Debug, Default)]
pub struct Plans {
    /// The one used last is first.
    kept: VecDeque<Kept>,
}

#[derive(Debug)]
struct Kept {
    ring: u64,
    descriptor: Box<[u8]>,
    plan: Arc<Plan>,
}

impl Plans {
    /// The plan of this very descriptor for a ring of `ring` bytes, 0 for all of the window.
    pub fn get(&mut self, descriptor: &[u8], ring: u64) -> Option<Arc<Plan>> {
        let at = self.kept.iter().position(|kept| kept.ring == ring && *kept.descriptor == *descriptor)?;
        if at > 0 {
            let found = self.kept.remove(at)?;
            self.kept.push_front(found);
        }
        self.kept.front().map(|kept| kept.plan.clone())
    }

    /// Keeps a plan that [`get`](Self::get) did not find.
    pub fn put(&mut self, descriptor: &[u8], ring: u64, plan: &Arc<Plan>) {
        if descriptor.len() > LONGEST || plan.chunks().chunks.len() > MOST_CHUNKS {
            return;
        }
        self.kept.truncate(MOST - 1);
        self.kept.push_front(Kept { ring, descriptor: descriptor.into(), plan: plan.clone() });
    }
}

#[cfg(test)]
mod tests {
    use shmquant_protocol::descriptor::{Descriptor, TableKind};

    use super::*;

    fn plan() -> Arc<Plan> {
        let table = TableKind::Layers { large_names: false };
        let descriptor = Descriptor {
            table,
            metrics: false,
            continue_on_error: false,
            specs: Vec::new(),
            metadata: Default::default(),
            rows: 0,
            items: Vec::new(),
        };
        Arc::new(Plan::new(descriptor, 64, 8 << 20, 0, 1 << 20).unwrap())
    }

    #[test]
    fn the_plans_used_last_are_kept() {
        let mut plans = Plans::default();
        let made: Vec<_> = (0..MOST as u8 + 1).map(|i| ([i], plan())).collect();
        for (bytes, plan) in &made[..MOST] {
            assert!(plans.get(bytes, 0).is_none());
            plans.put(bytes, 0, plan);
        }
        // The oldest is used again: the second one has to go.
        assert!(Arc::ptr_eq(&plans.get(&made[0].0, 0).unwrap(), &made[0].1));
        plans.put(&made[MOST].0, 0, &made[MOST].1);
        assert!(plans.get(&made[1].0, 0).is_none());
        for (bytes, plan) in made.iter().filter(|(bytes, _)| bytes[0] != 1) {
            assert!(Arc::ptr_eq(&plans.get(bytes, 0).unwrap(), plan));
        }
        assert!(plans.get(&[], 0).is_none());
        // The same table in another ring lies elsewhere.
        assert!(plans.get(&made[0].0, 2 << 20).is_none());
    }

    #[test]
    fn a_long_descriptor_is_not_kept() {
        let mut plans = Plans::default();
        plans.put(&vec![0; LONGEST + 1], 0, &plan());
        assert!(plans.get(&vec![0; LONGEST + 1], 0).is_none());
    }
}
