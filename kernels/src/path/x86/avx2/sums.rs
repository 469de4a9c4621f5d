//! Sums over values and decoded values, in the order of the plain loop.

use std::arch::x86_64::*;

use super::lanes::{F32, load_block};
use crate::metrics::Sums;
use crate::path::sums::{LANES, finish};

/// Sums of a block; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,f16c,popcnt")]
pub(super) fn sums(x: &[f32], y: &[f32]) -> Sums {
    let n = x.len().min(y.len());
    let (mut low, mut high) = (Partial::new(), Partial::new());
    let mut at = 0;
    // SAFETY: eight values, or the `n - at` that are left, lie inside both slices.
    unsafe {
        while at + LANES <= n {
            let (x, y) = (x.as_ptr().add(at), y.as_ptr().add(at));
            low.add(_mm_loadu_ps(x), _mm_loadu_ps(y));
            high.add(_mm_loadu_ps(x.add(4)), _mm_loadu_ps(y.add(4)));
            at += LANES;
        }
        if at < n {
            // The zeros behind the end add nothing.
            let x = load_block::<F32>(x.as_ptr().add(at).cast(), n - at)[0];
            let y = load_block::<F32>(y.as_ptr().add(at).cast(), n - at)[0];
            low.add(_mm256_castps256_ps128(x), _mm256_castps256_ps128(y));
            high.add(_mm256_extractf128_ps::<1>(x), _mm256_extractf128_ps::<1>(y));
        }
    }
    let mut lanes = [[0.0; LANES]; 5];
    for (i, lanes) in lanes.iter_mut().enumerate() {
        // SAFETY: there is room for twice four.
        unsafe {
            _mm256_storeu_pd(lanes.as_mut_ptr(), low.sums[i]);
            _mm256_storeu_pd(lanes.as_mut_ptr().add(4), high.sums[i]);
        }
    }
    let [signal, noise, dot, decoded, worst] = lanes;
    finish(signal, noise, dot, decoded, worst)
}

/// Signal, noise, product, decoded signal and the largest error, one lane a partial sum.
struct Partial {
    sums: [__m256d; 5],
}

impl Partial {
    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    fn new() -> Self {
        Self { sums: [_mm256_setzero_pd(); 5] }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c,popcnt")]
    fn add(&mut self, x: __m128, y: __m128) {
        let (x, y) = (_mm256_cvtps_pd(x), _mm256_cvtps_pd(y));
        let error = _mm256_sub_pd(x, y);
        let magnitude = _mm256_andnot_pd(_mm256_set1_pd(-0.0), error);
        let [signal, noise, dot, decoded, worst] = self.sums;
        self.sums = [
            _mm256_add_pd(signal, _mm256_mul_pd(x, x)),
            _mm256_add_pd(noise, _mm256_mul_pd(error, error)),
            _mm256_add_pd(dot, _mm256_mul_pd(x, y)),
            _mm256_add_pd(decoded, _mm256_mul_pd(y, y)),
            _mm256_max_pd(magnitude, worst),
        ];
    }
}
