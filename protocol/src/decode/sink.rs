//! Decoded values of the type that was asked for.

use std::sync::Arc;

use arrow_array::{ArrayRef, Float16Array, Float32Array, Float64Array};
use arrow_buffer::Buffer;
use half::{bf16, f16};
use shmquant_kernels::{Affine, FloatType, Layout, NoFlushing, ZeroPoints, decode};

use super::DecodeError;
use crate::table::{Details, InputError};

/// Elements decoded at a time where they have to be converted; a multiple of 8, so that chunks begin on a byte.
const BLOCK: u64 = 1 << 16;

/// Values that grow by whole items.
pub(super) enum Sink {
    F16(Vec<f16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
}

/// The parameters of one item.
pub(super) struct Params<'a> {
    pub(super) scales: &'a [f32],
    /// Empty if all are 0.
    pub(super) zero_points: &'a [i32],
}

impl Sink {
    pub(super) fn new(dtype: FloatType, capacity: usize) -> Result<Self, DecodeError> {
        Ok(match dtype {
            FloatType::F16 => Self::F16(Vec::with_capacity(capacity)),
            FloatType::F32 => Self::F32(Vec::with_capacity(capacity)),
            FloatType::F64 => Self::F64(Vec::with_capacity(capacity)),
            FloatType::Bf16 => {
                let details = InputError::argument("dtype", "Arrow has no type for bfloat16").value(dtype);
                return Err(DecodeError::Argument(Box::new(details.hint("float32 holds every bfloat16"))));
            }
        })
    }

    /// Decodes a whole item. The slices have the lengths that `layout` asks for: the caller has compared them.
    pub(super) fn decode(&mut self, codes: &[u8], layout: &Layout, affine: &Affine, params: &Params<'_>) {
        let _exact = NoFlushing::new();
        let elements = layout.elements();
        if let Self::F32(out) = self {
            let start = out.len();
            out.resize(start + elements as usize, 0.0);
            let zeros = zeros_of(params.zero_points);
            decode(codes, 0, layout, affine, params.scales, zeros, &mut out[start..]);
            return;
        }
        let run = match (layout.pad_rows, layout.k) {
            (true, k) if k > 0 => k * (BLOCK / k).max(1),
            _ => BLOCK,
        };
        let mut scratch = vec![0f32; run.min(elements) as usize];
        let mut first = 0;
        while first < elements {
            let n = run.min(elements - first);
            let part = layout.param_range(first, n);
            let part = part.start as usize..part.end as usize;
            let zeros = zeros_of(params.zero_points.get(part.clone()).unwrap_or_default());
            let from = layout.code_byte_offset(first, affine.bits) as usize;
            let block = &mut scratch[..n as usize];
            decode(&codes[from..], first, layout, affine, &params.scales[part], zeros, block);
            match self {
                Self::F16(out) => out.extend(block.iter().map(|v| f16::from_f32(*v))),
                Self::F64(out) => out.extend(block.iter().map(|v| f64::from(*v))),
                Self::F32(_) => {}
            }
            first += n;
        }
    }

    /// Values that were not quantized.
    pub(super) fn convert(&mut self, bytes: &[u8], dtype: FloatType) {
        match dtype {
            FloatType::F16 => {
                self.extend(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()))
            }
            FloatType::Bf16 => {
                self.extend(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()))
            }
            FloatType::F32 => {
                self.extend(bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))));
            }
            FloatType::F64 => self.extend(bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b))),
        }
    }

    /// From f64, which holds every format exactly: each value is rounded once.
    fn extend(&mut self, values: impl Iterator<Item = f64>) {
        match self {
            Self::F16(out) => out.extend(values.map(f16::from_f64)),
            Self::F32(out) => out.extend(values.map(|v| v as f32)),
            Self::F64(out) => out.extend(values),
        }
    }

    /// Sets `n` values from `start` on to 0.
    pub(super) fn clear(&mut self, start: usize, n: usize) {
        match self {
            Self::F16(out) => out[start..start + n].fill(f16::ZERO),
            Self::F32(out) => out[start..start + n].fill(0.0),
            Self::F64(out) => out[start..start + n].fill(0.0),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::F16(out) => out.len(),
            Self::F32(out) => out.len(),
            Self::F64(out) => out.len(),
        }
    }

    pub(super) fn into_array(self) -> ArrayRef {
        match self {
            Self::F16(out) => Arc::new(Float16Array::from(out)),
            Self::F32(out) => Arc::new(Float32Array::from(out)),
            Self::F64(out) => Arc::new(Float64Array::from(out)),
        }
    }

    pub(super) fn into_buffer(self) -> Buffer {
        match self {
            Self::F16(out) => Buffer::from_vec(out),
            Self::F32(out) => Buffer::from_vec(out),
            Self::F64(out) => Buffer::from_vec(out),
        }
    }
}

fn zeros_of(zero_points: &[i32]) -> ZeroPoints<'_> {
    if zero_points.is_empty() { ZeroPoints::None } else { ZeroPoints::I32(zero_points) }
}

/// Fails unless codes and parameters have the lengths that the layout asks for.
pub(super) fn check_lengths(
    codes: usize,
    layout: &Layout,
    affine: &Affine,
    params: &Params<'_>,
) -> Result<(), Box<Details>> {
    let Some(sizes) = layout.sizes(affine.bits) else {
        return Err(Box::new(Details::new(format!("{} x {} values cannot be", layout.rows, layout.k))));
    };
    if codes as u64 != sizes.code_bytes {
        return Err(Box::new(Details::new(format!(
            "{codes} bytes of codes, {} are needed",
            sizes.code_bytes
        ))));
    }
    let (scales, zeros) = (params.scales.len() as u64, params.zero_points.len() as u64);
    if scales != sizes.params {
        return Err(Box::new(Details::new(format!("{scales} scales, {} are needed", sizes.params))));
    }
    if zeros != 0 && zeros != scales {
        return Err(Box::new(Details::new(format!("{zeros} zero points for {scales} scales"))));
    }
    Ok(())
}
