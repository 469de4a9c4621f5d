//! Values that lie in memory which the daemon has, too: nothing of them is copied, and the results are the same.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]
#![allow(
    unsafe_code,
    reason = "memory that is shared with the daemon is written and wrapped as Arrow buffers"
)]

mod descriptors;
mod native;
mod tables;

use std::panic::AssertUnwindSafe;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arrow_array::{Array, ArrayRef, FixedSizeListArray, RecordBatch, make_array};
use arrow_buffer::Buffer;
use arrow_data::ArrayData;
use arrow_schema::{DataType, Field, Schema};
use native::session;
use serde_json::Value;
use shmquant_daemon::{Config, Daemon};
use shmquant_kernels::{FloatType, Granularity, Scheme};
use shmquant_protocol::chunks::MIN_WINDOW;
use shmquant_protocol::client::{
    Address, Config as ClientConfig, Input, ItemReport, Options, Quantized, Session,
};
use shmquant_protocol::message::{ErrorCode, Naming};
use shmquant_protocol::segment::Backing;
use shmquant_protocol::table::{LayerInput, Override, Pattern, Table, TableOptions};

fn daemon(backing: Backing) -> Arc<Daemon> {
    native::daemon(Config { workers: 2, window: MIN_WINDOW, backing, ..Config::default() })
}

/// Numbers that look like weights, the same every time.
fn numbers(n: usize, dtype: FloatType) -> Vec<u8> {
    tables::to_bytes(&tables::numbers(n, 1), dtype)
}

fn stat(session: &Session) -> Value {
    serde_json::from_str(&session.stat().unwrap()).unwrap()
}

/// Asks for the daemon's state until it is as wanted.
fn until(session: &Session, wanted: impl Fn(&Value) -> bool) {
    let started = Instant::now();
    loop {
        let stat = stat(session);
        if wanted(&stat) {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "never as wanted: {stat:#}");
        std::thread::park_timeout(Duration::from_micros(200));
    }
}

/// The bytes in memory of the session's, `skip` bytes after its beginning.
fn shared(session: &Session, bytes: &[u8], skip: usize) -> Buffer {
    let input = session.allocate((bytes.len() + skip) as u64, None, None).unwrap();
    fill(&input, skip, bytes);
    wrap(Arc::new(input), skip, bytes.len())
}

fn fill(input: &Input, at: usize, bytes: &[u8]) {
    assert!(at + bytes.len() <= input.len());
    // SAFETY: inside; nobody else writes there now.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), input.as_ptr().add(at), bytes.len()) };
}

fn wrap(input: Arc<Input>, at: usize, len: usize) -> Buffer {
    assert!(at + len <= input.len());
    let start = NonNull::new(input.as_ptr().wrapping_add(at)).unwrap();
    // SAFETY: inside the input, which the buffer keeps.
    unsafe { Buffer::from_custom_allocation(start, len, Arc::new(AssertUnwindSafe(input))) }
}

fn arrow_type(dtype: FloatType) -> DataType {
    match dtype {
        FloatType::F16 => DataType::Float16,
        FloatType::F32 => DataType::Float32,
        _ => DataType::Float64,
    }
}

fn floats(values: Buffer, dtype: FloatType) -> ArrayRef {
    let n = values.len() / dtype.size();
    make_array(ArrayData::builder(arrow_type(dtype)).len(n).add_buffer(values).build().unwrap())
}

fn vectors(values: Buffer, dtype: FloatType, k: usize) -> ArrayRef {
    let item = Arc::new(Field::new("item", arrow_type(dtype), true));
    Arc::new(FixedSizeListArray::try_new(item, k as i32, floats(values, dtype), None).unwrap())
}

fn table(columns: &[(&str, ArrayRef)], options: &TableOptions) -> Table {
    let field = |(name, array): &(&str, ArrayRef)| Field::new(*name, array.data_type().clone(), true);
    let schema = Arc::new(Schema::new(columns.iter().map(field).collect::<Vec<_>>()));
    let arrays = columns.iter().map(|(_, array)| array.clone()).collect();
    let batch = RecordBatch::try_new(schema.clone(), arrays).unwrap();
    Table::from_batches(schema, vec![batch], options).unwrap()
}

fn quantize(session: &Session, table: &Table) -> Quantized {
    session.quantize(table, &Options::default()).unwrap()
}

/// The same bytes from both, and so many of the first one's values not copied.
fn assert_same(session: &Session, placed: &Table, private: &Table, shared: u64, what: &str) {
    let before = stat(session);
    let (one, other) = (quantize(session, placed), quantize(session, private));
    assert!(one.held.as_slice() == other.held.as_slice(), "{what}: other bytes");
    assert_eq!(one.report.iter().map(|r| r.bytes_shared).sum::<u64>(), shared, "{what}");
    assert_eq!(one.report.iter().map(|r| r.bytes_copied).sum::<u64>(), one.bytes_copied, "{what}");
    // Without what differs on purpose; as text, because metrics may be NaN.
    let alike = |r: &ItemReport| format!("{:?}", ItemReport { bytes_copied: 0, bytes_shared: 0, ..*r });
    assert!(one.report.iter().map(alike).eq(other.report.iter().map(alike)), "{what}");
    assert_eq!(one.bytes_shared, shared, "{what}");
    assert_eq!(one.bytes_copied == 0, shared == placed.input_bytes(), "{what}: {}", one.bytes_copied);
    assert_eq!(other.bytes_shared, 0, "{what}");
    // Codes and parameters cross, or the values themselves.
    assert!(other.bytes_copied > 0 || private.input_bytes() == 0, "{what}");
    let after = stat(session);
    let grown = |key: &str| after[key].as_u64().unwrap() - before[key].as_u64().unwrap();
    assert_eq!(grown("bytes_shared"), shared, "{what}");
    assert_eq!(grown("bytes_copied"), one.bytes_copied + other.bytes_copied, "{what}");
}

#[test]
fn nothing_is_copied_and_the_result_is_the_same() {
    let (scheme, metrics) = (Scheme::UInt4, true);
    for backing in [Backing::Memfd, Backing::Posix] {
        let daemon = daemon(backing);
        let session = session(&daemon);
        for dtype in [FloatType::F16, FloatType::F32, FloatType::F64] {
            // A small one, one of several windows, rows longer than a chunk.
            for (rows, k) in [(100, 64), (40_000, 33), (3, 600_001)] {
                let bytes = numbers(rows * k, dtype);
                let place = shared(&session, &bytes, 0);
                let private = Buffer::from(bytes.as_slice());
                for granularity in
                    [Granularity::Tensor, Granularity::Row, Granularity::Dimension, Granularity::Group]
                {
                    let group_size = (granularity == Granularity::Group).then_some(32);
                    let granularity = Some(granularity);
                    if backing == Backing::Posix && rows != 40_000 {
                        continue;
                    }
                    let options =
                        TableOptions { scheme, metrics, granularity, group_size, ..Default::default() };
                    let one = table(&[("emb", vectors(place.clone(), dtype, k))], &options);
                    let other = table(&[("emb", vectors(private.clone(), dtype, k))], &options);
                    let what = format!("{backing} {dtype} {rows} x {k} {granularity:?}");
                    assert_same(&session, &one, &other, bytes.len() as u64, &what);
                }
            }
        }
    }
}

#[test]
fn only_what_lies_elsewhere_crosses() {
    let daemon = daemon(Backing::Memfd);
    let session = session(&daemon);
    let (rows, f32) = (20_000, FloatType::F32);
    let bytes = numbers(rows * 64, f32);
    let other = numbers(rows * 96, f32);
    let place = shared(&session, &bytes, 64);
    // Vectors, plain values and slices of one input between private columns, streamed through several windows.
    let columns = |values: &Buffer| -> Vec<(&str, ArrayRef)> {
        vec![
            ("a", vectors(Buffer::from(other.as_slice()), f32, 96)),
            ("b", vectors(values.clone(), f32, 64)),
            ("c", vectors(Buffer::from(other.as_slice()), f32, 96)),
            ("d", floats(values.slice_with_length(rows * 4 * 3, rows * 4), f32)),
        ]
    };
    for granularity in [Granularity::Row, Granularity::Tensor] {
        let names = ["a", "b", "c", "d"].map(str::to_owned).to_vec();
        let options =
            TableOptions { columns: Some(names), granularity: Some(granularity), ..Default::default() };
        let one = table(&columns(&place), &options);
        let two = table(&columns(&Buffer::from(bytes.as_slice())), &options);
        let in_place = (bytes.len() + rows * 4) as u64;
        assert_same(&session, &one, &two, in_place, &format!("{granularity:?}"));
    }
}

#[test]
fn slices_are_found_and_what_must_change_is_copied() {
    let daemon = daemon(Backing::Memfd);
    let session = session(&daemon);
    let (k, f32) = (100, FloatType::F32);
    let bytes = numbers(5000 * k, f32);
    let options = TableOptions::default();
    let both = |make: &dyn Fn(Buffer) -> Table| {
        (make(shared(&session, &bytes, 0)), make(Buffer::from(bytes.as_slice())))
    };
    for (first, rows) in [(0, 5000), (1, 4999), (777, 1000), (4999, 1)] {
        let (one, other) =
            both(&|values| table(&[("emb", vectors(values, f32, k).slice(first, rows))], &options));
        assert_same(&session, &one, &other, (rows * k * 4) as u64, "a slice");
    }
    // Two batches that lie one after the other, and two that do not.
    for (second, found) in [(100, true), (101, false)] {
        let (one, other) = both(&|values| {
            let all = vectors(values, f32, k);
            let schema = Arc::new(Schema::new(vec![Field::new("emb", all.data_type().clone(), true)]));
            let batch =
                |first, rows| RecordBatch::try_new(schema.clone(), vec![all.slice(first, rows)]).unwrap();
            Table::from_batches(schema.clone(), vec![batch(0, 100), batch(second, 50)], &options).unwrap()
        });
        assert_same(&session, &one, &other, if found { 150 * k as u64 * 4 } else { 0 }, "batches");
    }
    // Null rows have to become zeros.
    let nulls = arrow_buffer::NullBuffer::from((0..5000).map(|i| i % 7 != 3).collect::<Vec<_>>());
    let (one, other) = both(&|values| {
        let item = Arc::new(Field::new("item", DataType::Float32, true));
        let column = FixedSizeListArray::try_new(item, k as i32, floats(values, f32), Some(nulls.clone()));
        table(&[("emb", Arc::new(column.unwrap()))], &options)
    });
    assert_same(&session, &one, &other, 0, "nulls");
    // float64 in the middle of one.
    let doubles = numbers(64, FloatType::F64);
    let bytes_at = |skip| {
        let values = shared(&session, &doubles, skip);
        Table::from_layers(
            vec![LayerInput { name: "a".to_owned(), values, dtype: FloatType::F64, shape: vec![8, 8] }],
            false,
            &options,
        )
        .unwrap()
    };
    assert_same(&session, &bytes_at(8), &bytes_at(4), 512, "aligned and not");
}

#[test]
fn layers_lie_side_by_side_in_one_input() {
    let daemon = daemon(Backing::Memfd);
    let session = session(&daemon);
    let sizes = [
        (FloatType::F32, 700 * 500),
        (FloatType::Bf16, 300_000),
        (FloatType::F16, 9),
        (FloatType::F64, 8192),
    ];
    let all: Vec<(FloatType, Vec<u8>)> = sizes.iter().map(|(t, n)| (*t, numbers(*n, *t))).collect();
    let room: usize = all.iter().map(|(_, bytes)| bytes.len().next_multiple_of(64)).sum();
    let input = Arc::new(session.allocate(room as u64, None, None).unwrap());
    let mut at = 0;
    let placed: Vec<Buffer> = all
        .iter()
        .map(|(_, bytes)| {
            fill(&input, at, bytes);
            let buffer = wrap(input.clone(), at, bytes.len());
            at += bytes.len().next_multiple_of(64);
            buffer
        })
        .collect();
    let kept = Override { pattern: Pattern::parse("layer 1").unwrap(), action: None };
    let options = TableOptions { overrides: vec![kept], ..Default::default() };
    let make = |buffers: &[Buffer]| {
        let layers = all.iter().zip(buffers).enumerate().map(|(i, ((dtype, _), values))| LayerInput {
            name: format!("layer {i}"),
            values: values.clone(),
            dtype: *dtype,
            shape: vec![],
        });
        Table::from_layers(layers.collect(), false, &options).unwrap()
    };
    let private: Vec<Buffer> = all.iter().map(|(_, bytes)| Buffer::from(bytes.as_slice())).collect();
    let total = all.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    assert_same(&session, &make(&placed), &make(&private), total, "layers");
}

#[test]
fn the_steady_state_makes_nothing_new() {
    for backing in [Backing::Memfd, Backing::Posix] {
        let daemon = daemon(backing);
        let session = session(&daemon);
        let bytes = numbers(4096 * 64, FloatType::F32);
        let values = shared(&session, &bytes, 0);
        let options = TableOptions::default();
        let run = |n| {
            let segments = (0..n).map(|_| {
                let table = table(&[("emb", vectors(values.clone(), FloatType::F32, 64))], &options);
                let done = quantize(&session, &table);
                assert_eq!((done.bytes_copied, done.bytes_shared), (0, bytes.len() as u64));
                let segment = done.held.extent().segment;
                drop(done);
                // A hold may go back beside the next request, which would get other memory if it were faster.
                until(&session, |stat| stat["bytes_by_use"]["results"] == 0);
                segment
            });
            segments.collect::<std::collections::HashSet<_>>().len()
        };
        run(10);
        let (before, descriptors) = (stat(&session), descriptors::of(&stat(&session)));
        assert_eq!(run(50), 1);
        let after = stat(&session);
        for key in ["retired", "segments", "bytes"] {
            assert_eq!(before[key], after[key], "{key}");
        }
        assert_eq!(descriptors::of(&after), descriptors);
        // What is given back is what the next one gets.
        drop(values);
        until(&session, |stat| stat["bytes_by_use"]["inputs"] == 0);
        let again = session.allocate(bytes.len() as u64, None, None).unwrap();
        assert_eq!(stat(&session)["segments"], after["segments"]);
        // SAFETY: inside; nobody writes there now.
        let seen = unsafe { std::slice::from_raw_parts(again.as_ptr(), bytes.len()) };
        assert_eq!(seen, bytes, "its own memory, as it was left");
        assert_eq!(again.extent().generation, 2);
        let use_of = stat(&session)["bytes_by_use"]["inputs"].as_u64().unwrap();
        assert!(use_of >= bytes.len() as u64, "{use_of}");
        drop(again);
        drop(session);
    }
}

#[test]
fn a_name_stands_for_values_wherever_they_lie() {
    let daemon = daemon(Backing::Memfd);
    let (first, second) = (session(&daemon), session(&daemon));
    let bytes = numbers(500 * 64, FloatType::F32);
    let options = TableOptions { named: true, ..Default::default() };
    let placed = table(&[("emb", vectors(shared(&first, &bytes, 0), FloatType::F32, 64))], &options);
    let elsewhere = table(&[("emb", vectors(shared(&first, &bytes, 640), FloatType::F32, 64))], &options);
    let private = table(&[("emb", vectors(Buffer::from(bytes.as_slice()), FloatType::F32, 64))], &options);
    let run = |session: &Session, table: &Table, name: &str| {
        let naming = Naming { name: name.to_owned(), replace: false, digest: table.digest() };
        session.quantize(table, &Options { named: Some(naming), ..Options::default() })
    };
    for (name, maker) in [("a", &placed), ("b", &private)] {
        let made = run(&first, maker, name).unwrap();
        assert!(made.held.created());
        for (session, table) in
            [(&first, &placed), (&first, &elsewhere), (&first, &private), (&second, &private)]
        {
            let found = run(session, table, name).unwrap();
            assert!(!found.held.created() && found.held.extent() == made.held.extent());
            assert_eq!(found.bytes_shared, 0, "nothing was read");
        }
    }
    // Other values at the same place are other values.
    let input = first.allocate(bytes.len() as u64, None, None).map(Arc::new).unwrap();
    fill(&input, 0, &bytes);
    let values = wrap(input.clone(), 0, bytes.len());
    let same = || table(&[("emb", vectors(values.clone(), FloatType::F32, 64))], &options);
    assert!(run(&first, &same(), "c").unwrap().held.created());
    fill(&input, 4000, &1f32.to_le_bytes());
    let error = run(&first, &same(), "c").unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NameExists), "{error}");
}

#[test]
fn memory_of_another_session_or_daemon_is_copied() {
    let current = Arc::new(Mutex::new(daemon(Backing::Memfd)));
    let connect = {
        let current = current.clone();
        move || current.lock().unwrap().connect()
    };
    let address = Address::InProcess(Arc::new(connect));
    let session = Session::new(ClientConfig { address, ..ClientConfig::default() });
    let bytes = numbers(500 * 64, FloatType::F32);
    let values = shared(&session, &bytes, 0);
    let options = TableOptions::default();
    let same = || table(&[("emb", vectors(values.clone(), FloatType::F32, 64))], &options);
    let first = quantize(&session, &same());
    assert_eq!(first.bytes_copied, 0);
    // Another process's session would be the same: an address says nothing to it.
    let other = native::session(&current.lock().unwrap());
    assert_eq!(quantize(&other, &same()).bytes_shared, 0);

    let next = daemon(Backing::Memfd);
    let before = std::mem::replace(&mut *current.lock().unwrap(), next);
    before.stop();
    drop(before);
    // The first call may find the old connection's end.
    let again = (0..100).find_map(|_| session.quantize(&same(), &Options::default()).ok()).unwrap();
    assert_eq!(again.bytes_shared, 0);
    assert!(again.bytes_copied > 0);
    assert!(again.held.as_slice() == first.held.as_slice());
    // SAFETY: inside; nobody writes there now.
    assert_eq!(values.as_slice(), bytes, "it is still this process's memory");
}

#[test]
fn room_is_proven_before_it_is_promised() {
    let config = Config { workers: 1, window: MIN_WINDOW, budget: Some(64 << 20), ..Config::default() };
    let daemon = Arc::new(Daemon::in_process(config).unwrap());
    let (session, other) = (session(&daemon), self::session(&daemon));
    for bytes in [128 << 20, 1 << 40, u64::MAX] {
        let error = session.allocate(bytes, None, None).unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::NoRoom), "{error}");
    }
    let error = session.allocate(0, None, None).unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::InvalidInput), "{error}");
    let held = session.allocate(24 << 20, None, None).unwrap();
    // Only this session could free what it would wait for.
    let error = session.allocate(40 << 20, None, None).unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NoRoom));
    assert!(error.to_string().contains("inputs"), "{error}");
    // Another one waits, until its time is over, or until the memory is there.
    drop(other.allocate(1, None, None).unwrap());
    let soon = Some(Duration::from_millis(200));
    let error = other.allocate(40 << 20, soon, None).unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Deadline), "{error}");
    let stopped = other.allocate(40 << 20, None, Some(&|| true)).unwrap_err();
    assert_eq!(stopped.code(), Some(ErrorCode::Cancelled), "{stopped}");
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| other.allocate(40 << 20, None, None));
        until(&session, |stat| stat["waiting"] == 1);
        drop(held);
        assert_eq!(waits.join().unwrap().unwrap().len(), 40 << 20);
    });
}

#[test]
fn warm_memory_is_there_for_the_next_result() {
    let config = Config { workers: 1, window: MIN_WINDOW, budget: Some(256 << 20), ..Config::default() };
    let daemon = Arc::new(Daemon::in_process(config).unwrap());
    let session = session(&daemon);
    let pools = |stat: &Value| stat["bytes_by_use"]["pools"].as_u64().unwrap();
    for _ in 0..3 {
        session.warm(8 << 20, None, None).unwrap();
        assert_eq!(pools(&stat(&session)), 8 << 20, "once is enough");
    }
    let before = stat(&session);
    let values = Buffer::from(numbers(7 << 20, FloatType::F16));
    let table = table(&[("emb", vectors(values, FloatType::F16, 64))], &TableOptions::default());
    let done = quantize(&session, &table);
    let after = stat(&session);
    assert_eq!((&after["segments"], pools(&after)), (&before["segments"], 0));
    assert_eq!(after["recycled"].as_u64().unwrap(), before["recycled"].as_u64().unwrap() + 1);
    drop(done);
    let error = session.warm(240 << 20, None, None).unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NoRoom));
    assert!(error.to_string().contains("240.0 MiB"), "{error}");
}
