//! Sums over values and decoded values, in the order of the plain loop.

use std::arch::aarch64::*;

use super::lanes::{F32, load_part};
use crate::metrics::Sums;
use crate::path::sums::{LANES, finish};

/// Sums of a block; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "neon")]
pub(super) fn sums(x: &[f32], y: &[f32]) -> Sums {
    let n = x.len().min(y.len());
    let mut parts = [Partial::new(); LANES / 2];
    let mut at = 0;
    // SAFETY: eight values, or the `n - at` that are left, lie inside both slices.
    unsafe {
        while at + LANES <= n {
            let (x, y) = (x.as_ptr().add(at), y.as_ptr().add(at));
            add(&mut parts, [vld1q_f32(x), vld1q_f32(x.add(4))], [vld1q_f32(y), vld1q_f32(y.add(4))]);
            at += LANES;
        }
        if at < n {
            // The zeros behind the end add nothing.
            let x = load_part::<F32>(x.as_ptr().add(at).cast(), n - at);
            let y = load_part::<F32>(y.as_ptr().add(at).cast(), n - at);
            add(&mut parts, [x[0], x[1]], [y[0], y[1]]);
        }
    }
    let mut lanes = [[0.0; LANES]; 5];
    for (i, lanes) in lanes.iter_mut().enumerate() {
        for (pair, part) in lanes.as_chunks_mut::<2>().0.iter_mut().zip(parts) {
            // SAFETY: a pair has room for two.
            unsafe { vst1q_f64(pair.as_mut_ptr(), part.sums[i]) };
        }
    }
    let [signal, noise, dot, decoded, worst] = lanes;
    finish(signal, noise, dot, decoded, worst)
}

/// Adds eight values to the partial sums.
#[inline]
#[target_feature(enable = "neon")]
fn add(parts: &mut [Partial; LANES / 2], x: [float32x4_t; 2], y: [float32x4_t; 2]) {
    for i in 0..2 {
        parts[2 * i].add(vcvt_f64_f32(vget_low_f32(x[i])), vcvt_f64_f32(vget_low_f32(y[i])));
        parts[2 * i + 1].add(vcvt_high_f64_f32(x[i]), vcvt_high_f64_f32(y[i]));
    }
}

/// Signal, noise, product, decoded signal and the largest error, one lane a partial sum.
#[derive(Clone, Copy)]
struct Partial {
    sums: [float64x2_t; 5],
}

impl Partial {
    #[inline]
    #[target_feature(enable = "neon")]
    fn new() -> Self {
        Self { sums: [vdupq_n_f64(0.0); 5] }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn add(&mut self, x: float64x2_t, y: float64x2_t) {
        let error = vsubq_f64(x, y);
        let magnitude = vabsq_f64(error);
        let [signal, noise, dot, decoded, worst] = self.sums;
        self.sums = [
            vaddq_f64(signal, vmulq_f64(x, x)),
            vaddq_f64(noise, vmulq_f64(error, error)),
            vaddq_f64(dot, vmulq_f64(x, y)),
            vaddq_f64(decoded, vmulq_f64(y, y)),
            // As the plain loop, which passes over NaN.
            vbslq_f64(vcgtq_f64(magnitude, worst), magnitude, worst),
        ];
    }
}
