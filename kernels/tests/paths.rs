//! Every path against the reference: random layouts, formats, policies, chunks, and bit patterns made to hurt.

#![allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod reference;

use half::{bf16, f16};
use proptest::prelude::*;
use reference::Quantized;
use shmquant_kernels::{
    Affine, Arith, Counters, Fault, FloatType, Granularity, Kernels, Layout, Mapping, OnNonFinite, Range,
    Scheme, Values, ZeroPoints, ZeroPointsMut, params_from_range,
};

const SCHEMES: [(Scheme, Mapping); 7] = [
    (Scheme::Int8, Mapping::Symmetric),
    (Scheme::Int8, Mapping::Asymmetric),
    (Scheme::UInt8, Mapping::Asymmetric),
    (Scheme::Int4, Mapping::Symmetric),
    (Scheme::UInt4, Mapping::Asymmetric),
    (Scheme::Int2, Mapping::Symmetric),
    (Scheme::UInt2, Mapping::Asymmetric),
];

#[derive(Debug, Clone)]
struct Case {
    layout: Layout,
    affine: Affine,
    policy: OnNonFinite,
    dtype: FloatType,
    /// Raw values, one format's width each.
    bytes: Vec<u8>,
    /// Where chunks end, as fractions of what is left.
    cuts: Vec<u8>,
    /// Misalignment of the source.
    shift: usize,
}

impl Case {
    fn input(&self) -> Vec<f64> {
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
fn value(wild: bool) -> BoxedStrategy<f32> {
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

fn bytes_of(values: &[f32], dtype: FloatType, extra: &[u64], wild: bool) -> Vec<u8> {
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
    ];
    let group = prop_oneof![Just(32u64), Just(64), Just(128), 1u64..200];
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

fn cases() -> impl Strategy<Value = Case> {
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
fn chunks(case: &Case, whole_rows: bool, whole_domains: bool) -> Vec<(usize, usize)> {
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

/// Runs the chunks through `fused`, or through `scan` and `encode`.
fn run(kernels: &Kernels, case: &Case, fused: bool, parts: &[(usize, usize)]) -> Result<Quantized, Fault> {
    let Case { layout, affine, policy, .. } = case;
    let mut shifted = vec![0; case.shift];
    shifted.extend_from_slice(&case.bytes);
    let values = Values::from_bytes(&shifted[case.shift..], case.dtype);
    let sizes = layout.sizes(affine.bits).expect("a possible layout");
    let mut codes = vec![0xa5u8; sizes.code_bytes as usize];
    let mut scales = vec![f32::NAN; sizes.params as usize];
    let mut zeros = vec![99f32; sizes.params as usize];
    let mut counters = Counters::default();
    let mut nulled = Vec::new();
    let places = |start: usize, end: usize| {
        let from = layout.code_byte_offset(start as u64, affine.bits) as usize;
        let to = layout.code_byte_offset(end as u64, affine.bits) as usize;
        let params = layout.param_range(start as u64, (end - start) as u64);
        (from..to, params.start as usize..params.end as usize)
    };
    if fused {
        for &(start, end) in parts {
            let (bytes, params) = places(start, end);
            counters.add(kernels.fused(
                values.slice(start..end),
                start as u64,
                layout,
                affine,
                *policy,
                &mut codes[bytes],
                &mut scales[params.clone()],
                ZeroPointsMut::F32(&mut zeros[params]),
                &mut nulled,
            )?);
        }
    } else {
        let mut ranges = vec![Range::EMPTY; sizes.params as usize];
        for &(start, end) in parts {
            let (_, params) = places(start, end);
            kernels.scan(values.slice(start..end), start as u64, layout, *policy, &mut ranges[params])?;
        }
        for (p, range) in ranges.iter().enumerate() {
            let (scale, zero, degenerate) = params_from_range(*range, affine)?;
            scales[p] = scale;
            zeros[p] = zero as f32;
            counters.n_degenerate_groups += u64::from(degenerate);
        }
        for &(start, end) in parts {
            let (bytes, params) = places(start, end);
            counters.add(kernels.encode(
                values.slice(start..end),
                start as u64,
                layout,
                affine,
                *policy,
                &scales[params.clone()],
                ZeroPoints::F32(&zeros[params]),
                &mut codes[bytes],
                &mut nulled,
            )?);
        }
    }
    let zero_points = zeros.iter().map(|&z| z as i32).collect();
    Ok(Quantized { codes, scales, zero_points, counters, nulled })
}

/// Faults compared without what chunking changes and what NaN payloads hide.
fn kind(fault: &Fault) -> (u8, u64) {
    match fault {
        Fault::NonFinite { index, .. } => (0, *index),
        Fault::Overflow { index, .. } => (1, *index),
        Fault::RangeOverflow { .. } => (2, 0),
        other => panic!("{other}"),
    }
}

fn same_as_reference(
    case: &Case,
    got: Result<Quantized, Fault>,
    want: &Result<Quantized, Fault>,
    what: &str,
) -> Result<(), TestCaseError> {
    match (&got, want) {
        (Ok(got), Ok(want)) => prop_assert_eq!(got, want, "{} {:?}", what, case.layout),
        // Chunks before the fault may meet a range overflow first.
        (Err(Fault::RangeOverflow { .. }), Err(want)) => {
            let refused = !matches!(want, Fault::UnknownWord { .. } | Fault::UnsupportedMapping { .. });
            prop_assert!(refused);
        }
        (Err(got), Err(want)) => prop_assert_eq!(kind(got), kind(want), "{}", what),
        _ => prop_assert!(false, "{what}: {got:?} instead of {want:?}"),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_path_and_chunking_gives_the_reference(case in cases()) {
        let want = reference::quantize(&case.input(), &case.layout, &case.affine, case.policy, None);
        let n = (case.layout.rows * case.layout.k) as usize;
        let null = case.policy == OnNonFinite::Null;
        for kernels in Kernels::all() {
            let name = kernels.name();
            same_as_reference(&case, run(kernels, &case, true, &[(0, n)]), &want, name)?;
            same_as_reference(&case, run(kernels, &case, true, &chunks(&case, null, true)), &want, name)?;
            same_as_reference(&case, run(kernels, &case, false, &chunks(&case, null, false)), &want, name)?;
        }
    }

    #[test]
    fn decoding_inverts_and_metrics_agree(case in cases()) {
        let input = case.input();
        let policy = if case.policy == OnNonFinite::Error { OnNonFinite::Saturate } else { case.policy };
        let want = reference::quantize(&input, &case.layout, &case.affine, policy, None);
        let Ok(want) = want else { return Ok(()) };
        let decoded = reference::dequantize(&want, &case.layout, &case.affine);
        // -8 * (amax / 7.5) does not fit float32 where amax is next to its end.
        if decoded.iter().any(|y| !y.is_finite()) {
            return Ok(());
        }
        let zeros = ZeroPoints::I32(&want.zero_points);
        let (layout, affine, bits) = (&case.layout, &case.affine, case.affine.bits);
        let values = Values::from_bytes(&case.bytes, case.dtype);
        let mut sums = Vec::new();
        for kernels in Kernels::all() {
            for (start, end) in chunks(&case, false, false) {
                let bytes = layout.code_byte_offset(start as u64, bits) as usize
                    ..layout.code_byte_offset(end as u64, bits) as usize;
                let params = layout.param_range(start as u64, (end - start) as u64);
                let params = params.start as usize..params.end as usize;
                let mut out = vec![f32::NAN; end - start];
                let zeros = ZeroPoints::I32(&want.zero_points[params.clone()]);
                kernels.decode(&want.codes[bytes], start as u64, layout, affine, &want.scales[params], zeros, &mut out);
                for (i, (got, want)) in out.iter().zip(&decoded[start..end]).enumerate() {
                    prop_assert_eq!(got.to_bits(), want.to_bits(), "{} {}", kernels.name(), start + i);
                }
            }
            sums.push(kernels.measure(values, 0, layout, affine, &want.scales, zeros, &want.codes, policy));
        }
        prop_assert!(sums.windows(2).all(|pair| pair[0] == pair[1]), "{:?}", sums);

        let counted = input.iter().zip(&decoded).enumerate().filter(|(i, (x, _))| {
            x.is_finite() && !want.nulled.contains(&(*i as u64 / layout.k))
        });
        let (mut n, mut noise, mut signal, mut worst) = (0, 0f64, 0f64, 0f64);
        for (i, (&x, &y)) in counted {
            let x = x as f32;
            let error = f64::from(x) - f64::from(y);
            n += 1;
            noise += error * error;
            signal += f64::from(x) * f64::from(x);
            worst = worst.max(error.abs());
            // Half a step, and the rounding of the quotient, the product and the scale; symmetric schemes of few
            // bits have no code for +amax, and a rounded zero point may cost half a step at the ends.
            let scale = f64::from(want.scales[reference::param_of(layout, i as u64)]);
            let clip = if affine.mapping == Mapping::Symmetric && bits == 8 { 0.0 } else { 0.5 };
            if scale != 1.0 {
                prop_assert!(error.abs() <= scale * (0.5 + clip) * (1.0 + 1e-4), "{x} {y} {scale}");
            }
        }
        prop_assert_eq!(sums[0].n, n);
        prop_assert_eq!(sums[0].max_abs_err(), worst);
        prop_assert!((sums[0].noise - noise).abs() <= noise * 1e-12);
        prop_assert!((sums[0].signal - signal).abs() <= signal * 1e-12);
    }

    #[test]
    fn encoding_what_was_decoded_changes_nothing(case in cases()) {
        let mut affine = case.affine;
        affine.arith = Arith::Div;
        let layout = &case.layout;
        let want = reference::quantize(&case.input(), layout, &affine, OnNonFinite::Saturate, None);
        let Ok(want) = want else { return Ok(()) };
        let decoded = reference::dequantize(&want, layout, &affine);
        if decoded.iter().any(|y| !y.is_finite()) {
            return Ok(());
        }
        for kernels in Kernels::all() {
            let mut codes = vec![0; want.codes.len()];
            let zeros = ZeroPoints::I32(&want.zero_points);
            let again = kernels.encode(Values::from_f32(&decoded), 0, layout, &affine, OnNonFinite::Error,
                &want.scales, zeros, &mut codes, &mut Vec::new());
            prop_assert!(again.is_ok());
            prop_assert_eq!(&codes, &want.codes, "{}", kernels.name());
        }
    }

    #[test]
    fn given_parameters_clip(case in cases(), scales in prop::collection::vec(value(false), 1..20), zeros in prop::collection::vec(any::<u8>(), 1..20)) {
        let layout = &case.layout;
        let n = layout.n_params() as usize;
        let scales: Vec<f32> = (0..n).map(|i| scales[i % scales.len()].abs().max(f32::MIN_POSITIVE)).collect();
        let span = (case.affine.qmax - case.affine.qmin + 1) as u32;
        let zeros: Vec<i32> = (0..n).map(|i| match case.affine.mapping {
            Mapping::Symmetric => 0,
            Mapping::Asymmetric => case.affine.qmin + (u32::from(zeros[i % zeros.len()]) % span) as i32,
        }).collect();
        let want = reference::quantize(&case.input(), layout, &case.affine, case.policy, Some((&scales, &zeros)));
        for kernels in Kernels::all() {
            let mut codes = vec![0xa5; layout.code_bytes(case.affine.bits) as usize];
            let mut nulled = Vec::new();
            let got = kernels.encode(Values::from_bytes(&case.bytes, case.dtype), 0, layout, &case.affine, case.policy,
                &scales, ZeroPoints::I32(&zeros), &mut codes, &mut nulled);
            let got = got.map(|counters| Quantized { codes, scales: scales.clone(), zero_points: zeros.clone(), counters, nulled });
            same_as_reference(&case, got, &want, kernels.name())?;
        }
    }
}

/// All lengths around the lanes of any path, all schemes, dense in ties.
#[test]
fn every_short_length() {
    for (scheme, mapping) in SCHEMES {
        let affine = Affine::new(scheme, Some(mapping)).expect("a combination of the table");
        for n in 0..=4 * 64 + 3usize {
            let values: Vec<f32> = (0..n).map(|i| ((i * 37 + 11) % 255) as f32 / 2.0 - 63.5).collect();
            for granularity in [Granularity::Row, Granularity::Tensor] {
                let layout =
                    Layout { rows: 1, k: n as u64, group: 0, granularity, pad_rows: true, packed: true };
                let case = Case {
                    layout,
                    affine,
                    policy: OnNonFinite::Error,
                    dtype: FloatType::F32,
                    bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                    cuts: vec![],
                    shift: n % 5,
                };
                let want = reference::quantize(&case.input(), &layout, &affine, OnNonFinite::Error, None);
                for kernels in Kernels::all() {
                    assert_eq!(run(kernels, &case, true, &[(0, n)]), want, "{} {scheme} {n}", kernels.name());
                }
            }
        }
    }
}

/// Normal numbers of all signs and few exponents; where `dirty`, some infinities and NaN.
fn many_values(n: u64, dirty: bool) -> Vec<f32> {
    let mut state = 7u64;
    (0..n)
        .map(|i| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            match (dirty, i % 20_011) {
                (true, 77) => f32::INFINITY,
                (true, 78) => f32::NEG_INFINITY,
                (true, 4000) => f32::NAN,
                _ => f32::from_bits((state >> 32) as u32 & 0x81ff_ffff | 0x3e00_0000),
            }
        })
        .collect()
}

/// Chunks so large that codes are written past the cache, to aligned places and others.
#[test]
fn large_chunks_give_the_same_on_every_path() {
    let layout = |k, granularity, group, pad_rows, packed| Layout {
        rows: 140_000 / k,
        k,
        group,
        granularity,
        pad_rows,
        packed,
    };
    let layouts = [
        layout(1024, Granularity::Row, 0, true, true),
        layout(1024, Granularity::Group, 32, true, true),
        layout(1024, Granularity::Group, 128, true, true),
        layout(1000, Granularity::Group, 100, true, false),
        layout(333, Granularity::Row, 0, true, true),
        layout(333, Granularity::Row, 0, false, true),
        layout(10_001, Granularity::Row, 0, false, true),
        layout(1000, Granularity::Tensor, 0, false, true),
        layout(1024, Granularity::Dimension, 0, true, true),
        layout(333, Granularity::Dimension, 0, false, true),
        layout(333, Granularity::Dimension, 0, true, true),
        layout(4, Granularity::Dimension, 0, true, true),
    ];
    let values: Vec<Vec<u8>> =
        [(FloatType::F32, false), (FloatType::F32, true), (FloatType::Bf16, true), (FloatType::F16, false)]
            .iter()
            .map(|&(dtype, dirty)| bytes_of(&many_values(140_000, dirty), dtype, &[1], false))
            .collect();
    for (s, (scheme, mapping)) in SCHEMES.into_iter().enumerate() {
        let mut affine = Affine::new(scheme, Some(mapping)).expect("a combination of the table");
        for (l, layout) in layouts.iter().enumerate() {
            // Every scheme and layout, but not all formats with each of them.
            let which = (s + l) % values.len();
            let dtype = [FloatType::F32, FloatType::F32, FloatType::Bf16, FloatType::F16][which];
            affine.arith = if (s + l) % 3 == 0 { Arith::Recip } else { Arith::Div };
            let policy = if s % 2 == 0 { OnNonFinite::Null } else { OnNonFinite::Saturate };
            let n = (layout.rows * layout.k) as usize;
            let values = Values::from_bytes(&values[which], dtype).slice(0..n);
            let bytes = layout.code_bytes(affine.bits) as usize;
            let params = layout.n_params() as usize;
            let mut all = Vec::new();
            for (kernels, shift) in
                Kernels::all().into_iter().flat_map(|k| [(k, 0), (k, 1), (k, 16), (k, 64)])
            {
                let mut codes = vec![0x5au8; bytes + 128];
                let aligned = codes.as_ptr().align_offset(64) + shift;
                let mut scales = vec![0.0; params];
                let mut zeros = vec![0.0; params];
                let mut nulled = Vec::new();
                let fused = kernels
                    .fused(
                        values,
                        0,
                        layout,
                        &affine,
                        policy,
                        &mut codes[aligned..aligned + bytes],
                        &mut scales,
                        ZeroPointsMut::F32(&mut zeros),
                        &mut nulled,
                    )
                    .expect("a policy");
                let own = codes.clone();
                // The same once more, given, and in part clipped.
                let half: Vec<f32> =
                    scales.iter().enumerate().map(|(i, s)| if i % 3 == 0 { s / 2.0 } else { *s }).collect();
                let zero_points = ZeroPoints::F32(&zeros);
                let given = kernels
                    .encode(
                        values,
                        0,
                        layout,
                        &affine,
                        policy,
                        &half,
                        zero_points,
                        &mut codes[aligned..aligned + bytes],
                        &mut nulled,
                    )
                    .expect("a policy");
                for codes in [&own, &codes] {
                    assert!(codes[..aligned].iter().chain(&codes[aligned + bytes..]).all(|&b| b == 0x5a));
                }
                let of = |codes: &[u8]| codes[aligned..aligned + bytes].to_vec();
                all.push((of(&own), of(&codes), scales, zeros, fused, given, nulled));
            }
            assert!(all[0].5.n_clipped > 0, "{layout:?}");
            assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{scheme} {mapping} {dtype} {layout:?}");
        }
    }
}

/// Outputs so large that values are written past the cache, to places of all alignments.
#[test]
fn large_outputs_are_the_same_on_every_path() {
    let n = (1usize << 20) + 4096;
    for (scheme, mapping) in SCHEMES {
        let affine = Affine::new(scheme, Some(mapping)).expect("a combination of the table");
        for (granularity, group) in
            [(Granularity::Group, 128), (Granularity::Group, 100), (Granularity::Tensor, 0)]
        {
            let (rows, k) = (n as u64 / 2048, 2048);
            let layout = Layout { rows, k, group, granularity, pad_rows: true, packed: true };
            let params = layout.n_params() as usize;
            let codes: Vec<u8> =
                (0..layout.code_bytes(affine.bits)).map(|i| (i * 167 + i / 251) as u8).collect();
            let scales: Vec<f32> = (0..params).map(|i| 0.37 + (i % 17) as f32).collect();
            let zeros: Vec<i32> = (0..params).map(|i| i as i32 % 5).collect();
            let mut all = Vec::new();
            for (kernels, shift) in Kernels::all().into_iter().flat_map(|k| [(k, 0), (k, 1), (k, 4)]) {
                let mut out = vec![f32::NAN; n + 32];
                let from = out.as_ptr().align_offset(64) + shift;
                let zeros = ZeroPoints::I32(&zeros);
                kernels.decode(&codes, 0, &layout, &affine, &scales, zeros, &mut out[from..from + n]);
                assert!(out[..from].iter().chain(&out[from + n..]).all(|v| v.is_nan()));
                all.push(out[from..from + n].to_vec());
            }
            assert!(
                all.windows(2).all(|pair| pair[0] == pair[1]),
                "{scheme} {mapping} {granularity} {group}"
            );
        }
    }
}

/// Zero points outside the codes and scales whose reciprocal is infinite: nothing that a path takes on by itself.
#[test]
fn extreme_parameters_give_the_reference() {
    for (scheme, mapping) in SCHEMES {
        for arith in [Arith::Div, Arith::Recip] {
            let mut affine = Affine::new(scheme, Some(mapping)).expect("a combination of the table");
            affine.arith = arith;
            for granularity in Granularity::ALL {
                let layout =
                    Layout { rows: 3, k: 192, group: 64, granularity, pad_rows: false, packed: true };
                let values: Vec<f32> = (0..576).map(|i| (i as f32 - 288.0) * 1e-3).collect();
                let case = |policy| Case {
                    layout,
                    affine,
                    policy,
                    dtype: FloatType::F32,
                    bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                    cuts: vec![],
                    shift: 0,
                };
                let case = case(OnNonFinite::Error);
                let n = layout.n_params() as usize;
                let scales: Vec<f32> = (0..n).map(|i| [1e-40, 1e-38, 1e-3, 3e38][i % 4]).collect();
                let zeros: Vec<i32> = (0..n).map(|i| [0, 300, -300, 1][i % 4]).collect();
                let given = Some((scales.as_slice(), zeros.as_slice()));
                let want = reference::quantize(&case.input(), &layout, &affine, OnNonFinite::Error, given);
                for kernels in Kernels::all() {
                    let mut codes = vec![0xa5; layout.code_bytes(affine.bits) as usize];
                    let got = kernels.encode(
                        Values::from_f32(&values),
                        0,
                        &layout,
                        &affine,
                        OnNonFinite::Error,
                        &scales,
                        ZeroPoints::I32(&zeros),
                        &mut codes,
                        &mut Vec::new(),
                    );
                    let got = got.map(|counters| Quantized {
                        codes,
                        scales: scales.clone(),
                        zero_points: zeros.clone(),
                        counters,
                        nulled: vec![],
                    });
                    assert_eq!(got, want, "{} {scheme} {mapping} {arith:?} {granularity}", kernels.name());
                }
            }
        }
    }
}
