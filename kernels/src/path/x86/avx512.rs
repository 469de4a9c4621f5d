//! AVX-512 by hand: groups of f32 from unaligned source to packed codes, without a tile between.
//!
//! A group is read twice, for its range and for its codes, the second time from the first cache level. Where another
//! process writes in between, the codes are any codes: conversions saturate and results are clamped or masked, so
//! nothing else can come of it.

use std::arch::x86_64::*;

use crate::path::groups::{Done, Groups};
use crate::scheme::{Arith, Mapping, Range};

/// Quantizes groups; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn groups(run: &mut Groups<'_>) -> Done {
    match (run.affine.mapping, run.affine.arith) {
        (Mapping::Symmetric, Arith::Div) => by_bits::<true, false>(run),
        (Mapping::Symmetric, Arith::Recip) => by_bits::<true, true>(run),
        (Mapping::Asymmetric, Arith::Div) => by_bits::<false, false>(run),
        (Mapping::Asymmetric, Arith::Recip) => by_bits::<false, true>(run),
    }
}

#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
fn by_bits<const SYMMETRIC: bool, const RECIP: bool>(run: &mut Groups<'_>) -> Done {
    match run.affine.bits {
        8 => each::<8, SYMMETRIC, RECIP>(run),
        4 => each::<4, SYMMETRIC, RECIP>(run),
        _ => each::<2, SYMMETRIC, RECIP>(run),
    }
}

#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
fn each<const BITS: usize, const SYMMETRIC: bool, const RECIP: bool>(run: &mut Groups<'_>) -> Done {
    let rule = run.affine.rule();
    let len = run.len;
    let stream = run.stream && (run.codes.as_ptr() as usize).is_multiple_of(64) && len.is_multiple_of(64);
    let mut done = Done::default();
    let params = run.scales.iter_mut().zip(run.zero_points.iter_mut());
    for (codes, (scale, zero_point)) in run.codes.chunks_exact_mut(len * BITS / 8).zip(params) {
        // SAFETY: `Groups` promises `len` readable values for each of its groups, and `codes` has room for theirs.
        unsafe {
            let from = run.values.add(done.groups * len);
            let Some(range) = range::<SYMMETRIC>(from, len) else { break };
            let Some((s, z, degenerate)) = rule.params(range) else { break };
            (*scale, *zero_point) = (s, z);
            done.degenerate += u64::from(degenerate);
            let mut lane = Lanes::<BITS, SYMMETRIC, RECIP>::new(s, z, rule.qmin as i32, rule.qmax as i32);
            let out = codes.as_mut_ptr();
            let mut at = 0;
            while at + 64 <= len {
                lane.store64(from.add(at), out.add(at * BITS / 8), stream);
                at += 64;
            }
            if at < len {
                lane.store32(from.add(at), out.add(at * BITS / 8));
            }
            done.clipped += lane.clipped();
        }
        done.groups += 1;
    }
    if stream {
        // Streaming stores are not ordered with whatever tells others that the codes are there.
        _mm_sfence();
    }
    done
}

/// `None` where a value is not finite.
///
/// # Safety
/// `from` is readable for `len` values.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn range<const SYMMETRIC: bool>(from: *const f32, len: usize) -> Option<Range> {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let mut top = [_mm512_setzero_si512(); 4];
    let mut min = [_mm512_setzero_ps(); 4];
    let mut max = [_mm512_setzero_ps(); 4];
    let mut at = 0;
    while at < len {
        // Two vectors a round where only half a block is left.
        let vectors = if at + 64 <= len { 4 } else { 2 };
        for i in 0..vectors {
            // SAFETY: `len` is a multiple of 32, so these 16 values lie in it; a prefetch never faults.
            let x = unsafe {
                let line = from.add(at + 16 * i);
                _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(4096));
                _mm512_loadu_ps(line)
            };
            top[i] = _mm512_max_epu32(top[i], _mm512_and_si512(_mm512_castps_si512(x), magnitude));
            if !SYMMETRIC {
                min[i] = _mm512_min_ps(x, min[i]);
                max[i] = _mm512_max_ps(x, max[i]);
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

/// One group's parameters, spread over the lanes.
struct Lanes<const BITS: usize, const SYMMETRIC: bool, const RECIP: bool> {
    /// The scale, or its reciprocal.
    scale: __m512,
    lo: __m512i,
    hi: __m512i,
    zero_point: __m512i,
    clipped: __m512i,
}

impl<const BITS: usize, const SYMMETRIC: bool, const RECIP: bool> Lanes<BITS, SYMMETRIC, RECIP> {
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
    fn new(scale: f32, zero_point: i32, qmin: i32, qmax: i32) -> Self {
        let (lo, hi) = (qmin - zero_point, qmax - zero_point);
        Self {
            scale: _mm512_set1_ps(if RECIP { 1.0 / scale } else { scale }),
            lo: _mm512_set1_epi32(lo),
            hi: _mm512_set1_epi32(hi),
            zero_point: _mm512_set1_epi32(zero_point),
            clipped: _mm512_setzero_si512(),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
    fn clipped(&self) -> u64 {
        if BITS == 8 && SYMMETRIC { 0 } else { _mm512_reduce_add_epi32(self.clipped) as u64 }
    }

    /// Sixteen codes, rounded by the conversion itself (to nearest, ties to even).
    ///
    /// # Safety
    /// `from` is readable for 16 values.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn codes(&mut self, from: *const f32) -> __m512i {
        // SAFETY: by contract.
        let x = unsafe { _mm512_loadu_ps(from) };
        let v = if RECIP { _mm512_mul_ps(x, self.scale) } else { _mm512_div_ps(x, self.scale) };
        if BITS == 8 && SYMMETRIC {
            // A scale of the group's own leaves nothing to clip: |x / s| < 127.5.
            return _mm512_cvtps_epi32(v);
        }
        // Quotients by a scale of the group's own lie next to the bounds, far from where conversion fails.
        let whole = _mm512_cvtps_epi32(v);
        let code = _mm512_max_epi32(_mm512_min_epi32(whole, self.hi), self.lo);
        let moved = _mm512_cmpneq_epi32_mask(whole, code);
        self.clipped = _mm512_mask_sub_epi32(self.clipped, moved, self.clipped, _mm512_set1_epi32(-1));
        if SYMMETRIC { code } else { _mm512_add_epi32(code, self.zero_point) }
    }

    /// # Safety
    /// `from` is readable for 64 values, `out` writeable for their codes, and aligned to these where `stream`.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn store64(&mut self, from: *const f32, out: *mut u8, stream: bool) {
        // SAFETY: by contract.
        unsafe {
            let a = self.codes(from);
            let b = self.codes(from.add(16));
            let c = self.codes(from.add(32));
            let d = self.codes(from.add(48));
            let (ab, cd) = (_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
            let bytes = if BITS == 8 && !SYMMETRIC {
                // Signed or not: the low byte is the code.
                let low = _mm512_set1_epi16(0xff);
                _mm512_packus_epi16(_mm512_and_si512(ab, low), _mm512_and_si512(cd, low))
            } else {
                _mm512_packs_epi16(ab, cd)
            };
            // The packs work inside 128-bit lanes: lane l holds dword l of a, b, c and d.
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let bytes = _mm512_permutexvar_epi32(order, bytes);
            match BITS {
                8 if stream => _mm512_stream_si512(out.cast(), bytes),
                8 => _mm512_storeu_si512(out.cast(), bytes),
                4 => {
                    let pairs = _mm512_maddubs_epi16(
                        _mm512_and_si512(bytes, _mm512_set1_epi8(15)),
                        _mm512_set1_epi16(0x1001),
                    );
                    let packed = _mm512_cvtepi16_epi8(pairs);
                    if stream {
                        _mm256_stream_si256(out.cast(), packed);
                    } else {
                        _mm256_storeu_si256(out.cast(), packed);
                    }
                }
                _ => {
                    let pairs = _mm512_maddubs_epi16(
                        _mm512_and_si512(bytes, _mm512_set1_epi8(3)),
                        _mm512_set1_epi16(0x0401),
                    );
                    let quads = _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x0010_0001));
                    let packed = _mm512_cvtepi32_epi8(quads);
                    if stream {
                        _mm_stream_si128(out.cast(), packed);
                    } else {
                        _mm_storeu_si128(out.cast(), packed);
                    }
                }
            }
        }
    }

    /// # Safety
    /// `from` is readable for 32 values, `out` writeable for their codes.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn store32(&mut self, from: *const f32, out: *mut u8) {
        // SAFETY: by contract.
        unsafe {
            let a = _mm512_cvtepi32_epi8(self.codes(from));
            let b = _mm512_cvtepi32_epi8(self.codes(from.add(16)));
            let bytes = _mm256_set_m128i(b, a);
            match BITS {
                8 => _mm256_storeu_si256(out.cast(), bytes),
                4 => {
                    let pairs = _mm256_maddubs_epi16(
                        _mm256_and_si256(bytes, _mm256_set1_epi8(15)),
                        _mm256_set1_epi16(0x1001),
                    );
                    _mm_storeu_si128(out.cast(), _mm256_cvtepi16_epi8(pairs));
                }
                _ => {
                    let pairs = _mm256_maddubs_epi16(
                        _mm256_and_si256(bytes, _mm256_set1_epi8(3)),
                        _mm256_set1_epi16(0x0401),
                    );
                    let quads = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x0010_0001));
                    _mm_storel_epi64(out.cast(), _mm256_cvtepi32_epi8(quads));
                }
            }
        }
    }
}
