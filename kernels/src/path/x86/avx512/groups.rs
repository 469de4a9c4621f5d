//! Groups with parameters of their own, or given ones.
//!
//! A group that gets its own is read twice, for its range and for its codes, the second time from a near cache.

use std::arch::x86_64::*;

use super::lanes::{
    BF16, Clamp, F16, F32, finite, load_block, load64, plain, prefetch, size, store, store_part, top_of,
    whole,
};
use crate::path::TileRange;
use crate::path::groups::{Done, Groups, code_bytes};
use crate::scheme::{Arith, Mapping, Range};
use crate::values::{FloatType, Values};

/// Values whose ranges are sought before the first of their codes: they stay in the nearest cache.
const AHEAD: usize = 4096;

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
    let (n, len, stride) = (run.scales.len(), run.len, code_bytes(run.len, run.stored));
    let aligned = (run.codes.as_ptr() as usize | stride).is_multiple_of(8 * STORED);
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
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
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
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
unsafe fn encode<const D: u8, const STORED: usize, const GIVEN: bool, const EXACT: bool>(
    run: &Groups<'_>,
    group: usize,
    out: *mut u8,
    stream: bool,
    clamp: &mut Clamp,
) -> bool {
    let (len, recip) = (run.len, run.affine.arith == Arith::Recip);
    let (scale, zero_point) = (run.scales[group], run.zero_points[group]);
    let factor = _mm512_set1_ps(if recip { 1.0 / scale } else { scale });
    let zero = _mm512_set1_epi16(zero_point as i16);
    let mut top = _mm512_setzero_si512();
    let mut at = 0;
    // SAFETY: `Groups` promises `len` readable values for each of its groups; `out` by contract.
    unsafe {
        let from = run.values.as_ptr().add(group * len * size(D));
        while at + 64 <= len {
            let place = from.add(at * size(D));
            let x = load64::<D>(place);
            if GIVEN {
                prefetch::<D>(place);
                top = top_of(top_of(top_of(top_of(top, x[0]), x[1]), x[2]), x[3]);
            }
            let whole = divided(x, factor, recip);
            let bytes = if EXACT { plain(whole) } else { clamp.codes::<STORED>(whole, zero) };
            store::<STORED>(bytes, out.add(at * STORED / 8), stream);
            at += 64;
        }
        if at < len {
            let x = load_block::<D>(from.add(at * size(D)), len - at);
            if GIVEN {
                prefetch::<D>(from.wrapping_add(at * size(D)));
                top = top_of(top_of(top_of(top_of(top, x[0]), x[1]), x[2]), x[3]);
            }
            let whole = if len - at <= 32 {
                let zeros = _mm512_setzero_si512();
                let [a, b] = halves([x[0], x[1]], factor, recip);
                [a, b, zeros, zeros]
            } else {
                divided(x, factor, recip)
            };
            let bytes = if EXACT { plain(whole) } else { clamp.codes::<STORED>(whole, zero) };
            store_part::<STORED>(bytes, len - at, out.add(at * STORED / 8));
        }
    }
    !GIVEN || finite(top)
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
    if !finite(top) {
        return None;
    }
    if SYMMETRIC {
        let top = _mm512_reduce_max_epu32(top);
        return Some(Range { min: 0.0, max: f32::from_bits(top) });
    }
    let min = _mm512_min_ps(_mm512_min_ps(min[0], min[1]), _mm512_min_ps(min[2], min[3]));
    let max = _mm512_max_ps(_mm512_max_ps(max[0], max[1]), _mm512_max_ps(max[2], max[3]));
    Some(Range { min: _mm512_reduce_min_ps(min), max: _mm512_reduce_max_ps(max) })
}
