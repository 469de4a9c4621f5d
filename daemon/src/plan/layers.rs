//! The result of a layers table: one row a layer, thirteen columns, split only where 32-bit offsets would pass 2^31.

use std::ops::Range;
use std::sync::Arc;

use arrow_schema::{DataType, Field, Fields, Schema};
use shmquant_kernels::{Affine, FloatType};
use shmquant_protocol::descriptor::{Body, Descriptor, Spec, TableKind, Values};
use shmquant_protocol::message::{ErrorCode, Failure};
use shmquant_protocol::meta;

use super::columns::is_asymmetric;
use super::file::{BufferId, Builder, MessageId, NodeId, Place};
use super::{Target, ValuesTarget, Zeros, refuse, sizes};

/// The numbers of the `metrics` struct.
pub(crate) const METRICS: [&str; 6] =
    ["mse", "sqnr_db", "max_abs_err", "cosine", "n_clipped", "n_degenerate"];
/// How many of them are float64, the others int64.
pub(crate) const FLOAT_METRICS: usize = 4;

/// Which columns have 64-bit offsets, because one value alone passes the limit or the input had them.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Large {
    names: bool,
    data: bool,
    params: bool,
}

/// One record batch.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Items.
    pub(crate) rows: Range<usize>,
    pub(crate) name: Binary,
    pub(crate) data: Binary,
    pub(crate) scales: List,
    pub(crate) zeros: List,
    pub(crate) shape: List,
    pub(crate) bit_width: BufferId,
    pub(crate) scheme: BufferId,
    pub(crate) src_dtype: BufferId,
    pub(crate) packing: BufferId,
    pub(crate) group_size: BufferId,
    pub(crate) axis: BufferId,
    pub(crate) metrics: NodeId,
    /// Array and values of each number in the struct.
    pub(crate) numbers: Vec<(NodeId, BufferId)>,
    pub(crate) error: Binary,
    /// Words of the three dictionaries, in the first batch only.
    pub(crate) words: Vec<Words>,
}

/// A binary or string column.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Binary {
    pub(crate) node: NodeId,
    pub(crate) offsets: BufferId,
    pub(crate) data: BufferId,
    pub(crate) large: bool,
}

/// A list column; its values are never null.
#[derive(Debug, Clone, Copy)]
pub(crate) struct List {
    pub(crate) node: NodeId,
    pub(crate) offsets: BufferId,
    pub(crate) data: BufferId,
    pub(crate) large: bool,
}

/// A dictionary's content.
#[derive(Debug)]
pub(crate) struct Words {
    pub(crate) offsets: BufferId,
    pub(crate) data: BufferId,
    pub(crate) words: Vec<&'static str>,
}

/// What one layer takes in the columns of varying length.
#[derive(Debug, Clone, Copy)]
struct Row {
    code_bytes: u64,
    scales: u64,
    zeros: u64,
    name: u64,
    shape: u64,
    error: u64,
}

/// Adds the record batches; gives one target a layer.
pub(super) fn lay_out(
    b: &mut Builder,
    d: &Descriptor,
    limit: u64,
) -> Result<(Vec<Target>, Vec<Batch>, Large), Failure> {
    let mut rows = Vec::with_capacity(d.items.len());
    for item in &d.items {
        let Body::Values(values) = &item.body else {
            return Err(refuse(ErrorCode::Unsupported, &item.name, "a layers table keeps no columns"));
        };
        rows.push(row(d, &item.name, values)?);
    }
    let large = Large {
        names: d.table == TableKind::Layers { large_names: true } || rows.iter().any(|r| r.name > limit),
        data: rows.iter().any(|r| r.code_bytes > limit),
        params: rows.iter().any(|r| r.scales > limit),
    };
    let mut batches = Vec::new();
    let mut targets = Vec::with_capacity(rows.len());
    for range in split(&rows, large, limit) {
        let batch = batch(b, d, &rows[range.clone()], range.clone(), large, batches.is_empty());
        let (mut codes, mut scales, mut zeros) = (0u64, 0u64, 0u64);
        for (item, row) in d.items[range.clone()].iter().zip(&rows[range]) {
            let Body::Values(values) = &item.body else { continue };
            let spec = d.spec(values);
            targets.push(Target::Values(Box::new(ValuesTarget {
                layout: values.layout(spec),
                policy: values.policy(spec),
                params: row.scales,
                codes: Place { buffer: batch.data.data, offset: codes },
                code_bytes: row.code_bytes,
                scales: Some(Place { buffer: batch.scales.data, offset: scales }),
                zeros: match spec.affine {
                    Some(affine) if is_asymmetric(&affine) => {
                        Zeros::F32(Place { buffer: batch.zeros.data, offset: zeros })
                    }
                    _ => Zeros::None,
                },
                validity: None,
            })));
            // Saturating: a sum that wraps is refused as too large before any of these places is used.
            codes = codes.saturating_add(row.code_bytes);
            scales = scales.saturating_add(row.scales.saturating_mul(4));
            zeros = zeros.saturating_add(row.zeros.saturating_mul(4));
        }
        batches.push(batch);
    }
    Ok((targets, batches, large))
}

/// The thirteen columns.
pub(super) fn schema(d: &Descriptor, large: Large) -> Schema {
    let list = |values, large: bool| {
        let item = Arc::new(Field::new("item", values, true));
        if large { DataType::LargeList(item) } else { DataType::List(item) }
    };
    let word = DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8));
    let metrics: Fields = METRICS
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let data_type = if i < FLOAT_METRICS { DataType::Float64 } else { DataType::Int64 };
            Field::new(*name, data_type, true)
        })
        .collect();
    let fields = [
        ("layer_name", if large.names { DataType::LargeUtf8 } else { DataType::Utf8 }),
        ("quantized_data", if large.data { DataType::LargeBinary } else { DataType::Binary }),
        ("scales", list(DataType::Float32, large.params)),
        ("zero_points", list(DataType::Float32, large.params)),
        ("shape", list(DataType::Int64, false)),
        ("bit_width", DataType::UInt8),
        ("scheme", word.clone()),
        ("src_dtype", word.clone()),
        ("packing", word),
        ("group_size", DataType::Int32),
        ("axis", DataType::Int8),
        ("metrics", DataType::Struct(metrics)),
        ("error", DataType::Utf8),
    ];
    let fields: Vec<_> =
        fields.into_iter().map(|(name, data_type)| Field::new(name, data_type, true)).collect();
    Schema::new_with_metadata(fields, d.metadata.clone())
}

/// Most bytes of a layer's error text.
pub(crate) fn error_cap(d: &Descriptor, name: &str) -> usize {
    if d.continue_on_error { name.len().min(256) + 192 } else { 0 }
}

/// The axes a layer has in the result: without a shape one, but none for a scalar.
pub(crate) fn axes(values: &Values) -> usize {
    let flat = values.shape.is_empty() && !values.null && values.elements() != 1;
    if flat { 1 } else { values.shape.len() }
}

/// The words of a layer's `scheme`, `src_dtype` and `packing`.
pub(crate) fn words(values: &Values, spec: &Spec) -> [&'static str; 3] {
    let scheme = spec.affine.map_or(values.dtype.name(), |a| a.scheme.name());
    [scheme, values.dtype.name(), meta::packing(spec)]
}

/// Bits of a code, or of a value of a layer that stays as it is.
pub(crate) fn bit_width(spec: &Spec, dtype: FloatType) -> u8 {
    spec.affine.map_or(dtype.size() as u8 * 8, |a| a.bits)
}

fn row(d: &Descriptor, name: &str, values: &Values) -> Result<Row, Failure> {
    let spec = d.spec(values);
    if values.shape.len() > 128 {
        let what = format!("a shape of {} axes, 128 are allowed", values.shape.len());
        return Err(refuse(ErrorCode::Unsupported, name, &what));
    }
    let mut row = Row {
        code_bytes: 0,
        scales: 0,
        zeros: 0,
        name: name.len() as u64,
        shape: axes(values) as u64,
        error: error_cap(d, name) as u64,
    };
    // Nothing in, nothing out: also no parameters.
    if values.elements() == 0 {
        return Ok(row);
    }
    match &spec.affine {
        None => row.code_bytes = values.elements() * values.dtype.size() as u64,
        Some(affine) => params_and_codes(&mut row, name, values, spec, affine)?,
    }
    Ok(row)
}

fn params_and_codes(
    row: &mut Row,
    name: &str,
    values: &Values,
    spec: &Spec,
    affine: &Affine,
) -> Result<(), Failure> {
    let (_, sizes) = sizes(name, values, spec, affine)?;
    row.code_bytes = sizes.code_bytes;
    row.scales = sizes.params;
    row.zeros = if is_asymmetric(affine) { sizes.params } else { 0 };
    Ok(())
}

/// Cuts the rows so that no batch's offsets pass the limit.
fn split(rows: &[Row], large: Large, limit: u64) -> Vec<Range<usize>> {
    let mut batches = Vec::new();
    let mut start = 0;
    let mut sum = [0u64; 5];
    for (i, row) in rows.iter().enumerate() {
        let limited = |large: bool, n: u64| if large { 0 } else { n };
        let add = [
            limited(large.names, row.name),
            limited(large.data, row.code_bytes),
            limited(large.params, row.scales),
            row.shape,
            row.error,
        ];
        let next = |sum: [u64; 5]| std::array::from_fn::<_, 5, _>(|c| sum[c].saturating_add(add[c]));
        if i > start && next(sum).iter().any(|n| *n > limit) {
            batches.push(start..i);
            start = i;
            sum = [0; 5];
        }
        sum = next(sum);
    }
    batches.push(start..rows.len());
    batches
}

fn batch(
    b: &mut Builder,
    d: &Descriptor,
    rows: &[Row],
    range: Range<usize>,
    large: Large,
    first: bool,
) -> Batch {
    let n = rows.len() as u64;
    let m = b.batch(n);
    let total = |f: fn(&Row) -> u64| rows.iter().map(f).fold(0, u64::saturating_add);
    let bitmap = n.div_ceil(8);
    let fixed = |b: &mut Builder, bytes: u64| {
        b.node(m, n, 0, 0);
        b.buffer(m, n * bytes)
    };
    let name = binary(b, m, n, 0, total(|r| r.name), large.names);
    let data = binary(b, m, n, bitmap, total(|r| r.code_bytes), large.data);
    let scales = list(b, m, n, bitmap, total(|r| r.scales), 4, large.params);
    let zeros = list(b, m, n, bitmap, total(|r| r.zeros), 4, large.params);
    let shape = list(b, m, n, bitmap, total(|r| r.shape), 8, false);
    let bit_width = fixed(b, 1);
    let [scheme, src_dtype, packing] = std::array::from_fn(|_| fixed(b, 1));
    let group_size = fixed(b, 4);
    let axis = fixed(b, 1);
    let metrics = b.node(m, n, 0, bitmap);
    let numbers = METRICS
        .iter()
        .enumerate()
        .map(|(i, _)| {
            let node = b.node(m, n, 0, if i < FLOAT_METRICS { bitmap } else { 0 });
            (node, b.buffer(m, n * 8))
        })
        .collect();
    let error = binary(b, m, n, bitmap, total(|r| r.error), false);
    let words = if first { dictionaries(b, d) } else { Vec::new() };
    Batch {
        rows: range,
        name,
        data,
        scales,
        zeros,
        shape,
        bit_width,
        scheme,
        src_dtype,
        packing,
        group_size,
        axis,
        metrics,
        numbers,
        error,
        words,
    }
}

fn dictionaries(b: &mut Builder, d: &Descriptor) -> Vec<Words> {
    (0..3)
        .map(|column| {
            let words = distinct(d, column);
            let n = words.len() as u64;
            let m = b.dictionary(n);
            b.node(m, n, 0, 0);
            let offsets = b.buffer(m, (n + 1) * 4);
            let data = b.buffer(m, words.iter().map(|w| w.len() as u64).sum());
            Words { offsets, data, words }
        })
        .collect()
}

/// The distinct words of one of the three dictionary columns, in the order of their first use.
fn distinct(d: &Descriptor, column: usize) -> Vec<&'static str> {
    let mut out: Vec<&'static str> = Vec::new();
    for item in &d.items {
        if let Body::Values(values) = &item.body {
            let word = words(values, d.spec(values))[column];
            if !out.contains(&word) {
                out.push(word);
            }
        }
    }
    out
}

fn binary(b: &mut Builder, m: MessageId, n: u64, validity: u64, bytes: u64, large: bool) -> Binary {
    let node = b.node(m, n, 0, validity);
    let offsets = b.buffer(m, (n + 1) * if large { 8 } else { 4 });
    Binary { node, offsets, data: b.buffer(m, bytes), large }
}

fn list(b: &mut Builder, m: MessageId, n: u64, validity: u64, values: u64, width: u64, large: bool) -> List {
    let node = b.node(m, n, 0, validity);
    let offsets = b.buffer(m, (n + 1) * if large { 8 } else { 4 });
    b.node(m, values, 0, 0);
    List { node, offsets, data: b.buffer(m, values.saturating_mul(width)), large }
}
