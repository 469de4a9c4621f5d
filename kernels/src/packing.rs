//! Several codes a byte, first in the lowest bits; also at places that begin inside a byte.

use crate::path::Kernels;

/// Bytes that `n` codes take.
pub fn packed_len(n: usize, bits: u8) -> usize {
    match bits {
        8 => n,
        _ => n.div_ceil(usize::from(8 / bits)),
    }
}

/// Packs codes that lie one a byte (only their low `bits` count); the last byte is padded with 0.
///
/// # Panics
/// Unless `out.len() == packed_len(codes.len(), bits)` and `bits` is 2, 4 or 8.
pub fn pack(codes: &[u8], bits: u8, out: &mut [u8]) {
    assert!(matches!(bits, 2 | 4 | 8), "codes of {bits} bits");
    assert_eq!(out.len(), packed_len(codes.len(), bits), "bytes for {} codes", codes.len());
    put(Kernels::best(), codes, bits, out, 0);
}

/// Unpacks `out.len()` codes, one a byte, sign-extended where `signed`.
///
/// # Panics
/// Unless `bytes.len() == packed_len(out.len(), bits)` and `bits` is 2, 4 or 8.
pub fn unpack(bytes: &[u8], bits: u8, signed: bool, out: &mut [u8]) {
    assert!(matches!(bits, 2 | 4 | 8), "codes of {bits} bits");
    assert_eq!(bytes.len(), packed_len(out.len(), bits), "bytes for {} codes", out.len());
    take(Kernels::best(), bytes, bits, signed, 0, out);
}

/// Writes codes from a bit on. A byte is assigned when its lowest bits are written and or-ed after that, so writing
/// in order leaves neither old bits nor unpadded ends.
pub(crate) fn put(kernels: &Kernels, codes: &[u8], bits: u8, out: &mut [u8], bit: usize) {
    let mask = low_bits(bits);
    let (mut byte, mut shift) = (bit / 8, bit % 8);
    let mut codes = codes;
    if bits == 8 {
        out[byte..byte + codes.len()].copy_from_slice(codes);
        return;
    }
    while let (true, Some((&code, rest))) = (shift != 0, codes.split_first()) {
        out[byte] |= (code & mask) << shift;
        codes = rest;
        shift += usize::from(bits);
        if shift == 8 {
            (byte, shift) = (byte + 1, 0);
        }
    }
    let whole = codes.len() / usize::from(8 / bits);
    let (body, rest) = codes.split_at(whole * usize::from(8 / bits));
    kernels.pack_bytes(body, &mut out[byte..byte + whole], bits);
    if !rest.is_empty() {
        let last = rest.iter().rev().fold(0, |acc, &code| (acc << bits) | (code & mask));
        out[byte + whole] = last;
    }
}

/// Reads codes from a bit on, sign-extended where `signed`.
pub(crate) fn take(kernels: &Kernels, bytes: &[u8], bits: u8, signed: bool, bit: usize, out: &mut [u8]) {
    let (mut byte, mut shift) = (bit / 8, bit % 8);
    if bits == 8 {
        out.copy_from_slice(&bytes[byte..byte + out.len()]);
        return;
    }
    let mask = low_bits(bits);
    let sign = if signed { 1 << (bits - 1) } else { 0 };
    let mut head = 0;
    while shift != 0 && head < out.len() {
        out[head] = (((bytes[byte] >> shift) & mask) ^ sign).wrapping_sub(sign);
        head += 1;
        shift += usize::from(bits);
        if shift == 8 {
            (byte, shift) = (byte + 1, 0);
        }
    }
    let out = &mut out[head..];
    let whole = out.len() / usize::from(8 / bits);
    let (body, rest) = out.split_at_mut(whole * usize::from(8 / bits));
    kernels.unpack_bytes(&bytes[byte..byte + whole], body, bits, signed);
    for (i, out) in rest.iter_mut().enumerate() {
        let code = (bytes[byte + whole] >> (i * usize::from(bits))) & mask;
        *out = (code ^ sign).wrapping_sub(sign);
    }
}

fn low_bits(bits: u8) -> u8 {
    (0xff_u32 >> (8 - u32::from(bits))) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_code_lies_lowest() {
        let mut out = [0xff; 2];
        pack(&[1, 0xff, 3], 4, &mut out);
        assert_eq!(out, [0xf1, 0x03]);
        let mut out = [0xff; 2];
        pack(&[1, 2, 3, 0, 0xfe], 2, &mut out);
        assert_eq!(out, [0b0011_1001, 0b10]);
    }

    #[test]
    fn every_start_inside_a_byte() {
        for kernels in Kernels::all() {
            for bits in [2u8, 4] {
                let per_byte = usize::from(8 / bits);
                for start in 0..per_byte {
                    for n in 0..70 {
                        let codes: Vec<u8> = (0..n).map(|i| (i * 7 + 3) as u8).collect();
                        let mut out = vec![0xaa; packed_len(start + n, bits)];
                        if start > 0 {
                            out[0] = 0;
                        }
                        put(kernels, &codes, bits, &mut out, start * usize::from(bits));
                        let mut back = vec![0; n];
                        take(kernels, &out, bits, false, start * usize::from(bits), &mut back);
                        let low: Vec<u8> = codes.iter().map(|c| c & low_bits(bits)).collect();
                        assert_eq!(back, low, "{} {bits} {start} {n}", kernels.name());
                        take(kernels, &out, bits, true, start * usize::from(bits), &mut back);
                        let sign = 1 << (bits - 1);
                        assert!(back.iter().zip(&low).all(|(b, l)| *b == (l ^ sign).wrapping_sub(sign)));
                    }
                }
            }
        }
    }
}
