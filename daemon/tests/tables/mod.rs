//! Requests made by hand and carried out without a daemon: window and result are private memory.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(unsafe_code, reason = "stands in for mapped segments")]
#![allow(clippy::expect_used, clippy::panic, reason = "a failed expectation is how a test reports")]

use std::cell::UnsafeCell;
use std::io::Cursor;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use arrow_array::RecordBatch;
use arrow_data::ArrayData;
use arrow_ipc::reader::FileReader;
use arrow_schema::{DataType, Field};
use shmquant_daemon::engine::Work;
use shmquant_daemon::job::{Job, Sources};
use shmquant_daemon::memory::Memory;
use shmquant_daemon::plan::Plan;
use shmquant_kernels::{Affine, FloatType, Granularity, Layout, OnNonFinite, Scheme, ZeroPointsMut, fused};
use shmquant_protocol::chunks::{Action, Chunk, ChunkList};
use shmquant_protocol::descriptor::{Body, Descriptor, Item, Role, Spec, TableKind, Values, Way};
use shmquant_protocol::field::NodeData;
use shmquant_protocol::message::Failure;

/// Private memory that can stand for a segment.
pub(crate) struct Heap(Box<[Line]>);

#[repr(align(64))]
struct Line(UnsafeCell<[u8; 64]>);

// SAFETY: it is reached through raw pointers only; the job keeps its chunks apart.
unsafe impl Send for Heap {}
// SAFETY: as for `Send`.
unsafe impl Sync for Heap {}

impl Heap {
    /// So many bytes (rounded up) that hold `junk`.
    pub(crate) fn new(bytes: u64, junk: u8) -> Arc<Self> {
        let lines = bytes.div_ceil(64).max(1);
        Arc::new(Self((0..lines).map(|_| Line(UnsafeCell::new([junk; 64]))).collect()))
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= self.len());
        // SAFETY: inside; the test writes only where no chunk that runs reads.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr().add(at as usize), bytes.len());
        }
    }

    pub(crate) fn read(&self, at: u64, bytes: u64) -> Vec<u8> {
        assert!((at + bytes) as usize <= self.len());
        // SAFETY: inside, and nothing writes any more.
        unsafe { std::slice::from_raw_parts(self.as_ptr().add(at as usize), bytes as usize) }.to_vec()
    }
}

impl Memory for Heap {
    fn as_ptr(&self) -> *mut u8 {
        self.0.as_ptr().cast_mut().cast()
    }

    fn len(&self) -> usize {
        self.0.len() * 64
    }
}

/// A table: what is asked for, and the bytes of each item's streams (validity and values, or a kept column's buffers).
#[derive(Clone)]
pub(crate) struct Table {
    pub(crate) descriptor: Descriptor,
    pub(crate) streams: Vec<Vec<Vec<u8>>>,
}

/// In which order chunks run.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Order {
    Forward,
    Backward,
    Threads(usize),
}

/// What came out.
pub(crate) struct Done {
    pub(crate) file: Vec<u8>,
    pub(crate) report: Vec<u8>,
    pub(crate) resident: bool,
}

pub(crate) const WINDOW: u64 = 64 << 20;
pub(crate) const SMALL_WINDOW: u64 = 4 << 20;

impl Table {
    pub(crate) fn layers() -> Self {
        Self::new(TableKind::Layers { large_names: false }, 0)
    }

    pub(crate) fn columns(rows: u64) -> Self {
        Self::new(TableKind::Columns, rows)
    }

    fn new(table: TableKind, rows: u64) -> Self {
        let descriptor = Descriptor {
            table,
            metrics: false,
            continue_on_error: false,
            specs: Vec::new(),
            metadata: Default::default(),
            rows,
            items: Vec::new(),
        };
        Self { descriptor, streams: Vec::new() }
    }

    /// Adds a layer; `shape` is (rows, k).
    pub(crate) fn layer(
        &mut self,
        name: &str,
        spec: Spec,
        dtype: FloatType,
        shape: (u64, u64),
        bytes: Vec<u8>,
    ) {
        let mut values = values(Role::Layer, dtype, shape.0, shape.1);
        values.shape = vec![shape.0 as i64, shape.1 as i64];
        self.descriptor.rows += 1;
        self.push(name, spec, values, vec![Vec::new(), bytes]);
    }

    #[allow(clippy::too_many_arguments, reason = "what a column consists of")]
    /// Adds a vector column (or a plain one if `role` says so) with an optional validity bitmap.
    pub(crate) fn column(
        &mut self,
        name: &str,
        spec: Spec,
        dtype: FloatType,
        role: Role,
        k: u64,
        nulls: Option<&[bool]>,
        bytes: Vec<u8>,
    ) {
        let mut values = values(role, dtype, self.descriptor.rows, k);
        let mut validity = Vec::new();
        if let Some(nulls) = nulls {
            validity = vec![0u8; nulls.len().div_ceil(8)];
            for (i, _) in nulls.iter().enumerate().filter(|(_, null)| !**null) {
                validity[i / 8] |= 1 << (i % 8);
            }
            values.null_count = nulls.iter().filter(|n| **n).count() as u64;
        }
        self.push(name, spec, values, vec![validity, bytes]);
    }

    pub(crate) fn push(&mut self, name: &str, spec: Spec, mut values: Values, streams: Vec<Vec<u8>>) {
        let specs = &mut self.descriptor.specs;
        values.spec = specs.iter().position(|s| *s == spec).unwrap_or_else(|| {
            specs.push(spec);
            specs.len() - 1
        });
        self.descriptor.items.push(Item { name: name.to_owned(), body: Body::Values(values) });
        self.streams.push(streams);
    }

    /// Adds a kept column.
    pub(crate) fn keep(&mut self, field: Field, data: &ArrayData) {
        let mut streams = Vec::new();
        let node = node_data(data, &mut streams);
        let name = field.name().clone();
        self.descriptor.items.push(Item { name, body: Body::Keep { field, data: node } });
        self.streams.push(streams);
    }

    pub(crate) fn values(&mut self, item: usize) -> &mut Values {
        match &mut self.descriptor.items[item].body {
            Body::Values(values) => values,
            Body::Keep { .. } => panic!("a kept column"),
        }
    }

    /// The bytes of a chunk.
    fn chunk(&self, chunk: &Chunk) -> &[u8] {
        let item = chunk.item as usize;
        let (stream, first) = match (&self.descriptor.items[item].body, chunk.action) {
            (Body::Keep { .. }, Action::Copy { buffer }) => {
                (&self.streams[item][buffer as usize], chunk.first)
            }
            (Body::Values(v), Action::Copy { .. }) => {
                (&self.streams[item][usize::from(v.null_count == 0)], chunk.first)
            }
            (Body::Values(v), _) => (&self.streams[item][1], chunk.first * v.dtype.size() as u64),
            (Body::Keep { .. }, _) => panic!("a kept column is copied"),
        };
        &stream[first as usize..(first + chunk.bytes) as usize]
    }

    pub(crate) fn plan(&self, window: u64, limit: u64) -> Result<(Plan, Vec<u8>), Failure> {
        let mut bytes = Vec::new();
        if let Err((name, e)) = self.descriptor.encode(&mut bytes) {
            panic!("{name}: {e:?}");
        }
        let decoded = Descriptor::decode(&bytes).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(decoded, self.descriptor);
        let plan = Plan::with_offset_limit(decoded, bytes.len() as u64, window, 0, 1 << 40, limit)?;
        Ok((plan, bytes))
    }

    /// Carries the request out once.
    pub(crate) fn run(&self, window: u64, limit: u64, order: Order, junk: u8) -> Result<Done, Failure> {
        let (plan, descriptor) = self.plan(window, limit)?;
        let plan = Arc::new(plan);
        let memory = Heap::new(window, junk);
        memory.write(0, &descriptor);
        let offset = 128;
        let result = Heap::new(offset + plan.result_bytes() + 64, junk);
        let job = Job::new(Arc::clone(&plan), memory.clone(), &Sources::new(), result.clone(), offset)?;
        drive(self, plan.chunks(), &memory, &job, order);
        let complete = job.complete()?;
        assert_eq!(complete.length, plan.result_bytes());
        assert!(job.complete().is_err(), "a second completion");
        assert_eq!(result.read(0, offset), vec![junk; offset as usize], "bytes before the extent");
        let after = offset + complete.length;
        let rest = result.len() as u64 - after;
        assert_eq!(result.read(after, rest), vec![junk; rest as usize], "bytes behind the extent");
        let resident = plan.chunks().resident;
        Ok(Done { file: result.read(offset, complete.length), report: complete.report, resident })
    }

    /// Carries the request out in several orders, over several contents of recycled memory, resident and streamed; all
    /// must agree to the byte.
    pub(crate) fn result(&self) -> Result<Done, Failure> {
        let limit = i32::MAX as u64;
        let done = self.run(WINDOW, limit, Order::Forward, 0xA5);
        let others = [
            (WINDOW, Order::Backward, 0x5A),
            (WINDOW, Order::Threads(3), 0xFF),
            (SMALL_WINDOW, Order::Forward, 0),
            (SMALL_WINDOW, Order::Backward, 0x11),
            (SMALL_WINDOW, Order::Threads(3), 0x33),
        ];
        for (window, order, junk) in others {
            match (&done, self.run(window, limit, order, junk)) {
                (Ok(a), Ok(b)) => {
                    assert!(a.file == b.file, "{order:?} with a window of {window}: other bytes");
                    assert_eq!(a.report, b.report, "{order:?} with a window of {window}");
                }
                (Err(a), Err(b)) => assert_eq!(format!("{a:?}"), format!("{b:?}")),
                (a, b) => panic!("{order:?} {window}: {:?} {:?}", a.as_ref().err(), b.err()),
            }
        }
        done
    }
}

/// Plays the client and the engine: writes chunks as far as the ring allows and runs those whose barrier has passed.
fn drive(table: &Table, list: &ChunkList, window: &Heap, job: &Job, order: Order) {
    let n = list.chunks.len();
    let ended = Mutex::new(vec![false; n]);
    let taken = Mutex::new((vec![false; n], 0usize));
    let watermark = AtomicUsize::new(0);
    let workers = if let Order::Threads(n) = order { n } else { 1 };
    let work = || {
        loop {
            let next = {
                let mut guard = taken.lock().expect("not poisoned");
                let (taken, written) = &mut *guard;
                let consumed = watermark.load(Ordering::SeqCst);
                if consumed == n {
                    return;
                }
                while *written < list.writable(consumed) {
                    let chunk = &list.chunks[*written];
                    if !chunk.shared {
                        window.write(chunk.at, table.chunk(chunk));
                    }
                    *written += 1;
                }
                let ready = |i: &usize| !taken[*i] && job.barrier(*i) <= consumed;
                let mut candidates = consumed..*written;
                let next = match order {
                    Order::Backward => candidates.rfind(ready),
                    _ => candidates.find(ready),
                };
                if let Some(i) = next {
                    taken[i] = true;
                }
                next
            };
            let Some(index) = next else {
                std::thread::park_timeout(std::time::Duration::from_micros(200));
                continue;
            };
            job.run(index);
            let mut ended = ended.lock().expect("not poisoned");
            ended[index] = true;
            let low = ended.iter().position(|e| !e).unwrap_or(n);
            watermark.store(low, Ordering::SeqCst);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(work);
        }
        work();
    });
}

impl Done {
    /// Reads the file with all of Arrow's checks.
    pub(crate) fn batches(&self) -> Vec<RecordBatch> {
        let reader = FileReader::try_new(Cursor::new(&self.file), None).expect("an Arrow file");
        reader.map(|b| b.expect("a record batch")).collect()
    }

    pub(crate) fn batch(&self) -> RecordBatch {
        let mut batches = self.batches();
        assert_eq!(batches.len(), 1);
        batches.remove(0)
    }

    /// n, n_clipped, n_nonfinite, n_degenerate_groups, n_nulled and four metrics of an item.
    pub(crate) fn report(&self, item: usize) -> ([u64; 5], [f64; 4]) {
        let bytes = &self.report[item * 80..item * 80 + 80];
        let word = |i: usize| <[u8; 8]>::try_from(&bytes[i * 8..i * 8 + 8]).expect("eight bytes");
        (
            std::array::from_fn(|i| u64::from_le_bytes(word(i))),
            std::array::from_fn(|i| f64::from_le_bytes(word(5 + i))),
        )
    }
}

pub(crate) fn values(role: Role, dtype: FloatType, rows: u64, k: u64) -> Values {
    Values {
        role,
        spec: 0,
        dtype,
        null: false,
        rows,
        k,
        null_count: 0,
        shape: Vec::new(),
        params: None,
        way: Way::Streamed,
    }
}

pub(crate) fn spec(scheme: Scheme, granularity: Granularity, group_size: u32) -> Spec {
    Spec {
        affine: Some(Affine::new(scheme, None).expect("a scheme has its own mapping")),
        granularity,
        on_nonfinite: OnNonFinite::Error,
        packed: scheme.bits() < 8 && granularity != Granularity::Tensor,
        group_size,
    }
}

/// Codes, scales and zero points of a whole item at once.
pub(crate) fn expected(
    bytes: &[u8],
    dtype: FloatType,
    layout: &Layout,
    affine: &Affine,
    policy: OnNonFinite,
) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
    let sizes = layout.sizes(affine.bits).expect("a possible layout");
    let mut codes = vec![0; sizes.code_bytes as usize];
    let mut scales = vec![0.0; sizes.params as usize];
    let mut zeros = vec![0.0; sizes.params as usize];
    let values = shmquant_kernels::Values::from_bytes(bytes, dtype);
    let out = ZeroPointsMut::F32(&mut zeros);
    fused(values, 0, layout, affine, policy, &mut codes, &mut scales, out, &mut Vec::new())
        .expect("good values");
    (codes, scales, zeros)
}

pub(crate) fn layout(rows: u64, k: u64, spec: &Spec, pad_rows: bool) -> Layout {
    Layout {
        rows,
        k,
        group: u64::from(spec.group_size),
        granularity: spec.granularity,
        pad_rows,
        packed: spec.packed,
    }
}

/// Numbers that look like weights, the same every time.
pub(crate) fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..n).map(|_| (random.f32() - 0.5) * 3.0).collect()
}

pub(crate) fn to_bytes(values: &[f32], dtype: FloatType) -> Vec<u8> {
    let bytes = |v: &f32| match dtype {
        FloatType::F16 => half::f16::from_f32(*v).to_le_bytes().to_vec(),
        FloatType::Bf16 => half::bf16::from_f32(*v).to_le_bytes().to_vec(),
        FloatType::F32 => v.to_le_bytes().to_vec(),
        FloatType::F64 => f64::from(*v).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

/// A kept column as the client describes it: buffers in IPC order, each from its first element on.
fn node_data(data: &ArrayData, out: &mut Vec<Vec<u8>>) -> NodeData {
    assert_eq!(data.offset(), 0);
    let mut node =
        NodeData { length: data.len() as u64, null_count: data.null_count() as u64, ..NodeData::default() };
    let mut push = |node: &mut NodeData, bytes: Vec<u8>| {
        node.buffers.push(bytes.len() as u64);
        out.push(bytes);
    };
    if *data.data_type() != DataType::Null {
        let validity = match data.nulls() {
            Some(nulls) if nulls.null_count() > 0 => {
                let mut bytes = vec![0u8; data.len().div_ceil(8)];
                for i in (0..data.len()).filter(|i| nulls.is_valid(*i)) {
                    bytes[i / 8] |= 1 << (i % 8);
                }
                bytes
            }
            _ => Vec::new(),
        };
        push(&mut node, validity);
        for (i, buffer) in data.buffers().iter().enumerate() {
            let width = arrow_data::layout(data.data_type()).buffers.get(i).map(|s| match s {
                arrow_data::BufferSpec::FixedWidth { byte_width, .. } => {
                    let offsets = matches!(
                        data.data_type(),
                        DataType::List(_)
                            | DataType::LargeList(_)
                            | DataType::Map(..)
                            | DataType::Utf8
                            | DataType::LargeUtf8
                            | DataType::Binary
                            | DataType::LargeBinary
                    );
                    (data.len() + usize::from(offsets)) * byte_width
                }
                arrow_data::BufferSpec::BitMap => data.len().div_ceil(8),
                _ => buffer.len(),
            });
            push(&mut node, buffer[..width.unwrap_or(buffer.len())].to_vec());
        }
    }
    node.children = data.child_data().iter().map(|child| node_data(child, out)).collect();
    node
}
