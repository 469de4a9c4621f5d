//! Inputs and outputs so large that the paths write past the cache.

use shmquant_kernels::{
    Affine, Arith, FloatType, Granularity, Kernels, Layout, OnNonFinite, Values, ZeroPoints, ZeroPointsMut,
};

use crate::cases::{SCHEMES, bytes_of};

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
        layout(1024, Granularity::Group, 16, true, true),
        layout(1024, Granularity::Group, 32, true, true),
        layout(1040, Granularity::Group, 16, true, false),
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
