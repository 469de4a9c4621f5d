//! Vector and plain columns, compared with the kernels called on whole items.
#![allow(clippy::expect_used, clippy::panic, reason = "a failed expectation is how a test reports")]

mod tables;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Int8Type, UInt8Type, UInt64Type};
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use shmquant_kernels::{FloatType, Granularity, OnNonFinite, Scheme, Values};
use shmquant_protocol::descriptor::{Params, Role, Spec, params_id};
use shmquant_protocol::message::ErrorCode;
use shmquant_protocol::meta::{self, CodesMeta, ParamSource};
use tables::{Table, expected, layout, numbers, spec, to_bytes};

/// Codes of a vector column, row by row.
fn vectors(batch: &RecordBatch, name: &str) -> Vec<u8> {
    let list = batch[name].as_fixed_size_list();
    match list.values().data_type() {
        DataType::Int8 => {
            list.values().as_primitive::<Int8Type>().values().iter().map(|c| *c as u8).collect()
        }
        _ => list.values().as_primitive::<UInt8Type>().values().to_vec(),
    }
}

fn small_ints(array: &dyn Array) -> Vec<f32> {
    match array.data_type() {
        DataType::FixedSizeList(..) => small_ints(array.as_fixed_size_list().values()),
        DataType::Int8 => array.as_primitive::<Int8Type>().values().iter().map(|z| f32::from(*z)).collect(),
        _ => array.as_primitive::<UInt8Type>().values().iter().map(|z| f32::from(*z)).collect(),
    }
}

fn codes_meta(batch: &RecordBatch, name: &str) -> CodesMeta {
    let schema = batch.schema();
    let field = schema.field_with_name(name).expect("a column");
    assert_eq!(
        field.metadata().get(meta::EXTENSION_NAME_KEY).map(String::as_str),
        Some(meta::EXTENSION_NAME)
    );
    let text = field.metadata().get(meta::EXTENSION_METADATA_KEY).expect("extension metadata");
    CodesMeta::from_json(text).expect("our metadata")
}

#[test]
fn vectors_hold_what_the_kernels_make() {
    // Few long rows (cut inside rows), many short ones of odd length, one row.
    for (rows, k) in [(2u64, 300_001u64), (3000, 101), (1, 5), (0, 8), (700, 768)] {
        for scheme in [Scheme::Int8, Scheme::UInt8, Scheme::UInt4, Scheme::Int2] {
            let mut table = Table::columns(rows);
            let bytes = to_bytes(&numbers((rows * k) as usize, k), FloatType::F32);
            let all = [
                ("row", spec(scheme, Granularity::Row, 0)),
                ("group", spec(scheme, Granularity::Group, 100)),
                ("tensor", spec(scheme, Granularity::Tensor, 0)),
                ("dimension", spec(scheme, Granularity::Dimension, 0)),
            ];
            for (name, spec) in all {
                table.column(name, spec, FloatType::F32, Role::Vector, k, None, bytes.clone());
            }
            let batch = table.result().expect("a result").batch();
            assert_eq!(batch.num_rows() as u64, rows);
            for (name, spec) in all {
                let affine = spec.affine.expect("quantized");
                let layout = layout(rows, k, &spec, true);
                let (codes, scales, zeros) =
                    expected(&bytes, FloatType::F32, &layout, &affine, OnNonFinite::Error);
                let context = format!("{rows} x {k} {scheme} {name}");
                assert!(vectors(&batch, name) == codes, "{context}: codes");
                let m = codes_meta(&batch, name);
                assert_eq!(
                    (m.scheme.as_str(), m.dim, m.granularity.as_str()),
                    (scheme.name(), Some(k), name)
                );
                let asymmetric = !scheme.signed();
                let mut params = None;
                if let Some(text) = &m.params_b64 {
                    let got = meta::decode_f32(&text.scale).expect("base64");
                    // Without rows there is no range; a parameter is 1.
                    assert!(got == scales, "{context}: scales");
                    assert_eq!(text.zero_point.is_some(), asymmetric);
                    if let Some(text) = &text.zero_point {
                        assert!(meta::decode_f32(text).expect("base64") == zeros, "{context}: zero points");
                    }
                    let ints: Vec<i32> = zeros.iter().map(|z| *z as i32).collect();
                    params = Some(params_id(&scales, &ints));
                } else {
                    assert_eq!(m.scale, ParamSource::Column(format!("{name}_scale")));
                    let column = &batch[format!("{name}_scale").as_str()];
                    let got = match column.data_type() {
                        DataType::FixedSizeList(_, n) => {
                            assert_eq!((name, *n as u64), ("group", k.div_ceil(100)));
                            column.as_fixed_size_list().values().as_primitive::<Float32Type>().values()
                        }
                        _ => column.as_primitive::<Float32Type>().values(),
                    };
                    assert!(got[..] == scales, "{context}: scales");
                    match batch.column_by_name(&format!("{name}_zero_point")) {
                        Some(column) => {
                            assert!(asymmetric);
                            assert!(small_ints(column) == zeros, "{context}: zero points");
                        }
                        None => assert_eq!(m.zero_point, ParamSource::Const(0)),
                    }
                }
                // Eight bits with a range a row are all that a type describes in full.
                if name == "row" && affine.bits == 8 {
                    assert!(m.params_id.is_none() && batch.column_by_name("row_params_id").is_none());
                    continue;
                }
                let id = meta::facts_id(&spec, Some(k), params);
                assert_eq!(m.params_id, Some(format!("{id:016x}")), "{context}");
                let column = batch[format!("{name}_params_id").as_str()].as_dictionary::<Int8Type>();
                assert_eq!(column.values().as_primitive::<UInt64Type>().values(), &[id], "{context}");
                assert!(column.keys().values().iter().all(|i| *i == 0));
            }
        }
    }
}

#[test]
fn null_rows_and_rows_with_nan_are_null_in_every_part() {
    let rows = 1003usize;
    let k = 12;
    let nulls: Vec<bool> = (0..rows).map(|i| i % 7 == 3).collect();
    let mut data = numbers(rows * k, 9);
    for (i, row) in data.chunks_mut(k).enumerate() {
        if nulls[i] {
            row.fill(0.0);
        }
    }
    for i in [0, 500, 1002] {
        data[i * k + 4] = f32::NAN;
    }
    for granularity in Granularity::ALL {
        let group = if granularity == Granularity::Group { 5 } else { 0 };
        let spec = Spec { on_nonfinite: OnNonFinite::Null, ..spec(Scheme::UInt4, granularity, group) };
        let mut table = Table::columns(rows as u64);
        let bytes = to_bytes(&data, FloatType::F32);
        table.column("v", spec, FloatType::F32, Role::Vector, k as u64, Some(&nulls), bytes.clone());
        table.column("w", spec, FloatType::F32, Role::Vector, k as u64, None, bytes.clone());
        let done = table.result().expect("a result");
        let batch = done.batch();
        let policy = |i: usize| [0, 500, 1002].contains(&i);
        for (i, null) in nulls.iter().enumerate() {
            let null = *null || policy(i);
            assert_eq!(batch["v"].is_null(i), null, "row {i}");
            assert_eq!(batch["w"].is_null(i), policy(i));
            for part in ["v_scale", "v_zero_point"] {
                if let Some(column) = batch.column_by_name(part) {
                    assert_eq!(column.is_null(i), null, "{part} row {i}");
                }
            }
        }
        let dropped = (0..rows).filter(|i| policy(*i) && !nulls[*i]).count() as u64;
        assert_eq!((done.report(0).0[4], done.report(1).0[4]), (dropped, 3));
        let affine = spec.affine.expect("quantized");
        let (codes, ..) = expected(
            &bytes,
            FloatType::F32,
            &layout(rows as u64, k as u64, &spec, true),
            &affine,
            OnNonFinite::Null,
        );
        assert!(vectors(&batch, "v") == codes);
    }
    // A bitmap that says something else than the descriptor.
    let mut table = Table::columns(rows as u64);
    let int8 = spec(Scheme::Int8, Granularity::Row, 0);
    table.column("v", int8, FloatType::F32, Role::Vector, k as u64, Some(&nulls), vec![0; rows * k * 4]);
    table.streams[0][0][0] ^= 1;
    let failure = table.result().err().expect("a wrong null count");
    assert_eq!((failure.code, failure.column.as_str()), (ErrorCode::InvalidInput, "v"));
}

#[test]
fn faults_of_columns_name_row_and_index() {
    let mut data = numbers(800 * 700, 4);
    data[3 * 700 + 7] = f32::NEG_INFINITY;
    data[3 * 700 + 8] = f32::NAN;
    data[700 * 700] = f32::NAN;
    for granularity in [Granularity::Row, Granularity::Dimension] {
        let mut table = Table::columns(800);
        let spec = spec(Scheme::Int8, granularity, 0);
        table.column("emb", spec, FloatType::F32, Role::Vector, 700, None, to_bytes(&data, FloatType::F32));
        let failure = table.result().err().expect("NaN is refused");
        assert_eq!(
            failure.message,
            "column 'emb' row 3 contains NaN or Inf at index 7 (3 in all, the first is -inf)"
        );
        assert_eq!((failure.row, failure.index, failure.count), (3, 7, 3));
        assert_eq!(failure.value, f64::NEG_INFINITY);
    }
}

#[test]
fn plain_columns_are_constant_in_their_parameters() {
    for (rows, scheme) in [(400_001usize, Scheme::UInt8), (5, Scheme::Int8), (0, Scheme::UInt4)] {
        let nulls: Vec<bool> = (0..rows).map(|i| i % 5 == 0).collect();
        let mut data = numbers(rows, 8);
        for (i, v) in data.iter_mut().enumerate().filter(|(i, _)| nulls[*i]) {
            *v = 0.0;
            let _ = i;
        }
        if rows > 0 {
            data[1] = f32::NAN;
        }
        let spec = Spec { on_nonfinite: OnNonFinite::Null, ..spec(scheme, Granularity::Tensor, 0) };
        let mut table = Table::columns(rows as u64);
        let bytes = to_bytes(&data, FloatType::F32);
        table.column("p", spec, FloatType::F32, Role::Plain, 1, Some(&nulls), bytes.clone());
        let done = table.result().expect("a result");
        let batch = done.batch();
        let affine = spec.affine.expect("quantized");
        let (codes, scales, zeros) = expected(
            &bytes,
            FloatType::F32,
            &layout(rows as u64, 1, &spec, true),
            &affine,
            OnNonFinite::Null,
        );
        let got: Vec<u8> = small_ints(&batch["p"]).iter().map(|c| *c as i32 as u8).collect();
        assert!(got == codes);
        for name in ["p", "p_scale", "p_zero_point"] {
            assert!((0..rows).all(|i| batch[name].is_null(i) == (nulls[i] || i == 1)), "{name}");
        }
        let scale = batch["p_scale"].as_dictionary::<Int8Type>();
        assert_eq!(scale.values().as_primitive::<Float32Type>().values()[..], scales);
        let zero = batch["p_zero_point"].as_dictionary::<Int8Type>();
        assert_eq!(small_ints(zero.values()), zeros);
        assert_eq!(codes_meta(&batch, "p").dim, None);
    }
}

#[test]
fn given_parameters_are_used_and_told() {
    let rows = 600u64;
    let k = 500u64;
    let data = numbers((rows * k) as usize, 12);
    let bytes = to_bytes(&data, FloatType::F32);
    for granularity in [Granularity::Tensor, Granularity::Row, Granularity::Dimension] {
        let mut table = Table::columns(rows);
        let spec = spec(Scheme::UInt8, granularity, 0);
        table.column("v", spec, FloatType::F32, Role::Vector, k, None, bytes.clone());
        let layout = layout(rows, k, &spec, true);
        let n = layout.n_params() as usize;
        let scales: Vec<f32> = (0..n).map(|i| 0.01 + i as f32 * 1e-5).collect();
        let zero_points: Vec<i32> = (0..n).map(|i| 100 + (i % 50) as i32).collect();
        let id = params_id(&scales, &zero_points);
        table.values(0).params =
            Some(Params { id, scales: scales.clone(), zero_points: zero_points.clone() });
        let batch = table.result().expect("a result").batch();
        let affine = spec.affine.expect("quantized");
        let mut codes = vec![0; (rows * k) as usize];
        let values = Values::from_f32(&data);
        shmquant_kernels::encode(
            values,
            0,
            &layout,
            &affine,
            OnNonFinite::Error,
            &scales,
            &zero_points[..],
            &mut codes,
            &mut Vec::new(),
        )
        .expect("good values");
        assert!(vectors(&batch, "v") == codes, "{granularity}");
        if granularity == Granularity::Row {
            assert_eq!(batch["v_scale"].as_primitive::<Float32Type>().values()[..], scales);
            let zeros: Vec<f32> = zero_points.iter().map(|z| *z as f32).collect();
            assert_eq!(small_ints(&batch["v_zero_point"]), zeros);
        } else {
            let text = codes_meta(&batch, "v").params_b64.expect("parameters");
            assert_eq!(meta::decode_f32(&text.scale), Some(scales));
        }
    }
}
