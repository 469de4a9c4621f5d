//! The instruction-set paths: one table of functions each, chosen once, all with the same results.
#![allow(unsafe_code, reason = "functions with target features may only be called where the CPU has them")]

use std::sync::OnceLock;

use crate::metrics::Sums;
use crate::path::groups::{Coded, Columns, Done, Groups, Hand, Widen, code_bytes};
use crate::scheme::{Affine, Arith, Range};
use crate::values::{FloatType, Values};

#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(
        dead_code,
        reason = "only the x86-64 paths write past the cache, and other machines may have no path"
    )
)]
pub(crate) mod groups;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod sums;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
use neon::detected;
#[cfg(target_arch = "x86_64")]
use x86::detected;

/// No path but the portable one.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detected() -> Vec<&'static Kernels> {
    Vec::new()
}

/// Values that one load brings into a private buffer: 4 KiB of f32, a fraction of the L1 cache.
pub(crate) const TILE: usize = 1024;

/// Values of one domain that a path is given at once, straight from the source.
pub(crate) const BLOCK: usize = 4096;

/// Range of a tile, and whether it can be trusted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TileRange {
    /// Of no meaning unless `finite`.
    pub(crate) range: Range,
    pub(crate) finite: bool,
}

/// What encoding the values of one domain needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) scale: f32,
    pub(crate) inverse: f32,
    /// `qmin - zero_point`
    pub(crate) lo: f32,
    /// `qmax - zero_point`
    pub(crate) hi: f32,
    pub(crate) zero_point: i32,
    pub(crate) arith: Arith,
}

impl Step {
    pub(crate) fn new(scale: f32, zero_point: i32, affine: &Affine) -> Self {
        let lo = affine.qmin.saturating_sub(zero_point) as f32;
        let hi = affine.qmax.saturating_sub(zero_point) as f32;
        Self { scale, inverse: 1.0 / scale, lo, hi, zero_point, arith: affine.arith }
    }
}

type EncodeColumns = unsafe fn(&[f32], &mut [u8], &[f32], &[i32], &Affine) -> u64;
type DecodeColumns = unsafe fn(&[u8], &mut [f32], &[f32], &[i32], bool);

/// The functions of one instruction-set path. [`Kernels::best`] is what the free functions of this crate use.
#[derive(Clone, Copy)]
pub struct Kernels {
    name: &'static str,
    /// Many codes go past the cache.
    pub(crate) streams: bool,
    hand: Option<&'static Hand>,
    load: unsafe fn(*const u8, FloatType, &mut [f32]),
    range: unsafe fn(&[f32]) -> TileRange,
    encode: unsafe fn(&[f32], &mut [u8], &Step) -> u64,
    encode_columns: EncodeColumns,
    merge_columns: unsafe fn(&[f32], &mut [f32], &mut [f32]),
    decode: unsafe fn(&[u8], &mut [f32], f32, i32, bool),
    decode_columns: DecodeColumns,
    pack: unsafe fn(&[u8], &mut [u8], u8),
    unpack: unsafe fn(&[u8], &mut [u8], u8, bool),
}

/// Asks for the lines one page ahead of those about to be read: the hardware's own prefetchers stop at every page.
#[inline(always)]
fn prefetch(from: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line + 4096).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, bytes);
}

/// Compiles the portable loops under a list of target features.
macro_rules! versions {
    ($($feature:literal)?) => {
        use crate::path::{Kernels, Step, TileRange, portable};
        use crate::scheme::Affine;
        use crate::values::FloatType;

        $(#[target_feature(enable = $feature)])?
        unsafe fn load(from: *const u8, dtype: FloatType, out: &mut [f32]) {
            // SAFETY: the caller vouches for `out.len()` readable values at `from`; every read is unaligned.
            unsafe {
                crate::path::prefetch(from, out.len() * dtype.size());
                match dtype {
                    FloatType::F32 => {
                        std::ptr::copy_nonoverlapping(from, out.as_mut_ptr().cast::<u8>(), out.len() * 4);
                    }
                    FloatType::F16 => {
                        for (i, out) in out.iter_mut().enumerate() {
                            *out = portable::widen_f16(from.cast::<u16>().add(i).read_unaligned());
                        }
                    }
                    FloatType::Bf16 => {
                        for (i, out) in out.iter_mut().enumerate() {
                            *out = portable::widen_bf16(from.cast::<u16>().add(i).read_unaligned());
                        }
                    }
                    FloatType::F64 => {
                        for (i, out) in out.iter_mut().enumerate() {
                            *out = from.cast::<f64>().add(i).read_unaligned() as f32;
                        }
                    }
                }
            }
        }

        $(#[target_feature(enable = $feature)])?
        fn range(values: &[f32]) -> TileRange {
            portable::range(values)
        }

        $(#[target_feature(enable = $feature)])?
        fn encode(values: &[f32], codes: &mut [u8], step: &Step) -> u64 {
            portable::encode(values, codes, step)
        }

        $(#[target_feature(enable = $feature)])?
        fn encode_columns(v: &[f32], codes: &mut [u8], scales: &[f32], zeros: &[i32], affine: &Affine) -> u64 {
            portable::encode_columns(v, codes, scales, zeros, affine)
        }

        $(#[target_feature(enable = $feature)])?
        fn merge_columns(values: &[f32], min: &mut [f32], max: &mut [f32]) {
            portable::merge_columns(values, min, max);
        }

        $(#[target_feature(enable = $feature)])?
        fn decode(codes: &[u8], out: &mut [f32], scale: f32, zero_point: i32, signed: bool) {
            portable::decode(codes, out, scale, zero_point, signed);
        }

        $(#[target_feature(enable = $feature)])?
        fn decode_columns(codes: &[u8], out: &mut [f32], scales: &[f32], zeros: &[i32], signed: bool) {
            portable::decode_columns(codes, out, scales, zeros, signed);
        }

        $(#[target_feature(enable = $feature)])?
        fn pack(codes: &[u8], out: &mut [u8], bits: u8) {
            portable::pack(codes, out, bits);
        }

        $(#[target_feature(enable = $feature)])?
        fn unpack(bytes: &[u8], codes: &mut [u8], bits: u8, signed: bool) {
            portable::unpack(bytes, codes, bits, signed);
        }
    };
}
pub(crate) use versions;

/// The path that every CPU has.
mod baseline {
    crate::path::versions!();

    pub(super) static KERNELS: Kernels = LOOPS;

    /// For paths that have no loops of their own.
    pub(super) const LOOPS: Kernels = Kernels {
        name: "portable",
        streams: true,
        hand: None,
        load,
        range,
        encode,
        encode_columns,
        merge_columns,
        decode,
        decode_columns,
        pack,
        unpack,
    };
}

impl Kernels {
    /// The fastest path of this CPU.
    pub fn best() -> &'static Self {
        static BEST: OnceLock<&'static Kernels> = OnceLock::new();
        BEST.get_or_init(|| Self::all().pop().unwrap_or(&baseline::KERNELS))
    }

    /// The same for codes that are read again at once, as those are that another thread moves on: they stay in the cache.
    pub fn near() -> &'static Self {
        static NEAR: OnceLock<Kernels> = OnceLock::new();
        NEAR.get_or_init(|| Self { streams: false, ..*Self::best() })
    }

    /// Every path that this CPU can run, slowest first.
    pub fn all() -> Vec<&'static Self> {
        std::iter::once(&baseline::KERNELS).chain(detected()).collect()
    }

    /// The path's name: `portable`, `avx2`, `avx512`, `neon`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    // A table is only handed out where its features were detected, which is what makes the calls below sound.

    /// Reads `out.len()` values from `at` on into a private buffer.
    pub(crate) fn load(&self, values: &Values<'_>, at: usize, out: &mut [f32]) {
        let part = values.slice(at..at + out.len());
        // SAFETY: `part` is `out.len()` readable values; features were detected.
        unsafe { (self.load)(part.as_ptr(), part.dtype(), out) }
    }

    /// Whether there is more to this path than its loops, for values of a format.
    pub(crate) fn takes(&self, dtype: FloatType) -> bool {
        self.hand.is_some() && dtype != FloatType::F64
    }

    /// Quantizes adjoining groups. Stops before a group that needs a closer look.
    pub(crate) fn groups(&self, mut run: Groups<'_>) -> Done {
        let Some(hand) = self.hand.filter(|_| run.len > 0) else { return Done::default() };
        let n = run.scales.len();
        assert!(run.values.len() == n * run.len, "{:?}: {n} groups of {}", run.values, run.len);
        assert!(run.zero_points.len() == n && run.codes.len() == n * code_bytes(run.len, run.stored));
        // SAFETY: values and outputs were measured above; features were detected.
        unsafe { (hand.groups)(&mut run) }
    }

    /// Encodes a part of a row; `None` where it needs a closer look.
    pub(crate) fn columns(&self, mut run: Columns<'_>) -> Option<u64> {
        let hand = self.hand?;
        let n = run.values.len();
        assert!(
            run.factors.len() == n && run.zero_points.len() == n,
            "{:?}: not as many columns",
            run.values
        );
        assert!(run.codes.len() == code_bytes(n, run.stored));
        // SAFETY: values and outputs were measured above; features were detected.
        unsafe { (hand.columns)(&mut run) }
    }

    /// The range of values where they lie; not `finite` where they need a closer look.
    pub(crate) fn range_of(&self, values: Values<'_>) -> TileRange {
        match self.hand {
            // SAFETY: features were detected.
            Some(hand) => unsafe { (hand.range)(values) },
            None => TileRange { range: Range::EMPTY, finite: false },
        }
    }

    /// Widens the ranges of columns by a part of a row; `false`, with nothing done, where it needs a closer look.
    pub(crate) fn widen(&self, mut run: Widen<'_>) -> bool {
        let Some(hand) = self.hand else { return false };
        let n = run.values.len();
        assert!(run.min.len() == n && run.max.len() == n, "{:?}: not as many columns", run.values);
        // SAFETY: values and ranges were measured above; features were detected.
        unsafe { (hand.widen)(&mut run) }
    }

    pub(crate) fn range(&self, values: &[f32]) -> TileRange {
        // SAFETY: features were detected.
        unsafe { (self.range)(values) }
    }

    pub(crate) fn encode_tile(&self, values: &[f32], codes: &mut [u8], step: &Step) -> u64 {
        debug_assert_eq!(values.len(), codes.len());
        // SAFETY: features were detected.
        unsafe { (self.encode)(values, codes, step) }
    }

    pub(crate) fn encode_columns(
        &self,
        values: &[f32],
        codes: &mut [u8],
        scales: &[f32],
        zero_points: &[i32],
        affine: &Affine,
    ) -> u64 {
        // SAFETY: features were detected.
        unsafe { (self.encode_columns)(values, codes, scales, zero_points, affine) }
    }

    pub(crate) fn merge_columns(&self, values: &[f32], min: &mut [f32], max: &mut [f32]) {
        // SAFETY: features were detected.
        unsafe { (self.merge_columns)(values, min, max) }
    }

    pub(crate) fn decode_tile(
        &self,
        codes: &[u8],
        out: &mut [f32],
        scale: f32,
        zero_point: i32,
        signed: bool,
    ) {
        // SAFETY: features were detected.
        unsafe { (self.decode)(codes, out, scale, zero_point, signed) }
    }

    pub(crate) fn decode_columns(
        &self,
        codes: &[u8],
        out: &mut [f32],
        scales: &[f32],
        zero_points: &[i32],
        signed: bool,
    ) {
        // SAFETY: features were detected.
        unsafe { (self.decode_columns)(codes, out, scales, zero_points, signed) }
    }

    pub(crate) fn pack_bytes(&self, codes: &[u8], out: &mut [u8], bits: u8) {
        // SAFETY: features were detected.
        unsafe { (self.pack)(codes, out, bits) }
    }

    pub(crate) fn unpack_bytes(&self, bytes: &[u8], codes: &mut [u8], bits: u8, signed: bool) {
        // SAFETY: features were detected.
        unsafe { (self.unpack)(bytes, codes, bits, signed) }
    }

    /// Values of adjoining groups whose codes begin on bytes and take 8 or 4 bits; `false` where the path has no way of
    /// its own.
    pub(crate) fn decode_groups(&self, mut run: Coded<'_>) -> bool {
        let Some(hand) = self.hand else { return false };
        let n = run.scales.len();
        assert!(run.zero_points.len() == n && run.out.len() == n * run.len && matches!(run.stored, 4 | 8));
        assert!(n < 2 || (run.len * usize::from(run.stored)).is_multiple_of(8));
        assert!(run.codes.len() == code_bytes(n * run.len, run.stored));
        // SAFETY: codes and outputs were measured above; features were detected.
        unsafe { (hand.decode)(&mut run) };
        true
    }

    /// Sums over as many values and decoded values; how many they are is left to the caller.
    pub(crate) fn sums(&self, x: &[f32], y: &[f32]) -> Sums {
        match self.hand {
            // SAFETY: features were detected.
            Some(hand) => unsafe { (hand.sums)(x, y) },
            None => sums::sum_block(x, y),
        }
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Kernels").field(&self.name).finish()
    }
}
