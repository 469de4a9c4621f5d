//! Kept columns: their lengths must be those of their types before a byte is reserved for them.

use arrow_data::{BufferSpec, layout};
use arrow_schema::DataType;
use shmquant_protocol::field::NodeData;

use super::file::{BufferId, Builder, MessageId};

/// Adds a column's arrays to a message (its dictionaries to messages of their own) and gives its buffers in preorder.
pub(super) fn column(
    builder: &mut Builder,
    m: MessageId,
    data_type: &DataType,
    data: &NodeData,
) -> Result<Vec<BufferId>, String> {
    let mut buffers = Vec::new();
    node(builder, m, data_type, data, &mut buffers)?;
    Ok(buffers)
}

fn node(
    builder: &mut Builder,
    m: MessageId,
    data_type: &DataType,
    data: &NodeData,
    out: &mut Vec<BufferId>,
) -> Result<(), String> {
    let length = data.length;
    if data.null_count > length || length > i64::MAX as u64 {
        return Err(format!("{} nulls in {length} values", data.null_count));
    }
    if *data_type == DataType::Null {
        if !data.buffers.is_empty() || !data.children.is_empty() {
            return Err("an array of type null has neither buffers nor children".to_owned());
        }
        // The format wants all of them counted.
        builder.bare_node(m, length, length);
        return Ok(());
    }
    let validity = if data.null_count == 0 { 0 } else { length.div_ceil(8) };
    let (first, rest) = data.buffers.split_first().ok_or_else(|| format!("{data_type} without buffers"))?;
    expect(data_type, "validity", *first, validity)?;
    let id = builder.node(m, length, data.null_count, validity);
    out.extend(builder.validity(id));
    buffers(data_type, length, rest)?;
    if matches!(data_type, DataType::BinaryView | DataType::Utf8View) {
        builder.variadic(m, rest.len() as i64 - 1);
    }
    out.extend(rest.iter().map(|bytes| builder.buffer(m, *bytes)));
    children(builder, m, data_type, data, out)
}

/// Checks the buffers behind the validity.
fn buffers(data_type: &DataType, length: u64, sizes: &[u64]) -> Result<(), String> {
    let layout = layout(data_type);
    let enough = if layout.variadic {
        sizes.len() >= layout.buffers.len()
    } else {
        sizes.len() == layout.buffers.len()
    };
    if !enough {
        let want = layout.buffers.len() + 1;
        return Err(format!("{data_type} has {want} buffers, {} were announced", sizes.len() + 1));
    }
    let offsets = matches!(
        data_type,
        DataType::Binary
            | DataType::LargeBinary
            | DataType::Utf8
            | DataType::LargeUtf8
            | DataType::List(_)
            | DataType::LargeList(_)
            | DataType::Map(..)
    );
    let mut narrow = false;
    for (spec, bytes) in layout.buffers.iter().zip(sizes) {
        match spec {
            BufferSpec::FixedWidth { byte_width, .. } => {
                let width = *byte_width as u64;
                narrow = offsets && width == 4;
                if offsets && length == 0 && *bytes == 0 {
                    continue;
                }
                let n = if offsets { length.checked_add(1) } else { Some(length) };
                let want = n.and_then(|n| n.checked_mul(width)).ok_or("the size overflows")?;
                expect(data_type, if offsets { "offsets" } else { "values" }, *bytes, want)?;
            }
            BufferSpec::BitMap => expect(data_type, "values", *bytes, length.div_ceil(8))?,
            BufferSpec::VariableWidth if narrow && *bytes > i32::MAX as u64 => {
                return Err(format!("{data_type} cannot hold {bytes} bytes"));
            }
            BufferSpec::VariableWidth | BufferSpec::AlwaysNull => {}
        }
    }
    match sizes.iter().find(|bytes| **bytes > i64::MAX as u64) {
        Some(bytes) => Err(format!("{data_type}: a buffer of {bytes} bytes")),
        None => Ok(()),
    }
}

fn children(
    builder: &mut Builder,
    m: MessageId,
    data_type: &DataType,
    data: &NodeData,
    out: &mut Vec<BufferId>,
) -> Result<(), String> {
    let count = |n: usize| match data.children.len() == n {
        true => Ok(()),
        false => Err(format!("{data_type} has {n} children, {} were announced", data.children.len())),
    };
    match data_type {
        DataType::List(child) | DataType::LargeList(child) | DataType::Map(child, _) => {
            count(1)?;
            node(builder, m, child.data_type(), &data.children[0], out)
        }
        DataType::FixedSizeList(child, n) => {
            count(1)?;
            let want = u64::try_from(*n).ok().and_then(|n| n.checked_mul(data.length));
            if want != Some(data.children[0].length) {
                return Err(format!(
                    "{} lists of {n} values cannot hold {}",
                    data.length, data.children[0].length
                ));
            }
            node(builder, m, child.data_type(), &data.children[0], out)
        }
        DataType::Struct(fields) => {
            count(fields.len())?;
            for (field, child) in fields.iter().zip(&data.children) {
                if child.length != data.length {
                    return Err(format!(
                        "field {:?} has {} of {} values",
                        field.name(),
                        child.length,
                        data.length
                    ));
                }
                node(builder, m, field.data_type(), child, out)?;
            }
            Ok(())
        }
        DataType::Dictionary(_, values) => {
            count(1)?;
            let m = builder.dictionary(data.children[0].length);
            node(builder, m, values, &data.children[0], out)
        }
        _ => count(0),
    }
}

fn expect(data_type: &DataType, what: &str, bytes: u64, want: u64) -> Result<(), String> {
    match bytes == want {
        true => Ok(()),
        false => Err(format!("{data_type}: {what} of {bytes} bytes, {want} are needed")),
    }
}
