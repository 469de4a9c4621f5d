//! The instruction-set paths: one table of functions each, chosen once, all with the same results.
#![allow(unsafe_code, reason = "functions with target features may only be called where the CPU has them")]

use std::sync::OnceLock;

use crate::path::groups::{Done, GROUP_UNIT, Groups};
use crate::scheme::{Affine, Arith, Range};
use crate::values::{FloatType, Values};

#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only x86-64 has paths of its own so far"))]
pub(crate) mod groups;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "x86_64")]
use x86::detected;

/// No path but the portable one.
#[cfg(not(target_arch = "x86_64"))]
fn detected() -> Vec<&'static Kernels> {
    Vec::new()
}

/// Values that one load brings into a private buffer: 4 KiB of f32, a fraction of the L1 cache.
pub(crate) const TILE: usize = 1024;

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
pub struct Kernels {
    name: &'static str,
    groups: Option<unsafe fn(&mut Groups<'_>) -> Done>,
    load: unsafe fn(*const u8, FloatType, &mut [f32]),
    range: unsafe fn(&[f32]) -> TileRange,
    encode: unsafe fn(&[f32], &mut [u8], &Step) -> u64,
    encode_columns: EncodeColumns,
    merge_columns: unsafe fn(&[f32], &mut [Range]),
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
        use crate::scheme::{Affine, Range};
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
        fn merge_columns(values: &[f32], ranges: &mut [Range]) {
            portable::merge_columns(values, ranges);
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

    pub(super) static KERNELS: Kernels = Kernels {
        name: "portable",
        groups: None,
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

    /// Every path that this CPU can run, slowest first.
    pub fn all() -> Vec<&'static Self> {
        std::iter::once(&baseline::KERNELS).chain(detected()).collect()
    }

    /// The path's name: `portable`, `avx2`, `avx512`.
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

    /// Whether [`Kernels::groups`] takes on groups of this length.
    pub(crate) fn takes_groups_of(&self, len: usize) -> bool {
        self.groups.is_some() && len > 0 && len.is_multiple_of(GROUP_UNIT)
    }

    /// Quantizes adjoining groups of f32. Stops before a group that needs a closer look.
    #[allow(clippy::too_many_arguments, reason = "the parts of `Groups`, checked here")]
    pub(crate) fn groups(
        &self,
        values: Values<'_>,
        len: usize,
        codes: &mut [u8],
        scales: &mut [f32],
        zero_points: &mut [i32],
        affine: &Affine,
        stream: bool,
    ) -> Done {
        let Some(run) = self.groups.filter(|_| self.takes_groups_of(len)) else { return Done::default() };
        let n = scales.len();
        assert!(
            values.dtype() == FloatType::F32 && values.len() == n * len,
            "{values:?}: {n} groups of {len}"
        );
        assert!(zero_points.len() == n && codes.len() == n * len * usize::from(affine.bits) / 8);
        let values = values.as_ptr().cast();
        // SAFETY: values and outputs were measured above; features were detected.
        unsafe { run(&mut Groups { values, len, codes, scales, zero_points, affine, stream }) }
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

    pub(crate) fn merge_columns(&self, values: &[f32], ranges: &mut [Range]) {
        // SAFETY: features were detected.
        unsafe { (self.merge_columns)(values, ranges) }
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
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Kernels").field(&self.name).finish()
    }
}
