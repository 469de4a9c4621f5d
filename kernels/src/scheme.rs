//! The affine integer schemes, their parameters, and the slices parameters travel in.

use std::fmt;
use std::str::FromStr;

use crate::fault::{Fault, by_name};

/// The smallest normal f32; a scale below it is replaced by 1.
pub const TINY: f32 = f32::MIN_POSITIVE;

/// A number format, by one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Signed 8 bits.
    Int8,
    /// Unsigned 8 bits.
    UInt8,
    /// Signed 4 bits.
    Int4,
    /// Unsigned 4 bits.
    UInt4,
    /// Signed 2 bits.
    Int2,
    /// Unsigned 2 bits.
    UInt2,
}

impl Scheme {
    /// All schemes.
    pub const ALL: [Self; 6] = [Self::Int8, Self::UInt8, Self::Int4, Self::UInt4, Self::Int2, Self::UInt2];

    /// The scheme's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::UInt8 => "uint8",
            Self::Int4 => "int4",
            Self::UInt4 => "uint4",
            Self::Int2 => "int2",
            Self::UInt2 => "uint2",
        }
    }

    /// One line for listings.
    pub fn description(self) -> &'static str {
        match self {
            Self::Int8 => "8-bit signed, symmetric -127..127 (or asymmetric -128..127); ONNX QuantizeLinear",
            Self::UInt8 => "8-bit unsigned, asymmetric 0..255; ONNX DynamicQuantizeLinear",
            Self::Int4 => "4-bit signed, symmetric -8..7, two codes a byte; ONNX INT4",
            Self::UInt4 => "4-bit unsigned, asymmetric 0..15, two codes a byte; ONNX UINT4",
            Self::Int2 => "2-bit signed, symmetric -2..1, four codes a byte; ONNX INT2",
            Self::UInt2 => "2-bit unsigned, asymmetric 0..3, four codes a byte; ONNX UINT2",
        }
    }

    /// Bits of one code.
    pub fn bits(self) -> u8 {
        match self {
            Self::Int8 | Self::UInt8 => 8,
            Self::Int4 | Self::UInt4 => 4,
            Self::Int2 | Self::UInt2 => 2,
        }
    }

    /// Whether codes are two's complement.
    pub fn signed(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4 | Self::Int2)
    }

    /// The mapping taken where none is named.
    pub fn default_mapping(self) -> Mapping {
        if self.signed() { Mapping::Symmetric } else { Mapping::Asymmetric }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Scheme {
    type Err = Fault;

    fn from_str(word: &str) -> Result<Self, Fault> {
        by_name("scheme", word, &Self::ALL, |s| s.name())
    }
}

/// Where a scheme's codes lie around zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mapping {
    /// The zero point is 0 and the scale follows the largest magnitude.
    Symmetric,
    /// The codes span `[min(x, 0), max(x, 0)]`.
    Asymmetric,
}

impl Mapping {
    /// Both mappings.
    pub const ALL: [Self; 2] = [Self::Symmetric, Self::Asymmetric];

    /// The mapping's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Symmetric => "symmetric",
            Self::Asymmetric => "asymmetric",
        }
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Mapping {
    type Err = Fault;

    fn from_str(word: &str) -> Result<Self, Fault> {
        by_name("mapping", word, &Self::ALL, |m| m.name())
    }
}

/// How a value meets its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arith {
    /// `x / s` (ONNX).
    Div,
    /// `x * (1 / s)` (torch).
    Recip,
}

/// A scheme with everything that arithmetic needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Affine {
    /// The number format.
    pub scheme: Scheme,
    /// Where codes lie around zero.
    pub mapping: Mapping,
    /// Division or multiplication by the reciprocal.
    pub arith: Arith,
    /// Smallest code.
    pub qmin: i32,
    /// Largest code.
    pub qmax: i32,
    /// Bits of one code.
    pub bits: u8,
    /// Whether codes are two's complement.
    pub signed: bool,
}

impl Affine {
    /// The scheme's arithmetic under a mapping, or under its default one.
    pub fn new(scheme: Scheme, mapping: Option<Mapping>) -> Result<Self, Fault> {
        let mapping = mapping.unwrap_or(scheme.default_mapping());
        let (qmin, qmax) = match (scheme, mapping) {
            (Scheme::Int8, Mapping::Symmetric) => (-127, 127),
            (Scheme::Int8, Mapping::Asymmetric) => (-128, 127),
            (Scheme::UInt8, Mapping::Asymmetric) => (0, 255),
            (Scheme::Int4, Mapping::Symmetric) => (-8, 7),
            (Scheme::UInt4, Mapping::Asymmetric) => (0, 15),
            (Scheme::Int2, Mapping::Symmetric) => (-2, 1),
            (Scheme::UInt2, Mapping::Asymmetric) => (0, 3),
            _ => return Err(Fault::UnsupportedMapping { scheme, mapping }),
        };
        let (bits, signed) = (scheme.bits(), scheme.signed());
        Ok(Self { scheme, mapping, arith: Arith::Div, qmin, qmax, bits, signed })
    }

    pub(crate) fn rule(&self) -> Rule {
        let (qmin, qmax) = (self.qmin as f32, self.qmax as f32);
        Rule { mapping: self.mapping, divisor: self.divisor(), qmin, qmax }
    }

    /// What the range is divided by to give the scale: `qmax - qmin`, or half of it for a symmetric mapping.
    pub fn divisor(&self) -> f32 {
        let span = (self.qmax - self.qmin) as f32;
        match self.mapping {
            Mapping::Symmetric => span / 2.0,
            Mapping::Asymmetric => span,
        }
    }
}

/// Smallest and largest value of a domain, zero included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    /// `min(x, 0)`, never -0.
    pub min: f32,
    /// `max(x, 0)`.
    pub max: f32,
}

impl Range {
    /// The range of no values.
    pub const EMPTY: Self = Self { min: 0.0, max: 0.0 };

    /// Widens this range by another part of the same domain.
    pub fn merge(&mut self, other: Self) {
        self.min = if other.min < self.min { other.min } else { self.min };
        self.max = if other.max > self.max { other.max } else { self.max };
    }
}

impl Default for Range {
    fn default() -> Self {
        Self::EMPTY
    }
}

/// Scale, zero point, and whether the domain was degenerate (its scale replaced by 1).
///
/// # Errors
/// [`Fault::RangeOverflow`] (with index 0) where an asymmetric mapping's `max - min` is not finite.
pub fn params_from_range(range: Range, affine: &Affine) -> Result<(f32, i32, bool), Fault> {
    let overflow = Fault::RangeOverflow { index: 0, min: range.min, max: range.max };
    affine.rule().params(range).ok_or(overflow)
}

/// The parameters of many domains, in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct DomainParams {
    /// One scale a domain.
    pub scales: Vec<f32>,
    /// One zero point a domain.
    pub zero_points: Vec<i32>,
    /// How many of the domains are degenerate.
    pub degenerate: u64,
}

/// [`params_from_range`] of each of many domains.
///
/// # Errors
/// The first domain whose range overflows, and its fault.
pub fn params_from_ranges(ranges: &[Range], affine: &Affine) -> Result<DomainParams, (usize, Fault)> {
    let (scales, zero_points) = (Vec::with_capacity(ranges.len()), Vec::with_capacity(ranges.len()));
    let mut params = DomainParams { scales, zero_points, degenerate: 0 };
    for (domain, range) in ranges.iter().enumerate() {
        let (scale, zero_point, degenerate) =
            params_from_range(*range, affine).map_err(|fault| (domain, fault))?;
        params.scales.push(scale);
        params.zero_points.push(zero_point);
        params.degenerate += u64::from(degenerate);
    }
    Ok(params)
}

/// An [`Affine`]'s way from a range to parameters, in the floats that it computes with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule {
    mapping: Mapping,
    pub(crate) divisor: f32,
    pub(crate) qmin: f32,
    pub(crate) qmax: f32,
}

impl Rule {
    /// Scale, zero point, degenerate or not; `None` where the range overflows.
    #[inline(always)]
    pub(crate) fn params(&self, Range { min, max }: Range) -> Option<(f32, i32, bool)> {
        let width = match self.mapping {
            Mapping::Symmetric => {
                if -min > max {
                    -min
                } else {
                    max
                }
            }
            Mapping::Asymmetric => max - min,
        };
        if width == f32::INFINITY {
            return None;
        }
        let scale = width / self.divisor;
        if scale < TINY {
            return Some((1.0, 0, true));
        }
        let zero_point = match self.mapping {
            Mapping::Symmetric => 0,
            Mapping::Asymmetric => {
                (self.qmin - (min / scale).round_ties_even()).clamp(self.qmin, self.qmax) as i32
            }
        };
        Some((scale, zero_point, false))
    }
}

/// Zero points as they lie where the caller keeps them. `None` means that all are 0.
#[derive(Debug, Clone, Copy)]
pub enum ZeroPoints<'a> {
    /// All 0.
    None,
    /// Signed bytes.
    I8(&'a [i8]),
    /// Unsigned bytes.
    U8(&'a [u8]),
    /// Integers.
    I32(&'a [i32]),
    /// Integral floats.
    F32(&'a [f32]),
}

impl<'a> ZeroPoints<'a> {
    /// The zero point at `index`; 0 where there are none.
    pub fn get(&self, index: usize) -> i32 {
        match self {
            Self::None => 0,
            Self::I8(z) => i32::from(z[index]),
            Self::U8(z) => i32::from(z[index]),
            Self::I32(z) => z[index],
            Self::F32(z) => z[index] as i32,
        }
    }

    /// How many there are, `None` where all are 0.
    pub fn len(&self) -> Option<usize> {
        match self {
            Self::None => None,
            Self::I8(z) => Some(z.len()),
            Self::U8(z) => Some(z.len()),
            Self::I32(z) => Some(z.len()),
            Self::F32(z) => Some(z.len()),
        }
    }

    /// Whether there are no stored zero points.
    pub fn is_empty(&self) -> bool {
        self.len().is_none_or(|n| n == 0)
    }
}

impl<'a> From<&'a [i8]> for ZeroPoints<'a> {
    fn from(z: &'a [i8]) -> Self {
        Self::I8(z)
    }
}

impl<'a> From<&'a [u8]> for ZeroPoints<'a> {
    fn from(z: &'a [u8]) -> Self {
        Self::U8(z)
    }
}

impl<'a> From<&'a [i32]> for ZeroPoints<'a> {
    fn from(z: &'a [i32]) -> Self {
        Self::I32(z)
    }
}

impl<'a> From<&'a [f32]> for ZeroPoints<'a> {
    fn from(z: &'a [f32]) -> Self {
        Self::F32(z)
    }
}

/// Where [`crate::fused`] writes zero points.
#[derive(Debug)]
pub enum ZeroPointsMut<'a> {
    /// Nowhere: a symmetric mapping.
    None,
    /// Signed bytes.
    I8(&'a mut [i8]),
    /// Unsigned bytes.
    U8(&'a mut [u8]),
    /// Integral floats.
    F32(&'a mut [f32]),
}

impl ZeroPointsMut<'_> {
    /// Stores one zero point.
    pub fn set(&mut self, index: usize, zero_point: i32) {
        match self {
            Self::None => {}
            Self::I8(z) => z[index] = zero_point as i8,
            Self::U8(z) => z[index] = zero_point as u8,
            Self::F32(z) => z[index] = zero_point as f32,
        }
    }

    /// The same zero points once more, for a call that takes them by value.
    pub fn reborrow(&mut self) -> ZeroPointsMut<'_> {
        match self {
            Self::None => ZeroPointsMut::None,
            Self::I8(z) => ZeroPointsMut::I8(z),
            Self::U8(z) => ZeroPointsMut::U8(z),
            Self::F32(z) => ZeroPointsMut::F32(z),
        }
    }

    /// Stores adjoining zero points.
    pub(crate) fn set_all(&mut self, first: usize, zero_points: &[i32]) {
        let places = first..first + zero_points.len();
        match self {
            Self::None => {}
            Self::I8(z) => z[places].iter_mut().zip(zero_points).for_each(|(z, &from)| *z = from as i8),
            Self::U8(z) => z[places].iter_mut().zip(zero_points).for_each(|(z, &from)| *z = from as u8),
            Self::F32(z) => z[places].iter_mut().zip(zero_points).for_each(|(z, &from)| *z = from as f32),
        }
    }

    /// The same zero points, to read.
    pub fn as_ref(&self) -> ZeroPoints<'_> {
        match self {
            Self::None => ZeroPoints::None,
            Self::I8(z) => ZeroPoints::I8(z),
            Self::U8(z) => ZeroPoints::U8(z),
            Self::F32(z) => ZeroPoints::F32(z),
        }
    }

    pub(crate) fn len(&self) -> Option<usize> {
        self.as_ref().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip() {
        for scheme in Scheme::ALL {
            assert_eq!(scheme.to_string().parse::<Scheme>(), Ok(scheme));
        }
        let text = "int3".parse::<Scheme>().map_err(|e| e.to_string());
        assert!(text.is_err_and(|t| t.contains("int3") && t.contains("uint4")));
    }

    #[test]
    fn mappings_follow_the_table() {
        for (scheme, mapping, ok) in [
            (Scheme::Int8, Mapping::Asymmetric, true),
            (Scheme::UInt8, Mapping::Symmetric, false),
            (Scheme::Int4, Mapping::Asymmetric, false),
            (Scheme::UInt4, Mapping::Asymmetric, true),
            (Scheme::Int2, Mapping::Asymmetric, false),
            (Scheme::UInt2, Mapping::Symmetric, false),
        ] {
            assert_eq!(Affine::new(scheme, Some(mapping)).is_ok(), ok, "{scheme} {mapping}");
        }
    }

    #[test]
    fn degenerate_and_overflowing_ranges() -> Result<(), Fault> {
        let int8 = Affine::new(Scheme::Int8, None)?;
        let uint8 = Affine::new(Scheme::UInt8, None)?;
        assert_eq!(params_from_range(Range::EMPTY, &int8)?, (1.0, 0, true));
        assert_eq!(params_from_range(Range::EMPTY, &uint8)?, (1.0, 0, true));
        assert_eq!(params_from_range(Range { min: 0.0, max: TINY }, &uint8)?, (1.0, 0, true));
        let wide = Range { min: -f32::MAX, max: f32::MAX };
        assert!(matches!(params_from_range(wide, &uint8), Err(Fault::RangeOverflow { .. })));
        assert_eq!(params_from_range(wide, &int8)?, (f32::MAX / 127.0, 0, false));
        Ok(())
    }
}
