//! Ranges of values, and the parameters of eight groups at once.
//!
//! Taken as integers, the bits of floats have the order of the floats where these are positive, and the opposite one
//! where they are negative; those of infinities and NaN have most of all. So the largest of a domain's bits with a sign is
//! its largest value, and the largest without one its smallest, if any lies below 0.

use std::arch::x86_64::*;

use super::lanes::{BF16, F16, F32, load, load_block, load32, prefetch, size};
use crate::path::TileRange;
use crate::path::groups::Groups;
use crate::scheme::{Mapping, Range, TINY};
use crate::values::{FloatType, Values};

/// Groups whose parameters are found at once.
pub(super) const LANES: usize = 8;

/// Groups of `len` values in a block of 32; of those of any length, 0, one.
pub(super) const fn per_block(len: usize) -> usize {
    match len {
        0 => 1,
        _ => 32 / len,
    }
}

/// The largest bits, lane by lane, with a sign and without.
#[derive(Clone, Copy)]
struct Bits {
    /// At least 0: the largest value, or for a symmetric mapping the largest magnitude.
    signed: __m256i,
    /// For an asymmetric mapping only.
    unsigned: __m256i,
}

impl Bits {
    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    fn none() -> Self {
        Self { signed: _mm256_setzero_si256(), unsigned: _mm256_setzero_si256() }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    fn max(self, other: Self) -> Self {
        Self {
            signed: _mm256_max_epi32(self.signed, other.signed),
            unsigned: _mm256_max_epu32(self.unsigned, other.unsigned),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    fn with<const SYMMETRIC: bool>(self, x: __m256) -> Self {
        let bits = _mm256_castps_si256(x);
        if SYMMETRIC {
            let magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(i32::MAX));
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
    #[target_feature(enable = "avx2,f16c,popcnt")]
    unsafe fn of<const D: u8, const SYMMETRIC: bool>(from: *const u8, len: usize) -> Self {
        let mut most = Self::none();
        let mut at = 0;
        if len >= 32 {
            let mut each = [most; 4];
            while at + 32 <= len {
                let place = from.wrapping_add(at * size(D));
                prefetch::<D>(place);
                // SAFETY: the block lies inside the `len` values.
                let x = unsafe { load32::<D>(place) };
                for (most, x) in each.iter_mut().zip(x) {
                    *most = most.with::<SYMMETRIC>(x);
                }
                at += 32;
            }
            most = each[0].max(each[1]).max(each[2].max(each[3]));
        }
        if at < len {
            prefetch::<D>(from.wrapping_add(at * size(D)));
        }
        while at < len {
            // SAFETY: the values lie inside the `len`. Seeing one twice changes nothing.
            let x = unsafe {
                if len >= 8 {
                    load::<D>(from.add(at.min(len - 8) * size(D)))
                } else {
                    load_block::<D>(from, len)[0]
                }
            };
            most = most.with::<SYMMETRIC>(x);
            at += 8;
        }
        most
    }

    /// Those of `n` of four adjoining groups, in the first to the fourth lane of each half.
    ///
    /// # Safety
    /// `from` is readable for `n` groups of `len` values.
    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    unsafe fn of_four<const D: u8, const SYMMETRIC: bool>(from: *const u8, len: usize, n: usize) -> Self {
        let mut each = [Self::none(); 4];
        for (i, most) in each.iter_mut().enumerate().take(n) {
            // SAFETY: by contract.
            *most = unsafe { Self::of::<D, SYMMETRIC>(from.add(i * len * size(D)), len) };
        }
        let [a, b, c, d] = each;
        a.joined::<1>(b).joined::<2>(c.joined::<1>(d))
    }

    /// The largest lanes, in each of them.
    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    fn in_all_lanes(self) -> Self {
        let a = self.joined::<1>(self);
        let b = a.joined::<2>(a);
        b.joined::<3>(b)
    }

    /// The larger of the [`halves`].
    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    fn joined<const STEP: u8>(self, other: Self) -> Self {
        let [low, high] = halves::<STEP>(self.signed, other.signed);
        let [small, large] = halves::<STEP>(self.unsigned, other.unsigned);
        Self { signed: low, unsigned: small }.max(Self { signed: high, unsigned: large })
    }

    /// Largest value and largest negative, or 0.
    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    fn ends(self) -> [__m256; 2] {
        let negative = _mm256_xor_si256(self.unsigned, _mm256_set1_epi32(i32::MIN));
        let down = _mm256_max_epi32(negative, _mm256_setzero_si256());
        [_mm256_castsi256_ps(self.signed), _mm256_castsi256_ps(down)]
    }
}

/// The lanes of two vectors in two others, half of each one's in either: of each 128 bits (step 1, 64 bits at a time 2),
/// or these as a whole (3). After all three steps each of eight vectors has one lane, in their order.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
fn halves<const STEP: u8>(a: __m256i, b: __m256i) -> [__m256i; 2] {
    match STEP {
        1 => [_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)],
        2 => [_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)],
        _ => [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)],
    }
}

/// The range of values; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,f16c,popcnt")]
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
    let [up, down] = most.in_all_lanes().ends().map(|end| _mm256_cvtss_f32(end));
    // The difference, since a minimum is never -0.
    TileRange {
        range: Range { min: 0.0 - down, max: up },
        finite: up < f32::INFINITY && down < f32::INFINITY,
    }
}

/// Parameters of `batch` groups from the `first` on, at most [`LANES`]; of how many, by whole blocks and up to one that
/// has none, and how many of these are degenerate. `LEN` is their length, or 0.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
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
#[target_feature(enable = "avx2,f16c,popcnt")]
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
        if batch == 1 {
            Bits::of::<D, SYMMETRIC>(from, len).in_all_lanes().ends()
        } else {
            let low = Bits::of_four::<D, SYMMETRIC>(from, len, batch.min(4));
            let high = if batch > 4 {
                Bits::of_four::<D, SYMMETRIC>(from.add(4 * len * size(D)), len, batch - 4)
            } else {
                Bits::none()
            };
            low.joined::<3>(high).ends()
        }
    };
    let down = if SYMMETRIC { _mm256_setzero_ps() } else { down };
    let width = _mm256_add_ps(up, down);
    // Not so where a value is not finite or the range overflows.
    let has_params = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(width, _mm256_set1_ps(f32::INFINITY)));
    let found = batch.min(has_params.trailing_ones() as usize) / per_block(LEN) * per_block(LEN);
    let scale = _mm256_div_ps(width, _mm256_set1_ps(rule.divisor));
    let degenerate = _mm256_cmp_ps::<_CMP_LT_OQ>(scale, _mm256_set1_ps(TINY));
    let scale = _mm256_blendv_ps(scale, _mm256_set1_ps(1.0), degenerate);
    let zero_point = if SYMMETRIC {
        _mm256_setzero_si256()
    } else {
        let (qmin, qmax) = (_mm256_set1_ps(rule.qmin), _mm256_set1_ps(rule.qmax));
        // To nearest, ties to even.
        let steps = _mm256_round_ps::<_MM_FROUND_NO_EXC>(_mm256_div_ps(down, scale));
        let zero_point = _mm256_min_ps(_mm256_max_ps(_mm256_add_ps(qmin, steps), qmin), qmax);
        _mm256_cvtps_epi32(_mm256_andnot_ps(degenerate, zero_point))
    };
    let (scales, zero_points) = (&mut run.scales[first..], &mut run.zero_points[first..]);
    // SAFETY: there is room for eight lanes, or they are masked by `found`, for which there is.
    unsafe {
        if scales.len() >= LANES && zero_points.len() >= LANES {
            // Masked stores are slower. What is too much is written again later.
            _mm256_storeu_ps(scales.as_mut_ptr(), scale);
            _mm256_storeu_si256(zero_points.as_mut_ptr().cast(), zero_point);
        } else {
            assert!(scales.len() >= found && zero_points.len() >= found);
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let some = _mm256_cmpgt_epi32(_mm256_set1_epi32(found as i32), lanes);
            _mm256_maskstore_ps(scales.as_mut_ptr(), some, scale);
            _mm256_maskstore_epi32(zero_points.as_mut_ptr(), some, zero_point);
        }
    }
    let degenerate = _mm256_movemask_ps(degenerate) & ((1 << found) - 1);
    (found, u64::from(degenerate.count_ones()))
}
