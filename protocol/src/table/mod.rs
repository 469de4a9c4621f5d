//! Arrow tables on their way in: what is to be done with them as a [`Descriptor`], and their values by reference.
//!
//! Nothing is copied when a [`Table`] is made. [`Source::fill`] writes one chunk at a time from the caller's own
//! buffers: all chunks of a column joined, slices at their offsets, zeros where rows are null.

mod columns;
mod error;
mod kept;
mod layers;
mod options;
mod spec;
pub(crate) mod stream;
pub(crate) mod text;
pub(crate) mod vectors;

use std::ops::Range;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use xxhash_rust::xxh3::Xxh3;

pub use error::{Details, InputError};
pub use layers::LayerInput;
pub use options::{Override, OverrideSpec, Pattern, TableOptions};

use crate::chunks::{Action, CHUNK_BYTES, Chunk, ChunkList, is_scanned};
use crate::client::Source;
use crate::descriptor::{Body, Descriptor, Item, Params, Spec, TableKind, Values, Way};
use crate::field::UnsupportedType;
use crate::findings;
use crate::fit::TableParams;
use stream::Stream;

/// Most elements of an item, as the descriptor has it.
const MAX_ELEMENTS: u64 = 1 << 46;

/// Columns of a layers table's result.
const LAYER_COLUMNS: [&str; 13] = [
    "layer_name",
    "quantized_data",
    "scales",
    "zero_points",
    "shape",
    "bit_width",
    "scheme",
    "src_dtype",
    "packing",
    "group_size",
    "axis",
    "metrics",
    "error",
];

/// A table to be quantized: a descriptor and the caller's buffers.
#[derive(Debug)]
pub struct Table {
    descriptor: Descriptor,
    streams: Vec<Streams>,
    outputs: Vec<Output>,
}

/// Columns of the finished table, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// A quantized column: the result's columns of these names.
    Quantized {
        /// Codes first, then parameters.
        names: Vec<String>,
    },
    /// The input's column at this index, from the caller's own buffers.
    PassThrough {
        /// Its index in the input.
        index: usize,
    },
    /// A column that was copied into the result.
    Kept {
        /// Its name.
        name: String,
    },
}

/// The values of one item.
#[derive(Debug)]
enum Streams {
    Values {
        validity: Stream,
        values: Stream,
        /// Bytes of one element.
        size: usize,
        /// A layer that is not quantized.
        as_is: bool,
    },
    Kept(Vec<Stream>),
}

/// What the two kinds of table have in common while they are made.
struct Parts {
    table: TableKind,
    specs: Vec<Spec>,
    rows: u64,
    items: Vec<Item>,
    streams: Vec<Streams>,
    outputs: Vec<Output>,
}

impl Table {
    /// A table given by its chunks: layers if it has `layer_name` and `weights`, else columns.
    ///
    /// Of a layers table `layer_name`, `weights`, `dtype` and `shape` are read; its result has columns of its own, so
    /// further ones are not carried over.
    pub fn from_batches(
        schema: SchemaRef,
        batches: Vec<RecordBatch>,
        options: &TableOptions,
    ) -> Result<Self, InputError> {
        check_batches(&schema, &batches)?;
        let detected = options.columns.is_none() && layers::has_layer_columns(&schema);
        if options.layers.unwrap_or(detected) {
            return Ok(Self::finish(layers::from_table(&schema, &batches, options)?, options, None));
        }
        let parts = columns::from_table(&schema, &batches, options)?;
        Ok(Self::finish(parts, options, Some(&schema)))
    }

    /// Layers that lie in memory one by one. `large_names`: the result's names are large strings.
    pub fn from_layers(
        layers: Vec<LayerInput>,
        large_names: bool,
        options: &TableOptions,
    ) -> Result<Self, InputError> {
        Ok(Self::finish(layers::from_inputs(layers, large_names, options)?, options, None))
    }

    fn finish(parts: Parts, options: &TableOptions, schema: Option<&SchemaRef>) -> Self {
        let Parts { table, specs, rows, mut items, streams, mut outputs } = parts;
        for item in &mut items {
            if let Body::Values(values) = &mut item.body
                && let Some(spec) = specs.get(values.spec)
            {
                values.way = way(values, spec);
            }
        }
        if table != TableKind::Columns {
            outputs = vec![Output::Quantized { names: LAYER_COLUMNS.map(str::to_owned).to_vec() }];
        }
        // Only a published table carries the schema's metadata: elsewhere the caller puts it back himself.
        let metadata = schema.filter(|_| options.named).map(|s| s.metadata().clone()).unwrap_or_default();
        let descriptor = Descriptor {
            table,
            metrics: options.metrics,
            continue_on_error: options.continue_on_error,
            specs,
            metadata,
            rows,
            items,
        };
        Self { descriptor, streams, outputs }
    }

    /// Whether it is a table of layers.
    pub fn is_layers(&self) -> bool {
        self.descriptor.table != TableKind::Columns
    }

    /// The finished table's columns, in order.
    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// Bytes of the columns and layers that go into the result.
    pub fn input_bytes(&self) -> u64 {
        let bytes = |streams: &Streams| match streams {
            Streams::Values { validity, values, .. } => validity.bytes() + values.bytes(),
            Streams::Kept(streams) => streams.iter().map(Stream::bytes).sum(),
        };
        self.streams.iter().map(bytes).sum()
    }

    /// xxh3-128 over the descriptor and all values, in the order in which they cross: equal for equal requests.
    pub fn digest(&self) -> [u8; 16] {
        let mut hash = Xxh3::new();
        let mut head = Vec::new();
        let descriptor = self.descriptor.streamed();
        // Kept columns were tried when the table was made.
        let _: Result<(), (String, UnsupportedType)> = descriptor.encode(&mut head);
        hash.update(&head);
        let mut scratch = vec![0; CHUNK_BYTES as usize];
        for chunk in &ChunkList::new(&descriptor, head.len() as u64, u64::MAX).chunks {
            // Seen when it was scanned.
            if !chunk.shared {
                let part = &mut scratch[..chunk.bytes as usize];
                self.fill(chunk, part);
                hash.update(part);
            }
        }
        hash.digest128().to_le_bytes()
    }
}

impl Source for Table {
    fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    fn fill(&self, chunk: &Chunk, out: &mut [u8]) {
        match (&self.streams[chunk.item as usize], chunk.action) {
            (Streams::Kept(streams), Action::Copy { buffer }) => {
                streams[buffer as usize].write(chunk.first, out)
            }
            (Streams::Values { validity, as_is: false, .. }, Action::Copy { .. }) => {
                validity.write(chunk.first, out);
            }
            (Streams::Values { values, .. }, Action::Copy { .. }) => values.write(chunk.first, out),
            (Streams::Values { values, size, .. }, _) => values.write(chunk.first * *size as u64, out),
            (Streams::Kept(_), _) => {}
        }
    }

    fn lies_at(&self, item: usize) -> Option<(usize, usize)> {
        match self.streams.get(item)? {
            Streams::Values { values, .. } => values.lies_at(),
            Streams::Kept(_) => None,
        }
    }

    fn slice(&self, item: usize, bytes: Range<u64>) -> Option<&[u8]> {
        match self.streams.get(item)? {
            Streams::Values { values, .. } => values.slice(bytes),
            Streams::Kept(_) => None,
        }
    }
}

/// Most ranges that a call keeps of one item while it looks for them.
const MOST_RANGES: u64 = 1 << 20;

/// Values that only this process can reach are encoded here: that costs less than copying them.
fn way(values: &Values, spec: &Spec) -> Way {
    let many = is_scanned(values, spec) && values.layout(spec).n_params() > MOST_RANGES;
    if findings::fit(values, spec) && !many { Way::Encoded } else { Way::Streamed }
}

/// The parameters of one item out of given ones.
fn given_params(
    params: &TableParams,
    name: &str,
    sole: bool,
    want: u64,
) -> Result<Option<Params>, Box<Details>> {
    let Some(found) = params.get(name).or_else(|| params.sole().filter(|_| sole)) else {
        let known = params.names().collect::<Vec<_>>().join(", ");
        let details = Details::new(format!("params have no ranges for '{name}'"));
        let details = details.hint(format!("they have them for {known}"));
        return Err(Box::new(Details { argument: Some("params"), ..details }));
    };
    let have = found.scales.len() as u64;
    // A plain column or tensor has one scale whatever else there is.
    if have != want {
        let what = format!("'{name}' needs {want} scales, its params have {have}");
        let details = Details::new(what)
            .value(have)
            .hint("ranges fit data of the same width (dimension) or rows (row)");
        return Err(Box::new(Details { argument: Some("params"), ..details }));
    }
    Ok(Some(found.clone()))
}

fn check_batches(schema: &SchemaRef, batches: &[RecordBatch]) -> Result<(), InputError> {
    for (i, batch) in batches.iter().enumerate() {
        let theirs = batch.schema();
        let same = theirs.fields().len() == schema.fields().len()
            && theirs.fields().iter().zip(schema.fields()).all(|(a, b)| a.data_type() == b.data_type());
        if !same {
            let what = format!("batch {i} has another schema than the table");
            return Err(InputError::Column(Box::new(Details::new(what))));
        }
    }
    Ok(())
}
