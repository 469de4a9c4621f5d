//! Kept columns: what crosses, put together again, is the column that all chunks make together.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests report by panicking"
)]

mod tables;

use std::sync::Arc;

use arrow_array::builder::{BinaryViewBuilder, MapBuilder, StringBuilder, StringViewBuilder};
use arrow_array::types::{Float32Type, Int8Type, Int16Type, Int32Type, Int64Type};
use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, DictionaryArray,
    DurationMicrosecondArray, FixedSizeBinaryArray, FixedSizeListArray, Float32Array, Float64Array,
    Int8Array, Int64Array, IntervalMonthDayNanoArray, LargeBinaryArray, LargeListArray, LargeStringArray,
    ListArray, MapArray, NullArray, RunArray, StringArray, StructArray, TimestampNanosecondArray,
    UInt16Array, UnionArray, make_array,
};
use arrow_buffer::{Buffer, IntervalMonthDayNano};
use arrow_data::ArrayData;
use arrow_schema::{DataType, Field, Fields, UnionFields};
use shmquant_protocol::chunks::{Action, ChunkList, MIN_WINDOW};
use shmquant_protocol::client::Source;
use shmquant_protocol::descriptor::Body;
use shmquant_protocol::field::NodeData;
use shmquant_protocol::table::{InputError, Table, TableOptions};
use tables::{Crossed, crossed, nulls, says, table};

const ROWS: usize = 40;

/// One valid row in `n`, or all of them.
fn every(n: usize) -> impl Fn(usize) -> bool {
    move |i| n == 0 || !i.is_multiple_of(n)
}

fn text(i: usize) -> String {
    // Short ones live inside a view, long ones do not.
    if i.is_multiple_of(2) { format!("{i}") } else { format!("a text of more than twelve bytes, number {i}") }
}

fn option<T>(i: usize, n: usize, value: T) -> Option<T> {
    every(n)(i).then_some(value)
}

/// Columns of all types, with a null in every `n`th row (0: none).
fn columns(n: usize) -> Vec<(&'static str, ArrayRef)> {
    let rows = || 0..ROWS;
    let strings = || rows().map(move |i| option(i, n, text(i)));
    let bytes = || rows().map(move |i| option(i, n, text(i).into_bytes()));
    let lists = || {
        rows()
            .map(move |i| option(i, n, (0..i % 4).map(|j| (j != 2).then_some(j as i64)).collect::<Vec<_>>()))
    };
    let fixed = rows().map(|i| option(i, n, vec![Some(i as f32), None, Some(1.0)]));
    let mut views = StringViewBuilder::new();
    let mut binary_views = BinaryViewBuilder::new();
    let mut map = MapBuilder::new(None, StringBuilder::new(), StringBuilder::new());
    for i in rows() {
        views.append_option(option(i, n, text(i)));
        binary_views.append_option(option(i, n, text(i)));
        for j in 0..i % 3 {
            map.keys().append_value(format!("k{j}"));
            map.values().append_option((j == 0).then(|| text(i)));
        }
        map.append(every(n)(i)).unwrap();
    }
    let dictionary: DictionaryArray<Int8Type> =
        rows().map(|i| option(i, n, ["red", "green", "blue"][i % 3])).collect();
    let inner: DictionaryArray<Int16Type> = rows().map(|i| Some(["x", "y"][i % 2])).collect();
    let fields = Fields::from(vec![
        Field::new("number", DataType::Int64, true),
        Field::new("word", inner.data_type().clone(), true),
    ]);
    let number: ArrayRef = Arc::new(Int64Array::from_iter(rows().map(|i| option(i, 3, i as i64))));
    let structs = StructArray::new(fields, vec![number, Arc::new(inner)], nulls(ROWS, every(n)));
    let nested = ListArray::new(
        Arc::new(Field::new("item", structs.data_type().clone(), true)),
        arrow_buffer::OffsetBuffer::from_lengths(rows().map(|i| usize::from(i % 5 == 0) * 5)),
        Arc::new(structs.clone()),
        nulls(ROWS, every(n)),
    );
    let interval = |i: usize| IntervalMonthDayNano::new(i as i32, 2, 3);
    vec![
        ("null", Arc::new(NullArray::new(ROWS))),
        ("bool", Arc::new(BooleanArray::from_iter(rows().map(|i| option(i, n, i % 7 < 3))))),
        ("int8", Arc::new(Int8Array::from_iter(rows().map(|i| option(i, n, i as i8))))),
        ("uint16", Arc::new(UInt16Array::from_iter(rows().map(|i| option(i, n, i as u16))))),
        ("int64", Arc::new(Int64Array::from_iter(rows().map(|i| option(i, n, i as i64))))),
        ("float32", Arc::new(Float32Array::from_iter(rows().map(|i| option(i, n, i as f32))))),
        ("float64", Arc::new(Float64Array::from_iter(rows().map(|i| option(i, n, i as f64))))),
        (
            "decimal",
            Arc::new(
                Decimal128Array::from_iter(rows().map(|i| option(i, n, i as i128)))
                    .with_precision_and_scale(20, 3)
                    .unwrap(),
            ),
        ),
        ("date", Arc::new(Date32Array::from_iter(rows().map(|i| option(i, n, i as i32))))),
        (
            "time",
            Arc::new(
                TimestampNanosecondArray::from_iter(rows().map(|i| option(i, n, i as i64)))
                    .with_timezone("Europe/Berlin"),
            ),
        ),
        ("duration", Arc::new(DurationMicrosecondArray::from_iter(rows().map(|i| option(i, n, i as i64))))),
        (
            "interval",
            Arc::new(IntervalMonthDayNanoArray::from_iter(rows().map(|i| option(i, n, interval(i))))),
        ),
        (
            "fixed_binary",
            Arc::new(
                FixedSizeBinaryArray::try_from_sparse_iter_with_size(
                    rows().map(|i| option(i, n, [i as u8; 3])),
                    3,
                )
                .unwrap(),
            ),
        ),
        ("binary", Arc::new(BinaryArray::from_iter(bytes()))),
        ("large_binary", Arc::new(LargeBinaryArray::from_iter(bytes()))),
        ("utf8", Arc::new(StringArray::from_iter(strings()))),
        ("large_utf8", Arc::new(LargeStringArray::from_iter(strings()))),
        ("views", Arc::new(views.finish())),
        ("binary_views", Arc::new(binary_views.finish())),
        ("list", Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>(lists()))),
        ("large_list", Arc::new(LargeListArray::from_iter_primitive::<Int64Type, _, _>(lists()))),
        ("fixed_list", Arc::new(FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(fixed, 3))),
        ("map", Arc::new(map.finish())),
        ("dictionary", Arc::new(dictionary)),
        ("struct", Arc::new(structs)),
        ("list_of_struct", Arc::new(nested)),
    ]
}

/// The table of one column beside one that is quantized.
fn keep(chunks: &[ArrayRef]) -> Result<Table, InputError> {
    let emb = |n: usize| -> ArrayRef {
        let rows = (0..n).map(|_| Some(vec![Some(1f32)]));
        Arc::new(FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(rows, 1))
    };
    let chunks: Vec<Vec<ArrayRef>> = chunks.iter().map(|c| vec![emb(c.len()), c.clone()]).collect();
    let columns = Some(vec!["emb".to_owned()]);
    table(&["emb", "kept"], &chunks, &TableOptions { named: true, columns, ..TableOptions::default() })
}

/// The array that canonical buffers make.
fn rebuild(data_type: &DataType, node: &NodeData, crossed: &Crossed, next: &mut u32) -> ArrayData {
    let mut buffers = Vec::new();
    for bytes in &node.buffers {
        let copied = crossed.copied.get(next).cloned().unwrap_or_default();
        assert_eq!(copied.len() as u64, *bytes, "buffer {next} of {data_type}");
        buffers.push(Buffer::from_vec(copied));
        *next += 1;
    }
    let children: Vec<DataType> = match data_type {
        DataType::List(c) | DataType::LargeList(c) | DataType::Map(c, _) | DataType::FixedSizeList(c, _) => {
            vec![c.data_type().clone()]
        }
        DataType::Struct(fields) => fields.iter().map(|f| f.data_type().clone()).collect(),
        DataType::Dictionary(_, values) => vec![values.as_ref().clone()],
        _ => Vec::new(),
    };
    assert_eq!(children.len(), node.children.len());
    let children: Vec<ArrayData> =
        children.iter().zip(&node.children).map(|(t, n)| rebuild(t, n, crossed, next)).collect();
    let mut builder = ArrayData::builder(data_type.clone()).len(node.length as usize).align_buffers(true);
    if !buffers.is_empty() {
        let validity = buffers.remove(0);
        assert_eq!(validity.is_empty(), node.null_count == 0);
        builder = builder.null_bit_buffer((node.null_count > 0).then_some(validity));
    }
    let data = builder.add_buffers(buffers).child_data(children).build().expect("valid lengths");
    data.validate_full().expect("valid data");
    if *data_type != DataType::Null {
        assert_eq!(data.null_count() as u64, node.null_count);
    }
    data
}

fn rebuilt(table: &Table) -> ArrayRef {
    let Body::Keep { field, data } = &table.descriptor().items[1].body else { panic!("it is not kept") };
    let mut next = 0;
    make_array(rebuild(field.data_type(), data, &crossed(table)[1], &mut next))
}

#[test]
fn every_type_crosses_with_all_its_chunks() {
    for n in [0, 2, 5] {
        for (name, whole) in columns(n) {
            let cuts: [&[(usize, usize)]; 4] =
                [&[(0, ROWS)], &[(3, 17), (20, 0), (20, 19)], &[(1, 1), (2, 8), (10, 30)], &[(13, 0)]];
            for cut in cuts {
                let chunks: Vec<ArrayRef> = cut.iter().map(|(at, len)| whole.slice(*at, *len)).collect();
                let it = keep(&chunks).unwrap_or_else(|e| panic!("{name}: {e}"));
                let refs: Vec<&dyn Array> = chunks.iter().map(AsRef::as_ref).collect();
                let want = arrow_select::concat::concat(&refs).unwrap();
                assert_eq!(rebuilt(&it).to_data(), want.to_data(), "{name} {n} {cut:?}");
            }
        }
    }
}

#[test]
fn offsets_begin_at_zero_and_values_are_only_those_in_use() {
    let whole = StringArray::from_iter_values((0..100).map(|i| format!("{i:03}")));
    let it = keep(&[Arc::new(whole.slice(90, 2)), Arc::new(whole.slice(10, 1))]).unwrap();
    let got = &crossed(&it)[1].copied;
    let offsets: Vec<u8> = [0i32, 3, 6, 9].iter().flat_map(|o| o.to_le_bytes()).collect();
    assert_eq!((got.get(&0), &got[&1], got[&2].as_slice()), (None, &offsets, b"090091010".as_slice()));
}

#[test]
fn dictionaries_that_differ_are_made_one() {
    let chunk = |words: &[Option<&str>]| -> ArrayRef {
        Arc::new(words.iter().copied().collect::<DictionaryArray<Int32Type>>())
    };
    let chunks = [chunk(&[Some("a"), None, Some("b")]), chunk(&[Some("c"), Some("a")]), chunk(&[Some("b")])];
    let it = keep(&chunks).unwrap();
    let got = rebuilt(&it);
    let got = got.as_any().downcast_ref::<DictionaryArray<Int32Type>>().unwrap();
    let got: Vec<_> = got.downcast_dict::<StringArray>().unwrap().into_iter().collect();
    assert_eq!(got, [Some("a"), None, Some("b"), Some("c"), Some("a"), Some("b")]);
}

#[test]
fn a_slice_of_views_brings_only_its_own_text() {
    let mut views = StringViewBuilder::new();
    (0..1000).for_each(|i| views.append_value(text(2 * i + 1)));
    let whole = views.finish();
    let it = keep(&[Arc::new(whole.slice(500, 3))]).unwrap();
    let got = &crossed(&it)[1];
    assert!(got.copied.values().map(Vec::len).sum::<usize>() < 300, "{got:?}");
    assert_eq!(rebuilt(&it).to_data(), whole.slice(500, 3).to_data());
    // Slices of one column share its buffers: they cross once.
    let halves: [ArrayRef; 2] = [Arc::new(whole.slice(0, 600)), Arc::new(whole.slice(600, 400))];
    let once = crossed(&keep(&[Arc::new(whole)]).unwrap())[1].copied.len();
    assert!(crossed(&keep(&halves).unwrap())[1].copied.len() <= once + 1);
}

#[test]
fn what_cannot_be_published_is_named() {
    let union = UnionArray::try_new(
        [(0, Arc::new(Field::new("a", DataType::Int64, true)))].into_iter().collect::<UnionFields>(),
        vec![0i8, 0].into(),
        None,
        vec![Arc::new(Int64Array::from(vec![1, 2]))],
    );
    let hint = "hint: leave it out with keep=[...]";
    says(keep(&[Arc::new(union.unwrap())]), &["column 'kept' cannot be published", "Union", hint]);
    let runs = RunArray::<Int32Type>::try_new(&vec![1, 2].into(), &Int64Array::from(vec![1, 2])).unwrap();
    says(keep(&[Arc::new(runs)]), &["column 'kept' cannot be published", "RunEndEncoded"]);
}

#[test]
fn large_columns_cross_in_pieces() {
    // 3 MB of text and 1.2 MB of offsets: several copies each, cut at any place.
    let whole = StringArray::from_iter((0..300_000).map(|i| (i % 9 != 0).then(|| format!("{i:010}"))));
    let chunks: [ArrayRef; 3] = [
        Arc::new(whole.slice(5, 100_000)),
        Arc::new(whole.slice(100_005, 7)),
        Arc::new(whole.slice(100_012, 199_988)),
    ];
    let it = keep(&chunks).unwrap();
    assert_eq!(rebuilt(&it).to_data(), whole.slice(5, 299_995).to_data());
}

#[test]
fn a_field_keeps_its_metadata() {
    let metadata = [("ARROW:extension:name".to_owned(), "arrow.uuid".to_owned())];
    let field = Field::new("id", DataType::FixedSizeBinary(16), true).with_metadata(metadata);
    let ids: ArrayRef = Arc::new(FixedSizeBinaryArray::try_from_iter([[7u8; 16]].into_iter()).unwrap());
    let emb: ArrayRef =
        Arc::new(FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>([Some([Some(1.0)])], 1));
    let schema =
        arrow_schema::Schema::new(vec![field.clone(), Field::new("emb", emb.data_type().clone(), true)]);
    let schema = Arc::new(schema.with_metadata([("origin".to_owned(), "here".to_owned())]));
    let batch = arrow_array::RecordBatch::try_new(schema.clone(), vec![ids, emb]).unwrap();
    let named = TableOptions { named: true, ..TableOptions::default() };
    let it = Table::from_batches(schema.clone(), vec![batch.clone()], &named).unwrap();
    let Body::Keep { field: kept, .. } = &it.descriptor().items[0].body else { panic!("it is not kept") };
    assert_eq!(kept, &field);
    assert_eq!(it.descriptor().metadata.get("origin").map(String::as_str), Some("here"));
    let it = Table::from_batches(schema, vec![batch], &TableOptions::default()).unwrap();
    assert!(it.descriptor().metadata.is_empty());
}

/// The offsets of the kept column itself as they cross, and how many bytes each takes; nothing of the values behind them.
fn offsets_of(table: &Table) -> (Vec<i64>, usize) {
    let Body::Keep { data, .. } = &table.descriptor().items[1].body else { panic!("it is not kept") };
    let list = ChunkList::new(table.descriptor(), 0, MIN_WINDOW);
    let mut bytes = Vec::new();
    for chunk in list.chunks.iter().filter(|c| c.item == 1) {
        // The buffer behind the validity.
        if chunk.action == (Action::Copy { buffer: 1 }) {
            let mut out = vec![0; chunk.bytes as usize];
            table.fill(chunk, &mut out);
            bytes.extend(out);
        }
    }
    let width = bytes.len() / (data.length as usize + 1);
    let offset = |b: &[u8]| match width {
        4 => i64::from(i32::from_le_bytes(b.try_into().unwrap())),
        _ => i64::from_le_bytes(b.try_into().unwrap()),
    };
    (bytes.chunks(width).map(offset).collect(), width)
}

fn kept_type(table: &Table) -> DataType {
    let Body::Keep { field, .. } = &table.descriptor().items[1].body else { panic!("it is not kept") };
    field.data_type().clone()
}

/// One value of 64 MiB beside a null and a short one; as often as it is repeated it takes its memory once.
fn long_text() -> ArrayRef {
    let long = "x".repeat(PIECE);
    Arc::new(StringArray::from(vec![Some("ab"), None, Some(long.as_str())]).slice(1, 2))
}

const PIECE: usize = 1 << 26;

fn list_of(values: ArrayRef) -> ArrayRef {
    let field = Arc::new(Field::new("item", values.data_type().clone(), true));
    let ends = arrow_buffer::OffsetBuffer::from_lengths([values.len()]);
    Arc::new(ListArray::new(field, ends, values, None))
}

fn list_type(of: DataType) -> DataType {
    DataType::List(Arc::new(Field::new("item", of, true)))
}

#[test]
fn a_column_becomes_large_where_its_chunks_pass_32_bits() {
    let text = long_text();
    let binary: ArrayRef =
        Arc::new(BinaryArray::from(text.as_any().downcast_ref::<StringArray>().unwrap().clone()));
    for (chunk, large) in [(&text, DataType::LargeUtf8), (&binary, DataType::LargeBinary)] {
        // 31 of them are less than 2^31 bytes, 32 are not.
        let fits = keep(&vec![chunk.clone(); 31]).unwrap();
        assert_eq!(kept_type(&fits), *chunk.data_type());
        let (ends, width) = offsets_of(&fits);
        assert_eq!((ends.last(), width), (Some(&(31 * PIECE as i64)), 4));

        let it = keep(&vec![chunk.clone(); 33]).unwrap();
        assert_eq!(kept_type(&it), large);
        let (ends, width) = offsets_of(&it);
        // A null row ends where the row before it does.
        let want = (0..33).flat_map(|i| [i, i + 1]).map(|n| n * PIECE as i64);
        assert_eq!((ends, width), ([0].into_iter().chain(want).collect(), 8));
        let Body::Keep { data, .. } = &it.descriptor().items[1].body else { panic!("it is not kept") };
        assert_eq!(data.buffers, [66_u64.div_ceil(8), 67 * 8, 33 * PIECE as u64]);
        assert_eq!((data.length, data.null_count), (66, 33));
    }
}

#[test]
fn only_what_has_to_be_large_becomes_so() {
    // Long values in short lists, and long lists of values that take no bytes.
    let texts = list_of(long_text());
    let it = keep(&vec![texts.clone(); 33]).unwrap();
    assert_eq!(kept_type(&it), list_type(DataType::LargeUtf8));
    assert_eq!(offsets_of(&it).1, 4);
    let nothing = list_of(Arc::new(NullArray::new(PIECE)));
    let it = keep(&vec![nothing.clone(); 33]).unwrap();
    let DataType::List(item) = nothing.data_type() else { panic!("a list") };
    assert_eq!(kept_type(&it), DataType::LargeList(item.clone()));
    assert_eq!(offsets_of(&it), ((0..=33).map(|i| i * PIECE as i64).collect(), 8));

    let fields = |texts: DataType| {
        let list = Field::new("texts", texts, true).with_metadata([("unit".to_owned(), "word".to_owned())]);
        Fields::from(vec![Field::new("number", DataType::Int64, false), list])
    };
    let columns: Vec<ArrayRef> = vec![Arc::new(Int64Array::from(vec![1])), texts.clone()];
    let row: ArrayRef = Arc::new(StructArray::new(fields(texts.data_type().clone()), columns, None));
    let it = keep(&vec![row; 33]).unwrap();
    assert_eq!(kept_type(&it), DataType::Struct(fields(list_type(DataType::LargeUtf8))));

    let size = |of| DataType::FixedSizeList(Arc::new(Field::new("item", of, true)), 1);
    let DataType::FixedSizeList(item, _) = size(texts.data_type().clone()) else { panic!("a list") };
    let fixed: ArrayRef = Arc::new(FixedSizeListArray::new(item, 1, texts, None));
    let it = keep(&vec![fixed; 33]).unwrap();
    assert_eq!(kept_type(&it), size(list_type(DataType::LargeUtf8)));
}

#[test]
fn maps_have_no_large_type() {
    let entries = Fields::from(vec![
        Field::new("keys", DataType::Boolean, false),
        Field::new("values", DataType::Null, true),
    ]);
    let keys = BooleanArray::new(arrow_buffer::BooleanBuffer::new_unset(PIECE), None);
    let columns: Vec<ArrayRef> = vec![Arc::new(keys), Arc::new(NullArray::new(PIECE))];
    let entries = StructArray::new(entries, columns, None);
    let field = Arc::new(Field::new("entries", entries.data_type().clone(), false));
    let ends = arrow_buffer::OffsetBuffer::from_lengths([PIECE]);
    let map: ArrayRef = Arc::new(MapArray::new(field, ends, entries, None, false));
    assert!(keep(&vec![map.clone(); 31]).is_ok());
    says(
        keep(&vec![map; 32]),
        &["column 'kept' cannot be published", "2147483648 entries", "hint: leave it out with keep=[...]"],
    );
}
