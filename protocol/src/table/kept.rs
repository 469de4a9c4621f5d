//! Columns that are copied into a published result: canonical buffers over all chunks, by reference.
//!
//! A result has one record batch. Where the chunks of a column hold more together than 32-bit offsets can tell, the column
//! becomes large (`utf8` to `large_utf8`, a list to a large list), and no other.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, make_array, new_empty_array};
use arrow_buffer::Buffer;
use arrow_data::ArrayData;
use arrow_schema::{DataType, Field, FieldRef};

use super::error::Details;
use super::stream::{Bits, OffsetWidth, Offsets, Pieces, Rows, Starts, Stream, Views};
use crate::field::{NodeData, UnsupportedType, write_field};
use crate::wire::Writer;

/// A column as it is published.
pub(super) struct Column {
    /// Its field, as given but for a type that has to be large.
    pub(super) field: Field,
    pub(super) data: NodeData,
    /// Its buffers in preorder.
    pub(super) streams: Vec<Stream>,
}

/// The column that all chunks make together.
pub(super) fn column(field: &Field, arrays: &[ArrayRef]) -> Result<Column, Box<Details>> {
    let mut unused = Vec::new();
    if let Err(UnsupportedType(found)) = write_field(&mut Writer::new(&mut unused), field) {
        let what = format!("column '{}' cannot be published: it has the type {found}", field.name());
        return Err(Box::new(
            Details::new(what).value(found).hint("leave it out with keep=[...], or cast it"),
        ));
    }
    let chunks: Vec<ArrayData> = arrays.iter().map(|a| a.to_data()).collect();
    let mut streams = Vec::new();
    let (data, widened) = node(field.data_type(), &chunks, &mut streams).map_err(|what| {
        let what = format!("column '{}' cannot be published: {what}", field.name());
        Box::new(Details::new(what).hint("leave it out with keep=[...], or cast it"))
    })?;
    let field = match widened {
        Some(large) => field.clone().with_data_type(large),
        None => field.clone(),
    };
    Ok(Column { field, data, streams })
}

/// One node and its children: pushes its buffers, then theirs. Gives its type if that is not the one it had.
fn node(
    data_type: &DataType,
    chunks: &[ArrayData],
    out: &mut Vec<Stream>,
) -> Result<(NodeData, Option<DataType>), String> {
    let length = chunks.iter().map(|c| c.len() as u64).sum();
    if *data_type == DataType::Null {
        let data = NodeData { length, null_count: length, buffers: Vec::new(), children: Vec::new() };
        return Ok((data, None));
    }
    let null_count = chunks.iter().map(|c| c.null_count() as u64).sum();
    let first = out.len();
    out.push(validity(chunks, null_count));
    let mut children: Vec<(DataType, Vec<ArrayData>)> = Vec::new();
    let width = match data_type {
        DataType::Binary | DataType::Utf8 | DataType::List(_) | DataType::Map(..) => {
            width(data_type, chunks)?
        }
        _ => OffsetWidth::Large,
    };
    match data_type {
        DataType::Boolean => out.push(booleans(chunks)),
        DataType::Binary | DataType::Utf8 | DataType::LargeBinary | DataType::LargeUtf8 => {
            binary(chunks, width, out);
        }
        DataType::BinaryView | DataType::Utf8View => views(data_type, chunks, out)?,
        DataType::List(child) | DataType::LargeList(child) | DataType::Map(child, _) => {
            children.push((child.data_type().clone(), lists(chunks, width, out)));
        }
        DataType::FixedSizeList(child, size) => {
            let size = usize::try_from(*size).map_err(|_| format!("a list size of {size}"))?;
            let part = |c: &ArrayData| c.child_data()[0].slice(c.offset() * size, c.len() * size);
            children.push((child.data_type().clone(), chunks.iter().map(part).collect()));
        }
        DataType::Struct(fields) => {
            for (i, field) in fields.iter().enumerate() {
                let part = |c: &ArrayData| c.child_data()[i].slice(c.offset(), c.len());
                children.push((field.data_type().clone(), chunks.iter().map(part).collect()));
            }
        }
        DataType::Dictionary(index, values) => {
            let (chunks, dictionary) = unify(data_type, chunks)?;
            let width = index.primitive_width().ok_or_else(|| format!("an index type {index}"))?;
            out.push(indices(&chunks, width));
            children.push((values.as_ref().clone(), vec![dictionary]));
        }
        other => {
            let width = match other {
                DataType::FixedSizeBinary(n) => usize::try_from(*n).ok(),
                _ => other.primitive_width(),
            };
            out.push(fixed(chunks, width.ok_or_else(|| format!("the type {other}"))?));
        }
    }
    let buffers = out[first..].iter().map(Stream::bytes).collect();
    let mut nodes = Vec::with_capacity(children.len());
    let mut larger = Vec::with_capacity(children.len());
    for (data_type, chunks) in &children {
        let (node, large) = node(data_type, chunks, out)?;
        nodes.push(node);
        larger.push(large);
    }
    let widened = widened(data_type, width == OffsetWidth::Widened, &mut larger);
    Ok((NodeData { length, null_count, buffers, children: nodes }, widened))
}

/// The type of a node that has to be large, or one of whose children has to; `None` if it stays as it is.
fn widened(data_type: &DataType, itself: bool, children: &mut [Option<DataType>]) -> Option<DataType> {
    if !itself && children.iter().all(Option::is_none) {
        return None;
    }
    let mut children = children.iter_mut().map(Option::take);
    let mut child = |field: &FieldRef| match children.next().flatten() {
        Some(large) => Arc::new(field.as_ref().clone().with_data_type(large)),
        None => field.clone(),
    };
    match data_type {
        DataType::Utf8 => Some(DataType::LargeUtf8),
        DataType::Binary => Some(DataType::LargeBinary),
        DataType::List(field) if itself => Some(DataType::LargeList(child(field))),
        DataType::List(field) => Some(DataType::List(child(field))),
        DataType::LargeList(field) => Some(DataType::LargeList(child(field))),
        DataType::FixedSizeList(field, size) => Some(DataType::FixedSizeList(child(field), *size)),
        DataType::Map(field, sorted) => Some(DataType::Map(child(field), *sorted)),
        DataType::Struct(fields) => Some(DataType::Struct(fields.iter().map(child).collect())),
        DataType::Dictionary(index, _) => {
            let values = children.next().flatten();
            values.map(|values| DataType::Dictionary(index.clone(), Box::new(values)))
        }
        _ => None,
    }
}

fn validity(chunks: &[ArrayData], null_count: u64) -> Stream {
    let mut pieces = Pieces::default();
    if null_count > 0 {
        for chunk in chunks {
            pieces.push(Bits::validity(chunk.nulls()), chunk.len());
        }
    }
    Stream::Bits(pieces)
}

fn booleans(chunks: &[ArrayData]) -> Stream {
    let mut pieces = Pieces::default();
    for chunk in chunks {
        let array = make_array(chunk.clone());
        pieces.push(Bits::Of(array.as_boolean().values().clone()), chunk.len());
    }
    Stream::Bits(pieces)
}

/// Part of the first buffer: `len` values from the chunk's offset on.
fn part(chunk: &ArrayData, buffer: usize, width: usize, len: usize) -> Buffer {
    chunk
        .buffers()
        .get(buffer)
        .map_or_else(Buffer::default, |b| b.slice_with_length(chunk.offset() * width, len * width))
}

fn fixed(chunks: &[ArrayData], width: usize) -> Stream {
    let mut pieces = Pieces::default();
    for chunk in chunks {
        pieces.push(part(chunk, 0, width, chunk.len()), chunk.len() * width);
    }
    Stream::Bytes(pieces)
}

/// Indices, 0 where they are null: what lies there may be outside the dictionary.
fn indices(chunks: &[ArrayData], width: usize) -> Stream {
    let mut pieces = Pieces::default();
    for chunk in chunks {
        let values = part(chunk, 0, width, chunk.len());
        let nulls = chunk.nulls().filter(|n| n.null_count() > 0).cloned();
        let rows =
            Rows { values, len: chunk.len(), row_bytes: width, starts: Starts::Dense, nulls, holes: None };
        pieces.push(rows, chunk.len() * width);
    }
    Stream::Rows(pieces)
}

/// First and last offset of a chunk.
fn ends(chunk: &ArrayData, width: OffsetWidth) -> (i64, i64) {
    if chunk.is_empty() {
        return (0, 0);
    }
    let width = width.held();
    let offsets = part(chunk, 0, width, chunk.len() + 1);
    let at = |i: usize| {
        let bytes = &offsets.as_slice()[i * width..(i + 1) * width];
        let mut word = [0; 8];
        word[..width].copy_from_slice(bytes);
        i64::from_le_bytes(word)
    };
    (at(0), at(chunk.len()))
}

/// How the offsets of a type of 32 bits cross: as they are while all chunks together allow it.
fn width(data_type: &DataType, chunks: &[ArrayData]) -> Result<OffsetWidth, String> {
    let used = |c: &ArrayData| {
        let (first, last) = ends(c, OffsetWidth::Small);
        last - first
    };
    let total: i64 = chunks.iter().map(used).sum();
    match i32::try_from(total) {
        Ok(_) => Ok(OffsetWidth::Small),
        Err(_) if matches!(data_type, DataType::Map(..)) => {
            Err(format!("its maps hold {total} entries together, 2^31 - 1 is the most"))
        }
        Err(_) => Ok(OffsetWidth::Widened),
    }
}

/// Joined offsets, and the part of its values that each chunk uses.
fn offsets(chunks: &[ArrayData], width: OffsetWidth) -> (Stream, Vec<std::ops::Range<usize>>) {
    let (held, crossing) = (width.held(), width.crossing());
    let mut pieces = Pieces::of(Offsets { offsets: None, shift: 0, width }, crossing);
    let mut ranges = Vec::with_capacity(chunks.len());
    let mut total = 0i64;
    for chunk in chunks {
        let (first, last) = ends(chunk, width);
        ranges.push(first as usize..last as usize);
        if chunk.is_empty() {
            continue;
        }
        let all = part(chunk, 0, held, chunk.len() + 1);
        let offsets = Some(all.slice_with_length(held, chunk.len() * held));
        pieces.push(Offsets { offsets, shift: total - first, width }, chunk.len() * crossing);
        total += last - first;
    }
    (Stream::Offsets(pieces), ranges)
}

fn binary(chunks: &[ArrayData], width: OffsetWidth, out: &mut Vec<Stream>) {
    let (stream, ranges) = offsets(chunks, width);
    out.push(stream);
    let mut pieces = Pieces::default();
    for (chunk, range) in chunks.iter().zip(ranges) {
        if let Some(values) = chunk.buffers().get(1) {
            pieces.push(values.slice_with_length(range.start, range.len()), range.len());
        }
    }
    out.push(Stream::Bytes(pieces));
}

fn lists(chunks: &[ArrayData], width: OffsetWidth, out: &mut Vec<Stream>) -> Vec<ArrayData> {
    let (stream, ranges) = offsets(chunks, width);
    out.push(stream);
    chunks.iter().zip(ranges).map(|(c, r)| c.child_data()[0].slice(r.start, r.len())).collect()
}

fn views(data_type: &DataType, chunks: &[ArrayData], out: &mut Vec<Stream>) -> Result<(), String> {
    let mut joined = Pieces::default();
    let mut buffers: Vec<Buffer> = Vec::new();
    let mut known = HashMap::new();
    for chunk in chunks {
        let chunk = shrink(data_type, chunk);
        let mut numbers = Vec::new();
        for buffer in chunk.buffers().get(1..).unwrap_or_default() {
            // Slices of one column share their buffers: they cross once.
            let number = *known.entry((buffer.as_ptr(), buffer.len())).or_insert_with(|| {
                buffers.push(buffer.clone());
                buffers.len() as u32 - 1
            });
            numbers.push(number);
        }
        let nulls = chunk.nulls().filter(|n| n.null_count() > 0).cloned();
        let views = part(&chunk, 0, 16, chunk.len());
        joined.push(Views { views, buffers: numbers, nulls }, chunk.len() * 16);
    }
    if buffers.len() + 2 > usize::from(u16::MAX) {
        return Err(format!("its views lie in {} buffers: cast it to a string type", buffers.len()));
    }
    out.push(Stream::Views(joined));
    for buffer in buffers {
        let len = buffer.len();
        out.push(Stream::Bytes(Pieces::of(buffer, len)));
    }
    Ok(())
}

/// A chunk that uses less than half of its buffers (a slice, the result of a filter) with buffers of its own.
fn shrink(data_type: &DataType, chunk: &ArrayData) -> ArrayData {
    let all: usize = chunk.buffers().iter().skip(1).map(Buffer::len).sum();
    let array = make_array(chunk.clone());
    if *data_type == DataType::Utf8View {
        let array = array.as_string_view();
        if array.total_buffer_bytes_used() < all / 2 { array.gc().into_data() } else { chunk.clone() }
    } else {
        let array = array.as_binary_view();
        if array.total_buffer_bytes_used() < all / 2 { array.gc().into_data() } else { chunk.clone() }
    }
}

/// Chunks that share one dictionary, and that dictionary.
fn unify(data_type: &DataType, chunks: &[ArrayData]) -> Result<(Vec<ArrayData>, ArrayData), String> {
    let dictionary = |c: &ArrayData| c.child_data()[0].clone();
    let Some(first) = chunks.first() else {
        let empty = new_empty_array(data_type).to_data();
        let values = dictionary(&empty);
        return Ok((Vec::new(), values));
    };
    let one = dictionary(first);
    let same = |c: &ArrayData| {
        let other = dictionary(c);
        other.ptr_eq(&one) || other == one
    };
    if chunks.iter().all(same) {
        return Ok((chunks.to_vec(), one));
    }
    let arrays: Vec<ArrayRef> = chunks.iter().cloned().map(make_array).collect();
    let arrays: Vec<&dyn Array> = arrays.iter().map(AsRef::as_ref).collect();
    let joined =
        arrow_select::concat::concat(&arrays).map_err(|e| format!("its dictionaries do not unite: {e}"))?;
    let joined = joined.to_data();
    let values = dictionary(&joined);
    Ok((vec![joined], values))
}
