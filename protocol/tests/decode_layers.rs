//! Layers of a result decode from their own columns, in whatever types these come back.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests report by panicking"
)]

mod tables;

use std::sync::Arc;

use arrow_array::builder::{Int64Builder, ListBuilder};
use arrow_array::types::{Float32Type, Int8Type};
use arrow_array::{
    Array, ArrayRef, BinaryArray, BinaryViewArray, DictionaryArray, Float32Array, Int32Array, Int64Array,
    LargeBinaryArray, LargeListArray, LargeStringArray, ListArray, RecordBatch, StringArray, StringViewArray,
};

use half::f16;
use shmquant_kernels::{FloatType, Granularity, Layout, Scheme};
use shmquant_protocol::decode;
use tables::kernels::{quantize, wave};
use tables::{f32_values, replace, says};

/// A layer of a result.
struct Layer {
    name: &'static str,
    data: Option<Vec<u8>>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    shape: Vec<i64>,
    scheme: &'static str,
    packing: &'static str,
    group_size: i32,
    want: Vec<f32>,
}

fn layers() -> Vec<Layer> {
    let mut all = Vec::new();
    let cases = [
        ("rows", Scheme::Int8, Granularity::Row, 0, [3i64, 4, 5], 0),
        ("groups", Scheme::UInt4, Granularity::Group, 8, [1, 7, 11], 8),
        ("tensor", Scheme::UInt2, Granularity::Tensor, 0, [5, 1, 3], -1),
        ("square", Scheme::Int4, Granularity::Dimension, 0, [1, 5, 5], -2),
        ("flat", Scheme::UInt8, Granularity::Row, 0, [1, 5, 5], 0),
    ];
    for (name, scheme, granularity, group, shape, group_size) in cases {
        let packed = scheme.bits() < 8;
        let (rows, k) = ((shape[0] * shape[1]) as u64, shape[2] as u64);
        let layout = Layout { rows, k, group, granularity, pad_rows: false, packed };
        let q = quantize(&wave((rows * k) as usize), scheme, layout);
        let want = q.naive();
        all.push(Layer {
            name,
            zeros: if q.asymmetric() { q.zeros } else { Vec::new() },
            data: Some(q.codes),
            scales: q.scales,
            shape: shape.to_vec(),
            scheme: scheme.name(),
            packing: if packed { "lsb" } else { "none" },
            group_size,
            want,
        });
    }
    let bare = Layer {
        name: "as it is",
        data: Some([1.5f32, -2.0].iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()),
        scales: Vec::new(),
        zeros: Vec::new(),
        shape: vec![2],
        scheme: "bfloat16",
        packing: "none",
        group_size: 0,
        want: vec![1.5, -2.0],
    };
    let empty = Layer {
        name: "empty",
        data: Some(Vec::new()),
        shape: vec![4, 0],
        scheme: "uint4",
        packing: "lsb",
        want: Vec::new(),
        scales: Vec::new(),
        zeros: Vec::new(),
        group_size: 128,
    };
    let null = Layer {
        name: "null",
        data: None,
        shape: Vec::new(),
        want: Vec::new(),
        scales: Vec::new(),
        zeros: Vec::new(),
        ..empty
    };
    all.extend([bare, empty, null]);
    all
}

/// The columns of a layers table that decoding reads, in the types that `travelled` libraries give them.
fn layers_batch(layers: &[Layer], travelled: bool) -> RecordBatch {
    let floats = |f: fn(&Layer) -> &Vec<f32>| -> ArrayRef {
        let rows = layers.iter().map(|l| Some(f(l).iter().map(|v| Some(*v)).collect::<Vec<_>>()));
        match travelled {
            true => Arc::new(LargeListArray::from_iter_primitive::<Float32Type, _, _>(rows)),
            false => Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(rows)),
        }
    };
    let word = |f: fn(&Layer) -> &'static str| -> ArrayRef {
        match travelled {
            true => Arc::new(StringViewArray::from_iter_values(layers.iter().map(f))),
            false => Arc::new(layers.iter().map(f).collect::<DictionaryArray<Int8Type>>()),
        }
    };
    let names = layers.iter().map(|l| l.name);
    let data = layers.iter().map(|l| l.data.as_deref());
    let mut shape = ListBuilder::new(Int64Builder::new());
    layers.iter().for_each(|l| shape.append_value(l.shape.iter().map(|d| Some(*d))));
    let errors = layers.iter().map(|l| l.data.is_none().then_some("Layer 'null' contains NaN"));
    let columns: Vec<(&str, ArrayRef)> = vec![
        (
            "layer_name",
            match travelled {
                true => Arc::new(LargeStringArray::from_iter_values(names)),
                false => Arc::new(StringArray::from_iter_values(names)),
            },
        ),
        (
            "quantized_data",
            match travelled {
                true => Arc::new(BinaryViewArray::from_iter(data)),
                false => Arc::new(BinaryArray::from_iter(data)),
            },
        ),
        ("scales", floats(|l| &l.scales)),
        ("zero_points", floats(|l| &l.zeros)),
        ("shape", Arc::new(shape.finish())),
        ("scheme", word(|l| l.scheme)),
        ("packing", word(|l| l.packing)),
        (
            "group_size",
            match travelled {
                true => {
                    Arc::new(Int64Array::from_iter_values(layers.iter().map(|l| i64::from(l.group_size))))
                }
                false => Arc::new(Int32Array::from_iter_values(layers.iter().map(|l| l.group_size))),
            },
        ),
        ("error", Arc::new(StringArray::from_iter(errors))),
    ];
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, a)| (n, a, true))).unwrap()
}

fn weights(batch: &RecordBatch, row: usize) -> Option<Vec<f32>> {
    let list = batch.column_by_name("weights").unwrap();
    let list = list.as_any().downcast_ref::<ListArray>().unwrap();
    list.is_valid(row)
        .then(|| list.value(row).as_any().downcast_ref::<Float32Array>().unwrap().values().to_vec())
}

#[test]
fn every_layer_decodes_from_its_own_columns() {
    let layers = layers();
    for travelled in [false, true] {
        let batch = layers_batch(&layers, travelled);
        let schema = batch.schema();
        assert!(decode::is_layers(&schema));
        let parts = [batch.slice(0, 3), batch.slice(3, 0), batch.slice(3, layers.len() - 3)];
        let (out, decoded) = decode::table(&schema, &parts, None, FloatType::F32).unwrap();
        let names: Vec<&str> = out.fields().iter().map(|f| f.name().as_str()).collect();
        assert_eq!(names, ["layer_name", "weights", "shape"]);
        for (i, layer) in layers.iter().enumerate() {
            let (part, row) = if i < 3 { (0, i) } else { (2, i - 3) };
            let want = layer.data.is_some().then_some(layer.want.clone());
            assert_eq!(weights(&decoded[part], row), want, "{} {travelled}", layer.name);
            let one = decode::layer(&batch, i, FloatType::F32);
            if layer.data.is_none() {
                says(one, &["Layer 'null' (row 7): it has no data: Layer 'null' contains NaN"]);
                continue;
            }
            let one = one.unwrap();
            assert_eq!(
                (one.name.as_str(), f32_values(&one.values), one.shape),
                (layer.name, layer.want.clone(), layer.shape.clone())
            );
            let half = decode::layer(&batch, i, FloatType::F16).unwrap();
            let want: Vec<u8> = layer.want.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
            assert_eq!(half.values.as_slice(), want);
        }
        let some = ["flat".to_owned(), "groups".to_owned()];
        let (_, chosen) = decode::table(&schema, &parts, Some(&some), FloatType::F32).unwrap();
        assert_eq!(chosen.iter().map(RecordBatch::num_rows).collect::<Vec<_>>(), [1, 0, 1]);
        assert_eq!(weights(&chosen[2], 0), Some(layers[4].want.clone()));
        says(
            decode::table(&schema, &parts, Some(&["q".to_owned()]), FloatType::F32),
            &["there is no layer 'q'"],
        );
        says(decode::layer(&batch, 8, FloatType::F32), &["there is no row 8 in 8 layers"]);
    }
}

#[test]
fn layers_that_do_not_fit_together_are_named() {
    let change = |f: fn(&mut Layer)| {
        let mut layers = layers();
        f(&mut layers[1]);
        let batch = layers_batch(&layers, false);
        decode::table(&batch.schema(), &[batch.slice(0, 1), batch.slice(1, 2)], None, FloatType::F32)
    };
    says(change(|l| l.scales.truncate(3)), &["Layer 'groups' (row 1): 3 scales, 14 are needed"]);
    says(change(|l| l.zeros.truncate(3)), &["3 zero points for 14 scales"]);
    says(change(|l| l.zeros.clear()), &["uint4 with 0 zero points"]);
    says(change(|l| l.data = Some(vec![0; 5])), &["5 bytes of codes, 39 are needed"]);
    says(change(|l| l.shape = vec![-1, 77]), &["its shape is [-1, 77]"]);
    says(change(|l| l.shape = vec![1 << 40, 1 << 40]), &["its shape is"]);
    says(change(|l| l.scheme = "nf4"), &["unknown scheme \"nf4\""]);
    says(change(|l| l.packing = "msb"), &["packing msb is not known"]);
    says(change(|l| l.group_size = -7), &["its group_size is"]);
    let batch = layers_batch(&layers(), false);
    let without = batch.project(&[0, 1, 2, 3, 4, 5, 7]).unwrap();
    says(
        decode::table(&without.schema(), &[without], None, FloatType::F32),
        &["Missing required column 'packing'"],
    );
    let large: ArrayRef = Arc::new(LargeBinaryArray::from_iter_values(
        layers().iter().map(|l| l.data.clone().unwrap_or_default()),
    ));
    let (schema, batch) = replace(&batch, "quantized_data", large);
    assert!(decode::table(&schema, &[batch.slice(0, 7)], None, FloatType::F64).is_ok());
    let params = decode::params(&schema, &[batch.slice(0, 1)]).unwrap();
    assert_eq!((params.scheme(), params.get("rows").unwrap().scales.len()), (Scheme::Int8, 12));
    says(decode::params(&schema, &[batch.slice(1, 1)]), &["Layer 'groups' has ranges of groups"]);
}
