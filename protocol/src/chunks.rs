//! The chunk list: both sides derive it from the descriptor by the rules of PROTOCOL.md section 5.

use shmquant_kernels::Granularity;

use crate::descriptor::{Body, Descriptor, Role, Spec, Values, Way};
use crate::field::NodeData;
use crate::findings::Parts;

/// Most bytes of a chunk.
pub const CHUNK_BYTES: u64 = 1 << 20;
/// Alignment of chunks in the window and of buffers in a result.
pub const ALIGN: u64 = 64;
/// Smallest window: its ring holds several chunks beside the largest descriptor.
pub const MIN_WINDOW: u64 = 4 << 20;

/// Smallest ring that a request may ask for: two of the largest chunks, one of which is read while the other is written.
pub const MIN_RING: u64 = 2 * CHUNK_BYTES;

/// What is done with a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Bytes go to their final place: buffer number `buffer` of the item (0 is the validity of quantized values, or a layer that stays as it is).
    Copy {
        /// Which of the item's buffers, counted in preorder, empty ones included.
        buffer: u32,
    },
    /// Range, parameters and codes of whole domains.
    Fused,
    /// First pass: ranges.
    Scan,
    /// Second pass, or given parameters: codes.
    Encode,
}

/// One independent piece of work and of transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Index of its item in the descriptor.
    pub item: u32,
    /// What is done with it.
    pub action: Action,
    /// First element of the item, or first byte of the buffer for `Copy`.
    pub first: u64,
    /// Elements, or bytes for `Copy`.
    pub count: u64,
    /// Bytes in the window: 0 where the values lie in an extent.
    pub bytes: u64,
    /// Bytes of values that are worked on, or that are copied.
    pub work: u64,
    /// Where it lies, from the window's start.
    pub at: u64,
    /// Ring cursor at which it starts (streamed mode).
    pub start: u64,
    /// It lies where an earlier Scan chunk put it: nothing is written.
    pub shared: bool,
}

/// The chunks of a request and how they pass through a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkList {
    /// In the order in which they are written and started.
    pub chunks: Vec<Chunk>,
    /// First byte of the ring.
    pub base: u64,
    /// Bytes of the ring.
    pub capacity: u64,
    /// Bytes of the ring that are worth a `CONSUMED` when they have become free.
    pub notice: u64,
    /// Every chunk has a place of its own: nothing is overwritten.
    pub resident: bool,
}

impl ChunkList {
    /// The chunks of `descriptor`, whose encoded form takes `descriptor_bytes` at the start of a window of `window` bytes.
    pub fn new(descriptor: &Descriptor, descriptor_bytes: u64, window: u64) -> Self {
        Self::with_ring(descriptor, descriptor_bytes, window, 0)
    }

    /// As [`new`](Self::new), but what does not fit the window goes round in `ring` bytes of it, unless that is 0.
    pub fn with_ring(descriptor: &Descriptor, descriptor_bytes: u64, window: u64, ring: u64) -> Self {
        let mut chunks = Vec::new();
        for (index, item) in descriptor.items.iter().enumerate() {
            let index = index as u32;
            match &item.body {
                Body::Values(v) => value_chunks(&mut chunks, index, v, descriptor.spec(v)),
                Body::Keep { data, .. } => {
                    let mut buffer = 0;
                    kept_chunks(&mut chunks, index, data, &mut buffer);
                }
            }
        }
        let base = descriptor_bytes.next_multiple_of(ALIGN);
        let capacity = window.saturating_sub(base) / ALIGN * ALIGN;
        let mut list = Self { chunks, base, capacity, notice: capacity / 4, resident: false };
        list.place(ring);
        list
    }

    /// The number of chunks that may be written when all below `consumed` are consumed.
    pub fn writable(&self, consumed: usize) -> usize {
        if self.resident {
            return self.chunks.len();
        }
        let Some(free_from) = self.chunks.get(consumed).map(|c| c.start) else { return self.chunks.len() };
        let fits = |c: &Chunk| c.start + c.bytes.next_multiple_of(ALIGN) - free_from <= self.capacity;
        consumed + self.chunks[consumed..].partition_point(fits)
    }

    /// Ring bytes freed when the watermark moves from `before` to `after`.
    pub fn freed(&self, before: usize, after: usize) -> u64 {
        let start = |i: usize| self.chunks.get(i).or(self.chunks.last()).map_or(0, |c| c.start);
        start(after) - start(before)
    }

    /// Decides the mode and gives every chunk its place. `shared` comes in as "second pass over scanned elements".
    fn place(&mut self, ring: u64) {
        let room = |c: &Chunk| c.bytes.next_multiple_of(ALIGN);
        let total = self.chunks.iter().filter(|c| !c.shared).map(room).fold(0, u64::saturating_add);
        self.resident = total <= self.capacity;
        if !self.resident && ring > 0 {
            self.capacity = self.capacity.min(ring / ALIGN * ALIGN);
            // Others have work for the cores meanwhile: few messages are worth more than being told soon.
            self.notice = self.capacity / 2;
        }
        let mut cursor = 0u64;
        let mut scans = 0;
        for i in 0..self.chunks.len() {
            let mut chunk = self.chunks[i];
            // Scan chunks of an item are followed by as many Encode chunks over the same elements.
            scans = match chunk.action {
                Action::Scan
                    if i > 0
                        && self.chunks[i - 1].action == Action::Scan
                        && self.chunks[i - 1].item == chunk.item =>
                {
                    scans + 1
                }
                Action::Scan => 1,
                _ => scans,
            };
            chunk.shared &= self.resident;
            if chunk.shared {
                chunk.at = self.chunks[i - scans].at;
                chunk.start = cursor;
            } else {
                let (size, end) = (room(&chunk), cursor + room(&chunk));
                let crosses =
                    size > 0 && self.capacity > 0 && cursor / self.capacity != (end - 1) / self.capacity;
                chunk.start = if crosses { cursor.next_multiple_of(self.capacity) } else { cursor };
                chunk.at = self.base + chunk.start.checked_rem(self.capacity).unwrap_or(0);
                cursor = chunk.start + size;
            }
            self.chunks[i] = chunk;
        }
    }
}

/// Bytes of the validity bitmap of an item.
pub fn validity_bytes(values: &Values) -> u64 {
    if values.null_count == 0 { 0 } else { values.rows.div_ceil(8) }
}

fn value_chunks(out: &mut Vec<Chunk>, item: u32, values: &Values, spec: &Spec) {
    let elements = values.elements();
    copy_chunks(out, item, 0, validity_bytes(values));
    if elements == 0 {
        return;
    }
    let size = values.dtype.size() as u64;
    let Some(affine) = &spec.affine else {
        let first = out.len();
        copy_chunks(out, item, 0, values.bytes());
        if values.place().is_some() {
            out[first..].iter_mut().for_each(|chunk| chunk.bytes = 0);
        }
        return;
    };
    let cut = Cut::of(values);
    let mut push = |action, shared, first, count| {
        let work = count * size;
        let bytes = match values.way {
            Way::Streamed => work,
            Way::Encoded => Parts::new(values, spec, affine, action, first, count).bytes as u64,
            Way::Placed(_) => 0,
        };
        out.push(Chunk { item, action, first, count, bytes, work, at: 0, start: 0, shared });
    };
    match cut.fused(values, spec) {
        Some(Runs::Flat(run)) => {
            return runs(elements, run, |first, count| push(Action::Fused, false, first, count));
        }
        Some(Runs::InRows(run)) => {
            return runs_in_rows(values.rows, values.k, run, |first, count| {
                push(Action::Fused, false, first, count)
            });
        }
        None => {}
    }
    let mut pass = |action, shared| {
        let each = |first, count| push(action, shared, first, count);
        match (values.role, cut.rows) {
            (Role::Layer, _) => runs(elements, cut.most, each),
            (_, Some(run)) => runs(elements, run, each),
            (_, None) => runs_in_rows(values.rows, values.k, cut.most, each),
        }
    };
    if values.params.is_none() {
        pass(Action::Scan, false);
    }
    // Values that cross are still there from the first pass, if they all fit the window.
    pass(Action::Encode, values.params.is_none() && values.way != Way::Encoded);
}

/// Whether values are read twice, since their ranges are known only at the end.
pub fn is_scanned(values: &Values, spec: &Spec) -> bool {
    let empty = spec.affine.is_none() || values.elements() == 0;
    !empty && values.params.is_none() && Cut::of(values).fused(values, spec).is_none()
}

/// Where values may be cut.
struct Cut {
    /// Most elements of a chunk.
    most: u64,
    /// Every row of codes starts on a byte.
    aligned: bool,
    /// Elements of whole rows in a chunk, if they fit.
    rows: Option<u64>,
}

enum Runs {
    /// Over the flat order.
    Flat(u64),
    /// In each row.
    InRows(u64),
}

impl Cut {
    fn of(values: &Values) -> Self {
        let most = CHUNK_BYTES / values.dtype.size() as u64;
        let (rows, k) = (values.rows, values.k);
        let aligned = values.role != Role::Layer || k % 8 == 0 || rows == 1;
        let whole_rows = k.saturating_mul(8) <= most || (aligned && k <= most);
        let rows = whole_rows.then(|| {
            let n = most / k;
            k * if aligned { n } else { n / 8 * 8 }
        });
        Self { most, aligned, rows }
    }

    /// How chunks that hold whole domains are cut; `None` if there are none such, or parameters are given.
    fn fused(&self, values: &Values, spec: &Spec) -> Option<Runs> {
        if values.params.is_some() {
            return None;
        }
        let group = u64::from(spec.group_size);
        match (spec.granularity, self.rows) {
            (Granularity::Tensor | Granularity::Dimension, _) => {
                (values.elements() <= self.most).then_some(Runs::Flat(self.most))
            }
            (Granularity::Row | Granularity::Group, Some(run)) => Some(Runs::Flat(run)),
            (Granularity::Group, None) if self.aligned && group.saturating_mul(8) <= self.most => {
                Some(Runs::InRows(8 * group * (self.most / (8 * group))))
            }
            _ => None,
        }
    }
}

fn runs(total: u64, run: u64, mut each: impl FnMut(u64, u64)) {
    let mut first = 0;
    while first < total {
        let count = run.min(total - first);
        each(first, count);
        first += count;
    }
}

fn runs_in_rows(rows: u64, k: u64, run: u64, mut each: impl FnMut(u64, u64)) {
    for row in 0..rows {
        runs(k, run, |first, count| each(row * k + first, count));
    }
}

fn copy_chunks(out: &mut Vec<Chunk>, item: u32, buffer: u32, bytes: u64) {
    runs(bytes, CHUNK_BYTES, |first, count| {
        let action = Action::Copy { buffer };
        out.push(Chunk {
            item,
            action,
            first,
            count,
            bytes: count,
            work: count,
            at: 0,
            start: 0,
            shared: false,
        });
    });
}

fn kept_chunks(out: &mut Vec<Chunk>, item: u32, data: &NodeData, buffer: &mut u32) {
    for bytes in &data.buffers {
        copy_chunks(out, item, *buffer, *bytes);
        *buffer += 1;
    }
    for child in &data.children {
        kept_chunks(out, item, child, buffer);
    }
}
