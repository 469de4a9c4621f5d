//! Input values: floats of some width in memory that somebody else may be writing.
#![allow(
    unsafe_code,
    reason = "values are read through raw pointers, unaligned, because no reference may exist to them"
)]

use std::fmt;
use std::marker::PhantomData;
use std::ops;
use std::str::FromStr;

use crate::fault::{Fault, by_name};

/// The float format of input values, little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE binary32.
    F32,
    /// IEEE binary64; rounded to f32 first.
    F64,
}

impl FloatType {
    /// All formats.
    pub const ALL: [Self; 4] = [Self::F16, Self::Bf16, Self::F32, Self::F64];

    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// numpy's and torch's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
        }
    }
}

impl fmt::Display for FloatType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for FloatType {
    type Err = Fault;

    fn from_str(word: &str) -> Result<Self, Fault> {
        by_name("float type", word, &Self::ALL, |t| t.name())
    }
}

/// A run of input values: where they start, how many, of which format. Any alignment.
#[derive(Debug, Clone, Copy)]
pub struct Values<'a> {
    ptr: *const u8,
    len: usize,
    dtype: FloatType,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: `Values` only ever reads, and `new` demands memory that stays readable from any thread for 'a.
unsafe impl Send for Values<'_> {}
// SAFETY: as for `Send`; there is no interior state.
unsafe impl Sync for Values<'_> {}

impl<'a> Values<'a> {
    /// Values in memory that may change while it is read.
    ///
    /// # Safety
    /// `ptr` must be readable for `len * dtype.size()` bytes, which must not exceed `isize::MAX`, for all of `'a` and
    /// from any thread. It need not be aligned. The bytes may be written by another process: what is read then is
    /// any mixture of old and new values, and nothing but codes and counters depends on it.
    pub unsafe fn new(ptr: *const u8, len: usize, dtype: FloatType) -> Self {
        Self { ptr, len, dtype, memory: PhantomData }
    }

    /// Values of a private slice.
    pub fn from_f32(values: &'a [f32]) -> Self {
        // SAFETY: a slice is readable for its length and 'a keeps it so.
        unsafe { Self::new(values.as_ptr().cast(), values.len(), FloatType::F32) }
    }

    /// Values of a private slice.
    pub fn from_f64(values: &'a [f64]) -> Self {
        // SAFETY: as `from_f32`.
        unsafe { Self::new(values.as_ptr().cast(), values.len(), FloatType::F64) }
    }

    /// Values of a private slice.
    pub fn from_f16(values: &'a [half::f16]) -> Self {
        // SAFETY: as `from_f32`; `f16` is a transparent u16.
        unsafe { Self::new(values.as_ptr().cast(), values.len(), FloatType::F16) }
    }

    /// Values of a private slice.
    pub fn from_bf16(values: &'a [half::bf16]) -> Self {
        // SAFETY: as `from_f32`; `bf16` is a transparent u16.
        unsafe { Self::new(values.as_ptr().cast(), values.len(), FloatType::Bf16) }
    }

    /// Values in private bytes of any alignment; trailing bytes that make no whole value are left out.
    pub fn from_bytes(bytes: &'a [u8], dtype: FloatType) -> Self {
        // SAFETY: the division keeps the run inside the slice.
        unsafe { Self::new(bytes.as_ptr(), bytes.len() / dtype.size(), dtype) }
    }

    /// How many values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Their format.
    pub fn dtype(&self) -> FloatType {
        self.dtype
    }

    /// A part of them.
    ///
    /// # Panics
    /// Where the range is not inside `0..len()`.
    pub fn slice(&self, range: ops::Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} values", self.len);
        // SAFETY: the range lies inside the run that `new` was promised.
        let ptr = unsafe { self.ptr.add(range.start * self.dtype.size()) };
        Self { ptr, len: range.end - range.start, ..*self }
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.ptr
    }

    /// One value as f64, which holds all four formats exactly. For the rare paths.
    pub(crate) fn get(&self, index: usize) -> f64 {
        assert!(index < self.len, "{index} of {} values", self.len);
        // SAFETY: the index was checked against the length that `new` was promised; the reads are unaligned.
        unsafe {
            match self.dtype {
                FloatType::F16 => half::f16::from_bits(self.read::<u16>(index)).to_f64(),
                FloatType::Bf16 => half::bf16::from_bits(self.read::<u16>(index)).to_f64(),
                FloatType::F32 => f64::from(f32::from_bits(self.read::<u32>(index))),
                FloatType::F64 => f64::from_bits(self.read::<u64>(index)),
            }
        }
    }

    /// # Safety
    /// `index < self.len` and `T` is as wide as the format.
    unsafe fn read<T: Copy>(&self, index: usize) -> T {
        // SAFETY: by the function's own contract; unaligned, and the copy is made once.
        unsafe { self.ptr.cast::<T>().add(index).read_unaligned() }
    }
}
