//! Columns tables: what crosses for vectors and plain columns, and what is said about tables that do not fit.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests report by panicking"
)]

mod tables;

use std::slice::from_ref;
use std::sync::Arc;

use arrow_array::builder::{
    FixedSizeListBuilder, Float16Builder, Float32Builder, Float64Builder, LargeListBuilder, ListBuilder,
};
use arrow_array::types::Float32Type;
use arrow_array::{
    Array, ArrayRef, FixedSizeListArray, Float16Array, Float32Array, Float64Array, Int32Array, Int64Array,
    LargeListArray, ListArray, RecordBatch, StringArray,
};
use arrow_schema::{Field, Schema};
use half::f16;
use shmquant_kernels::{FloatType, Granularity, Mapping, OnNonFinite, Scheme};
use shmquant_protocol::client::Source;
use shmquant_protocol::descriptor::Role;
use shmquant_protocol::table::{InputError, Output, Override, OverrideSpec, Pattern, Table, TableOptions};
use tables::{batches, bitmap, crossed, f32_bytes, nulls, says, table, values};

/// `rows` vectors of `dim` values, every third one null, its slots full of what must not cross.
fn vectors(kind: &str, dtype: FloatType, rows: usize, dim: usize, with_nulls: bool) -> ArrayRef {
    let valid = |row: usize| !with_nulls || row % 3 != 1;
    let value = |row: usize, i: usize| if valid(row) { (row * dim + i) as f32 * 0.25 } else { f32::NAN };
    macro_rules! build {
        ($builder:ident, $convert:expr, $list:expr) => {{
            let mut list = $list($builder::new());
            for row in 0..rows {
                for i in 0..dim {
                    list.values().append_value($convert(value(row, i)));
                }
                list.append(valid(row));
            }
            Arc::new(list.finish()) as ArrayRef
        }};
    }
    macro_rules! kinds {
        ($builder:ident, $convert:expr) => {
            match kind {
                "fixed" => build!($builder, $convert, |b| FixedSizeListBuilder::new(b, dim as i32)),
                "list" => build!($builder, $convert, ListBuilder::new),
                _ => build!($builder, $convert, LargeListBuilder::new),
            }
        };
    }
    match dtype {
        FloatType::F16 => kinds!(Float16Builder, f16::from_f32),
        FloatType::F64 => kinds!(Float64Builder, f64::from),
        _ => kinds!(Float32Builder, |v| v),
    }
}

/// The rows one by one, by Arrow's own accessors.
fn naive(chunks: &[ArrayRef]) -> (Vec<u8>, Vec<bool>) {
    let (mut bytes, mut valid) = (Vec::new(), Vec::new());
    let dim = |a: &ArrayRef| (0..a.len()).find(|r| a.is_valid(*r)).map(|r| row(a, r).len());
    let dim = chunks.iter().find_map(dim).unwrap_or(0);
    for chunk in chunks {
        for r in 0..chunk.len() {
            valid.push(chunk.is_valid(r));
            let size = row_bytes(&row(chunk, r).slice(0, 0)).1;
            if chunk.is_valid(r) {
                bytes.extend(row_bytes(&row(chunk, r)).0);
            } else {
                bytes.extend(vec![0; dim * size]);
            }
        }
    }
    (bytes, valid)
}

fn row(array: &ArrayRef, r: usize) -> ArrayRef {
    let any = array.as_any();
    any.downcast_ref::<FixedSizeListArray>()
        .map(|a| a.value(r))
        .or_else(|| any.downcast_ref::<ListArray>().map(|a| a.value(r)))
        .or_else(|| any.downcast_ref::<LargeListArray>().map(|a| a.value(r)))
        .expect("a list")
}

fn row_bytes(values: &ArrayRef) -> (Vec<u8>, usize) {
    let any = values.as_any();
    if let Some(a) = any.downcast_ref::<Float16Array>() {
        return ((0..a.len()).flat_map(|i| a.value(i).to_le_bytes()).collect(), 2);
    }
    if let Some(a) = any.downcast_ref::<Float32Array>() {
        return ((0..a.len()).flat_map(|i| a.value(i).to_le_bytes()).collect(), 4);
    }
    let a = any.downcast_ref::<Float64Array>().expect("floats");
    ((0..a.len()).flat_map(|i| a.value(i).to_le_bytes()).collect(), 8)
}

#[test]
fn vectors_of_every_kind_cross_as_rows_of_equal_length() {
    for kind in ["fixed", "list", "large"] {
        for dtype in [FloatType::F16, FloatType::F32, FloatType::F64] {
            for with_nulls in [false, true] {
                let whole = vectors(kind, dtype, 53, 5, with_nulls);
                let chunks = [whole.slice(0, 7), whole.slice(7, 0), whole.slice(9, 30), whole.slice(40, 13)];
                let it = table(&["emb"], &chunks.clone().map(|c| vec![c]), &TableOptions::default()).unwrap();
                let (bytes, valid) = naive(&chunks);
                let got = &crossed(&it)[0];
                assert!(got.values == bytes, "{kind} {dtype} {with_nulls}");
                let v = values(&it, 0);
                assert_eq!((v.role, v.rows, v.k, v.dtype), (Role::Vector, 50, 5, dtype));
                let null_count = valid.iter().filter(|v| !**v).count();
                assert_eq!(v.null_count, null_count as u64);
                assert_eq!(with_nulls, null_count > 0);
                assert_eq!(got.copied.get(&0), (null_count > 0).then(|| bitmap(&valid)).as_ref());
            }
        }
    }
}

#[test]
fn a_column_of_many_chunks_keeps_its_bits_and_rows_in_place() {
    // 300,000 rows: values of 4.8 MB and a bitmap, both through a window of 4 MiB, in pieces of odd lengths.
    let whole = vectors("list", FloatType::F32, 300_000, 4, true);
    let mut chunks = Vec::new();
    let mut at = 3;
    for len in [1usize, 63, 64, 65, 8191, 100_003, 1, 190_000].into_iter().cycle() {
        let len = len.min(whole.len() - at);
        chunks.push(whole.slice(at, len));
        at += len;
        if at == whole.len() {
            break;
        }
    }
    for granularity in [Granularity::Row, Granularity::Tensor, Granularity::Dimension] {
        let options = TableOptions { granularity: Some(granularity), ..TableOptions::default() };
        let it =
            table(&["emb"], &chunks.iter().map(|c| vec![c.clone()]).collect::<Vec<_>>(), &options).unwrap();
        let (bytes, valid) = naive(&chunks);
        let got = &crossed(&it)[0];
        assert!(got.values == bytes, "{granularity}");
        assert!(got.copied[&0] == bitmap(&valid), "{granularity}");
    }
}

#[test]
fn a_bitmap_longer_than_a_chunk_crosses_whole() {
    let rows = 9_000_000;
    let whole = Float32Array::new(vec![1.5; rows].into(), nulls(rows, |i| i % 11 != 4));
    let columns = Some(vec!["p".to_owned()]);
    let options = TableOptions { columns, ..TableOptions::default() };
    let chunks: Vec<Vec<ArrayRef>> =
        vec![vec![Arc::new(whole.slice(5, 4_000_001))], vec![Arc::new(whole.slice(4_000_006, 4_999_000))]];
    let it = table(&["p"], &chunks, &options).unwrap();
    let got = &crossed(&it)[0];
    let valid: Vec<bool> = (5..8_999_006).map(|i| i % 11 != 4).collect();
    assert!(got.copied[&0] == bitmap(&valid));
    assert!(got.values == f32_bytes(valid.iter().map(|v| if *v { 1.5 } else { 0.0 })));
}

#[test]
fn nulls_inside_vectors_are_errors_or_zeros() {
    let mut list = FixedSizeListBuilder::new(Float32Builder::new(), 3);
    for row in 0..6 {
        for i in 0..3 {
            // Row 1 is null as a whole: what is null inside of it is nobody's fault.
            list.values().append_option((row != 1 && (row, i) != (4, 2)).then_some((row * 3 + i) as f32));
        }
        list.append(row != 1);
    }
    let array: ArrayRef = Arc::new(list.finish());
    let chunks = [vec![array.slice(0, 3)], vec![array.slice(3, 3)]];
    let options = TableOptions::default();
    let error = table(&["emb"], &chunks, &options).unwrap_err();
    let details = error.details();
    assert_eq!((details.column.as_deref(), details.row, details.index), (Some("emb"), Some(4), Some(2)));
    says(Err::<(), _>(error), &["column 'emb' row 4 has a null at index 2", "hint: nulls=\"zero\""]);
    let it = table(&["emb"], &chunks, &TableOptions { nulls_as_zero: true, ..options }).unwrap();
    let want: Vec<f32> =
        (0..18).map(|i| if (3..6).contains(&i) || i == 14 { 0.0 } else { i as f32 }).collect();
    assert_eq!(crossed(&it)[0].values, f32_bytes(want));
}

#[test]
fn lists_of_unequal_length_name_their_row() {
    let lists = |lens: &[Option<usize>]| -> ArrayRef {
        let rows = lens.iter().map(|n| n.map(|n| vec![Some(1f32); n]));
        Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(rows))
    };
    let chunks = [vec![lists(&[Some(2), None])], vec![lists(&[Some(2), Some(3)])]];
    let error = table(&["emb"], &chunks, &TableOptions::default()).unwrap_err();
    assert_eq!(error.details().row, Some(3));
    says(Err::<(), _>(error), &["column 'emb' row 3 has 3 values, the rows before have 2", "hint:"]);
    let empty = table(&["emb"], &[vec![lists(&[Some(0), Some(0)])]], &TableOptions::default()).unwrap();
    assert_eq!((values(&empty, 0).rows, values(&empty, 0).k), (2, 0));
    assert!(crossed(&empty)[0].values.is_empty());
    let null = table(&["emb"], &[vec![lists(&[None, None])]], &TableOptions::default()).unwrap();
    assert_eq!((values(&null, 0).null_count, crossed(&null)[0].copied[&0].as_slice()), (2, &[0u8][..]));
}

#[test]
fn plain_columns_are_quantized_where_they_are_named() {
    let floats = Float64Array::from(vec![Some(1.0), None, Some(f64::NAN), Some(4.0)]);
    let halves = Float16Array::from(vec![Some(f16::ONE), Some(f16::ZERO), None, Some(f16::ONE)]);
    let chunks =
        |from, n| -> Vec<ArrayRef> { vec![Arc::new(floats.slice(from, n)), Arc::new(halves.slice(from, n))] };
    let chunks = [chunks(1, 2), chunks(3, 1)];
    let columns = Some(vec!["a".to_owned(), "b".to_owned()]);
    let options = TableOptions { scheme: Scheme::UInt4, columns, ..TableOptions::default() };
    let it = table(&["a", "b"], &chunks, &options).unwrap();
    let got = crossed(&it);
    let want: Vec<u8> = [0.0, f64::NAN, 4.0].into_iter().flat_map(f64::to_le_bytes).collect();
    assert_eq!((&got[0].values, &got[0].copied[&0]), (&want, &vec![0b110]));
    assert_eq!((&got[1].values, &got[1].copied[&0]), (&vec![0, 0, 0, 0, 0, 0x3c], &vec![0b101]));
    let spec = it.descriptor().spec(values(&it, 0));
    assert_eq!(
        (spec.granularity, spec.packed, values(&it, 0).role),
        (Granularity::Tensor, false, Role::Plain)
    );
    let names = |n: &str| Output::Quantized {
        names: vec![n.into(), format!("{n}_scale"), format!("{n}_zero_point")],
    };
    assert_eq!(it.outputs(), [names("a"), names("b")]);
    says(
        table(&["a", "b"], &chunks, &TableOptions::default()),
        &["nothing to quantize", "a Float64, b Float16", "columns=[\"a\"]"],
    );
}

#[test]
fn options_become_specs_with_nothing_left_open() {
    let emb = vectors("fixed", FloatType::F32, 4, 6, false);
    let spec = |options: &TableOptions| {
        let it = table(&["emb"], &[vec![emb.clone()]], options).unwrap();
        assert_eq!(it.descriptor().specs.len(), 1);
        it.descriptor().specs[0]
    };
    let base = TableOptions::default();
    let eight = spec(&base);
    assert_eq!((eight.granularity, eight.group_size, eight.packed), (Granularity::Row, 0, false));
    assert_eq!(eight.affine.unwrap().mapping, Mapping::Symmetric);
    let four = spec(&TableOptions { scheme: Scheme::UInt4, ..base.clone() });
    assert_eq!((four.granularity, four.packed), (Granularity::Row, true));
    assert_eq!(four.affine.unwrap().mapping, Mapping::Asymmetric);
    let grouped = spec(&TableOptions { group_size: Some(2), ..base.clone() });
    assert_eq!((grouped.granularity, grouped.group_size), (Granularity::Group, 2));
    let grouped = spec(&TableOptions { granularity: Some(Granularity::Group), ..base.clone() });
    assert_eq!(grouped.group_size, 128);
    let loose = spec(&TableOptions { scheme: Scheme::Int2, packed: Some(false), ..base.clone() });
    assert!(!loose.packed);
    let other = TableOptions {
        mapping: Some(Mapping::Asymmetric),
        on_nonfinite: OnNonFinite::Saturate,
        packed: Some(true),
        ..base.clone()
    };
    let other = spec(&other);
    assert_eq!((other.on_nonfinite, other.packed), (OnNonFinite::Saturate, false));
    assert_eq!(other.affine.unwrap().mapping, Mapping::Asymmetric);

    let try_it = |options: TableOptions| table(&["emb"], &[vec![emb.clone()]], &options);
    says(
        try_it(TableOptions { mapping: Some(Mapping::Symmetric), scheme: Scheme::UInt8, ..base.clone() }),
        &["scheme uint8 has no symmetric mapping", "hint: uint8 is asymmetric"],
    );
    says(try_it(TableOptions { group_size: Some(0), ..base.clone() }), &["group_size 0 is not in"]);
    let both = TableOptions { group_size: Some(4), granularity: Some(Granularity::Row), ..base.clone() };
    says(try_it(both), &["group_size 4 does not go with granularity row"]);
    let stream = TableOptions { granularity: Some(Granularity::Tensor), part_of_stream: true, ..base };
    says(try_it(stream), &["every batch of a stream would have its own range", "params=q.fit"]);
}

#[test]
fn overrides_choose_by_name_then_by_the_first_pattern() {
    let emb = || vectors("fixed", FloatType::F32, 2, 4, false);
    let entry = |pattern: &str, scheme: Option<Scheme>| Override {
        pattern: Pattern::parse(pattern).unwrap(),
        action: scheme.map(|s| OverrideSpec { scheme: Some(s), ..OverrideSpec::default() }),
    };
    let options = TableOptions {
        overrides: vec![
            entry("re:title", None),
            entry("ti*", Some(Scheme::UInt2)),
            entry("title_b", Some(Scheme::UInt8)),
        ],
        ..TableOptions::default()
    };
    let names = ["body", "title_a", "title_b", "time"];
    let it = table(&names, &[vec![emb(), emb(), emb(), emb()]], &options).unwrap();
    let scheme = |i| it.descriptor().spec(values(&it, i)).affine.unwrap().scheme;
    assert_eq!([scheme(0), scheme(1), scheme(2)], [Scheme::Int8, Scheme::UInt8, Scheme::UInt2]);
    assert_eq!(it.outputs()[1], Output::PassThrough { index: 1 });
    let options = TableOptions { overrides: vec![entry("titel", None)], ..options };
    says(table(&names, &[vec![emb(), emb(), emb(), emb()]], &options), &["override 'titel' names no"]);
    let options = TableOptions { part_of_stream: true, ..options };
    assert!(table(&names, &[vec![emb(), emb(), emb(), emb()]], &options).is_ok());
    says(Pattern::parse("re:["), &["override \"re:[\" is no pattern"]);
}

#[test]
fn outputs_follow_the_input_and_keep() {
    let id: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
    let emb = vectors("fixed", FloatType::F32, 2, 4, false);
    let chunk = vec![id, emb, text];
    let names = ["id", "emb", "text"];
    let quantized =
        |names: &[&str]| Output::Quantized { names: names.iter().map(|n| (*n).to_owned()).collect() };
    let base = TableOptions { scheme: Scheme::UInt8, ..TableOptions::default() };
    let it = table(&names, from_ref(&chunk), &base).unwrap();
    let emb = quantized(&["emb", "emb_scale", "emb_zero_point"]);
    assert_eq!(
        it.outputs(),
        [Output::PassThrough { index: 0 }, emb.clone(), Output::PassThrough { index: 2 }]
    );
    assert_eq!(it.descriptor().items.len(), 1);
    let keep = Some(vec!["text".to_owned()]);
    let it = table(&names, from_ref(&chunk), &TableOptions { keep: keep.clone(), ..base.clone() }).unwrap();
    assert_eq!(it.outputs(), [emb.clone(), Output::PassThrough { index: 2 }]);
    let it = table(&names, from_ref(&chunk), &TableOptions { named: true, keep, ..base.clone() }).unwrap();
    assert_eq!(it.outputs(), [emb, Output::Kept { name: "text".to_owned() }]);
    assert_eq!(it.descriptor().items.len(), 2);
    let tensor = TableOptions { granularity: Some(Granularity::Dimension), ..TableOptions::default() };
    let it = table(&names, from_ref(&chunk), &tensor).unwrap();
    assert_eq!(it.outputs()[1], quantized(&["emb", "emb_params_id"]));
    let packed = TableOptions { scheme: Scheme::UInt4, ..TableOptions::default() };
    let it = table(&names, from_ref(&chunk), &packed).unwrap();
    assert_eq!(it.outputs()[1], quantized(&["emb", "emb_scale", "emb_zero_point", "emb_params_id"]));
    says(
        table(&names, from_ref(&chunk), &TableOptions { keep: Some(vec!["txt".to_owned()]), ..base }),
        &["keep: there is no column 'txt'", "the table has id, emb, text"],
    );
}

#[test]
fn misuse_is_named() {
    let emb = || vectors("fixed", FloatType::F32, 2, 4, false);
    let ints: ArrayRef = Arc::new(Int32Array::from(vec![1, 2]));
    let vector = vec![Some(vec![Some(1)]), Some(vec![Some(2)])];
    let int_lists: ArrayRef =
        Arc::new(ListArray::from_iter_primitive::<arrow_array::types::Int32Type, _, _>(vector));
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
    let options = |names: &[&str]| TableOptions {
        columns: Some(names.iter().map(|n| (*n).to_owned()).collect()),
        ..TableOptions::default()
    };
    let names = ["emb", "ids", "codes", "text"];
    let chunk = vec![emb(), ints, int_lists, text];
    let with = |columns: &[&str]| table(&names, from_ref(&chunk), &options(columns));
    says(with(&["ids"]), &["column 'ids' holds integers (Int32)", "hint: cast it to float32"]);
    says(with(&["codes"]), &["column 'codes' holds integers"]);
    says(with(&["text"]), &["column 'text' has type Utf8"]);
    says(with(&["embb"]), &["there is no column 'embb'", "emb, ids, codes, text"]);
    says(with(&[]), &["nothing to quantize"]);
    let clash = table(&["emb", "emb_scale"], &[vec![emb(), emb()]], &TableOptions::default());
    assert!(matches!(clash, Err(InputError::Column(_))));
    says(clash, &["column 'emb_scale' is in the way of the parameters of 'emb'"]);
    says(
        table(&["emb", "emb"], &[vec![emb(), emb()]], &TableOptions::default()),
        &["column 'emb' occurs more than once"],
    );
    let errors = TableOptions { continue_on_error: true, ..TableOptions::default() };
    says(table(&["emb"], &[vec![emb()]], &errors), &["continue_on_error is for layers tables"]);
    let only_text: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
    says(
        table(&["weights"], &[vec![only_text.clone()]], &TableOptions::default()),
        &["Missing required column 'layer_name'"],
    );
    says(
        table(&["layer_name"], &[vec![only_text]], &TableOptions::default()),
        &["Missing required column 'weights'"],
    );
    let (schema, _) = batches(&["emb"], &[vec![emb()]]);
    let (_, others) = batches(&["emb"], &[vec![vectors("list", FloatType::F32, 2, 4, false)]]);
    says(Table::from_batches(schema, others, &TableOptions::default()), &["batch 0 has another schema"]);
}

#[test]
fn tables_without_rows_are_tables() {
    let emb = vectors("fixed", FloatType::F32, 2, 4, false);
    let it = table(&["emb"], &[vec![emb.slice(0, 0)]], &TableOptions::default()).unwrap();
    assert_eq!((values(&it, 0).rows, values(&it, 0).k), (0, 4));
    assert!(crossed(&it)[0].values.is_empty());
    let (schema, _) = batches(&["emb"], &[vec![emb]]);
    let it = Table::from_batches(schema, Vec::new(), &TableOptions::default()).unwrap();
    assert_eq!((values(&it, 0).rows, it.input_bytes()), (0, 0));
    crossed(&it);
}

#[test]
fn a_tensor_extension_is_its_storage() {
    let emb = vectors("fixed", FloatType::F32, 3, 4, true);
    let metadata = [("ARROW:extension:name".to_owned(), "arrow.fixed_shape_tensor".to_owned())];
    let field = Field::new("emb", emb.data_type().clone(), true).with_metadata(metadata);
    let schema = Arc::new(Schema::new(vec![field]));
    let batch = RecordBatch::try_new(schema.clone(), vec![emb.clone()]).unwrap();
    let it = Table::from_batches(schema, vec![batch], &TableOptions::default()).unwrap();
    assert_eq!(crossed(&it)[0].values, naive(&[emb]).0);
}

#[test]
fn the_digest_is_of_the_request_not_of_its_chunks() {
    let emb = vectors("list", FloatType::F32, 1000, 3, true);
    let options = TableOptions::default();
    let digest = |chunks: &[Vec<ArrayRef>], o: &TableOptions| table(&["emb"], chunks, o).unwrap().digest();
    let whole = digest(&[vec![emb.clone()]], &options);
    assert_eq!(whole, digest(&[vec![emb.slice(0, 333)], vec![emb.slice(333, 667)]], &options));
    let other = TableOptions { scheme: Scheme::UInt8, ..options.clone() };
    assert_ne!(whole, digest(&[vec![emb.clone()]], &other));
    assert_ne!(whole, digest(&[vec![emb.slice(1, 999)]], &options));
    let changed = vec![vec![Some(0.0f32); 3]; 1000].into_iter().map(Some);
    let changed: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(changed));
    assert_ne!(whole, digest(&[vec![changed]], &options));
}

#[test]
fn wide_tables_keep_types_apart() {
    let f16s = vectors("large", FloatType::F16, 3, 2, true);
    let f64s = vectors("list", FloatType::F64, 3, 7, false);
    let it = table(&["a", "b"], &[vec![f16s.clone(), f64s.clone()]], &TableOptions::default()).unwrap();
    let got = crossed(&it);
    assert_eq!((&got[0].values, &got[1].values), (&naive(&[f16s]).0, &naive(&[f64s]).0));
}
