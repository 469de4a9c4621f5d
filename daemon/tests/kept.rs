//! Kept columns of every type come back as they were; what is not valid Arrow data is refused with the column's name.
#![allow(clippy::expect_used, clippy::panic, reason = "a failed expectation is how a test reports")]

mod tables;

use std::sync::Arc;

use arrow_array::builder::{
    BinaryViewBuilder, FixedSizeBinaryBuilder, Int32Builder, ListBuilder, MapBuilder, StringBuilder,
    StringDictionaryBuilder, StringViewBuilder,
};
use arrow_array::types::{Float16Type, Int8Type, Int32Type, UInt16Type};
use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, Date32Array, Date64Array, Decimal32Array, Decimal64Array,
    Decimal128Array, Decimal256Array, DictionaryArray, DurationSecondArray, FixedSizeListArray, Float64Array,
    Int8Array, Int16Array, Int32Array, Int64Array, IntervalDayTimeArray, IntervalMonthDayNanoArray,
    IntervalYearMonthArray, LargeBinaryArray, LargeListArray, LargeStringArray, ListArray, NullArray,
    PrimitiveArray, StringArray, StructArray, Time32MillisecondArray, Time64NanosecondArray,
    TimestampMicrosecondArray, UInt8Array, UInt32Array, UInt64Array,
};
use arrow_buffer::{IntervalDayTime, IntervalMonthDayNano, i256};
use arrow_schema::{DataType, Field};
use shmquant_kernels::{FloatType, Granularity, Scheme};
use shmquant_protocol::descriptor::{Body, Role};
use shmquant_protocol::field::NodeData;
use shmquant_protocol::message::{ErrorCode, Failure};
use tables::{Table, numbers, spec, to_bytes};

/// Every kind of column, with nulls where it can have them.
fn columns(n: usize) -> Vec<(&'static str, ArrayRef)> {
    let some = |i: usize| (i % 3 != 1).then_some(i);
    let ints = || (0..n).map(|i| some(i).map(|i| i as i32)).collect::<Vec<_>>();
    let longs = || (0..n).map(|i| some(i).map(|i| i as i64 * 1_000_003)).collect::<Vec<_>>();
    let texts: Vec<Option<String>> =
        (0..n).map(|i| some(i).map(|i| format!("text {i} {}", "é".repeat(i % 30)))).collect();
    let bytes: Vec<Option<&[u8]>> = texts.iter().map(|t| t.as_deref().map(str::as_bytes)).collect();

    let mut fixed = FixedSizeBinaryBuilder::new(5);
    let mut text_view = StringViewBuilder::new().with_fixed_block_size(1000);
    let mut binary_view = BinaryViewBuilder::new();
    let mut dictionary = StringDictionaryBuilder::<Int32Type>::new();
    let mut map = MapBuilder::new(None, StringBuilder::new(), Int32Builder::new());
    let mut dictionary_list = ListBuilder::new(StringDictionaryBuilder::<UInt16Type>::new());
    for (i, text) in texts.iter().enumerate() {
        fixed.append_value([i as u8; 5]).expect("five bytes");
        text_view.append_option(text.as_deref());
        binary_view.append_option(text.as_deref().map(str::as_bytes));
        dictionary.append_option(text.as_ref().map(|_| ["red", "green", "blue"][i % 3]));
        for j in 0..i % 4 {
            map.keys().append_value(format!("key {j}"));
            map.values().append_option(some(i + j).map(|v| v as i32));
        }
        map.append(i % 5 != 0).expect("a map");
        dictionary_list.values().append_value(["a", "b"][i % 2]);
        dictionary_list.values().append_null();
        dictionary_list.append(i % 6 != 0);
    }
    let dictionary: ArrayRef = Arc::new(dictionary.finish());
    let list = ListArray::from_iter_primitive::<Int32Type, _, _>(
        (0..n).map(|i| some(i).map(|i| (0..i % 5).map(|j| some(j).map(|j| j as i32)).collect::<Vec<_>>())),
    );
    let large_list = LargeListArray::from_iter_primitive::<Int32Type, _, _>(
        (0..n).map(|i| some(i).map(|i| vec![Some(i as i32); i % 3])),
    );
    let fsl = FixedSizeListArray::from_iter_primitive::<Int32Type, _, _>(
        (0..n).map(|i| some(i).map(|i| vec![Some(i as i32), None, Some(7)])),
        3,
    );
    let strings: ArrayRef = Arc::new(StringArray::from(texts.clone()));
    let nested = StructArray::from(vec![
        (Arc::new(Field::new("text", DataType::Utf8, true)), Arc::clone(&strings)),
        (Arc::new(Field::new("word", dictionary.data_type().clone(), true)), Arc::clone(&dictionary)),
        (Arc::new(Field::new("list", list.data_type().clone(), true)), Arc::new(list.clone()) as ArrayRef),
    ]);
    vec![
        ("null", Arc::new(NullArray::new(n))),
        (
            "bool",
            Arc::new(BooleanArray::from((0..n).map(|i| some(i).map(|i| i % 2 == 0)).collect::<Vec<_>>())),
        ),
        ("int8", Arc::new(Int8Array::from_iter_values((0..n).map(|i| i as i8)))),
        ("int16", Arc::new(Int16Array::from_iter((0..n).map(|i| some(i).map(|i| i as i16))))),
        ("int32", Arc::new(Int32Array::from(ints()))),
        ("int64", Arc::new(Int64Array::from(longs()))),
        ("uint8", Arc::new(UInt8Array::from_iter((0..n).map(|i| some(i).map(|i| i as u8))))),
        ("uint32", Arc::new(UInt32Array::from_iter_values((0..n).map(|i| i as u32)))),
        ("uint64", Arc::new(UInt64Array::from_iter_values((0..n).map(|i| i as u64)))),
        (
            "float16",
            Arc::new(PrimitiveArray::<Float16Type>::from_iter_values(
                (0..n).map(|i| half::f16::from_f64(i as f64)),
            )),
        ),
        ("float64", Arc::new(Float64Array::from_iter_values((0..n).map(|i| i as f64 / 7.0)))),
        (
            "decimal32",
            Arc::new(Decimal32Array::from(ints()).with_precision_and_scale(9, 2).expect("a decimal")),
        ),
        (
            "decimal64",
            Arc::new(Decimal64Array::from(longs()).with_precision_and_scale(18, 3).expect("a decimal")),
        ),
        ("decimal128", Arc::new(Decimal128Array::from_iter_values((0..n).map(|i| i as i128 * 3)))),
        (
            "decimal256",
            Arc::new(Decimal256Array::from_iter_values((0..n).map(|i| i256::from_i128(i as i128)))),
        ),
        ("fixed", Arc::new(fixed.finish())),
        ("months", Arc::new(IntervalYearMonthArray::from(ints()))),
        (
            "day_time",
            Arc::new(IntervalDayTimeArray::from_iter_values(
                (0..n).map(|i| IntervalDayTime::new(i as i32, 1)),
            )),
        ),
        (
            "month_day_nano",
            Arc::new(IntervalMonthDayNanoArray::from_iter_values(
                (0..n).map(|i| IntervalMonthDayNano::new(i as i32, 1, 2)),
            )),
        ),
        ("date32", Arc::new(Date32Array::from(ints()))),
        ("date64", Arc::new(Date64Array::from_iter_values((0..n).map(|i| i as i64 * 86_400_000)))),
        ("time32", Arc::new(Time32MillisecondArray::from(ints()))),
        ("time64", Arc::new(Time64NanosecondArray::from_iter_values((0..n).map(|i| i as i64)))),
        ("timestamp", Arc::new(TimestampMicrosecondArray::from(longs()).with_timezone("Europe/Berlin"))),
        ("duration", Arc::new(DurationSecondArray::from(longs()))),
        ("binary", Arc::new(BinaryArray::from(bytes.clone()))),
        ("large_binary", Arc::new(LargeBinaryArray::from(bytes))),
        ("utf8", strings),
        ("large_utf8", Arc::new(LargeStringArray::from(texts))),
        ("utf8_view", Arc::new(text_view.finish())),
        ("binary_view", Arc::new(binary_view.finish())),
        ("dictionary", dictionary),
        (
            "numbers_dictionary",
            Arc::new(DictionaryArray::<Int8Type>::new(
                Int8Array::from_iter((0..n).map(|i| some(i).map(|_| 1))),
                Arc::new(Int64Array::from(vec![5, 6])),
            )),
        ),
        ("list", Arc::new(list)),
        ("large_list", Arc::new(large_list)),
        ("fsl", Arc::new(fsl)),
        ("struct", Arc::new(nested)),
        ("empty_struct", Arc::new(StructArray::new_empty_fields(n, None))),
        ("map", Arc::new(map.finish())),
        ("dictionary_list", Arc::new(dictionary_list.finish())),
    ]
}

/// The columns with a vector column in their midst.
fn table(n: usize, columns: &[(&str, ArrayRef)]) -> Table {
    let mut table = Table::columns(n as u64);
    for (i, (name, array)) in columns.iter().enumerate() {
        if i == columns.len() / 2 {
            let bytes = to_bytes(&numbers(n * 4, 1), FloatType::F32);
            table.column(
                "emb",
                spec(Scheme::UInt8, Granularity::Dimension, 0),
                FloatType::F32,
                Role::Vector,
                4,
                None,
                bytes,
            );
            let plain = to_bytes(&numbers(n, 2), FloatType::F32);
            table.column(
                "price",
                spec(Scheme::Int8, Granularity::Tensor, 0),
                FloatType::F32,
                Role::Plain,
                1,
                None,
                plain,
            );
        }
        let field = Field::new(*name, array.data_type().clone(), true);
        let field = field.with_metadata([("unit".to_owned(), (*name).to_owned())]);
        table.keep(field, &array.to_data());
    }
    table
}

#[test]
fn every_type_comes_back() {
    for n in [0, 1, 8, 1000, 60_001] {
        let columns = columns(n);
        let mut table = table(n, &columns);
        table.descriptor.metadata.insert("pandas".to_owned(), "{}".to_owned());
        let batch = table.result().unwrap_or_else(|e| panic!("{n}: {e:?}")).batch();
        assert_eq!(batch.num_rows(), n);
        assert_eq!(batch.schema().metadata.get("pandas").map(String::as_str), Some("{}"));
        assert_eq!(batch.num_columns(), columns.len() + 2 + 3);
        for (name, array) in &columns {
            let got = &batch[*name];
            got.to_data().validate_full().unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(got.data_type(), array.data_type(), "{name}");
            assert!(got.to_data() == array.to_data(), "{name} of {n}");
            let schema = batch.schema();
            let field = schema.field_with_name(name).expect("a column");
            assert_eq!(field.metadata().get("unit").map(String::as_str), Some(*name));
        }
        let names: Vec<_> = batch.schema().fields().iter().map(|f| f.name().clone()).collect();
        let emb = names.iter().position(|n| n == "emb").expect("a column");
        assert_eq!(names[emb..emb + 5], ["emb", "emb_params_id", "price", "price_scale", "price_zero_point"]);
    }
}

/// What the request with one kept column, changed by `change`, fails with.
fn failure(array: ArrayRef, change: impl FnOnce(&mut NodeData, &mut Vec<Vec<u8>>)) -> Failure {
    let mut table = table(array.len(), &[("first", Arc::new(NullArray::new(array.len()))), ("kept", array)]);
    let item = table.descriptor.items.len() - 1;
    if let Body::Keep { data, .. } = &mut table.descriptor.items[item].body {
        change(data, &mut table.streams[item]);
    }
    table.result().err().expect("not valid")
}

#[test]
fn lengths_that_do_not_fit_the_type_are_refused_first() {
    let strings = || Arc::new(StringArray::from(vec!["a", "bc", "def"])) as ArrayRef;
    let changes: [fn(&mut NodeData); 8] = [
        |d| d.buffers[1] = 12,
        |d| d.buffers[0] = 1,
        |d| d.buffers[2] = 1 << 31,
        |d| d.buffers[1] = u64::MAX,
        |d| d.buffers.truncate(2),
        |d| d.buffers.clear(),
        |d| d.buffers.push(0),
        |d| d.children.push(NodeData::default()),
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let failure = failure(strings(), |data, _| change(data));
        assert_eq!(
            (failure.code, failure.column.as_str()),
            (ErrorCode::InvalidInput, "kept"),
            "{i}: {failure:?}"
        );
    }
    let list = FixedSizeListArray::from_iter_primitive::<Int32Type, _, _>([Some(vec![Some(1), Some(2)])], 2);
    let failure = failure(Arc::new(list), |data, _| data.children[0].length = 1 << 62);
    assert!(failure.message.contains("cannot hold"), "{failure:?}");
}

#[test]
fn values_that_are_not_valid_are_refused_at_the_end() {
    let strings = || Arc::new(StringArray::from(vec![Some("a"), None, Some("def")])) as ArrayRef;
    let offset = |at: usize, value: i32| {
        failure(strings(), move |_, b| b[1][at * 4..at * 4 + 4].copy_from_slice(&value.to_le_bytes()))
    };
    let mut dictionary = StringDictionaryBuilder::<Int32Type>::new();
    dictionary.append_value("red");
    dictionary.append_value("blue");
    let dictionary: ArrayRef = Arc::new(dictionary.finish());
    let mut views = StringViewBuilder::new();
    views.append_value("a text that does not fit a view");
    let views: ArrayRef = Arc::new(views.finish());
    let failures = [
        ("descending offsets", offset(1, 100)),
        ("a negative offset", offset(2, -1)),
        ("an offset behind the end", offset(3, 5)),
        ("not UTF-8", failure(strings(), |_, b| b[2][1] = 0xff)),
        ("other nulls than announced", failure(strings(), |_, b| b[0][0] = 0)),
        ("an index behind the dictionary", failure(Arc::clone(&dictionary), |_, b| b[1][0] = 9)),
        ("a negative index", failure(dictionary, |_, b| b[1][3] = 0x80)),
        ("a view of no buffer", failure(views, |_, b| b[1][8] = 77)),
    ];
    for (what, failure) in failures {
        assert_eq!(
            (failure.code, failure.column.as_str()),
            (ErrorCode::InvalidInput, "kept"),
            "{what}: {failure:?}"
        );
        assert!(failure.message.starts_with("column 'kept' is not valid Arrow data"), "{failure:?}");
    }
}

#[test]
fn a_name_in_the_way_is_refused() {
    let mut table = table(3, &[("emb_params_id", Arc::new(NullArray::new(3)))]);
    assert_eq!(table.result().err().map(|f| f.column), Some("emb".to_owned()));
    // Only names that the result really adds are in the way.
    table.descriptor.items[2].name = "emb_scale".to_owned();
    if let Body::Keep { field, .. } = &mut table.descriptor.items[2].body {
        *field = field.clone().with_name("emb_scale");
    }
    assert!(table.result().is_ok());
}
