//! Groups with parameters of their own, or given ones.
//!
//! A group that gets its own is read twice, for its range and for its codes, the second time from a near cache.

use std::arch::x86_64::*;

use super::lanes::{
    BF16, Clamp, F16, F32, finite, load_block, load64, prefetch, size, store, store_part, top_of, whole,
};
use crate::path::TileRange;
use crate::path::groups::{Done, Groups, code_bytes};
use crate::scheme::{Arith, Mapping, Range};
use crate::values::{FloatType, Values};

/// Quantizes groups; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn groups(run: &mut Groups<'_>) -> Done {
    match run.values.dtype() {
        FloatType::F32 => by_bits::<F32>(run),
        FloatType::Bf16 => by_bits::<BF16>(run),
        FloatType::F16 => by_bits::<F16>(run),
        FloatType::F64 => Done::default(),
    }
}

/// The range of values; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
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

#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn by_bits<const D: u8>(run: &mut Groups<'_>) -> Done {
    match (run.stored, run.given) {
        (8, false) => each::<D, 8, false>(run),
        (4, false) => each::<D, 4, false>(run),
        (_, false) => each::<D, 2, false>(run),
        (8, true) => each::<D, 8, true>(run),
        (4, true) => each::<D, 4, true>(run),
        (_, true) => each::<D, 2, true>(run),
    }
}

#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn each<const D: u8, const STORED: usize, const GIVEN: bool>(run: &mut Groups<'_>) -> Done {
    let rule = run.affine.rule();
    let symmetric = run.affine.mapping == Mapping::Symmetric;
    let recip = run.affine.arith == Arith::Recip;
    let (len, stride) = (run.len, code_bytes(run.len, run.stored));
    let aligned = (run.codes.as_ptr() as usize | stride).is_multiple_of(8 * STORED);
    let stream = run.stream && aligned;
    let mut clamp = Clamp::new(run.affine.qmin, run.affine.qmax);
    let mut done = Done::default();
    let params = run.scales.iter_mut().zip(run.zero_points.iter_mut());
    for (codes, (scale, zero_point)) in run.codes.chunks_exact_mut(stride).zip(params) {
        // SAFETY: `Groups` promises `len` readable values for each of its groups, and `codes` has room for theirs.
        unsafe {
            let from = run.values.as_ptr().add(done.groups * len * size(D));
            if !GIVEN {
                let range =
                    if symmetric { range::<D, true>(from, len) } else { range::<D, false>(from, len) };
                let Some((s, z, degenerate)) = range.and_then(|range| rule.params(range)) else { break };
                (*scale, *zero_point) = (s, z);
                done.degenerate += u64::from(degenerate);
            }
            let factor = _mm512_set1_ps(if recip { 1.0 / *scale } else { *scale });
            let zero = _mm512_set1_epi16(*zero_point as i16);
            let out = codes.as_mut_ptr();
            let before = clamp.clipped;
            let mut top = _mm512_setzero_si512();
            let mut at = 0;
            while at + 64 <= len {
                let place = from.add(at * size(D));
                let x = load64::<D>(place);
                if GIVEN {
                    prefetch::<D>(place);
                    top = top_of(top_of(top_of(top_of(top, x[0]), x[1]), x[2]), x[3]);
                }
                let bytes = clamp.codes::<STORED>(divided(x, factor, recip), zero);
                store::<STORED>(bytes, out.add(at * STORED / 8), stream);
                at += 64;
            }
            if at < len {
                let x = load_block::<D>(from.add(at * size(D)), len - at);
                if GIVEN {
                    top = top_of(top_of(top_of(top_of(top, x[0]), x[1]), x[2]), x[3]);
                }
                let bytes = if len - at <= 32 {
                    let zeros = _mm512_setzero_si512();
                    let w = halves([x[0], x[1]], factor, recip);
                    clamp.codes::<STORED>([w[0], w[1], zeros, zeros], zero)
                } else {
                    clamp.codes::<STORED>(divided(x, factor, recip), zero)
                };
                store_part::<STORED>(bytes, len - at, out.add(at * STORED / 8));
            }
            if GIVEN && !finite(top) {
                clamp.clipped = before;
                break;
            }
        }
        done.groups += 1;
    }
    done.clipped = clamp.clipped;
    if stream {
        // Streaming stores are not ordered with whatever tells others that the codes are there.
        _mm_sfence();
    }
    done
}

#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn divided(x: [__m512; 4], factor: __m512, recip: bool) -> [__m512i; 4] {
    let ([a, b], [c, d]) = (halves([x[0], x[1]], factor, recip), halves([x[2], x[3]], factor, recip));
    [a, b, c, d]
}

#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn halves([a, b]: [__m512; 2], factor: __m512, recip: bool) -> [__m512i; 2] {
    if recip {
        [whole(_mm512_mul_ps(a, factor)), whole(_mm512_mul_ps(b, factor))]
    } else {
        [whole(_mm512_div_ps(a, factor)), whole(_mm512_div_ps(b, factor))]
    }
}

/// `None` where a value is not finite.
///
/// # Safety
/// `from` is readable for `len` values.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
unsafe fn range<const D: u8, const SYMMETRIC: bool>(from: *const u8, len: usize) -> Option<Range> {
    let mut top = [_mm512_setzero_si512(); 4];
    let mut min = [_mm512_setzero_ps(); 4];
    let mut max = [_mm512_setzero_ps(); 4];
    let mut at = 0;
    while at < len {
        let place = from.wrapping_add(at * size(D));
        prefetch::<D>(place);
        // SAFETY: the block, or what is left of it, lies inside the `len` values.
        let x = unsafe { if at + 64 <= len { load64::<D>(place) } else { load_block::<D>(place, len - at) } };
        for i in 0..4 {
            top[i] = top_of(top[i], x[i]);
            if !SYMMETRIC {
                min[i] = _mm512_min_ps(x[i], min[i]);
                max[i] = _mm512_max_ps(x[i], max[i]);
            }
        }
        at += 64;
    }
    let top = _mm512_max_epu32(_mm512_max_epu32(top[0], top[1]), _mm512_max_epu32(top[2], top[3]));
    let top = _mm512_reduce_max_epu32(top);
    if top >= 0x7f80_0000 {
        return None;
    }
    if SYMMETRIC {
        return Some(Range { min: 0.0, max: f32::from_bits(top) });
    }
    let min = _mm512_min_ps(_mm512_min_ps(min[0], min[1]), _mm512_min_ps(min[2], min[3]));
    let max = _mm512_max_ps(_mm512_max_ps(max[0], max[1]), _mm512_max_ps(max[2], max[3]));
    Some(Range { min: _mm512_reduce_min_ps(min), max: _mm512_reduce_max_ps(max) })
}
