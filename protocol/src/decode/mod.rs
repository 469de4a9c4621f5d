//! From a result back to values: no daemon is needed, only the result's own columns.
//!
//! Works on results as they come and on what became of them: read back from Parquet, joined with others, sent through
//! another library. What can no longer be decoded safely is refused.

mod codec;
mod columns;
mod error;
mod layers;
mod params;
mod sink;

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_schema::{Schema, SchemaRef};
use shmquant_kernels::FloatType;

pub use codec::{Codes, codes};
pub use error::DecodeError;
pub use params::params;

/// One decoded layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Its name.
    pub name: String,
    /// Its values, aligned for their type.
    pub values: Buffer,
    /// Their type.
    pub dtype: FloatType,
    /// Its shape.
    pub shape: Vec<i64>,
}

/// Whether these are the columns of a quantized layers table.
pub fn is_layers(schema: &Schema) -> bool {
    ["layer_name", "quantized_data", "scales", "scheme"].iter().all(|name| schema.index_of(name).is_ok())
}

/// Decodes a result: of a columns table the columns `names` (by default all that hold codes), each in its place and
/// without its parameter columns; of a layers table the layers `names` (by default all) as `layer_name`, `weights`
/// and `shape`.
///
/// The batches' schema is that of the first of the results; each row is compared with it where parameters are shared.
pub fn table(
    schema: &SchemaRef,
    batches: &[RecordBatch],
    names: Option<&[String]>,
    dtype: FloatType,
) -> Result<(SchemaRef, Vec<RecordBatch>), DecodeError> {
    if is_layers(schema) {
        layers::table(schema, batches, names, dtype)
    } else {
        columns::table(schema, batches, names, dtype)
    }
}

/// Decodes one row of a layers table.
pub fn layer(batch: &RecordBatch, row: usize, dtype: FloatType) -> Result<Layer, DecodeError> {
    layers::layer(batch, row, dtype)
}
