//! One chunk's values on their way into a tile: policy on non-finite values, rows left out, faults with their place.

use std::ops;

use crate::fault::{Fault, OnNonFinite};
use crate::layout::Layout;
use crate::path::{BLOCK, Kernels, TILE};
use crate::scheme::Range;
use crate::values::{FloatType, Values};

pub(crate) struct Source<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) values: Values<'a>,
    pub(crate) first: u64,
    policy: OnNonFinite,
    k: u64,
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
        let mut source = Self {
            kernels,
            values,
            first,
            policy,
            k: layout.k.max(1),
            nulled: Vec::new(),
            nulled_values: 0,
            examined: false,
        };
        if policy == OnNonFinite::Null {
            source.find_nulled()?;
        }
        Ok(source)
    }

    /// Whether the path may read `len` values from offset `at` where they lie: it has functions for that, and no rows
    /// are left out there.
    pub(crate) fn direct(&self, at: usize, len: usize) -> bool {
        self.kernels.takes(self.values.dtype())
            && left_out(&self.nulled, self.k, self.first + at as u64, len).next().is_none()
    }

    /// The range of `len` values from offset `at`, after the policy was applied.
    pub(crate) fn range(&mut self, at: usize, len: usize, tile: &mut [f32; TILE]) -> Result<Range, Fault> {
        let mut range = Range::EMPTY;
        let mut done = 0;
        while done < len {
            let from = at + done;
            let n = (len - done).min(BLOCK);
            if self.direct(from, n) {
                let seen = self.kernels.range_of(self.values.slice(from..from + n));
                if seen.finite {
                    range.merge(seen.range);
                    done += n;
                    continue;
                }
            }
            let n = (len - done).min(TILE);
            range.merge(self.load(from, &mut tile[..n])?.range);
            done += n;
        }
        Ok(range)
    }

    /// Reads `tile.len()` values from offset `at` as they are, but for the rows left out.
    pub(crate) fn load_unchecked(&self, at: usize, tile: &mut [f32]) {
        self.kernels.load(&self.values, at, tile);
        for part in left_out(&self.nulled, self.k, self.first + at as u64, tile.len()) {
            tile[part].fill(0.0);
        }
    }

    /// Reads `tile.len()` values from offset `at` and applies the policy.
    pub(crate) fn load(&mut self, at: usize, tile: &mut [f32]) -> Result<Loaded, Fault> {
        self.load_unchecked(at, tile);
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

    fn find_nulled(&mut self) -> Result<(), Fault> {
        let mut tile = [0f32; TILE];
        let mut at = 0;
        while at < self.values.len() {
            let n = (self.values.len() - at).min(BLOCK);
            if self.direct(at, n) && self.kernels.range_of(self.values.slice(at..at + n)).finite {
                at += n;
                continue;
            }
            let tile = &mut tile[..(self.values.len() - at).min(TILE)];
            self.kernels.load(&self.values, at, tile);
            if !self.kernels.range(tile).finite {
                self.examine(at, tile)?;
                for (i, _) in tile.iter().enumerate().filter(|(_, v)| !v.is_finite()) {
                    let row = (self.first + (at + i) as u64) / self.k;
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

/// The parts of a run of `len` elements from `first` on that belong to the rows in `nulled` (ascending).
pub(crate) fn left_out(
    nulled: &[u64],
    k: u64,
    first: u64,
    len: usize,
) -> impl Iterator<Item = ops::Range<usize>> {
    let end = first + len as u64;
    let from = if nulled.is_empty() { 0 } else { nulled.partition_point(|&row| row < first / k) };
    nulled[from..].iter().map_while(move |&row| {
        let (start, stop) = ((row * k).max(first), ((row + 1) * k).min(end));
        (start < end).then(|| (start - first) as usize..(stop - first) as usize)
    })
}
