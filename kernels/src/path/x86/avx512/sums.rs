//! Sums over values and decoded values, in the order of the plain loop.

use std::arch::x86_64::*;

use super::lanes::{F32, load_block};
use crate::metrics::Sums;
use crate::path::sums::{LANES, finish};

/// Sums of a block; the [`crate::path::Kernels`] entry.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
pub(super) fn sums(x: &[f32], y: &[f32]) -> Sums {
    let n = x.len().min(y.len());
    let mut all = Partial { sums: [_mm512_setzero_pd(); 5] };
    let mut at = 0;
    // SAFETY: eight values, or the `n - at` that are left, lie inside both slices.
    unsafe {
        while at + LANES <= n {
            all.add(_mm256_loadu_ps(x.as_ptr().add(at)), _mm256_loadu_ps(y.as_ptr().add(at)));
            at += LANES;
        }
        if at < n {
            // The zeros behind the end add nothing.
            let x = load_block::<F32>(x.as_ptr().add(at).cast(), n - at)[0];
            let y = load_block::<F32>(y.as_ptr().add(at).cast(), n - at)[0];
            all.add(_mm512_castps512_ps256(x), _mm512_castps512_ps256(y));
        }
    }
    let mut lanes = [[0.0; LANES]; 5];
    for (lanes, sums) in lanes.iter_mut().zip(all.sums) {
        // SAFETY: there is room for eight.
        unsafe { _mm512_storeu_pd(lanes.as_mut_ptr(), sums) };
    }
    let [signal, noise, dot, decoded, worst] = lanes;
    finish(signal, noise, dot, decoded, worst)
}

/// Signal, noise, product, decoded signal and the largest error, one lane a partial sum.
struct Partial {
    sums: [__m512d; 5],
}

impl Partial {
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq,popcnt")]
    fn add(&mut self, x: __m256, y: __m256) {
        let (x, y) = (_mm512_cvtps_pd(x), _mm512_cvtps_pd(y));
        let error = _mm512_sub_pd(x, y);
        let [signal, noise, dot, decoded, worst] = self.sums;
        self.sums = [
            _mm512_add_pd(signal, _mm512_mul_pd(x, x)),
            _mm512_add_pd(noise, _mm512_mul_pd(error, error)),
            _mm512_add_pd(dot, _mm512_mul_pd(x, y)),
            _mm512_add_pd(decoded, _mm512_mul_pd(y, y)),
            _mm512_max_pd(_mm512_abs_pd(error), worst),
        ];
    }
}
