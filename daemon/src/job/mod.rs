//! A plan being carried out: chunks turn values in the window into codes at their final place in the result.
//!
//! Chunks run in any order that respects their barriers, on any thread; what comes out does not depend on it.

mod access;
mod columns;
mod complete;
mod fault;
mod findings;
mod item;
mod layers;
mod outcome;
mod validate;
mod writer;

use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};

use shmquant_kernels::{Affine, Counters, Fault, Range, Sums, Values, ZeroPoints, ZeroPointsMut};
use shmquant_kernels::{encode, fused, measure, scan};
use shmquant_protocol::chunks::{Action, Chunk};
use shmquant_protocol::descriptor::{Params, Role, Way};
use shmquant_protocol::message::Failure;

pub use complete::Complete;

use self::access::{Parts, Region, Shared, Whole, ZerosAt};
use self::fault::internal;
use self::item::{ItemState, Known, Ranges, merge_in_place, params_in_place};
use crate::engine::Work;
use crate::memory::Memory;
use crate::plan::{Place, Plan, Target, ValuesTarget, Zeros};

/// Memory in which values lie that do not come through the window, by segment.
pub type Sources = HashMap<u64, Arc<dyn Memory>>;

/// One request's work and what it has found so far.
pub struct Job {
    plan: Arc<Plan>,
    window: Region,
    result: Region,
    slots: Vec<Slot>,
    items: Vec<ItemState>,
    left: AtomicUsize,
    completing: AtomicBool,
}

/// A chunk's own place for what it finds.
#[derive(Debug, Default)]
struct Slot {
    started: AtomicBool,
    found: OnceLock<Result<Found, Stopped>>,
}

/// The parameters of an Encode chunk.
enum Second<'a> {
    Given(&'a Params),
    Own {
        scales: &'a [f32],
        zeros: &'a [i32],
    },
    /// At their final place.
    InPlace,
    /// There are none, which is reported elsewhere.
    Faulty,
}

/// What a chunk counted.
#[derive(Debug, Clone, Copy, Default)]
struct Found {
    counters: Counters,
    sums: Sums,
}

/// Why a chunk came to nothing.
#[derive(Debug)]
enum Stopped {
    /// The data's fault.
    Fault(Fault),
    /// Ours.
    Broken(&'static str),
    /// The client's: what it says it found cannot be.
    Violation(&'static str),
}

impl From<Fault> for Stopped {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl Job {
    /// A job that reads `window`, and `sources` where the plan says so, and writes the extent at `offset` of `result`.
    ///
    /// # Errors
    /// `INTERNAL` where an extent does not fit its memory.
    pub fn new(
        plan: Arc<Plan>,
        window: Arc<dyn Memory>,
        sources: &Sources,
        result: Arc<dyn Memory>,
        offset: u64,
    ) -> Result<Self, Failure> {
        let bytes = window.len() as u64;
        let window = Region::new(window, 0, bytes).ok_or_else(|| internal("the window is not aligned"))?;
        let result = Region::new(result, offset, plan.result_bytes())
            .ok_or_else(|| internal(format!("no room for {} bytes at {offset}", plan.result_bytes())))?;
        let mut items: Vec<_> = plan.descriptor().items.iter().map(|_| ItemState::default()).collect();
        for (item, values, place) in plan.descriptor().places() {
            let memory = sources.get(&place.extent.segment).cloned();
            // The descriptor was checked: neither sum wraps.
            let at = place.extent.offset + place.offset;
            let region = memory.and_then(|memory| Region::unaligned(memory, at, values.bytes()));
            let region = region.ok_or_else(|| internal("values lie outside their memory"))?;
            if let Some(state) = items.get_mut(item) {
                state.source = Some(region);
            }
        }
        let chunks = &plan.chunks().chunks;
        for (index, chunk) in chunks.iter().enumerate() {
            let Some(state) = items.get_mut(chunk.item as usize) else {
                return Err(internal("a chunk of no item"));
            };
            if state.chunks.is_empty() {
                state.chunks.start = index;
            }
            state.chunks.end = index + 1;
            if chunk.action == Action::Scan {
                state.barrier = index + 1;
                *state.scans_left.get_mut() += 1;
            }
        }
        let slots: Vec<_> = chunks.iter().map(|_| Slot::default()).collect();
        let left = AtomicUsize::new(slots.len());
        Ok(Self { plan, window, result, slots, items, left, completing: AtomicBool::new(false) })
    }

    /// The plan that is carried out.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// When all chunks have ended: writes what is known only then, makes the file whole, checks kept columns.
    ///
    /// # Errors
    /// `INVALID_INPUT` for the first faulty layer or column, whatever order the chunks ran in; `INTERNAL` where chunks
    /// are missing or this is the second call.
    pub fn complete(&self) -> Result<Complete, Failure> {
        let whole = Whole::claim(&self.result, &self.left, &self.completing).ok_or_else(|| {
            internal(format!("complete with {} chunks to go", self.left.load(Ordering::Acquire)))
        })?;
        // Arrow's checks of kept columns return errors; a panic in them would be theirs, and nobody else's trouble.
        catch_unwind(AssertUnwindSafe(|| complete::complete(self, whole)))
            .unwrap_or_else(|_| Err(internal("completing the result panicked")))
    }

    fn work(&self, index: usize, access: access::Chunk<'_>) -> Result<Found, Stopped> {
        let chunk = self.plan.chunks().chunks[index];
        let item = chunk.item as usize;
        let target = self.plan.target(item).ok_or(Stopped::Broken("a chunk of no item"))?;
        let target = match (chunk.action, target) {
            (Action::Copy { buffer }, target) => return self.copy(&chunk, buffer, target, access),
            (_, Target::Kept(_)) => return Err(Stopped::Broken("a kept column is not encoded")),
            (_, Target::Values(target)) => target,
        };
        let (values, ..) = self.plan.values(item).ok_or(OUTSIDE)?;
        let done = match (values.way, chunk.action) {
            (Way::Encoded, _) => self.found(&chunk, target, access),
            (_, Action::Scan) => self.scan(&chunk, target),
            (_, Action::Encode) => self.encode(&chunk, target, access),
            _ => self.fused(&chunk, target, access),
        };
        if chunk.action == Action::Scan {
            if done.is_err() {
                self.items[item].faulty.store(true, Ordering::Release);
            }
            self.items[item].scans_left.fetch_sub(1, Ordering::AcqRel);
        }
        done
    }

    fn copy(
        &self,
        chunk: &Chunk,
        buffer: u32,
        target: &Target,
        mut access: access::Chunk<'_>,
    ) -> Result<Found, Stopped> {
        let (at, bytes) = match target {
            Target::Kept(buffers) => {
                let id = buffers.get(buffer as usize).ok_or(Stopped::Broken("a chunk of no buffer"))?;
                self.plan.file().buffer(*id)
            }
            Target::Values(target) => match target.validity {
                Some(id) => self.plan.file().buffer(id),
                None => (self.at(target.codes), target.code_bytes),
            },
        };
        if chunk.first.checked_add(chunk.count).is_none_or(|end| end > bytes) {
            return Err(Stopped::Broken("a chunk passes its buffer"));
        }
        let (source, from) = self.source(chunk, 1);
        access.copy(at + chunk.first, source, from, chunk.count).ok_or(OUTSIDE)?;
        Ok(Found::default())
    }

    fn fused(
        &self,
        chunk: &Chunk,
        target: &ValuesTarget,
        mut access: access::Chunk<'_>,
    ) -> Result<Found, Stopped> {
        let (values, affine) = self.values(chunk)?;
        let state = &self.items[chunk.item as usize];
        let layout = &target.layout;
        let touched = layout.param_range(chunk.first, chunk.count);
        let mut parts = self.parts(chunk, target, &affine, &mut access, touched.clone())?;
        let mut nulled = Vec::new();
        let mut found = Found::default();
        let n = (touched.end - touched.start) as usize;
        let (mut own_scales, mut own_zeros) = (Vec::new(), Vec::new());
        let (scales, zeros) = match (&mut parts.scales, target.zeros) {
            (Some(scales), _) => (&mut **scales, &mut parts.zeros),
            (None, zeros) => {
                own_scales = vec![0f32; n];
                if matches!(zeros, Zeros::Private) {
                    own_zeros = vec![0f32; n];
                    parts.zeros = ZeroPointsMut::F32(&mut own_zeros);
                }
                (&mut own_scales[..], &mut parts.zeros)
            }
        };
        let zeros_out = zeros.reborrow();
        let first = chunk.first;
        found.counters = fused(
            values,
            first,
            layout,
            &affine,
            target.policy,
            parts.codes,
            scales,
            zeros_out,
            &mut nulled,
        )?;
        if self.plan.descriptor().metrics {
            let zeros = zeros.as_ref();
            found.sums = measure(values, first, layout, &affine, scales, zeros, parts.codes, target.policy);
        }
        state.null_rows(layout.rows, &nulled);
        if target.scales.is_none() {
            let zeros = match own_zeros.is_empty() {
                true => vec![0; n],
                false => own_zeros.iter().map(|z| *z as i32).collect(),
            };
            state.keep(own_scales, zeros, &mut found.counters)?;
        }
        Ok(found)
    }

    fn scan(&self, chunk: &Chunk, target: &ValuesTarget) -> Result<Found, Stopped> {
        let (values, _) = self.values(chunk)?;
        let touched = target.layout.param_range(chunk.first, chunk.count);
        let mut found = vec![Range::EMPTY; (touched.end - touched.start) as usize];
        scan(values, chunk.first, &target.layout, target.policy, &mut found)?;
        self.widen(chunk, target, &found)
    }

    /// Widens the item's ranges by those of a chunk.
    fn widen(&self, chunk: &Chunk, target: &ValuesTarget, found: &[Range]) -> Result<Found, Stopped> {
        let state = &self.items[chunk.item as usize];
        let touched = target.layout.param_range(chunk.first, chunk.count);
        let mut guard = state.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        match self.shared(chunk.item as usize, target) {
            Some(shared) => {
                if matches!(*guard, Ranges::None) {
                    // Recycled memory holds anything.
                    let all = 0..shared.count;
                    shared.change(&self.result, state, &mut guard, all, |scales, zeros| {
                        scales.fill(0.0);
                        zeros.into_iter().for_each(|z| z.fill(0.0));
                    });
                    *guard = Ranges::InPlace;
                }
                let merge =
                    |scales: &mut [f32], zeros: Option<&mut [f32]>| merge_in_place(scales, zeros, found);
                shared.change(&self.result, state, &mut guard, touched, merge).ok_or(OUTSIDE)?;
            }
            None => {
                if matches!(*guard, Ranges::None) {
                    *guard = Ranges::Own(Vec::new());
                }
                if let Ranges::Own(ranges) = &mut *guard {
                    ItemState::merge(ranges, target.params as usize, touched.start as usize, found);
                }
            }
        }
        Ok(Found::default())
    }

    fn encode(
        &self,
        chunk: &Chunk,
        target: &ValuesTarget,
        mut access: access::Chunk<'_>,
    ) -> Result<Found, Stopped> {
        let item = chunk.item as usize;
        let state = &self.items[item];
        let (values, affine) = self.values(chunk)?;
        let layout = &target.layout;
        let touched = layout.param_range(chunk.first, chunk.count);
        let part = touched.start as usize..touched.end as usize;
        let (scales, zeros) = match self.second_pass(item, target, &affine)? {
            Second::Faulty => return Ok(Found::default()),
            Second::Given(params) => {
                (params.scales.get(part.clone()), ZeroPoints::I32(part_of(&params.zero_points, part)))
            }
            Second::Own { scales, zeros } => {
                (scales.get(part.clone()), ZeroPoints::I32(part_of(zeros, part)))
            }
            Second::InPlace => {
                let shared = self.shared(item, target).ok_or(OUTSIDE)?;
                let (scales, zeros) = shared.read(&self.result, state, touched).ok_or(OUTSIDE)?;
                (Some(scales), zeros.map_or(ZeroPoints::None, ZeroPoints::F32))
            }
        };
        let scales = scales.ok_or(OUTSIDE)?;
        let parts = self.parts(chunk, target, &affine, &mut access, 0..0)?;
        let mut nulled = Vec::new();
        let mut found = Found::default();
        let (first, policy) = (chunk.first, target.policy);
        found.counters =
            encode(values, first, layout, &affine, policy, scales, zeros, parts.codes, &mut nulled)?;
        if self.plan.descriptor().metrics {
            found.sums = measure(values, first, layout, &affine, scales, zeros, parts.codes, policy);
        }
        state.null_rows(layout.rows, &nulled);
        Ok(found)
    }

    /// What an Encode chunk goes by; parameters are made by the first that asks.
    fn second_pass(
        &self,
        item: usize,
        target: &ValuesTarget,
        affine: &Affine,
    ) -> Result<Second<'_>, Stopped> {
        let state = &self.items[item];
        if state.scans_left.load(Ordering::Acquire) != 0 {
            return Err(Stopped::Broken("a chunk ran before its barrier"));
        }
        if state.faulty.load(Ordering::Acquire) {
            return Ok(Second::Faulty);
        }
        if let Some(params) = self.plan.values(item).and_then(|(values, ..)| values.params.as_ref()) {
            return Ok(Second::Given(params));
        }
        match state.known.get_or_init(|| self.parameters(item, target, affine)) {
            Known::Own { scales, zeros, .. } => Ok(Second::Own { scales, zeros }),
            Known::InPlace { .. } => Ok(Second::InPlace),
            // Reported once for the item.
            Known::Fault(_) => Ok(Second::Faulty),
            Known::Broken => Err(OUTSIDE),
        }
    }

    /// Parameters of an item whose Scan chunks have all ended.
    fn parameters(&self, item: usize, target: &ValuesTarget, affine: &Affine) -> Known {
        let state = &self.items[item];
        let Some(shared) = self.shared(item, target) else { return state.own(&target.layout, affine) };
        let mut guard = state.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        let make = |scales: &mut [f32], zeros: Option<&mut [f32]>| {
            params_in_place(scales, zeros, &target.layout, affine)
        };
        shared.change(&self.result, state, &mut guard, 0..shared.count, make).unwrap_or(Known::Broken)
    }

    /// A layer's parameters in the result: both f32, so that ranges fit in the meantime.
    fn shared(&self, item: usize, target: &ValuesTarget) -> Option<Shared> {
        let (values, ..) = self.plan.values(item)?;
        if values.role != Role::Layer || values.params.is_some() {
            return None;
        }
        let zeros = match target.zeros {
            Zeros::F32(place) => Some(self.at(place)),
            _ => None,
        };
        Some(Shared { scales: self.at(target.scales?), zeros, count: target.params })
    }

    fn values(&self, chunk: &Chunk) -> Result<(Values<'_>, Affine), Stopped> {
        let (values, spec, _) = self.plan.values(chunk.item as usize).ok_or(OUTSIDE)?;
        let affine = spec.affine.ok_or(Stopped::Broken("a layer that stays as it is was to be encoded"))?;
        let (source, from) = self.source(chunk, values.dtype.size() as u64);
        Ok((source.values(from, chunk.count, values.dtype).ok_or(OUTSIDE)?, affine))
    }

    /// Where a chunk is read, of units of `size` bytes.
    fn source(&self, chunk: &Chunk, size: u64) -> (&Region, u64) {
        match &self.items[chunk.item as usize].source {
            Some(region) => (region, chunk.first * size),
            None => (&self.window, chunk.at),
        }
    }

    /// The chunk's codes, and the parameters of `own` domains.
    fn parts<'a>(
        &self,
        chunk: &Chunk,
        target: &ValuesTarget,
        affine: &Affine,
        access: &'a mut access::Chunk<'_>,
        own: std::ops::Range<u64>,
    ) -> Result<Parts<'a>, Stopped> {
        let layout = &target.layout;
        let begin = layout.code_byte_offset(chunk.first, affine.bits);
        let end = begin + layout.chunk_code_bytes(chunk.first, chunk.count, affine.bits);
        if end > target.code_bytes || own.end > target.params {
            return Err(OUTSIDE);
        }
        let codes = self.at(target.codes);
        let zeros = match target.zeros {
            Zeros::None | Zeros::Private => ZerosAt::Nowhere,
            Zeros::F32(place) => ZerosAt::F32(self.at(place)),
            Zeros::I8(place) => ZerosAt::I8(self.at(place)),
            Zeros::U8(place) => ZerosAt::U8(self.at(place)),
        };
        access.parts(codes + begin..codes + end, target.scales.map(|p| self.at(p)), zeros, own).ok_or(OUTSIDE)
    }

    fn at(&self, place: Place) -> u64 {
        self.plan.file().at(place)
    }
}

impl Work for Job {
    fn len(&self) -> usize {
        self.slots.len()
    }

    fn barrier(&self, chunk: usize) -> usize {
        match self.plan.chunks().chunks.get(chunk) {
            Some(c) if c.action == Action::Encode => self.items[c.item as usize].barrier,
            _ => 0,
        }
    }

    fn run(&self, chunk: usize) {
        let Some(slot) = self.slots.get(chunk) else { return };
        let Some(access) = access::Chunk::claim(&self.result, &slot.started) else { return };
        let found = catch_unwind(AssertUnwindSafe(|| self.work(chunk, access)))
            .unwrap_or(Err(Stopped::Broken("a kernel panicked")));
        // The claim made this the only one.
        let _ = slot.found.set(found);
        self.left.fetch_sub(1, Ordering::AcqRel);
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("items", &self.items.len())
            .field("chunks", &self.slots.len())
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

const OUTSIDE: Stopped = Stopped::Broken("a place outside the window or the result");

fn part_of(zeros: &[i32], part: std::ops::Range<usize>) -> &[i32] {
    zeros.get(part).unwrap_or_default()
}
