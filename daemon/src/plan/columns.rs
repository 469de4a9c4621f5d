//! The result of a table with vector, plain and kept columns (`docs/reference.md`): its schema and arrays.

use std::collections::HashSet;
use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema};
use shmquant_kernels::{Affine, Granularity};
use shmquant_protocol::descriptor::{Body, Descriptor, Params, Role, Spec, Values, params_id};
use shmquant_protocol::message::{ErrorCode, Failure};
use shmquant_protocol::meta::{self, CodesMeta, ParamSource, ParamsBase64};

use super::file::{BufferId, Builder, MessageId, NodeId, Place};
use super::{Target, ValuesTarget, Zeros, kept, refuse, sizes};

/// Most bytes of parameters as text in all fields together.
const MAX_EMBEDDED: u64 = 16 << 20;

/// The result columns of one quantized column.
#[derive(Debug)]
pub(crate) struct Column {
    /// Index of its item.
    pub(crate) item: usize,
    /// Arrays that are null where the input or the policy says so: codes, scales, zero points.
    pub(crate) nullable: Vec<NodeId>,
    /// Dictionary indices: all 0.
    pub(crate) indices: Vec<BufferId>,
    /// The one value of `_params_id`.
    pub(crate) params_id: Option<BufferId>,
}

/// Adds the one record batch; gives one target an item and the quantized columns.
pub(super) fn lay_out(b: &mut Builder, d: &Descriptor) -> Result<(Vec<Target>, Vec<Column>), Failure> {
    check_names(d)?;
    let m = b.batch(d.rows);
    let mut columns = Vec::new();
    let mut targets = Vec::with_capacity(d.items.len());
    for (index, item) in d.items.iter().enumerate() {
        let target = match &item.body {
            Body::Keep { field, data } => Target::Kept(
                kept::column(b, m, field.data_type(), data)
                    .map_err(|what| refuse(ErrorCode::InvalidInput, &item.name, &what))?,
            ),
            Body::Values(values) => {
                let mut column =
                    Column { item: index, nullable: Vec::new(), indices: Vec::new(), params_id: None };
                let target = quantized(b, m, &item.name, values, d.spec(values), &mut column)?;
                columns.push(column);
                Target::Values(Box::new(target))
            }
        };
        targets.push(target);
    }
    Ok((targets, columns))
}

/// Bytes that embedded parameters take in one copy of the schema.
pub(super) fn embedded_bytes(d: &Descriptor) -> Result<u64, Failure> {
    let mut total = 0u64;
    for item in &d.items {
        let Body::Values(values) = &item.body else { continue };
        let spec = d.spec(values);
        if values.role == Role::Vector && is_embedded(spec) {
            let text = values.layout(spec).n_params().saturating_mul(4).div_ceil(3).saturating_mul(4);
            total = total.saturating_add(text.saturating_mul(2));
            if total > MAX_EMBEDDED {
                let what = format!("parameters of {total} bytes do not fit the schema ({MAX_EMBEDDED})");
                return Err(refuse(ErrorCode::Unsupported, &item.name, &what));
            }
        }
    }
    Ok(total)
}

/// The schema; `params` gives an item's parameters for those that are embedded in metadata.
pub(crate) fn schema(d: &Descriptor, params: &dyn Fn(usize) -> Params) -> Schema {
    let mut fields = Vec::new();
    for (index, item) in d.items.iter().enumerate() {
        match &item.body {
            Body::Keep { field, .. } => fields.push(field.clone().with_name(&item.name)),
            Body::Values(values) => {
                let spec = d.spec(values);
                if let Some(affine) = spec.affine {
                    quantized_fields(&mut fields, &item.name, values, spec, &affine, &|| params(index));
                }
            }
        }
    }
    Schema::new_with_metadata(fields, d.metadata.clone())
}

/// Whether a vector column's parameters are in its field's metadata.
pub(crate) fn is_embedded(spec: &Spec) -> bool {
    matches!(spec.granularity, Granularity::Tensor | Granularity::Dimension)
}

fn quantized(
    b: &mut Builder,
    m: MessageId,
    name: &str,
    values: &Values,
    spec: &Spec,
    column: &mut Column,
) -> Result<ValuesTarget, Failure> {
    let affine =
        spec.affine.ok_or_else(|| refuse(ErrorCode::Unsupported, name, "a column needs a scheme"))?;
    let (layout, sizes) = sizes(name, values, spec, &affine)?;
    let rows = values.rows;
    let may_null = values.null_count > 0 || spec.on_nonfinite == shmquant_kernels::OnNonFinite::Null;
    let validity = if may_null { rows.div_ceil(8) } else { 0 };
    let asymmetric = is_asymmetric(&affine);
    let mut nullable = |b: &mut Builder| {
        let node = b.node(m, rows, 0, validity);
        column.nullable.push(node);
        node
    };

    let codes_node = nullable(b);
    let codes = if values.role == Role::Vector {
        b.node(m, sizes.code_bytes, 0, 0);
        b.buffer(m, sizes.code_bytes)
    } else {
        b.buffer(m, sizes.code_bytes)
    };
    let mut target = ValuesTarget {
        layout,
        policy: spec.on_nonfinite,
        params: sizes.params,
        codes: Place::start(codes),
        code_bytes: sizes.code_bytes,
        scales: None,
        zeros: if asymmetric { Zeros::Private } else { Zeros::None },
        validity: b.validity(codes_node).filter(|_| values.null_count > 0),
    };
    let bytes = sizes.params.saturating_mul(4);
    let zeros = |place| if affine.signed { Zeros::I8(place) } else { Zeros::U8(place) };
    match (values.role, spec.granularity) {
        (Role::Plain, _) => {
            let mut constant = |b: &mut Builder, bytes| {
                nullable(b);
                column.indices.push(b.buffer(m, rows));
                let dictionary = b.dictionary(1);
                b.node(dictionary, 1, 0, 0);
                Place::start(b.buffer(dictionary, bytes))
            };
            target.scales = Some(constant(b, 4));
            target.zeros = zeros(constant(b, 1));
        }
        (_, Granularity::Row | Granularity::Group) => {
            let mut per_row = |b: &mut Builder, bytes| {
                nullable(b);
                if spec.granularity == Granularity::Group {
                    b.node(m, sizes.params, 0, 0);
                }
                Place::start(b.buffer(m, bytes))
            };
            target.scales = Some(per_row(b, bytes));
            if asymmetric {
                target.zeros = zeros(per_row(b, sizes.params));
            }
        }
        (_, Granularity::Tensor | Granularity::Dimension) => {
            b.node(m, rows, 0, 0);
            column.indices.push(b.buffer(m, rows));
            let dictionary = b.dictionary(1);
            b.node(dictionary, 1, 0, 0);
            column.params_id = Some(b.buffer(dictionary, 8));
        }
    }
    Ok(target)
}

fn quantized_fields(
    out: &mut Vec<Field>,
    name: &str,
    values: &Values,
    spec: &Spec,
    affine: &Affine,
    params: &dyn Fn() -> Params,
) {
    let layout = values.layout(spec);
    let packed = spec.packed && affine.bits < 8;
    // Bytes that hold several codes have no sign.
    let code = if affine.signed && !packed { DataType::Int8 } else { DataType::UInt8 };
    let zero = if affine.signed { DataType::Int8 } else { DataType::UInt8 };
    let scale_name = format!("{name}{}", meta::SCALE_SUFFIX);
    let zero_name = format!("{name}{}", meta::ZERO_POINT_SUFFIX);
    let embedded = values.role == Role::Vector && is_embedded(spec);
    let codes = match values.role {
        Role::Vector => list(code, layout.row_bytes(affine.bits)),
        _ => code,
    };
    let text = codes_meta(name, values, spec, affine, embedded.then(params).as_ref()).to_json();
    out.push(Field::new(name, codes, true).with_metadata([
        (meta::EXTENSION_NAME_KEY.to_owned(), meta::EXTENSION_NAME.to_owned()),
        (meta::EXTENSION_METADATA_KEY.to_owned(), text),
    ]));
    let constant = |values| DataType::Dictionary(Box::new(DataType::Int8), Box::new(values));
    if embedded {
        let id_name = format!("{name}{}", meta::PARAMS_ID_SUFFIX);
        out.push(Field::new(id_name, constant(DataType::UInt64), true));
        return;
    }
    let each = |data_type: DataType| match (values.role, spec.granularity) {
        (Role::Plain, _) => constant(data_type),
        (_, Granularity::Group) => list(data_type, layout.groups_per_row()),
        _ => data_type,
    };
    out.push(Field::new(scale_name, each(DataType::Float32), true));
    if values.role == Role::Plain || is_asymmetric(affine) {
        out.push(Field::new(zero_name, each(zero), true));
    }
}

fn codes_meta(
    name: &str,
    values: &Values,
    spec: &Spec,
    affine: &Affine,
    params: Option<&Params>,
) -> CodesMeta {
    let asymmetric = is_asymmetric(affine);
    let source = |key: &str, suffix| match params {
        Some(_) => ParamSource::Params(key.to_owned()),
        None => ParamSource::Column(format!("{name}{suffix}")),
    };
    CodesMeta {
        v: 1,
        scheme: affine.scheme.to_string(),
        kind: "affine".to_owned(),
        mapping: affine.mapping.to_string(),
        granularity: spec.granularity.to_string(),
        dim: (values.role == Role::Vector).then_some(values.k),
        group_size: (spec.group_size > 0).then_some(u64::from(spec.group_size)),
        qmin: affine.qmin,
        qmax: affine.qmax,
        packing: super::packing(spec).to_owned(),
        scale: source("scale", meta::SCALE_SUFFIX),
        zero_point: match asymmetric || values.role == Role::Plain {
            true => source("zero_point", meta::ZERO_POINT_SUFFIX),
            false => ParamSource::Const(0),
        },
        params_id: params.map(|p| format!("{:016x}", p.id)),
        params_b64: params.map(|p| ParamsBase64 {
            scale: meta::encode_f32(p.scales.iter().copied()),
            zero_point: asymmetric.then(|| meta::encode_f32(p.zero_points.iter().map(|z| *z as f32))),
        }),
        src_dtype: values.dtype.to_string(),
        decode: "(q-zp)*scale".to_owned(),
    }
}

/// Parameters with their identity.
pub(crate) fn with_id(scales: Vec<f32>, zero_points: Vec<i32>) -> Params {
    Params { id: params_id(&scales, &zero_points), scales, zero_points }
}

/// Whether zero points are stored.
pub(crate) fn is_asymmetric(affine: &Affine) -> bool {
    affine.mapping == shmquant_kernels::Mapping::Asymmetric
}

fn list(values: DataType, n: u64) -> DataType {
    // Dimensions are at most i32::MAX: the descriptor was refused otherwise.
    DataType::FixedSizeList(Arc::new(Field::new("item", values, true)), i32::try_from(n).unwrap_or(i32::MAX))
}

/// What the names of a quantized column's further result columns end in.
fn suffixes(values: &Values, spec: &Spec) -> &'static [&'static str] {
    let asymmetric = spec.affine.is_some_and(|a| is_asymmetric(&a));
    match (values.role, is_embedded(spec), asymmetric) {
        // A constant zero point costs a byte a row, and every plain column then reads the same way.
        (Role::Plain, _, _) | (_, false, true) => &[meta::SCALE_SUFFIX, meta::ZERO_POINT_SUFFIX],
        (_, true, _) => &[meta::PARAMS_ID_SUFFIX],
        (_, false, false) => &[meta::SCALE_SUFFIX],
    }
}

/// How many result columns a quantized column has.
pub(super) fn width(values: &Values, spec: &Spec) -> usize {
    1 + suffixes(values, spec).len()
}

/// A name that the result adds must not be one that the table has.
fn check_names(d: &Descriptor) -> Result<(), Failure> {
    let names: HashSet<&str> = d.items.iter().map(|i| i.name.as_str()).collect();
    for item in &d.items {
        let Body::Values(values) = &item.body else { continue };
        for suffix in suffixes(values, d.spec(values)) {
            let added = format!("{}{suffix}", item.name);
            if names.contains(added.as_str()) {
                let what = format!("the column {added:?} is in the way of its parameters");
                let mut failure = refuse(ErrorCode::InvalidInput, &item.name, &what);
                failure.hint = format!("rename the column {added:?}");
                return Err(failure);
            }
        }
    }
    Ok(())
}
