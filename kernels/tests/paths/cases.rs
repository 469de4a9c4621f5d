//! Random layouts, formats, policies and chunks, and values made to hurt.

use half::{bf16, f16};
use proptest::prelude::*;
use shmquant_kernels::{Affine, Arith, FloatType, Granularity, Layout, Mapping, OnNonFinite, Scheme};

pub(crate) const SCHEMES: [(Scheme, Mapping); 7] = [
    (Scheme::Int8, Mapping::Symmetric),
    (Scheme::Int8, Mapping::Asymmetric),
    (Scheme::UInt8, Mapping::Asymmetric),
    (Scheme::Int4, Mapping::Symmetric),
    (Scheme::UInt4, Mapping::Asymmetric),
    (Scheme::Int2, Mapping::Symmetric),
    (Scheme::UInt2, Mapping::Asymmetric),
];

#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) layout: Layout,
    pub(crate) affine: Affine,
    pub(crate) policy: OnNonFinite,
    pub(crate) dtype: FloatType,
    /// Raw values, one format's width each.
    pub(crate) bytes: Vec<u8>,
    /// Where chunks end, as fractions of what is left.
    pub(crate) cuts: Vec<u8>,
    /// Misalignment of the source.
    pub(crate) shift: usize,
}

impl Case {
    pub(crate) fn input(&self) -> Vec<f64> {
        match self.dtype {
            FloatType::F16 => words(&self.bytes).map(|w| f16::from_bits(w).to_f64()).collect(),
            FloatType::Bf16 => words(&self.bytes).map(|w| bf16::from_bits(w).to_f64()).collect(),
            FloatType::F32 => {
                self.bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
            }
            FloatType::F64 => self.bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
        }
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b))
}

/// f32 values of many kinds; `wild` lets NaN, infinities and the largest magnitudes in.
pub(crate) fn value(wild: bool) -> BoxedStrategy<f32> {
    let tame = prop_oneof![
        6 => -3f32..3.0,
        1 => Just(0.0f32),
        1 => Just(-0.0f32),
        1 => (-140i32..120, -2i32..3).prop_map(|(e, ulps)| {
            f32::from_bits(((2f64.powi(e) as f32).to_bits() as i32 + ulps).max(0) as u32)
        }),
        1 => any::<u32>().prop_map(|bits| f32::from_bits(bits & 0x807f_ffff)),
        // Ties of a scale of 1 (127 makes it so for int8) and next to them.
        2 => (-130i32..130, -1i32..2).prop_map(|(n, ulps)| {
            let tie = n as f32 + 0.5;
            f32::from_bits((tie.to_bits() as i32 + ulps) as u32)
        }),
        1 => Just(127.0f32),
        1 => Just(-7.5f32),
    ];
    if wild {
        prop_oneof![
            20 => tame,
            2 => any::<u32>().prop_map(f32::from_bits),
            1 => Just(f32::INFINITY),
            1 => Just(f32::NEG_INFINITY),
            1 => any::<u32>().prop_map(|bits| f32::from_bits(bits | 0x7f80_0001)),
        ]
        .boxed()
    } else {
        tame.boxed()
    }
}

pub(crate) fn bytes_of(values: &[f32], dtype: FloatType, extra: &[u64], wild: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (i, &v) in values.iter().enumerate() {
        let extra = extra[i % extra.len()];
        match dtype {
            FloatType::F16 => bytes.extend(f16::from_f32(v).to_le_bytes()),
            FloatType::Bf16 => bytes.extend(bf16::from_f32(v).to_le_bytes()),
            FloatType::F32 => bytes.extend(v.to_le_bytes()),
            FloatType::F64 if wild && extra.is_multiple_of(61) => {
                bytes.extend((f64::from(v) * 1e30).to_le_bytes())
            }
            // Bits below f32's, ties of the rounding among them.
            FloatType::F64 => {
                let low = if extra.is_multiple_of(3) { 1 << 28 } else { extra & 0x1fff_ffff };
                bytes.extend((f64::from(v).to_bits() ^ low).to_le_bytes());
            }
        }
    }
    bytes
}

fn layouts() -> impl Strategy<Value = Layout> {
    let shape = prop_oneof![
        3 => (0u64..5, 0u64..300),
        1 => (1u64..3, 900u64..2300),
        1 => (1u64..200, 1u64..6),
        1 => (1u64..4, (1u64..40).prop_map(|n| 16 * n)),
    ];
    let group = prop_oneof![Just(16u64), Just(32), Just(64), Just(128), 1u64..200];
    let granularity = prop::sample::select(Granularity::ALL.to_vec());
    (shape, group, granularity, any::<bool>(), prop::bool::weighted(0.8)).prop_map(
        |((rows, k), group, granularity, pad_rows, packed)| Layout {
            rows,
            k,
            group,
            granularity,
            pad_rows,
            packed,
        },
    )
}

pub(crate) fn cases() -> impl Strategy<Value = Case> {
    let policy = prop::sample::select(OnNonFinite::ALL.to_vec());
    let dtype = prop_oneof![
        3 => Just(FloatType::F32),
        1 => Just(FloatType::F64),
        1 => Just(FloatType::F16),
        1 => Just(FloatType::Bf16),
    ];
    (
        layouts(),
        prop::sample::select(SCHEMES.to_vec()),
        any::<bool>(),
        policy,
        dtype,
        prop::bool::weighted(0.4),
    )
        .prop_flat_map(|(layout, (scheme, mapping), recip, policy, dtype, wild)| {
            let n = (layout.rows * layout.k) as usize;
            let mut affine = Affine::new(scheme, Some(mapping)).expect("a combination of the table");
            if recip {
                affine.arith = Arith::Recip;
            }
            let values = prop::collection::vec(value(wild), n);
            let extra = prop::collection::vec(any::<u64>(), 1..50);
            let cuts = prop::collection::vec(any::<u8>(), 1..8);
            (values, extra, cuts, 0usize..8).prop_map(move |(values, extra, cuts, shift)| Case {
                layout,
                affine,
                policy,
                dtype,
                bytes: bytes_of(&values, dtype, &extra, wild),
                cuts,
                shift,
            })
        })
}

/// Chunks as callers make them: `unit` elements are the least they may be cut by.
pub(crate) fn chunks(case: &Case, whole_rows: bool, whole_domains: bool) -> Vec<(usize, usize)> {
    let Layout { rows, k, group, granularity, pad_rows, packed } = case.layout;
    let (n, k) = ((rows * k) as usize, k as usize);
    let per_byte = if packed { usize::from(8 / case.affine.bits) } else { 1 };
    let mut ends = vec![];
    for e in 1..n {
        let on_byte = if pad_rows { (e % k) % per_byte == 0 } else { e % per_byte == 0 };
        let on_row = e % k == 0;
        let on_domain = match granularity {
            Granularity::Tensor | Granularity::Dimension => false,
            Granularity::Row => on_row,
            Granularity::Group => (e % k) % group as usize == 0,
        };
        // Inside a padded row chunks begin at multiples of 8 elements.
        let aligned = !pad_rows || on_row || (e % k) % 8 == 0;
        if on_byte && aligned && (!whole_rows || on_row) && (!whole_domains || on_domain) {
            ends.push(e);
        }
    }
    let mut out = vec![];
    let (mut start, mut from) = (0, 0);
    for &cut in &case.cuts {
        let left = ends.len() - from;
        if left == 0 {
            break;
        }
        from += left * usize::from(cut) / 256;
        out.push((start, ends[from]));
        start = ends[from];
        from += 1;
    }
    out.push((start, n));
    out
}
