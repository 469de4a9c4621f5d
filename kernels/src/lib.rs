//! Exact quantization kernels: values in, codes and parameters out. No I/O, no Arrow, no threads.
//!
//! One *item* (a layer, a vector column, a plain column) is a flat run of values whose shape a [`Layout`] gives.
//! Callers cut it into chunks and run each through [`fused`] (the chunk holds whole domains: rows, groups, the
//! tensor) or, where one range covers more than a chunk, through [`scan`], [`params_from_range`] and [`encode`].
//! [`decode`] is the way back and [`measure`] what it cost.
//!
//! Everything is IEEE binary32 with ties to even, without contraction: the bytes do not depend on the SIMD path
//! ([`Kernels`]), on the chunking or on alignment. Values may lie in memory that another process writes meanwhile:
//! they are read through raw pointers only and never steer an index.

mod dequantize;
mod encoder;
mod fault;
mod fpu;
mod layout;
mod metrics;
mod packing;
mod path;
mod quantize;
mod scheme;
mod source;
mod values;

pub use dequantize::decode;
pub use fault::{Counters, Fault, OnNonFinite};
pub use fpu::NoFlushing;
pub use layout::{Granularity, Layout, Sizes};
pub use metrics::{Sums, measure};
pub use packing::{pack, packed_len, unpack};
pub use path::Kernels;
pub use quantize::{encode, fused, scan};
pub use scheme::{
    Affine, Arith, DomainParams, Mapping, Range, Scheme, TINY, ZeroPoints, ZeroPointsMut, params_from_range,
    params_from_ranges,
};
pub use values::{FloatType, Values};
