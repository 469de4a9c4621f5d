//! Arrow fields and column shapes of kept columns, as PROTOCOL.md section 4 draws them.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Fields, IntervalUnit, Metadata, TimeUnit};

use crate::wire::{Reader, WireError, Writer};

/// Deepest nesting of a field.
pub const MAX_DEPTH: u32 = 32;

const NULLABLE: u8 = 1;
const ORDERED: u8 = 2;
const SORTED: u8 = 4;
const TIMESTAMP: u8 = 25;
const DICTIONARY: u8 = 50;

/// Lengths of one node of a kept column and of its children; buffers in Arrow's IPC order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeData {
    /// Values.
    pub length: u64,
    /// Of which null.
    pub null_count: u64,
    /// Bytes of each buffer, the validity bitmap first (0 bytes without nulls).
    pub buffers: Vec<u64>,
    /// Children, in the type's order; a dictionary's values are its one child.
    pub children: Vec<NodeData>,
}

/// Why a field cannot be a published column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnsupportedType(pub DataType);

/// Appends `field`; an error names the first type that cannot be kept.
pub fn write_field(w: &mut Writer<'_>, field: &Field) -> Result<(), UnsupportedType> {
    let (code, a, b) = code_of(field.data_type())?;
    let sorted = matches!(field.data_type(), DataType::Map(_, true));
    let ordered = field.dict_is_ordered() == Some(true);
    let zone = match field.data_type() {
        DataType::Timestamp(_, Some(zone)) => zone,
        _ => "",
    };
    let flag = |on: bool, bit: u8| if on { bit } else { 0 };
    w.u8(code).u8(flag(field.is_nullable(), NULLABLE) | flag(ordered, ORDERED) | flag(sorted, SORTED));
    w.i32(a).i32(b).string(zone);
    write_metadata(w, field.metadata());
    match field.data_type() {
        DataType::Dictionary(_, values) => {
            w.u16(1).string("values");
            write_field(w, &Field::new("values", values.as_ref().clone(), true))
        }
        DataType::List(child)
        | DataType::LargeList(child)
        | DataType::FixedSizeList(child, _)
        | DataType::Map(child, _) => write_children(w, std::slice::from_ref(child)),
        DataType::Struct(children) => write_children(w, children),
        _ => write_children(w, &[]),
    }
}

/// Reads a field called `name`.
pub fn read_field(r: &mut Reader<'_>, name: &str, depth: u32) -> Result<Field, WireError> {
    if depth > MAX_DEPTH {
        return Err(WireError::Value { what: "depth of a field", value: u64::from(depth) });
    }
    let code = r.u8("type")?;
    let flags = r.u8("flags")?;
    let (a, b) = (r.i32("a")?, r.i32("b")?);
    let zone = r.string("timezone")?;
    let metadata = read_metadata(r)?;
    let n = r.u16("n_children")?;
    let n = r.count(u64::from(n), 20, "children")?;
    let mut children = Vec::with_capacity(n);
    for _ in 0..n {
        let name = r.string("child name")?;
        children.push(read_field(r, name, depth + 1)?);
    }
    let bad = || WireError::Value { what: "type", value: u64::from(code) };
    if !zone.is_empty() && code != TIMESTAMP {
        return Err(WireError::Value { what: "type with a timezone", value: u64::from(code) });
    }
    let data_type = match code {
        40..=42 | 44 | DICTIONARY => {
            let [child] = <[Field; 1]>::try_from(children).map_err(|_| bad())?;
            nested(code, a, flags, child).ok_or_else(bad)?
        }
        43 => DataType::Struct(Fields::from(children)),
        _ if children.is_empty() => leaf(code, a, b, zone).ok_or_else(bad)?,
        _ => return Err(bad()),
    };
    let nullable = flags & NULLABLE != 0;
    let field = match data_type {
        DataType::Dictionary(..) => {
            Field::new(name, data_type, nullable).with_dict_is_ordered(flags & ORDERED != 0)
        }
        _ => Field::new(name, data_type, nullable),
    };
    Ok(field.with_metadata(metadata))
}

/// Appends the lengths of a node and of its children.
pub fn write_data(w: &mut Writer<'_>, data: &NodeData) {
    w.u64(data.length).u64(data.null_count).u16(data.buffers.len() as u16);
    for bytes in &data.buffers {
        w.u64(*bytes);
    }
    w.u16(data.children.len() as u16);
    for child in &data.children {
        write_data(w, child);
    }
}

/// Reads the lengths of a node and of its children.
pub fn read_data(r: &mut Reader<'_>, depth: u32) -> Result<NodeData, WireError> {
    if depth > MAX_DEPTH {
        return Err(WireError::Value { what: "depth of data", value: u64::from(depth) });
    }
    let length = r.u64("length")?;
    let null_count = r.u64("null_count")?;
    if null_count > length || length > i64::MAX as u64 {
        return Err(WireError::Value { what: "null_count", value: null_count });
    }
    let n = r.u16("n_buffers")?;
    let n = r.count(u64::from(n), 8, "buffers")?;
    let buffers = (0..n).map(|_| r.u64("buffer")).collect::<Result<_, _>>()?;
    let n = r.u16("n_children")?;
    let n = r.count(u64::from(n), 20, "children")?;
    let children = (0..n).map(|_| read_data(r, depth + 1)).collect::<Result<_, _>>()?;
    Ok(NodeData { length, null_count, buffers, children })
}

/// Appends key-value pairs; `Metadata` keeps them sorted, so that equal metadata has equal bytes.
pub fn write_metadata(w: &mut Writer<'_>, metadata: &Metadata) {
    w.u32(metadata.len() as u32);
    for (key, value) in metadata.iter() {
        w.string(key).string(value);
    }
}

/// Reads key-value pairs.
pub fn read_metadata(r: &mut Reader<'_>) -> Result<Metadata, WireError> {
    let n = r.u32("n_metadata")?;
    let n = r.count(u64::from(n), 8, "metadata")?;
    (0..n).map(|_| Ok((r.string("key")?.to_owned(), r.string("value")?.to_owned()))).collect()
}

fn write_children(w: &mut Writer<'_>, children: &[Arc<Field>]) -> Result<(), UnsupportedType> {
    w.u16(children.len() as u16);
    for child in children {
        w.string(child.name());
        write_field(w, child)?;
    }
    Ok(())
}

fn unit_code(unit: TimeUnit) -> i32 {
    match unit {
        TimeUnit::Second => 0,
        TimeUnit::Millisecond => 1,
        TimeUnit::Microsecond => 2,
        TimeUnit::Nanosecond => 3,
    }
}

fn unit_of(code: i32) -> Option<TimeUnit> {
    Some(match code {
        0 => TimeUnit::Second,
        1 => TimeUnit::Millisecond,
        2 => TimeUnit::Microsecond,
        3 => TimeUnit::Nanosecond,
        _ => return None,
    })
}

fn code_of(data_type: &DataType) -> Result<(u8, i32, i32), UnsupportedType> {
    Ok(match data_type {
        DataType::Null => (1, 0, 0),
        DataType::Boolean => (2, 0, 0),
        DataType::Int8 => (3, 0, 0),
        DataType::Int16 => (4, 0, 0),
        DataType::Int32 => (5, 0, 0),
        DataType::Int64 => (6, 0, 0),
        DataType::UInt8 => (7, 0, 0),
        DataType::UInt16 => (8, 0, 0),
        DataType::UInt32 => (9, 0, 0),
        DataType::UInt64 => (10, 0, 0),
        DataType::Float32 => (11, 0, 0),
        DataType::Float64 => (12, 0, 0),
        DataType::Decimal128(p, s) => (13, i32::from(*p), i32::from(*s)),
        DataType::Decimal256(p, s) => (14, i32::from(*p), i32::from(*s)),
        DataType::Decimal32(p, s) => (15, i32::from(*p), i32::from(*s)),
        DataType::Decimal64(p, s) => (16, i32::from(*p), i32::from(*s)),
        DataType::Float16 => (17, 0, 0),
        DataType::FixedSizeBinary(n) => (18, *n, 0),
        DataType::Interval(IntervalUnit::YearMonth) => (19, 0, 0),
        DataType::Interval(IntervalUnit::DayTime) => (19, 1, 0),
        DataType::Interval(IntervalUnit::MonthDayNano) => (19, 2, 0),
        DataType::Date32 => (20, 0, 0),
        DataType::Date64 => (21, 0, 0),
        DataType::Time32(unit) => (22, unit_code(*unit), 0),
        DataType::Time64(unit) => (23, unit_code(*unit), 0),
        DataType::Timestamp(unit, _) => (TIMESTAMP, unit_code(*unit), 0),
        DataType::Duration(unit) => (26, unit_code(*unit), 0),
        DataType::Binary => (30, 0, 0),
        DataType::LargeBinary => (31, 0, 0),
        DataType::Utf8 => (32, 0, 0),
        DataType::LargeUtf8 => (33, 0, 0),
        DataType::BinaryView => (34, 0, 0),
        DataType::Utf8View => (35, 0, 0),
        DataType::List(_) => (40, 0, 0),
        DataType::LargeList(_) => (41, 0, 0),
        DataType::FixedSizeList(_, n) => (42, *n, 0),
        DataType::Struct(_) => (43, 0, 0),
        DataType::Map(..) => (44, 0, 0),
        DataType::Dictionary(index, values) if !values.is_nested() && !is_dictionary(values) => {
            (DICTIONARY, i32::from(code_of(index)?.0), 0)
        }
        other => return Err(UnsupportedType(other.clone())),
    })
}

fn leaf(code: u8, a: i32, b: i32, zone: &str) -> Option<DataType> {
    let (precision, scale) = (u8::try_from(a), i8::try_from(b));
    let decimal = |most: u8| match (precision, scale) {
        (Ok(p), Ok(s)) if (1..=most).contains(&p) && s <= p as i8 => Some((p, s)),
        _ => None,
    };
    Some(match code {
        1 => DataType::Null,
        2 => DataType::Boolean,
        3 => DataType::Int8,
        4 => DataType::Int16,
        5 => DataType::Int32,
        6 => DataType::Int64,
        7 => DataType::UInt8,
        8 => DataType::UInt16,
        9 => DataType::UInt32,
        10 => DataType::UInt64,
        11 => DataType::Float32,
        12 => DataType::Float64,
        13 => decimal(38).map(|(p, s)| DataType::Decimal128(p, s))?,
        14 => decimal(76).map(|(p, s)| DataType::Decimal256(p, s))?,
        15 => decimal(9).map(|(p, s)| DataType::Decimal32(p, s))?,
        16 => decimal(18).map(|(p, s)| DataType::Decimal64(p, s))?,
        17 => DataType::Float16,
        18 if a >= 0 => DataType::FixedSizeBinary(a),
        19 => DataType::Interval(match a {
            0 => IntervalUnit::YearMonth,
            1 => IntervalUnit::DayTime,
            2 => IntervalUnit::MonthDayNano,
            _ => return None,
        }),
        20 => DataType::Date32,
        21 => DataType::Date64,
        22 => DataType::Time32(unit_of(a).filter(|_| a < 2)?),
        23 => DataType::Time64(unit_of(a).filter(|_| a >= 2)?),
        TIMESTAMP => DataType::Timestamp(unit_of(a)?, (!zone.is_empty()).then(|| zone.into())),
        26 => DataType::Duration(unit_of(a)?),
        30 => DataType::Binary,
        31 => DataType::LargeBinary,
        32 => DataType::Utf8,
        33 => DataType::LargeUtf8,
        34 => DataType::BinaryView,
        35 => DataType::Utf8View,
        _ => return None,
    })
}

fn nested(code: u8, a: i32, flags: u8, child: Field) -> Option<DataType> {
    Some(match code {
        40 => DataType::List(Arc::new(child)),
        41 => DataType::LargeList(Arc::new(child)),
        42 if a >= 0 => DataType::FixedSizeList(Arc::new(child), a),
        44 => {
            let entries = matches!(child.data_type(), DataType::Struct(f) if f.len() == 2);
            entries.then(|| DataType::Map(Arc::new(child), flags & SORTED != 0))?
        }
        DICTIONARY => {
            let index = leaf(u8::try_from(a).ok()?, 0, 0, "").filter(DataType::is_integer)?;
            let values = child.data_type().clone();
            (!values.is_nested() && !is_dictionary(&values))
                .then(|| DataType::Dictionary(Box::new(index), Box::new(values)))?
        }
        _ => return None,
    })
}

fn is_dictionary(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Dictionary(..))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timezone_belongs_to_a_timestamp() {
        let zoned = DataType::Timestamp(TimeUnit::Second, Some("UTC".into()));
        let mut bytes = Vec::new();
        write_field(&mut Writer::new(&mut bytes), &Field::new("at", zoned.clone(), true)).unwrap();
        let read = |bytes: &[u8]| read_field(&mut Reader::new(bytes), "at", 0);
        assert_eq!(read(&bytes).unwrap().data_type(), &zoned);
        for code in [1, 12, 20, 32] {
            bytes[0] = code;
            let error = read(&bytes).unwrap_err();
            assert!(
                matches!(error, WireError::Value { what: "type with a timezone", value } if value == u64::from(code))
            );
        }
    }
}
