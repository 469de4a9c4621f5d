//! Adjoining groups, whose parameters a path finds many at once: any number of them, of any length, and one among them
//! that is refused.

use proptest::test_runner::TestCaseError;
use shmquant_kernels::{
    Affine, Arith, FloatType, Granularity, Kernels, Layout, OnNonFinite, Values, ZeroPoints,
};

use crate::cases::{Case, SCHEMES, bytes_of};
use crate::{reference, run, same_as_reference};

/// Numbers without an end, the same each time.
fn numbers(seed: u64) -> impl FnMut() -> u32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    }
}

/// Groups of which each is of one kind: ordinary, of one sign, full of ties, empty, degenerate, next to that, huge.
fn groups(n: usize, len: usize, seed: u64) -> Vec<f32> {
    let mut random = numbers(seed);
    let mut values = Vec::with_capacity(n * len);
    for _ in 0..n {
        let kind = random() % 12;
        let scale = f32::from_bits(random() % 0x7000_0000 + 0x0800_0000);
        for _ in 0..len {
            let x = (random() % 4001) as f32 / 1000.0 - 2.0;
            values.push(match kind {
                0 => -x.abs(),
                1 => x.abs() + 1.0,
                2 => [127.0, -7.5, 0.5, 1.5, -2.5, 63.5][random() as usize % 6],
                3 => [0.0, -0.0][random() as usize % 2],
                4 => f32::from_bits(random() & 0x8000_01ff),
                // About as wide as the smallest range that has a scale.
                5 => x * f32::MIN_POSITIVE * [1.5, 7.5, 127.0, 255.0][random() as usize % 4],
                9 => x.abs() * f32::MIN_POSITIVE,
                6 => x.signum() * (0.49 * f32::MAX - x.abs() * 1e37),
                7 => x * scale,
                _ => x,
            });
        }
        // An end of the range in any place, and alone; the least one of a scheme, or next to it.
        let at = values.len() - 1 - random() as usize % len;
        match kind {
            8 => values[at] *= 1e3,
            9 => {
                let least = f32::MIN_POSITIVE * [1.5, 3.0, 7.5, 15.0, 127.0, 255.0][random() as usize % 6];
                values[at] = [least, least.next_down()][random() as usize % 2];
            }
            _ => {}
        }
    }
    values
}

fn case(values: &[f32], len: usize, affine: Affine, policy: OnNonFinite, dtype: FloatType) -> Case {
    let (k, group) = (values.len() as u64, len as u64);
    Case {
        layout: Layout { rows: 1, k, group, granularity: Granularity::Group, pad_rows: true, packed: true },
        affine,
        policy,
        dtype,
        bytes: bytes_of(values, dtype, &[1], false),
        cuts: vec![],
        shift: len % 8,
    }
}

/// Codes by the parameters of each path's own, some of them halved, so that values are clipped.
fn encode_by_halves(kernels: &Kernels, case: &Case, scales: &[f32], zeros: &[i32]) -> String {
    let scales: Vec<f32> =
        scales.iter().enumerate().map(|(i, s)| if i % 3 == 0 { (s / 2.0).max(1e-30) } else { *s }).collect();
    let mut codes = vec![0x5a; case.layout.code_bytes(case.affine.bits) as usize];
    let values = Values::from_bytes(&case.bytes, case.dtype);
    let zeros = ZeroPoints::I32(zeros);
    let got = kernels.encode(
        values,
        0,
        &case.layout,
        &case.affine,
        case.policy,
        &scales,
        zeros,
        &mut codes,
        &mut Vec::new(),
    );
    format!("{:?}", got.map(|counters| (counters, codes)))
}

#[test]
fn any_number_of_groups_of_any_length_gives_the_reference() -> Result<(), TestCaseError> {
    let lengths = (1..=70).chain([100, 128, 333, 1000, 1024, 1025, 2048, 4096, 4100, 5000]);
    for len in lengths {
        for n in 1..=40usize {
            // All of them for the lengths that have a way of their own, else each now and then.
            let every = if matches!(len, 16 | 32) { 1 } else { 5 };
            if len > 70 && n % 7 != len % 7 {
                continue;
            }
            for (s, (scheme, mapping)) in
                SCHEMES.into_iter().enumerate().filter(|(s, _)| (s + n + len) % every == 0)
            {
                let mut affine = Affine::new(scheme, Some(mapping)).expect("a combination of the table");
                affine.arith = if (n + s) % 4 == 0 { Arith::Recip } else { Arith::Div };
                let dtype = [FloatType::F32, FloatType::F32, FloatType::Bf16, FloatType::F16][(n + s) % 4];
                let mut values = groups(n, len, (len * 64 + n) as u64);
                if dtype == FloatType::F16 {
                    values.iter_mut().for_each(|x| *x = x.clamp(-6e4, 6e4));
                }
                let case = case(&values, len, affine, OnNonFinite::Error, dtype);
                let want = reference::quantize(&case.input(), &case.layout, &affine, case.policy, None);
                let Ok(own) = &want else { panic!("{scheme} {n} groups of {len}: {want:?}") };
                let mut given = Vec::new();
                for kernels in Kernels::all() {
                    let what = format!("{} {scheme} {mapping} {dtype}: {n} groups of {len}", kernels.name());
                    same_as_reference(&case, run(kernels, &case, true, &[(0, n * len)]), &want, &what)?;
                    given.push((what, encode_by_halves(kernels, &case, &own.scales, &own.zero_points)));
                }
                for (what, got) in &given {
                    assert_eq!(got, &given[0].1, "given parameters, {what}");
                }
            }
        }
    }
    Ok(())
}

/// What is refused is the same value or group wherever it stands among others, and so is what the lenient policy makes of
/// it; the portable path says which.
#[test]
fn a_refused_group_is_the_same_on_every_path() {
    let most = f32::MAX;
    for len in [1usize, 7, 8, 15, 16, 17, 32, 33, 64, 130] {
        let n = 37;
        let tame: Vec<f32> = (0..n * len).map(|i| ((i * 37 + 11) % 255) as f32 / 2.0 - 63.5).collect();
        // Every place where groups are short, else some in every group.
        let step = if len <= 17 { 1 } else { len / 3 };
        for (s, (scheme, mapping)) in SCHEMES.into_iter().enumerate() {
            let affine = Affine::new(scheme, Some(mapping)).expect("a combination of the table");
            for at in (0..n * len).step_by(step) {
                let mut values = tame.clone();
                let other = at / len * len + (at + 1) % len;
                match (at + s) % 5 {
                    0 => values[at] = f32::NAN,
                    1 => values[at] = -f32::NAN,
                    2 => values[at] = f32::INFINITY,
                    3 => values[at] = f32::NEG_INFINITY,
                    // Alone where groups have one value, and then none.
                    _ => (values[at], values[other]) = (most, -most),
                }
                // A second one, before or after it, now and then in the same group.
                if at % 3 == 0 {
                    values[(at * 7 + 5) % (n * len)] = f32::NEG_INFINITY;
                }
                for policy in [OnNonFinite::Error, OnNonFinite::Saturate] {
                    let dtype = if at % 2 == 0 { FloatType::F32 } else { FloatType::Bf16 };
                    let case = case(&values, len, affine, policy, dtype);
                    let own: Vec<_> = Kernels::all()
                        .into_iter()
                        .map(|kernels| format!("{:?}", run(kernels, &case, true, &[(0, n * len)])))
                        .collect();
                    let (scales, zeros) = (vec![0.5; n], vec![0; n]);
                    let given: Vec<_> = Kernels::all()
                        .into_iter()
                        .map(|kernels| encode_by_halves(kernels, &case, &scales, &zeros))
                        .collect();
                    for (i, kernels) in Kernels::all().into_iter().enumerate() {
                        let what =
                            format!("{} {scheme} {mapping} {policy} {at} of {n} x {len}", kernels.name());
                        assert_eq!(own[i], own[0], "{what}");
                        assert_eq!(given[i], given[0], "given parameters, {what}");
                    }
                }
            }
        }
    }
}
