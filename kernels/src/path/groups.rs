//! What the hand-written paths take on: runs of whole groups of f32 whose codes fill whole bytes.

use crate::scheme::Affine;

/// Group lengths must be multiples of it.
pub(crate) const GROUP_UNIT: usize = 32;

/// Adjoining groups: values in, codes and parameters out. The lengths of `scales` and `zero_points` are the number
/// of groups.
pub(crate) struct Groups<'a> {
    /// First value; unaligned, and readable for every group.
    pub(crate) values: *const f32,
    /// Values of one group, a multiple of [`GROUP_UNIT`].
    pub(crate) len: usize,
    /// `len * affine.bits / 8` bytes a group.
    pub(crate) codes: &'a mut [u8],
    pub(crate) scales: &'a mut [f32],
    pub(crate) zero_points: &'a mut [i32],
    pub(crate) affine: &'a Affine,
    /// Whether so much is written that it had better not pass through the cache.
    pub(crate) stream: bool,
}

/// How far a path came: it stops before a group with a non-finite value or a range that overflows.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Done {
    pub(crate) groups: usize,
    pub(crate) clipped: u64,
    pub(crate) degenerate: u64,
}
