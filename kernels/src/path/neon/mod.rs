//! NEON by hand, from unaligned source to packed codes without a tile between.
//!
//! As in the x86-64 paths, values that change while they are read can only change codes: conversions and narrowing
//! saturate, and results are clamped. Neither prefetches nor stores past the cache are asked for: whether they pay
//! was never measured on such a machine.

mod columns;
mod decode;
mod groups;
mod lanes;
mod sums;

use crate::path::groups::Hand;
use crate::path::{Kernels, baseline};

/// Every aarch64 has it; its loops are those of the portable path, which the compiler writes for NEON as it is.
pub(super) fn detected() -> Vec<&'static Kernels> {
    vec![&KERNELS]
}

static KERNELS: Kernels = Kernels { name: "neon", hand: Some(&HAND), ..baseline::LOOPS };

static HAND: Hand = Hand {
    groups: groups::groups,
    columns: columns::columns,
    range: groups::range_of,
    widen: columns::widen,
    decode: decode::decode,
    sums: sums::sums,
};
