//! One column of codes: what its metadata says, where its parameters are, and its bytes.

use arrow_array::cast::AsArray;
use arrow_array::types::{Float16Type, Float32Type, Float64Type, UInt64Type};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_buffer::{Buffer, NullBuffer};
use arrow_schema::{DataType, Field, Schema};
use shmquant_kernels::{Affine, Granularity, Layout, Mapping, OnNonFinite, Scheme};

use super::DecodeError;
use crate::descriptor::{Role, Spec};
use crate::meta::{
    CodesMeta, Companion, EXTENSION_METADATA_KEY, EXTENSION_NAME, EXTENSION_NAME_KEY, ParamSource,
    companions, decode_f32,
};
use crate::table::Details;
use crate::table::stream::Starts;
use crate::table::text::integers;
use crate::table::vectors::{Column, element_type, primitive_bytes};

/// The codes of one chunk of a column.
#[derive(Debug, Clone, PartialEq)]
pub struct Codes {
    /// One row after another; rows that are null hold anything.
    pub values: Buffer,
    /// Rows.
    pub rows: usize,
    /// Bytes of one row.
    pub width: usize,
    /// Whether each byte is a signed number.
    pub signed: bool,
    /// Rows that are null.
    pub nulls: Option<NullBuffer>,
}

/// The codes of a column, without a copy wherever its rows lie one after another.
pub fn codes(batch: &RecordBatch, column: &str) -> Result<Codes, DecodeError> {
    let array = batch.column_by_name(column).ok_or_else(|| missing(column))?;
    codes_of(column, array, 0)
}

fn missing(column: &str) -> DecodeError {
    let details = Details::new(format!("there is no column '{column}'")).in_column(column);
    DecodeError::NotFound(Box::new(details))
}

pub(super) fn codes_of(name: &str, array: &ArrayRef, base: usize) -> Result<Codes, DecodeError> {
    let element = element_type(array.data_type()).unwrap_or(array.data_type());
    let signed = match element {
        DataType::Int8 => true,
        DataType::UInt8 => false,
        other => {
            let what = format!("column '{name}' has codes of type {other}, int8 or uint8 is needed");
            return Err(DecodeError::column(name, what));
        }
    };
    if element_type(array.data_type()).is_none() {
        let nulls = array.nulls().filter(|n| n.null_count() > 0).cloned();
        return Ok(Codes { values: primitive_bytes(array, 1), rows: array.len(), width: 1, signed, nulls });
    }
    let column = vectors(name, array, 1, base)?;
    let (values, nulls) = dense(column.0);
    Ok(Codes { values, rows: array.len(), width: column.1, signed, nulls })
}

/// One chunk of a list column as rows of equal size, and their length.
fn vectors(
    name: &str,
    array: &ArrayRef,
    size: usize,
    base: usize,
) -> Result<(crate::table::stream::Rows, usize), DecodeError> {
    let column = Column::vectors(name, std::slice::from_ref(array), size, false).map_err(|mut d| {
        // The chunk's rows, counted in the table.
        if let Some(row) = d.row {
            let row = row as usize + base;
            d.what = format!("column '{name}' row {row} is damaged: {}", d.what);
            d.row = Some(row as u64);
        }
        d.hint = None;
        DecodeError::Value(d)
    })?;
    let k = column.k;
    match column.chunks.into_iter().next() {
        Some((rows, _)) => Ok((rows, k)),
        None => Err(DecodeError::column(name, format!("column '{name}' has no chunk"))),
    }
}

/// The bytes of all rows, one after another.
fn dense(rows: crate::table::stream::Rows) -> (Buffer, Option<NullBuffer>) {
    let len = rows.len * rows.row_bytes;
    let whole = match (&rows.starts, &rows.nulls) {
        (Starts::Dense, _) => Some(0),
        (Starts::At { offsets, size }, None) if len > 0 => Some(offsets.get(0) * size),
        _ => None,
    };
    let values = match whole {
        Some(start) => rows.values.slice_with_length(start, len),
        None => {
            let mut out = vec![0u8; len];
            if len > 0 {
                rows.write(0, &mut out);
            }
            Buffer::from_vec(out)
        }
    };
    (values, rows.nulls)
}

/// How one column decodes.
#[derive(Debug)]
pub(super) struct Codec {
    pub(super) name: String,
    pub(super) affine: Affine,
    pub(super) granularity: Granularity,
    /// Elements of a vector; `None` for a plain column.
    pub(super) dim: Option<u64>,
    group: u64,
    packed: bool,
    scale: ParamSource,
    zero_point: ParamSource,
    /// Scales and zero points that all rows share.
    pub(super) shared: Option<Shared>,
    /// Columns that only serve to decode this one.
    pub(super) own_columns: Vec<String>,
    /// The column that says how each row was made, and what it must say.
    id: Option<(String, u64)>,
    /// Columns that rows of other specs have.
    foreign: Vec<String>,
}

/// Parameters of a tensor or of dimensions.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) scales: Vec<f32>,
    pub(super) zero_points: Vec<i32>,
}

impl Codec {
    /// `None` for a field that holds no codes.
    pub(super) fn of(field: &Field) -> Result<Option<Self>, DecodeError> {
        let name = field.name();
        if field.metadata().get(EXTENSION_NAME_KEY).map(String::as_str) != Some(EXTENSION_NAME) {
            return Ok(None);
        }
        let fail = |what: String| DecodeError::column(name, format!("column '{name}': {what}"));
        let text = field.metadata().get(EXTENSION_METADATA_KEY).map_or("", String::as_str);
        let meta = CodesMeta::from_json(text)
            .ok_or_else(|| fail("its metadata are no shmquant.codes of version 1".to_owned()))?;
        let unknown = |e: shmquant_kernels::Fault| fail(e.to_string());
        let scheme: Scheme = meta.scheme.parse().map_err(unknown)?;
        let mapping: Mapping = meta.mapping.parse().map_err(unknown)?;
        let granularity: Granularity = meta.granularity.parse().map_err(unknown)?;
        let affine = Affine::new(scheme, Some(mapping)).map_err(unknown)?;
        if meta.kind != "affine" || (meta.qmin, meta.qmax) != (affine.qmin, affine.qmax) {
            let what =
                format!("{} {}..{} is not the {scheme} that is known here", meta.kind, meta.qmin, meta.qmax);
            return Err(fail(what));
        }
        let packed = match meta.packing.as_str() {
            "lsb" => true,
            "none" => false,
            other => return Err(fail(format!("packing '{other}' is not known"))),
        };
        let shared = shared(&meta).map_err(fail)?;
        let group = meta.group_size.unwrap_or(0);
        if (granularity == Granularity::Group) != (group > 0) {
            return Err(fail(format!("granularity {granularity} with a group_size of {group}")));
        }
        let role = if meta.dim.is_some() { Role::Vector } else { Role::Plain };
        let group_size = u32::try_from(group).map_err(|_| fail(format!("a group_size of {group}")))?;
        let on_nonfinite = OnNonFinite::Error;
        let spec = Spec { affine: Some(affine), granularity, on_nonfinite, packed, group_size };
        let beside = companions(role, &spec);
        let id = match beside.contains(&Companion::ParamsId) {
            true => Some((meta.companion(Companion::ParamsId, name), params_id(&meta).map_err(fail)?)),
            false => None,
        };
        let foreign = Companion::ALL.into_iter().filter(|c| !beside.contains(c));
        Ok(Some(Self {
            foreign: foreign.map(|c| meta.companion(c, name)).collect(),
            own_columns: meta.columns(name),
            id,
            name: name.clone(),
            affine,
            granularity,
            dim: meta.dim,
            group,
            packed,
            scale: meta.scale,
            zero_point: meta.zero_point,
            shared,
        }))
    }

    pub(super) fn layout(&self, rows: usize) -> Layout {
        // A plain column has one scale in all, but each row carries it: joined columns may have several.
        let granularity = if self.dim.is_none() { Granularity::Row } else { self.granularity };
        Layout {
            rows: rows as u64,
            k: self.dim.unwrap_or(1),
            group: self.group,
            granularity,
            pad_rows: true,
            packed: self.packed,
        }
    }

    /// Scales and zero points of a batch; rows that are null in `nulls` may lack them.
    pub(super) fn params(
        &self,
        batch: &RecordBatch,
        nulls: Option<&NullBuffer>,
        base: usize,
    ) -> Result<(Vec<f32>, Vec<i32>), DecodeError> {
        if let Some((name, id)) = &self.id {
            self.check_ids(batch, name, *id, nulls, base)?;
        }
        self.check_foreign(batch, nulls, base)?;
        if let Some(shared) = &self.shared {
            return Ok((shared.scales.clone(), shared.zero_points.clone()));
        }
        let ParamSource::Column(name) = &self.scale else {
            return Err(DecodeError::column(&self.name, format!("column '{}' has no scales", self.name)));
        };
        let array = self.find(batch, name)?;
        let scales = match self.granularity {
            Granularity::Group if self.dim.is_some() => self
                .grouped(name, array, 4, base)?
                .as_chunks()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
            _ => self.per_row(name, floats(array), array, nulls, base)?,
        };
        let zero_points = match &self.zero_point {
            ParamSource::Const(0) => Vec::new(),
            ParamSource::Const(z) => vec![*z; scales.len()],
            ParamSource::Params(_) => {
                return Err(DecodeError::column(
                    &self.name,
                    format!("column '{}' has no zero points", self.name),
                ));
            }
            ParamSource::Column(name) => {
                let array = self.find(batch, name)?;
                match self.granularity {
                    Granularity::Group if self.dim.is_some() => {
                        let signed = element_type(array.data_type()) == Some(&DataType::Int8);
                        let bytes = self.grouped(name, array, 1, base)?;
                        bytes
                            .iter()
                            .map(|b| if signed { i32::from(*b as i8) } else { i32::from(*b) })
                            .collect()
                    }
                    _ => {
                        let all = integers(array);
                        let small = |z: Option<i64>| z.and_then(|z| i32::try_from(z).ok());
                        let all = all.map(|all| all.into_iter().map(small).collect());
                        self.per_row(name, all, array, nulls, base)?
                    }
                }
            }
        };
        Ok((scales, zero_points))
    }

    fn find<'a>(&self, batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef, DecodeError> {
        batch.column_by_name(name).ok_or_else(|| {
            let what = format!("column '{}' needs its parameters: there is no column '{name}'", self.name);
            DecodeError::Column(Box::new(
                Details::new(what).in_column(name).hint("keep both columns together"),
            ))
        })
    }

    /// One value a row; a row that is not null must have one.
    fn per_row<T: Copy + Default>(
        &self,
        name: &str,
        values: Option<Vec<Option<T>>>,
        array: &ArrayRef,
        nulls: Option<&NullBuffer>,
        base: usize,
    ) -> Result<Vec<T>, DecodeError> {
        let Some(values) = values else {
            let what =
                format!("column '{name}' has type {}, which cannot hold parameters", array.data_type());
            return Err(DecodeError::column(name, what));
        };
        let lacks = |row: usize| values[row].is_none() && nulls.is_none_or(|n| n.is_valid(row));
        if let Some(row) = (0..values.len()).find(|row| lacks(*row)) {
            let row = base + row;
            let what = format!("column '{name}' is null at row {row}, where '{}' is not", self.name);
            return Err(Details::new(what).in_column(name).at(row, None).into());
        }
        Ok(values.into_iter().map(Option::unwrap_or_default).collect())
    }

    /// `size` bytes for each group of each row.
    fn grouped(&self, name: &str, array: &ArrayRef, size: usize, base: usize) -> Result<Buffer, DecodeError> {
        let fits = match element_type(array.data_type()) {
            Some(DataType::Float32) => size == 4,
            Some(DataType::Int8 | DataType::UInt8) => size == 1,
            _ => false,
        };
        if !fits {
            let what =
                format!("column '{name}' has type {}, which cannot hold parameters", array.data_type());
            return Err(DecodeError::column(name, what));
        }
        let (rows, k) = vectors(name, array, size, base)?;
        let groups = self.layout(array.len()).groups_per_row();
        if k as u64 == groups {
            return Ok(dense(rows).0);
        }
        if array.null_count() == array.len() {
            return Ok(Buffer::from_vec(vec![0u8; groups as usize * array.len() * size]));
        }
        let what = format!("column '{name}' has {k} parameters a row, {groups} are needed");
        Err(DecodeError::column(name, what))
    }

    /// Joined tables keep the metadata of the first one only: each row says how it was made.
    fn check_ids(
        &self,
        batch: &RecordBatch,
        name: &str,
        want: u64,
        nulls: Option<&NullBuffer>,
        base: usize,
    ) -> Result<(), DecodeError> {
        let array = self.find(batch, name)?;
        let Some(ids) = ids(array) else {
            let what = format!("column '{name}' has type {}, uint64 is needed", array.data_type());
            return Err(DecodeError::column(name, what));
        };
        for (row, id) in ids.iter().enumerate() {
            if *id == Some(want) || nulls.is_some_and(|n| n.is_null(row)) {
                continue;
            }
            let row = base + row;
            let its = id.map_or("unknown parameters".to_owned(), |id| format!("the parameters {id:016x}"));
            let what = format!(
                "column '{}' row {row} was quantized with {its}, the metadata hold {want:016x}",
                self.name
            );
            return Err(self.mixed(&what, row));
        }
        Ok(())
    }

    /// Tables joined by the union of their columns: what the first one's rows do not have, others of its rows may.
    fn check_foreign(
        &self,
        batch: &RecordBatch,
        nulls: Option<&NullBuffer>,
        base: usize,
    ) -> Result<(), DecodeError> {
        for name in &self.foreign {
            let Some(array) = batch.column_by_name(name) else { continue };
            let has = |row: &usize| array.is_valid(*row) && nulls.is_none_or(|n| n.is_valid(*row));
            if let Some(row) = (0..array.len()).find(has) {
                let row = base + row;
                let what = format!(
                    "column '{}' row {row} has a '{name}', of which the metadata say nothing",
                    self.name
                );
                return Err(self.mixed(&what, row));
            }
        }
        Ok(())
    }

    fn mixed(&self, what: &str, row: usize) -> DecodeError {
        let what = format!("{what}: tables with different specs or ranges were joined");
        let details = Details::new(what).in_column(&self.name).at(row, None);
        let hint = "dequantize each table before joining them, or quantize all alike (with the same params=, if any)";
        DecodeError::Mixed(Box::new(details.hint(hint)))
    }
}

fn params_id(meta: &CodesMeta) -> Result<u64, String> {
    let id = meta.params_id.as_deref().and_then(|id| u64::from_str_radix(id, 16).ok());
    id.ok_or_else(|| "its metadata hold no params_id".to_owned())
}

fn shared(meta: &CodesMeta) -> Result<Option<Shared>, String> {
    let ParamSource::Params(_) = &meta.scale else { return Ok(None) };
    let texts = meta.params_b64.as_ref();
    let scales = texts.and_then(|t| decode_f32(&t.scale));
    let zeros = texts.and_then(|t| t.zero_point.as_deref()).map(decode_f32);
    let (Some(scales), None | Some(Some(_))) = (scales, &zeros) else {
        return Err("its metadata hold damaged parameters".to_owned());
    };
    let zero_points: Vec<i32> = match (&meta.zero_point, zeros.flatten()) {
        (ParamSource::Params(_), Some(zeros)) => zeros.iter().map(|z| *z as i32).collect(),
        (ParamSource::Const(0), _) => Vec::new(),
        (ParamSource::Const(z), _) => vec![*z; scales.len()],
        _ => return Err("its metadata hold no zero points".to_owned()),
    };
    Ok(Some(Shared { scales, zero_points }))
}

/// Floats of any width as f32, which is what they were.
pub(super) fn floats(array: &ArrayRef) -> Option<Vec<Option<f32>>> {
    match array.data_type() {
        DataType::Float32 => Some(array.as_primitive::<Float32Type>().iter().collect()),
        DataType::Float64 => {
            Some(array.as_primitive::<Float64Type>().iter().map(|v| v.map(|v| v as f32)).collect())
        }
        DataType::Float16 => {
            Some(array.as_primitive::<Float16Type>().iter().map(|v| v.map(half::f16::to_f32)).collect())
        }
        _ => by_key(array, floats),
    }
}

fn ids(array: &ArrayRef) -> Option<Vec<Option<u64>>> {
    match array.data_type() {
        DataType::UInt64 => Some(array.as_primitive::<UInt64Type>().iter().collect()),
        _ => by_key(array, ids),
    }
}

/// The values of a dictionary, row by row.
fn by_key<T: Copy>(
    array: &ArrayRef,
    read: impl Fn(&ArrayRef) -> Option<Vec<Option<T>>>,
) -> Option<Vec<Option<T>>> {
    let dictionary = array.as_any_dictionary_opt()?;
    let values = read(dictionary.values())?;
    if values.is_empty() {
        return Some(vec![None; array.len()]);
    }
    let keys = dictionary.normalized_keys();
    Some(keys.iter().enumerate().map(|(row, key)| values[*key].filter(|_| array.is_valid(row))).collect())
}

/// The codecs of a schema, by column index.
pub(super) fn all(schema: &Schema) -> Result<Vec<Option<Codec>>, DecodeError> {
    schema.fields().iter().map(|f| Codec::of(f)).collect()
}
