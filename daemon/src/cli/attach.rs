//! Puts a result together with the columns that stayed at home.

use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow_schema::{ArrowError, Field, Schema};
use arrow_select::concat::concat;
use shmquant_protocol::files::arrow_ipc::Batches;
use shmquant_protocol::table::Output;

use super::error::CliError;

/// The finished table: `outputs` in their order, from `result` and from `source`; `path` is for errors.
pub(super) fn attach(
    path: &Path,
    result: &Batches,
    source: &Batches,
    outputs: &[Output],
) -> Result<Batches, CliError> {
    join(result, source, outputs).map_err(|error| {
        CliError::told(
            format!("{}: the other columns cannot be written with the result: {error}", path.display()),
            "name the columns that the result shall keep with --keep",
        )
    })
}

fn join(result: &Batches, source: &Batches, outputs: &[Output]) -> Result<Batches, ArrowError> {
    let mut fields: Vec<Arc<Field>> = Vec::new();
    let mut columns: Vec<Column> = Vec::new();
    for output in outputs {
        match output {
            Output::PassThrough { index } => {
                let chunks: Vec<_> =
                    source.batches.iter().map(|batch| batch.column(*index).as_ref()).collect();
                fields.push(source.schema.fields()[*index].clone());
                // One array: the result's batches end elsewhere, and a file has room for one dictionary a column.
                columns.push(Column::Source(if chunks.is_empty() { None } else { Some(concat(&chunks)?) }));
            }
            Output::Quantized { names } => {
                for name in names {
                    let index = result.schema.index_of(name)?;
                    fields.push(result.schema.fields()[index].clone());
                    columns.push(Column::Result(index));
                }
            }
            Output::Kept { name } => {
                let index = result.schema.index_of(name)?;
                fields.push(result.schema.fields()[index].clone());
                columns.push(Column::Result(index));
            }
        }
    }
    let mut metadata = source.schema.metadata().clone();
    metadata.extend(result.schema.metadata().iter().map(|(k, v)| (k.clone(), v.clone())));
    let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
    let mut batches = Vec::with_capacity(result.batches.len());
    let mut row = 0;
    for batch in &result.batches {
        let rows = batch.num_rows();
        let arrays: Vec<ArrayRef> = columns
            .iter()
            .filter_map(|column| match column {
                Column::Result(index) => Some(batch.column(*index).clone()),
                Column::Source(array) => array.as_ref().map(|array| array.slice(row, rows)),
            })
            .collect();
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        batches.push(RecordBatch::try_new_with_options(schema.clone(), arrays, &options)?);
        row += rows;
    }
    Ok(Batches { schema, batches })
}

/// Where a column comes from: the result, or the source (`None` if that has no batches).
enum Column {
    Result(usize),
    Source(Option<ArrayRef>),
}

#[cfg(test)]
mod tests {
    use arrow_array::types::Int8Type;
    use arrow_array::{Array, DictionaryArray, Int32Array, StringArray};

    use super::*;

    #[test]
    fn columns_meet_row_by_row_whatever_their_batches() {
        let text = |rows: &[&str]| -> RecordBatch {
            let kind: DictionaryArray<Int8Type> = rows.iter().copied().collect();
            RecordBatch::try_from_iter([
                ("text", Arc::new(StringArray::from_iter_values(rows)) as ArrayRef),
                ("x", Arc::new(Int32Array::from_iter_values(rows.iter().map(|_| 0)))),
                ("kind", Arc::new(kind)),
            ])
            .unwrap()
        };
        let source = [text(&["a", "b", "c"]), text(&["d"]), text(&["a", "e"])];
        let code = |codes: &[i32]| {
            RecordBatch::try_from_iter([("x", Arc::new(Int32Array::from(codes.to_vec())) as ArrayRef)])
                .unwrap()
        };
        let result = [code(&[1, 2]), code(&[3, 4, 5, 6])];
        let of = |batches: &[RecordBatch]| Batches { schema: batches[0].schema(), batches: batches.to_vec() };
        let outputs = [
            Output::PassThrough { index: 0 },
            Output::Quantized { names: vec!["x".into()] },
            Output::PassThrough { index: 2 },
        ];
        let joined = join(&of(&result), &of(&source), &outputs).unwrap();
        let names: Vec<_> = joined.schema.fields().iter().map(|f| f.name().as_str()).collect();
        assert_eq!(names, ["text", "x", "kind"]);
        let mut rows = Vec::new();
        for batch in &joined.batches {
            let text = batch.column(0).as_any().downcast_ref::<StringArray>().unwrap();
            let x = batch.column(1).as_any().downcast_ref::<Int32Array>().unwrap();
            let kind = batch.column(2).as_any().downcast_ref::<DictionaryArray<Int8Type>>().unwrap();
            let kind = kind.downcast_dict::<StringArray>().unwrap();
            for i in 0..batch.num_rows() {
                assert_eq!(text.value(i), arrow_array::ArrayAccessor::value(&kind, i));
                rows.push((text.value(i).to_owned(), x.value(i)));
            }
        }
        let want = [("a", 1), ("b", 2), ("c", 3), ("d", 4), ("a", 5), ("e", 6)];
        assert_eq!(rows, want.map(|(t, x)| (t.to_owned(), x)));
    }
}
