//! Rows whose every column has parameters of its own.

use std::arch::aarch64::*;
use std::array::from_fn;

use super::lanes::{BF16, BLOCK, Clamp, F16, F32, finite, load, load_part, size, store, store_part, top_of};
use crate::path::groups::{Columns, Widen};
use crate::path::portable::merge_columns;
use crate::scheme::Arith;
use crate::values::FloatType;

/// Encodes a part of a row; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "neon")]
pub(super) fn columns(run: &mut Columns<'_>) -> Option<u64> {
    match run.values.dtype() {
        FloatType::F32 => by_bits::<F32>(run),
        FloatType::Bf16 => by_bits::<BF16>(run),
        FloatType::F16 => by_bits::<F16>(run),
        FloatType::F64 => None,
    }
}

#[target_feature(enable = "neon")]
fn by_bits<const D: u8>(run: &mut Columns<'_>) -> Option<u64> {
    match run.stored {
        8 => encode::<D, 8>(run),
        4 => encode::<D, 4>(run),
        _ => encode::<D, 2>(run),
    }
}

#[target_feature(enable = "neon")]
fn encode<const D: u8, const STORED: usize>(run: &mut Columns<'_>) -> Option<u64> {
    let recip = run.affine.arith == Arith::Recip;
    let n = run.factors.len();
    let mut clamp = Clamp::new(run.affine.qmin, run.affine.qmax);
    let mut top = vdupq_n_f32(0.0);
    let out = run.codes.as_mut_ptr();
    let (factors, zeros) = (run.factors.as_ptr().cast::<u8>(), run.zero_points.as_ptr().cast::<u8>());
    for at in (0..n).step_by(BLOCK) {
        let (whole, left) = (at + BLOCK <= n, n - at);
        // SAFETY: values, factors and zero points are `n` each, and `codes` has room for their codes.
        unsafe {
            let place = run.values.as_ptr().add(at * size(D));
            // Where no column is, 0 / 0 is converted to 0, which lies inside all bounds.
            let (x, factor, zero) = if whole {
                (load::<D>(place), load::<F32>(factors.add(4 * at)), load::<F32>(zeros.add(4 * at)))
            } else {
                (
                    load_part::<D>(place, left),
                    load_part::<F32>(factors.add(4 * at), left),
                    load_part::<F32>(zeros.add(4 * at), left),
                )
            };
            top = top_of(top, x);
            let wholes = from_fn(|i| {
                let quotient = if recip { vmulq_f32(x[i], factor[i]) } else { vdivq_f32(x[i], factor[i]) };
                vqaddq_s32(vcvtnq_s32_f32(quotient), vreinterpretq_s32_f32(zero[i]))
            });
            let codes = clamp.codes(wholes, vdupq_n_s16(0));
            let place = out.add(at * STORED / 8);
            if whole {
                store::<STORED>(codes, place);
            } else {
                store_part::<STORED>(codes, left, place);
            }
        }
    }
    finite(top).then_some(clamp.clipped())
}

/// Widens the ranges of columns; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "neon")]
pub(super) fn widen(run: &mut Widen<'_>) -> bool {
    match run.values.dtype() {
        FloatType::F32 => merge::<F32>(run),
        FloatType::Bf16 => merge::<BF16>(run),
        FloatType::F16 => merge::<F16>(run),
        FloatType::F64 => false,
    }
}

#[target_feature(enable = "neon")]
fn merge<const D: u8>(run: &mut Widen<'_>) -> bool {
    let n = run.min.len().min(run.max.len());
    let block = |at: usize| {
        // SAFETY: values are at least `n`.
        unsafe {
            let place = run.values.as_ptr().add(at * size(D));
            if at + BLOCK <= n { load::<D>(place) } else { load_part::<D>(place, n - at) }
        }
    };
    let mut top = vdupq_n_f32(0.0);
    for at in (0..n).step_by(BLOCK) {
        top = top_of(top, block(at));
    }
    if !finite(top) {
        return false;
    }
    for at in (0..n).step_by(BLOCK) {
        let x = block(at);
        let (min, max) = (&mut run.min[at..n.min(at + BLOCK)], &mut run.max[at..n.min(at + BLOCK)]);
        let ((min, min_rest), (max, max_rest)) = (min.as_chunks_mut::<4>(), max.as_chunks_mut::<4>());
        let mut last = [0.0; 4];
        // SAFETY: four values each have room there.
        unsafe {
            if !min_rest.is_empty() {
                vst1q_f32(last.as_mut_ptr(), x[min.len()]);
            }
            for ((min, max), x) in min.iter_mut().zip(max).zip(x) {
                vst1q_f32(min.as_mut_ptr(), vminq_f32(vld1q_f32(min.as_ptr()), x));
                vst1q_f32(max.as_mut_ptr(), vmaxq_f32(vld1q_f32(max.as_ptr()), x));
            }
        }
        merge_columns(&last, min_rest, max_rest);
    }
    true
}
