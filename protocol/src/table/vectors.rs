//! Columns of equal-length vectors and plain columns, read without copying: one [`Rows`] a chunk.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use arrow_buffer::{Buffer, NullBuffer};
use arrow_schema::DataType;
use shmquant_kernels::FloatType;

use super::error::{Details, InputError};
use super::stream::{Bits, Holes, Pieces, Rows, Starts, Stream, Vec32Or64};

/// The float type that an Arrow type holds.
pub(crate) fn float_type(data_type: &DataType) -> Option<FloatType> {
    match data_type {
        DataType::Float16 => Some(FloatType::F16),
        DataType::Float32 => Some(FloatType::F32),
        DataType::Float64 => Some(FloatType::F64),
        _ => None,
    }
}

/// The Arrow type of a float type; bfloat16 has none.
pub(crate) fn arrow_type(dtype: FloatType) -> Option<DataType> {
    match dtype {
        FloatType::F16 => Some(DataType::Float16),
        FloatType::F32 => Some(DataType::Float32),
        FloatType::F64 => Some(DataType::Float64),
        FloatType::Bf16 => None,
    }
}

/// The type of a list's elements.
pub(crate) fn element_type(data_type: &DataType) -> Option<&DataType> {
    match data_type {
        DataType::FixedSizeList(child, _) | DataType::List(child) | DataType::LargeList(child) => {
            Some(child.data_type())
        }
        _ => None,
    }
}

/// A whole column as rows of equal size.
#[derive(Debug)]
pub(crate) struct Column {
    /// Rows in all.
    pub(crate) rows: usize,
    /// Elements of one row.
    pub(crate) k: usize,
    /// Of the rows.
    pub(crate) null_count: usize,
    /// Its chunks: their rows and how many.
    pub(crate) chunks: Vec<(Rows, usize)>,
}

impl Column {
    /// A column of lists of primitive elements, `size` bytes each.
    pub(crate) fn vectors(
        name: &str,
        arrays: &[ArrayRef],
        size: usize,
        nulls_as_zero: bool,
    ) -> Result<Self, Box<Details>> {
        let mut k = None;
        let mut base = 0;
        let mut lists = Vec::with_capacity(arrays.len());
        for array in arrays {
            let list = List::of(name, array)?;
            list.check_lengths(name, base, &mut k)?;
            base += array.len();
            lists.push((list, array.nulls().cloned(), array.len()));
        }
        let k = k.unwrap_or(0);
        let mut base = 0;
        let mut null_count = 0;
        let mut chunks = Vec::with_capacity(arrays.len());
        for (list, nulls, len) in lists {
            let nulls = nulls.filter(|n| n.null_count() > 0);
            null_count += nulls.as_ref().map_or(0, NullBuffer::null_count);
            let holes = list.find_hole(nulls.as_ref(), len, k);
            if let (Some((row, index)), false) = (holes, nulls_as_zero) {
                let row = base + row;
                let details = Details::new(format!("column '{name}' row {row} has a null at index {index}"))
                    .in_column(name)
                    .at(row, Some(index))
                    .hint("nulls=\"zero\" counts nulls inside vectors as 0");
                return Err(Box::new(details));
            }
            let holes = holes.and(list.values.nulls()).map(|n| Holes { nulls: n.clone(), size });
            let starts = match list.offsets {
                None => Starts::Dense,
                Some(offsets) => Starts::At { offsets, size },
            };
            let values = primitive_bytes(&list.values, size);
            chunks.push((Rows { values, len, row_bytes: k * size, starts, nulls, holes }, len));
            base += len;
        }
        Ok(Self { rows: base, k, null_count, chunks })
    }

    /// A column of primitive values, `size` bytes each.
    pub(crate) fn plain(arrays: &[ArrayRef], size: usize) -> Self {
        let mut it = Self { rows: 0, k: 1, null_count: 0, chunks: Vec::with_capacity(arrays.len()) };
        for array in arrays {
            let values = primitive_bytes(array, size);
            let nulls = array.nulls().filter(|n| n.null_count() > 0).cloned();
            it.rows += array.len();
            it.null_count += array.null_count();
            it.chunks.push((
                Rows { values, len: array.len(), row_bytes: size, starts: Starts::Dense, nulls, holes: None },
                array.len(),
            ));
        }
        it
    }

    /// The validity bitmap and the values.
    pub(crate) fn into_streams(self) -> (Stream, Stream) {
        let mut validity = Pieces::default();
        let mut values = Pieces::default();
        for (rows, len) in self.chunks {
            if self.null_count > 0 {
                validity.push(Bits::validity(rows.nulls.as_ref()), len);
            }
            let bytes = len * rows.row_bytes;
            values.push(rows, bytes);
        }
        (Stream::Bits(validity), Stream::Rows(values))
    }
}

/// The bytes of a primitive array.
pub(crate) fn primitive_bytes(array: &ArrayRef, size: usize) -> Buffer {
    let data = array.to_data();
    match data.buffers().first() {
        Some(buffer) => buffer.slice_with_length(data.offset() * size, data.len() * size),
        None => Buffer::default(),
    }
}

/// One chunk of a list column.
struct List {
    values: ArrayRef,
    /// `None`: rows of this fixed size lie one after another.
    offsets: Option<Vec32Or64>,
    fixed: usize,
    nulls: Option<NullBuffer>,
    len: usize,
}

impl List {
    fn of(name: &str, array: &ArrayRef) -> Result<Self, Box<Details>> {
        let (nulls, len) = (array.nulls().cloned(), array.len());
        Ok(match array.data_type() {
            DataType::FixedSizeList(_, k) => {
                let values = array.as_fixed_size_list().values().clone();
                Self { values, offsets: None, fixed: usize::try_from(*k).unwrap_or(0), nulls, len }
            }
            DataType::List(_) => {
                let list = array.as_list::<i32>();
                let offsets = Some(Vec32Or64::Small(list.offsets().clone()));
                Self { values: list.values().clone(), offsets, fixed: 0, nulls, len }
            }
            DataType::LargeList(_) => {
                let list = array.as_list::<i64>();
                let offsets = Some(Vec32Or64::Large(list.offsets().clone()));
                Self { values: list.values().clone(), offsets, fixed: 0, nulls, len }
            }
            other => {
                return Err(Box::new(
                    Details::new(format!("column '{name}' has type {other}, not a list")).in_column(name),
                ));
            }
        })
    }

    fn start(&self, row: usize) -> usize {
        self.offsets.as_ref().map_or(row * self.fixed, |o| o.get(row))
    }

    /// Every row that is not null must be as long as the ones before.
    fn check_lengths(&self, name: &str, base: usize, k: &mut Option<usize>) -> Result<(), Box<Details>> {
        if self.offsets.is_none() {
            match k {
                Some(k) if *k != self.fixed => return Err(unequal(name, base, self.fixed, *k)),
                _ => *k = Some(self.fixed),
            }
            return Ok(());
        }
        for row in 0..self.len {
            if self.nulls.as_ref().is_some_and(|n| n.is_null(row)) {
                continue;
            }
            let len = self.start(row + 1) - self.start(row);
            match k {
                Some(k) if *k != len => return Err(unequal(name, base + row, len, *k)),
                Some(_) => {}
                None => *k = Some(len),
            }
        }
        Ok(())
    }

    /// Row and index of the first null element of a row that is not null.
    fn find_hole(&self, nulls: Option<&NullBuffer>, len: usize, k: usize) -> Option<(usize, usize)> {
        let holes = self.values.nulls().filter(|n| n.null_count() > 0)?;
        let mut found = None;
        let mut check = |a: usize, b: usize| {
            let run = holes.slice(self.start(a), (b - a) * k);
            if found.is_none() && run.null_count() > 0 {
                let element = (0..run.len()).find(|i| run.is_null(*i)).unwrap_or(0);
                found = Some((a + element / k, element % k));
            }
        };
        match nulls {
            None => check(0, len),
            Some(nulls) => nulls.valid_slices().for_each(|(a, b)| check(a, b)),
        }
        found
    }
}

fn unequal(name: &str, row: usize, len: usize, first: usize) -> Box<Details> {
    let details = Details::new(format!(
        "column '{name}' row {row} has {len} values, the rows before have {first}"
    ))
    .in_column(name)
    .at(row, None)
    .value(len)
    .hint(
        "vectors of one column must have equal length; lists of any length are layers (layer_name, weights)",
    );
    Box::new(details)
}

impl From<Box<Details>> for InputError {
    /// The data's fault, for places where no option is involved.
    fn from(details: Box<Details>) -> Self {
        Self::Value(details)
    }
}
