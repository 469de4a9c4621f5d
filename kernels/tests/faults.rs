//! What is refused, with which place, and what the two lenient policies make of it instead.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use shmquant_kernels::{
    Affine, Counters, Fault, Granularity, Kernels, Layout, OnNonFinite, Range, Scheme, Values, ZeroPointsMut,
};

const FIRST: u64 = 600;

/// Ten rows of 300 with NaN at 700 and 1900 and an infinity at 701; the chunk begins with the third row.
fn item() -> Vec<f32> {
    let mut x: Vec<f32> = (0..3000).map(|i| ((i * 31) % 201) as f32 / 10.0 - 10.0).collect();
    x[700] = f32::NAN;
    x[701] = f32::NEG_INFINITY;
    x[1900] = f32::from_bits(0xffc0_1234);
    x
}

fn layout(granularity: Granularity) -> Layout {
    Layout { rows: 10, k: 300, group: 128, granularity, pad_rows: true, packed: true }
}

struct Output {
    codes: Vec<u8>,
    scales: Vec<f32>,
    counters: Counters,
    nulled: Vec<u64>,
}

fn run(
    kernels: &Kernels,
    values: Values<'_>,
    layout: &Layout,
    scheme: Scheme,
    policy: OnNonFinite,
) -> Result<Output, Fault> {
    let affine = Affine::new(scheme, None)?;
    let len = values.len() as u64;
    let params = layout.param_range(FIRST, len);
    let mut codes = vec![0; layout.chunk_code_bytes(FIRST, len, affine.bits) as usize];
    let mut scales = vec![0.0; (params.end - params.start) as usize];
    let mut zeros = vec![0u8; scales.len()];
    let zeros = if affine.signed { ZeroPointsMut::None } else { ZeroPointsMut::U8(&mut zeros) };
    let mut nulled = Vec::new();
    let counters =
        kernels.fused(values, FIRST, layout, &affine, policy, &mut codes, &mut scales, zeros, &mut nulled)?;
    Ok(Output { codes, scales, counters, nulled })
}

#[test]
fn the_first_non_finite_value_is_named_and_all_are_counted() {
    let x = item();
    let values = Values::from_f32(&x[600..]);
    for kernels in Kernels::all() {
        for granularity in [Granularity::Row, Granularity::Group] {
            for scheme in Scheme::ALL {
                let got = run(kernels, values, &layout(granularity), scheme, OnNonFinite::Error).err();
                let named = matches!(
                    got,
                    Some(Fault::NonFinite { index: 700, count: 3, value }) if value.is_nan()
                );
                assert!(named, "{} {scheme} {got:?}", kernels.name());
            }
        }
        let mut range = [Range::EMPTY];
        let got =
            kernels.scan(values, FIRST, &layout(Granularity::Tensor), OnNonFinite::Error, &mut range).err();
        assert!(matches!(got, Some(Fault::NonFinite { index: 700, count: 3, .. })), "{got:?}");
    }
}

#[test]
fn null_leaves_rows_out_and_lists_them() -> Result<(), Fault> {
    let x = item();
    let mut zeroed = x.clone();
    zeroed[600..900].fill(0.0);
    zeroed[1800..2100].fill(0.0);
    for kernels in Kernels::all() {
        for scheme in Scheme::ALL {
            let layout = layout(Granularity::Group);
            let got = run(kernels, Values::from_f32(&x[600..]), &layout, scheme, OnNonFinite::Null)?;
            let want = run(kernels, Values::from_f32(&zeroed[600..]), &layout, scheme, OnNonFinite::Error)?;
            assert_eq!(got.nulled, [2, 6]);
            assert_eq!((&got.codes, &got.scales), (&want.codes, &want.scales), "{} {scheme}", kernels.name());
            assert_eq!(got.counters.n_nonfinite, 3);
            assert_eq!(got.counters.n_degenerate_groups, 6);
        }
    }
    Ok(())
}

#[test]
fn saturate_keeps_the_range_and_takes_the_outermost_codes() -> Result<(), Fault> {
    let mut x = item();
    let layout = layout(Granularity::Row);
    for kernels in Kernels::all() {
        x[701] = f32::NEG_INFINITY;
        let got = run(kernels, Values::from_f32(&x[600..]), &layout, Scheme::Int8, OnNonFinite::Saturate)?;
        assert_eq!((got.codes[100] as i8, got.codes[101] as i8), (0, -127), "{}", kernels.name());
        assert!(got.scales.iter().all(|&s| s == 10.0 / 127.0));
        let want = Counters { n: 2400, n_nonfinite: 3, ..Counters::default() };
        assert_eq!(got.counters, want);
        x[701] = f32::INFINITY;
        let got = run(kernels, Values::from_f32(&x[600..]), &layout, Scheme::Int8, OnNonFinite::Saturate)?;
        assert_eq!(got.codes[101], 127);
    }
    Ok(())
}

#[test]
fn doubles_that_float32_cannot_hold_are_refused_under_every_policy() {
    let mut x: Vec<f64> = item().iter().map(|&v| f64::from(v)).collect();
    x[900] = -1e39;
    for kernels in Kernels::all() {
        for policy in [OnNonFinite::Null, OnNonFinite::Saturate] {
            let got =
                run(kernels, Values::from_f64(&x[600..]), &layout(Granularity::Row), Scheme::Int8, policy);
            assert_eq!(got.err(), Some(Fault::Overflow { index: 900, value: -1e39 }), "{policy}");
        }
        x[650] = f64::from(f32::MAX) * (1.0 + 1e-7);
        let got = run(
            kernels,
            Values::from_f64(&x[600..]),
            &layout(Granularity::Row),
            Scheme::Int8,
            OnNonFinite::Error,
        );
        assert!(matches!(got.err(), Some(Fault::Overflow { index: 650, .. })));
        // Half a unit below the end still rounds down.
        x[650] = f64::from(f32::MAX) * (1.0 + 2e-8);
        let got = run(
            kernels,
            Values::from_f64(&x[600..]),
            &layout(Granularity::Row),
            Scheme::Int8,
            OnNonFinite::Error,
        );
        assert!(matches!(got.err(), Some(Fault::NonFinite { index: 700, count: 3, .. })));
        x[650] = 1.0;
    }
}

#[test]
fn ranges_that_overflow_are_refused_where_they_are_needed() -> Result<(), Fault> {
    let mut x = vec![1f32; 2400];
    (x[400], x[401]) = (f32::MAX, -f32::MAX);
    let values = Values::from_f32(&x);
    for kernels in Kernels::all() {
        let layout = layout(Granularity::Group);
        let got = run(kernels, values, &layout, Scheme::UInt4, OnNonFinite::Error).err();
        // Row 3 is columns 0.. of element 900; its first group holds both.
        assert_eq!(got, Some(Fault::RangeOverflow { index: 900, min: -f32::MAX, max: f32::MAX }));
        assert!(run(kernels, values, &layout, Scheme::Int4, OnNonFinite::Error).is_ok());
    }
    Ok(())
}

#[test]
fn messages_say_what_and_how_to_go_on() {
    let text = Fault::NonFinite { index: 7, count: 2, value: f32::NAN }.to_string();
    assert!(text.contains("NaN") && text.contains("element 7") && text.contains("hint:"), "{text}");
    let text =
        Affine::new(Scheme::UInt8, Some(shmquant_kernels::Mapping::Symmetric)).expect_err("none").to_string();
    assert!(text.contains("uint8") && text.contains("symmetric"), "{text}");
}
