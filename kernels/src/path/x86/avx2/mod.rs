//! AVX2 by hand, from unaligned source to packed codes without a tile between.
//!
//! As in the AVX-512 paths, values that change while they are read can only change codes.

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
