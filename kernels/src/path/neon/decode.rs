//! Values of codes, straight to where they belong.

use std::arch::aarch64::*;

use super::lanes::{BLOCK, Codes, Floats};
use crate::path::groups::{Coded, code_bytes};

/// Decodes groups; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "neon")]
pub(super) fn decode(run: &mut Coded<'_>) {
    match (run.stored, run.signed) {
        (8, false) => each::<8, false>(run),
        (8, true) => each::<8, true>(run),
        (_, false) => each::<4, false>(run),
        (_, true) => each::<4, true>(run),
    }
}

#[target_feature(enable = "neon")]
fn each<const STORED: usize, const SIGNED: bool>(run: &mut Coded<'_>) {
    let len = run.len;
    let params = run.scales.iter().zip(run.zero_points);
    let codes = run.codes.chunks(code_bytes(len, run.stored).max(1));
    for ((codes, out), (&scale, &zero_point)) in codes.zip(run.out.chunks_exact_mut(len.max(1))).zip(params) {
        let (factor, zero) = (vdupq_n_f32(scale), vdupq_n_s32(zero_point));
        let value =
            |codes| widened::<SIGNED>(codes).map(|q| vmulq_f32(vcvtq_f32_s32(vsubq_s32(q, zero)), factor));
        let mut at = 0;
        while at + BLOCK <= len {
            // SAFETY: codes and output of a whole block lie inside those of the group.
            unsafe {
                let codes = load::<STORED, SIGNED>(codes.as_ptr().add(at * STORED / 8));
                store(value(codes), out.as_mut_ptr().add(at));
            }
            at += BLOCK;
        }
        if at < len {
            let (mut last, mut values) = ([0u8; BLOCK], [0f32; BLOCK]);
            let left = &codes[at * STORED / 8..];
            last[..left.len()].copy_from_slice(left);
            // SAFETY: a block of either has room in its array.
            unsafe { store(value(load::<STORED, SIGNED>(last.as_ptr())), values.as_mut_ptr()) };
            out[at..].copy_from_slice(&values[..len - at]);
        }
    }
}

/// A block of codes, one a byte, sign-extended where `SIGNED`.
///
/// # Safety
/// `from` is readable for them.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load<const STORED: usize, const SIGNED: bool>(from: *const u8) -> Codes {
    // SAFETY: by contract.
    unsafe {
        if STORED == 8 {
            return [vld1q_u8(from), vld1q_u8(from.add(16))];
        }
        let pairs = vld1q_u8(from);
        let (even, odd) = (vandq_u8(pairs, vdupq_n_u8(15)), vshrq_n_u8::<4>(pairs));
        let codes = [vzip1q_u8(even, odd), vzip2q_u8(even, odd)];
        if !SIGNED {
            return codes;
        }
        // Two's complement by flipping the sign bit and taking it off again.
        let sign = vdupq_n_u8(8);
        codes.map(|codes| vsubq_u8(veorq_u8(codes, sign), sign))
    }
}

/// Codes as numbers.
#[inline]
#[target_feature(enable = "neon")]
fn widened<const SIGNED: bool>([a, b]: Codes) -> [int32x4_t; 8] {
    let eight = |codes: uint8x8_t| {
        if SIGNED { vmovl_s8(vreinterpret_s8_u8(codes)) } else { vreinterpretq_s16_u16(vmovl_u8(codes)) }
    };
    let [a, b, c, d] = [vget_low_u8(a), vget_high_u8(a), vget_low_u8(b), vget_high_u8(b)].map(eight);
    let (low, high) = (|q| vmovl_s16(vget_low_s16(q)), |q| vmovl_high_s16(q));
    [low(a), high(a), low(b), high(b), low(c), high(c), low(d), high(d)]
}

/// # Safety
/// `out` is writeable for a block.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store(values: Floats, out: *mut f32) {
    for (i, values) in values.into_iter().enumerate() {
        // SAFETY: by contract.
        unsafe { vst1q_f32(out.add(4 * i), values) };
    }
}
