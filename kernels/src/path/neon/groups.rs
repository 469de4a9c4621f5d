//! Groups with parameters of their own, or given ones.
//!
//! A group that gets its own is read twice, for its range and for its codes, the second time from a near cache.

use std::arch::aarch64::*;

use super::lanes::{
    BF16, BLOCK, Clamp, Divisor, F16, F32, finite, load, load_part, plain, size, store, store_part, top_of,
};
use crate::path::TileRange;
use crate::path::groups::{Done, Groups, code_bytes};
use crate::scheme::{Arith, Mapping, Range};
use crate::values::{FloatType, Values};

/// Quantizes groups; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "neon")]
pub(super) fn groups(run: &mut Groups<'_>) -> Done {
    match run.values.dtype() {
        FloatType::F32 => by_bits::<F32>(run),
        FloatType::Bf16 => by_bits::<BF16>(run),
        FloatType::F16 => by_bits::<F16>(run),
        FloatType::F64 => Done::default(),
    }
}

/// The range of values; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "neon")]
pub(super) fn range_of(values: Values<'_>) -> TileRange {
    let (from, len) = (values.as_ptr(), values.len());
    // SAFETY: `Values` are readable for their length.
    let range = unsafe {
        match values.dtype() {
            FloatType::F32 => range::<F32, false>(from, len),
            FloatType::Bf16 => range::<BF16, false>(from, len),
            FloatType::F16 => range::<F16, false>(from, len),
            FloatType::F64 => None,
        }
    };
    TileRange { range: range.unwrap_or_default(), finite: range.is_some() }
}

#[target_feature(enable = "neon")]
fn by_bits<const D: u8>(run: &mut Groups<'_>) -> Done {
    match (run.stored, run.given) {
        (8, false) => own::<D, 8>(run),
        (4, false) => own::<D, 4>(run),
        (_, false) => own::<D, 2>(run),
        (8, true) => given::<D, 8>(run),
        (4, true) => given::<D, 4>(run),
        (_, true) => given::<D, 2>(run),
    }
}

/// Groups that get parameters of their own.
#[target_feature(enable = "neon")]
fn own<const D: u8, const STORED: usize>(run: &mut Groups<'_>) -> Done {
    let rule = run.affine.rule();
    let symmetric = run.affine.mapping == Mapping::Symmetric;
    // A scale of the group's own leaves nothing to clip in -127..=127: |x / s| < 127.5.
    let exact = STORED == 8 && symmetric && run.affine.qmin == -127;
    let mut clamp = Clamp::new(run.affine.qmin, run.affine.qmax);
    let mut done = Done::default();
    for group in 0..run.scales.len() {
        // SAFETY: `Groups` promises `len` readable values for each of its groups.
        let range = unsafe {
            let from = run.values.as_ptr().add(group * run.len * size(D));
            if symmetric { range::<D, true>(from, run.len) } else { range::<D, false>(from, run.len) }
        };
        let Some((scale, zero_point, degenerate)) = range.and_then(|range| rule.params(range)) else { break };
        (run.scales[group], run.zero_points[group]) = (scale, zero_point);
        done.degenerate += u64::from(degenerate);
        if exact {
            encode::<D, STORED, false, true>(run, group, &mut clamp);
        } else {
            encode::<D, STORED, false, false>(run, group, &mut clamp);
        }
        done.groups += 1;
    }
    done.clipped = clamp.clipped();
    done
}

/// Groups whose parameters are given.
#[target_feature(enable = "neon")]
fn given<const D: u8, const STORED: usize>(run: &mut Groups<'_>) -> Done {
    let mut clamp = Clamp::new(run.affine.qmin, run.affine.qmax);
    let mut done = Done::default();
    while done.groups < run.scales.len() && encode::<D, STORED, true, false>(run, done.groups, &mut clamp) {
        done.groups += 1;
        done.clipped = clamp.clipped();
    }
    done
}

/// Codes of one group; whether its values are finite, where its parameters are given.
#[inline]
#[target_feature(enable = "neon")]
fn encode<const D: u8, const STORED: usize, const GIVEN: bool, const EXACT: bool>(
    run: &mut Groups<'_>,
    group: usize,
    clamp: &mut Clamp,
) -> bool {
    let (len, stride) = (run.len, code_bytes(run.len, run.stored));
    let divisor = Divisor::new(run.scales[group], run.affine.arith == Arith::Recip);
    let zero = vdupq_n_s16(run.zero_points[group] as i16);
    let out = run.codes[group * stride..][..stride].as_mut_ptr();
    let mut top = vdupq_n_f32(0.0);
    let mut at = 0;
    // SAFETY: `Groups` promises `len` readable values for each of its groups, and `out` has room for their codes.
    unsafe {
        let from = run.values.as_ptr().add(group * len * size(D));
        while at < len {
            let place = from.add(at * size(D));
            let whole = at + BLOCK <= len;
            let x = if whole { load::<D>(place) } else { load_part::<D>(place, len - at) };
            if GIVEN {
                top = top_of(top, x);
            }
            let wholes = divisor.wholes(x);
            let codes = if EXACT { plain(wholes) } else { clamp.codes(wholes, zero) };
            let place = out.add(at * STORED / 8);
            if whole {
                store::<STORED>(codes, place);
            } else {
                store_part::<STORED>(codes, len - at, place);
            }
            at += BLOCK;
        }
    }
    !GIVEN || finite(top)
}

/// `None` where a value is not finite.
///
/// # Safety
/// `from` is readable for `len` values.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn range<const D: u8, const SYMMETRIC: bool>(from: *const u8, len: usize) -> Option<Range> {
    let mut min = [vdupq_n_f32(0.0); 4];
    let mut max = [vdupq_n_f32(0.0); 4];
    let mut at = 0;
    while at < len {
        // SAFETY: the block, or what is left of it, lies inside the `len` values.
        let x = unsafe {
            if at + BLOCK <= len {
                load::<D>(from.add(at * size(D)))
            } else if len >= BLOCK {
                // Seeing a value twice changes nothing.
                load::<D>(from.add((len - BLOCK) * size(D)))
            } else {
                load_part::<D>(from, len)
            }
        };
        for i in 0..4 {
            // Both keep a NaN that they meet.
            if SYMMETRIC {
                max[i] = vmaxq_f32(max[i], vmaxq_f32(vabsq_f32(x[2 * i]), vabsq_f32(x[2 * i + 1])));
            } else {
                min[i] = vminq_f32(min[i], vminq_f32(x[2 * i], x[2 * i + 1]));
                max[i] = vmaxq_f32(max[i], vmaxq_f32(x[2 * i], x[2 * i + 1]));
            }
        }
        at += BLOCK;
    }
    let min = vminvq_f32(vminq_f32(vminq_f32(min[0], min[1]), vminq_f32(min[2], min[3])));
    let max = vmaxvq_f32(vmaxq_f32(vmaxq_f32(max[0], max[1]), vmaxq_f32(max[2], max[3])));
    // Whatever is not finite shows at one end or the other. Merging leaves -0 out.
    let mut range = Range::EMPTY;
    range.merge(Range { min, max });
    (min > f32::NEG_INFINITY && max < f32::INFINITY).then_some(range)
}
