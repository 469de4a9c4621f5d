//! One item while its chunks run: ranges that grow, parameters once they are known, rows that the policy drops.

use std::ops;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::Stopped;
use super::access::Region;
use shmquant_kernels::{
    Affine, Counters, DomainParams, Fault, Granularity, Layout, Mapping, Range, params_from_range,
    params_from_ranges,
};

/// What the chunks of one item share.
#[derive(Debug, Default)]
pub(super) struct ItemState {
    /// Its values, if they are not in the window.
    pub(super) source: Option<Region>,
    /// Its chunks.
    pub(super) chunks: ops::Range<usize>,
    /// Index of the first chunk behind its Scan chunks; 0 if it has none.
    pub(super) barrier: usize,
    /// Scan chunks that have not ended.
    pub(super) scans_left: AtomicUsize,
    /// A Scan chunk found a fault: codes would mean nothing.
    pub(super) faulty: AtomicBool,
    pub(super) ranges: Mutex<Ranges>,
    pub(super) known: OnceLock<Known>,
    nulled: OnceLock<Box<[AtomicU8]>>,
}

/// Ranges of all domains, while they are being scanned.
#[derive(Debug, Default)]
pub(super) enum Ranges {
    #[default]
    None,
    /// In private memory.
    Own(Vec<Range>),
    /// Where the parameters will be.
    InPlace,
}

/// Parameters of an item that has more than one pass, or whose parameters are not in the result.
#[derive(Debug)]
pub(super) enum Known {
    /// In private memory.
    Own { scales: Vec<f32>, zeros: Vec<i32>, degenerate: u64 },
    /// At their final place.
    InPlace { degenerate: u64 },
    /// There are none.
    Fault(Fault),
    /// The result is too small: a bug.
    Broken,
}

impl ItemState {
    /// Marks rows as dropped by the policy.
    pub(super) fn null_rows(&self, rows: u64, nulled: &[u64]) {
        if nulled.is_empty() {
            return;
        }
        let bitmap = self.nulled.get_or_init(|| (0..rows.div_ceil(8)).map(|_| AtomicU8::new(0)).collect());
        for row in nulled {
            if let Some(byte) = bitmap.get((row / 8) as usize) {
                byte.fetch_or(1 << (row % 8), Ordering::Relaxed);
            }
        }
    }

    /// Eight rows: which of them the policy drops.
    pub(super) fn nulled_byte(&self, byte: usize) -> u8 {
        self.nulled.get().and_then(|b| b.get(byte)).map_or(0, |b| b.load(Ordering::Relaxed))
    }

    /// Widens private ranges from `first` on.
    pub(super) fn merge(ranges: &mut Vec<Range>, all: usize, first: usize, found: &[Range]) {
        if ranges.is_empty() {
            ranges.resize(all, Range::EMPTY);
        }
        for (range, found) in ranges.iter_mut().skip(first).zip(found) {
            range.merge(*found);
        }
    }

    /// Private parameters of private ranges.
    pub(super) fn own(&self, layout: &Layout, affine: &Affine) -> Known {
        let guard = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        let Ranges::Own(ranges) = &*guard else { return Known::Broken };
        match params_from_ranges(ranges, affine) {
            Ok(DomainParams { scales, zero_points: zeros, degenerate }) => {
                Known::Own { scales, zeros, degenerate }
            }
            Err((domain, fault)) => Known::Fault(at_domain(fault, layout, domain as u64)),
        }
    }

    /// Keeps parameters that one chunk made of whole domains; their degenerate ones are counted with them.
    pub(super) fn keep(
        &self,
        scales: Vec<f32>,
        zeros: Vec<i32>,
        counters: &mut Counters,
    ) -> Result<(), Stopped> {
        let degenerate = std::mem::take(&mut counters.n_degenerate_groups);
        let set = self.known.set(Known::Own { scales, zeros, degenerate });
        set.map_err(|_| Stopped::Broken("two chunks made the same parameters"))
    }
}

/// Widens ranges that lie where the parameters will be: the smallest value as scale and the largest as zero point,
/// or the largest magnitude as scale.
pub(super) fn merge_in_place(scales: &mut [f32], zeros: Option<&mut [f32]>, found: &[Range]) {
    match zeros {
        Some(zeros) => {
            for ((min, max), found) in scales.iter_mut().zip(zeros).zip(found) {
                let mut range = Range { min: *min, max: *max };
                range.merge(*found);
                (*min, *max) = (range.min, range.max);
            }
        }
        None => {
            for (most, found) in scales.iter_mut().zip(found) {
                let amax = if -found.min > found.max { -found.min } else { found.max };
                *most = if amax > *most { amax } else { *most };
            }
        }
    }
}

/// Puts parameters in the place of such ranges.
pub(super) fn params_in_place(
    scales: &mut [f32],
    mut zeros: Option<&mut [f32]>,
    layout: &Layout,
    affine: &Affine,
) -> Known {
    let mut degenerate = 0;
    for domain in 0..scales.len() {
        let range = match &zeros {
            Some(zeros) => Range { min: scales[domain], max: zeros[domain] },
            None => Range { min: 0.0, max: scales[domain] },
        };
        match params_from_range(range, affine) {
            Ok((scale, zero, is_degenerate)) => {
                scales[domain] = scale;
                if let Some(zeros) = &mut zeros {
                    zeros[domain] = zero as f32;
                }
                degenerate += u64::from(is_degenerate);
            }
            Err(fault) => return Known::Fault(at_domain(fault, layout, domain as u64)),
        }
    }
    debug_assert_eq!(zeros.is_some(), affine.mapping == Mapping::Asymmetric);
    Known::InPlace { degenerate }
}

/// Puts a domain's first element into a fault that does not know it.
fn at_domain(fault: Fault, layout: &Layout, domain: u64) -> Fault {
    let element = match layout.granularity {
        Granularity::Tensor => 0,
        Granularity::Row => domain * layout.k,
        Granularity::Dimension => domain,
        Granularity::Group => {
            let groups = layout.groups_per_row().max(1);
            domain / groups * layout.k + domain % groups * layout.group
        }
    };
    match fault {
        Fault::RangeOverflow { min, max, .. } => Fault::RangeOverflow { index: element, min, max },
        other => other,
    }
}
