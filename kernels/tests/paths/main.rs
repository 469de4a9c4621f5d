//! Every path against the reference: random layouts, formats, policies, chunks, and bit patterns made to hurt.

#![allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod batches;
mod cases;
mod large;
#[path = "../reference/mod.rs"]
mod reference;

use cases::{Case, SCHEMES, cases, chunks, value};
use proptest::prelude::*;
use reference::Quantized;
use shmquant_kernels::{
    Affine, Arith, Counters, Fault, FloatType, Granularity, Kernels, Layout, Mapping, OnNonFinite, Range,
    Values, ZeroPoints, ZeroPointsMut, params_from_range,
};

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
                    let got = encode_given(kernels, &values, &layout, &affine, &scales, &zeros);
                    assert_eq!(got, want, "{} {scheme} {mapping} {arith:?} {granularity}", kernels.name());
                }
            }
        }
    }
}

/// Codes of a whole array by given parameters.
fn encode_given(
    kernels: &Kernels,
    values: &[f32],
    layout: &Layout,
    affine: &Affine,
    scales: &[f32],
    zeros: &[i32],
) -> Result<Quantized, Fault> {
    let mut codes = vec![0xa5; layout.code_bytes(affine.bits) as usize];
    let counters = kernels.encode(
        Values::from_f32(values),
        0,
        layout,
        affine,
        OnNonFinite::Error,
        scales,
        ZeroPoints::I32(zeros),
        &mut codes,
        &mut Vec::new(),
    )?;
    let (scales, zero_points) = (scales.to_vec(), zeros.to_vec());
    Ok(Quantized { codes, scales, zero_points, counters, nulled: vec![] })
}

/// Quotients next to ties, by scales of all magnitudes: there a product with the reciprocal would round to another code.
#[test]
fn quotients_next_to_ties_give_the_reference() {
    let mut state = 11u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let (rows, k) = (500, 160);
    let mut scales: Vec<f32> =
        (0..rows).map(|_| f32::from_bits(random() % 0x7f00_0000 + 0x40_0000)).collect();
    // Where the reciprocal stops being a normal number, and where it stops being finite.
    let (least, most) = (f32::MIN_POSITIVE, f32::MIN_POSITIVE.recip());
    let ends = [least, most, least / 4.0].into_iter().flat_map(|end| [end.next_down(), end, end.next_up()]);
    scales.splice(..9, ends);
    let mut values = Vec::new();
    let mut otherwise = 0;
    for &scale in &scales {
        for _ in 0..k {
            let tie = (random() % 512) as f32 - 255.5;
            let x = (tie * scale).clamp(f32::MIN, f32::MAX);
            let x = [x.next_down(), x, x.next_up()][random() as usize % 3].clamp(f32::MIN, f32::MAX);
            values.push(x);
            let (quotient, product) = (x / scale, x * (1.0 / scale));
            otherwise += usize::from(quotient.round_ties_even() != product.round_ties_even());
        }
    }
    assert!(otherwise > values.len() / 100, "{otherwise} of {} would differ", values.len());
    for (scheme, mapping) in SCHEMES {
        let affine = Affine::new(scheme, Some(mapping)).expect("a combination of the table");
        let layout =
            Layout { rows, k, group: 0, granularity: Granularity::Row, pad_rows: true, packed: true };
        let zeros: Vec<i32> = match mapping {
            Mapping::Symmetric => vec![0; scales.len()],
            Mapping::Asymmetric => {
                scales.iter().map(|s| affine.qmin + (s.to_bits() % (1 << affine.bits)) as i32).collect()
            }
        };
        let input: Vec<f64> = values.iter().map(|&x| f64::from(x)).collect();
        let given = Some((scales.as_slice(), zeros.as_slice()));
        let want =
            reference::quantize(&input, &layout, &affine, OnNonFinite::Error, given).expect("finite values");
        for kernels in Kernels::all() {
            let got =
                encode_given(kernels, &values, &layout, &affine, &scales, &zeros).expect("finite values");
            assert!(got.codes == want.codes, "{} {scheme}", kernels.name());
            assert_eq!(got.counters, want.counters, "{} {scheme}", kernels.name());
        }
    }
}
