//! Columns tables: vectors and plain columns to quantize, the others to pass by or to keep.

use std::collections::{HashMap, HashSet};

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field, Schema};
use shmquant_kernels::{FloatType, Granularity};

use super::error::{Details, InputError};
use super::options::TableOptions;
use super::spec::Specs;
use super::vectors::{Column, element_type, float_type};
use super::{MAX_ELEMENTS, Output, Parts, Streams, given_params, kept};
use crate::descriptor::{Body, Item, Role, Spec, TableKind, Values, Way};
use crate::meta::{Companion, companions};

/// What a column could be.
enum Kind {
    Vector(FloatType),
    Plain(FloatType),
    Other,
}

fn kind(data_type: &DataType) -> Kind {
    match (float_type(data_type), element_type(data_type).and_then(float_type)) {
        (Some(dtype), _) => Kind::Plain(dtype),
        (_, Some(dtype)) => Kind::Vector(dtype),
        _ => Kind::Other,
    }
}

/// The columns of a table.
pub(super) fn from_table(
    schema: &Schema,
    batches: &[RecordBatch],
    options: &TableOptions,
) -> Result<Parts, InputError> {
    if options.continue_on_error {
        let details = InputError::argument("continue_on_error", "continue_on_error is for layers tables");
        return Err(InputError::Argument(Box::new(details.hint("on_nonfinite=\"null\" drops faulty rows"))));
    }
    let mut specs = Specs::new(options)?;
    let roles = choose(schema, options, &mut specs)?;
    let keep = keep_names(schema, options)?;
    let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
    let quantized = roles.iter().flatten().count();
    if quantized == 0 {
        return Err(nothing(schema, options));
    }
    check_plain(options, &roles)?;
    let mut it = Parts {
        table: TableKind::Columns,
        specs: Vec::new(),
        rows: rows as u64,
        items: Vec::new(),
        streams: Vec::new(),
        outputs: Vec::new(),
    };
    let mut names = Names::new(schema, &roles, keep.as_ref());
    for (index, field) in schema.fields().iter().enumerate() {
        let arrays: Vec<ArrayRef> = batches.iter().map(|b| b.column(index).clone()).collect();
        let kept = keep.as_ref().is_none_or(|k| k.contains(field.name().as_str()));
        match roles[index] {
            Some((role, dtype)) => {
                let spec = specs.resolve(field.name(), role)?;
                let column = Quantized { field, role, dtype, spec, its_spec: specs.get(spec) };
                let sole = quantized == 1;
                column.add(&arrays, options, sole, &mut names, &mut it)?;
            }
            None if !kept => {}
            None if options.named => {
                let kept::Column { field: its_field, data, streams } = kept::column(field, &arrays)
                    .map_err(|d| InputError::Column(Box::new(d.in_column(field.name()))))?;
                let body = Body::Keep { field: its_field, data };
                it.items.push(Item { name: field.name().clone(), body });
                it.streams.push(Streams::Kept(streams));
                it.outputs.push(Output::Kept { name: field.name().clone() });
            }
            None => it.outputs.push(Output::PassThrough { index }),
        }
    }
    it.specs = specs.finish("column that is quantized or could be")?;
    Ok(it)
}

/// Which columns are quantized, and as what.
fn choose(
    schema: &Schema,
    options: &TableOptions,
    specs: &mut Specs<'_>,
) -> Result<Vec<Option<(Role, FloatType)>>, InputError> {
    let mut named = HashSet::new();
    for name in options.columns.iter().flatten() {
        named.insert(name.as_str());
        let field = schema.field_with_name(name).map_err(|_| unknown("columns", name, schema))?;
        if let Kind::Other = kind(field.data_type()) {
            return Err(wrong_type(field));
        }
    }
    let in_params = |name: &str| options.params.as_ref().is_some_and(|p| p.get(name).is_some());
    let mut roles = Vec::with_capacity(schema.fields().len());
    for field in schema.fields() {
        let name = field.name().as_str();
        let asked = named.contains(name);
        let role = match kind(field.data_type()) {
            Kind::Vector(dtype) if asked || options.columns.is_none() => Some((Role::Vector, dtype)),
            Kind::Plain(dtype) if asked || (options.columns.is_none() && in_params(name)) => {
                Some((Role::Plain, dtype))
            }
            _ => None,
        };
        roles.push(role.filter(|_| !specs.is_left(name)));
    }
    Ok(roles)
}

fn keep_names(schema: &Schema, options: &TableOptions) -> Result<Option<HashSet<String>>, InputError> {
    let Some(keep) = &options.keep else { return Ok(None) };
    for name in keep {
        schema.field_with_name(name).map_err(|_| unknown("keep", name, schema))?;
    }
    Ok(Some(keep.iter().cloned().collect()))
}

/// One range is all that a plain column has: other wishes are only for vectors beside it.
fn check_plain(options: &TableOptions, roles: &[Option<(Role, FloatType)>]) -> Result<(), InputError> {
    if options.params.is_some() || roles.iter().flatten().any(|(role, _)| *role == Role::Vector) {
        return Ok(());
    }
    let (argument, value) = match (options.granularity, options.group_size) {
        (Some(g), _) if g != Granularity::Tensor => ("granularity", g.to_string()),
        (_, Some(size)) => ("group_size", size.to_string()),
        _ => return Ok(()),
    };
    let what = format!("{argument} {value} does not go with plain columns: they have one range each");
    let details = InputError::argument(argument, what).value(value).hint("granularity=\"tensor\"");
    Err(InputError::Argument(Box::new(details)))
}

/// One column to quantize.
struct Quantized<'a> {
    field: &'a Field,
    role: Role,
    dtype: FloatType,
    spec: usize,
    its_spec: &'a Spec,
}

impl Quantized<'_> {
    fn add(
        &self,
        arrays: &[ArrayRef],
        options: &TableOptions,
        sole: bool,
        names: &mut Names<'_>,
        out: &mut Parts,
    ) -> Result<(), InputError> {
        let name = self.field.name();
        let fail = |details: Details| InputError::Value(Box::new(details.in_column(name)));
        let size = self.dtype.size();
        let mut column = match self.role {
            Role::Plain => Column::plain(arrays, size),
            _ => Column::vectors(name, arrays, size, options.nulls_as_zero)?,
        };
        // A table without batches still has its vectors' dimension.
        if let (true, DataType::FixedSizeList(_, k)) = (arrays.is_empty(), self.field.data_type()) {
            column.k = usize::try_from(*k).unwrap_or(0);
        }
        let (rows, k) = (column.rows as u64, column.k as u64);
        if k > i32::MAX as u64 || rows.checked_mul(k).is_none_or(|n| n > MAX_ELEMENTS) {
            return Err(fail(Details::new(format!("column '{name}' is too large: {rows} x {k} values"))));
        }
        let null_count = column.null_count as u64;
        let mut values = Values {
            role: self.role,
            spec: self.spec,
            dtype: self.dtype,
            null: false,
            rows,
            k,
            null_count,
            shape: Vec::new(),
            params: None,
            way: Way::Streamed,
        };
        let want = values.layout(self.its_spec).n_params();
        if let Some(params) = &options.params {
            values.params = given_params(params, name, sole, want).map_err(|d| fail(*d))?;
        } else if options.part_of_stream
            && matches!(self.its_spec.granularity, Granularity::Tensor | Granularity::Dimension)
        {
            let granularity = self.its_spec.granularity;
            let what = format!(
                "column '{name}' has granularity {granularity}: every batch of a stream would have its own range"
            );
            let details = InputError::argument("params", what).in_column(name);
            return Err(InputError::Argument(Box::new(
                details.hint("params=q.fit(...) gives all batches the same ranges"),
            )));
        }
        out.outputs.push(Output::Quantized { names: names.results(name, self.role, self.its_spec)? });
        let (validity, values_stream) = column.into_streams();
        out.streams.push(Streams::Values { validity, values: values_stream, size, as_is: false });
        out.items.push(Item { name: name.clone(), body: Body::Values(values) });
        Ok(())
    }
}

/// The names that the result has, so that no two columns share one.
struct Names<'a> {
    taken: HashMap<&'a str, usize>,
}

impl<'a> Names<'a> {
    fn new(schema: &'a Schema, roles: &[Option<(Role, FloatType)>], keep: Option<&HashSet<String>>) -> Self {
        let mut taken = HashMap::new();
        for (field, role) in schema.fields().iter().zip(roles) {
            let kept = keep.is_none_or(|k| k.contains(field.name().as_str()));
            if role.is_some() || kept {
                *taken.entry(field.name().as_str()).or_default() += 1;
            }
        }
        Self { taken }
    }

    /// The result columns of a quantized column.
    fn results(&self, name: &str, role: Role, spec: &Spec) -> Result<Vec<String>, InputError> {
        if self.taken.get(name).is_some_and(|n| *n > 1) {
            let what = format!("column '{name}' occurs more than once");
            return Err(InputError::Column(Box::new(
                InputError::column(name, what).hint("rename one of them"),
            )));
        }
        for result in Companion::ALL.map(|c| c.of(name)) {
            if self.taken.contains_key(result.as_str()) {
                let what = format!("column '{result}' is in the way of the parameters of '{name}'");
                let details = InputError::column(&result, what);
                return Err(InputError::Column(Box::new(
                    details.hint("rename it, or leave it out with keep=[...]"),
                )));
            }
        }
        let mut names = vec![name.to_owned()];
        names.extend(companions(role, spec).iter().map(|c| c.of(name)));
        Ok(names)
    }
}

fn unknown(argument: &'static str, name: &str, schema: &Schema) -> InputError {
    let have = schema.fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>().join(", ");
    let details = InputError::argument(argument, format!("{argument}: there is no column '{name}'"));
    InputError::Argument(Box::new(details.in_column(name).value(name).hint(format!("the table has {have}"))))
}

fn wrong_type(field: &Field) -> InputError {
    let found = field.data_type();
    let name = field.name();
    let inner = element_type(found);
    let integers = found.is_integer() || inner.is_some_and(DataType::is_integer);
    let nested = inner.is_some_and(|t| element_type(t).is_some());
    let (what, hint) = if integers {
        let what = format!("column '{name}' holds integers ({found}): only floats are quantized");
        (what, "cast it to float32 if these are values, leave it out of columns if they are codes")
    } else if nested {
        (format!("column '{name}' has lists of lists ({found})"), "flatten each row to one list of floats")
    } else {
        let what = format!("column '{name}' has type {found}: neither float vectors nor floats");
        (what, "float16, float32 and float64 are quantized, alone or in lists")
    };
    InputError::Column(Box::new(InputError::column(name, what).value(found).hint(hint)))
}

/// Why there is nothing to do, by what the table looks like.
fn nothing(schema: &Schema, options: &TableOptions) -> InputError {
    let has = |name: &str| schema.index_of(name).is_ok();
    for (column, other) in [("layer_name", "weights"), ("weights", "layer_name")] {
        if options.columns.is_none() && has(other) && !has(column) {
            let details = InputError::column(column, format!("Missing required column '{column}'"));
            let hint =
                "a layers table has the columns layer_name and weights, other tables need float vectors";
            return InputError::Column(Box::new(details.hint(hint)));
        }
    }
    let shown = |f: &Field| format!("{} {}", f.name(), f.data_type());
    let columns = schema.fields().iter().map(|f| shown(f)).collect::<Vec<_>>().join(", ");
    let plain = schema.fields().iter().find(|f| float_type(f.data_type()).is_some());
    let hint = match plain {
        Some(field) => format!("plain columns are quantized by name: columns=[\"{}\"]", field.name()),
        None => "a column of float lists of equal length is needed, or layer_name and weights".to_owned(),
    };
    let what = format!("nothing to quantize in the columns [{columns}]");
    InputError::Argument(Box::new(InputError::argument("columns", what).hint(hint)))
}
