//! The only way from a job into shared memory: bounds are checked here, and who may touch what is decided here.
//!
//! Three phases keep references apart. Chunks run at the same time, each at most once (its [`Chunk`] is made by a
//! flag that is set once), and the plan gives every chunk its own bytes of codes and, where it computes whole
//! domains, its own parameters. Parameters that several chunks work on are reached through [`Shared`], which the job
//! makes under an item's lock until they are known and never writes afterwards. [`Whole`] is made once, when all
//! chunks have ended.
#![allow(
    unsafe_code,
    reason = "windows and results are shared memory: raw pointers are all there is to them"
)]

use std::fmt;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard};

use arrow_buffer::Buffer;
use shmquant_kernels::{FloatType, Values, ZeroPointsMut};

use super::item::{ItemState, Known, Ranges};
use crate::memory::Memory;

/// A checked part of a segment.
pub(super) struct Region {
    memory: Arc<dyn Memory>,
    offset: usize,
    len: usize,
}

impl Region {
    /// `len` bytes from `offset` on; `None` if they are not there or do not start aligned.
    pub(super) fn new(memory: Arc<dyn Memory>, offset: u64, len: u64) -> Option<Self> {
        // 8 is what the widest parameter needs; results start at multiples of 64 anyway.
        let aligned = (memory.as_ptr() as usize as u64).checked_add(offset)? % 8 == 0;
        if aligned { Self::unaligned(memory, offset, len) } else { None }
    }

    /// `len` bytes from `offset` on, of which only values are read; `None` if they are not there.
    pub(super) fn unaligned(memory: Arc<dyn Memory>, offset: u64, len: u64) -> Option<Self> {
        let (offset, len) = (usize::try_from(offset).ok()?, usize::try_from(len).ok()?);
        let inside = offset.checked_add(len).is_some_and(|end| end <= memory.len());
        (inside && len <= isize::MAX as usize).then_some(Self { memory, offset, len })
    }

    /// The address of `[at, at + bytes)`, or `None` where that is not inside.
    fn pointer(&self, at: u64, bytes: u64) -> Option<*mut u8> {
        let end = at.checked_add(bytes)?;
        if end > self.len as u64 {
            return None;
        }
        // SAFETY: `unaligned` found `offset + len` bytes in the mapping, and `at` is at most `len`.
        Some(unsafe { self.memory.as_ptr().add(self.offset + at as usize) })
    }

    fn typed<T>(&self, at: u64, count: u64) -> Option<*mut T> {
        let pointer = self.pointer(at, count.checked_mul(size_of::<T>() as u64)?)?.cast::<T>();
        pointer.is_aligned().then_some(pointer)
    }

    /// Values that their writer may still be changing.
    pub(super) fn values(&self, at: u64, count: u64, dtype: FloatType) -> Option<Values<'_>> {
        let pointer = self.pointer(at, count.checked_mul(dtype.size() as u64)?)?;
        // SAFETY: the bytes are inside the mapping, which lives as long as `self`; they may change, which is why
        // they are only ever looked at through `Values`.
        Some(unsafe { Values::new(pointer, count as usize, dtype) })
    }

    /// Copies bytes that only the caller's chunk writes; `None` where they are outside.
    pub(super) fn copy_from(&self, at: u64, source: &Self, from: u64, bytes: u64) -> Option<()> {
        let (to, from) = (self.pointer(at, bytes)?, source.pointer(from, bytes)?);
        // SAFETY: both runs are inside their mappings, which are two different segments: what a job fills is nobody's
        // source, since sources are inputs, windows and complete results. The source may change
        // meanwhile: bytes are copied in one state or another, and no reference to them exists. The plan gives each
        // copying chunk its own target, and nobody reads it before all chunks have ended.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes as usize) };
        Some(())
    }

    /// A private copy of bytes that their writer may still be changing; `None` where they are outside.
    pub(super) fn read(&self, at: u64, out: &mut [u8]) -> Option<()> {
        let from = self.pointer(at, out.len() as u64)?;
        // SAFETY: inside the mapping; `out` is private memory. The bytes may change meanwhile: they are copied in one state or
        // another, and no reference to them exists.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        Some(())
    }

    /// An Arrow buffer over all of it.
    pub(super) fn buffer(&self) -> Option<Buffer> {
        let pointer = NonNull::new(self.pointer(0, self.len as u64)?)?;
        let owner = Arc::new(AssertUnwindSafe(Arc::clone(&self.memory)));
        // SAFETY: the bytes are inside the mapping, which `owner` keeps. Called when everything is written: from
        // then on clients may read the segment and nobody writes it while this job holds it.
        Some(unsafe { Buffer::from_custom_allocation(pointer, self.len, owner) })
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("offset", &self.offset).field("len", &self.len).finish_non_exhaustive()
    }
}

/// Where a chunk's zero points lie in the result.
#[derive(Debug, Clone, Copy)]
pub(super) enum ZerosAt {
    Nowhere,
    F32(u64),
    I8(u64),
    U8(u64),
}

/// Codes and parameters that only one running chunk touches.
pub(super) struct Parts<'a> {
    pub(super) codes: &'a mut [u8],
    /// `None` where parameters are not in the result.
    pub(super) scales: Option<&'a mut [f32]>,
    pub(super) zeros: ZeroPointsMut<'a>,
}

/// The result as one running chunk may touch it.
pub(super) struct Chunk<'a> {
    region: &'a Region,
}

impl<'a> Chunk<'a> {
    /// At most one for each chunk of a job, ever: `started` says whether this was the first time.
    pub(super) fn claim(region: &'a Region, started: &AtomicBool) -> Option<Self> {
        let first = !started.swap(true, Ordering::AcqRel);
        first.then_some(Self { region })
    }

    /// Copies the chunk's bytes to their final place.
    pub(super) fn copy(&mut self, at: u64, window: &Region, from: u64, bytes: u64) -> Option<()> {
        self.region.copy_from(at, window, from, bytes)
    }

    /// The chunk's own codes (a run of bytes) and parameters (a run of the item's).
    pub(super) fn parts(
        &mut self,
        codes: Range<u64>,
        scales: Option<u64>,
        zeros: ZerosAt,
        params: Range<u64>,
    ) -> Option<Parts<'_>> {
        let n = params.end.checked_sub(params.start)?;
        let bytes = codes.end.checked_sub(codes.start)?;
        let skip = |width: u64| params.start.checked_mul(width);
        let codes = self.region.pointer(codes.start, bytes)?;
        let scales = match scales {
            Some(at) => Some(self.region.typed::<f32>(at.checked_add(skip(4)?)?, n)?),
            None => None,
        };
        // SAFETY: each run is inside the mapping (checked by `pointer`), aligned, and of a type without invalid
        // values. The plan's chunks of an item cover disjoint runs of code bytes and, where `params` is not empty,
        // of whole domains; buffers of the plan are disjoint; and this chunk runs only once (`claim`).
        unsafe {
            let zeros = match zeros {
                ZerosAt::Nowhere => ZeroPointsMut::None,
                ZerosAt::F32(at) => {
                    let pointer = self.region.typed::<f32>(at.checked_add(skip(4)?)?, n)?;
                    ZeroPointsMut::F32(std::slice::from_raw_parts_mut(pointer, n as usize))
                }
                ZerosAt::I8(at) => {
                    let pointer = self.region.typed::<i8>(at.checked_add(skip(1)?)?, n)?;
                    ZeroPointsMut::I8(std::slice::from_raw_parts_mut(pointer, n as usize))
                }
                ZerosAt::U8(at) => {
                    let pointer = self.region.typed::<u8>(at.checked_add(skip(1)?)?, n)?;
                    ZeroPointsMut::U8(std::slice::from_raw_parts_mut(pointer, n as usize))
                }
            };
            Some(Parts {
                codes: std::slice::from_raw_parts_mut(codes, bytes as usize),
                scales: scales.map(|p| std::slice::from_raw_parts_mut(p, n as usize)),
                zeros,
            })
        }
    }
}

/// The stored parameters of one item that its chunks share: places of f32 scales and zero points.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shared {
    pub(super) scales: u64,
    pub(super) zeros: Option<u64>,
    pub(super) count: u64,
}

impl Shared {
    /// Calls `with` with the parameters of `part`, to be changed; `None` once they are known.
    ///
    /// `ranges` is what the item's lock guards.
    pub(super) fn change<R>(
        &self,
        region: &Region,
        state: &ItemState,
        _ranges: &mut MutexGuard<'_, Ranges>,
        part: Range<u64>,
        with: impl FnOnce(&mut [f32], Option<&mut [f32]>) -> R,
    ) -> Option<R> {
        if state.known.get().is_some() {
            return None;
        }
        let (scales, zeros, n) = self.pointers(region, &part)?;
        // SAFETY: `pointers` checked bounds and alignment. The guard keeps others from changing, and nobody reads yet:
        // readers need the known parameters, which are made under this guard when no Scan chunk is left to change them.
        unsafe {
            let scales = std::slice::from_raw_parts_mut(scales, n);
            let zeros = zeros.map(|p| std::slice::from_raw_parts_mut(p, n));
            Some(with(scales, zeros))
        }
    }

    /// The parameters of `part`, to be read; `None` unless they are known.
    pub(super) fn read<'a>(
        &self,
        region: &'a Region,
        state: &ItemState,
        part: Range<u64>,
    ) -> Option<(&'a [f32], Option<&'a [f32]>)> {
        if !matches!(state.known.get(), Some(Known::InPlace { .. })) {
            return None;
        }
        let (scales, zeros, n) = self.pointers(region, &part)?;
        // SAFETY: `pointers` checked bounds and alignment. Known parameters are not written while chunks run.
        unsafe {
            let scales = std::slice::from_raw_parts(scales.cast_const(), n);
            Some((scales, zeros.map(|p| std::slice::from_raw_parts(p.cast_const(), n))))
        }
    }

    fn pointers(&self, region: &Region, part: &Range<u64>) -> Option<(*mut f32, Option<*mut f32>, usize)> {
        let n = part.end.checked_sub(part.start).filter(|_| part.end <= self.count)?;
        let skip = part.start.checked_mul(4)?;
        let scales = region.typed::<f32>(self.scales.checked_add(skip)?, n)?;
        let zeros = match self.zeros {
            Some(at) => Some(region.typed::<f32>(at.checked_add(skip)?, n)?),
            None => None,
        };
        Some((scales, zeros, n as usize))
    }
}

/// The result when no chunk runs any more.
pub(super) struct Whole<'a> {
    region: &'a Region,
}

impl<'a> Whole<'a> {
    /// The one exclusive access to a result, when all its chunks have ended; `None` before, and a second time.
    pub(super) fn claim(region: &'a Region, left: &AtomicUsize, claimed: &AtomicBool) -> Option<Self> {
        let ended = left.load(Ordering::Acquire) == 0;
        (ended && !claimed.swap(true, Ordering::AcqRel)).then_some(Self { region })
    }

    /// A run of bytes; `None` where it is outside.
    pub(super) fn bytes(&mut self, at: u64, bytes: u64) -> Option<&mut [u8]> {
        let pointer = self.region.pointer(at, bytes)?;
        // SAFETY: inside the mapping, of a type without invalid values, and `&mut self` is the only access there is.
        Some(unsafe { std::slice::from_raw_parts_mut(pointer, bytes as usize) })
    }

    /// Copies a run of bytes inside the result; `None` where either end is outside.
    pub(super) fn copy(&mut self, from: u64, to: u64, bytes: u64) -> Option<()> {
        let (from, to) = (self.region.pointer(from, bytes)?, self.region.pointer(to, bytes)?);
        // SAFETY: both runs are inside the mapping; they may overlap; `&mut self` is the only access there is.
        unsafe { std::ptr::copy(from, to, bytes as usize) };
        Some(())
    }
}
