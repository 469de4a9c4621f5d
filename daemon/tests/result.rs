//! Results read back by Arrow, and compared with the kernels called on whole items.
#![allow(clippy::expect_used, clippy::panic, reason = "a failed expectation is how a test reports")]

mod tables;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Float64Type, Int8Type, Int32Type, Int64Type, UInt8Type};
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use shmquant_kernels::{FloatType, Granularity, OnNonFinite, Scheme};
use shmquant_protocol::descriptor::{Params, Role, Spec};
use shmquant_protocol::message::ErrorCode;
use tables::{Order, SMALL_WINDOW, Table, WINDOW, expected, layout, numbers, spec, to_bytes};

fn layer_row(batch: &RecordBatch, row: usize) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
    let floats = |name: &str| {
        let lists = batch[name].as_list::<i32>().value(row);
        lists.as_primitive::<Float32Type>().values().to_vec()
    };
    (batch["quantized_data"].as_binary::<i32>().value(row).to_vec(), floats("scales"), floats("zero_points"))
}

fn word<'a>(batch: &'a RecordBatch, name: &str, row: usize) -> &'a str {
    let column = batch[name].as_dictionary::<Int8Type>();
    column.values().as_string::<i32>().value(column.keys().value(row) as usize)
}

#[test]
fn layers_hold_what_the_kernels_make() {
    let mut table = Table::layers();
    table.descriptor.metrics = true;
    let mut wanted = Vec::new();
    let mut add = |table: &mut Table, scheme, granularity, group, dtype: FloatType, rows: u64, k: u64| {
        let spec = spec(scheme, granularity, group);
        let bytes = to_bytes(&numbers((rows * k) as usize, rows ^ (k << 7)), dtype);
        let name = format!("{scheme}.{granularity}.{rows}x{k}.{dtype}");
        let affine = spec.affine.expect("quantized");
        let (codes, scales, zeros) =
            expected(&bytes, dtype, &layout(rows, k, &spec, false), &affine, OnNonFinite::Error);
        let zeros = if affine.scheme.signed() { Vec::new() } else { zeros };
        wanted.push((name.clone(), codes, scales, zeros, dtype, spec));
        table.layer(&name, spec, dtype, (rows, k), bytes);
    };
    for scheme in Scheme::ALL {
        add(&mut table, scheme, Granularity::Group, 128, FloatType::F32, 64, 200);
        add(&mut table, scheme, Granularity::Row, 0, FloatType::F16, 33, 77);
        add(&mut table, scheme, Granularity::Tensor, 0, FloatType::Bf16, 5, 101);
        add(&mut table, scheme, Granularity::Dimension, 0, FloatType::F64, 9, 13);
    }
    // Two passes: one domain is more than a chunk, or rows neither fit a chunk nor start on bytes.
    add(&mut table, Scheme::UInt4, Granularity::Tensor, 0, FloatType::F32, 700, 1001);
    add(&mut table, Scheme::Int8, Granularity::Tensor, 0, FloatType::F32, 700, 1001);
    add(&mut table, Scheme::UInt4, Granularity::Row, 0, FloatType::F32, 3, 300_001);
    add(&mut table, Scheme::UInt2, Granularity::Group, 32, FloatType::F32, 7, 50_257);
    add(&mut table, Scheme::Int4, Granularity::Group, 7, FloatType::F64, 3, 150_001);
    add(&mut table, Scheme::UInt8, Granularity::Dimension, 0, FloatType::F32, 900, 1001);
    add(&mut table, Scheme::UInt8, Granularity::Row, 0, FloatType::F32, 0, 7);

    let done = table.result().expect("a result");
    let batch = done.batch();
    assert_eq!(
        batch.schema().fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>(),
        [
            "layer_name",
            "quantized_data",
            "scales",
            "zero_points",
            "shape",
            "bit_width",
            "scheme",
            "src_dtype",
            "packing",
            "group_size",
            "axis",
            "metrics",
            "error"
        ]
    );
    for (row, (name, codes, scales, zeros, dtype, spec)) in wanted.iter().enumerate() {
        assert_eq!(batch["layer_name"].as_string::<i32>().value(row), name);
        let (got_codes, got_scales, got_zeros) = layer_row(&batch, row);
        assert!(got_codes == *codes, "{name}: codes");
        assert!(got_scales == *scales, "{name}: scales");
        assert!(got_zeros == *zeros, "{name}: zero points");
        let affine = spec.affine.expect("quantized");
        assert_eq!(batch["bit_width"].as_primitive::<UInt8Type>().value(row), affine.bits);
        assert_eq!(word(&batch, "scheme", row), affine.scheme.name());
        assert_eq!(word(&batch, "src_dtype", row), dtype.name());
        assert_eq!(word(&batch, "packing", row), if spec.packed { "lsb" } else { "none" });
        let group = batch["group_size"].as_primitive::<Int32Type>().value(row);
        let want = match spec.granularity {
            Granularity::Tensor => -1,
            Granularity::Row => 0,
            Granularity::Dimension => -2,
            Granularity::Group => spec.group_size as i32,
        };
        assert_eq!(group, want, "{name}");
        assert_eq!(batch["axis"].as_primitive::<Int8Type>().value(row), 1);
        assert!(batch["error"].is_null(row));
        assert!(!batch["metrics"].is_null(row));
        let mse = batch["metrics"].as_struct().column(0).as_primitive::<Float64Type>().value(row);
        let (counters, metrics) = done.report(row);
        if counters[0] > 0 {
            assert_eq!(mse, metrics[0]);
            let worst = scales.iter().fold(0f32, |a, s| a.max(*s));
            assert!(mse > 0.0 && mse.sqrt() <= f64::from(worst), "{name}: {mse}");
        }
    }
    assert_eq!(done.report.len(), wanted.len() * 80);
}

#[test]
fn layers_that_stay_are_null_or_empty() {
    let mut table = Table::layers();
    let keep = Spec { affine: None, ..spec(Scheme::Int8, Granularity::Row, 0) };
    let quantized = spec(Scheme::UInt4, Granularity::Group, 32);
    let raw = to_bytes(&numbers(500_000, 3), FloatType::F32);
    table.layer("as it is", keep, FloatType::F32, (500, 1000), raw.clone());
    table.layer("no values", quantized, FloatType::F32, (0, 32), Vec::new());
    table.layer("no columns", quantized, FloatType::F32, (4, 0), Vec::new());
    table.layer("null", quantized, FloatType::F16, (0, 0), Vec::new());
    table.values(3).null = true;
    table.values(3).shape = Vec::new();
    table.layer(
        "scalar",
        spec(Scheme::Int8, Granularity::Row, 0),
        FloatType::F32,
        (1, 1),
        2f32.to_le_bytes().to_vec(),
    );
    table.values(4).shape = Vec::new();
    table.layer(
        "flat",
        spec(Scheme::Int8, Granularity::Row, 0),
        FloatType::F32,
        (1, 3),
        to_bytes(&[1.0, 2.0, 3.0], FloatType::F32),
    );
    table.values(5).shape = Vec::new();
    table.descriptor.metadata.insert("origin".to_owned(), "test".to_owned());
    let batch = table.result().expect("a result").batch();
    assert_eq!(batch.schema().metadata.get("origin").map(String::as_str), Some("test"));
    let (data, scales, _) = layer_row(&batch, 0);
    assert!(data == raw && scales.is_empty());
    assert_eq!(word(&batch, "scheme", 0), "float32");
    assert_eq!(batch["bit_width"].as_primitive::<UInt8Type>().value(0), 32);
    for row in [1, 2] {
        assert_eq!(layer_row(&batch, row), (Vec::new(), Vec::new(), Vec::new()));
    }
    for name in ["quantized_data", "scales", "zero_points", "shape"] {
        assert_eq!((batch[name].null_count(), batch[name].is_null(3)), (1, true), "{name}");
    }
    let shape =
        |row: usize| batch["shape"].as_list::<i32>().value(row).as_primitive::<Int64Type>().values().to_vec();
    assert_eq!((shape(0), shape(2), shape(4), shape(5)), (vec![500, 1000], vec![4, 0], vec![], vec![3]));
    assert_eq!(batch["metrics"].null_count(), 6);
    assert_eq!(Table::layers().result_of_none().num_rows(), 0);
}

#[test]
fn layers_are_split_where_offsets_end() {
    let mut table = Table::layers();
    let spec = spec(Scheme::UInt4, Granularity::Group, 32);
    for i in 0..20 {
        let bytes = to_bytes(&numbers(16 * 64, i), FloatType::F32);
        table.layer(&format!("layer {i}"), spec, FloatType::F32, (16, 64), bytes);
    }
    let whole = table.result().expect("a result").batch();
    // 512 bytes of codes a layer: three fit.
    let done = table.run(WINDOW, 1600, Order::Forward, 0xA5).expect("a result");
    let batches = done.batches();
    assert_eq!(batches.iter().map(RecordBatch::num_rows).collect::<Vec<_>>(), [3, 3, 3, 3, 3, 3, 2]);
    let schema = whole.schema();
    let joined = arrow_select::concat::concat_batches(&schema, &batches).expect("the same schema");
    assert_eq!(joined, whole);
    // One value above the limit makes its column large, and the others still split.
    let done = table.run(WINDOW, 500, Order::Forward, 0xA5).expect("a result");
    let batches = done.batches();
    assert_eq!(batches[0].schema().field(1).data_type(), &DataType::LargeBinary);
    assert_eq!(batches.len(), 2, "500 scales are 15 layers");
    let mut row = 0;
    for batch in &batches {
        for i in 0..batch.num_rows() {
            let value = batch["quantized_data"].as_binary::<i64>().value(i);
            assert_eq!(value, whole["quantized_data"].as_binary::<i32>().value(row));
            row += 1;
        }
    }
    assert_eq!(row, 20);
}

#[test]
fn large_names_stay_large() {
    let mut table = Table::layers();
    table.descriptor.table = shmquant_protocol::descriptor::TableKind::Layers { large_names: true };
    table.layer(
        "a",
        spec(Scheme::Int8, Granularity::Row, 0),
        FloatType::F32,
        (1, 2),
        to_bytes(&[1.0, -1.0], FloatType::F32),
    );
    let batch = table.result().expect("a result").batch();
    assert_eq!(batch["layer_name"].as_string::<i64>().value(0), "a");
}

#[test]
fn faulty_layers_end_the_request_or_become_null() {
    let mut table = Table::layers();
    let int8 = spec(Scheme::Int8, Granularity::Tensor, 0);
    let good = to_bytes(&numbers(600, 1), FloatType::F32);
    table.layer("good", int8, FloatType::F32, (20, 30), good);
    // Two passes, NaN in the first and in the third chunk.
    let mut bad = numbers(900_000, 2);
    for i in [7, 9, 600_000] {
        bad[i] = if i == 9 { f32::INFINITY } else { f32::NAN };
    }
    table.layer("x", int8, FloatType::F32, (900, 1000), to_bytes(&bad, FloatType::F32));
    let mut wide = vec![0f64; 40];
    wide[11] = 1e300;
    let wide: Vec<u8> = wide.iter().flat_map(|v| v.to_le_bytes()).collect();
    table.layer("wide", int8, FloatType::F64, (4, 10), wide);
    let ends = [f32::MAX, -f32::MAX, 0.0, 1.0];
    table.layer(
        "ends",
        spec(Scheme::UInt8, Granularity::Row, 0),
        FloatType::F32,
        (2, 2),
        to_bytes(&ends, FloatType::F32),
    );
    let mut ends = vec![0f32; 400_000];
    (ends[1], ends[399_999]) = (f32::MAX, -f32::MAX);
    table.layer(
        "far ends",
        spec(Scheme::UInt8, Granularity::Tensor, 0),
        FloatType::F32,
        (1, 400_000),
        to_bytes(&ends, FloatType::F32),
    );

    let failure = table.result().err().expect("NaN is refused");
    assert_eq!(failure.message, "Layer 'x' contains NaN or Inf at index 7 (3 in all, the first is NaN)");
    assert_eq!(failure.hint, "on_nonfinite=\"null\" drops the row, \"saturate\" clips it");
    assert_eq!((failure.code, failure.row, failure.index, failure.count), (ErrorCode::InvalidInput, 1, 7, 3));
    assert_eq!(failure.column, "x");
    assert!(failure.value.is_nan());

    table.descriptor.continue_on_error = true;
    table.descriptor.metrics = true;
    let done = table.result().expect("the good ones");
    let batch = done.batch();
    let errors = batch["error"].as_string::<i32>();
    assert!(errors.is_null(0) && !batch["quantized_data"].is_null(0));
    assert_eq!(errors.value(1), "Layer 'x' contains NaN or Inf at index 7 (3 in all, the first is NaN)");
    assert_eq!(errors.value(2), "Layer 'wide' has 1e300 at index 11, which does not fit float32");
    assert!(errors.value(3).starts_with("Layer 'ends': the range ["), "{}", errors.value(3));
    assert!(errors.value(4).ends_with("from index 0 on overflows float32"), "{}", errors.value(4));
    for row in 1..5 {
        for name in ["quantized_data", "scales", "zero_points", "metrics"] {
            assert!(batch[name].is_null(row), "{name} {row}");
        }
        assert_eq!(done.report(row).0[4], 1);
        let data = batch["quantized_data"].as_binary::<i32>();
        assert!(data.value(row).iter().all(|b| *b == 0), "a null row shows what was there");
    }
    assert_eq!(done.report(1).0[2], 3);
    // A long name is cut with its text.
    let mut table = Table::layers();
    table.descriptor.continue_on_error = true;
    let name = "ä".repeat(3000);
    table.layer(&name, int8, FloatType::F32, (1, 1), f32::NAN.to_le_bytes().to_vec());
    let batch = table.result().expect("a null row").batch();
    assert!(batch["error"].as_string::<i32>().value(0).len() <= 256 + 192);
}

#[test]
fn policies_of_layers() {
    let mut nan = numbers(500_000, 5);
    (nan[3], nan[400_000]) = (f32::NAN, f32::INFINITY);
    for granularity in [Granularity::Tensor, Granularity::Row] {
        let mut table = Table::layers();
        table.descriptor.metrics = true;
        let null = Spec { on_nonfinite: OnNonFinite::Null, ..spec(Scheme::UInt8, granularity, 0) };
        let saturate = Spec { on_nonfinite: OnNonFinite::Saturate, ..null };
        let bytes = to_bytes(&nan, FloatType::F32);
        table.layer("null", null, FloatType::F32, (500, 1000), bytes.clone());
        table.layer("saturate", saturate, FloatType::F32, (500, 1000), bytes.clone());
        table.layer("whole", null, FloatType::F32, (2, 2), to_bytes(&[1.0, 2.0, 3.0, 4.0], FloatType::F32));
        let done = table.result().expect("a result");
        let batch = done.batch();
        assert!(
            batch["quantized_data"].is_null(0) && batch["error"].is_null(0) && batch["scales"].is_null(0)
        );
        assert!(batch["metrics"].is_null(0) && !batch["metrics"].is_null(1));
        let want = expected(
            &bytes,
            FloatType::F32,
            &layout(500, 1000, &saturate, false),
            &saturate.affine.expect("quantized"),
            OnNonFinite::Saturate,
        );
        assert!(layer_row(&batch, 1) == want);
        assert!(!batch["quantized_data"].is_null(2));
        assert_eq!(done.report(0).0, [500_000, 0, 2, 0, 1]);
        assert_eq!((done.report(1).0[2], done.report(1).0[4]), (2, 0));
    }
}

#[test]
fn given_parameters_of_layers_are_told() {
    let (rows, k) = (600, 500);
    let bytes = to_bytes(&numbers((rows * k) as usize, 12), FloatType::F32);
    let mut table = Table::layers();
    table.layer("l", spec(Scheme::UInt4, Granularity::Tensor, 0), FloatType::F32, (rows, k), bytes);
    table.values(0).params = Some(Params { id: 1, scales: vec![0.5], zero_points: vec![8] });
    let batch = table.result().expect("a result").batch();
    let (_, scales, zeros) = layer_row(&batch, 0);
    assert_eq!((scales, zeros), (vec![0.5], vec![8.0]));
    // A symmetric scheme has nowhere to put a zero point.
    let mut table = Table::layers();
    table.layer("l", spec(Scheme::Int8, Granularity::Tensor, 0), FloatType::F32, (1, 1), vec![0; 4]);
    table.values(0).params = Some(Params { id: 1, scales: vec![0.5], zero_points: vec![8] });
    assert_eq!(table.result().err().map(|f| f.code), Some(ErrorCode::InvalidInput));
}

#[test]
fn streaming_is_tried() {
    let mut table = Table::layers();
    let bytes = to_bytes(&numbers(3_000_000, 1), FloatType::F32);
    table.layer("big", spec(Scheme::UInt8, Granularity::Tensor, 0), FloatType::F32, (1000, 3000), bytes);
    let resident = table.run(WINDOW, i32::MAX as u64, Order::Forward, 0).expect("a result");
    let streamed = table.run(SMALL_WINDOW, i32::MAX as u64, Order::Backward, 1).expect("a result");
    assert!(resident.resident && !streamed.resident);
    assert!(resident.file == streamed.file);
}

#[test]
fn buffers_are_aligned_in_the_file() {
    let mut table = Table::columns(100);
    let bytes = to_bytes(&numbers(1300, 1), FloatType::F32);
    table.column(
        "v",
        spec(Scheme::UInt4, Granularity::Group, 5),
        FloatType::F32,
        Role::Vector,
        13,
        None,
        bytes,
    );
    let done = table.result().expect("a result");
    let trailer = done.file.last_chunk::<10>().expect("a trailer");
    let length = arrow_ipc::reader::read_footer_length(*trailer).expect("a length");
    let end = done.file.len() - 10;
    let footer = arrow_ipc::root_as_footer(&done.file[end - length..end]).expect("a footer");
    let blocks = footer.recordBatches().expect("batches");
    assert_eq!(blocks.len(), 1);
    let block = blocks.get(0);
    let body = block.offset() as u64 + block.metaDataLength() as u64;
    assert_eq!((body % 64, block.bodyLength() % 64), (0, 0));
    let head = &done.file[block.offset() as usize + 8..body as usize];
    let message = arrow_ipc::root_as_message(head).expect("a message");
    let batch = message.header_as_record_batch().expect("a record batch");
    let buffers = batch.buffers().expect("buffers");
    assert!(buffers.iter().all(|b| b.offset() % 64 == 0));
}

impl Table {
    fn result_of_none(&self) -> RecordBatch {
        let mut table = self.clone();
        table.descriptor.specs.push(spec(Scheme::Int8, Granularity::Row, 0));
        table.result().expect("a result").batch()
    }
}
