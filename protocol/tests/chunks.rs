//! The chunk list covers every value once, keeps its promises to the kernels, and never lets two live chunks overlap in the window.

use proptest::prelude::*;
use shmquant_kernels::{Affine, FloatType, Granularity, OnNonFinite, Scheme};
use shmquant_protocol::chunks::{Action, CHUNK_BYTES, Chunk, ChunkList, MIN_RING, MIN_WINDOW};
use shmquant_protocol::descriptor::{Body, Descriptor, Item, Params, Role, Spec, TableKind, Values, Way};

fn descriptor(items: Vec<(Role, FloatType, u64, u64, u64, Spec, bool)>) -> Descriptor {
    let rows = if items.iter().any(|i| i.0 == Role::Layer) { items.len() as u64 } else { items[0].2 };
    let table = if rows == items.len() as u64 && items[0].0 == Role::Layer {
        TableKind::Layers { large_names: false }
    } else {
        TableKind::Columns
    };
    let specs = items.iter().map(|i| i.5).collect();
    let items = items.into_iter().enumerate().map(|(i, (role, dtype, rows, k, null_count, spec, given))| {
        let mut values = Values {
            role,
            spec: i,
            dtype,
            null: false,
            rows,
            k,
            null_count,
            shape: vec![],
            params: None,
            way: Way::Streamed,
        };
        let n = values.layout(&spec).n_params() as usize;
        if given && n > 0 {
            values.params = Some(Params { id: 7, scales: vec![0.5; n], zero_points: vec![0; n] });
        }
        Item { name: format!("item {i}"), body: Body::Values(values) }
    });
    let items = items.collect();
    Descriptor {
        table,
        metrics: false,
        continue_on_error: false,
        specs,
        metadata: Default::default(),
        rows,
        items,
    }
}

fn spec() -> impl Strategy<Value = Spec> {
    let granularity = prop_oneof![
        Just((Granularity::Tensor, 0u32)),
        Just((Granularity::Row, 0)),
        Just((Granularity::Dimension, 0)),
        (1u32..600_000).prop_map(|g| (Granularity::Group, g)),
        prop_oneof![Just(32u32), Just(128), Just(7)].prop_map(|g| (Granularity::Group, g)),
    ];
    (granularity, prop_oneof![Just(Scheme::Int8), Just(Scheme::UInt4), Just(Scheme::UInt2)]).prop_map(
        |((granularity, group_size), scheme)| Spec {
            affine: Affine::new(scheme, None).ok(),
            granularity,
            on_nonfinite: OnNonFinite::Error,
            packed: true,
            group_size,
        },
    )
}

fn layer() -> impl Strategy<Value = (Role, FloatType, u64, u64, u64, Spec, bool)> {
    let shape = prop_oneof![
        (0u64..40, 0u64..40),
        (1u64..5_000, 1u64..2_000),
        (1u64..4, 100_000u64..700_000),
        (Just(1u64), 1u64..3_000_000),
    ];
    let dtype = prop_oneof![Just(FloatType::F16), Just(FloatType::F32), Just(FloatType::F64)];
    (shape, dtype, spec(), any::<bool>()).prop_map(|((rows, k), dtype, spec, given)| {
        // Given parameters are as long as the domains are many: keep their vectors small.
        let given = given && rows * k < 100_000;
        (Role::Layer, dtype, rows, k, 0, spec, given)
    })
}

/// Elements of `chunks` follow each other from 0 to `n`.
fn covers(chunks: &[Chunk], n: u64) -> bool {
    let end = chunks.iter().try_fold(0, |at, c| (c.first == at && c.count > 0).then_some(at + c.count));
    end == Some(n)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_value_once_and_no_overlap(layers in proptest::collection::vec(layer(), 1..5), window in MIN_WINDOW..(24 << 20), ring in proptest::option::of(MIN_RING..(8 << 20)), vectors in any::<bool>()) {
        let mut layers = layers;
        if vectors {
            layers.truncate(1);
            layers[0].0 = Role::Vector;
            layers[0].4 = layers[0].2 / 2;
        }
        let d = descriptor(layers);
        let mut bytes = Vec::new();
        prop_assert!(d.encode(&mut bytes).is_ok());
        prop_assert_eq!(&Descriptor::decode(&bytes), &Ok(d.clone()));
        prop_assume!(bytes.len() as u64 <= window / 4);
        let list = ChunkList::with_ring(&d, bytes.len() as u64, window, ring.unwrap_or(0));
        for (i, item) in d.items.iter().enumerate() {
            let Body::Values(v) = &item.body else { unreachable!() };
            let spec = d.spec(v);
            let of = |f: &dyn Fn(Action) -> bool| -> Vec<Chunk> {
                list.chunks.iter().copied().filter(|c| c.item == i as u32 && f(c.action)).collect()
            };
            let fused = of(&|a| a == Action::Fused);
            let scans = of(&|a| a == Action::Scan);
            let encodes = of(&|a| a == Action::Encode);
            let n = v.elements();
            if fused.is_empty() {
                prop_assert!(covers(&encodes, n), "encode chunks of {v:?}");
                prop_assert!(v.params.is_some() || covers(&scans, n), "scan chunks of {v:?}");
                prop_assert!(v.params.is_none() || scans.is_empty());
            } else {
                prop_assert!(covers(&fused, n) && scans.is_empty() && encodes.is_empty());
            }
            let bits = u64::from(spec.affine.map_or(8, |a| a.bits));
            let k = v.k.max(1);
            let group = u64::from(spec.group_size).max(1);
            for c in fused.iter().chain(&encodes) {
                prop_assert!(c.bytes <= CHUNK_BYTES && c.bytes == c.count * v.dtype.size() as u64);
                let in_stream = if v.role == Role::Layer { c.first } else { c.first % k };
                prop_assert_eq!(in_stream * bits % 8, 0, "chunk {:?} of {:?} starts inside a byte", c, v);
            }
            for c in &fused {
                let domain_starts = |at: u64| match spec.granularity {
                    Granularity::Tensor | Granularity::Dimension => at == 0,
                    Granularity::Row => at.is_multiple_of(k),
                    Granularity::Group => (at % k).is_multiple_of(group),
                };
                prop_assert!(domain_starts(c.first), "{c:?} of {v:?} {spec:?}");
            }
        }
        replay(&list)?;
    }
}

/// Writes and consumes as two peers would, and checks that no chunk is overwritten before it is consumed.
fn replay(list: &ChunkList) -> Result<(), TestCaseError> {
    let n = list.chunks.len();
    let (mut consumed, mut written) = (0, 0);
    while consumed < n {
        let upto = list.writable(consumed);
        prop_assert!(upto > consumed, "no progress at chunk {consumed} of {n}");
        prop_assert!(upto >= written);
        written = upto;
        let live: Vec<&Chunk> = if list.resident {
            list.chunks.iter().filter(|c| !c.shared).collect()
        } else {
            list.chunks[consumed..written].iter().collect()
        };
        let mut spans: Vec<(u64, u64)> = live.iter().map(|c| (c.at, c.at + c.bytes)).collect();
        spans.sort_unstable();
        prop_assert!(spans.windows(2).all(|w| w[0].1 <= w[1].0), "overlap");
        prop_assert!(
            spans.iter().all(|s| s.0 >= list.base && s.1 <= list.base + list.capacity && s.0 % 64 == 0)
        );
        // Consume some, not all, so that the ring is met at many fill levels.
        consumed += ((written - consumed) / 2).max(1);
    }
    for (i, c) in list.chunks.iter().enumerate().filter(|(_, c)| c.shared) {
        let twin = list.chunks[..i]
            .iter()
            .find(|s| s.action == Action::Scan && s.item == c.item && s.first == c.first);
        prop_assert_eq!(twin.map(|s| (s.at, s.bytes)), Some((c.at, c.bytes)));
    }
    Ok(())
}
