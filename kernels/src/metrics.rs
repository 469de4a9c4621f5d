//! What quantization cost: sums over values and their decoded codes, in an order that no thread count changes.

use crate::dequantize::Decoder;
use crate::fault::OnNonFinite;
use crate::layout::Layout;
use crate::path::{Kernels, TILE};
use crate::scheme::{Affine, ZeroPoints};
use crate::source::left_out;
use crate::values::Values;

/// Elements of one block; blocks are counted from a chunk's start.
const BLOCK: usize = 4096;

/// Sums over values x and decoded values y, in f64.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sums {
    /// Values that count: finite ones, of rows not left out.
    pub n: u64,
    /// Sum of x².
    pub signal: f64,
    /// Sum of (x - y)².
    pub noise: f64,
    /// Sum of x * y.
    pub dot: f64,
    /// Sum of y².
    pub decoded: f64,
    /// Largest |x - y|.
    pub worst: f64,
}

impl Sums {
    /// Adds another chunk's sums. The result depends on the order: fold chunks by their place in the item.
    pub fn add(&mut self, other: Self) {
        self.n += other.n;
        self.signal += other.signal;
        self.noise += other.noise;
        self.dot += other.dot;
        self.decoded += other.decoded;
        self.worst = self.worst.max(other.worst);
    }

    /// Mean squared error; NaN of no values.
    pub fn mse(&self) -> f64 {
        self.noise / self.n as f64
    }

    /// Signal to quantization noise in decibels: infinite without error, NaN without signal.
    pub fn sqnr_db(&self) -> f64 {
        if self.signal == 0.0 {
            return f64::NAN;
        }
        10.0 * (self.signal / self.noise).log10()
    }

    /// Largest absolute error; 0 of no values.
    pub fn max_abs_err(&self) -> f64 {
        self.worst
    }

    /// Cosine of the angle between values and decoded values; NaN where either is all zero.
    pub fn cosine(&self) -> f64 {
        self.dot / (self.signal.sqrt() * self.decoded.sqrt())
    }
}

/// Compares values with their codes; best run right after encoding, while both are in the cache.
///
/// Slices are those of [`crate::encode`]. Non-finite values do not count, and under [`OnNonFinite::Null`] neither do
/// the rows that hold them.
///
/// # Panics
/// Where a slice has another length than the chunk asks for.
#[allow(clippy::too_many_arguments, reason = "the same things that `encode` takes")]
pub fn measure<'z>(
    values: Values<'_>,
    first: u64,
    layout: &Layout,
    affine: &Affine,
    scales: &[f32],
    zero_points: impl Into<ZeroPoints<'z>>,
    codes: &[u8],
    policy: OnNonFinite,
) -> Sums {
    Kernels::best().measure(values, first, layout, affine, scales, zero_points.into(), codes, policy)
}

impl Kernels {
    /// [`measure`] on this path.
    #[allow(clippy::too_many_arguments, reason = "as the free function")]
    pub fn measure(
        &self,
        values: Values<'_>,
        first: u64,
        layout: &Layout,
        affine: &Affine,
        scales: &[f32],
        zero_points: ZeroPoints<'_>,
        codes: &[u8],
        policy: OnNonFinite,
    ) -> Sums {
        let len = values.len();
        let mut decoder = Decoder::new(self, codes, first, len, layout, affine, scales, zero_points);
        let nulled = if policy == OnNonFinite::Null {
            self.rows_with_nonfinite(values, first, layout)
        } else {
            Vec::new()
        };
        let mut sums = Sums::default();
        let mut x = [0f32; BLOCK];
        let mut y = [0f32; BLOCK];
        let mut at = 0;
        while at < len {
            let n = (len - at).min(BLOCK);
            let (x, y) = (&mut x[..n], &mut y[..n]);
            self.load(&values, at, x);
            decoder.read(at, y);
            for part in left_out(&nulled, layout.k.max(1), first + at as u64, n) {
                x[part].fill(f32::NAN);
            }
            let mut counted = n as u64;
            if !self.range(x).finite {
                for (x, y) in x.iter_mut().zip(y.iter_mut()).filter(|(x, _)| !x.is_finite()) {
                    (*x, *y) = (0.0, 0.0);
                    counted -= 1;
                }
            }
            let mut block = self.sums(x, y);
            block.n = counted;
            sums.add(block);
            at += n;
        }
        sums
    }

    fn rows_with_nonfinite(&self, values: Values<'_>, first: u64, layout: &Layout) -> Vec<u64> {
        let mut rows = Vec::new();
        let mut tile = [0f32; TILE];
        let mut at = 0;
        while at < values.len() {
            let n = (values.len() - at).min(BLOCK);
            if self.takes(values.dtype()) && self.range_of(values.slice(at..at + n)).finite {
                at += n;
                continue;
            }
            let tile = &mut tile[..(values.len() - at).min(TILE)];
            self.load(&values, at, tile);
            if !self.range(tile).finite {
                for (i, _) in tile.iter().enumerate().filter(|(_, v)| !v.is_finite()) {
                    rows.push((first + (at + i) as u64) / layout.k.max(1));
                }
                rows.dedup();
            }
            at += tile.len();
        }
        rows
    }
}
