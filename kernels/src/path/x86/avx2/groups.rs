//! Groups with parameters of their own, or given ones.
//!
//! A group that gets its own is read twice, for its range and for its codes, the second time from a near cache.

use std::arch::x86_64::*;

use super::lanes::{
    BF16, Clamp, F16, F32, finite, load_block, load32, plain, prefetch, size, store, store_part, top_of,
    whole,
};
use super::ranges::{LANES, find_params, per_block};
use crate::path::groups::{Done, Groups, code_bytes};
use crate::scheme::{Arith, Mapping};
use crate::values::FloatType;

/// Values whose ranges are sought before the first of their codes: they stay in the nearest cache, and are so few that
/// the processor works on the next ones while codes wait for divisions.
const AHEAD: usize = 1024;

/// The same where values come from memory: it is faster where it is read for longer before codes are written to it.
const FAR_AHEAD: usize = 8192;

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
    // A scale of the group's own leaves nothing to clip in -127..=127: |x / s| < 127.5.
    let exact = !GIVEN && STORED == 8 && run.affine.mapping == Mapping::Symmetric && run.affine.qmin == -127;
    // A reciprocal costs a small group as much as a division of all its values.
    let small = if run.affine.arith == Arith::Div { run.len } else { 0 };
    match (small, exact) {
        (16, true) => small_groups::<D, STORED, GIVEN, true, 16>(run),
        (32, true) => small_groups::<D, STORED, GIVEN, true, 32>(run),
        (_, true) => blocks::<D, STORED, GIVEN, true, 0>(run),
        (16, false) => small_groups::<D, STORED, GIVEN, false, 16>(run),
        (32, false) => small_groups::<D, STORED, GIVEN, false, 32>(run),
        (_, false) => blocks::<D, STORED, GIVEN, false, 0>(run),
    }
}

/// Groups of `LEN` values, by blocks; singly those that are left or share a block with one that needs a closer look.
#[target_feature(enable = "avx2,f16c,popcnt")]
fn small_groups<const D: u8, const STORED: usize, const GIVEN: bool, const EXACT: bool, const LEN: usize>(
    run: &mut Groups<'_>,
) -> Done {
    let mut done = blocks::<D, STORED, GIVEN, EXACT, LEN>(run);
    if done.groups < run.scales.len() {
        done.add(blocks::<D, STORED, GIVEN, EXACT, 0>(&mut run.rest(done.groups)));
    }
    done
}

/// Groups, as many at a time as make a block of those of `LEN` values, or one where that is 0.
#[target_feature(enable = "avx2,f16c,popcnt")]
fn blocks<const D: u8, const STORED: usize, const GIVEN: bool, const EXACT: bool, const LEN: usize>(
    run: &mut Groups<'_>,
) -> Done {
    let per = per_block(LEN);
    let (n, stride) = (run.scales.len() / per * per, per * code_bytes(run.len, run.stored));
    let aligned = (run.codes.as_ptr() as usize | stride).is_multiple_of(4 * STORED);
    let stream = run.stream && aligned;
    let ahead = if run.stream { FAR_AHEAD } else { AHEAD };
    let batch = (ahead / run.len).clamp(1, LANES);
    let early = !run.stream && run.len <= 4 * AHEAD;
    let mut clamp = Clamp::new(run.affine.qmin, run.affine.qmax);
    let mut done = Done::default();
    // Groups whose parameters are known, and those for which they were sought: one had none where these differ.
    let (mut known, mut sought) = if GIVEN { (n, n) } else { (0, 0) };
    'all: loop {
        // Early, they are sought before the codes of the batch in front, which then need not wait for them.
        let mut end = known;
        if known == sought && sought < n {
            sought = n.min(known + batch);
            let (found, degenerate) = find_params::<D, LEN>(run, known, sought - known);
            known += found;
            done.degenerate += degenerate;
        }
        if !early {
            end = known;
        }
        while done.groups < end {
            let before = clamp.clipped;
            let codes = run.codes[done.groups / per * stride..][..stride].as_mut_ptr();
            // SAFETY: `codes` has room for those of `per` groups.
            let finite = unsafe {
                if LEN > 0 {
                    together::<D, STORED, GIVEN, EXACT, LEN>(run, done.groups, codes, stream, &mut clamp)
                } else {
                    encode::<D, STORED, GIVEN, EXACT>(run, done.groups, codes, stream, &mut clamp)
                }
            };
            if GIVEN && !finite {
                clamp.clipped = before;
                break 'all;
            }
            done.groups += per;
        }
        if done.groups == known && (known < sought || known == n) {
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

/// Codes of a block of groups of `LEN` values; whether all are finite, where their parameters are given.
///
/// # Safety
/// `out` has room for them.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
unsafe fn together<
    const D: u8,
    const STORED: usize,
    const GIVEN: bool,
    const EXACT: bool,
    const LEN: usize,
>(
    run: &Groups<'_>,
    group: usize,
    out: *mut u8,
    stream: bool,
    clamp: &mut Clamp,
) -> bool {
    let (scales, zero_points) =
        (&run.scales[group..][..per_block(LEN)], &run.zero_points[group..][..per_block(LEN)]);
    // SAFETY: `Groups` promises `len` readable values for each of its groups.
    let (x, place) = unsafe {
        let place = run.values.as_ptr().add(group * LEN * size(D));
        (load32::<D>(place), place)
    };
    let [low, high] =
        [0, 16 / LEN].map(|i| (_mm256_set1_ps(scales[i]), _mm256_set1_epi16(zero_points[i] as i16)));
    let [a, b] = [x[0], x[1]].map(|x| whole(_mm256_div_ps(x, low.0)));
    let [c, d] = [x[2], x[3]].map(|x| whole(_mm256_div_ps(x, high.0)));
    let bytes =
        if EXACT { plain([a, b, c, d]) } else { clamp.codes::<STORED>([a, b, c, d], [low.1, high.1]) };
    // SAFETY: `out` by contract.
    unsafe { store::<STORED>(bytes, out, stream) };
    if !GIVEN {
        return true;
    }
    prefetch::<D>(place);
    finite(top_of(top_of(top_of(top_of(_mm256_setzero_si256(), x[0]), x[1]), x[2]), x[3]))
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
    let zero = [_mm256_set1_epi16(zero_point as i16); 2];
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
