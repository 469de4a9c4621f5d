//! AVX2 by hand: groups of f32 from unaligned source to packed codes, without a tile between.
//!
//! As in the AVX-512 file a group is read twice, and values that change in between can only change codes.

use std::arch::x86_64::*;

use crate::path::groups::{Done, Groups};
use crate::scheme::{Arith, Mapping, Range};

/// Quantizes groups; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2")]
pub(super) fn groups(run: &mut Groups<'_>) -> Done {
    match (run.affine.mapping, run.affine.arith) {
        (Mapping::Symmetric, Arith::Div) => by_bits::<true, false>(run),
        (Mapping::Symmetric, Arith::Recip) => by_bits::<true, true>(run),
        (Mapping::Asymmetric, Arith::Div) => by_bits::<false, false>(run),
        (Mapping::Asymmetric, Arith::Recip) => by_bits::<false, true>(run),
    }
}

#[target_feature(enable = "avx2")]
fn by_bits<const SYMMETRIC: bool, const RECIP: bool>(run: &mut Groups<'_>) -> Done {
    match run.affine.bits {
        8 => each::<8, SYMMETRIC, RECIP>(run),
        4 => each::<4, SYMMETRIC, RECIP>(run),
        _ => each::<2, SYMMETRIC, RECIP>(run),
    }
}

#[target_feature(enable = "avx2")]
fn each<const BITS: usize, const SYMMETRIC: bool, const RECIP: bool>(run: &mut Groups<'_>) -> Done {
    let rule = run.affine.rule();
    let len = run.len;
    let stream = run.stream && (run.codes.as_ptr() as usize).is_multiple_of(32);
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
            while at < len {
                lane.store32(from.add(at), out.add(at * BITS / 8), stream);
                at += 32;
            }
            done.clipped += lane.clipped(len);
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
#[target_feature(enable = "avx2")]
unsafe fn range<const SYMMETRIC: bool>(from: *const f32, len: usize) -> Option<Range> {
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    let mut top = [_mm256_setzero_si256(); 4];
    let mut min = [_mm256_setzero_ps(); 4];
    let mut max = [_mm256_setzero_ps(); 4];
    let mut at = 0;
    while at < len {
        for i in 0..4 {
            // SAFETY: `len` is a multiple of 32, so these 8 values lie in it; a prefetch never faults.
            let x = unsafe {
                let place = from.add(at + 8 * i);
                if i % 2 == 0 {
                    _mm_prefetch::<_MM_HINT_T0>(place.cast::<i8>().wrapping_add(4096));
                }
                _mm256_loadu_ps(place)
            };
            top[i] = _mm256_max_epu32(top[i], _mm256_and_si256(_mm256_castps_si256(x), magnitude));
            if !SYMMETRIC {
                min[i] = _mm256_min_ps(x, min[i]);
                max[i] = _mm256_max_ps(x, max[i]);
            }
        }
        at += 32;
    }
    let top = _mm256_max_epu32(_mm256_max_epu32(top[0], top[1]), _mm256_max_epu32(top[2], top[3]));
    let top = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top));
    let top = _mm_max_epu32(top, _mm_shuffle_epi32::<0b01_00_11_10>(top));
    let top = _mm_max_epu32(top, _mm_shuffle_epi32::<0b10_11_00_01>(top));
    let top = _mm_cvtsi128_si32(top) as u32;
    if top >= 0x7f80_0000 {
        return None;
    }
    if SYMMETRIC {
        return Some(Range { min: 0.0, max: f32::from_bits(top) });
    }
    let min = _mm256_min_ps(_mm256_min_ps(min[0], min[1]), _mm256_min_ps(min[2], min[3]));
    let max = _mm256_max_ps(_mm256_max_ps(max[0], max[1]), _mm256_max_ps(max[2], max[3]));
    let min = _mm_min_ps(_mm256_castps256_ps128(min), _mm256_extractf128_ps::<1>(min));
    let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps::<1>(max));
    let min = _mm_min_ps(min, _mm_movehl_ps(min, min));
    let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
    let min = _mm_min_ss(min, _mm_movehdup_ps(min));
    let max = _mm_max_ss(max, _mm_movehdup_ps(max));
    Some(Range { min: _mm_cvtss_f32(min), max: _mm_cvtss_f32(max) })
}

/// One group's parameters, spread over the lanes.
struct Lanes<const BITS: usize, const SYMMETRIC: bool, const RECIP: bool> {
    /// The scale, or its reciprocal.
    scale: __m256,
    lo: __m256i,
    hi: __m256i,
    zero_point: __m256i,
    /// Minus the number of values that stayed inside the bounds.
    kept: __m256i,
}

impl<const BITS: usize, const SYMMETRIC: bool, const RECIP: bool> Lanes<BITS, SYMMETRIC, RECIP> {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(scale: f32, zero_point: i32, qmin: i32, qmax: i32) -> Self {
        let (lo, hi) = (qmin - zero_point, qmax - zero_point);
        Self {
            scale: _mm256_set1_ps(if RECIP { 1.0 / scale } else { scale }),
            lo: _mm256_set1_epi32(lo),
            hi: _mm256_set1_epi32(hi),
            zero_point: _mm256_set1_epi32(zero_point),
            kept: _mm256_setzero_si256(),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn clipped(&self, len: usize) -> u64 {
        if BITS == 8 && SYMMETRIC {
            return 0;
        }
        let sum = _mm_add_epi32(_mm256_castsi256_si128(self.kept), _mm256_extracti128_si256::<1>(self.kept));
        let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
        let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum));
        (len as i64 + i64::from(_mm_cvtsi128_si32(sum))) as u64
    }

    /// Eight codes, rounded by the conversion itself (to nearest, ties to even).
    ///
    /// # Safety
    /// `from` is readable for 8 values.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn codes(&mut self, from: *const f32) -> __m256i {
        // SAFETY: by contract.
        let x = unsafe { _mm256_loadu_ps(from) };
        let v = if RECIP { _mm256_mul_ps(x, self.scale) } else { _mm256_div_ps(x, self.scale) };
        if BITS == 8 && SYMMETRIC {
            // A scale of the group's own leaves nothing to clip: |x / s| < 127.5.
            return _mm256_cvtps_epi32(v);
        }
        // Quotients by a scale of the group's own lie next to the bounds, far from where conversion fails.
        let whole = _mm256_cvtps_epi32(v);
        let code = _mm256_max_epi32(_mm256_min_epi32(whole, self.hi), self.lo);
        self.kept = _mm256_add_epi32(self.kept, _mm256_cmpeq_epi32(whole, code));
        if SYMMETRIC { code } else { _mm256_add_epi32(code, self.zero_point) }
    }

    /// # Safety
    /// `from` is readable for 32 values, `out` writeable for their codes, and aligned to these where `stream`.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store32(&mut self, from: *const f32, out: *mut u8, stream: bool) {
        // SAFETY: by contract.
        unsafe {
            let a = self.codes(from);
            let b = self.codes(from.add(8));
            let c = self.codes(from.add(16));
            let d = self.codes(from.add(24));
            let (ab, cd) = (_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            let bytes = if BITS == 8 && !SYMMETRIC {
                // Signed or not: the low byte is the code.
                let low = _mm256_set1_epi16(0xff);
                _mm256_packus_epi16(_mm256_and_si256(ab, low), _mm256_and_si256(cd, low))
            } else {
                _mm256_packs_epi16(ab, cd)
            };
            // The packs work inside 128-bit lanes: lane l holds dword l of a, b, c and d.
            let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            match BITS {
                8 if stream => _mm256_stream_si256(out.cast(), bytes),
                8 => _mm256_storeu_si256(out.cast(), bytes),
                4 => {
                    let pairs = _mm256_maddubs_epi16(
                        _mm256_and_si256(bytes, _mm256_set1_epi8(15)),
                        _mm256_set1_epi16(0x1001),
                    );
                    let packed = _mm256_packus_epi16(pairs, pairs);
                    let packed = _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b10_00>(packed));
                    if stream {
                        _mm_stream_si128(out.cast(), packed);
                    } else {
                        _mm_storeu_si128(out.cast(), packed);
                    }
                }
                _ => {
                    let pairs = _mm256_maddubs_epi16(
                        _mm256_and_si256(bytes, _mm256_set1_epi8(3)),
                        _mm256_set1_epi16(0x0401),
                    );
                    let quads = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x0010_0001));
                    let low = _mm256_set1_epi32(0x0c08_0400);
                    let packed = _mm256_shuffle_epi8(quads, low);
                    let order = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
                    let packed = _mm256_permutevar8x32_epi32(packed, order);
                    _mm_storel_epi64(out.cast(), _mm256_castsi256_si128(packed));
                }
            }
        }
    }
}
