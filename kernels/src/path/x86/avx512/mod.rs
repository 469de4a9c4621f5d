//! AVX-512 by hand, from unaligned source to packed codes without a tile between.
//!
//! Where another process writes to the source meanwhile, the codes are any codes: conversions and packs saturate and
//! results are clamped or masked, so nothing else can come of it.

mod columns;
mod decode;
mod groups;
mod lanes;
mod ranges;
mod sums;

use crate::path::groups::Hand;

pub(super) static HAND: Hand = Hand {
    groups: groups::groups,
    columns: columns::columns,
    range: ranges::range_of,
    widen: columns::widen,
    decode: decode::decode,
    sums: sums::sums,
};
