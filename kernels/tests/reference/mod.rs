//! The contract once more, as simply as it can be said: one value at a time, no chunks, no tiles.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use shmquant_kernels::{Affine, Arith, Counters, Fault, Granularity, Layout, Mapping, OnNonFinite};

/// Everything that quantizing an item gives.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Quantized {
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<f32>,
    pub(crate) zero_points: Vec<i32>,
    pub(crate) counters: Counters,
    pub(crate) nulled: Vec<u64>,
}

/// Which parameter an element has.
pub(crate) fn param_of(layout: &Layout, element: u64) -> usize {
    let (row, col) = (element / layout.k, element % layout.k);
    (match layout.granularity {
        Granularity::Tensor => 0,
        Granularity::Row => row,
        Granularity::Dimension => col,
        Granularity::Group => row * layout.k.div_ceil(layout.group) + col / layout.group,
    }) as usize
}

/// Which bit an element's code begins at.
pub(crate) fn bit_of(layout: &Layout, bits: u8, element: u64) -> usize {
    let width = if layout.packed { u64::from(bits) } else { 8 };
    (if layout.pad_rows {
        let row_bytes = (layout.k * width).div_ceil(8);
        (element / layout.k) * row_bytes * 8 + (element % layout.k) * width
    } else {
        element * width
    }) as usize
}

/// Quantizes an item; `input` are the values as f64, which holds every input format.
pub(crate) fn quantize(
    input: &[f64],
    layout: &Layout,
    affine: &Affine,
    policy: OnNonFinite,
    given: Option<(&[f32], &[i32])>,
) -> Result<Quantized, Fault> {
    let sizes = layout.sizes(affine.bits).expect("a possible layout");
    assert_eq!(sizes.elements as usize, input.len());
    let mut counters = Counters { n: input.len() as u64, ..Counters::default() };
    let mut nulled = Vec::new();
    let mut first_bad = None;
    for (i, &x) in input.iter().enumerate() {
        if x.is_finite() && !(x as f32).is_finite() {
            if first_bad.is_none() || policy != OnNonFinite::Error {
                return Err(Fault::Overflow { index: i as u64, value: x });
            }
        } else if !x.is_finite() {
            counters.n_nonfinite += 1;
            first_bad.get_or_insert((i as u64, x as f32));
            let row = i as u64 / layout.k;
            if policy == OnNonFinite::Null && nulled.last() != Some(&row) {
                nulled.push(row);
            }
        }
    }
    if let (OnNonFinite::Error, Some((index, value))) = (policy, first_bad) {
        return Err(Fault::NonFinite { index, count: counters.n_nonfinite, value });
    }
    let x: Vec<f32> = input
        .iter()
        .enumerate()
        .map(|(i, &x)| if nulled.contains(&(i as u64 / layout.k)) { 0.0 } else { x as f32 })
        .collect();

    let mut ranges = vec![(0f32, 0f32); sizes.params as usize];
    for (i, &x) in x.iter().enumerate().filter(|(_, x)| x.is_finite()) {
        let range = &mut ranges[param_of(layout, i as u64)];
        *range = (range.0.min(x), range.1.max(x));
    }
    let mut scales = Vec::new();
    let mut zero_points = Vec::new();
    for (p, &(mn, mx)) in ranges.iter().enumerate() {
        if let Some((s, z)) = given {
            scales.push(s[p]);
            zero_points.push(z[p]);
            continue;
        }
        let scale = match affine.mapping {
            Mapping::Symmetric => mx.max(-mn) / ((affine.qmax - affine.qmin) as f32 / 2.0),
            Mapping::Asymmetric => {
                if (mx - mn).is_infinite() {
                    let index = (0..input.len() as u64).find(|&e| param_of(layout, e) == p).unwrap_or(0);
                    return Err(Fault::RangeOverflow { index, min: mn, max: mx });
                }
                (mx - mn) / (affine.qmax - affine.qmin) as f32
            }
        };
        if scale < f32::MIN_POSITIVE {
            counters.n_degenerate_groups += 1;
            scales.push(1.0);
            zero_points.push(0);
            continue;
        }
        scales.push(scale);
        zero_points.push(match affine.mapping {
            Mapping::Symmetric => 0,
            Mapping::Asymmetric => {
                let (qmin, qmax) = (affine.qmin as f32, affine.qmax as f32);
                (qmin - (mn / scale).round_ties_even()).clamp(qmin, qmax) as i32
            }
        });
    }

    let mut codes = vec![0u8; sizes.code_bytes as usize];
    for (i, &x) in x.iter().enumerate() {
        let p = param_of(layout, i as u64);
        let (s, zp) = (scales[p], zero_points[p]);
        let v = match affine.arith {
            Arith::Div => x / s,
            Arith::Recip => x * (1.0 / s),
        };
        let (lo, hi) = ((affine.qmin - zp) as f32, (affine.qmax - zp) as f32);
        counters.n_clipped +=
            u64::from(x.is_finite() && (v.round_ties_even() < lo || v.round_ties_even() > hi));
        let q = if x.is_nan() { zp } else { zp + v.clamp(lo, hi).round_ties_even() as i32 };
        let bit = bit_of(layout, affine.bits, i as u64);
        let width = if layout.packed { u32::from(affine.bits) } else { 8 };
        let mask = (0xffu32 >> (8 - width)) as u8;
        codes[bit / 8] |= (q as u8 & mask) << (bit % 8);
    }
    Ok(Quantized { codes, scales, zero_points, counters, nulled })
}

/// Decodes an item.
pub(crate) fn dequantize(result: &Quantized, layout: &Layout, affine: &Affine) -> Vec<f32> {
    (0..layout.rows * layout.k)
        .map(|e| {
            let bit = bit_of(layout, affine.bits, e);
            let width = if layout.packed { u32::from(affine.bits) } else { 8 };
            let raw = u32::from(result.codes[bit / 8]) >> (bit % 8) << (32 - width);
            let q = if affine.signed { raw as i32 >> (32 - width) } else { (raw >> (32 - width)) as i32 };
            let p = param_of(layout, e);
            (q - result.zero_points[p]) as f32 * result.scales[p]
        })
        .collect()
}
