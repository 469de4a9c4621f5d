//! Chunks of values that this process encodes itself, since only it can reach them.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use shmquant_kernels::{
    Affine, DomainParams, Fault, Kernels, Layout, Mapping, NoFlushing, Range, Values as Floats, ZeroPoints,
    ZeroPointsMut, measure, params_from_ranges, scan,
};

use super::leases::lock;
use super::source::Source;
use crate::chunks::{Action, Chunk, ChunkList};
use crate::descriptor::{Body, Descriptor, Spec, Values, Way};
use crate::findings::{Found, HEADER, Parts, write_ranges};

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What a thread keeps between chunks.
#[derive(Default)]
struct Scratch {
    /// Values that do not lie one after another where they are.
    values: Vec<u8>,
    scales: Vec<f32>,
    signed: Vec<i8>,
    unsigned: Vec<u8>,
    ranges: Vec<Range>,
    dropped: Vec<u64>,
}

/// The chunks of one request: copied, or worked on.
pub(super) struct Encoding<'a> {
    source: &'a dyn Source,
    descriptor: &'a Descriptor,
    /// By item; none if nothing is read twice.
    passes: Vec<Passes>,
}

/// An item whose values are read twice.
#[derive(Default)]
struct Passes {
    state: Mutex<Pass>,
    /// A chunk had a fault: there will be no codes.
    faulty: AtomicBool,
    /// Encode chunks to come: with the last one the parameters go, so that they do not add up over the items of a table.
    left: AtomicUsize,
}

enum Pass {
    Ranges(Vec<Range>),
    /// `None` where a range overflows.
    Params(Option<Arc<DomainParams>>),
}

impl Default for Pass {
    fn default() -> Self {
        Self::Ranges(Vec::new())
    }
}

/// A chunk and all that the kernels want to know of it.
struct Task<'a> {
    chunk: &'a Chunk,
    values: &'a Values,
    spec: &'a Spec,
    affine: &'a Affine,
    layout: Layout,
    parts: Parts,
    /// Error metrics are wanted.
    metrics: bool,
}

impl<'a> Encoding<'a> {
    /// Nothing is done yet.
    pub(super) fn new(source: &'a dyn Source, list: &ChunkList) -> Self {
        let descriptor = source.descriptor();
        let twice = list.chunks.iter().any(|chunk| chunk.action == Action::Scan);
        let items = if twice { descriptor.items.len() } else { 0 };
        let mut passes: Vec<_> = (0..items).map(|_| Passes::default()).collect();
        for chunk in list.chunks.iter().filter(|chunk| chunk.action == Action::Encode) {
            if let Some(passes) = passes.get_mut(chunk.item as usize) {
                *passes.left.get_mut() += 1;
            }
        }
        Self { source, descriptor, passes }
    }

    /// Writes what crosses of a chunk. The Scan chunks of an item have to be over before its Encode chunks begin.
    pub(super) fn write(&self, chunk: &Chunk, out: &mut [u8]) {
        let item = self.descriptor.items.get(chunk.item as usize);
        let task = match item.map(|item| &item.body) {
            Some(Body::Values(values)) if values.way == Way::Encoded => {
                Task::new(self.descriptor, values, chunk)
            }
            _ => None,
        };
        let Some(task) = task.filter(|task| task.parts.bytes == out.len()) else {
            return self.source.fill(chunk, out);
        };
        let _exact = NoFlushing::new();
        SCRATCH.with_borrow_mut(|scratch| {
            let found = self.work(&task, scratch, out);
            if let Some(header) = out.first_chunk_mut::<HEADER>() {
                *header = found.to_bytes();
            }
        });
    }

    fn work(&self, task: &Task<'_>, scratch: &mut Scratch, out: &mut [u8]) -> Found {
        let passes = self.passes.get(task.chunk.item as usize);
        let done = match (task.chunk.action, passes) {
            (Action::Scan, Some(passes)) => self.scan(task, passes, scratch, out),
            (Action::Encode, passes) => self.encode(task, passes, scratch, out),
            _ => self.fused(task, scratch, out),
        };
        done.unwrap_or_else(|fault| Found { fault: Some(fault), ..Found::default() })
    }

    fn fused(&self, task: &Task<'_>, scratch: &mut Scratch, out: &mut [u8]) -> Result<Found, Fault> {
        let Scratch { values, scales, signed, unsigned, dropped, .. } = scratch;
        let values = self.floats(task, values);
        let n = (task.parts.touched.end - task.parts.touched.start) as usize;
        scales.clear();
        scales.resize(n, 0.0);
        signed.clear();
        unsigned.clear();
        dropped.clear();
        let mut zeros = match (task.affine.mapping, task.affine.signed) {
            (Mapping::Symmetric, _) => ZeroPointsMut::None,
            (Mapping::Asymmetric, true) => {
                signed.resize(n, 0);
                ZeroPointsMut::I8(signed)
            }
            (Mapping::Asymmetric, false) => {
                unsigned.resize(n, 0);
                ZeroPointsMut::U8(unsigned)
            }
        };
        let (first, policy) = (task.chunk.first, task.values.policy(task.spec));
        let codes = &mut out[task.parts.codes.clone()];
        let zeros_out = zeros.reborrow();
        let counters = Kernels::near().fused(
            values,
            first,
            &task.layout,
            task.affine,
            policy,
            codes,
            scales,
            zeros_out,
            dropped,
        )?;
        let mut found = Found { counters, ..Found::default() };
        if task.metrics {
            found.sums =
                measure(values, first, &task.layout, task.affine, scales, zeros.as_ref(), codes, policy);
        }
        let bytes = out[task.parts.scales.clone()].as_chunks_mut::<4>().0;
        bytes.iter_mut().zip(&*scales).for_each(|(out, scale)| *out = scale.to_le_bytes());
        let zeros = signed.iter().map(|zero| *zero as u8).chain(unsigned.iter().copied());
        out[task.parts.zeros.clone()].iter_mut().zip(zeros).for_each(|(out, zero)| *out = zero);
        task.drop_rows(dropped, out);
        Ok(found)
    }

    fn scan(
        &self,
        task: &Task<'_>,
        passes: &Passes,
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Result<Found, Fault> {
        let touched = task.parts.touched.start as usize..task.parts.touched.end as usize;
        let Scratch { values, ranges, .. } = scratch;
        ranges.clear();
        ranges.resize(touched.len(), Range::EMPTY);
        let values = self.floats(task, values);
        let policy = task.values.policy(task.spec);
        if let Err(fault) = scan(values, task.chunk.first, &task.layout, policy, ranges) {
            passes.faulty.store(true, Ordering::Relaxed);
            return Err(fault);
        }
        write_ranges(ranges, &mut out[task.parts.ranges.clone()]);
        if let Pass::Ranges(all) = &mut *lock(&passes.state) {
            if all.is_empty() {
                all.resize(task.layout.n_params() as usize, Range::EMPTY);
            }
            all[touched].iter_mut().zip(&*ranges).for_each(|(all, found)| all.merge(*found));
        }
        Ok(Found::default())
    }

    fn encode(
        &self,
        task: &Task<'_>,
        passes: Option<&Passes>,
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Result<Found, Fault> {
        let own = match (&task.values.params, passes) {
            (None, Some(passes)) => passes.params(task.affine),
            _ => None,
        };
        let (scales, zero_points) = match (&task.values.params, &own) {
            (Some(given), _) => (&given.scales, &given.zero_points),
            (None, Some(own)) => (&own.scales, &own.zero_points),
            // The daemon finds the fault in the same ranges.
            (None, None) => return Ok(Found::default()),
        };
        let touched = task.parts.touched.start as usize..task.parts.touched.end as usize;
        let (scales, zeros) = (&scales[touched.clone()], ZeroPoints::I32(&zero_points[touched]));
        let Scratch { values, dropped, .. } = scratch;
        let values = self.floats(task, values);
        dropped.clear();
        let (first, policy) = (task.chunk.first, task.values.policy(task.spec));
        let codes = &mut out[task.parts.codes.clone()];
        let counters = Kernels::near().encode(
            values,
            first,
            &task.layout,
            task.affine,
            policy,
            scales,
            zeros,
            codes,
            dropped,
        )?;
        let mut found = Found { counters, ..Found::default() };
        if task.metrics {
            found.sums = measure(values, first, &task.layout, task.affine, scales, zeros, codes, policy);
        }
        task.drop_rows(dropped, out);
        Ok(found)
    }

    /// A chunk's values: where they lie, or gathered in `scratch`.
    fn floats<'b>(&'b self, task: &Task<'_>, scratch: &'b mut Vec<u8>) -> Floats<'b> {
        let Chunk { item, first, count, work, .. } = *task.chunk;
        let dtype = task.values.dtype;
        let start = first * dtype.size() as u64;
        if let Some(bytes) = self.source.slice(item as usize, start..start + work)
            && bytes.len() as u64 == work
        {
            return Floats::from_bytes(bytes, dtype);
        }
        scratch.resize(work as usize, 0);
        debug_assert_eq!(count * dtype.size() as u64, work);
        self.source.fill(task.chunk, scratch);
        Floats::from_bytes(scratch, dtype)
    }
}

impl<'a> Task<'a> {
    fn new(descriptor: &'a Descriptor, values: &'a Values, chunk: &'a Chunk) -> Option<Self> {
        let spec = descriptor.specs.get(values.spec)?;
        let affine = spec.affine.as_ref()?;
        if matches!(chunk.action, Action::Copy { .. }) {
            return None;
        }
        let parts = Parts::new(values, spec, affine, chunk.action, chunk.first, chunk.count);
        let (layout, metrics) = (values.layout(spec), descriptor.metrics);
        Some(Self { chunk, values, spec, affine, layout, parts, metrics })
    }

    fn drop_rows(&self, dropped: &[u64], out: &mut [u8]) {
        let out = &mut out[self.parts.dropped.clone()];
        out.fill(0);
        for row in dropped {
            let at = row - self.parts.rows.start;
            if let Some(byte) = out.get_mut((at / 8) as usize) {
                *byte |= 1 << (at % 8);
            }
        }
    }
}

impl Passes {
    /// The parameters for one Encode chunk, when all ranges are known; `None` if there are none.
    fn params(&self, affine: &Affine) -> Option<Arc<DomainParams>> {
        let mut state = lock(&self.state);
        if let Pass::Ranges(ranges) = &*state {
            let sound = !self.faulty.load(Ordering::Relaxed);
            *state =
                Pass::Params(sound.then(|| params_from_ranges(ranges, affine).ok()).flatten().map(Arc::new));
        }
        let Pass::Params(params) = &mut *state else { return None };
        let last = self.left.fetch_sub(1, Ordering::Relaxed) == 1;
        if last { params.take() } else { params.clone() }
    }
}

#[cfg(test)]
mod tests {
    use shmquant_kernels::{FloatType, Granularity, OnNonFinite, Scheme};

    use super::*;
    use crate::chunks::MIN_WINDOW;
    use crate::descriptor::{Item, Role, TableKind};

    /// One layer of f32, in one piece or to be gathered.
    struct Layer {
        descriptor: Descriptor,
        bytes: Vec<u8>,
        in_one_piece: bool,
    }

    impl Source for Layer {
        fn descriptor(&self) -> &Descriptor {
            &self.descriptor
        }

        fn fill(&self, chunk: &Chunk, out: &mut [u8]) {
            let start = chunk.first as usize * 4;
            out.copy_from_slice(&self.bytes[start..start + out.len()]);
        }

        fn slice(&self, _: usize, bytes: std::ops::Range<u64>) -> Option<&[u8]> {
            self.bytes.get(bytes.start as usize..bytes.end as usize).filter(|_| self.in_one_piece)
        }
    }

    fn layer(values: &[f32], k: u64, granularity: Granularity, in_one_piece: bool) -> Layer {
        let affine = Some(Affine::new(Scheme::Int8, None).unwrap());
        let spec =
            Spec { affine, granularity, on_nonfinite: OnNonFinite::Error, packed: false, group_size: 0 };
        let body = Body::Values(Values {
            role: Role::Layer,
            spec: 0,
            dtype: FloatType::F32,
            null: false,
            rows: values.len() as u64 / k,
            k,
            null_count: 0,
            shape: vec![],
            params: None,
            way: Way::Encoded,
        });
        let descriptor = Descriptor {
            table: TableKind::Layers { large_names: false },
            metrics: false,
            continue_on_error: false,
            specs: vec![spec],
            metadata: Default::default(),
            rows: 1,
            items: vec![Item { name: "layer".to_owned(), body }],
        };
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Layer { descriptor, bytes, in_one_piece }
    }

    /// What crosses of all chunks.
    fn found(layer: &Layer) -> Vec<Vec<u8>> {
        let list = ChunkList::new(&layer.descriptor, 0, MIN_WINDOW);
        let encoding = Encoding::new(layer, &list);
        let write = |chunk: &Chunk| {
            let mut out = vec![0xA5; chunk.bytes as usize];
            encoding.write(chunk, &mut out);
            out
        };
        list.chunks.iter().map(write).collect()
    }

    #[test]
    fn gathered_values_are_encoded_like_those_in_place() {
        let values: Vec<f32> = (0..600_000i64).map(|i| ((i * 7919) % 2003) as f32 / 1000.0 - 1.0).collect();
        for granularity in [Granularity::Row, Granularity::Tensor, Granularity::Dimension] {
            let of = |in_one_piece| found(&layer(&values, 600, granularity, in_one_piece));
            assert!(of(true) == of(false), "{granularity}");
        }
    }

    #[test]
    fn a_fault_of_the_first_pass_is_told_once() {
        let mut values = vec![1.0; 600_000];
        values[400_000] = f32::NAN;
        let found = found(&layer(&values, 600, Granularity::Tensor, true));
        let fault = |bytes: &Vec<u8>| u64::from_le_bytes(bytes[80..88].try_into().unwrap());
        // Three Scan chunks, of which the second one has it, and three Encode chunks that say nothing.
        assert_eq!(found.iter().map(fault).collect::<Vec<_>>(), [0, 1, 0, 0, 0, 0]);
    }

    /// Denormals are numbers here, too, whatever the host process has told the processor.
    #[cfg(target_arch = "x86_64")]
    #[test]
    #[allow(unsafe_code, reason = "the mode register is reached by assembly only")]
    fn a_thread_that_flushes_denormals_finds_the_same() {
        let tiny = f32::MIN_POSITIVE;
        // A scale of 2^-126, and values below that are most of a step.
        let values: Vec<f32> =
            (0..1024).map(|i| if i % 16 == 0 { 127.0 * tiny } else { 0.75 * tiny }).collect();
        let layer = layer(&values, 16, Granularity::Row, true);
        let expected = found(&layer);
        let mut mode = 0u32;
        // SAFETY: stores the register in a variable of its size.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mode, options(nostack)) };
        let flushing = mode | 1 << 15 | 1 << 6;
        // SAFETY: a mode that this thread had but for two defined bits.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const flushing, options(nostack, readonly)) };
        let flushed = found(&layer);
        // SAFETY: the mode that was there.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mode, options(nostack, readonly)) };
        assert!(flushed == expected);
        assert!(expected[0][HEADER..].starts_with(&[127, 1, 1]));
    }
}
