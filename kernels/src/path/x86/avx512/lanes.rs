//! Blocks of 64 values in registers: loading and widening, rounding and clamping, packing and storing.

use std::arch::x86_64::*;

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

/// Sixteen values as f32.
///
/// # Safety
/// `from` is readable for 16 values.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) unsafe fn load<const D: u8>(from: *const u8) -> __m512 {
    // SAFETY: by contract.
    unsafe {
        match D {
            BF16 => {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
            _ => _mm512_loadu_ps(from.cast()),
        }
    }
}

/// The block that starts at `from`, zeros from the `n`th value on.
///
/// # Safety
/// `from` is readable for `n` values, at most 64.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) unsafe fn load_block<const D: u8>(from: *const u8, n: usize) -> [__m512; 4] {
    let mut block = [_mm512_setzero_ps(); 4];
    for (i, x) in block.iter_mut().enumerate() {
        let left = n.saturating_sub(16 * i);
        if left == 0 {
            break;
        }
        // SAFETY: they lie inside the `n` values.
        *x = unsafe { load_part::<D>(from.wrapping_add(16 * i * size(D)), left.min(16)) };
    }
    block
}

/// The first `n` values, and zeros.
///
/// # Safety
/// `from` is readable for `n` values, at most 16.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) unsafe fn load_part<const D: u8>(from: *const u8, n: usize) -> __m512 {
    let mask = ((1u32 << n) - 1) as u16;
    // SAFETY: masked lanes are not read.
    unsafe {
        match D {
            BF16 => {
                let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
            F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.cast())),
            _ => _mm512_maskz_loadu_ps(mask, from.cast()),
        }
    }
}

/// A whole block.
///
/// # Safety
/// `from` is readable for 64 values.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) unsafe fn load64<const D: u8>(from: *const u8) -> [__m512; 4] {
    let step = 16 * size(D);
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

/// Asks for the lines one page ahead of `N` values at `from`: the hardware's prefetchers stop at every page.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
#[allow(unused_unsafe, reason = "the intrinsic became a safe function")]
pub(super) fn prefetch<const D: u8, const N: usize>(from: *const u8) {
    for line in 0..(N * size(D)).div_ceil(64) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(4096 + 64 * line).cast()) };
    }
}

/// Largest magnitude so far, as bits, of which infinities and NaN have the most.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn top_of(top: __m512i, x: __m512) -> __m512i {
    _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fff_ffff)))
}

/// Whether the largest magnitude is finite.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn finite(top: __m512i) -> bool {
    _mm512_cmpgt_epu32_mask(top, _mm512_set1_epi32(0x7f7f_ffff)) == 0
}

/// Sixteen quotients, rounded by the conversion itself (to nearest, ties to even).
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn whole(quotient: __m512) -> __m512i {
    _mm512_cvtps_epi32(_mm512_min_ps(quotient, _mm512_set1_ps(MOST)))
}

/// The bounds of all codes, and how many were moved to them.
pub(super) struct Clamp {
    lo: __m512i,
    hi: __m512i,
    pub(super) clipped: u64,
}

impl Clamp {
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    pub(super) fn new(qmin: i32, qmax: i32) -> Self {
        Self { lo: _mm512_set1_epi16(qmin as i16), hi: _mm512_set1_epi16(qmax as i16), clipped: 0 }
    }

    /// The codes of 64 rounded quotients, one a byte, in order. `zero` are zero points of 16 bits, packed as the
    /// quotients of the first half are, and those of the second.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    pub(super) fn codes<const STORED: usize>(&mut self, whole: [__m512i; 4], zero: [__m512i; 2]) -> __m512i {
        let [a, b, c, d] = whole;
        let ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), zero[0]);
        let cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), zero[1]);
        let low = _mm512_max_epi16(_mm512_min_epi16(ab, self.hi), self.lo);
        let high = _mm512_max_epi16(_mm512_min_epi16(cd, self.hi), self.lo);
        let moved = (_mm512_cmpneq_epi16_mask(ab, low), _mm512_cmpneq_epi16_mask(cd, high));
        self.clipped += u64::from(moved.0.count_ones() + moved.1.count_ones());
        let bytes = if STORED == 8 {
            // Signed or not: the low byte is the code.
            let byte = _mm512_set1_epi16(0xff);
            _mm512_packus_epi16(_mm512_and_si512(low, byte), _mm512_and_si512(high, byte))
        } else {
            _mm512_packs_epi16(low, high)
        };
        in_order(bytes)
    }
}

/// The packs work inside 128-bit lanes: lane l holds dword l of four vectors.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn in_order(bytes: __m512i) -> __m512i {
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_epi32(order, bytes)
}

/// The codes of rounded quotients that fit signed bytes, in order.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn plain([a, b, c, d]: [__m512i; 4]) -> __m512i {
    in_order(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)))
}

/// Two codes a byte.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn nibbles(bytes: __m512i) -> __m256i {
    let low = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
    _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(low, _mm512_set1_epi16(0x1001)))
}

/// Four codes a byte.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
fn quarters(bytes: __m512i) -> __m128i {
    let low = _mm512_and_si512(bytes, _mm512_set1_epi8(3));
    let pairs = _mm512_maddubs_epi16(low, _mm512_set1_epi16(0x0401));
    _mm512_cvtepi32_epi8(_mm512_madd_epi16(pairs, _mm512_set1_epi32(0x0010_0001)))
}

/// Writes 64 codes.
///
/// # Safety
/// `out` is writeable for them, and aligned to `8 * STORED` bytes where `stream`.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) unsafe fn store<const STORED: usize>(bytes: __m512i, out: *mut u8, stream: bool) {
    // SAFETY: by contract.
    unsafe {
        match (STORED, stream) {
            (8, true) => _mm512_stream_si512(out.cast(), bytes),
            (8, false) => _mm512_storeu_si512(out.cast(), bytes),
            (4, true) => _mm256_stream_si256(out.cast(), nibbles(bytes)),
            (4, false) => _mm256_storeu_si256(out.cast(), nibbles(bytes)),
            (_, true) => _mm_stream_si128(out.cast(), quarters(bytes)),
            (_, false) => _mm_storeu_si128(out.cast(), quarters(bytes)),
        }
    }
}

/// Writes the first `n` codes; what is left of the last byte is 0.
///
/// # Safety
/// `out` is writeable for them; `n` is less than 64.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) unsafe fn store_part<const STORED: usize>(bytes: __m512i, n: usize, out: *mut u8) {
    if n == 32 {
        // A usual group. Masked stores are slower.
        // SAFETY: by contract.
        unsafe {
            match STORED {
                8 => _mm256_storeu_si256(out.cast(), _mm512_castsi512_si256(bytes)),
                4 => _mm_storeu_si128(out.cast(), _mm256_castsi256_si128(nibbles(bytes))),
                _ => _mm_storel_epi64(out.cast(), quarters(bytes)),
            }
        }
        return;
    }
    let bytes = _mm512_maskz_mov_epi8((1u64 << n) - 1, bytes);
    let mask = (1u64 << (n * STORED).div_ceil(8)) - 1;
    // SAFETY: masked bytes are not written.
    unsafe {
        match STORED {
            8 => _mm512_mask_storeu_epi8(out.cast(), mask, bytes),
            4 => _mm256_mask_storeu_epi8(out.cast(), mask as u32, nibbles(bytes)),
            _ => _mm_mask_storeu_epi8(out.cast(), mask as u16, quarters(bytes)),
        }
    }
}
