//! What the hand-written paths take on, straight from the source: runs of whole groups, and runs of columns.

use crate::metrics::Sums;
use crate::path::TileRange;
use crate::scheme::Affine;
use crate::values::Values;

/// The functions of a path that has more than the portable loops. None of them takes f64 values.
///
/// They rely on lengths that [`crate::path::Kernels`] checks.
pub(crate) struct Hand {
    pub(crate) groups: unsafe fn(&mut Groups<'_>) -> Done,
    pub(crate) columns: unsafe fn(&mut Columns<'_>) -> Option<u64>,
    pub(crate) range: unsafe fn(Values<'_>) -> TileRange,
    pub(crate) widen: unsafe fn(&mut Widen<'_>) -> bool,
    pub(crate) decode: unsafe fn(&mut Coded<'_>),
    pub(crate) sums: unsafe fn(&[f32], &[f32]) -> Sums,
}

/// Adjoining groups: values in, codes and parameters out. The lengths of `scales` and `zero_points` are the number
/// of groups.
pub(crate) struct Groups<'a> {
    pub(crate) values: Values<'a>,
    /// Values of one group.
    pub(crate) len: usize,
    /// [`code_bytes`] a group.
    pub(crate) codes: &'a mut [u8],
    pub(crate) scales: &'a mut [f32],
    /// Those that are given lie inside the codes.
    pub(crate) zero_points: &'a mut [i32],
    /// Whether scales and zero points are read, not written.
    pub(crate) given: bool,
    pub(crate) affine: &'a Affine,
    /// Bits of one code where it lies: `affine.bits`, or 8.
    pub(crate) stored: u8,
    /// Whether so much is written that it had better not pass through the cache.
    pub(crate) stream: bool,
}

#[cfg(target_arch = "x86_64")]
impl Groups<'_> {
    /// Those from the `from`th on.
    pub(crate) fn rest(&mut self, from: usize) -> Groups<'_> {
        Groups {
            values: self.values.slice(from * self.len..self.values.len()),
            codes: &mut self.codes[from * code_bytes(self.len, self.stored)..],
            scales: &mut self.scales[from..],
            zero_points: &mut self.zero_points[from..],
            ..*self
        }
    }
}

/// How far a path came: it stops before a group with a non-finite value or a range that overflows, and may have
/// written any codes and parameters there.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Done {
    pub(crate) groups: usize,
    pub(crate) clipped: u64,
    pub(crate) degenerate: u64,
}

#[cfg(target_arch = "x86_64")]
impl Done {
    pub(crate) fn add(&mut self, other: Self) {
        self.groups += other.groups;
        self.clipped += other.clipped;
        self.degenerate += other.degenerate;
    }
}

/// Bytes that the codes of a group take; what is left of the last one is 0.
pub(crate) fn code_bytes(len: usize, stored: u8) -> usize {
    (len * usize::from(stored)).div_ceil(8)
}

/// A part of a row whose every column has parameters of its own. The result is how many values were clipped, `None`
/// where one is not finite, and then the codes are any.
pub(crate) struct Columns<'a> {
    pub(crate) values: Values<'a>,
    /// [`code_bytes`] of them.
    pub(crate) codes: &'a mut [u8],
    /// One a value: scales, or their reciprocals where the arithmetic multiplies.
    pub(crate) factors: &'a [f32],
    /// One a value, inside the codes.
    pub(crate) zero_points: &'a [i32],
    pub(crate) affine: &'a Affine,
    pub(crate) stored: u8,
    pub(crate) stream: bool,
}

/// Ranges of columns, to be widened by a part of a row; left as they are where a value is not finite, which the
/// result tells.
pub(crate) struct Widen<'a> {
    pub(crate) values: Values<'a>,
    /// One a value.
    pub(crate) min: &'a mut [f32],
    /// One a value.
    pub(crate) max: &'a mut [f32],
}

/// Adjoining groups: codes and parameters in, values out. The lengths of `scales` and `zero_points` are the number of
/// groups.
pub(crate) struct Coded<'a> {
    /// Of all groups; each begins on a byte.
    pub(crate) codes: &'a [u8],
    /// 8 or 4.
    pub(crate) stored: u8,
    pub(crate) signed: bool,
    /// Values of one group.
    pub(crate) len: usize,
    pub(crate) scales: &'a [f32],
    pub(crate) zero_points: &'a [i32],
    pub(crate) out: &'a mut [f32],
    /// Whether so much is written that it had better not pass through the cache.
    pub(crate) stream: bool,
}
