//! Reads a table the way a daemon does: its descriptor over the wire, its values chunk by chunk.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of this")]

pub mod kernels;

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_buffer::{Buffer, NullBuffer};
use arrow_schema::{Field, Schema, SchemaRef};
use shmquant_protocol::chunks::{Action, ChunkList, MIN_WINDOW};
use shmquant_protocol::client::Source;
use shmquant_protocol::descriptor::{Body, Descriptor, Values};
use shmquant_protocol::table::{InputError, Table, TableOptions};

/// What crossed for one item.
#[derive(Default, Debug, PartialEq)]
pub struct Crossed {
    /// By number of the buffer.
    pub copied: BTreeMap<u32, Vec<u8>>,
    /// What was to be quantized.
    pub values: Vec<u8>,
}

/// Everything that crosses, item by item.
pub fn crossed(table: &Table) -> Vec<Crossed> {
    let mut bytes = Vec::new();
    table.descriptor().encode(&mut bytes).expect("every column can be kept");
    // The daemon's checks hold for whatever a table says.
    assert_eq!(&Descriptor::decode(&bytes).expect("the daemon reads it"), table.descriptor());
    // As if all of it crossed: that is what is encoded, wherever that is done.
    let list = ChunkList::new(&table.descriptor().streamed(), bytes.len() as u64, MIN_WINDOW);
    let mut items: Vec<Crossed> = table.descriptor().items.iter().map(|_| Crossed::default()).collect();
    let mut again: Vec<Vec<u8>> = items.iter().map(|_| Vec::new()).collect();
    for chunk in &list.chunks {
        let mut out = vec![0xa5; chunk.bytes as usize];
        table.fill(chunk, &mut out);
        let item = chunk.item as usize;
        match chunk.action {
            Action::Copy { buffer } => items[item].copied.entry(buffer).or_default().extend(out),
            // Scan chunks come first; Encode chunks must show the same values.
            Action::Encode => again[item].extend(out),
            Action::Fused | Action::Scan => items[item].values.extend(out),
        }
    }
    for (item, again) in items.iter_mut().zip(again) {
        if item.values.is_empty() {
            item.values = again;
        } else {
            assert!(again.is_empty() || item.values == again, "the second pass shows other values");
        }
    }
    let sum: usize =
        items.iter().map(|i| i.values.len() + i.copied.values().map(Vec::len).sum::<usize>()).sum();
    assert_eq!(table.input_bytes(), sum as u64);
    items
}

/// A table of these columns, one batch a chunk.
pub fn batches(names: &[&str], chunks: &[Vec<ArrayRef>]) -> (SchemaRef, Vec<RecordBatch>) {
    let fields: Vec<Field> =
        names.iter().zip(&chunks[0]).map(|(n, a)| Field::new(*n, a.data_type().clone(), true)).collect();
    let schema = Arc::new(Schema::new(fields));
    let batches = chunks
        .iter()
        .map(|c| RecordBatch::try_new(schema.clone(), c.clone()).expect("equal lengths"))
        .collect();
    (schema, batches)
}

/// [`Table::from_batches`] over [`batches`].
pub fn table(names: &[&str], chunks: &[Vec<ArrayRef>], options: &TableOptions) -> Result<Table, InputError> {
    let (schema, batches) = batches(names, chunks);
    Table::from_batches(schema, batches, options)
}

/// The values of item `index`.
pub fn values(table: &Table, index: usize) -> &Values {
    match &table.descriptor().items[index].body {
        Body::Values(values) => values,
        Body::Keep { .. } => panic!("item {index} is kept"),
    }
}

/// A bitmap, one bit a row.
pub fn bitmap(valid: &[bool]) -> Vec<u8> {
    let mut out = vec![0; valid.len().div_ceil(8)];
    for (i, _) in valid.iter().enumerate().filter(|(_, v)| **v) {
        out[i / 8] |= 1 << (i % 8);
    }
    out
}

/// Nulls from a rule.
pub fn nulls(len: usize, valid: impl Fn(usize) -> bool) -> Option<NullBuffer> {
    Some(NullBuffer::from((0..len).map(valid).collect::<Vec<_>>()))
}

/// Little-endian bytes.
pub fn f32_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// The f32 values of bytes.
pub fn f32_values(buffer: &Buffer) -> Vec<f32> {
    buffer.as_slice().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Asserts that an error says all of these.
pub fn says<T: std::fmt::Debug, E: std::fmt::Display>(result: Result<T, E>, parts: &[&str]) {
    let text = result.map_err(|e| e.to_string()).expect_err("this is no error");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

/// The batch with one column replaced, its field's metadata kept.
pub fn replace(batch: &RecordBatch, name: &str, array: ArrayRef) -> (SchemaRef, RecordBatch) {
    let at = batch.schema().index_of(name).unwrap();
    let mut fields: Vec<Field> = batch.schema().fields().iter().map(|f| f.as_ref().clone()).collect();
    fields[at] = fields[at].clone().with_data_type(array.data_type().clone());
    let mut arrays = batch.columns().to_vec();
    arrays[at] = array;
    let schema = Arc::new(Schema::new(fields));
    (schema.clone(), RecordBatch::try_new(schema, arrays).unwrap())
}
