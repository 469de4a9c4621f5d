//! From a descriptor to the complete layout of its result: schema, every array, every buffer's place, every chunk.
//!
//! Nothing here touches shared memory. Sizes come from outside, so every sum is checked, and what is larger than
//! allowed is refused before anything in proportion to it is built.

mod cache;
mod columns;
mod file;
mod ipc;
mod kept;
mod layers;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arrow_schema::Schema;
use shmquant_kernels::{Affine, Granularity, Layout, OnNonFinite, Sizes};
use shmquant_protocol::chunks::{CHUNK_BYTES, ChunkList, MIN_RING};
use shmquant_protocol::descriptor::{Body, Descriptor, Params, Role, Spec, TableKind, Values};
use shmquant_protocol::message::{ErrorCode, Failure};

pub use cache::Plans;
pub(crate) use columns::{Column, is_asymmetric, row_id, with_id};
pub(crate) use file::{BufferId, File, NodeId, Place};
pub(crate) use ipc::{END, MAGIC};
pub(crate) use layers::{Batch, Binary, FLOAT_METRICS, List, Words, axes, bit_width, error_cap, words};

/// Largest result that is believed: keeps every sum far from 2^63.
const MAX_RESULT: u64 = 1 << 56;
/// Most bytes or elements that 32-bit offsets can address.
const OFFSET_LIMIT: u64 = i32::MAX as u64;
/// Most parameters along a row for granularity dimension: each chunk of work holds a range for every one.
const MAX_DIMENSION: u64 = 1 << 20;

/// A descriptor with the layout of its result and the list of its chunks.
#[derive(Debug)]
pub struct Plan {
    descriptor: Descriptor,
    chunks: ChunkList,
    file: File,
    schema: Schema,
    targets: Vec<Target>,
    table: Table,
    /// The schema's flatbuffers, if no parameters are in it.
    schema_texts: OnceLock<SchemaTexts>,
    /// The heads of the last file of this plan, and what they say.
    last_heads: Mutex<Option<Arc<Heads>>>,
}

/// The flatbuffers of a schema: the message and the footer.
pub(crate) type SchemaTexts = (Vec<u8>, Vec<u8>);

/// The heads of all messages, for these null counts and used bytes.
#[derive(Debug)]
pub(crate) struct Heads {
    nulls: Vec<u64>,
    used: Vec<u64>,
    /// Place, padded bytes and flatbuffer of each.
    pub(crate) heads: Vec<(u64, u64, Vec<u8>)>,
}

/// Where an item's results go.
#[derive(Debug)]
pub(crate) enum Target {
    Values(Box<ValuesTarget>),
    /// A kept column's buffers in preorder.
    Kept(Vec<BufferId>),
}

/// Where the codes and parameters of one layer or column go.
#[derive(Debug)]
pub(crate) struct ValuesTarget {
    pub(crate) layout: Layout,
    /// What the kernels are told to do with NaN and infinities.
    pub(crate) policy: OnNonFinite,
    /// Scales (and zero points) that are stored.
    pub(crate) params: u64,
    pub(crate) codes: Place,
    pub(crate) code_bytes: u64,
    /// `None`: they end up in the field's metadata.
    pub(crate) scales: Option<Place>,
    pub(crate) zeros: Zeros,
    /// Where the bitmap of null rows is streamed to.
    pub(crate) validity: Option<BufferId>,
}

/// Where zero points go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Zeros {
    /// Symmetric: nowhere.
    None,
    /// Into the field's metadata.
    Private,
    F32(Place),
    I8(Place),
    U8(Place),
}

/// The arrays that are written when all chunks have ended.
#[derive(Debug)]
pub(crate) enum Table {
    Layers(Vec<Batch>),
    Columns(Vec<Column>),
}

impl Plan {
    /// Lays out the result of `descriptor`, whose encoded form took `descriptor_bytes` of a window of `window` bytes,
    /// to be streamed through a ring of `ring` bytes (0: all of the window).
    ///
    /// # Errors
    /// `NO_ROOM` for a result of more than `max_result` bytes, `UNSUPPORTED` and `INVALID_INPUT` for what cannot be
    /// laid out, `PROTOCOL` for a descriptor that leaves no room for chunks.
    pub fn new(
        descriptor: Descriptor,
        descriptor_bytes: u64,
        window: u64,
        ring: u64,
        max_result: u64,
    ) -> Result<Self, Failure> {
        Self::with_offset_limit(descriptor, descriptor_bytes, window, ring, max_result, OFFSET_LIMIT)
    }

    /// [`Plan::new`] with another limit of what 32-bit offsets may address, so that splitting can be tried in the small.
    #[doc(hidden)]
    pub fn with_offset_limit(
        descriptor: Descriptor,
        descriptor_bytes: u64,
        window: u64,
        ring: u64,
        max_result: u64,
        limit: u64,
    ) -> Result<Self, Failure> {
        let most = max_result.min(MAX_RESULT);
        if descriptor_bytes > window / 4 || window - descriptor_bytes < 2 * CHUNK_BYTES {
            let what = format!("a descriptor of {descriptor_bytes} bytes in a window of {window}");
            return Err(Failure::new(ErrorCode::Protocol, what, ""));
        }
        if ring > 0 && ring < MIN_RING {
            let what = format!("a ring of {ring} bytes, where the least is {MIN_RING}");
            return Err(Failure::new(ErrorCode::Protocol, what, ""));
        }
        let mut builder = file::Builder::default();
        // The schema stands in the file twice.
        let mut metadata = descriptor_bytes.saturating_mul(2);
        let (targets, table, large) = match descriptor.table {
            TableKind::Layers { .. } => {
                let (targets, batches, large) = layers::lay_out(&mut builder, &descriptor, limit)?;
                (targets, Table::Layers(batches), large)
            }
            TableKind::Columns => {
                metadata = metadata.saturating_add(columns::embedded_bytes(&descriptor)?.saturating_mul(2));
                let (targets, columns) = columns::lay_out(&mut builder, &descriptor)?;
                (targets, Table::Columns(columns), layers::Large::default())
            }
        };
        builder.check(metadata, most)?;
        let schema = match &table {
            Table::Layers(_) => layers::schema(&descriptor, large),
            Table::Columns(_) => columns::schema(&descriptor, &|item| placeholder(&targets, item)),
        };
        let file = builder.place(&schema, most)?;
        let chunks = ChunkList::with_ring(&descriptor, descriptor_bytes, window, ring);
        if u32::try_from(chunks.chunks.len()).is_err() {
            return Err(Failure::new(ErrorCode::NoRoom, "the table has more than 2^32 chunks", ""));
        }
        let (schema_texts, last_heads) = (OnceLock::new(), Mutex::default());
        Ok(Self { descriptor, chunks, file, schema, targets, table, schema_texts, last_heads })
    }

    /// Bytes of the result's extent.
    pub fn result_bytes(&self) -> u64 {
        self.file.length()
    }

    /// The chunks, as the client derives them too.
    pub fn chunks(&self) -> &ChunkList {
        &self.chunks
    }

    /// Bytes that the client writes to the window, all passes counted.
    pub fn streamed_bytes(&self) -> u64 {
        let written = self.chunks.chunks.iter().filter(|c| !c.shared);
        written.map(|c| c.bytes).fold(0, u64::saturating_add)
    }

    /// Bytes of values that are read where they lie.
    pub fn shared_bytes(&self) -> u64 {
        self.descriptor.places().map(|(_, values, _)| values.bytes()).fold(0, u64::saturating_add)
    }

    /// What was asked for.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// The three dictionaries of a layers table.
    pub(crate) fn words(&self) -> Option<&[Words; 3]> {
        match &self.table {
            Table::Layers(batches) => batches.first()?.words.as_slice().try_into().ok(),
            Table::Columns(_) => None,
        }
    }

    pub(crate) fn target(&self, item: usize) -> Option<&Target> {
        self.targets.get(item)
    }

    /// The values of an item with their spec and target; `None` for a kept column.
    pub(crate) fn values(&self, item: usize) -> Option<(&Values, &Spec, &ValuesTarget)> {
        match (&self.descriptor.items.get(item)?.body, self.targets.get(item)?) {
            (Body::Values(values), Target::Values(target)) => {
                Some((values, self.descriptor.spec(values), target))
            }
            _ => None,
        }
    }

    /// The final schema, as long as the one that was laid out.
    pub(crate) fn schema(&self, params: &dyn Fn(usize) -> Params) -> Schema {
        match &self.table {
            Table::Layers(_) => self.schema.clone(),
            Table::Columns(_) => columns::schema(&self.descriptor, params),
        }
    }

    /// The flatbuffers of a schema.
    pub(crate) fn schema_texts(&self, schema: &Schema) -> SchemaTexts {
        (ipc::schema(schema), self.file.footer(schema))
    }

    /// The flatbuffers of a schema without parameters, which is the same for every request of this plan.
    pub(crate) fn fixed_schema_texts(&self) -> &SchemaTexts {
        let none = || Params { id: 0, scales: Vec::new(), zero_points: Vec::new() };
        self.schema_texts.get_or_init(|| self.schema_texts(&self.schema(&|_| none())))
    }

    /// The heads of all messages. Nearly always they say what they said in the request before.
    pub(crate) fn heads(&self, nulls: Vec<u64>, used: Vec<u64>) -> Arc<Heads> {
        let mut last = self.last_heads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(heads) = last.as_ref().filter(|h| h.nulls == nulls && h.used == used) {
            return heads.clone();
        }
        let heads = self.file.heads(&nulls, &used).collect();
        last.insert(Arc::new(Heads { nulls, used, heads })).clone()
    }

    /// Indices of the kept columns in the result's schema.
    pub(crate) fn kept_fields(&self) -> Vec<usize> {
        let mut field = 0;
        let mut kept = Vec::new();
        for item in &self.descriptor.items {
            match &item.body {
                Body::Values(values) => field += columns::width(values, self.descriptor.spec(values)),
                Body::Keep { .. } => {
                    kept.push(field);
                    field += 1;
                }
            }
        }
        kept
    }

    /// Whether an item's parameters are in its field's metadata.
    pub(crate) fn is_embedded(&self, item: usize) -> bool {
        self.values(item).is_some_and(|(values, spec, _)| columns::is_embedded(values, spec))
    }
}

/// Parameters of the right number, so that their text is as long as it will be.
fn placeholder(targets: &[Target], item: usize) -> Params {
    let n = match targets.get(item) {
        Some(Target::Values(target)) => target.params as usize,
        _ => 0,
    };
    Params { id: 0, scales: vec![0.0; n], zero_points: vec![0; n] }
}

/// Layout and totals of values to be quantized, or why there are none.
fn sizes(name: &str, values: &Values, spec: &Spec, affine: &Affine) -> Result<(Layout, Sizes), Failure> {
    let layout = values.layout(spec);
    let sizes = layout.sizes(affine.bits).ok_or_else(|| {
        let what = format!("{} x {} values cannot be laid out", values.rows, values.k);
        refuse(ErrorCode::Unsupported, name, &what)
    })?;
    if spec.granularity == Granularity::Dimension && values.k > MAX_DIMENSION {
        let what =
            format!("granularity dimension takes rows of at most {MAX_DIMENSION} values, not {}", values.k);
        return Err(refuse(ErrorCode::Unsupported, name, &what));
    }
    if i32::try_from(spec.group_size).is_err() {
        let what = format!("a group of {} values passes 2^31", spec.group_size);
        return Err(refuse(ErrorCode::Unsupported, name, &what));
    }
    let given = values.params.as_ref().filter(|_| !is_asymmetric(affine));
    if let Some(zero) = given.and_then(|p| p.zero_points.iter().find(|z| **z != 0)) {
        let what = format!("a zero point of {zero} was given for a symmetric scheme, which stores none");
        return Err(refuse(ErrorCode::InvalidInput, name, &what));
    }
    let shares_rows = matches!(spec.granularity, Granularity::Tensor | Granularity::Dimension);
    let in_a_chunk = CHUNK_BYTES / values.dtype.size() as u64;
    if values.role == Role::Vector
        && spec.on_nonfinite == OnNonFinite::Null
        && shares_rows
        && values.params.is_none()
        && values.k > in_a_chunk
    {
        // A row that spans chunks is left out of its own range, but nobody sees it whole to leave it out of others'.
        let what = format!(
            "on_nonfinite=\"null\" with granularity {} takes vectors of at most {in_a_chunk} values",
            spec.granularity
        );
        return Err(refuse(ErrorCode::Unsupported, name, &what));
    }
    Ok((layout, sizes))
}

/// A failure of one layer or column.
pub(crate) fn refuse(code: ErrorCode, name: &str, what: &str) -> Failure {
    let mut failure = Failure::new(code, format!("{name:?}: {what}"), "");
    failure.column = name.to_owned();
    failure
}
