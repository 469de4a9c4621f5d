//! Values quantized by the kernels, and what they mean code by code.

use shmquant_kernels::{
    Affine, Granularity, Layout, Mapping, OnNonFinite, Scheme, Values, ZeroPointsMut, fused,
};

/// Quantized values with what it takes to read them.
pub struct Quantized {
    pub layout: Layout,
    pub affine: Affine,
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
    pub zeros: Vec<f32>,
}

pub fn quantize(values: &[f32], scheme: Scheme, layout: Layout) -> Quantized {
    let affine = Affine::new(scheme, None).unwrap();
    let sizes = layout.sizes(affine.bits).unwrap();
    let mut codes = vec![0; sizes.code_bytes as usize];
    let mut scales = vec![0.0; sizes.params as usize];
    let mut zeros = vec![0.0; sizes.params as usize];
    let at = ZeroPointsMut::F32(&mut zeros);
    fused(
        Values::from_f32(values),
        0,
        &layout,
        &affine,
        OnNonFinite::Error,
        &mut codes,
        &mut scales,
        at,
        &mut Vec::new(),
    )
    .unwrap();
    Quantized { layout, affine, codes, scales, zeros }
}

impl Quantized {
    /// `(q - zp) * scale`, code by code.
    pub fn naive(&self) -> Vec<f32> {
        let bits = if self.layout.packed { usize::from(self.affine.bits) } else { 8 };
        let row_bytes = (self.layout.k as usize * bits).div_ceil(8);
        (0..self.layout.elements())
            .map(|e| {
                let (row, col) = (e / self.layout.k, e % self.layout.k);
                let bit = match self.layout.pad_rows {
                    true => row as usize * row_bytes * 8 + col as usize * bits,
                    false => e as usize * bits,
                };
                let raw = i32::from(self.codes[bit / 8] >> (bit % 8)) & ((1 << bits) - 1);
                let signed = self.affine.signed && raw >= 1 << (bits - 1);
                let code = if signed { raw - (1 << bits) } else { raw };
                let param = match self.layout.granularity {
                    Granularity::Tensor => 0,
                    Granularity::Row => row,
                    Granularity::Dimension => col,
                    Granularity::Group => {
                        row * self.layout.k.div_ceil(self.layout.group) + col / self.layout.group
                    }
                } as usize;
                (code - self.zeros[param] as i32) as f32 * self.scales[param]
            })
            .collect()
    }

    pub fn asymmetric(&self) -> bool {
        self.affine.mapping == Mapping::Asymmetric
    }
}

pub fn wave(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 % 101) as f32 - 40.0) * 0.125).collect()
}
