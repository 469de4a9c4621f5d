//! Sums over a block of values and their decoded codes, as a plain loop. Paths that have a loop of their
//! own keep to its order.

use crate::metrics::Sums;

/// Partial sums kept apart inside a block, and added in their order at its end: so every path adds in the same order.
/// Element i of a block belongs to the sum `i % LANES`.
pub(super) const LANES: usize = 8;

/// The sums of a block; `n` is left to the caller.
#[inline(always)]
pub(super) fn sum_block(x: &[f32], y: &[f32]) -> Sums {
    let mut signal = [0f64; LANES];
    let mut noise = [0f64; LANES];
    let mut dot = [0f64; LANES];
    let mut decoded = [0f64; LANES];
    let mut worst = [0f64; LANES];
    let mut add = |i: usize, x: f32, y: f32| {
        let (x, y) = (f64::from(x), f64::from(y));
        let error = x - y;
        signal[i] += x * x;
        noise[i] += error * error;
        dot[i] += x * y;
        decoded[i] += y * y;
        worst[i] = if error.abs() > worst[i] { error.abs() } else { worst[i] };
    };
    let (xs, x_rest) = x.as_chunks::<LANES>();
    let (ys, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in xs.iter().zip(ys) {
        for i in 0..LANES {
            add(i, x[i], y[i]);
        }
    }
    for (i, (&x, &y)) in x_rest.iter().zip(y_rest).enumerate() {
        add(i, x, y);
    }
    finish(signal, noise, dot, decoded, worst)
}

/// The partial sums of a block, added in their order.
#[inline(always)]
pub(super) fn finish(
    signal: [f64; LANES],
    noise: [f64; LANES],
    dot: [f64; LANES],
    decoded: [f64; LANES],
    worst: [f64; LANES],
) -> Sums {
    let total = |lanes: [f64; LANES]| lanes.iter().sum();
    Sums {
        n: 0,
        signal: total(signal),
        noise: total(noise),
        dot: total(dot),
        decoded: total(decoded),
        worst: worst.iter().fold(0.0, |a, &b| if b > a { b } else { a }),
    }
}
