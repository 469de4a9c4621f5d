//! Groups with parameters of their own, or given ones.
//!
//! A group that gets its own is read twice, for its range and for its codes, the second time from a near cache.

use std::arch::x86_64::*;

use super::lanes::{
    BF16, Clamp, F16, F32, finite, load_block, load64, plain, prefetch, size, store, store_part, top_of,
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
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn groups(run: &mut Groups<'_>) -> Done {
    match run.values.dtype() {
        FloatType::F32 => by_bits::<F32>(run),
        FloatType::Bf16 => by_bits::<BF16>(run),
        FloatType::F16 => by_bits::<F16>(run),
        FloatType::F64 => Done::default(),
    }
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
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
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
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn blocks<const D: u8, const STORED: usize, const GIVEN: bool, const EXACT: bool, const LEN: usize>(
    run: &mut Groups<'_>,
) -> Done {
    let per = per_block(LEN);
    let (n, stride) = (run.scales.len() / per * per, per * code_bytes(run.len, run.stored));
    let aligned = (run.codes.as_ptr() as usize | stride).is_multiple_of(8 * STORED);
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
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
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
        (load64::<D>(place), place)
    };
    let by = |i: usize| _mm512_set1_ps(scales[16 * i / LEN]);
    let [a, b] = halves([x[0], x[1]], [by(0), by(1)], false);
    let [c, d] = halves([x[2], x[3]], [by(2), by(3)], false);
    let bytes = if EXACT {
        plain([a, b, c, d])
    } else {
        let zero = |i: usize| _mm512_set1_epi32(zero_points[16 * i / LEN]);
        let zeros = [_mm512_packs_epi32(zero(0), zero(1)), _mm512_packs_epi32(zero(2), zero(3))];
        clamp.codes::<STORED>([a, b, c, d], zeros)
    };
    // SAFETY: `out` by contract.
    unsafe { store::<STORED>(bytes, out, stream) };
    if !GIVEN {
        return true;
    }
    prefetch::<D, 64>(place);
    finite(top_of(top_of(top_of(top_of(_mm512_setzero_si512(), x[0]), x[1]), x[2]), x[3]))
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
    let zero = [_mm512_set1_epi16(zero_point as i16); 2];
    let mut top = _mm512_setzero_si512();
    let mut at = 0;
    // SAFETY: `Groups` promises `len` readable values for each of its groups; `out` by contract.
    unsafe {
        let from = run.values.as_ptr().add(group * len * size(D));
        while at + 64 <= len {
            let place = from.add(at * size(D));
            let x = load64::<D>(place);
            if GIVEN {
                prefetch::<D, 64>(place);
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
                prefetch::<D, 64>(from.wrapping_add(at * size(D)));
                top = top_of(top_of(top_of(top_of(top, x[0]), x[1]), x[2]), x[3]);
            }
            let whole = if len - at <= 32 {
                let zeros = _mm512_setzero_si512();
                let [a, b] = halves([x[0], x[1]], [factor; 2], recip);
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
    let by = [factor; 2];
    let ([a, b], [c, d]) = (halves([x[0], x[1]], by, recip), halves([x[2], x[3]], by, recip));
    [a, b, c, d]
}

#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn halves([a, b]: [__m512; 2], by: [__m512; 2], recip: bool) -> [__m512i; 2] {
    if recip {
        [whole(_mm512_mul_ps(a, by[0])), whole(_mm512_mul_ps(b, by[1]))]
    } else {
        [whole(_mm512_div_ps(a, by[0])), whole(_mm512_div_ps(b, by[1]))]
    }
}
