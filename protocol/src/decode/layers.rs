//! Layers tables: every row decodes from its own columns.

use std::sync::Arc;

use arrow_array::{Array, ArrayRef, LargeListArray, ListArray, RecordBatch, UInt64Array};
use arrow_buffer::{Buffer, NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use arrow_select::take::take;
use shmquant_kernels::{Affine, FloatType, Granularity, Layout, Mapping, Scheme};

use super::codec::floats;
use super::sink::{Params, Sink, check_lengths};
use super::{DecodeError, Layer};
use crate::table::Details;
use crate::table::text::{Strings, bytes_at, integers, is_binary, list_at};
use crate::table::vectors::{arrow_type, element_type};

/// `group_size` of a layer whose scales belong to positions in the row.
pub(super) const DIMENSION: i64 = -2;
const TENSOR: i64 = -1;

/// See [`super::table`].
pub(super) fn table(
    schema: &SchemaRef,
    batches: &[RecordBatch],
    names: Option<&[String]>,
    dtype: FloatType,
) -> Result<(SchemaRef, Vec<RecordBatch>), DecodeError> {
    let float = arrow_type(dtype);
    Sink::new(dtype, 0)?;
    let mut found = vec![false; names.map_or(0, <[String]>::len)];
    let mut parts = Vec::with_capacity(batches.len());
    let mut base = 0;
    let mut large = false;
    for batch in batches {
        let rows = Rows::of(batch, base)?;
        let mut wanted = Vec::new();
        let mut total = 0u64;
        for row in 0..batch.num_rows() {
            let name = rows.name(row);
            let hit = names.map(|names| names.iter().position(|n| n == name));
            match hit {
                Some(None) => continue,
                Some(Some(i)) => found[i] = true,
                None => {}
            }
            let item = rows.item(row)?;
            total += item.as_ref().map_or(0, Item::elements);
            wanted.push((row, item));
        }
        large |= i32::try_from(total).is_err();
        parts.push((wanted, total));
        base += batch.num_rows();
    }
    if let (Some(names), Some(i)) = (names, found.iter().position(|f| !f)) {
        let details = Details::new(format!("there is no layer '{}'", names[i]));
        let details = Details { layer: Some(names[i].clone()), ..details };
        return Err(DecodeError::NotFound(Box::new(details)));
    }
    let item = Arc::new(Field::new("item", float.unwrap_or(DataType::Float32), true));
    let weights = if large { DataType::LargeList(item.clone()) } else { DataType::List(item.clone()) };
    let own =
        |name: &str| schema.field_with_name(name).map(|f| Field::new(name, f.data_type().clone(), true));
    let own = |name: &str| own(name).map_err(|_| absent(name));
    let out = Arc::new(Schema::new_with_metadata(
        vec![own("layer_name")?, Field::new("weights", weights, true), own("shape")?],
        schema.metadata().clone(),
    ));
    let mut decoded = Vec::with_capacity(parts.len());
    for ((wanted, total), batch) in parts.into_iter().zip(batches) {
        let mut sink = Sink::new(dtype, total as usize)?;
        let mut ends = Vec::with_capacity(wanted.len());
        let mut valid = Vec::with_capacity(wanted.len());
        for (_, item) in &wanted {
            if let Some(item) = item {
                Rows::decode(item, &mut sink);
            }
            ends.push(sink.len());
            valid.push(item.is_some());
        }
        let nulls = Some(NullBuffer::from(valid)).filter(|n| n.null_count() > 0);
        let values = sink.into_array();
        let starts = std::iter::once(0).chain(ends);
        let list: ArrayRef = if large {
            let offsets = OffsetBuffer::new(starts.map(|n| n as i64).collect());
            Arc::new(LargeListArray::new(item.clone(), offsets, values, nulls))
        } else {
            let offsets = OffsetBuffer::new(starts.map(|n| n as i32).collect());
            Arc::new(ListArray::new(item.clone(), offsets, values, nulls))
        };
        let indices = UInt64Array::from_iter_values(wanted.iter().map(|(row, _)| *row as u64));
        let column = |name: &str| {
            let array = batch.column_by_name(name).ok_or_else(|| absent(name))?;
            if names.is_none() {
                return Ok(array.clone());
            }
            take(array, &indices, None).map_err(|e| DecodeError::column(name, e.to_string()))
        };
        let arrays = vec![column("layer_name")?, list, column("shape")?];
        let made = RecordBatch::try_new(out.clone(), arrays);
        decoded.push(made.map_err(|e| DecodeError::Column(Box::new(Details::new(e.to_string()))))?);
    }
    Ok((out, decoded))
}

/// See [`super::layer`].
pub(super) fn layer(batch: &RecordBatch, row: usize, dtype: FloatType) -> Result<Layer, DecodeError> {
    if row >= batch.num_rows() {
        let what = format!("there is no row {row} in {} layers", batch.num_rows());
        return Err(DecodeError::NotFound(Box::new(Details::new(what))));
    }
    let rows = Rows::of(batch, 0)?;
    let name = rows.name(row).to_owned();
    let Some(item) = rows.item(row)? else {
        let why = rows.errors.as_ref().and_then(|e| e.get(row)).unwrap_or("it was null in the input");
        return Err(DecodeError::layer(&name, row, &format!("it has no data: {why}")));
    };
    let mut sink = Sink::new(dtype, item.elements() as usize)?;
    Rows::decode(&item, &mut sink);
    Ok(Layer { name, values: sink.into_buffer(), dtype, shape: item.shape })
}

/// The columns of one batch.
pub(super) struct Rows {
    base: usize,
    names: Strings,
    data: ArrayRef,
    scales: ArrayRef,
    zero_points: ArrayRef,
    shape: ArrayRef,
    scheme: Strings,
    packing: Strings,
    group_size: Vec<Option<i64>>,
    errors: Option<Strings>,
}

/// One layer, its numbers compared with each other.
pub(super) struct Item {
    codes: Buffer,
    pub(super) kind: Kind,
    shape: Vec<i64>,
}

pub(super) enum Kind {
    AsIs { dtype: FloatType, elements: u64 },
    Affine { affine: Affine, layout: Layout, scales: Vec<f32>, zero_points: Vec<i32> },
}

impl Item {
    fn elements(&self) -> u64 {
        match &self.kind {
            Kind::AsIs { elements, .. } => *elements,
            Kind::Affine { layout, .. } => layout.elements(),
        }
    }
}

impl Rows {
    pub(super) fn of(batch: &RecordBatch, base: usize) -> Result<Self, DecodeError> {
        let column = |name: &str| batch.column_by_name(name).cloned().ok_or_else(|| absent(name));
        let typed = |name: &str, array: &ArrayRef| {
            let what =
                format!("column '{name}' has type {}, which a layers table does not have", array.data_type());
            DecodeError::column(name, what)
        };
        let strings = |name: &str| {
            let array = column(name)?;
            Strings::of(&array).ok_or_else(|| typed(name, &array))
        };
        let data = column("quantized_data")?;
        if !is_binary(data.data_type()) {
            return Err(typed("quantized_data", &data));
        }
        let lists = |name: &str, fits: fn(&DataType) -> bool| {
            let array = column(name)?;
            if element_type(array.data_type()).is_some_and(fits) {
                Ok(array)
            } else {
                Err(typed(name, &array))
            }
        };
        let group_size = column("group_size")?;
        Ok(Self {
            base,
            names: strings("layer_name")?,
            data,
            scales: lists("scales", DataType::is_floating)?,
            zero_points: lists("zero_points", DataType::is_floating)?,
            shape: lists("shape", DataType::is_integer)?,
            scheme: strings("scheme")?,
            packing: strings("packing")?,
            group_size: integers(&group_size).ok_or_else(|| typed("group_size", &group_size))?,
            errors: batch.column_by_name("error").and_then(Strings::of),
        })
    }

    pub(super) fn name(&self, row: usize) -> &str {
        self.names.get(row).unwrap_or("")
    }

    fn fault(&self, row: usize, what: &str) -> DecodeError {
        DecodeError::layer(self.name(row), self.base + row, what)
    }

    /// What a row holds; `None` if it has no data.
    pub(super) fn item(&self, row: usize) -> Result<Option<Item>, DecodeError> {
        let Some(codes) = bytes_at(&self.data, row) else { return Ok(None) };
        let fail = |what: String| self.fault(row, &what);
        let word = self.scheme.get(row).ok_or_else(|| fail("its scheme is null".to_owned()))?;
        let shape = match list_at(&self.shape, row).map(|dims| integers(&dims)) {
            None => Vec::new(),
            Some(dims) => dims
                .and_then(|dims| dims.into_iter().collect::<Option<Vec<i64>>>())
                .ok_or_else(|| fail("its shape has a null".to_owned()))?,
        };
        if let Ok(dtype) = word.parse::<FloatType>() {
            let elements = (codes.len() / dtype.size()) as u64;
            if !codes.len().is_multiple_of(dtype.size()) || rows_and_k(&shape, elements).is_none() {
                return Err(fail(format!(
                    "{} bytes of {dtype} do not fill the shape {shape:?}",
                    codes.len()
                )));
            }
            return Ok(Some(Item { codes, kind: Kind::AsIs { dtype, elements }, shape }));
        }
        let scheme: Scheme = word.parse().map_err(|e: shmquant_kernels::Fault| fail(e.to_string()))?;
        let packed = match self.packing.get(row) {
            Some("lsb") => true,
            Some("none") => false,
            other => return Err(fail(format!("packing {} is not known", other.unwrap_or("null")))),
        };
        let scales = self.numbers(&self.scales, row, "scales")?;
        let zero_points: Vec<i32> =
            self.numbers(&self.zero_points, row, "zero_points")?.into_iter().map(|z| z as i32).collect();
        let mapping = match (zero_points.is_empty(), scales.is_empty()) {
            (_, true) => scheme.default_mapping(),
            (true, false) => Mapping::Symmetric,
            (false, false) => Mapping::Asymmetric,
        };
        let affine = Affine::new(scheme, Some(mapping))
            .map_err(|_| fail(format!("{scheme} with {} zero points", zero_points.len())))?;
        // Without a shape the codes' bytes tell, and one byte that could hold several codes is a scalar.
        let bits = if packed { u64::from(affine.bits) } else { 8 };
        let inferred = match codes.len() as u64 * 8 / bits {
            n if codes.len() == 1 && n > 1 => 1,
            n => n,
        };
        let elements = match shape.is_empty() {
            true => Some(inferred),
            false => shape.iter().try_fold(1u64, |n, d| n.checked_mul(u64::try_from(*d).ok()?)),
        };
        let Some((rows, k)) = elements.and_then(|n| rows_and_k(&shape, n)) else {
            return Err(fail(format!("its shape is {shape:?}")));
        };
        let (granularity, group) = self.granularity(row, rows, k, scales.len() as u64)?;
        let layout = Layout { rows, k, group, granularity, pad_rows: false, packed };
        if rows.checked_mul(k).is_none_or(|n| n > 1 << 46) {
            return Err(fail(format!("its shape is {shape:?}")));
        }
        // A layer without values has no parameters either.
        if rows * k > 0 || !codes.is_empty() {
            let params = Params { scales: &scales, zero_points: &zero_points };
            check_lengths(codes.len(), &layout, &affine, &params).map_err(|d| fail(d.what))?;
        }
        Ok(Some(Item { codes, kind: Kind::Affine { affine, layout, scales, zero_points }, shape }))
    }

    fn granularity(
        &self,
        row: usize,
        rows: u64,
        k: u64,
        scales: u64,
    ) -> Result<(Granularity, u64), DecodeError> {
        match self.group_size[row] {
            Some(TENSOR) => Ok((Granularity::Tensor, 0)),
            Some(DIMENSION) => Ok((Granularity::Dimension, 0)),
            // Where the counts tell them apart, nothing else has to.
            Some(0) if scales != rows && scales == k => Ok((Granularity::Dimension, 0)),
            Some(0) => Ok((Granularity::Row, 0)),
            Some(n) if n > 0 => Ok((Granularity::Group, n as u64)),
            other => Err(self.fault(row, &format!("its group_size is {other:?}"))),
        }
    }

    fn numbers(&self, lists: &ArrayRef, row: usize, what: &str) -> Result<Vec<f32>, DecodeError> {
        let Some(list) = list_at(lists, row) else { return Ok(Vec::new()) };
        let all = floats(&list).and_then(|all| all.into_iter().collect::<Option<Vec<f32>>>());
        all.ok_or_else(|| self.fault(row, &format!("its {what} hold a null")))
    }

    fn decode(item: &Item, sink: &mut Sink) {
        match &item.kind {
            Kind::AsIs { dtype, .. } => sink.convert(&item.codes, *dtype),
            Kind::Affine { layout, .. } if layout.elements() == 0 => {}
            Kind::Affine { affine, layout, scales, zero_points } => {
                sink.decode(&item.codes, layout, affine, &Params { scales, zero_points });
            }
        }
    }
}

/// Rows and row length of a shape that holds `n` values.
fn rows_and_k(shape: &[i64], n: u64) -> Option<(u64, u64)> {
    let Some((k, outer)) = shape.split_last() else { return Some((1, n)) };
    let k = u64::try_from(*k).ok()?;
    let rows = outer.iter().try_fold(1u64, |p, d| p.checked_mul(u64::try_from(*d).ok()?))?;
    (rows.checked_mul(k)? == n).then_some((rows, k))
}

fn absent(name: &str) -> DecodeError {
    DecodeError::Column(Box::new(
        Details::new(format!("Missing required column '{name}'"))
            .in_column(name)
            .hint("a result's columns belong together"),
    ))
}
