//! Groups with parameters of their own, or given ones.
//!
//! A group that gets its own is read twice, for its range and for its codes, the second time from a near cache.

use std::arch::x86_64::*;

use super::lanes::{
    BF16, Clamp, F16, F32, finite, load_block, load32, plain, prefetch, size, store, store_part, top_of,
    whole,
};
use crate::path::TileRange;
use crate::path::groups::{Done, Groups, code_bytes};
use crate::scheme::{Arith, Mapping, Range};
use crate::values::{FloatType, Values};

/// Values whose ranges are sought before the first of their codes: they stay in the nearest cache.
const AHEAD: usize = 4096;

/// Quantizes groups; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) fn groups(run: &mut Groups<'_>) -> Done {
    match run.values.dtype() {
        FloatType::F32 => by_bits::<F32>(run),
        FloatType::Bf16 => by_bits::<BF16>(run),
        FloatType::F16 => by_bits::<F16>(run),
        FloatType::F64 => Done::default(),
    }
}

/// The range of values; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,f16c,popcnt")]
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

#[target_feature(enable = "avx2,f16c,popcnt")]
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

#[target_feature(enable = "avx2,f16c,popcnt")]
fn each<const D: u8, const STORED: usize, const GIVEN: bool>(run: &mut Groups<'_>) -> Done {
    let (n, len, stride) = (run.scales.len(), run.len, code_bytes(run.len, run.stored));
    let aligned = (run.codes.as_ptr() as usize | stride).is_multiple_of(4 * STORED);
    let stream = run.stream && aligned;
    // A scale of the group's own leaves nothing to clip in -127..=127: |x / s| < 127.5.
    let exact = !GIVEN && STORED == 8 && run.affine.mapping == Mapping::Symmetric && run.affine.qmin == -127;
    let ahead = if GIVEN { n } else { (AHEAD / len).clamp(1, 16) };
    let mut clamp = Clamp::new(run.affine.qmin, run.affine.qmax);
    let mut done = Done::default();
    'all: while done.groups < n {
        let batch = ahead.min(n - done.groups);
        let ready = if GIVEN { batch } else { find_params::<D>(run, &mut done, batch) };
        for _ in 0..ready {
            let before = clamp.clipped;
            let codes = run.codes[done.groups * stride..][..stride].as_mut_ptr();
            // SAFETY: `Groups` promises `len` readable values for each of its groups, and `codes` has room for theirs.
            let finite = unsafe {
                if exact {
                    encode::<D, STORED, GIVEN, true>(run, done.groups, codes, stream, &mut clamp)
                } else {
                    encode::<D, STORED, GIVEN, false>(run, done.groups, codes, stream, &mut clamp)
                }
            };
            if GIVEN && !finite {
                clamp.clipped = before;
                break 'all;
            }
            done.groups += 1;
        }
        if ready < batch {
            break;
        }
    }
    done.clipped = clamp.clipped;
    if stream {
        // Streaming stores are not ordered with whatever tells others that the codes are there.
        _mm_sfence();
    }
    done
}

/// Parameters of up to `batch` groups after those done; of how many they were found. Several groups at a time: one's
/// parameters then need not wait for its range, nor its codes for them.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
fn find_params<const D: u8>(run: &mut Groups<'_>, done: &mut Done, batch: usize) -> usize {
    let rule = run.affine.rule();
    let symmetric = run.affine.mapping == Mapping::Symmetric;
    let mut ranges = [Range::EMPTY; 16];
    let mut found = 0;
    for at in ranges.iter_mut().take(batch) {
        // SAFETY: `Groups` promises `len` readable values for each of its groups.
        let range = unsafe {
            let from = run.values.as_ptr().add((done.groups + found) * run.len * size(D));
            if symmetric { range::<D, true>(from, run.len) } else { range::<D, false>(from, run.len) }
        };
        let Some(range) = range else { break };
        *at = range;
        found += 1;
    }
    for (i, range) in ranges.iter().enumerate().take(found) {
        let Some((scale, zero_point, degenerate)) = rule.params(*range) else { return i };
        run.scales[done.groups + i] = scale;
        run.zero_points[done.groups + i] = zero_point;
        done.degenerate += u64::from(degenerate);
    }
    found
}

/// Codes of one group; whether its values are finite, where its parameters are given.
///
/// # Safety
/// `out` has room for them.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
unsafe fn encode<const D: u8, const STORED: usize, const GIVEN: bool, const EXACT: bool>(
    run: &Groups<'_>,
    group: usize,
    out: *mut u8,
    stream: bool,
    clamp: &mut Clamp,
) -> bool {
    let (len, recip) = (run.len, run.affine.arith == Arith::Recip);
    let (scale, zero_point) = (run.scales[group], run.zero_points[group]);
    let factor = _mm256_set1_ps(if recip { 1.0 / scale } else { scale });
    let zero = _mm256_set1_epi16(zero_point as i16);
    let mut top = _mm256_setzero_si256();
    let mut at = 0;
    // SAFETY: `Groups` promises `len` readable values for each of its groups; `out` by contract.
    unsafe {
        let from = run.values.as_ptr().add(group * len * size(D));
        while at + 32 <= len {
            let place = from.add(at * size(D));
            let x = load32::<D>(place);
            if GIVEN {
                prefetch::<D>(place);
                top = top_of(top_of(top_of(top_of(top, x[0]), x[1]), x[2]), x[3]);
            }
            let whole = divided(x, factor, recip);
            let bytes = if EXACT { plain(whole) } else { clamp.codes::<STORED>(whole, zero) };
            store::<STORED>(bytes, out.add(at * STORED / 8), stream);
            at += 32;
        }
        if at < len && len >= 32 && (len * STORED).is_multiple_of(8) {
            // The last block reaches back over codes that are written already, and writes them again.
            let last = len - 32;
            let x = load32::<D>(from.add(last * size(D)));
            if GIVEN {
                top = top_of(top_of(top_of(top_of(top, x[0]), x[1]), x[2]), x[3]);
            }
            let bytes = clamp.last_codes::<STORED>(divided(x, factor, recip), zero, len - at);
            store::<STORED>(bytes, out.add(last * STORED / 8), false);
        } else if at < len {
            let x = load_block::<D>(from.add(at * size(D)), len - at);
            if GIVEN {
                prefetch::<D>(from.wrapping_add(at * size(D)));
                top = top_of(top_of(top_of(top_of(top, x[0]), x[1]), x[2]), x[3]);
            }
            let bytes = clamp.codes::<STORED>(divided(x, factor, recip), zero);
            store_part::<STORED>(bytes, len - at, out.add(at * STORED / 8));
        }
    }
    !GIVEN || finite(top)
}

#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
fn divided(x: [__m256; 4], factor: __m256, recip: bool) -> [__m256i; 4] {
    let [a, b, c, d] = x;
    let by = factor;
    if recip {
        [
            whole(_mm256_mul_ps(a, by)),
            whole(_mm256_mul_ps(b, by)),
            whole(_mm256_mul_ps(c, by)),
            whole(_mm256_mul_ps(d, by)),
        ]
    } else {
        [
            whole(_mm256_div_ps(a, by)),
            whole(_mm256_div_ps(b, by)),
            whole(_mm256_div_ps(c, by)),
            whole(_mm256_div_ps(d, by)),
        ]
    }
}

/// `None` where a value is not finite.
///
/// # Safety
/// `from` is readable for `len` values.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
unsafe fn range<const D: u8, const SYMMETRIC: bool>(from: *const u8, len: usize) -> Option<Range> {
    let mut top = [_mm256_setzero_si256(); 4];
    let mut min = [_mm256_setzero_ps(); 4];
    let mut max = [_mm256_setzero_ps(); 4];
    let mut at = 0;
    while at < len {
        let place = from.wrapping_add(at * size(D));
        prefetch::<D>(place);
        // SAFETY: the block, or what is left of it, lies inside the `len` values.
        let x = unsafe {
            if at + 32 <= len {
                load32::<D>(place)
            } else if len >= 32 {
                // Seeing a value twice changes nothing.
                load32::<D>(from.add((len - 32) * size(D)))
            } else {
                load_block::<D>(place, len)
            }
        };
        for i in 0..4 {
            top[i] = top_of(top[i], x[i]);
            if !SYMMETRIC {
                min[i] = _mm256_min_ps(x[i], min[i]);
                max[i] = _mm256_max_ps(x[i], max[i]);
            }
        }
        at += 32;
    }
    let top = _mm256_max_epu32(_mm256_max_epu32(top[0], top[1]), _mm256_max_epu32(top[2], top[3]));
    if !finite(top) {
        return None;
    }
    if SYMMETRIC {
        let top = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top));
        let top = _mm_max_epu32(top, _mm_shuffle_epi32::<0b01_00_11_10>(top));
        let top = _mm_max_epu32(top, _mm_shuffle_epi32::<0b10_11_00_01>(top));
        let top = _mm_cvtsi128_si32(top) as u32;
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
