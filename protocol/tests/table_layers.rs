//! Layers tables: what crosses for each layer, whatever holds its name and its weights.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests report by panicking"
)]

mod tables;

use std::slice::from_ref;
use std::sync::Arc;

use arrow_array::builder::{Int64Builder, ListBuilder};
use arrow_array::types::{Float16Type, Float32Type, Float64Type, Int8Type, Int32Type};
use arrow_array::{
    ArrayRef, BinaryArray, BinaryViewArray, DictionaryArray, FixedSizeListArray, Int64Array,
    LargeBinaryArray, LargeListArray, LargeStringArray, ListArray, StringArray, StringViewArray,
};
use arrow_buffer::Buffer;
use half::{bf16, f16};
use shmquant_kernels::{FloatType, Granularity, Scheme};
use shmquant_protocol::client::Source;
use shmquant_protocol::descriptor::{Role, TableKind};
use shmquant_protocol::table::{LayerInput, Override, OverrideSpec, Pattern, Table, TableOptions};
use tables::{crossed, f32_bytes, says, table, values};

const NAMES: [&str; 2] = ["layer_name", "weights"];

fn names(rows: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(rows.to_vec()))
}

fn lists(rows: &[Option<Vec<f32>>]) -> ArrayRef {
    let rows = rows.iter().map(|r| r.as_ref().map(|r| r.iter().map(|v| Some(*v)).collect::<Vec<_>>()));
    Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(rows))
}

fn shapes(rows: &[Option<Vec<i64>>]) -> ArrayRef {
    let mut list = ListBuilder::new(Int64Builder::new());
    for row in rows {
        list.append_option(row.as_ref().map(|dims| dims.iter().map(|d| Some(*d))));
    }
    Arc::new(list.finish())
}

fn four_bits() -> TableOptions {
    TableOptions { scheme: Scheme::UInt4, ..TableOptions::default() }
}

#[test]
fn layers_of_any_length_cross_one_by_one() {
    let weights =
        lists(&[Some(vec![9.0]), Some(vec![1.0, 2.0, 3.0]), None, Some(vec![]), Some(vec![4.0; 6])]);
    let labels = names(&["zero", "a", "b", "c", "d"]);
    let shape = shapes(&[None, None, None, None, Some(vec![2, 1, 3])]);
    let columns = ["layer_name", "weights", "shape"];
    let part = |at, n| vec![labels.slice(at, n), weights.slice(at, n), shape.slice(at, n)];
    let it = table(&columns, &[part(1, 1), part(2, 0), part(2, 3)], &four_bits()).unwrap();
    assert!(it.is_layers());
    assert_eq!(it.descriptor().table, TableKind::Layers { large_names: false });
    let got = crossed(&it);
    assert_eq!(got[0].values, f32_bytes([1.0, 2.0, 3.0]));
    assert_eq!(got[3].values, f32_bytes([4.0; 6]));
    assert!(got[1].values.is_empty() && got[2].values.is_empty());
    let place =
        |i| (values(&it, i).rows, values(&it, i).k, values(&it, i).null, values(&it, i).shape.clone());
    assert_eq!(place(0), (1, 3, false, vec![3]));
    assert_eq!(place(1), (0, 0, true, vec![]));
    assert_eq!(place(2), (1, 0, false, vec![0]));
    assert_eq!(place(3), (2, 3, false, vec![2, 1, 3]));
    let spec = it.descriptor().spec(values(&it, 0));
    assert_eq!((spec.granularity, spec.group_size, spec.packed), (Granularity::Group, 128, true));
    let eight = table(&columns, &[part(1, 1)], &TableOptions::default()).unwrap();
    assert_eq!(eight.descriptor().specs[0].granularity, Granularity::Row);
    let [shmquant_protocol::table::Output::Quantized { names }] = eight.outputs() else {
        panic!("one output")
    };
    assert_eq!((names.len(), names[1].as_str()), (13, "quantized_data"));
}

#[test]
fn names_may_be_any_text() {
    let words = ["conv", "fc", "a name that does not fit a view"];
    let weights = lists(&[Some(vec![1.0]), Some(vec![2.0]), Some(vec![3.0])]);
    let dictionary: DictionaryArray<Int8Type> = words.into_iter().collect();
    let large: DictionaryArray<Int32Type> = DictionaryArray::new(
        vec![2, 0, 1].into(),
        Arc::new(LargeStringArray::from(vec!["fc", words[2], "conv"])),
    );
    let columns: [(ArrayRef, bool); 5] = [
        (names(&words), false),
        (Arc::new(LargeStringArray::from(words.to_vec())), true),
        (Arc::new(StringViewArray::from(words.to_vec())), false),
        (Arc::new(dictionary), false),
        (Arc::new(large), true),
    ];
    for (column, large_names) in columns {
        let kind = column.data_type().clone();
        let it = table(&NAMES, &[vec![column.slice(1, 2), weights.slice(1, 2)]], &four_bits()).unwrap();
        let found: Vec<&str> = it.descriptor().items.iter().map(|i| i.name.as_str()).collect();
        assert_eq!(found, words[1..], "{kind}");
        assert_eq!(it.descriptor().table, TableKind::Layers { large_names }, "{kind}");
    }
}

#[test]
fn weights_may_be_lists_of_any_float_or_bytes_with_a_dtype() {
    let floats = [0.5f32, -2.0, 3.0, 4.0];
    let halves = floats.map(f16::from_f32);
    let f16_list = FixedSizeListArray::from_iter_primitive::<Float16Type, _, _>([Some(halves.map(Some))], 4);
    let f64_list =
        LargeListArray::from_iter_primitive::<Float64Type, _, _>([Some(floats.map(|v| Some(f64::from(v))))]);
    let f16_bytes: Vec<u8> = halves.iter().flat_map(|v| v.to_le_bytes()).collect();
    let f64_bytes: Vec<u8> = floats.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect();
    let cases: [(ArrayRef, FloatType, &[u8]); 2] =
        [(Arc::new(f16_list), FloatType::F16, &f16_bytes), (Arc::new(f64_list), FloatType::F64, &f64_bytes)];
    for (weights, dtype, want) in cases {
        let it = table(&NAMES, &[vec![names(&["a"]), weights]], &four_bits()).unwrap();
        assert_eq!((values(&it, 0).dtype, crossed(&it)[0].values.as_slice()), (dtype, want));
    }
    let bf16_bytes: Vec<u8> = floats.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    let rows: [(&[u8], &str); 3] =
        [(&bf16_bytes, "bfloat16"), (&f64_bytes, "float64"), (&f16_bytes, "float16")];
    let bytes = rows.map(|(b, _)| b);
    let kinds: [ArrayRef; 3] = [
        Arc::new(BinaryArray::from_iter_values(bytes)),
        Arc::new(LargeBinaryArray::from_iter_values(bytes)),
        Arc::new(BinaryViewArray::from_iter_values(bytes)),
    ];
    let columns = ["layer_name", "weights", "dtype"];
    for weights in kinds {
        let dtypes: DictionaryArray<Int8Type> = rows.iter().map(|(_, d)| *d).collect();
        let chunk = [names(&["a", "b", "c"]), weights.clone(), Arc::new(dtypes)];
        let chunk: Vec<ArrayRef> = chunk.iter().map(|a: &ArrayRef| a.slice(1, 2)).collect();
        let it = table(&columns, &[chunk], &four_bits()).unwrap();
        let got = crossed(&it);
        for (i, (bytes, dtype)) in rows[1..].iter().enumerate() {
            assert_eq!((values(&it, i).dtype.name(), got[i].values.as_slice()), (*dtype, *bytes));
            assert_eq!(values(&it, i).k, 4);
        }
        let wrong = |words: [&str; 3]| {
            table(&columns, &[vec![names(&["a", "b", "c"]), weights.clone(), names(&words)]], &four_bits())
        };
        says(
            wrong(["bfloat16", "int8", "float16"]),
            &["Layer 'b' has the dtype 'int8'", "float16, bfloat16"],
        );
    }
    let odd: ArrayRef = Arc::new(BinaryArray::from_iter_values([b"12345"]));
    says(
        table(&columns, &[vec![names(&["a"]), odd, names(&["float32"])]], &four_bits()),
        &["Layer 'a': 5 bytes are no whole number of float32 values"],
    );
}

#[test]
fn what_does_not_fit_names_its_layer() {
    let weights = || lists(&[Some(vec![1.0]), Some(vec![1.0, 2.0])]);
    let columns = ["layer_name", "weights", "shape"];
    let shaped = |dims: &[i64]| {
        table(
            &columns,
            &[vec![names(&["a", "b"]), weights(), shapes(&[None, Some(dims.to_vec())])]],
            &four_bits(),
        )
    };
    says(shaped(&[3]), &["Layer 'b': shape [3] does not hold 2 values"]);
    says(shaped(&[-1, -2]), &["Layer 'b': shape [-1, -2]"]);
    says(shaped(&[1 << 40, 1 << 40]), &["Layer 'b': shape"]);
    says(shaped(&[]), &["Layer 'b': shape [] does not hold 2 values"]);
    let null_name: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None]));
    let chunks = [vec![names(&["x", "y"]), weights()], vec![null_name, weights()]];
    let error = table(&NAMES, &chunks, &four_bits()).unwrap_err();
    assert_eq!(error.details().row, Some(3));
    says(Err::<(), _>(error), &["Column 'layer_name' is null at row 3"]);
    let holes: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>([
        None,
        Some(vec![Some(1.0), None, Some(3.0)]),
    ]));
    let chunk = vec![names(&["a", "b"]), holes];
    let error = table(&NAMES, from_ref(&chunk), &four_bits()).unwrap_err();
    let details = error.details();
    assert_eq!((details.layer.as_deref(), details.row, details.index), (Some("b"), Some(1), Some(1)));
    says(Err::<(), _>(error), &["Layer 'b' has a null at index 1", "hint: nulls=\"zero\""]);
    let it = table(&NAMES, &[chunk], &TableOptions { nulls_as_zero: true, ..four_bits() }).unwrap();
    assert_eq!(crossed(&it)[1].values, f32_bytes([1.0, 0.0, 3.0]));
    let ints: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
    says(
        table(&NAMES, &[vec![ints.clone(), weights()]], &four_bits()),
        &["Column 'layer_name' has type Int64, expected a string"],
    );
    says(
        table(&NAMES, &[vec![names(&["a", "b"]), ints]], &four_bits()),
        &["Column 'weights' has type Int64"],
    );
    let binary: ArrayRef = Arc::new(BinaryArray::from_iter_values([b"1234", b"1234"]));
    says(
        table(&NAMES, &[vec![names(&["a", "b"]), binary]], &four_bits()),
        &["Missing required column 'dtype'"],
    );
    let layers = TableOptions { layers: Some(true), ..four_bits() };
    says(table(&["emb"], &[vec![weights()]], &layers), &["Missing required column 'layer_name'"]);
    says(table(&["layer_name"], &[vec![names(&["a"])]], &layers), &["Missing required column 'weights'"]);
    let keep = TableOptions { keep: Some(vec![]), ..four_bits() };
    says(
        table(&NAMES, &[vec![names(&["a", "b"]), weights()]], &keep),
        &["keep does not go with a layers table"],
    );
}

#[test]
fn a_table_is_of_columns_where_columns_are_named() {
    let weights = lists(&[Some(vec![1.0, 2.0]), Some(vec![3.0, 4.0])]);
    let columns = Some(vec!["weights".to_owned()]);
    let it = table(&NAMES, &[vec![names(&["a", "b"]), weights]], &TableOptions { columns, ..four_bits() })
        .unwrap();
    assert!(!it.is_layers());
    assert_eq!((values(&it, 0).role, values(&it, 0).rows), (Role::Vector, 2));
}

#[test]
fn overrides_give_layers_their_own_specs_or_leave_them() {
    let labels = ["model.embed", "model.0.q", "model.0.k", "lm_head"];
    let weights = lists(&vec![Some(vec![1.0, 2.0]); 4]);
    let spec = |scheme| Some(OverrideSpec { scheme, ..OverrideSpec::default() });
    let options = TableOptions {
        group_size: Some(32),
        overrides: vec![
            Override { pattern: Pattern::parse("re:.*embed").unwrap(), action: None },
            Override { pattern: Pattern::parse("lm_head").unwrap(), action: spec(Some(Scheme::Int8)) },
            Override {
                pattern: Pattern::parse("*.k").unwrap(),
                action: Some(OverrideSpec { group_size: Some(64), ..OverrideSpec::default() }),
            },
        ],
        ..four_bits()
    };
    let it = table(&NAMES, &[vec![names(&labels), weights]], &options).unwrap();
    let found = |i| {
        let spec = it.descriptor().spec(values(&it, i));
        (spec.affine.map(|a| a.scheme), spec.granularity, spec.group_size)
    };
    assert_eq!(found(0).0, None);
    assert_eq!(found(1), (Some(Scheme::UInt4), Granularity::Group, 32));
    assert_eq!(found(2), (Some(Scheme::UInt4), Granularity::Group, 64));
    assert_eq!(found(3), (Some(Scheme::Int8), Granularity::Row, 0));
    assert_eq!(it.descriptor().specs.len(), 4);
    let got = crossed(&it);
    assert_eq!((&got[0].copied[&0], got[0].values.len()), (&f32_bytes([1.0, 2.0]), 0));
}

#[test]
fn layers_in_memory_cross_as_they_are() {
    let layer = |name: &str, values: Vec<u8>, dtype, shape: &[i64]| LayerInput {
        name: name.to_owned(),
        values: Buffer::from_vec(values),
        dtype,
        shape: shape.to_vec(),
    };
    let one = layer("a", f32_bytes([1.0, 2.0, 3.0, 4.0]), FloatType::F32, &[2, 2]);
    let scalar = layer("s", f32_bytes([2.5]), FloatType::F32, &[]);
    let flat = layer("f", vec![0, 1, 2, 3], FloatType::Bf16, &[]);
    let it = Table::from_layers(vec![one, scalar, flat], true, &four_bits()).unwrap();
    assert_eq!(it.descriptor().table, TableKind::Layers { large_names: true });
    let got = crossed(&it);
    assert_eq!(got[0].values, f32_bytes([1.0, 2.0, 3.0, 4.0]));
    assert_eq!((values(&it, 0).rows, values(&it, 0).k), (2, 2));
    assert_eq!((values(&it, 1).k, values(&it, 1).shape.len()), (1, 0));
    assert_eq!((values(&it, 2).k, values(&it, 2).shape.as_slice()), (2, &[2i64][..]));
    let odd = layer("odd", vec![0; 6], FloatType::F32, &[]);
    says(Table::from_layers(vec![odd], false, &four_bits()), &["Layer 'odd': 6 bytes"]);
    let wrong = layer("w", vec![0; 8], FloatType::F32, &[3]);
    says(
        Table::from_layers(vec![wrong], false, &four_bits()),
        &["Layer 'w': shape [3] does not hold 2 values"],
    );
    let none = Table::from_layers(Vec::new(), false, &four_bits()).unwrap();
    assert!(crossed(&none).is_empty());
}

#[test]
fn a_large_layer_crosses_twice_where_one_range_covers_it() {
    let n = 700_001;
    let weights: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let tensor = TableOptions { granularity: Some(Granularity::Tensor), ..four_bits() };
    let it = table(&NAMES, &[vec![names(&["a"]), lists(&[Some(weights.clone())])]], &tensor).unwrap();
    assert!(crossed(&it)[0].values == f32_bytes(weights));
}
