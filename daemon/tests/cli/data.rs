//! Models and tables that commands are given, and what is in the files that they write.

use std::collections::HashMap;
use std::error::Error;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Int8Type};
use arrow_array::{
    ArrayRef, DictionaryArray, FixedSizeListArray, Float32Array, Int64Array, RecordBatch, StringArray,
};
use arrow_ipc::reader::FileReader;
use arrow_schema::{Field, Schema, SchemaRef};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use safetensors::tensor::{Dtype, TensorView};

/// Floats that look random and are the same every time.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..n).map(|_| random.f32() * 2.0 - 1.0).collect()
}

pub(crate) fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub(crate) fn floats_of(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

pub(crate) type Tensors = HashMap<String, (Vec<usize>, Vec<f32>)>;

/// A small model: matrices, a vector, and a tensor of integers.
pub(crate) fn write_model(path: &Path) -> Result<Tensors, Box<dyn Error>> {
    let shapes = [("a.weight", vec![48, 300]), ("b.weight", vec![3, 5, 7]), ("norm", vec![300])];
    let model: Tensors = shapes
        .into_iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            let values = noise(shape.iter().product(), i as u64 + 1);
            (name.to_owned(), (shape, values))
        })
        .collect();
    let data: Vec<_> =
        model.iter().map(|(name, (shape, v))| (name.clone(), shape.clone(), bytes_of(v))).collect();
    let ids: Vec<u8> = (0..4i64).flat_map(i64::to_le_bytes).collect();
    let mut views = vec![("ids".to_owned(), TensorView::new(Dtype::I64, vec![4], &ids)?)];
    for (name, shape, bytes) in &data {
        views.push((name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes)?));
    }
    fs::write(path, safetensors::serialize(views, None)?)?;
    Ok(model)
}

/// Vectors, a plain float column, and columns that are none of the daemon's business.
pub(crate) fn table() -> Result<(SchemaRef, Vec<RecordBatch>), Box<dyn Error>> {
    let batch = |from: i64, rows: i64| -> Result<RecordBatch, Box<dyn Error>> {
        let values = noise(rows as usize * 24, from as u64 + 7);
        let vectors = values.chunks(24).map(|row| Some(row.iter().copied().map(Some).collect::<Vec<_>>()));
        let emb = FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(vectors, 24);
        let kind: DictionaryArray<Int8Type> =
            (from..from + rows).map(|i| if i % 2 == 0 { "even" } else { "odd" }).collect();
        let text: StringArray =
            (from..from + rows).map(|i| (i % 7 != 0).then(|| format!("row {i}"))).collect();
        Ok(RecordBatch::try_from_iter_with_nullable([
            ("id", Arc::new(Int64Array::from_iter_values(from..from + rows)) as ArrayRef, false),
            ("emb", Arc::new(emb), true),
            ("kind", Arc::new(kind), true),
            ("text", Arc::new(text), true),
            ("price", Arc::new(Float32Array::from_iter_values(noise(rows as usize, 99))), true),
        ])?)
    };
    let batches = vec![batch(0, 70)?, batch(70, 1)?, batch(71, 130)?];
    let fields: Vec<Field> = batches[0].schema().fields().iter().map(|f| f.as_ref().clone()).collect();
    let metadata = HashMap::from([("origin".to_owned(), "a test".to_owned())]);
    let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
    let batches = batches.into_iter().map(|b| b.with_schema(schema.clone())).collect::<Result<_, _>>()?;
    Ok((schema, batches))
}

pub(crate) fn read_arrow(path: &Path) -> Result<(SchemaRef, RecordBatch), Box<dyn Error>> {
    let reader = FileReader::try_new(File::open(path)?, None)?;
    let schema = reader.schema();
    let batches = reader.collect::<Result<Vec<_>, _>>()?;
    Ok((schema.clone(), arrow_select::concat::concat_batches(&schema, &batches)?))
}

pub(crate) fn read_parquet(path: &Path) -> Result<(SchemaRef, RecordBatch), Box<dyn Error>> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
    // The reader's own schema is without the table's metadata.
    let schema = builder.schema().clone();
    let batches = builder.build()?.collect::<Result<Vec<_>, _>>()?;
    Ok((schema.clone(), arrow_select::concat::concat_batches(&schema, &batches)?))
}

/// Values of a column of vectors, flat.
pub(crate) fn flat(batch: &RecordBatch, name: &str) -> Vec<f32> {
    let column = &batch[name];
    let child = column.as_fixed_size_list().values().clone();
    child.as_primitive::<Float32Type>().values().to_vec()
}

/// Rows of a column as texts, whatever dictionary they come from.
pub(crate) fn texts(batch: &RecordBatch, name: &str) -> Vec<Option<String>> {
    let column = &batch[name];
    if let Some(dictionary) = column.as_dictionary_opt::<Int8Type>() {
        let values = dictionary.values().as_string::<i32>();
        return dictionary.keys().iter().map(|k| k.map(|k| values.value(k as usize).to_owned())).collect();
    }
    column.as_string::<i32>().iter().map(|t| t.map(str::to_owned)).collect()
}

pub(crate) fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
