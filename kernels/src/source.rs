//! One chunk's values on their way into a tile: policy on non-finite values, rows left out, faults with their place.

use crate::fault::{Fault, OnNonFinite};
use crate::layout::Layout;
use crate::path::Kernels;
use crate::scheme::Range;
use crate::values::{FloatType, Values};

pub(crate) struct Source<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) values: Values<'a>,
    pub(crate) first: u64,
    policy: OnNonFinite,
    /// Rows to leave out, ascending. Only under [`OnNonFinite::Null`].
    pub(crate) nulled: Vec<u64>,
    /// Non-finite values in those rows.
    pub(crate) nulled_values: u64,
    examined: bool,
}

/// What a tile holds after the policy was applied: infinities only, no NaN.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Loaded {
    /// Of the finite values.
    pub(crate) range: Range,
    pub(crate) nonfinite: u64,
    pub(crate) infinities: u64,
}

impl<'a> Source<'a> {
    /// Under [`OnNonFinite::Null`] this reads the chunk once to find the rows to leave out.
    pub(crate) fn new(
        kernels: &'a Kernels,
        values: Values<'a>,
        first: u64,
        layout: &Layout,
        policy: OnNonFinite,
    ) -> Result<Self, Fault> {
        let mut source =
            Self { kernels, values, first, policy, nulled: Vec::new(), nulled_values: 0, examined: false };
        if policy == OnNonFinite::Null {
            source.find_nulled(layout)?;
        }
        Ok(source)
    }

    /// Reads `tile.len()` values from offset `at`, all of row `row` if any row is left out.
    pub(crate) fn load(&mut self, at: usize, row: u64, tile: &mut [f32]) -> Result<Loaded, Fault> {
        if !self.nulled.is_empty() && self.nulled.binary_search(&row).is_ok() {
            tile.fill(0.0);
            return Ok(Loaded { range: Range::EMPTY, nonfinite: 0, infinities: 0 });
        }
        self.kernels.load(&self.values, at, tile);
        let seen = self.kernels.range(tile);
        if seen.finite {
            return Ok(Loaded { range: seen.range, nonfinite: 0, infinities: 0 });
        }
        self.examine(at, tile)?;
        let mut loaded = Loaded { range: Range::EMPTY, nonfinite: 0, infinities: 0 };
        for v in tile {
            if v.is_finite() {
                loaded.range.merge(Range { min: *v, max: *v });
                continue;
            }
            loaded.nonfinite += 1;
            if v.is_nan() {
                *v = 0.0;
            } else {
                loaded.infinities += 1;
            }
        }
        Ok(loaded)
    }

    /// Decides, once a chunk, whether its non-finite values are faults.
    fn examine(&mut self, at: usize, tile: &[f32]) -> Result<(), Fault> {
        if self.policy != OnNonFinite::Error && (self.examined || self.values.dtype() != FloatType::F64) {
            return Ok(());
        }
        self.examined = true;
        let mut fault = None;
        let mut count = 0;
        for i in 0..self.values.len() {
            let value = self.values.get(i);
            if value.is_finite() {
                if !(value as f32).is_finite() && fault.is_none() {
                    return Err(Fault::Overflow { index: self.first + i as u64, value });
                }
            } else if self.policy == OnNonFinite::Error {
                count += 1;
                fault.get_or_insert((i, value as f32));
            }
        }
        if let Some((i, value)) = fault {
            return Err(Fault::NonFinite { index: self.first + i as u64, count, value });
        }
        if self.policy == OnNonFinite::Error {
            // The writer changed the values since: what was loaded decides.
            let i = tile.iter().position(|v| !v.is_finite()).unwrap_or(0);
            let value = tile.get(i).copied().unwrap_or(f32::NAN);
            return Err(Fault::NonFinite { index: self.first + (at + i) as u64, count: 1, value });
        }
        Ok(())
    }

    fn find_nulled(&mut self, layout: &Layout) -> Result<(), Fault> {
        let mut tile = [0f32; crate::path::TILE];
        let mut at = 0;
        while at < self.values.len() {
            let tile = &mut tile[..(self.values.len() - at).min(crate::path::TILE)];
            self.kernels.load(&self.values, at, tile);
            if !self.kernels.range(tile).finite {
                self.examine(at, tile)?;
                for (i, v) in tile.iter().enumerate().filter(|(_, v)| !v.is_finite()) {
                    debug_assert!(!v.is_finite());
                    let row = (self.first + (at + i) as u64) / layout.k.max(1);
                    if self.nulled.last() != Some(&row) {
                        self.nulled.push(row);
                    }
                    self.nulled_values += 1;
                }
            }
            at += tile.len();
        }
        Ok(())
    }
}
