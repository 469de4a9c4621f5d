//! Ranges of values, and the parameters of sixteen groups at once.
//!
//! Taken as integers, the bits of floats have the order of the floats where these are positive, and the opposite one
//! where they are negative; those of infinities and NaN have most of all. So the largest of a domain's bits with a sign is
//! its largest value, and the largest without one its smallest, if any lies below 0.

use std::arch::x86_64::*;

use super::lanes::{BF16, F16, F32, load, load_part, load64, prefetch, size};
use crate::path::TileRange;
use crate::path::groups::Groups;
use crate::scheme::{Mapping, Range, TINY};
use crate::values::{FloatType, Values};

/// Groups whose parameters are found at once.
pub(super) const LANES: usize = 16;

/// Groups of `len` values in a block of 64; of those of any length, 0, one.
pub(super) const fn per_block(len: usize) -> usize {
    match len {
        0 => 1,
        _ => 64 / len,
    }
}

/// The largest bits, lane by lane, with a sign and without.
#[derive(Clone, Copy)]
struct Bits {
    /// At least 0: the largest value, or for a symmetric mapping the largest magnitude.
    signed: __m512i,
    /// For an asymmetric mapping only.
    unsigned: __m512i,
}

impl Bits {
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    fn none() -> Self {
        Self { signed: _mm512_setzero_si512(), unsigned: _mm512_setzero_si512() }
    }

    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    fn max(self, other: Self) -> Self {
        Self {
            signed: _mm512_max_epi32(self.signed, other.signed),
            unsigned: _mm512_max_epu32(self.unsigned, other.unsigned),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    fn with<const SYMMETRIC: bool>(self, x: __m512) -> Self {
        let bits = _mm512_castps_si512(x);
        if SYMMETRIC {
            let magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX));
            self.max(Self { signed: magnitude, ..Self::none() })
        } else {
            self.max(Self { signed: bits, unsigned: bits })
        }
    }

    /// Those of `len` values.
    ///
    /// # Safety
    /// `from` is readable for `len` values.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    unsafe fn of<const D: u8, const SYMMETRIC: bool>(from: *const u8, len: usize) -> Self {
        let mut most = Self::none();
        let mut at = 0;
        if len >= 64 {
            let mut each = [most; 4];
            while at + 64 <= len {
                let place = from.wrapping_add(at * size(D));
                prefetch::<D, 64>(place);
                // SAFETY: the block lies inside the `len` values.
                let x = unsafe { load64::<D>(place) };
                for (most, x) in each.iter_mut().zip(x) {
                    *most = most.with::<SYMMETRIC>(x);
                }
                at += 64;
            }
            most = each[0].max(each[1]).max(each[2].max(each[3]));
        }
        while at < len {
            let place = from.wrapping_add(at * size(D));
            prefetch::<D, 16>(place);
            // SAFETY: the values, or what is left of them, lie inside the `len`.
            let x =
                unsafe { if at + 16 <= len { load::<D>(place) } else { load_part::<D>(place, len - at) } };
            most = most.with::<SYMMETRIC>(x);
            at += 16;
        }
        most
    }

    /// Those of `n` of four adjoining groups, in the first to the fourth lane of each quarter.
    ///
    /// # Safety
    /// `from` is readable for `n` groups of `len` values.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    unsafe fn of_four<const D: u8, const SYMMETRIC: bool>(from: *const u8, len: usize, n: usize) -> Self {
        let mut each = [Self::none(); 4];
        for (i, most) in each.iter_mut().enumerate().take(n) {
            // SAFETY: by contract.
            *most = unsafe { Self::of::<D, SYMMETRIC>(from.add(i * len * size(D)), len) };
        }
        let [a, b, c, d] = each;
        a.joined::<1>(b).joined::<2>(c.joined::<1>(d))
    }

    /// The same of four groups of 16 values.
    ///
    /// # Safety
    /// `from` is readable for 64 values.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    unsafe fn of_sixteens<const D: u8, const SYMMETRIC: bool>(from: *const u8) -> Self {
        prefetch::<D, 64>(from);
        // SAFETY: by contract.
        let [a, b, c, d] = unsafe { load64::<D>(from) }.map(|x| _mm512_castps_si512(x));
        let [ab, cd] = [halves::<1>(a, b), halves::<1>(c, d)].map(|[low, high]| {
            let (low, high) = (_mm512_castsi512_ps(low), _mm512_castsi512_ps(high));
            Self::none().with::<SYMMETRIC>(low).with::<SYMMETRIC>(high)
        });
        ab.joined::<2>(cd)
    }

    /// Those of sixteen groups, a lane each, the first `n` of which come from `four`: from the `i`th on, how many.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    fn by_four(n: usize, four: impl Fn(usize, usize) -> Self) -> Self {
        let mut quarters = [Self::none(); 4];
        for (i, quarter) in quarters.iter_mut().enumerate().take(n.div_ceil(4)) {
            *quarter = four(4 * i, (n - 4 * i).min(4));
        }
        let [a, b, c, d] = quarters;
        a.joined::<3>(b).joined::<4>(c.joined::<3>(d))
    }

    /// The largest lanes, in each of them.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    fn in_all_lanes(self) -> Self {
        let a = self.joined::<1>(self);
        let b = a.joined::<2>(a);
        let c = b.joined::<3>(b);
        c.joined::<4>(c)
    }

    /// The larger of the [`halves`].
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    fn joined<const STEP: u8>(self, other: Self) -> Self {
        let [low, high] = halves::<STEP>(self.signed, other.signed);
        let [small, large] = halves::<STEP>(self.unsigned, other.unsigned);
        Self { signed: low, unsigned: small }.max(Self { signed: high, unsigned: large })
    }

    /// Largest value and largest negative, or 0.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    fn ends(self) -> [__m512; 2] {
        let negative = _mm512_xor_si512(self.unsigned, _mm512_set1_epi32(i32::MIN));
        let down = _mm512_max_epi32(negative, _mm512_setzero_si512());
        [_mm512_castsi512_ps(self.signed), _mm512_castsi512_ps(down)]
    }
}

/// The lanes of two vectors in two others, half of each one's in either: of each 128 bits (step 1, 64 bits at a time 2),
/// or these as a whole (3, 4). After all four steps each of sixteen vectors has one lane, in their order.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn halves<const STEP: u8>(a: __m512i, b: __m512i) -> [__m512i; 2] {
    match STEP {
        1 => [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)],
        2 => [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)],
        3 => [_mm512_shuffle_i32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_i32x4::<0b11_10_11_10>(a, b)],
        _ => [_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b)],
    }
}

/// The range of values; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn range_of(values: Values<'_>) -> TileRange {
    let (from, len) = (values.as_ptr(), values.len());
    // SAFETY: `Values` are readable for their length.
    let most = unsafe {
        match values.dtype() {
            FloatType::F32 => Bits::of::<F32, false>(from, len),
            FloatType::Bf16 => Bits::of::<BF16, false>(from, len),
            FloatType::F16 => Bits::of::<F16, false>(from, len),
            FloatType::F64 => return TileRange { range: Range::EMPTY, finite: false },
        }
    };
    let [up, down] = most.ends().map(|end| _mm512_reduce_max_epi32(_mm512_castps_si512(end)) as u32);
    let (up, down) = (f32::from_bits(up), f32::from_bits(down));
    // The difference, since a minimum is never -0.
    TileRange {
        range: Range { min: 0.0 - down, max: up },
        finite: up < f32::INFINITY && down < f32::INFINITY,
    }
}

/// Parameters of `batch` groups from the `first` on, at most [`LANES`]; of how many, by whole blocks and up to one that
/// has none, and how many of these are degenerate. `LEN` is their length, or 0.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn find_params<const D: u8, const LEN: usize>(
    run: &mut Groups<'_>,
    first: usize,
    batch: usize,
) -> (usize, u64) {
    match run.affine.mapping {
        Mapping::Symmetric => params::<D, LEN, true>(run, first, batch),
        Mapping::Asymmetric => params::<D, LEN, false>(run, first, batch),
    }
}

/// [`crate::scheme::Rule::params`] with a lane for each group.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn params<const D: u8, const LEN: usize, const SYMMETRIC: bool>(
    run: &mut Groups<'_>,
    first: usize,
    batch: usize,
) -> (usize, u64) {
    let rule = run.affine.rule();
    assert!(batch <= LANES && batch.is_multiple_of(per_block(LEN)) && first + batch <= run.scales.len());
    // SAFETY: `Groups` promises `len` readable values for each of its groups, which these are.
    let [up, down] = unsafe {
        let len = if LEN > 0 { LEN } else { run.len };
        let from = run.values.as_ptr().add(first * len * size(D));
        if LEN == 16 {
            Bits::by_four(batch, |at, _| Bits::of_sixteens::<D, SYMMETRIC>(from.add(at * len * size(D))))
        } else if batch == 1 {
            Bits::of::<D, SYMMETRIC>(from, len).in_all_lanes()
        } else {
            Bits::by_four(batch, |at, n| Bits::of_four::<D, SYMMETRIC>(from.add(at * len * size(D)), len, n))
        }
        .ends()
    };
    let down = if SYMMETRIC { _mm512_setzero_ps() } else { down };
    let width = _mm512_add_ps(up, down);
    // Not so where a value is not finite or the range overflows.
    let has_params = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(width, _mm512_set1_ps(f32::INFINITY));
    let found = batch.min(has_params.trailing_ones() as usize) / per_block(LEN) * per_block(LEN);
    let scale = _mm512_div_ps(width, _mm512_set1_ps(rule.divisor));
    let degenerate = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(scale, _mm512_set1_ps(TINY));
    let scale = _mm512_mask_mov_ps(scale, degenerate, _mm512_set1_ps(1.0));
    let zero_point = if SYMMETRIC {
        _mm512_setzero_si512()
    } else {
        let (qmin, qmax) = (_mm512_set1_ps(rule.qmin), _mm512_set1_ps(rule.qmax));
        // To nearest, ties to even.
        let steps = _mm512_roundscale_ps::<_MM_FROUND_NO_EXC>(_mm512_div_ps(down, scale));
        let zero_point = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(qmin, steps), qmin), qmax);
        _mm512_maskz_cvtps_epi32(!degenerate, zero_point)
    };
    let (scales, zero_points) = (&mut run.scales[first..], &mut run.zero_points[first..]);
    let some = ((1u32 << found) - 1) as u16;
    // SAFETY: there is room for sixteen lanes, or they are masked by `found`, for which there is.
    unsafe {
        if scales.len() >= LANES && zero_points.len() >= LANES {
            // Masked stores are slower. What is too much is written again later.
            _mm512_storeu_ps(scales.as_mut_ptr(), scale);
            _mm512_storeu_si512(zero_points.as_mut_ptr().cast(), zero_point);
        } else {
            assert!(scales.len() >= found && zero_points.len() >= found);
            _mm512_mask_storeu_ps(scales.as_mut_ptr(), some, scale);
            _mm512_mask_storeu_epi32(zero_points.as_mut_ptr(), some, zero_point);
        }
    }
    (found, u64::from((degenerate & some).count_ones()))
}
