//! Columns of codes made by the kernels are decoded again, also after they have travelled.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests report by panicking"
)]

mod tables;

use std::slice::from_ref;
use std::sync::Arc;

use arrow_array::types::Int8Type;
use arrow_array::{
    Array, ArrayRef, DictionaryArray, FixedSizeListArray, Float16Array, Float32Array, Float64Array,
    Int8Array, Int32Array, Int64Array, LargeListArray, ListArray, RecordBatch, UInt8Array, UInt64Array,
};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use half::f16;
use shmquant_kernels::{FloatType, Granularity, Layout, OnNonFinite, Scheme};
use shmquant_protocol::decode::{self, DecodeError};
use shmquant_protocol::descriptor::{Role, Spec, params_id};
use shmquant_protocol::meta::{
    CodesMeta, Companion, EXTENSION_METADATA_KEY, EXTENSION_NAME, EXTENSION_NAME_KEY, ParamSource,
    ParamsBase64, companions, encode_f32, facts_id,
};
use tables::kernels::{Quantized, quantize, wave};
use tables::{nulls, replace, says};

fn vector_layout(rows: usize, k: usize, granularity: Granularity, group: u64, packed: bool) -> Layout {
    Layout { rows: rows as u64, k: k as u64, group, granularity, pad_rows: true, packed }
}

fn list(values: ArrayRef, width: usize, nulls: Option<NullBuffer>, rows: usize) -> ArrayRef {
    let field = Arc::new(Field::new("item", values.data_type().clone(), true));
    Arc::new(FixedSizeListArray::try_new_with_length(field, width as i32, values, nulls, rows).unwrap())
}

/// A result of one vector column `emb`, as a daemon lays it out.
fn result(q: &Quantized, valid: Option<NullBuffer>) -> (SchemaRef, RecordBatch) {
    let rows = q.layout.rows as usize;
    let width = q.layout.row_bytes(q.affine.bits) as usize;
    let shared = matches!(q.layout.granularity, Granularity::Tensor | Granularity::Dimension);
    let zeros: Vec<i32> = q.zeros.iter().map(|z| *z as i32).collect();
    let spec = Spec {
        affine: Some(q.affine),
        granularity: q.layout.granularity,
        on_nonfinite: OnNonFinite::Error,
        packed: q.layout.packed,
        group_size: q.layout.group as u32,
    };
    let marked = companions(Role::Vector, &spec).contains(&Companion::ParamsId);
    let id = facts_id(&spec, Some(q.layout.k), shared.then(|| params_id(&q.scales, &zeros)));
    let source = |key: &str| match shared {
        true => ParamSource::Params(key.to_owned()),
        false => ParamSource::Column(format!("emb_{key}")),
    };
    let meta = CodesMeta {
        v: 1,
        scheme: q.affine.scheme.to_string(),
        kind: "affine".to_owned(),
        mapping: q.affine.mapping.to_string(),
        granularity: q.layout.granularity.to_string(),
        dim: Some(q.layout.k),
        group_size: (q.layout.group > 0).then_some(q.layout.group),
        qmin: q.affine.qmin,
        qmax: q.affine.qmax,
        packing: if q.layout.packed { "lsb" } else { "none" }.to_owned(),
        scale: source("scale"),
        zero_point: if q.asymmetric() { source("zero_point") } else { ParamSource::Const(0) },
        params_id: marked.then(|| format!("{id:016x}")),
        params_b64: shared.then(|| ParamsBase64 {
            scale: encode_f32(q.scales.iter().copied()),
            zero_point: q.asymmetric().then(|| encode_f32(q.zeros.iter().copied())),
        }),
        src_dtype: "float32".to_owned(),
        decode: "(q-zp)*scale".to_owned(),
    };
    let codes: ArrayRef = match q.affine.signed && !q.layout.packed {
        true => Arc::new(Int8Array::from(q.codes.iter().map(|c| *c as i8).collect::<Vec<_>>())),
        false => Arc::new(UInt8Array::from(q.codes.clone())),
    };
    let mut columns = vec![("emb".to_owned(), list(codes, width, valid.clone(), rows))];
    if !shared {
        let groups = q.layout.groups_per_row() as usize;
        let grouped = q.layout.granularity == Granularity::Group;
        let scales = Float32Array::new(q.scales.clone().into(), valid.clone().filter(|_| !grouped));
        let scales: ArrayRef = Arc::new(scales);
        let scales = if grouped { list(scales, groups, valid.clone(), rows) } else { scales };
        columns.push(("emb_scale".to_owned(), scales));
        if q.asymmetric() {
            let zeros: ArrayRef = match q.affine.signed {
                true => Arc::new(Int8Array::from(zeros.iter().map(|z| *z as i8).collect::<Vec<_>>())),
                false => Arc::new(UInt8Array::from(zeros.iter().map(|z| *z as u8).collect::<Vec<_>>())),
            };
            columns.push((
                "emb_zero_point".to_owned(),
                if grouped { list(zeros, groups, valid, rows) } else { zeros },
            ));
        }
    }
    if marked {
        let ids =
            DictionaryArray::<Int8Type>::new(vec![0i8; rows].into(), Arc::new(UInt64Array::from(vec![id])));
        columns.push(("emb_params_id".to_owned(), Arc::new(ids)));
    }
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows as i64));
    columns.push(("id".to_owned(), ids));
    let fields: Vec<Field> = columns
        .iter()
        .map(|(name, array)| match name.as_str() {
            "emb" => Field::new(name, array.data_type().clone(), true).with_metadata([
                (EXTENSION_NAME_KEY.to_owned(), EXTENSION_NAME.to_owned()),
                (EXTENSION_METADATA_KEY.to_owned(), meta.to_json()),
            ]),
            _ => Field::new(name, array.data_type().clone(), true),
        })
        .collect();
    let schema = Arc::new(Schema::new(fields));
    let arrays = columns.into_iter().map(|(_, array)| array).collect();
    (schema.clone(), RecordBatch::try_new(schema, arrays).unwrap())
}

fn decoded(schema: &SchemaRef, batches: &[RecordBatch]) -> Vec<f32> {
    let (_, out) = decode::table(schema, batches, None, FloatType::F32).unwrap();
    let column = |b: &RecordBatch| {
        let list = b.column_by_name("emb").unwrap();
        let list = list.as_any().downcast_ref::<FixedSizeListArray>().unwrap();
        list.values().as_any().downcast_ref::<Float32Array>().unwrap().values().to_vec()
    };
    out.iter().flat_map(column).collect()
}

/// A fixed-size list as a list or a large list, null rows empty, as other libraries hand them back.
fn as_list(array: &ArrayRef, large: bool) -> ArrayRef {
    let fixed = array.as_any().downcast_ref::<FixedSizeListArray>().unwrap();
    let lens: Vec<usize> =
        (0..fixed.len()).map(|r| if fixed.is_valid(r) { fixed.value_length() as usize } else { 0 }).collect();
    let rows: Vec<ArrayRef> =
        (0..fixed.len()).filter(|r| fixed.is_valid(*r)).map(|r| fixed.value(r)).collect();
    let rows: Vec<&dyn Array> = rows.iter().map(AsRef::as_ref).collect();
    let values = arrow_select::concat::concat(&rows).unwrap();
    let field = Arc::new(Field::new("item", values.data_type().clone(), true));
    match large {
        true => Arc::new(LargeListArray::new(
            field,
            OffsetBuffer::from_lengths(lens),
            values,
            fixed.nulls().cloned(),
        )),
        false => {
            Arc::new(ListArray::new(field, OffsetBuffer::from_lengths(lens), values, fixed.nulls().cloned()))
        }
    }
}

#[test]
fn vectors_of_every_scheme_and_granularity_come_back() {
    let (rows, k) = (37, 13);
    let values = wave(rows * k);
    for scheme in Scheme::ALL {
        for (granularity, group) in [
            (Granularity::Row, 0),
            (Granularity::Group, 4),
            (Granularity::Tensor, 0),
            (Granularity::Dimension, 0),
        ] {
            for packed in [false, true] {
                let packed = packed && scheme.bits() < 8;
                let q = quantize(&values, scheme, vector_layout(rows, k, granularity, group, packed));
                let (schema, batch) = result(&q, None);
                let want = q.naive();
                assert_eq!(decoded(&schema, from_ref(&batch)), want, "{scheme} {granularity} {packed}");
                // In slices, joined again, and through lists without a fixed size.
                let parts = [batch.slice(0, 9), batch.slice(9, 0), batch.slice(9, 28)];
                assert_eq!(decoded(&schema, &parts), want, "{scheme} {granularity} {packed}");
                for large in [false, true] {
                    let (schema, batch) = replace(&batch, "emb", as_list(batch.column(0), large));
                    assert_eq!(decoded(&schema, &[batch.slice(0, 20), batch.slice(20, 17)]), want);
                }
                let (out, _) = decode::table(&schema, &parts, None, FloatType::F32).unwrap();
                let names: Vec<&str> = out.fields().iter().map(|f| f.name().as_str()).collect();
                assert_eq!(names, ["emb", "id"]);
                assert!(out.field(0).metadata().get(EXTENSION_NAME_KEY).is_none());
            }
        }
    }
}

#[test]
fn null_rows_stay_null_with_zeros_below() {
    let valid = nulls(6, |row| row % 2 == 0);
    for (granularity, group) in [(Granularity::Row, 0), (Granularity::Group, 2), (Granularity::Tensor, 0)] {
        let q = quantize(&wave(18), Scheme::UInt4, vector_layout(6, 3, granularity, group, true));
        let (schema, batch) = result(&q, valid.clone());
        let mut want = q.naive();
        (0..18).filter(|i| (i / 3) % 2 == 1).for_each(|i| want[i] = 0.0);
        assert_eq!(decoded(&schema, from_ref(&batch)), want, "{granularity}");
        let (schema, lists) = replace(&batch, "emb", as_list(batch.column(0), false));
        assert_eq!(decoded(&schema, &[lists.slice(0, 3), lists.slice(3, 3)]), want, "{granularity}");
        let (_, out) = decode::table(&schema, &[lists], None, FloatType::F32).unwrap();
        assert_eq!(out[0].column(0).nulls(), valid.as_ref());
        // A slice that holds nothing but nulls.
        let (schema, lists) = replace(&batch, "emb", as_list(batch.column(0), true));
        assert_eq!(decoded(&schema, &[lists.slice(1, 1)]), [0.0; 3]);
    }
}

#[test]
fn values_come_as_the_type_that_is_asked_for() {
    // More than one block of the conversion, with rows that do not divide it.
    let (rows, k) = (3000, 77);
    let q = quantize(&wave(rows * k), Scheme::Int4, vector_layout(rows, k, Granularity::Group, 32, true));
    let (schema, batch) = result(&q, None);
    let want = q.naive();
    let read = |dtype| {
        let (_, out) = decode::table(&schema, from_ref(&batch), None, dtype).unwrap();
        out[0].column(0).as_any().downcast_ref::<FixedSizeListArray>().unwrap().values().clone()
    };
    let double = read(FloatType::F64);
    let double = double.as_any().downcast_ref::<Float64Array>().unwrap();
    assert!(double.values().iter().zip(&want).all(|(a, b)| *a == f64::from(*b)));
    let half = read(FloatType::F16);
    let half = half.as_any().downcast_ref::<Float16Array>().unwrap();
    assert!(half.values().iter().zip(&want).all(|(a, b)| *a == f16::from_f32(*b)));
    says(
        decode::table(&schema, &[batch], None, FloatType::Bf16),
        &["Arrow has no type for bfloat16", "hint:"],
    );
}

#[test]
fn joined_results_with_other_ranges_are_refused() {
    let make = |factor: f32, granularity| {
        let values: Vec<f32> = wave(12).iter().map(|v| v * factor).collect();
        result(&quantize(&values, Scheme::UInt8, vector_layout(4, 3, granularity, 0, false)), None)
    };
    for granularity in [Granularity::Tensor, Granularity::Dimension] {
        let ((schema, one), (_, two)) = (make(1.0, granularity), make(2.0, granularity));
        // As pyarrow joins them: under the first one's metadata.
        let joined = [one.clone(), RecordBatch::try_new(schema.clone(), two.columns().to_vec()).unwrap()];
        let error = decode::table(&schema, &joined, None, FloatType::F32).unwrap_err();
        assert!(matches!(error, DecodeError::Mixed(_)));
        assert_eq!(error.details().row, Some(4));
        says(
            Err::<(), _>(error),
            &[
                "column 'emb' row 4 was quantized with the parameters",
                "tables with different specs or ranges were joined",
                "hint: dequantize each",
            ],
        );
        // The same ranges do join, also where the dictionary became plain.
        assert_eq!(decoded(&schema, &[one.clone(), one.clone()]).len(), 24);
        let ids = one.column(1).as_any().downcast_ref::<DictionaryArray<Int8Type>>().unwrap();
        let id = ids.values().as_any().downcast_ref::<UInt64Array>().unwrap().value(0);
        let (schema, plain) = replace(&one, "emb_params_id", Arc::new(UInt64Array::from(vec![id; 4])));
        assert_eq!(decoded(&schema, from_ref(&plain)), decoded(&make(1.0, granularity).0, from_ref(&one)));
        let (schema, wrong) =
            replace(&plain, "emb_params_id", Arc::new(UInt64Array::from(vec![id, id, 7, id])));
        says(
            decode::table(&schema, &[wrong], None, FloatType::F32),
            &["row 2 was quantized with the parameters 0000000000000007"],
        );
        let without = one.project(&[0, 2]).unwrap();
        says(
            decode::table(&without.schema(), &[without], None, FloatType::F32),
            &["column 'emb' needs its parameters: there is no column 'emb_params_id'"],
        );
    }
    // Ranges of rows travel with the rows.
    let ((schema, one), (_, two)) = (make(1.0, Granularity::Row), make(2.0, Granularity::Row));
    let joined = [one.clone(), RecordBatch::try_new(schema.clone(), two.columns().to_vec()).unwrap()];
    let (a, b) = (decoded(&schema, &[one]), decoded(&schema, &[two]));
    assert_eq!(decoded(&schema, &joined), [a, b].concat());
}

/// Rows of one Arrow type that mean different things, each as (scheme, dimension, granularity, group, packed).
type Made = (Scheme, usize, Granularity, u64, bool);

fn made((scheme, k, granularity, group, packed): Made) -> (SchemaRef, RecordBatch) {
    result(&quantize(&wave(4 * k), scheme, vector_layout(4, k, granularity, group, packed)), None)
}

#[test]
fn joined_results_of_other_specs_are_refused() {
    use Granularity::{Group, Row, Tensor};
    let pairs: [(Made, Made); 6] = [
        ((Scheme::UInt4, 16, Group, 8, true), (Scheme::UInt4, 16, Group, 12, true)),
        ((Scheme::Int8, 16, Group, 8, false), (Scheme::Int8, 16, Group, 10, false)),
        ((Scheme::UInt4, 15, Row, 0, true), (Scheme::UInt4, 16, Row, 0, true)),
        ((Scheme::UInt4, 16, Row, 0, true), (Scheme::UInt2, 32, Row, 0, true)),
        ((Scheme::Int4, 16, Group, 8, true), (Scheme::Int2, 32, Group, 16, true)),
        ((Scheme::UInt4, 15, Tensor, 0, true), (Scheme::UInt4, 16, Tensor, 0, true)),
    ];
    for (one, two) in pairs.into_iter().flat_map(|(a, b)| [(a, b), (b, a)]) {
        let ((schema, first), (_, second)) = (made(one), made(two));
        // Their types alone let them be joined.
        let second = RecordBatch::try_new(schema.clone(), second.columns().to_vec()).unwrap();
        let error = decode::table(&schema, &[first.clone(), second], None, FloatType::F32).unwrap_err();
        assert!(matches!(error, DecodeError::Mixed(_)), "{one:?} {two:?}: {error}");
        assert_eq!(error.details().row, Some(4));
        says(Err::<(), _>(error), &["tables with different specs or ranges were joined"]);
        // Two of one spec, whatever their ranges, are one table.
        if one.2 != Tensor {
            let (_, more) = result(
                &quantize(&vec![0.5; 4 * one.1], one.0, vector_layout(4, one.1, one.2, one.3, one.4)),
                None,
            );
            let want = [decoded(&schema, from_ref(&first)), decoded(&schema, from_ref(&more))].concat();
            assert_eq!(decoded(&schema, &[first, more]), want);
        }
    }
}

#[test]
fn tables_joined_by_the_union_of_their_columns_are_refused() {
    use Granularity::Row;
    // 8 codes of a byte each and 16 in 8 bytes: the first has no ids, and nothing in its metadata asks for them.
    let ((schema, bytes), (_, nibbles)) =
        (made((Scheme::UInt8, 8, Row, 0, false)), made((Scheme::UInt4, 16, Row, 0, true)));
    let ids = nibbles.column_by_name("emb_params_id").unwrap().clone();
    let wide = |batch: &RecordBatch, ids: ArrayRef| {
        let mut fields = schema.fields().to_vec();
        fields.push(Arc::new(Field::new("emb_params_id", ids.data_type().clone(), true)));
        let mut columns: Vec<ArrayRef> =
            schema.fields().iter().map(|f| batch.column_by_name(f.name()).unwrap().clone()).collect();
        columns.push(ids);
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
    };
    let (first, second) =
        (wide(&bytes, arrow_array::new_null_array(ids.data_type(), 4)), wide(&nibbles, ids));
    assert_eq!(decoded(&first.schema(), from_ref(&first)), decoded(&schema, &[bytes]));
    let error = decode::table(&first.schema(), &[first.clone(), second], None, FloatType::F32).unwrap_err();
    assert_eq!(error.details().row, Some(4));
    says(
        Err::<(), _>(error),
        &["row 4 has a 'emb_params_id', of which the metadata say nothing", "different specs"],
    );
}

#[test]
fn renamed_codes_still_find_what_was_named_after_them() {
    let (schema, batch) = made((Scheme::UInt4, 16, Granularity::Group, 8, true));
    let want = decoded(&schema, from_ref(&batch));
    let fields: Vec<Field> = schema
        .fields()
        .iter()
        .map(|f| match f.name().as_str() {
            "emb" => f.as_ref().clone().with_name("vector"),
            _ => f.as_ref().clone(),
        })
        .collect();
    let renamed = Arc::new(Schema::new(fields));
    let batch = RecordBatch::try_new(renamed.clone(), batch.columns().to_vec()).unwrap();
    let (out, batches) = decode::table(&renamed, &[batch], None, FloatType::F32).unwrap();
    assert_eq!(out.fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>(), ["vector", "id"]);
    let list = batches[0].column(0).as_any().downcast_ref::<FixedSizeListArray>().unwrap();
    assert_eq!(list.values().as_any().downcast_ref::<Float32Array>().unwrap().values()[..], want);
}

#[test]
fn plain_columns_decode_row_by_row() {
    let q = quantize(&wave(5), Scheme::UInt8, vector_layout(5, 1, Granularity::Tensor, 0, false));
    let meta = CodesMeta::from_json(&result(&q, None).0.field(0).metadata()[EXTENSION_METADATA_KEY]).unwrap();
    let meta = CodesMeta {
        dim: None,
        scale: ParamSource::Column("p_scale".to_owned()),
        zero_point: ParamSource::Column("p_zero_point".to_owned()),
        params_id: None,
        params_b64: None,
        ..meta
    };
    let metadata =
        [(EXTENSION_NAME_KEY, EXTENSION_NAME.to_owned()), (EXTENSION_METADATA_KEY, meta.to_json())]
            .map(|(k, v)| (k.to_owned(), v));
    let codes: ArrayRef = Arc::new(UInt8Array::new(q.codes.clone().into(), nulls(5, |i| i != 3)));
    let keys = || vec![0i8; 5].into();
    let scale: ArrayRef =
        Arc::new(DictionaryArray::<Int8Type>::new(keys(), Arc::new(Float32Array::from(q.scales.clone()))));
    let zero = UInt8Array::from(vec![q.zeros[0] as u8]);
    let zero: ArrayRef = Arc::new(DictionaryArray::<Int8Type>::new(keys(), Arc::new(zero)));
    let batch = |scale: ArrayRef, zero: ArrayRef| {
        let fields = vec![
            Field::new("p", DataType::UInt8, true).with_metadata(metadata.clone()),
            Field::new("p_scale", scale.data_type().clone(), true),
            Field::new("p_zero_point", zero.data_type().clone(), true),
        ];
        RecordBatch::try_new(Arc::new(Schema::new(fields)), vec![codes.clone(), scale, zero]).unwrap()
    };
    let read = |batch: RecordBatch| {
        let (schema, out) =
            decode::table(&batch.schema(), &[batch.slice(0, 2), batch.slice(2, 3)], None, FloatType::F32)?;
        assert_eq!(schema.fields().len(), 1);
        let values = |b: &RecordBatch| {
            b.column(0).as_any().downcast_ref::<Float32Array>().unwrap().iter().collect::<Vec<_>>()
        };
        Ok::<_, DecodeError>(out.iter().flat_map(values).collect::<Vec<_>>())
    };
    let want: Vec<Option<f32>> =
        q.naive().into_iter().enumerate().map(|(i, v)| (i != 3).then_some(v)).collect();
    assert_eq!(read(batch(scale.clone(), zero.clone())).unwrap(), want);
    // Two results joined: each row has the scale it was made with.
    let s = q.scales[0];
    let joined: ArrayRef = Arc::new(Float32Array::from(vec![Some(s), Some(s), Some(2.0 * s), None, Some(s)]));
    let mut twice = want.clone();
    twice[2] = want[2].map(|v| v * 2.0);
    assert_eq!(read(batch(joined, zero.clone())).unwrap(), twice);
    let holes: ArrayRef = Arc::new(Float32Array::from(vec![Some(s), None, Some(s), None, Some(s)]));
    says(read(batch(holes, zero)), &["column 'p_scale' is null at row 1, where 'p' is not"]);
    let params = decode::params(
        &batch(scale.clone(), Arc::new(Int32Array::from(vec![q.zeros[0] as i32; 5]))).schema(),
        &[],
    );
    says(params, &["every row of this result has ranges of its own"]);
}

#[test]
fn params_of_a_result_quantize_other_tables() {
    let q = quantize(&wave(12), Scheme::UInt8, vector_layout(4, 3, Granularity::Dimension, 0, false));
    let (schema, batch) = result(&q, None);
    let params = decode::params(&schema, &[batch]).unwrap();
    assert_eq!((params.scheme(), params.granularity()), (Scheme::UInt8, Granularity::Dimension));
    assert_eq!(params.get("emb").unwrap().scales, q.scales);
    let q = quantize(&wave(12), Scheme::Int8, vector_layout(4, 3, Granularity::Row, 0, false));
    let (schema, batch) = result(&q, None);
    says(decode::params(&schema, &[batch]), &["every row of this result has ranges of its own", "hint:"]);
}

#[test]
fn what_is_no_result_is_said_to_be_none() {
    let q = quantize(&wave(12), Scheme::Int8, vector_layout(4, 3, Granularity::Row, 0, false));
    let (schema, batch) = result(&q, None);
    let names = |n: &str| vec![n.to_owned()];
    let table = |names: &[String]| decode::table(&schema, from_ref(&batch), Some(names), FloatType::F32);
    says(table(&names("embb")), &["there is no column 'embb'", "emb, emb_scale, id"]);
    says(table(&names("id")), &["column 'id' holds no shmquant.codes", "hint:"]);
    assert!(table(&names("emb")).is_ok());
    let bare: Vec<Field> =
        schema.fields().iter().map(|f| Field::new(f.name(), f.data_type().clone(), true)).collect();
    says(
        decode::table(&Arc::new(Schema::new(bare)), &[], None, FloatType::F32),
        &["no column holds shmquant.codes", "DuckDB"],
    );
    let (short, wrong) = replace(&batch, "emb", list(Arc::new(Int8Array::from(vec![1; 8])), 2, None, 4));
    says(
        decode::table(&short, &[wrong], None, FloatType::F32),
        &["column 'emb' has 8 bytes of codes, 12 are needed"],
    );
    let (other, wrong) = replace(&batch, "emb", list(Arc::new(Int32Array::from(vec![1; 12])), 3, None, 4));
    says(decode::table(&other, &[wrong], None, FloatType::F32), &["column 'emb' has codes of type Int32"]);
    let codes = decode::codes(&batch.slice(1, 2), "emb").unwrap();
    assert_eq!(
        (codes.values.as_slice(), codes.rows, codes.width, codes.signed),
        (&q.codes[3..9], 2, 3, true)
    );
    assert_eq!(codes.values.as_ptr(), q_values(&batch).wrapping_add(3));
    says(decode::codes(&batch, "nothing"), &["there is no column 'nothing'"]);
}

fn q_values(batch: &RecordBatch) -> *const u8 {
    let list = batch.column(0).as_any().downcast_ref::<FixedSizeListArray>().unwrap();
    list.values().as_any().downcast_ref::<Int8Array>().unwrap().values().inner().as_ptr()
}
