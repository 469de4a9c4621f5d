//! Rows whose every column has parameters of its own.

use std::arch::x86_64::*;
use std::ptr::copy_nonoverlapping;

use super::lanes::{
    BF16, Clamp, F16, F32, finite, load, load_block, load32, prefetch, size, store, store_part, top_of, whole,
};
use crate::path::groups::{Columns, Widen};
use crate::scheme::Arith;
use crate::values::FloatType;

/// Encodes a part of a row; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) fn columns(run: &mut Columns<'_>) -> Option<u64> {
    match run.values.dtype() {
        FloatType::F32 => by_bits::<F32>(run),
        FloatType::Bf16 => by_bits::<BF16>(run),
        FloatType::F16 => by_bits::<F16>(run),
        FloatType::F64 => None,
    }
}

#[target_feature(enable = "avx2,f16c,popcnt")]
fn by_bits<const D: u8>(run: &mut Columns<'_>) -> Option<u64> {
    match run.stored {
        8 => encode::<D, 8>(run),
        4 => encode::<D, 4>(run),
        _ => encode::<D, 2>(run),
    }
}

#[target_feature(enable = "avx2,f16c,popcnt")]
fn encode<const D: u8, const STORED: usize>(run: &mut Columns<'_>) -> Option<u64> {
    let recip = run.affine.arith == Arith::Recip;
    let n = run.factors.len();
    let stream = run.stream && (run.codes.as_ptr() as usize).is_multiple_of(4 * STORED);
    let none = _mm256_setzero_si256();
    let mut clamp = Clamp::new(run.affine.qmin, run.affine.qmax);
    let mut top = _mm256_setzero_si256();
    let out = run.codes.as_mut_ptr();
    let (factors, zeros) = (run.factors.as_ptr().cast::<u8>(), run.zero_points.as_ptr());
    let mut at = 0;
    // SAFETY: values, factors and zero points are `n` each, and `codes` has room for their codes.
    unsafe {
        while at + 32 <= n {
            let place = run.values.as_ptr().add(at * size(D));
            prefetch::<D>(place);
            let x = load32::<D>(place);
            let factor = load32::<F32>(factors.add(4 * at));
            let mut codes = [none; 4];
            for i in 0..4 {
                top = top_of(top, x[i]);
                codes[i] = code(x[i], factor[i], recip, _mm256_loadu_si256(zeros.add(at + 8 * i).cast()));
            }
            store::<STORED>(clamp.codes::<STORED>(codes, [none; 2]), out.add(at * STORED / 8), stream);
            at += 32;
        }
        if at < n {
            let x = load_block::<D>(run.values.as_ptr().add(at * size(D)), n - at);
            let factor = load_block::<F32>(factors.add(4 * at), n - at);
            let zero = load_block::<F32>(zeros.add(at).cast(), n - at);
            let mut codes = [none; 4];
            for i in 0..4 {
                top = top_of(top, x[i]);
                // Where no column is, the factor is 0, and so be the code: it lies inside all bounds.
                let used = _mm256_cmp_ps::<_CMP_NEQ_OQ>(factor[i], _mm256_setzero_ps());
                let code = code(x[i], factor[i], recip, _mm256_castps_si256(zero[i]));
                codes[i] = _mm256_and_si256(code, _mm256_castps_si256(used));
            }
            store_part::<STORED>(clamp.codes::<STORED>(codes, [none; 2]), n - at, out.add(at * STORED / 8));
        }
    }
    if stream {
        // Streaming stores are not ordered with whatever tells others that the codes are there.
        _mm_sfence();
    }
    finite(top).then_some(clamp.clipped)
}

/// Eight codes, not clamped. Quotients are kept where adding a zero point cannot wrap.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
fn code(x: __m256, factor: __m256, recip: bool, zero: __m256i) -> __m256i {
    let v = if recip { _mm256_mul_ps(x, factor) } else { _mm256_div_ps(x, factor) };
    _mm256_add_epi32(whole(_mm256_max_ps(v, _mm256_set1_ps(-1e9))), zero)
}

/// Widens the ranges of columns; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) fn widen(run: &mut Widen<'_>) -> bool {
    match run.values.dtype() {
        FloatType::F32 => merge::<F32>(run),
        FloatType::Bf16 => merge::<BF16>(run),
        FloatType::F16 => merge::<F16>(run),
        FloatType::F64 => false,
    }
}

#[target_feature(enable = "avx2,f16c,popcnt")]
fn merge<const D: u8>(run: &mut Widen<'_>) -> bool {
    let n = run.min.len().min(run.max.len());
    let (min, max) = (run.min.as_mut_ptr(), run.max.as_mut_ptr());
    // SAFETY: values and both ends of the ranges are `n` each.
    unsafe {
        let mut top = _mm256_setzero_si256();
        for at in (0..n).step_by(32) {
            let place = run.values.as_ptr().add(at * size(D));
            prefetch::<D>(place);
            let x = if at + 32 <= n { load32::<D>(place) } else { load_block::<D>(place, n - at) };
            top = top_of(top_of(top_of(top_of(top, x[0]), x[1]), x[2]), x[3]);
        }
        if !finite(top) {
            return false;
        }
        let mut at = 0;
        while at + 8 <= n {
            let x = load::<D>(run.values.as_ptr().add(at * size(D)));
            _mm256_storeu_ps(min.add(at), _mm256_min_ps(x, _mm256_loadu_ps(min.add(at))));
            _mm256_storeu_ps(max.add(at), _mm256_max_ps(x, _mm256_loadu_ps(max.add(at))));
            at += 8;
        }
        if at < n {
            let (left, bytes) = (n - at, 4 * (n - at));
            let x = load_block::<D>(run.values.as_ptr().add(at * size(D)), left)[0];
            let less = _mm256_min_ps(x, load_block::<F32>(min.add(at).cast(), left)[0]);
            let more = _mm256_max_ps(x, load_block::<F32>(max.add(at).cast(), left)[0]);
            let ends = [less, more];
            copy_nonoverlapping(ends.as_ptr().cast::<u8>(), min.add(at).cast(), bytes);
            copy_nonoverlapping(ends.as_ptr().add(1).cast::<u8>(), max.add(at).cast(), bytes);
        }
    }
    true
}
