//! What a client finds that runs the kernels over a chunk itself, as it crosses instead of the values (PROTOCOL.md section 6).
//!
//! Copying a value to the daemon costs more than encoding it, so a client encodes what only it can reach, and an eighth to a
//! quarter of the bytes crosses. Codes and parameters are the client's word: the daemon checks what could do harm, and a client
//! that lies spoils its own result.

use std::ops::Range;

use shmquant_kernels::{Affine, Counters, Fault, Granularity, Mapping, OnNonFinite, Range as Extremes, Sums};

use crate::chunks::{ALIGN, Action};
use crate::descriptor::{Spec, Values};

/// Bytes of the counts at a chunk's start.
pub const HEADER: usize = 128;

/// Elements that a parameter of a row or group has to cover.
const SHARING: u64 = 8;
/// Most ranges of one chunk.
const MOST_RANGES: u64 = 1 << 16;

/// Whether what is found in any chunk of these values has room in the place of a chunk: each parameter has values enough.
pub fn fit(values: &Values, spec: &Spec) -> bool {
    let groups = values.layout(spec).groups_per_row();
    spec.affine.is_some()
        && values.elements() > 0
        && match spec.granularity {
            Granularity::Tensor => true,
            Granularity::Dimension => values.k <= MOST_RANGES,
            Granularity::Row | Granularity::Group => groups.saturating_mul(SHARING) <= values.k,
        }
}

/// Where the parts of a chunk's findings lie, from the chunk's start. What a chunk does not have is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    /// Parameters of the item that the chunk touches.
    pub touched: Range<u64>,
    /// Rows of the item that the chunk touches.
    pub rows: Range<u64>,
    /// Fused and Encode: the codes.
    pub codes: Range<usize>,
    /// Fused: an f32 for each parameter.
    pub scales: Range<usize>,
    /// Fused, asymmetric: a byte for each parameter.
    pub zeros: Range<usize>,
    /// Scan: two f32 for each parameter, the smallest and the largest value.
    pub ranges: Range<usize>,
    /// Fused and Encode, where rows may be dropped: a bit for each row.
    pub dropped: Range<usize>,
    /// Bytes of it all.
    pub bytes: usize,
}

impl Parts {
    /// The parts of the chunk of `count` elements from `first` on. Values must [`fit`].
    pub fn new(
        values: &Values,
        spec: &Spec,
        affine: &Affine,
        action: Action,
        first: u64,
        count: u64,
    ) -> Self {
        let layout = values.layout(spec);
        let k = values.k.max(1);
        let touched = layout.param_range(first, count);
        let rows = first / k..(first + count).div_ceil(k);
        let n = (touched.end - touched.start) as usize;
        let (mut end, mut codes, mut scales, mut zeros, mut ranges, mut dropped) =
            (HEADER, 0..0, 0..0, 0..0, 0..0, 0..0);
        let mut part = |bytes: usize| {
            let start = end;
            end = (start + bytes).next_multiple_of(8);
            start..start + bytes
        };
        if action == Action::Scan {
            ranges = part(n * 8);
        } else {
            codes = part(layout.chunk_code_bytes(first, count, affine.bits) as usize);
            if action == Action::Fused {
                scales = part(n * 4);
                zeros = part(if affine.mapping == Mapping::Asymmetric { n } else { 0 });
            }
            if values.policy(spec) == OnNonFinite::Null {
                dropped = part((rows.end - rows.start).div_ceil(8) as usize);
            }
        }
        Self { touched, rows, codes, scales, zeros, ranges, dropped, bytes: end }
    }
}

const _: () = assert!((HEADER as u64).is_multiple_of(ALIGN), "codes begin aligned");

/// What was counted, and what was wrong: the chunk's first [`HEADER`] bytes.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Found {
    /// Counts of values.
    pub counters: Counters,
    /// Sums over values and their decoded codes, if metrics were asked for.
    pub sums: Sums,
    /// Why there are no codes or ranges.
    pub fault: Option<Fault>,
}

impl Found {
    /// The header's bytes.
    pub fn to_bytes(&self) -> [u8; HEADER] {
        let Self { counters: c, sums: s, fault } = self;
        let (code, index, count, value, other) = match fault {
            None => (0, 0, 0, 0.0, 0.0),
            Some(Fault::NonFinite { index, count, value }) => (1, *index, *count, f64::from(*value), 0.0),
            Some(Fault::Overflow { index, value }) => (2, *index, 0, *value, 0.0),
            Some(Fault::RangeOverflow { index, min, max }) => {
                (3, *index, 0, f64::from(*min), f64::from(*max))
            }
            // Kernels have no other.
            Some(_) => (u64::MAX, 0, 0, 0.0, 0.0),
        };
        let words = [
            c.n,
            c.n_clipped,
            c.n_nonfinite,
            c.n_degenerate_groups,
            s.n,
            s.signal.to_bits(),
            s.noise.to_bits(),
            s.dot.to_bits(),
            s.decoded.to_bits(),
            s.worst.to_bits(),
            code,
            index,
            count,
            value.to_bits(),
            other.to_bits(),
        ];
        let mut out = [0; HEADER];
        for (out, word) in out.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *out = word.to_le_bytes();
        }
        out
    }

    /// Reads a private copy of a header; `None` if it does not speak of `count` elements from `first` on.
    pub fn from_bytes(bytes: &[u8; HEADER], first: u64, count: u64) -> Option<Self> {
        let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let mut next = || words.next();
        let mut counted = || next().filter(|n| *n <= count);
        let counters = Counters {
            n: counted()?,
            n_clipped: counted()?,
            n_nonfinite: counted()?,
            n_degenerate_groups: counted()?,
        };
        let n = counted()?;
        let mut float = || next().map(f64::from_bits);
        let sums =
            Sums { n, signal: float()?, noise: float()?, dot: float()?, decoded: float()?, worst: float()? };
        let (code, index, many) = (next()?, next()?, next()?);
        let (value, other) = (f64::from_bits(next()?), f64::from_bits(next()?));
        let inside = index.checked_sub(first).is_some_and(|at| at < count);
        let fault = match code {
            0 => None,
            _ if !inside => return None,
            1 if (1..=count).contains(&many) => {
                Some(Fault::NonFinite { index, count: many, value: value as f32 })
            }
            2 => Some(Fault::Overflow { index, value }),
            3 => Some(Fault::RangeOverflow { index, min: value as f32, max: other as f32 }),
            _ => return None,
        };
        Some(Self { counters, sums, fault })
    }
}

/// Writes ranges as they cross.
pub fn write_ranges(ranges: &[Extremes], out: &mut [u8]) {
    for (out, range) in out.as_chunks_mut::<8>().0.iter_mut().zip(ranges) {
        let (min, max) = out.split_at_mut(4);
        min.copy_from_slice(&range.min.to_le_bytes());
        max.copy_from_slice(&range.max.to_le_bytes());
    }
}

/// Reads ranges that crossed; `None` unless each has 0 inside and finite ends.
pub fn read_ranges(bytes: &[u8]) -> Option<Vec<Extremes>> {
    let read = |word: &[u8; 8]| {
        let [a, b, c, d, e, f, g, h] = *word;
        let range = Extremes { min: f32::from_le_bytes([a, b, c, d]), max: f32::from_le_bytes([e, f, g, h]) };
        let sane = (f32::MIN..=0.0).contains(&range.min) && (0.0..=f32::MAX).contains(&range.max);
        sane.then_some(range)
    };
    bytes.as_chunks::<8>().0.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use shmquant_kernels::{FloatType, Scheme};

    use super::*;
    use crate::chunks::CHUNK_BYTES;
    use crate::descriptor::{Role, Way};

    fn values(role: Role, dtype: FloatType, rows: u64, k: u64) -> Values {
        let (shape, params, way) = (Vec::new(), None, Way::Encoded);
        Values { role, spec: 0, dtype, null: false, rows, k, null_count: 0, shape, params, way }
    }

    #[test]
    fn findings_have_room_in_a_chunk_wherever_they_fit() {
        for dtype in [FloatType::F16, FloatType::F32, FloatType::F64] {
            let most = CHUNK_BYTES / dtype.size() as u64;
            for (scheme, packed) in [(Scheme::Int8, false), (Scheme::UInt8, false), (Scheme::UInt2, true)] {
                for (granularity, group_size) in [
                    (Granularity::Tensor, 0),
                    (Granularity::Row, 0),
                    (Granularity::Dimension, 0),
                    (Granularity::Group, 8),
                    (Granularity::Group, 128),
                ] {
                    for k in [1, 7, 8, 9, 16, 100, 1 << 16, most] {
                        let affine = Affine::new(scheme, None).unwrap();
                        let on_nonfinite = OnNonFinite::Null;
                        let spec =
                            Spec { affine: Some(affine), granularity, on_nonfinite, packed, group_size };
                        let values = values(Role::Vector, dtype, most, k);
                        if !fit(&values, &spec) {
                            continue;
                        }
                        let count = most / k * k;
                        for action in [Action::Fused, Action::Scan, Action::Encode] {
                            let parts = Parts::new(&values, &spec, &affine, action, 0, count);
                            assert!(
                                parts.bytes as u64 <= CHUNK_BYTES,
                                "{action:?} {dtype} {spec:?} {k}: {parts:?}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_parameter_for_few_values_does_not_fit() {
        let affine = Affine::new(Scheme::UInt8, None).unwrap();
        let spec = |granularity, group_size| Spec {
            affine: Some(affine),
            granularity,
            on_nonfinite: OnNonFinite::Error,
            packed: false,
            group_size,
        };
        let of = |k| values(Role::Vector, FloatType::F32, 10, k);
        assert!(fit(&of(8), &spec(Granularity::Row, 0)) && !fit(&of(7), &spec(Granularity::Row, 0)));
        assert!(fit(&of(16), &spec(Granularity::Group, 8)) && !fit(&of(17), &spec(Granularity::Group, 8)));
        assert!(!fit(&of(64), &spec(Granularity::Group, 4)));
        let most = MOST_RANGES;
        assert!(fit(&of(most), &spec(Granularity::Dimension, 0)));
        assert!(!fit(&of(most + 1), &spec(Granularity::Dimension, 0)));
        assert!(!fit(&of(0), &spec(Granularity::Tensor, 0)));
        let as_it_is = Spec { affine: None, ..spec(Granularity::Tensor, 0) };
        assert!(!fit(&of(8), &as_it_is));
    }

    #[test]
    fn headers_come_back_as_they_went() {
        let counters = Counters { n: 9, n_clipped: 1, n_nonfinite: 2, n_degenerate_groups: 3 };
        let sums = Sums { n: 4, signal: 5.5, noise: 0.25, dot: -1.0, decoded: 7.0, worst: 0.125 };
        for fault in [
            None,
            Some(Fault::NonFinite { index: 109, count: 2, value: f32::NEG_INFINITY }),
            Some(Fault::Overflow { index: 100, value: 1e300 }),
            Some(Fault::RangeOverflow { index: 104, min: f32::MIN, max: f32::MAX }),
        ] {
            let found = Found { counters, sums, fault };
            assert_eq!(Found::from_bytes(&found.to_bytes(), 100, 10), Some(found));
        }
    }

    #[test]
    fn headers_that_speak_of_something_else_are_refused() {
        let count = 10;
        let good = Found { counters: Counters { n: count, ..Counters::default() }, ..Found::default() };
        let with = |word: usize, value: u64| {
            let mut bytes = good.to_bytes();
            bytes[word * 8..][..8].copy_from_slice(&value.to_le_bytes());
            Found::from_bytes(&bytes, 100, count)
        };
        assert_eq!(with(0, count), Some(good.clone()));
        for word in 0..5 {
            assert_eq!(with(word, count + 1), None, "word {word}");
            assert_eq!(with(word, u64::MAX), None, "word {word}");
        }
        // Faults: an unknown one, one outside the chunk, one of no value.
        assert_eq!(with(10, 4), None);
        let fault = Fault::NonFinite { index: 105, count: 1, value: f32::NAN };
        let bytes = Found { fault: Some(fault), ..good }.to_bytes();
        assert!(Found::from_bytes(&bytes, 100, count).is_some());
        assert_eq!(Found::from_bytes(&bytes, 106, count), None);
        assert_eq!(Found::from_bytes(&bytes, 95, count), None);
        let mut none = bytes;
        none[96..104].fill(0);
        assert_eq!(Found::from_bytes(&none, 100, count), None);
    }

    #[test]
    fn ranges_hold_zero_and_end_somewhere() {
        let good =
            [Extremes { min: -1.5, max: 2.0 }, Extremes::EMPTY, Extremes { min: f32::MIN, max: f32::MAX }];
        let mut bytes = [0; 24];
        write_ranges(&good, &mut bytes);
        assert_eq!(read_ranges(&bytes).unwrap(), good);
        for (min, max) in [
            (f32::NAN, 0.0),
            (0.0, f32::NAN),
            (0.5, 1.0),
            (-1.0, -0.5),
            (f32::NEG_INFINITY, 0.0),
            (0.0, f32::INFINITY),
        ] {
            write_ranges(&[Extremes { min, max }], &mut bytes[..8]);
            assert_eq!(read_ranges(&bytes[..8]), None, "{min} {max}");
        }
    }
}
