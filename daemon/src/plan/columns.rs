//! The result of a table with vector, plain and kept columns (`docs/reference.md`): its schema and arrays.

use std::collections::HashSet;
use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema};
use shmquant_kernels::{Affine, Granularity};
use shmquant_protocol::descriptor::{Body, Descriptor, Params, Role, Spec, Values, params_id};
use shmquant_protocol::message::{ErrorCode, Failure};
use shmquant_protocol::meta::{self, CodesMeta, Companion, ParamSource, ParamsBase64, companions, facts_id};

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
        if is_embedded(values, spec) {
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

/// Whether a column's parameters are in its field's metadata.
pub(crate) fn is_embedded(values: &Values, spec: &Spec) -> bool {
    values.role == Role::Vector && matches!(spec.granularity, Granularity::Tensor | Granularity::Dimension)
}

/// What each row of a column's `_params_id` says.
pub(crate) fn row_id(values: &Values, spec: &Spec, embedded: Option<&Params>) -> u64 {
    facts_id(spec, dim(values), embedded.map(|p| p.id))
}

/// Elements of a vector; `None` for a plain column.
fn dim(values: &Values) -> Option<u64> {
    (values.role == Role::Vector).then_some(values.k)
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
        policy: values.policy(spec),
        params: sizes.params,
        codes: Place::start(codes),
        code_bytes: sizes.code_bytes,
        scales: None,
        zeros: if asymmetric { Zeros::Private } else { Zeros::None },
        validity: b.validity(codes_node).filter(|_| values.null_count > 0),
    };
    for companion in companions(values.role, spec) {
        let size = match companion {
            Companion::Scale => 4,
            Companion::ZeroPoint => 1,
            Companion::ParamsId => 8,
        };
        match companion {
            Companion::ParamsId => b.node(m, rows, 0, 0),
            _ => nullable(b),
        };
        let place = if *companion == Companion::ParamsId || values.role == Role::Plain {
            column.indices.push(b.buffer(m, rows));
            constant(b, size)
        } else {
            if spec.granularity == Granularity::Group {
                b.node(m, sizes.params, 0, 0);
            }
            b.buffer(m, sizes.params.saturating_mul(size))
        };
        match companion {
            Companion::Scale => target.scales = Some(Place::start(place)),
            Companion::ZeroPoint if affine.signed => target.zeros = Zeros::I8(Place::start(place)),
            Companion::ZeroPoint => target.zeros = Zeros::U8(Place::start(place)),
            Companion::ParamsId => column.params_id = Some(place),
        }
    }
    Ok(target)
}

/// A dictionary of one value of `bytes`.
fn constant(b: &mut Builder, bytes: u64) -> BufferId {
    let dictionary = b.dictionary(1);
    b.node(dictionary, 1, 0, 0);
    b.buffer(dictionary, bytes)
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
    let codes = match values.role {
        Role::Vector => list(code, layout.row_bytes(affine.bits)),
        _ => code,
    };
    let text =
        codes_meta(name, values, spec, affine, is_embedded(values, spec).then(params).as_ref()).to_json();
    out.push(Field::new(name, codes, true).with_metadata([
        (meta::EXTENSION_NAME_KEY.to_owned(), meta::EXTENSION_NAME.to_owned()),
        (meta::EXTENSION_METADATA_KEY.to_owned(), text),
    ]));
    let constant = |values| DataType::Dictionary(Box::new(DataType::Int8), Box::new(values));
    let ranges = |data_type: DataType| match (values.role, spec.granularity) {
        (Role::Plain, _) => constant(data_type),
        (_, Granularity::Group) => list(data_type, layout.groups_per_row()),
        _ => data_type,
    };
    for companion in companions(values.role, spec) {
        let data_type = match companion {
            Companion::Scale => ranges(DataType::Float32),
            Companion::ZeroPoint if affine.signed => ranges(DataType::Int8),
            Companion::ZeroPoint => ranges(DataType::UInt8),
            Companion::ParamsId => constant(DataType::UInt64),
        };
        out.push(Field::new(companion.of(name), data_type, true));
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
    let beside = companions(values.role, spec);
    let source = |key: &str, companion: Companion| match params {
        Some(_) => ParamSource::Params(key.to_owned()),
        None => ParamSource::Column(companion.of(name)),
    };
    CodesMeta {
        v: 1,
        scheme: affine.scheme.to_string(),
        kind: "affine".to_owned(),
        mapping: affine.mapping.to_string(),
        granularity: spec.granularity.to_string(),
        dim: dim(values),
        group_size: (spec.group_size > 0).then_some(u64::from(spec.group_size)),
        qmin: affine.qmin,
        qmax: affine.qmax,
        packing: meta::packing(spec).to_owned(),
        scale: source("scale", Companion::Scale),
        zero_point: match asymmetric || beside.contains(&Companion::ZeroPoint) {
            true => source("zero_point", Companion::ZeroPoint),
            false => ParamSource::Const(0),
        },
        params_id: beside
            .contains(&Companion::ParamsId)
            .then(|| format!("{:016x}", row_id(values, spec, params))),
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

/// How many result columns a quantized column has.
pub(super) fn width(values: &Values, spec: &Spec) -> usize {
    1 + companions(values.role, spec).len()
}

/// A name that the result adds must not be one that the table has.
fn check_names(d: &Descriptor) -> Result<(), Failure> {
    let names: HashSet<&str> = d.items.iter().map(|i| i.name.as_str()).collect();
    for item in &d.items {
        let Body::Values(values) = &item.body else { continue };
        for companion in companions(values.role, d.spec(values)) {
            let added = companion.of(&item.name);
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
