//! A source of layers whose values follow from their index.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a step that fails is how a test fails")]

use shmquant_kernels::{Affine, FloatType, Granularity, OnNonFinite, Scheme};
use shmquant_protocol::chunks::Chunk;
use shmquant_protocol::client::Source;
use shmquant_protocol::descriptor::{Body, Descriptor, Item, Role, Spec, TableKind, Values, Way};

/// float32 layers of one row each, int8 by row.
pub(crate) struct Layers {
    pub(crate) descriptor: Descriptor,
}

impl Layers {
    pub(crate) fn new(sizes: &[u64]) -> Self {
        let spec = Spec {
            affine: Some(Affine::new(Scheme::Int8, None).unwrap()),
            granularity: Granularity::Row,
            on_nonfinite: OnNonFinite::Error,
            packed: false,
            group_size: 0,
        };
        let item = |(i, k): (usize, &u64)| Item {
            name: format!("layer {i}"),
            body: Body::Values(Values {
                role: Role::Layer,
                spec: 0,
                dtype: FloatType::F32,
                null: false,
                rows: 1,
                k: *k,
                null_count: 0,
                shape: vec![],
                params: None,
                way: Way::Streamed,
            }),
        };
        let descriptor = Descriptor {
            table: TableKind::Layers { large_names: false },
            metrics: false,
            continue_on_error: false,
            specs: vec![spec],
            metadata: Default::default(),
            rows: sizes.len() as u64,
            items: sizes.iter().enumerate().map(item).collect(),
        };
        Self { descriptor }
    }

    /// The same, encoded by the client.
    #[allow(dead_code, reason = "every test binary has its own copy and uses a part of it")]
    pub(crate) fn encoded(sizes: &[u64]) -> Self {
        let mut layers = Self::new(sizes);
        for item in &mut layers.descriptor.items {
            if let Body::Values(values) = &mut item.body {
                values.way = Way::Encoded;
            }
        }
        layers
    }
}

impl Source for Layers {
    fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    fn fill(&self, chunk: &Chunk, out: &mut [u8]) {
        for (i, value) in (chunk.first..).zip(out.chunks_exact_mut(4)) {
            value.copy_from_slice(&((i % 255) as f32 - 127.0).to_le_bytes());
        }
    }
}
