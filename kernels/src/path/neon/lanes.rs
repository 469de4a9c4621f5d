//! Blocks of 32 values in registers: loading and widening, rounding and clamping, packing and storing.

use std::arch::aarch64::*;
use std::arch::asm;
use std::array::from_fn;
use std::ptr::copy_nonoverlapping;

/// Formats as const parameters.
pub(super) const F32: u8 = 0;
pub(super) const BF16: u8 = 1;
pub(super) const F16: u8 = 2;

/// Values of a block.
pub(super) const BLOCK: usize = 32;

/// Values, four a register.
pub(super) type Floats = [float32x4_t; 8];

/// Rounded quotients, four a register.
pub(super) type Wholes = [int32x4_t; 8];

/// Codes, one a byte.
pub(super) type Codes = [uint8x16_t; 2];

/// Bytes of one value.
pub(super) const fn size(d: u8) -> usize {
    if d == F32 { 4 } else { 2 }
}

/// Eight values as f32.
///
/// # Safety
/// `from` is readable for 8 values.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load8<const D: u8>(from: *const u8) -> [float32x4_t; 2] {
    // SAFETY: by contract; bytes may lie anywhere.
    unsafe {
        if D == F32 {
            return [vreinterpretq_f32_u8(vld1q_u8(from)), vreinterpretq_f32_u8(vld1q_u8(from.add(16)))];
        }
        let narrow = vreinterpretq_u16_u8(vld1q_u8(from));
        if D == F16 {
            return widen_f16(narrow);
        }
        let none = vdupq_n_u16(0);
        [vzip1q_u16(none, narrow), vzip2q_u16(none, narrow)].map(|x| vreinterpretq_f32_u16(x))
    }
}

/// Binary16 as f32; the intrinsics for it are younger than the compilers that this crate is built by.
#[inline]
#[target_feature(enable = "neon")]
fn widen_f16(narrow: uint16x8_t) -> [float32x4_t; 2] {
    let (low, high);
    // SAFETY: two instructions of every aarch64, from register to registers.
    unsafe {
        asm!(
            "fcvtl {low:v}.4s, {narrow:v}.4h",
            "fcvtl2 {high:v}.4s, {narrow:v}.8h",
            narrow = in(vreg) narrow,
            low = out(vreg) low,
            high = lateout(vreg) high,
            options(pure, nomem, nostack),
        );
    }
    [low, high]
}

/// A whole block.
///
/// # Safety
/// `from` is readable for 32 values.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn load<const D: u8>(from: *const u8) -> Floats {
    let step = 8 * size(D);
    // SAFETY: by contract.
    let [[a, b], [c, d], [e, f], [g, h]] = unsafe {
        [
            load8::<D>(from),
            load8::<D>(from.add(step)),
            load8::<D>(from.add(2 * step)),
            load8::<D>(from.add(3 * step)),
        ]
    };
    [a, b, c, d, e, f, g, h]
}

/// The block that starts at `from`, zeros from the `n`th value on.
///
/// # Safety
/// `from` is readable for `n` values, at most 32.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn load_part<const D: u8>(from: *const u8, n: usize) -> Floats {
    let mut block = [0u8; 4 * BLOCK];
    // SAFETY: 32 values of any format have room in the block.
    unsafe {
        copy_nonoverlapping(from, block.as_mut_ptr(), n * size(D));
        load::<D>(block.as_ptr())
    }
}

/// The largest magnitudes so far; NaN where there was one.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn top_of(top: float32x4_t, x: Floats) -> float32x4_t {
    let [a, b, c, d, e, f, g, h] = x.map(|x| vabsq_f32(x));
    let (ab, cd, ef, gh) = (vmaxq_f32(a, b), vmaxq_f32(c, d), vmaxq_f32(e, f), vmaxq_f32(g, h));
    vmaxq_f32(top, vmaxq_f32(vmaxq_f32(ab, cd), vmaxq_f32(ef, gh)))
}

/// Whether the largest magnitude is finite.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn finite(top: float32x4_t) -> bool {
    vmaxvq_f32(top) < f32::INFINITY
}

/// How values of a group become quotients.
#[derive(Clone, Copy)]
pub(super) struct Divisor {
    scale: float32x4_t,
    inverse: float32x4_t,
    way: Way,
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// By the reciprocal, which is what the arithmetic asks for.
    Multiply,
    /// By the reciprocal, and once more by division in the rare block where that may round to another code.
    Approach,
    /// Where the reciprocal is not precise enough.
    Divide,
}

/// Products this far from the nearest integer may lie on the other side of a tie than the quotient. Both are within
/// one unit in the last place of the tie then, and such a unit is at most 2^-16 for magnitudes that have codes: those
/// of 256 and more are clipped either way.
const NEAR_TIE: f32 = 0.5 - 1.0 / 32768.0;

impl Divisor {
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn new(scale: f32, recip: bool) -> Self {
        // From 2^-126 to 2^126, so that the reciprocal is a normal number.
        let reciprocal_is_normal = (f32::MIN_POSITIVE..=f32::MIN_POSITIVE.recip()).contains(&scale);
        let way = match (recip, reciprocal_is_normal) {
            (true, _) => Way::Multiply,
            (false, true) => Way::Approach,
            (false, false) => Way::Divide,
        };
        Self { scale: vdupq_n_f32(scale), inverse: vdupq_n_f32(1.0 / scale), way }
    }

    /// The quotients of a block, rounded to nearest, ties to even. Those that do not fit saturate.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn wholes(&self, x: Floats) -> Wholes {
        if self.way == Way::Divide {
            return self.divided(x);
        }
        let products = x.map(|x| vmulq_f32(x, self.inverse));
        if self.way == Way::Multiply {
            return products.map(|p| vcvtnq_s32_f32(p));
        }
        let whole = products.map(|p| vrndnq_f32(p));
        let mut near = vdupq_n_u32(0);
        for (p, whole) in products.into_iter().zip(whole) {
            near = vorrq_u32(near, vcageq_f32(vsubq_f32(p, whole), vdupq_n_f32(NEAR_TIE)));
        }
        if vmaxvq_u32(near) != 0 {
            return self.divided(x);
        }
        whole.map(|whole| vcvtq_s32_f32(whole))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn divided(&self, x: Floats) -> Wholes {
        x.map(|x| vcvtnq_s32_f32(vdivq_f32(x, self.scale)))
    }
}

/// The bounds of all codes, and how many were moved to them.
pub(super) struct Clamp {
    lo: int16x8_t,
    hi: int16x8_t,
    moved: int64x2_t,
}

impl Clamp {
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn new(qmin: i32, qmax: i32) -> Self {
        Self { lo: vdupq_n_s16(qmin as i16), hi: vdupq_n_s16(qmax as i16), moved: vdupq_n_s64(0) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn clipped(&self) -> u64 {
        vaddvq_s64(self.moved) as u64
    }

    /// The codes of rounded quotients. `zero` are zero points of 16 bits.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn codes(&mut self, [a, b, c, d, e, f, g, h]: Wholes, zero: int16x8_t) -> Codes {
        let codes = [[a, b], [c, d], [e, f], [g, h]]
            .map(|[low, high]| vqaddq_s16(vqmovn_high_s32(vqmovn_s32(low), high), zero));
        let kept = codes.map(|code| vmaxq_s16(vminq_s16(code, self.hi), self.lo));
        let mut moved = vdupq_n_s16(4);
        for i in 0..4 {
            // A comparison that holds is -1.
            moved = vaddq_s16(moved, vreinterpretq_s16_u16(vceqq_s16(codes[i], kept[i])));
        }
        self.moved = vpadalq_s32(self.moved, vpaddlq_s16(moved));
        // Signed or not: the low byte is the code.
        let [a, b, c, d] = kept.map(|kept| vreinterpretq_u8_s16(kept));
        [vuzp1q_u8(a, b), vuzp1q_u8(c, d)]
    }
}

/// The codes of rounded quotients that fit signed bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn plain([a, b, c, d, e, f, g, h]: Wholes) -> Codes {
    [[a, b, c, d], [e, f, g, h]].map(|wholes| {
        let [a, b, c, d] = wholes.map(|whole| vreinterpretq_u16_s32(whole));
        let [ab, cd] = [vuzp1q_u16(a, b), vuzp1q_u16(c, d)].map(|pair| vreinterpretq_u8_u16(pair));
        vuzp1q_u8(ab, cd)
    })
}

/// Two codes a byte.
#[inline]
#[target_feature(enable = "neon")]
fn nibbles([a, b]: Codes) -> uint8x16_t {
    vsliq_n_u8::<4>(vuzp1q_u8(a, b), vuzp2q_u8(a, b))
}

/// Four codes a byte.
#[inline]
#[target_feature(enable = "neon")]
fn quarters([a, b]: Codes) -> uint8x8_t {
    let pairs = vsliq_n_u8::<2>(vuzp1q_u8(a, b), vuzp2q_u8(a, b));
    vget_low_u8(vsliq_n_u8::<4>(vuzp1q_u8(pairs, pairs), vuzp2q_u8(pairs, pairs)))
}

/// Writes a block of codes of `STORED` bits.
///
/// # Safety
/// `out` is writeable for them.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn store<const STORED: usize>(codes: Codes, out: *mut u8) {
    // SAFETY: by contract.
    unsafe {
        match STORED {
            8 => {
                vst1q_u8(out, codes[0]);
                vst1q_u8(out.add(16), codes[1]);
            }
            4 => vst1q_u8(out, nibbles(codes)),
            _ => vst1_u8(out, quarters(codes)),
        }
    }
}

/// Writes the first `n` codes; what is left of the last byte is 0.
///
/// # Safety
/// `out` is writeable for them; `n` is less than 32.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn store_part<const STORED: usize>(codes: Codes, n: usize, out: *mut u8) {
    let places: [u8; BLOCK] = from_fn(|i| i as u8);
    let mut all = [0u8; BLOCK];
    // SAFETY: `places` has 32 bytes; all codes have room in `all`, those of the `n` in `out`.
    unsafe {
        let used = |i: usize| vcltq_u8(vld1q_u8(places.as_ptr().add(16 * i)), vdupq_n_u8(n as u8));
        let codes = [vandq_u8(codes[0], used(0)), vandq_u8(codes[1], used(1))];
        store::<STORED>(codes, all.as_mut_ptr());
        copy_nonoverlapping(all.as_ptr(), out, (n * STORED).div_ceil(8));
    }
}
