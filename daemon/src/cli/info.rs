//! `shmquant info FILE`: what is in a file, quantized or not, without a daemon.

use std::io::Write;
use std::path::PathBuf;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type, UInt8Type};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field, Schema};
use serde_json::{Value, json};
use shmquant_protocol::decode;
use shmquant_protocol::files::arrow_ipc::Batches;
use shmquant_protocol::files::safetensors::{OtherTypes, Tensors};
use shmquant_protocol::meta::{
    CodesMeta, EXTENSION_METADATA_KEY, EXTENSION_NAME, EXTENSION_NAME_KEY, ParamSource,
};

use super::error::CliError;
use super::input::{Content, Input};
use super::text::{Listing, shape};
use super::units;

/// Show what is in a file: schema, layers, schemes, sizes, and what decodes
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// safetensors, Arrow IPC or Parquet file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), CliError> {
    let input = Input::open(&args.file, OtherTypes::Skip)?;
    let (facts, listing) = match &input.content {
        Content::Tensors(tensors) => tensors_of(tensors),
        Content::Table(table) if decode::is_layers(&table.schema) => layers_of(table),
        Content::Table(table) => columns_of(table),
    };
    let format = input.format.to_string();
    let written = if args.json {
        let mut all = json!({ "file": args.file, "format": format, "bytes": input.bytes });
        if let (Value::Object(all), Value::Object(facts)) = (&mut all, facts) {
            all.extend(facts);
        }
        writeln!(out, "{all:#}")
    } else {
        let rows = facts["rows"].as_u64().map_or(String::new(), |n| format!(", {} rows", units::count(n)));
        writeln!(out, "{}: {format}, {}{rows}", args.file.display(), units::bytes(input.bytes))
            .and_then(|()| listing.write(out))
    };
    written.map_err(CliError::Stdout)
}

fn tensors_of(tensors: &Tensors) -> (Value, Listing) {
    let mut listing = Listing::new(&["tensor", "type", "shape", ">size", "can be quantized"]);
    let mut all = Vec::new();
    for layer in &tensors.layers {
        let (name, dtype, bytes) = (&layer.name, layer.dtype.name(), layer.values.len() as u64);
        listing.row([
            name.clone(),
            dtype.to_owned(),
            shape(&layer.shape),
            units::bytes(bytes),
            "yes".to_owned(),
        ]);
        all.push(json!({ "name": name, "dtype": dtype, "shape": layer.shape, "bytes": bytes, "quantizable": true }));
    }
    for other in &tensors.skipped {
        let (name, dtype) = (&other.name, &other.dtype);
        listing.row([
            name.clone(),
            dtype.clone(),
            shape(&other.shape),
            units::bytes(other.bytes),
            "no".to_owned(),
        ]);
        all.push(
            json!({ "name": name, "dtype": dtype, "shape": other.shape, "bytes": other.bytes, "quantizable": false }),
        );
    }
    (json!({ "kind": "tensors", "tensors": all, "metadata": tensors.metadata }), listing)
}

fn layers_of(table: &Batches) -> (Value, Listing) {
    let mut listing =
        Listing::new(&["layer", "scheme", ">bits", ">group", "from", "shape", ">codes", "state"]);
    let mut all = Vec::new();
    for batch in &table.batches {
        let names = Texts::of(batch, "layer_name");
        let (schemes, sources, errors) =
            (Texts::of(batch, "scheme"), Texts::of(batch, "src_dtype"), Texts::of(batch, "error"));
        let (bits, groups) = (Numbers::of(batch, "bit_width"), Numbers::of(batch, "group_size"));
        for row in 0..batch.num_rows() {
            let error = errors.get(row);
            let shape_of = shape_at(batch, row);
            let bytes = bytes_at(batch, row);
            let state = match (&error, bytes) {
                (Some(error), _) => error.clone(),
                (None, Some(_)) => "ok".to_owned(),
                (None, None) => "null".to_owned(),
            };
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            let (name, scheme, source) = (names.get(row), schemes.get(row), sources.get(row));
            let group = match groups.get(row) {
                Some(0) => "row".to_owned(),
                Some(-1) => "tensor".to_owned(),
                Some(n) => n.to_string(),
                None => String::new(),
            };
            listing.row([
                text(&name),
                text(&scheme),
                bits.get(row).map(|n| n.to_string()).unwrap_or_default(),
                group,
                text(&source),
                shape_of.as_deref().map(shape).unwrap_or_default(),
                bytes.map(units::bytes).unwrap_or_default(),
                state,
            ]);
            all.push(json!({
                "name": name, "scheme": scheme, "src_dtype": source, "bit_width": bits.get(row),
                "group_size": groups.get(row), "shape": shape_of, "bytes": bytes, "error": error,
                "decodes": error.is_none() && bytes.is_some(),
            }));
        }
    }
    (json!({ "kind": "layers", "rows": table.rows(), "layers": all }), listing)
}

fn columns_of(table: &Batches) -> (Value, Listing) {
    let mut listing = Listing::new(&["column", "type", ">size", "quantized"]);
    let mut all = Vec::new();
    for (index, field) in table.schema.fields().iter().enumerate() {
        let bytes = table.batches.iter().map(|batch| size(batch.column(index))).sum();
        let (kind, codes) = (field.data_type().to_string(), codes(field, &table.schema));
        let (state, facts) = match &codes {
            None => (String::new(), Value::Null),
            Some(Ok(meta)) => (describe(meta), facts(meta, None)),
            Some(Err((meta, why))) => (
                format!("does not decode: {why}"),
                meta.as_ref()
                    .map_or_else(|| json!({ "decodes": false, "why": why }), |m| facts(m, Some(why))),
            ),
        };
        listing.row([field.name().clone(), kind.clone(), units::bytes(bytes), state]);
        all.push(json!({
            "name": field.name(), "type": kind, "nullable": field.is_nullable(), "bytes": bytes, "codes": facts,
        }));
    }
    (json!({ "kind": "columns", "rows": table.rows(), "columns": all }), listing)
}

/// What a column of codes says about itself; an error if it cannot be decoded.
fn codes(field: &Field, schema: &Schema) -> Option<Result<CodesMeta, (Option<CodesMeta>, String)>> {
    let metadata = field.metadata();
    if metadata.get(EXTENSION_NAME_KEY).map(String::as_str) != Some(EXTENSION_NAME) {
        return None;
    }
    let Some(meta) = metadata.get(EXTENSION_METADATA_KEY).and_then(|text| CodesMeta::from_json(text)) else {
        return Some(Err((None, "its metadata are of another version".to_owned())));
    };
    let embedded = matches!(meta.scale, ParamSource::Params(_));
    let columns = meta.columns(field.name());
    let missing = match columns.into_iter().find(|name| schema.index_of(name).is_err()) {
        Some(name) => Some(format!("column {name:?} is missing")),
        None if embedded && meta.params_b64.is_none() => Some("its parameters are missing".to_owned()),
        None => None,
    };
    Some(match missing {
        Some(why) => Err((Some(meta), why)),
        None => Ok(meta),
    })
}

fn describe(meta: &CodesMeta) -> String {
    let group = meta.group_size.map(|g| format!(" of {g}")).unwrap_or_default();
    let dim = meta.dim.map(|d| format!(", {d} elements")).unwrap_or_default();
    let CodesMeta { scheme, mapping, granularity, src_dtype, .. } = meta;
    format!("{scheme}, {mapping}, a scale per {granularity}{group}, from {src_dtype}{dim}")
}

fn facts(meta: &CodesMeta, why: Option<&String>) -> Value {
    json!({
        "scheme": meta.scheme, "mapping": meta.mapping, "granularity": meta.granularity, "dim": meta.dim,
        "group_size": meta.group_size, "packing": meta.packing, "src_dtype": meta.src_dtype,
        "params_id": meta.params_id, "decodes": why.is_none(), "why": why,
    })
}

/// Bytes that an array's own values take, whatever buffers it shares.
fn size(array: &dyn Array) -> u64 {
    let data = array.to_data();
    data.get_slice_memory_size().unwrap_or_else(|_| data.get_buffer_memory_size()) as u64
}

/// A column of texts of any kind, dictionaries included.
pub(super) struct Texts<'a>(Option<&'a ArrayRef>);

impl<'a> Texts<'a> {
    pub(super) fn of(batch: &'a RecordBatch, name: &str) -> Self {
        Self(batch.column_by_name(name))
    }

    pub(super) fn get(&self, row: usize) -> Option<String> {
        text_at(self.0?, row)
    }
}

fn text_at(array: &ArrayRef, row: usize) -> Option<String> {
    if array.is_null(row) {
        return None;
    }
    let text = match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().value(row),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row),
        DataType::Utf8View => array.as_string_view().value(row),
        DataType::Dictionary(..) => {
            let one = array.slice(row, 1);
            let dictionary = one.as_any_dictionary_opt().filter(|d| !d.values().is_empty())?;
            let key = *dictionary.normalized_keys().first()?;
            return text_at(dictionary.values(), key);
        }
        _ => return None,
    };
    Some(text.to_owned())
}

/// A column of integers of the widths that a result has.
struct Numbers<'a>(Option<&'a ArrayRef>);

impl<'a> Numbers<'a> {
    fn of(batch: &'a RecordBatch, name: &str) -> Self {
        Self(batch.column_by_name(name))
    }

    fn get(&self, row: usize) -> Option<i64> {
        let array = self.0.filter(|array| array.is_valid(row))?;
        match array.data_type() {
            DataType::UInt8 => Some(array.as_primitive::<UInt8Type>().value(row).into()),
            DataType::Int32 => Some(array.as_primitive::<Int32Type>().value(row).into()),
            DataType::Int64 => Some(array.as_primitive::<Int64Type>().value(row)),
            _ => None,
        }
    }
}

/// A layer's shape, where it has one.
pub(super) fn shape_at(batch: &RecordBatch, row: usize) -> Option<Vec<i64>> {
    let shapes = batch.column_by_name("shape").filter(|shapes| shapes.is_valid(row))?;
    let small = shapes.as_list_opt::<i32>().map(|shapes| shapes.value(row));
    let shape = small.or_else(|| shapes.as_list_opt::<i64>().map(|shapes| shapes.value(row)))?;
    Some(shape.as_primitive_opt::<Int64Type>()?.values().to_vec())
}

fn bytes_at(batch: &RecordBatch, row: usize) -> Option<u64> {
    let codes = batch.column_by_name("quantized_data")?;
    if codes.is_null(row) {
        return None;
    }
    let small = codes.as_binary_opt::<i32>().map(|codes| codes.value(row).len());
    small.or_else(|| codes.as_binary_opt::<i64>().map(|codes| codes.value(row).len())).map(|n| n as u64)
}
