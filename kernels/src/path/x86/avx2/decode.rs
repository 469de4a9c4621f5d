//! Values of codes, straight to where they belong.

use std::arch::x86_64::*;

use crate::path::groups::{Coded, code_bytes};

/// Codes taken at once.
const BLOCK: usize = 32;

/// Decodes groups; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) fn decode(run: &mut Coded<'_>) {
    match (run.stored, run.signed) {
        (8, false) => each::<8, false>(run),
        (8, true) => each::<8, true>(run),
        (_, false) => each::<4, false>(run),
        (_, true) => each::<4, true>(run),
    }
}

#[target_feature(enable = "avx2,f16c,popcnt")]
fn each<const STORED: usize, const SIGNED: bool>(run: &mut Coded<'_>) {
    let len = run.len;
    let stream = run.stream && (run.out.as_ptr() as usize).is_multiple_of(16) && len.is_multiple_of(4);
    let params = run.scales.iter().zip(run.zero_points);
    let codes = run.codes.chunks(code_bytes(len, run.stored).max(1));
    for ((codes, out), (&scale, &zero_point)) in codes.zip(run.out.chunks_exact_mut(len.max(1))).zip(params) {
        let (factor, zero) = (_mm256_set1_ps(scale), _mm256_set1_epi32(zero_point));
        let mut at = 0;
        while at + BLOCK <= len {
            // SAFETY: codes and output of a whole block lie inside those of the group.
            unsafe {
                let codes = block::<STORED>(codes.as_ptr().add(at * STORED / 8));
                let values = codes.map(|codes| widen::<STORED, SIGNED>(codes, zero, factor));
                store(values, out.as_mut_ptr().add(at), stream);
            }
            at += BLOCK;
        }
        for (i, out) in out.iter_mut().enumerate().skip(at) {
            let byte = codes[i * STORED / 8];
            let q = if STORED == 8 { byte } else { (byte >> (i % 2 * 4)) & 15 };
            let q = match (STORED, SIGNED) {
                (8, true) => i32::from(q as i8),
                (4, true) => (i32::from(q) ^ 8) - 8,
                _ => i32::from(q),
            };
            *out = q.wrapping_sub(zero_point) as f32 * scale;
        }
    }
    if stream {
        // Streaming stores are not ordered with whatever tells others that the values are there.
        _mm_sfence();
    }
}

/// 32 codes, one a byte, eight in the lower half of each. Four bits are not yet extended.
///
/// # Safety
/// `from` is readable for them.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
unsafe fn block<const STORED: usize>(from: *const u8) -> [__m128i; 4] {
    // SAFETY: by contract.
    unsafe {
        if STORED == 8 {
            let eight = |i: usize| _mm_loadl_epi64(from.add(8 * i).cast());
            return [eight(0), eight(1), eight(2), eight(3)];
        }
        let (codes, low) = (_mm_loadu_si128(from.cast()), _mm_set1_epi8(15));
        let (even, odd) = (_mm_and_si128(codes, low), _mm_and_si128(_mm_srli_epi16::<4>(codes), low));
        let (first, last) = (_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd));
        [first, _mm_unpackhi_epi64(first, first), last, _mm_unpackhi_epi64(last, last)]
    }
}

/// The values of the lower eight codes.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
fn widen<const STORED: usize, const SIGNED: bool>(codes: __m128i, zero: __m256i, factor: __m256) -> __m256 {
    let q = match (STORED, SIGNED) {
        (_, false) => _mm256_cvtepu8_epi32(codes),
        (8, true) => _mm256_cvtepi8_epi32(codes),
        (_, true) => {
            // Two's complement by flipping the sign bit and taking it off again.
            let sign = _mm_set1_epi8(8);
            _mm256_cvtepi8_epi32(_mm_sub_epi8(_mm_xor_si128(codes, sign), sign))
        }
    };
    _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(q, zero)), factor)
}

/// # Safety
/// `out` is writeable for 32 values, and aligned to 16 bytes where `stream`.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
unsafe fn store(values: [__m256; 4], out: *mut f32, stream: bool) {
    // SAFETY: by contract.
    unsafe {
        if stream {
            // Allocations lie on 16 bytes, not all of them on 32; the parts of a line come together again.
            for (i, values) in values.into_iter().enumerate() {
                _mm_stream_ps(out.add(8 * i), _mm256_castps256_ps128(values));
                _mm_stream_ps(out.add(8 * i + 4), _mm256_extractf128_ps::<1>(values));
            }
        } else {
            for (i, values) in values.into_iter().enumerate() {
                _mm256_storeu_ps(out.add(8 * i), values);
            }
        }
    }
}
