//! Layers: one row each, of any length and shape.

use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_buffer::{Buffer, NullBuffer};
use arrow_schema::{DataType, Schema};
use shmquant_kernels::FloatType;

use super::error::{Details, InputError};
use super::options::TableOptions;
use super::spec::Specs;
use super::stream::{Holes, Pieces, Rows, Starts, Stream};
use super::text::{Strings, bytes_at, integers, is_binary, list_at};
use super::vectors::{element_type, float_type, primitive_bytes};
use super::{MAX_ELEMENTS, Parts, Streams, given_params};
use crate::descriptor::{Body, Item, Role, TableKind, Values, Way};

/// One layer given by its bytes.
#[derive(Debug, Clone)]
pub struct LayerInput {
    /// Name.
    pub name: String,
    /// Its values, little-endian, in row-major order.
    pub values: Buffer,
    /// Their type.
    pub dtype: FloatType,
    /// Its shape; empty if it has none.
    pub shape: Vec<i64>,
}

/// Values of one layer on their way into an item.
struct Weights {
    values: Buffer,
    dtype: FloatType,
    /// Null elements, one bit an element.
    holes: Option<NullBuffer>,
}

/// Whether this is a layers table, by its columns.
pub(super) fn has_layer_columns(schema: &Schema) -> bool {
    schema.index_of("layer_name").is_ok() && schema.index_of("weights").is_ok()
}

/// The layers of a table.
pub(super) fn from_table(
    schema: &Schema,
    batches: &[RecordBatch],
    options: &TableOptions,
) -> Result<Parts, InputError> {
    for (argument, given) in [("columns", options.columns.is_some()), ("keep", options.keep.is_some())] {
        if given {
            let what =
                format!("{argument} does not go with a layers table: its result has columns of its own");
            let hint = "overrides={name: None} leaves a layer as it is";
            return Err(InputError::Argument(Box::new(InputError::argument(argument, what).hint(hint))));
        }
    }
    let columns = Columns::new(schema)?;
    let mut build = Builder::new(options)?;
    let mut base = 0;
    for batch in batches {
        let chunk = Chunk::new(&columns, batch)?;
        for row in 0..batch.num_rows() {
            let name = chunk.name(row, base)?;
            let shape = chunk.shape(row, name, base)?;
            let weights = chunk.weights(row, name, base)?;
            build.push(base + row, name, weights, shape)?;
        }
        base += batch.num_rows();
    }
    build.finish(columns.large_names)
}

/// Layers that lie in memory as they are.
pub(super) fn from_inputs(
    layers: Vec<LayerInput>,
    large_names: bool,
    options: &TableOptions,
) -> Result<Parts, InputError> {
    let mut build = Builder::new(options)?;
    for (row, layer) in layers.into_iter().enumerate() {
        let LayerInput { name, values, dtype, shape } = layer;
        // A single value without axes is a scalar, several are a layer without a shape.
        let shape = (!shape.is_empty() || values.len() == dtype.size()).then_some(shape);
        check_size(&name, row, values.len(), dtype)?;
        build.push(row, &name, Some(Weights { values, dtype, holes: None }), shape)?;
    }
    build.finish(large_names)
}

fn check_size(name: &str, row: usize, bytes: usize, dtype: FloatType) -> Result<(), InputError> {
    if bytes.is_multiple_of(dtype.size()) {
        return Ok(());
    }
    let what = format!("Layer '{name}': {bytes} bytes are no whole number of {dtype} values");
    Err(InputError::Value(Box::new(InputError::layer(name, row, what).value(bytes).hint("check its dtype"))))
}

/// Where the columns of a layers table are.
struct Columns {
    name: usize,
    weights: usize,
    dtype: Option<usize>,
    shape: Option<usize>,
    large_names: bool,
}

impl Columns {
    fn new(schema: &Schema) -> Result<Self, InputError> {
        let find = |column: &str| {
            schema.index_of(column).map_err(|_| {
                let have = schema.fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>().join(", ");
                let details = InputError::column(column, format!("Missing required column '{column}'"));
                InputError::Column(Box::new(details.hint(format!("the table has the columns {have}"))))
            })
        };
        let typed = |column: &str, found: &DataType, expected: &str, fits: bool| {
            if fits {
                return Ok(());
            }
            let what = format!("Column '{column}' has type {found}, expected {expected}");
            Err(InputError::Column(Box::new(InputError::column(column, what).value(found))))
        };
        let (name, weights) = (find("layer_name")?, find("weights")?);
        let name_type = schema.field(name).data_type();
        typed("layer_name", name_type, "a string type", Strings::is_type(name_type))?;
        let weights_type = schema.field(weights).data_type();
        let floats = element_type(weights_type).and_then(float_type).is_some();
        typed(
            "weights",
            weights_type,
            "a list of floats, or binary with a column dtype",
            floats || is_binary(weights_type),
        )?;
        let dtype = if is_binary(weights_type) { Some(find("dtype")?) } else { None };
        if let Some(i) = dtype {
            let found = schema.field(i).data_type();
            typed("dtype", found, "a string type", Strings::is_type(found))?;
        }
        let shape = schema.index_of("shape").ok();
        if let Some(i) = shape {
            let found = schema.field(i).data_type();
            let fits = element_type(found).is_some_and(DataType::is_integer) || found.is_null();
            typed("shape", found, "a list of integers", fits)?;
        }
        Ok(Self { name, weights, dtype, shape, large_names: Strings::is_large(name_type) })
    }
}

/// One batch of a layers table.
struct Chunk {
    names: Option<Strings>,
    weights: ArrayRef,
    dtypes: Option<Strings>,
    shapes: Option<ArrayRef>,
}

impl Chunk {
    fn new(columns: &Columns, batch: &RecordBatch) -> Result<Self, InputError> {
        Ok(Self {
            names: Strings::of(batch.column(columns.name)),
            weights: batch.column(columns.weights).clone(),
            dtypes: columns.dtype.and_then(|i| Strings::of(batch.column(i))),
            shapes: columns.shape.map(|i| batch.column(i).clone()),
        })
    }

    fn name(&self, row: usize, base: usize) -> Result<&str, InputError> {
        self.names.as_ref().and_then(|n| n.get(row)).ok_or_else(|| {
            let row = base + row;
            let details =
                InputError::column("layer_name", format!("Column 'layer_name' is null at row {row}"));
            InputError::Value(Box::new(details.at(row, None).hint("every layer needs a name")))
        })
    }

    fn weights(&self, row: usize, name: &str, base: usize) -> Result<Option<Weights>, InputError> {
        if self.weights.is_null(row) {
            return Ok(None);
        }
        let data_type = self.weights.data_type();
        if let Some(dtype) = element_type(data_type).and_then(float_type) {
            let Some(values) = list_at(&self.weights, row) else { return Ok(None) };
            let holes = values.nulls().filter(|n| n.null_count() > 0).cloned();
            return Ok(Some(Weights { values: primitive_bytes(&values, dtype.size()), dtype, holes }));
        }
        let Some(values) = bytes_at(&self.weights, row) else { return Ok(None) };
        let word = self.dtypes.as_ref().and_then(|d| d.get(row)).unwrap_or("null");
        let Ok(dtype) = word.parse::<FloatType>() else {
            let known = FloatType::ALL.map(FloatType::name).join(", ");
            let details =
                InputError::layer(name, base + row, format!("Layer '{name}' has the dtype '{word}'"));
            let details = details.in_column("dtype").value(word).hint(format!("one of {known}"));
            return Err(InputError::Value(Box::new(details)));
        };
        check_size(name, base + row, values.len(), dtype)?;
        Ok(Some(Weights { values, dtype, holes: None }))
    }

    fn shape(&self, row: usize, name: &str, base: usize) -> Result<Option<Vec<i64>>, InputError> {
        let Some(list) = self.shapes.as_ref().and_then(|s| list_at(s, row)) else { return Ok(None) };
        let dims: Option<Vec<i64>> = integers(&list).and_then(|dims| dims.into_iter().collect());
        dims.map(Some).ok_or_else(|| {
            let what = format!("Layer '{name}' has a null or an overlong number in its shape");
            InputError::Value(Box::new(InputError::layer(name, base + row, what).in_column("shape")))
        })
    }
}

/// Collects items and their values.
struct Builder<'a> {
    options: &'a TableOptions,
    specs: Specs<'a>,
    items: Vec<Item>,
    streams: Vec<Streams>,
}

impl<'a> Builder<'a> {
    fn new(options: &'a TableOptions) -> Result<Self, InputError> {
        Ok(Self { options, specs: Specs::new(options)?, items: Vec::new(), streams: Vec::new() })
    }

    fn push(
        &mut self,
        row: usize,
        name: &str,
        weights: Option<Weights>,
        shape: Option<Vec<i64>>,
    ) -> Result<(), InputError> {
        let spec = self.specs.resolve(name, Role::Layer)?;
        let null = weights.is_none();
        let weights =
            weights.unwrap_or(Weights { values: Buffer::default(), dtype: FloatType::F32, holes: None });
        let dtype = weights.dtype;
        let n = weights.values.len() / dtype.size();
        let fail = |details: Details| InputError::Value(Box::new(details));
        let (rows, k, shape) = match shape {
            // A null layer has no values to go with a shape.
            _ if null => (0, 0, Vec::new()),
            // Its length says all: written down, the result decodes from its own columns whatever the padding.
            None => (1, n as u64, vec![n as i64]),
            Some(shape) => {
                let (rows, k) = fit_shape(&shape, n).map_err(|what| {
                    let details = InputError::layer(name, row, format!("Layer '{name}': {what}"));
                    fail(details.in_column("shape").value(format!("{shape:?}")))
                })?;
                (rows, k, shape)
            }
        };
        if n as u64 > MAX_ELEMENTS {
            return Err(fail(InputError::layer(
                name,
                row,
                format!("Layer '{name}': {n} values are more than 2^46"),
            )));
        }
        if let (Some(holes), false) = (&weights.holes, self.options.nulls_as_zero) {
            let index = (0..holes.len()).find(|i| holes.is_null(*i));
            let at = index.unwrap_or(0);
            let details = InputError::layer(name, row, format!("Layer '{name}' has a null at index {at}"));
            return Err(fail(details.at(row, index).hint("nulls=\"zero\" counts nulls inside layers as 0")));
        }
        let mut values = Values {
            role: Role::Layer,
            spec,
            dtype,
            null,
            rows,
            k,
            null_count: 0,
            shape,
            params: None,
            way: Way::Streamed,
        };
        let spec = self.specs.get(spec);
        if let (Some(params), Some(_), false) = (&self.options.params, spec.affine, null) {
            let want = values.layout(spec).n_params();
            values.params = given_params(params, name, false, want).map_err(|d| {
                let Details { what, hint, .. } = *d;
                fail(Details { hint, ..InputError::layer(name, row, what) })
            })?;
        }
        let stream = weights.into_stream();
        let as_is = spec.affine.is_none();
        self.streams.push(Streams::Values {
            validity: Stream::empty(),
            values: stream,
            size: dtype.size(),
            as_is,
        });
        self.items.push(Item { name: name.to_owned(), body: Body::Values(values) });
        Ok(())
    }

    fn finish(self, large_names: bool) -> Result<Parts, InputError> {
        if u32::try_from(self.items.len()).is_err() {
            let what = format!("{} layers are more than 2^32", self.items.len());
            return Err(InputError::Value(Box::new(Details::new(what))));
        }
        let mut specs = self.specs.finish("layer")?;
        if specs.is_empty() {
            // A table without rows still says what it would have done.
            let mut resolve = Specs::new(self.options)?;
            resolve.resolve("", Role::Layer)?;
            specs = resolve.into_list();
        }
        Ok(Parts {
            table: TableKind::Layers { large_names },
            specs,
            rows: self.items.len() as u64,
            items: self.items,
            streams: self.streams,
            outputs: Vec::new(),
        })
    }
}

impl Weights {
    fn into_stream(self) -> Stream {
        let bytes = self.values.len();
        match self.holes {
            None => Stream::Bytes(Pieces::of(self.values, bytes)),
            Some(nulls) => {
                let holes = Some(Holes { nulls, size: self.dtype.size() });
                let rows = Rows {
                    values: self.values,
                    len: 1,
                    row_bytes: bytes,
                    starts: Starts::Dense,
                    nulls: None,
                    holes,
                };
                Stream::Rows(Pieces::of(rows, bytes))
            }
        }
    }
}

/// Rows and row length of `n` values of this shape.
fn fit_shape(shape: &[i64], n: usize) -> Result<(u64, u64), String> {
    // The result names its last axis in 8 bits.
    if shape.len() > 128 {
        return Err(format!("a shape of {} axes, 128 are allowed", shape.len()));
    }
    let product = |dims: &[i64]| dims.iter().try_fold(1u64, |p, d| p.checked_mul(u64::try_from(*d).ok()?));
    let (k, outer) = match shape.split_last() {
        // A scalar.
        None => return if n == 1 { Ok((1, 1)) } else { Err(format!("shape [] does not hold {n} values")) },
        Some((k, outer)) => (u64::try_from(*k).ok(), product(outer)),
    };
    match (k, outer) {
        (Some(k), Some(rows)) if rows.checked_mul(k) == Some(n as u64) => Ok((rows, k)),
        _ => Err(format!("shape {shape:?} does not hold {n} values")),
    }
}
