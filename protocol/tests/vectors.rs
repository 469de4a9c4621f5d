//! The frames, descriptors and chunk lists in `vectors/`: written by another implementation, from PROTOCOL.md alone.

use std::path::Path;

use serde_json::{Value, json};
use shmquant_kernels::{FloatType, Granularity, Mapping, OnNonFinite, Scheme};
use shmquant_protocol::chunks::{Action, Chunk, ChunkList};
use shmquant_protocol::descriptor::{Body, Descriptor, Item, Role, Spec, TableKind, Values, Way};
use shmquant_protocol::field::NodeData;
use shmquant_protocol::message::{Extent, Lease, Message, Release, Target};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn vectors(name: &str) -> Result<Vec<Value>, Box<dyn std::error::Error>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name);
    let entries: Vec<Value> = serde_json::from_slice(&std::fs::read(path)?)?;
    assert!(!entries.is_empty(), "{name} is empty");
    Ok(entries)
}

fn bytes(entry: &Value, key: &str) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let text = entry[key].as_str().ok_or("no hex text")?;
    let digits = text.as_bytes();
    assert!(digits.len().is_multiple_of(2), "half a byte in {text}");
    Ok(digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap_or("?"), 16))
        .collect::<Result<_, _>>()?)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn messages_agree() -> Outcome {
    let mut seen = std::collections::BTreeSet::new();
    for entry in vectors("messages.json")? {
        let frame = bytes(&entry, "hex")?;
        let (request, message) = Message::decode(&frame).map_err(|e| format!("{}: {e}", entry["name"]))?;
        assert_eq!(json!(request), entry["request"], "{}", entry["name"]);
        assert_eq!(fields(&message), (entry["name"].clone(), entry["fields"].clone()));
        let mut out = Vec::new();
        message.encode(request, &mut out);
        assert_eq!(hex(&out), hex(&frame), "{}", entry["name"]);
        seen.insert(u16::from_le_bytes([frame[2], frame[3]]));
    }
    let requests = 1..=17;
    let replies = [1, 2, 3, 9, 10, 11, 12, 13, 14, 15, 16].map(|t: u16| t | 0x8000);
    assert!(seen.into_iter().eq(requests.chain(replies).chain([0xFFFF])), "a type has no vector");
    Ok(())
}

#[test]
fn other_minor_versions_are_understood() -> Outcome {
    for entry in vectors("growth.json")? {
        let (of, meant) = (bytes(&entry, "hex")?, bytes(&entry, "means")?);
        assert_eq!(Message::decode(&of)?, Message::decode(&meant)?, "{}", entry["what"]);
    }
    Ok(())
}

#[test]
fn broken_frames_are_refused() -> Outcome {
    for entry in vectors("refused.json")? {
        let decoded = Message::decode(&bytes(&entry, "hex")?);
        assert!(decoded.is_err(), "{}: {decoded:?}", entry["what"]);
    }
    Ok(())
}

#[test]
fn descriptors_and_chunks_agree() -> Outcome {
    for entry in vectors("descriptors.json")? {
        let what = &entry["what"];
        let raw = bytes(&entry, "hex")?;
        let descriptor = Descriptor::decode(&raw).map_err(|e| format!("{what}: {e}"))?;
        assert_eq!(
            head(&descriptor),
            json!([entry["table"], entry["flags"], entry["rows"], entry["metadata"]]),
            "{what}"
        );
        let specs: Vec<Value> = descriptor.specs.iter().map(spec_fields).collect();
        assert_eq!(json!(specs), entry["specs"], "{what}");
        let items: Vec<Value> = descriptor.items.iter().map(item_fields).collect();
        assert_eq!(json!(items), entry["items"], "{what}");
        let mut out = Vec::new();
        descriptor.encode(&mut out).map_err(|e| format!("{what}: {e:?}"))?;
        assert_eq!(hex(&out), hex(&raw), "{what}");
        for expected in entry["lists"].as_array().ok_or("no lists")? {
            let window = expected["window"].as_u64().ok_or("no window")?;
            let ring = expected["ring"].as_u64().ok_or("no ring")?;
            let list = ChunkList::with_ring(&descriptor, raw.len() as u64, window, ring);
            assert_eq!(json!(list.resident), expected["resident"], "{what}, {window}, {ring}");
            let chunks: Vec<Value> = list.chunks.iter().map(|c| chunk_fields(&descriptor, c)).collect();
            assert_eq!(json!(chunks), expected["chunks"], "{what}, {window}, {ring}");
        }
    }
    Ok(())
}

#[test]
fn every_cut_of_a_descriptor_is_refused() -> Outcome {
    for entry in vectors("descriptors.json")? {
        let raw = bytes(&entry, "hex")?;
        for end in 0..raw.len() {
            assert!(Descriptor::decode(&raw[..end]).is_err(), "{} cut to {end} bytes", entry["what"]);
        }
        let longer = [raw.as_slice(), &[0]].concat();
        assert!(Descriptor::decode(&longer).is_err(), "{} and a byte more", entry["what"]);
    }
    Ok(())
}

/// The page's name of a message, and its fields under the page's names.
fn fields(message: &Message) -> (Value, Value) {
    let none = extent(&Extent::default());
    let zeros = hex(&[0; 16]);
    let (name, fields) = match message {
        Message::Hello { minor, version } => ("HELLO", json!({"minor": minor, "library": version})),
        Message::Welcome(m) => (
            "HELLO reply",
            json!({"minor": m.minor, "backing": u32::from(m.posix), "instance": m.instance, "session": m.session,
                "token": hex(&m.token), "window": m.window, "max_window": m.max_window, "max_lanes": m.max_lanes,
                "poll": m.poll, "library": m.version}),
        ),
        Message::Join { session, token, window } => {
            ("JOIN", json!({"session": session, "token": hex(token), "window": window}))
        }
        Message::Joined { lane, segment, generation, size } => {
            ("JOIN reply", json!({"lane": lane, "segment": segment, "generation": generation, "size": size}))
        }
        Message::Quantize(m) => {
            let mut fields = json!({"descriptor": m.descriptor, "ready": m.ready, "timeout": m.timeout, "flags": 0,
                "digest": zeros, "releases": releases(&m.releases), "ring": m.ring});
            if let Some(naming) = &m.named {
                fields["flags"] = json!(1 | if naming.replace { 2 } else { 0 });
                fields["digest"] = json!(hex(&naming.digest));
                fields["name"] = json!(naming.name);
            }
            ("QUANTIZE", fields)
        }
        Message::Done { lease: l, report, ring } => {
            ("QUANTIZE reply", json!({"lease": lease(l), "report": report, "ring": ring}))
        }
        Message::Wrote { chunks } => ("WROTE", json!({"chunks": chunks})),
        Message::Consumed { chunks } => ("CONSUMED", json!({"chunks": chunks})),
        Message::Cancel { lane, request } => ("CANCEL", json!({"lane": lane, "request": request})),
        Message::Release(list) => ("RELEASE", json!({"releases": releases(list)})),
        Message::Unmap { segment } => ("UNMAP", json!({"segment": segment})),
        Message::Open(Target::Name(name)) => {
            ("OPEN", json!({"kind": 0, "ticket": 0, "secret": zeros, "extent": none, "name": name}))
        }
        Message::Open(Target::Ticket(ticket, secret)) => {
            ("OPEN", json!({"kind": 1, "ticket": ticket, "secret": hex(secret), "extent": none}))
        }
        Message::Open(Target::Again(e)) => {
            ("OPEN", json!({"kind": 2, "ticket": 0, "secret": zeros, "extent": extent(e)}))
        }
        Message::Opened { lease: l, name } => ("OPEN reply", json!({"lease": lease(l), "name": name})),
        Message::Ticket(e) => ("TICKET", json!({"extent": extent(e)})),
        Message::Ticketed { ticket, secret } => {
            ("TICKET reply", json!({"ticket": ticket, "secret": hex(secret)}))
        }
        Message::Publish { extent: e, replace, name } => {
            ("PUBLISH", json!({"extent": extent(e), "flags": if *replace { 2 } else { 0 }, "name": name}))
        }
        Message::Published => ("PUBLISH reply", json!({})),
        Message::Allocate { bytes, purpose, timeout } => {
            ("ALLOC", json!({"bytes": bytes, "purpose": *purpose as u32, "timeout": timeout}))
        }
        Message::Allocated { lease: l } => ("ALLOC reply", json!({"lease": lease(l)})),
        Message::Drop { name } => ("DROP", json!({"name": name})),
        Message::Dropped => ("DROP reply", json!({})),
        Message::List { cursor, what } => ("LIST", json!({"cursor": cursor, "what": *what as u32})),
        Message::Listed { cursor, entries } => ("LIST reply", json!({"cursor": cursor, "entries": entries})),
        Message::Stat => ("STAT", json!({})),
        Message::Stats(text) => ("STAT reply", json!({"stat": text})),
        Message::Ping => ("PING", json!({})),
        Message::Pong => ("PING reply", json!({})),
        Message::Bye => ("BYE", json!({})),
        Message::Error(e) => (
            "ERROR",
            json!({"code": e.code as u32, "row": e.row, "index": e.index, "count": e.count, "value": number(e.value),
                "message": e.message, "hint": e.hint, "column": e.column}),
        ),
    };
    (json!(name), fields)
}

fn extent(e: &Extent) -> Value {
    json!({"segment": e.segment, "generation": e.generation, "offset": e.offset, "length": e.length})
}

fn lease(l: &Lease) -> Value {
    let flags = u32::from(l.fd) | if l.dataset { 2 } else { 0 };
    json!({"extent": extent(&l.extent), "segment_size": l.segment_size, "flags": flags})
}

fn releases(list: &[Release]) -> Value {
    let one = |r: &Release| json!({"segment": r.segment, "generation": r.generation, "flags": u64::from(r.tainted)});
    list.iter().map(one).collect()
}

fn number(value: f64) -> Value {
    if value.is_finite() { json!(value) } else { json!(value.to_string()) }
}

fn head(d: &Descriptor) -> Value {
    let (table, large_names) = match d.table {
        TableKind::Layers { large_names } => (1, large_names),
        TableKind::Columns => (2, false),
    };
    let flags = u8::from(d.metrics) | u8::from(d.continue_on_error) << 1 | u8::from(large_names) << 2;
    let metadata: Vec<_> = d.metadata.iter().map(|(k, v)| json!([k, v])).collect();
    json!([table, flags, d.rows, metadata])
}

fn spec_fields(spec: &Spec) -> Value {
    let scheme = spec.affine.map_or(0, |a| match a.scheme {
        Scheme::Int8 => 1,
        Scheme::UInt8 => 2,
        Scheme::Int4 => 3,
        Scheme::UInt4 => 4,
        Scheme::Int2 => 5,
        Scheme::UInt2 => 6,
    });
    let mapping = spec.affine.map_or(1, |a| match a.mapping {
        Mapping::Symmetric => 1,
        Mapping::Asymmetric => 2,
    });
    let granularity = match spec.granularity {
        Granularity::Tensor => 1,
        Granularity::Row => 2,
        Granularity::Dimension => 3,
        Granularity::Group => 4,
    };
    let on_nonfinite = match spec.on_nonfinite {
        OnNonFinite::Error => 0,
        OnNonFinite::Null => 1,
        OnNonFinite::Saturate => 2,
    };
    json!({"scheme": scheme, "mapping": mapping, "granularity": granularity, "on_nonfinite": on_nonfinite,
        "packing": u8::from(spec.packed), "group_size": spec.group_size})
}

fn item_fields(item: &Item) -> Value {
    match &item.body {
        Body::Keep { field, .. } => {
            json!({"role": 4, "name": item.name, "arrow": field.data_type().to_string()})
        }
        Body::Values(v) => values_fields(&item.name, v),
    }
}

fn values_fields(name: &str, v: &Values) -> Value {
    let role = match v.role {
        Role::Layer => 1,
        Role::Vector => 2,
        Role::Plain => 3,
    };
    let dtype = match v.dtype {
        FloatType::F16 => 1,
        FloatType::Bf16 => 2,
        FloatType::F32 => 3,
        FloatType::F64 => 4,
    };
    let params = v.params.as_ref();
    json!({"role": role, "name": name, "rows": v.rows, "k": v.k, "spec": v.spec, "dtype": dtype, "null": v.null,
        "null_count": v.null_count, "shape": v.shape, "params_id": params.map_or(0, |p| p.id),
        "scales": params.map_or(&[][..], |p| &p.scales),
        "zero_points": params.map_or(&[][..], |p| &p.zero_points),
        "extent": v.place().as_ref().map(|p| extent(&p.extent)), "offset": v.place().map_or(0, |p| p.offset),
        "encoded": v.way == Way::Encoded})
}

/// A chunk as the vectors have it: what it takes from which stream, and where it lies.
fn chunk_fields(descriptor: &Descriptor, c: &Chunk) -> Value {
    let (stream, size) = match &descriptor.items[c.item as usize].body {
        Body::Keep { data, .. } => (kept_stream(data, c.action), 1),
        Body::Values(v) => match c.action {
            Action::Copy { .. } => (0, 1),
            _ => (u64::from(v.null_count > 0), v.dtype.size() as u64),
        },
    };
    let kind = match c.action {
        Action::Copy { .. } => "copy",
        Action::Fused => "fused",
        Action::Scan => "scan",
        Action::Encode => "encode",
    };
    let start = (!c.shared).then_some(c.start);
    json!([c.item, stream, kind, c.first * size, c.bytes, start, c.at, !c.shared])
}

/// Which of the buffers that are not empty a Copy chunk takes from.
fn kept_stream(data: &NodeData, action: Action) -> u64 {
    fn sizes(data: &NodeData, out: &mut Vec<u64>) {
        out.extend(&data.buffers);
        data.children.iter().for_each(|child| sizes(child, out));
    }
    let mut all = Vec::new();
    sizes(data, &mut all);
    let Action::Copy { buffer } = action else { return u64::MAX };
    all.iter().take(buffer as usize).filter(|size| **size > 0).count() as u64
}
