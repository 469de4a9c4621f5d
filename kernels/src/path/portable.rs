//! The arithmetic as plain loops over private slices. Each ISA path compiles these again with its own target
//! features, so they are written for the auto-vectoriser: no branches in the loops, lanes kept apart in reductions.

use crate::path::{Step, TileRange};
use crate::scheme::{Affine, Arith, Range};

/// Adding it rounds |v| < 2^22 to an integer, ties to even, and leaves that integer in the low mantissa bits.
/// Its own low byte is 0, so the sum's low byte is the integer modulo 256.
const MAGIC: f32 = 12_582_912.0;

const LANES: usize = 32;

/// Smallest and largest value with zero, and whether all bits were those of finite values.
#[inline(always)]
pub(super) fn range(values: &[f32]) -> TileRange {
    let mut min = [0f32; LANES];
    let mut max = [0f32; LANES];
    let mut top = [0u32; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            let v = block[i];
            min[i] = if v < min[i] { v } else { min[i] };
            max[i] = if v > max[i] { v } else { max[i] };
            top[i] = top[i].max(v.to_bits() & 0x7fff_ffff);
        }
    }
    for (i, &v) in rest.iter().enumerate() {
        min[i] = if v < min[i] { v } else { min[i] };
        max[i] = if v > max[i] { v } else { max[i] };
        top[i] = top[i].max(v.to_bits() & 0x7fff_ffff);
    }
    let mut range = Range::EMPTY;
    let mut most = 0;
    for i in 0..LANES {
        range.merge(Range { min: min[i], max: max[i] });
        most = top[i].max(most);
    }
    TileRange { range, finite: most < 0x7f80_0000 }
}

/// Codes of one domain's values, one a byte; says how many were clipped.
#[inline(always)]
pub(super) fn encode(values: &[f32], codes: &mut [u8], step: &Step) -> u64 {
    match step.arith {
        Arith::Div => encode_by(values, codes, step, |x| x / step.scale),
        Arith::Recip => encode_by(values, codes, step, |x| x * step.inverse),
    }
}

#[inline(always)]
fn encode_by(values: &[f32], codes: &mut [u8], step: &Step, quotient: impl Fn(f32) -> f32) -> u64 {
    let mut clipped = 0u32;
    for (&x, code) in values.iter().zip(codes) {
        let r = round(quotient(x), step.lo, step.hi);
        clipped += u32::from((r < step.lo) | (r > step.hi));
        *code = low_byte(clamp(r, step.lo, step.hi)).wrapping_add(step.zero_point as u8);
    }
    u64::from(clipped)
}

/// Codes of a piece of a row whose every column has parameters of its own.
#[inline(always)]
pub(super) fn encode_columns(
    values: &[f32],
    codes: &mut [u8],
    scales: &[f32],
    zero_points: &[i32],
    affine: &Affine,
) -> u64 {
    let mut clipped = 0u32;
    let (qmin, qmax) = (affine.qmin, affine.qmax);
    let columns = scales.iter().zip(zero_points);
    for ((&x, code), (&scale, &zero_point)) in values.iter().zip(codes).zip(columns) {
        let v = match affine.arith {
            Arith::Div => x / scale,
            Arith::Recip => x * (1.0 / scale),
        };
        let (lo, hi) = ((qmin - zero_point) as f32, (qmax - zero_point) as f32);
        let r = round(v, lo, hi);
        clipped += u32::from((r < lo) | (r > hi));
        *code = low_byte(clamp(r, lo, hi)).wrapping_add(zero_point as u8);
    }
    u64::from(clipped)
}

/// Widens every column's range by a piece of a row.
#[inline(always)]
pub(super) fn merge_columns(values: &[f32], min: &mut [f32], max: &mut [f32]) {
    for ((&v, min), max) in values.iter().zip(min).zip(max) {
        *min = if v < *min { v } else { *min };
        *max = if v > *max { v } else { *max };
    }
}

/// Values of codes that lie one a byte.
#[inline(always)]
pub(super) fn decode(codes: &[u8], out: &mut [f32], scale: f32, zero_point: i32, signed: bool) {
    if signed {
        for (&code, out) in codes.iter().zip(out) {
            *out = (i32::from(code as i8) - zero_point) as f32 * scale;
        }
    } else {
        for (&code, out) in codes.iter().zip(out) {
            *out = (i32::from(code) - zero_point) as f32 * scale;
        }
    }
}

/// Values of codes whose every column has parameters of its own.
#[inline(always)]
pub(super) fn decode_columns(
    codes: &[u8],
    out: &mut [f32],
    scales: &[f32],
    zero_points: &[i32],
    signed: bool,
) {
    for (((&code, out), &scale), &zero_point) in codes.iter().zip(out).zip(scales).zip(zero_points) {
        let q = if signed { i32::from(code as i8) } else { i32::from(code) };
        *out = (q - zero_point) as f32 * scale;
    }
}

/// Packs whole bytes: `codes.len() == out.len() * (8 / bits)`.
#[inline(always)]
pub(super) fn pack(codes: &[u8], out: &mut [u8], bits: u8) {
    match bits {
        4 => {
            for (out, q) in out.iter_mut().zip(codes.as_chunks::<2>().0) {
                *out = (q[0] & 15) | (q[1] << 4);
            }
        }
        2 => {
            for (out, q) in out.iter_mut().zip(codes.as_chunks::<4>().0) {
                *out = (q[0] & 3) | ((q[1] & 3) << 2) | ((q[2] & 3) << 4) | (q[3] << 6);
            }
        }
        _ => out.copy_from_slice(codes),
    }
}

/// Unpacks whole bytes into codes, sign-extended where `signed`.
#[inline(always)]
pub(super) fn unpack(bytes: &[u8], codes: &mut [u8], bits: u8, signed: bool) {
    // Two's complement by flipping the sign bit and taking it off again.
    match bits {
        4 => {
            let sign = if signed { 8 } else { 0 };
            for (q, &byte) in codes.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                q[0] = ((byte & 15) ^ sign).wrapping_sub(sign);
                q[1] = ((byte >> 4) ^ sign).wrapping_sub(sign);
            }
        }
        2 => {
            let sign = if signed { 2 } else { 0 };
            for (q, &byte) in codes.as_chunks_mut::<4>().0.iter_mut().zip(bytes) {
                q[0] = ((byte & 3) ^ sign).wrapping_sub(sign);
                q[1] = (((byte >> 2) & 3) ^ sign).wrapping_sub(sign);
                q[2] = (((byte >> 4) & 3) ^ sign).wrapping_sub(sign);
                q[3] = ((byte >> 6) ^ sign).wrapping_sub(sign);
            }
        }
        _ => codes.copy_from_slice(bytes),
    }
}

/// Widens binary16 bits, exactly and without branches.
#[inline(always)]
pub(super) fn widen_f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let sign = u32::from(bits & 0x8000) << 16;
    // The exponent is 15 - 127 too low; multiplying by 2^112 mends it, for subnormals too. The product is exact, and
    // of infinities and NaN only the exponent has to be filled up.
    let scaled = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled | special | sign)
}

/// Widens bfloat16 bits, exactly.
#[inline(always)]
pub(super) fn widen_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[inline(always)]
fn clamp(v: f32, lo: f32, hi: f32) -> f32 {
    let v = if v < lo { lo } else { v };
    if v > hi { hi } else { v }
}

/// The nearest integer, ties to even, brought next to the bounds first. Clamping to whole bounds after rounding is
/// the same as before it, and the one more on either side tells what has to be clamped.
#[inline(always)]
fn round(v: f32, lo: f32, hi: f32) -> f32 {
    (clamp(v, lo - 1.0, hi + 1.0) + MAGIC) - MAGIC
}

/// The low byte of a whole number.
#[inline(always)]
fn low_byte(whole: f32) -> u8 {
    (whole + MAGIC).to_bits() as u8
}
