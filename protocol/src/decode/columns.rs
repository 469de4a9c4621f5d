//! Columns tables: vectors and plain columns.

use std::collections::HashSet;
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, FixedSizeListArray, RecordBatch, RecordBatchOptions, make_array};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use shmquant_kernels::FloatType;

use super::DecodeError;
use super::codec::{Codec, all, codes_of};
use super::sink::{Params, Sink, check_lengths};
use crate::table::Details;
use crate::table::vectors::arrow_type;

/// See [`super::table`].
pub(super) fn table(
    schema: &SchemaRef,
    batches: &[RecordBatch],
    names: Option<&[String]>,
    dtype: FloatType,
) -> Result<(SchemaRef, Vec<RecordBatch>), DecodeError> {
    // Says it if the type cannot be had.
    Sink::new(dtype, 0)?;
    let float = arrow_type(dtype).unwrap_or(DataType::Float32);
    let mut codecs = all(schema)?;
    select(schema, &mut codecs, names)?;
    let used: HashSet<String> = codecs.iter().flatten().flat_map(|c| c.own_columns.clone()).collect();
    let mut fields = Vec::new();
    let mut columns = Vec::new();
    for (index, (field, codec)) in schema.fields().iter().zip(&codecs).enumerate() {
        match codec {
            Some(codec) => fields.push(Arc::new(decoded_field(codec, &float)?)),
            None if used.contains(field.name()) => continue,
            None => fields.push(field.clone()),
        }
        columns.push(index);
    }
    let out = Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()));
    let mut base = 0;
    let mut decoded = Vec::with_capacity(batches.len());
    for batch in batches {
        let mut arrays = Vec::with_capacity(columns.len());
        for index in &columns {
            let array = batch.column(*index);
            arrays.push(match &codecs[*index] {
                Some(codec) => decode(codec, batch, array, base, dtype)?,
                None => array.clone(),
            });
        }
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        let made = RecordBatch::try_new_with_options(out.clone(), arrays, &options);
        decoded.push(made.map_err(|e| DecodeError::Column(Box::new(Details::new(e.to_string()))))?);
        base += batch.num_rows();
    }
    Ok((out, decoded))
}

/// Leaves only the codecs of the columns that are wanted.
fn select(
    schema: &Schema,
    codecs: &mut [Option<Codec>],
    names: Option<&[String]>,
) -> Result<(), DecodeError> {
    let lost = "field metadata hold what decoding needs; DuckDB and CSV drop them, Arrow, Parquet and polars keep them";
    let Some(names) = names else {
        if codecs.iter().any(Option::is_some) {
            return Ok(());
        }
        let details = Details::new("no column holds shmquant.codes, nor is this a table of layers");
        return Err(DecodeError::NotFound(Box::new(details.hint(lost))));
    };
    for name in names {
        let Ok(index) = schema.index_of(name) else {
            let have = schema.fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>().join(", ");
            let details = Details::new(format!("there is no column '{name}'")).in_column(name);
            return Err(DecodeError::NotFound(Box::new(details.hint(format!("the table has {have}")))));
        };
        if codecs[index].is_none() {
            let details = Details::new(format!("column '{name}' holds no shmquant.codes")).in_column(name);
            return Err(DecodeError::Column(Box::new(details.hint(lost))));
        }
    }
    for codec in codecs {
        *codec = codec.take().filter(|c| names.contains(&c.name));
    }
    Ok(())
}

fn decoded_field(codec: &Codec, float: &DataType) -> Result<Field, DecodeError> {
    let data_type = match codec.dim {
        None => float.clone(),
        Some(dim) => {
            let dim = i32::try_from(dim).map_err(|_| {
                DecodeError::column(&codec.name, format!("column '{}' has dimension {dim}", codec.name))
            })?;
            DataType::FixedSizeList(Arc::new(Field::new("item", float.clone(), true)), dim)
        }
    };
    Ok(Field::new(&codec.name, data_type, true))
}

/// One chunk of one column.
fn decode(
    codec: &Codec,
    batch: &RecordBatch,
    array: &ArrayRef,
    base: usize,
    dtype: FloatType,
) -> Result<ArrayRef, DecodeError> {
    let name = &codec.name;
    let codes = codes_of(name, array, base)?;
    let rows = codes.rows;
    let layout = codec.layout(rows);
    let nulls = codes.nulls.as_ref();
    let (scales, zero_points) = codec.params(batch, nulls, base)?;
    let all_null = nulls.is_some_and(|n| n.null_count() == rows);
    let params = Params { scales: &scales, zero_points: &zero_points };
    let n = layout.elements() as usize;
    let mut sink;
    if all_null && codes.width == 0 {
        sink = Sink::new(dtype, 0)?;
        let null = vec![0u8; n * dtype.size()];
        sink.convert(&null, dtype);
    } else {
        check_lengths(codes.values.len(), &layout, &codec.affine, &params)
            .map_err(|d| DecodeError::column(name, format!("column '{name}' has {}", d.what)))?;
        sink = Sink::new(dtype, n)?;
        sink.decode(&codes.values, &layout, &codec.affine, &params);
        let k = layout.k as usize;
        if let Some(nulls) = nulls {
            (0..rows).filter(|row| nulls.is_null(*row)).for_each(|row| sink.clear(row * k, k));
        }
    }
    let values = sink.into_array();
    let Some(dim) = codec.dim else {
        let data = values.to_data().into_builder().nulls(codes.nulls).build();
        return data.map(make_array).map_err(|e| DecodeError::column(name, e.to_string()));
    };
    let item = Arc::new(Field::new("item", values.data_type().clone(), true));
    // The field was made from the same number.
    let dim = i32::try_from(dim).unwrap_or(i32::MAX);
    FixedSizeListArray::try_new_with_length(item, dim, values, codes.nulls, rows)
        .map(|a| Arc::new(a) as ArrayRef)
        .map_err(|e| DecodeError::column(name, e.to_string()))
}
