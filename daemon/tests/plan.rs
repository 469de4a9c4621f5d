//! Whatever a descriptor says, the planner answers: with a layout of bounded size or with a refusal.
#![allow(clippy::expect_used, clippy::panic, reason = "a failed expectation is how a test reports")]

mod tables;

use proptest::prelude::*;
use shmquant_daemon::engine::Work;
use shmquant_daemon::job::{Job, Sources};
use shmquant_daemon::plan::Plan;
use shmquant_kernels::{FloatType, Granularity, OnNonFinite, Scheme};
use shmquant_protocol::chunks::CHUNK_BYTES;
use shmquant_protocol::descriptor::{Body, Descriptor, Item, Params, Role, Spec, TableKind};
use shmquant_protocol::field::NodeData;
use shmquant_protocol::message::{ErrorCode, Failure};
use std::sync::Arc;
use tables::{Heap, Table, spec, values};

const MOST: u64 = 1 << 20;
const WINDOW: u64 = 8 << 20;

fn a_spec() -> impl Strategy<Value = Spec> {
    let group = prop_oneof![1u32..40, Just(u32::MAX), Just(1 << 20)];
    (
        prop::sample::select(&Scheme::ALL[..]),
        prop::sample::select(&Granularity::ALL[..]),
        group,
        0..3usize,
        0..8u8,
    )
        .prop_map(|(scheme, granularity, group, policy, flags)| {
            let group = if granularity == Granularity::Group { group } else { 0 };
            let mut spec = Spec {
                on_nonfinite: OnNonFinite::ALL[policy],
                packed: flags & 1 != 0,
                ..spec(scheme, granularity, group)
            };
            if flags == 7 {
                spec.affine = None;
            }
            spec
        })
}

fn a_size() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0u64..50, 3 => 0u64..200_000, 1 => any::<u64>(), 1 => (0u32..64).prop_map(|b| 1u64 << b)]
}

/// Descriptors that mostly make sense.
fn a_descriptor() -> impl Strategy<Value = Descriptor> {
    let item = (a_size(), a_size(), 0..4usize, 0..3u8, any::<bool>(), ".{0,12}");
    (
        any::<bool>(),
        0..8u8,
        a_size(),
        prop::collection::vec(a_spec(), 1..4),
        prop::collection::vec(item, 0..6),
    )
        .prop_map(|(layers, flags, rows, specs, items)| {
            let table =
                if layers { TableKind::Layers { large_names: flags & 1 != 0 } } else { TableKind::Columns };
            let items: Vec<Item> = items
                .into_iter()
                .enumerate()
                .map(|(i, (item_rows, k, dtype, kind, odd, name))| {
                    let role = match (layers, kind) {
                        (true, _) => Role::Layer,
                        (_, 0) => Role::Plain,
                        _ => Role::Vector,
                    };
                    let rows = if layers || odd && item_rows > 100_000 { item_rows } else { rows };
                    let k = if role == Role::Plain { 1 } else { k };
                    let mut v = values(role, FloatType::ALL[dtype], rows, k);
                    v.spec = i % specs.len();
                    if !layers && odd {
                        v.null_count = rows.min(3);
                    }
                    if layers && odd && rows > 0 && k > 0 {
                        v.shape = vec![rows as i64, k as i64];
                    }
                    Item { name: format!("{name}{i}"), body: Body::Values(v) }
                })
                .collect();
            let rows = if layers { items.len() as u64 } else { rows };
            let (metrics, continue_on_error) = (flags & 2 != 0, flags & 4 != 0);
            Descriptor { table, metrics, continue_on_error, specs, metadata: Default::default(), rows, items }
        })
}

/// Plans, and carries out what is small: the window holds zeros.
fn try_all(bytes: &[u8]) {
    let Ok(descriptor) = Descriptor::decode(bytes) else { return };
    for limit in [i32::MAX as u64, 1000] {
        let n = bytes.len() as u64;
        let Ok(plan) = Plan::with_offset_limit(descriptor.clone(), n, WINDOW, 0, MOST, limit) else {
            continue;
        };
        assert!(plan.result_bytes() <= MOST);
        let list = plan.chunks();
        assert!(list.chunks.iter().all(|c| c.bytes <= CHUNK_BYTES && c.at + c.bytes <= WINDOW));
        assert!(list.chunks.len() as u64 <= MOST);
        let plan = Arc::new(plan);
        let window = Heap::new(WINDOW, 0);
        let result = Heap::new(plan.result_bytes(), 0xA5);
        let job =
            Job::new(Arc::clone(&plan), window, &Sources::new(), result, 0).expect("room for the result");
        (0..job.len()).for_each(|i| job.run(i));
        if let Err(failure) = job.complete() {
            // Bitmaps of zeros are other nulls than announced; nothing else is wrong with zeros.
            assert_eq!(failure.code, ErrorCode::InvalidInput, "{failure:?} of {descriptor:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_descriptor_is_answered(descriptor in a_descriptor()) {
        let mut bytes = Vec::new();
        prop_assert!(descriptor.encode(&mut bytes).is_ok());
        try_all(&bytes);
    }

    #[test]
    fn any_change_to_a_descriptor_is_answered(
        descriptor in a_descriptor(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = Vec::new();
        prop_assert!(descriptor.encode(&mut bytes).is_ok());
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        try_all(&bytes);
    }

    #[test]
    fn any_change_to_kept_columns_is_answered(
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![any::<u8>(), 0u8..10]), 1..6),
    ) {
        let mut bytes = kept_descriptor();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        try_all(&bytes);
    }
}

/// Kept columns of the nested kinds, whose values are all zeros.
fn kept_descriptor() -> Vec<u8> {
    use arrow_schema::{DataType, Field};
    let leaf = |buffers: Vec<u64>, length| NodeData { length, null_count: 0, buffers, children: Vec::new() };
    let int = Arc::new(Field::new("item", DataType::Int32, true));
    let text = || leaf(vec![0, 44, 100], 10);
    let mut table = Table::columns(10);
    let columns = [
        (DataType::Utf8, text()),
        (
            DataType::List(int.clone()),
            NodeData { children: vec![leaf(vec![0, 0], 0)], ..leaf(vec![0, 44], 10) },
        ),
        (
            DataType::FixedSizeList(int, 3),
            NodeData { children: vec![leaf(vec![0, 120], 30)], ..leaf(vec![0], 10) },
        ),
        (
            DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8)),
            NodeData { children: vec![text()], ..leaf(vec![0, 10], 10) },
        ),
        (
            DataType::Struct(vec![Field::new("a", DataType::Boolean, true)].into()),
            NodeData { children: vec![leaf(vec![0, 2], 10)], ..leaf(vec![0], 10) },
        ),
        (DataType::Utf8View, leaf(vec![0, 160, 40], 10)),
        (DataType::Null, leaf(vec![], 10)),
    ];
    for (i, (data_type, data)) in columns.into_iter().enumerate() {
        let field = Field::new(format!("c{i}"), data_type, true);
        let name = field.name().clone();
        table.descriptor.items.push(Item { name, body: Body::Keep { field, data } });
    }
    table.descriptor.specs.push(spec(Scheme::Int8, Granularity::Row, 0));
    let mut bytes = Vec::new();
    table.descriptor.encode(&mut bytes).expect("types that can be kept");
    bytes
}

#[test]
fn the_kept_descriptor_is_good() {
    let bytes = kept_descriptor();
    let descriptor = Descriptor::decode(&bytes).expect("good");
    let plan = Arc::new(Plan::new(descriptor, bytes.len() as u64, WINDOW, 0, MOST).expect("good"));
    let result = Heap::new(plan.result_bytes(), 0xA5);
    let job = Job::new(plan, Heap::new(WINDOW, 0), &Sources::new(), result, 0).expect("room");
    assert_eq!(job.complete().err().map(|f| f.code), Some(ErrorCode::Internal), "chunks are to go");
    (0..job.len()).for_each(|i| job.run(i));
    job.complete().expect("zeros are valid");
}

fn refused(table: &Table, most: u64) -> Failure {
    let mut bytes = Vec::new();
    table.descriptor.encode(&mut bytes).expect("it can be said");
    let descriptor = Descriptor::decode(&bytes).expect("it can be read");
    Plan::new(descriptor, bytes.len() as u64, WINDOW, 0, most).expect_err("refused")
}

#[test]
fn what_is_too_large_is_refused_with_numbers() {
    let mut table = Table::columns(1 << 40);
    table.push(
        "v",
        spec(Scheme::Int8, Granularity::Row, 0),
        values(Role::Vector, FloatType::F32, 1 << 40, 64),
        vec![],
    );
    let failure = refused(&table, 1 << 30);
    assert_eq!(failure.code, ErrorCode::NoRoom);
    // A byte a code and four a scale.
    assert!(failure.message.contains(&((1u64 << 46) + (1 << 42)).to_string()[..4]), "{}", failure.message);
    assert!(failure.message.contains(&(1u64 << 30).to_string()), "{}", failure.message);
    assert!(!failure.hint.is_empty());

    // Rows without values: nothing is streamed, but scales would be written.
    let mut table = Table::columns(1 << 46);
    table.push(
        "v",
        spec(Scheme::Int8, Granularity::Row, 0),
        values(Role::Vector, FloatType::F32, 1 << 46, 0),
        vec![],
    );
    assert_eq!(refused(&table, 1 << 30).code, ErrorCode::NoRoom);

    // Parameters in metadata cost a few bytes of descriptor and much of the result.
    let mut table = Table::columns(0);
    for i in 0..50 {
        let v = values(Role::Vector, FloatType::F32, 0, 1 << 20);
        table.push(&format!("v{i}"), spec(Scheme::UInt8, Granularity::Dimension, 0), v, vec![]);
    }
    assert_eq!(refused(&table, 1 << 40).code, ErrorCode::Unsupported);
    let mut table = Table::columns(0);
    let v = values(Role::Vector, FloatType::F32, 0, (1 << 20) + 1);
    table.push("v", spec(Scheme::UInt8, Granularity::Dimension, 0), v, vec![]);
    assert_eq!(refused(&table, 1 << 40).code, ErrorCode::Unsupported);

    // A descriptor that leaves no room for chunks.
    let d = Table::layers().descriptor;
    assert_eq!(Plan::new(d, WINDOW / 2, WINDOW, 0, MOST).err().map(|f| f.code), Some(ErrorCode::Protocol));
}

#[test]
fn given_parameters_are_bounded_by_the_descriptor() {
    let mut table = Table::columns(4);
    let mut v = values(Role::Vector, FloatType::F32, 4, 2);
    v.params = Some(Params { id: 0, scales: vec![1.0; 4], zero_points: vec![0; 4] });
    table.push("v", spec(Scheme::UInt8, Granularity::Row, 0), v, vec![]);
    assert_eq!(refused(&table, 100).code, ErrorCode::NoRoom);
}
