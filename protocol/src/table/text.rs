//! Text, bytes and integers of a column, whichever of Arrow's types holds them.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, LargeStringArray, StringArray, StringViewArray};
use arrow_buffer::{Buffer, NullBuffer};
use arrow_schema::DataType;

/// A column of strings: plain, large, views, or a dictionary of any of them.
#[derive(Debug)]
pub(crate) enum Strings {
    Small(StringArray),
    Large(LargeStringArray),
    View(StringViewArray),
    Dictionary { keys: Vec<usize>, nulls: Option<NullBuffer>, values: Box<Strings> },
}

impl Strings {
    pub(crate) fn is_type(data_type: &DataType) -> bool {
        match data_type {
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
            DataType::Dictionary(_, values) => Self::is_type(values),
            _ => false,
        }
    }

    pub(crate) fn is_large(data_type: &DataType) -> bool {
        match data_type {
            DataType::Dictionary(_, values) => Self::is_large(values),
            other => *other == DataType::LargeUtf8,
        }
    }

    pub(crate) fn of(array: &ArrayRef) -> Option<Self> {
        Some(match array.data_type() {
            DataType::Utf8 => Self::Small(array.as_string::<i32>().clone()),
            DataType::LargeUtf8 => Self::Large(array.as_string::<i64>().clone()),
            DataType::Utf8View => Self::View(array.as_string_view().clone()),
            DataType::Dictionary(_, _) => {
                let dictionary = array.as_any_dictionary_opt()?;
                let values = Box::new(Self::of(dictionary.values())?);
                let empty = dictionary.values().is_empty();
                let keys = if empty { vec![0; array.len()] } else { dictionary.normalized_keys() };
                Self::Dictionary { keys, nulls: array.nulls().cloned(), values }
            }
            _ => return None,
        })
    }

    pub(crate) fn get(&self, row: usize) -> Option<&str> {
        match self {
            Self::Small(a) => a.is_valid(row).then(|| a.value(row)),
            Self::Large(a) => a.is_valid(row).then(|| a.value(row)),
            Self::View(a) => a.is_valid(row).then(|| a.value(row)),
            Self::Dictionary { keys, nulls, values } => {
                let valid = nulls.as_ref().is_none_or(|n| n.is_valid(row));
                if valid { values.get(keys[row]) } else { None }
            }
        }
    }
}

/// Whether values of this type are byte strings.
pub(crate) fn is_binary(data_type: &DataType) -> bool {
    use DataType::{Binary, BinaryView, FixedSizeBinary, LargeBinary};
    matches!(data_type, Binary | LargeBinary | BinaryView | FixedSizeBinary(_))
}

/// One byte string, by reference wherever it does not lie inside a view. `None` for null and for other types.
pub(crate) fn bytes_at(array: &ArrayRef, row: usize) -> Option<Buffer> {
    if array.is_null(row) {
        return None;
    }
    match array.data_type() {
        DataType::Binary => {
            let a = array.as_binary::<i32>();
            let (from, to) = (a.value_offsets()[row] as usize, a.value_offsets()[row + 1] as usize);
            Some(a.values().slice_with_length(from, to - from))
        }
        DataType::LargeBinary => {
            let a = array.as_binary::<i64>();
            let (from, to) = (a.value_offsets()[row] as usize, a.value_offsets()[row + 1] as usize);
            Some(a.values().slice_with_length(from, to - from))
        }
        DataType::BinaryView => {
            let a = array.as_binary_view();
            let view = a.views()[row];
            let (length, buffer, offset) = (view as u32, (view >> 64) as u32, (view >> 96) as u32);
            match a.data_buffers().get(buffer as usize) {
                Some(data) if length > 12 => Some(data.slice_with_length(offset as usize, length as usize)),
                _ => Some(Buffer::from(a.value(row))),
            }
        }
        DataType::FixedSizeBinary(_) => Some(Buffer::from(array.as_fixed_size_binary().value(row))),
        _ => None,
    }
}

/// The integers of an array of any width, nulls as `None`. `None` for other types and for values beyond `i64`.
pub(crate) fn integers(array: &ArrayRef) -> Option<Vec<Option<i64>>> {
    macro_rules! collect {
        ($($name:ident: $type:ty),*) => {
            match array.data_type() {
                $(DataType::$name => array
                    .as_primitive::<$type>()
                    .iter()
                    .map(|v| v.map(i64::try_from).transpose().ok())
                    .collect(),)*
                DataType::Dictionary(_, _) => {
                    let dictionary = array.as_any_dictionary_opt()?;
                    let values = integers(dictionary.values())?;
                    if values.is_empty() {
                        return Some(vec![None; array.len()]);
                    }
                    let keys = dictionary.normalized_keys();
                    Some(keys.iter().enumerate().map(|(i, k)| if array.is_null(i) { None } else { values[*k] }).collect())
                }
                _ => None,
            }
        };
    }
    collect!(Int8: Int8Type, Int16: Int16Type, Int32: Int32Type, Int64: Int64Type,
        UInt8: UInt8Type, UInt16: UInt16Type, UInt32: UInt32Type, UInt64: UInt64Type)
}

/// One row of a column of lists of any kind; `None` for null and for other types.
pub(crate) fn list_at(array: &ArrayRef, row: usize) -> Option<ArrayRef> {
    if array.is_null(row) {
        return None;
    }
    match array.data_type() {
        DataType::List(_) => Some(array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => Some(array.as_list::<i64>().value(row)),
        DataType::FixedSizeList(_, _) => Some(array.as_fixed_size_list().value(row)),
        _ => None,
    }
}
