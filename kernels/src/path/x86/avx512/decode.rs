//! Values of codes, straight to where they belong.

use std::arch::x86_64::*;

use crate::path::groups::{Coded, code_bytes};

/// Codes taken at once.
const BLOCK: usize = 32;

/// Decodes groups; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn decode(run: &mut Coded<'_>) {
    match (run.stored, run.signed) {
        (8, false) => each::<8, false>(run),
        (8, true) => each::<8, true>(run),
        (_, false) => each::<4, false>(run),
        (_, true) => each::<4, true>(run),
    }
}

#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn each<const STORED: usize, const SIGNED: bool>(run: &mut Coded<'_>) {
    let len = run.len;
    let stream = run.stream && (run.out.as_ptr() as usize).is_multiple_of(16) && len.is_multiple_of(4);
    let params = run.scales.iter().zip(run.zero_points);
    let codes = run.codes.chunks(code_bytes(len, run.stored).max(1));
    for ((codes, out), (&scale, &zero_point)) in codes.zip(run.out.chunks_exact_mut(len.max(1))).zip(params) {
        let (factor, zero) = (_mm512_set1_ps(scale), _mm512_set1_epi32(zero_point));
        let mut at = 0;
        while at + BLOCK <= len {
            // SAFETY: codes and output of a whole block lie inside those of the group.
            unsafe {
                let bytes = block::<STORED, SIGNED>(codes.as_ptr().add(at * STORED / 8));
                let out = out.as_mut_ptr().add(at);
                for (i, codes) in bytes.into_iter().enumerate() {
                    store(widen::<SIGNED>(codes, zero, factor), out.add(16 * i), stream);
                }
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

/// 32 codes, one a byte, in two halves.
///
/// # Safety
/// `from` is readable for them.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
unsafe fn block<const STORED: usize, const SIGNED: bool>(from: *const u8) -> [__m128i; 2] {
    // SAFETY: by contract.
    unsafe {
        let first = _mm_loadu_si128(from.cast());
        if STORED == 8 {
            return [first, _mm_loadu_si128(from.add(16).cast())];
        }
        let low = _mm_set1_epi8(15);
        let (even, odd) = (_mm_and_si128(first, low), _mm_and_si128(_mm_srli_epi16::<4>(first), low));
        let codes = [_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)];
        if !SIGNED {
            return codes;
        }
        // Two's complement by flipping the sign bit and taking it off again.
        let sign = _mm_set1_epi8(8);
        codes.map(|codes| _mm_sub_epi8(_mm_xor_si128(codes, sign), sign))
    }
}

/// The values of sixteen codes.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn widen<const SIGNED: bool>(codes: __m128i, zero: __m512i, factor: __m512) -> __m512 {
    let q = if SIGNED { _mm512_cvtepi8_epi32(codes) } else { _mm512_cvtepu8_epi32(codes) };
    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(q, zero)), factor)
}

/// # Safety
/// `out` is writeable for sixteen values, and aligned to 16 bytes where `stream`.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
unsafe fn store(values: __m512, out: *mut f32, stream: bool) {
    // SAFETY: by contract.
    unsafe {
        if stream {
            // Allocations lie on 16 bytes, not all of them on 64; the parts of a line come together again.
            _mm_stream_ps(out, _mm512_castps512_ps128(values));
            _mm_stream_ps(out.add(4), _mm512_extractf32x4_ps::<1>(values));
            _mm_stream_ps(out.add(8), _mm512_extractf32x4_ps::<2>(values));
            _mm_stream_ps(out.add(12), _mm512_extractf32x4_ps::<3>(values));
        } else {
            _mm512_storeu_ps(out, values);
        }
    }
}
