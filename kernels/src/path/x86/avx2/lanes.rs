//! Blocks of 32 values in registers: loading and widening, rounding and clamping, packing and storing.

use std::arch::x86_64::*;
use std::ptr::copy_nonoverlapping;

/// Formats as const parameters.
pub(super) const F32: u8 = 0;
pub(super) const BF16: u8 = 1;
pub(super) const F16: u8 = 2;

/// Quotients are brought below it, where conversion to integers still works; the packs saturate the rest. On the
/// other side conversion fails to the smallest integer, which is as good.
const MOST: f32 = 1e9;

/// Bytes of one value.
pub(super) const fn size(d: u8) -> usize {
    if d == F32 { 4 } else { 2 }
}

/// Eight values as f32.
///
/// # Safety
/// `from` is readable for 8 values.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) unsafe fn load<const D: u8>(from: *const u8) -> __m256 {
    // SAFETY: by contract.
    unsafe {
        match D {
            BF16 => {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
            _ => _mm256_loadu_ps(from.cast()),
        }
    }
}

/// A whole block.
///
/// # Safety
/// `from` is readable for 32 values.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) unsafe fn load32<const D: u8>(from: *const u8) -> [__m256; 4] {
    let step = 8 * size(D);
    // SAFETY: by contract.
    unsafe {
        [
            load::<D>(from),
            load::<D>(from.add(step)),
            load::<D>(from.add(2 * step)),
            load::<D>(from.add(3 * step)),
        ]
    }
}

/// The block that starts at `from`, zeros from the `n`th value on.
///
/// # Safety
/// `from` is readable for `n` values, at most 32.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) unsafe fn load_block<const D: u8>(from: *const u8, n: usize) -> [__m256; 4] {
    let mut block = [0u8; 128];
    // SAFETY: 32 values of any format have room in the block.
    unsafe {
        copy_nonoverlapping(from, block.as_mut_ptr(), n * size(D));
        load32::<D>(block.as_ptr())
    }
}

/// Asks for the lines one page ahead of the block at `from`: the hardware's prefetchers stop at every page.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
#[allow(unused_unsafe, reason = "the intrinsic became a safe function")]
pub(super) fn prefetch<const D: u8>(from: *const u8) {
    for line in 0..size(D) / 2 {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(4096 + 64 * line).cast()) };
    }
}

/// Largest magnitude so far, as bits, of which infinities and NaN have the most.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) fn top_of(top: __m256i, x: __m256) -> __m256i {
    _mm256_max_epu32(top, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fff_ffff)))
}

/// Whether the largest magnitude is finite.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) fn finite(top: __m256i) -> bool {
    _mm256_movemask_epi8(_mm256_cmpgt_epi32(top, _mm256_set1_epi32(0x7f7f_ffff))) == 0
}

/// Eight quotients, rounded by the conversion itself (to nearest, ties to even).
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) fn whole(quotient: __m256) -> __m256i {
    _mm256_cvtps_epi32(_mm256_min_ps(quotient, _mm256_set1_ps(MOST)))
}

/// The bounds of all codes, and how many were moved to them.
pub(super) struct Clamp {
    lo: __m256i,
    hi: __m256i,
    pub(super) clipped: u64,
}

impl Clamp {
    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    pub(super) fn new(qmin: i32, qmax: i32) -> Self {
        Self { lo: _mm256_set1_epi16(qmin as i16), hi: _mm256_set1_epi16(qmax as i16), clipped: 0 }
    }

    /// The codes of 32 rounded quotients, one a byte, in order. `zero` are zero points of 16 bits, packed as the
    /// quotients of the first half are, and those of the second.
    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    pub(super) fn codes<const STORED: usize>(&mut self, whole: [__m256i; 4], zero: [__m256i; 2]) -> __m256i {
        let (bytes, kept) = self.narrow::<STORED>(whole, zero);
        self.clipped += u64::from((_mm256_movemask_epi8(kept) as u32).count_zeros());
        in_order(bytes)
    }

    /// As [`Clamp::codes`], where all but the last `new` were counted before.
    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    pub(super) fn last_codes<const STORED: usize>(
        &mut self,
        whole: [__m256i; 4],
        zero: [__m256i; 2],
        new: usize,
    ) -> __m256i {
        let (bytes, kept) = self.narrow::<STORED>(whole, zero);
        let moved = !(_mm256_movemask_epi8(in_order(kept)) as u32);
        self.clipped += u64::from((moved >> (32 - new)).count_ones());
        in_order(bytes)
    }

    /// Codes and whether they were inside the bounds, in the order of the packs.
    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    fn narrow<const STORED: usize>(
        &self,
        [a, b, c, d]: [__m256i; 4],
        zero: [__m256i; 2],
    ) -> (__m256i, __m256i) {
        let ab = _mm256_adds_epi16(_mm256_packs_epi32(a, b), zero[0]);
        let cd = _mm256_adds_epi16(_mm256_packs_epi32(c, d), zero[1]);
        let low = _mm256_max_epi16(_mm256_min_epi16(ab, self.hi), self.lo);
        let high = _mm256_max_epi16(_mm256_min_epi16(cd, self.hi), self.lo);
        let kept = _mm256_packs_epi16(_mm256_cmpeq_epi16(ab, low), _mm256_cmpeq_epi16(cd, high));
        let bytes = if STORED == 8 {
            // Signed or not: the low byte is the code.
            let byte = _mm256_set1_epi16(0xff);
            _mm256_packus_epi16(_mm256_and_si256(low, byte), _mm256_and_si256(high, byte))
        } else {
            _mm256_packs_epi16(low, high)
        };
        (bytes, kept)
    }
}

/// The packs work inside 128-bit lanes: lane l holds dword l of a, b, c and d.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
fn in_order(bytes: __m256i) -> __m256i {
    _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

/// The codes of rounded quotients that fit signed bytes, in order.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) fn plain([a, b, c, d]: [__m256i; 4]) -> __m256i {
    in_order(_mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)))
}

/// Two codes a byte.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
fn nibbles(bytes: __m256i) -> __m128i {
    let low = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
    let pairs = _mm256_maddubs_epi16(low, _mm256_set1_epi16(0x1001));
    let packed = _mm256_packus_epi16(pairs, pairs);
    _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b10_00>(packed))
}

/// Four codes a byte, in the lower half.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
fn quarters(bytes: __m256i) -> __m128i {
    let low = _mm256_and_si256(bytes, _mm256_set1_epi8(3));
    let pairs = _mm256_maddubs_epi16(low, _mm256_set1_epi16(0x0401));
    let quads = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x0010_0001));
    let packed = _mm256_shuffle_epi8(quads, _mm256_set1_epi32(0x0c08_0400));
    let order = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
    _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(packed, order))
}

/// Writes 32 codes.
///
/// # Safety
/// `out` is writeable for them, and aligned to `4 * STORED` bytes where `stream`.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) unsafe fn store<const STORED: usize>(bytes: __m256i, out: *mut u8, stream: bool) {
    // SAFETY: by contract.
    unsafe {
        match (STORED, stream) {
            (8, true) => _mm256_stream_si256(out.cast(), bytes),
            (8, false) => _mm256_storeu_si256(out.cast(), bytes),
            (4, true) => _mm_stream_si128(out.cast(), nibbles(bytes)),
            (4, false) => _mm_storeu_si128(out.cast(), nibbles(bytes)),
            _ => _mm_storel_epi64(out.cast(), quarters(bytes)),
        }
    }
}

/// Writes the first `n` codes; what is left of the last byte is 0.
///
/// # Safety
/// `out` is writeable for them; `n` is less than 32.
#[inline]
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) unsafe fn store_part<const STORED: usize>(bytes: __m256i, n: usize, out: *mut u8) {
    let place = _mm256_setr_epi8(
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27,
        28, 29, 30, 31,
    );
    let bytes = _mm256_and_si256(bytes, _mm256_cmpgt_epi8(_mm256_set1_epi8(n as i8), place));
    let mut all = [0u8; 32];
    // SAFETY: all codes have room in `all`, those of the `n` in `out`.
    unsafe {
        store::<STORED>(bytes, all.as_mut_ptr(), false);
        copy_nonoverlapping(all.as_ptr(), out, (n * STORED).div_ceil(8));
    }
}
