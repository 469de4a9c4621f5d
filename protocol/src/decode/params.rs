//! The parameters of a result, to quantize other tables alike.

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use shmquant_kernels::{Affine, Granularity};

use super::DecodeError;
use super::codec::{all, codes_of};
use super::layers::{Kind, Rows};
use crate::fit::TableParams;
use crate::table::Details;

type Constant = Option<(Vec<f32>, Vec<i32>)>;
type Entry = (String, Vec<f32>, Vec<i32>);

/// The parameters of a result whose ranges span rows: `tensor` and `dimension` of vectors, plain columns, and of
/// layers also `row`.
pub fn params(schema: &SchemaRef, batches: &[RecordBatch]) -> Result<TableParams, DecodeError> {
    let mut found: Option<(Affine, Granularity)> = None;
    let mut entries: Vec<Entry> = Vec::new();
    let mut add = |affine: Affine, granularity: Option<Granularity>, entry: Entry| {
        // A plain column goes with any granularity of vectors.
        let (first, other) = *found.get_or_insert((affine, granularity.unwrap_or(Granularity::Tensor)));
        let differs = granularity.is_some_and(|g| g != other && !entries.is_empty());
        if first != affine || differs {
            let what = format!("'{}' and '{}' were quantized differently", entry.0, entries[0].0);
            return Err(refuse(what, "fit params for one scheme at a time"));
        }
        entries.push(entry);
        Ok(())
    };
    if super::is_layers(schema) {
        for batch in batches {
            let rows = Rows::of(batch, 0)?;
            for row in 0..batch.num_rows() {
                let Some(item) = rows.item(row)? else { continue };
                let Kind::Affine { affine, layout, scales, zero_points } = item.kind else { continue };
                if layout.elements() == 0 {
                    continue;
                }
                if layout.granularity == Granularity::Group {
                    let what =
                        format!("Layer '{}' has ranges of groups, which fit no other values", rows.name(row));
                    return Err(refuse(what, "granularity=\"row\" or \"tensor\""));
                }
                let zeros = if zero_points.is_empty() { vec![0; scales.len()] } else { zero_points };
                add(affine, Some(layout.granularity), (rows.name(row).to_owned(), scales, zeros))?;
            }
        }
    } else {
        let mut codecs: Vec<_> =
            all(schema)?.into_iter().enumerate().filter_map(|(i, c)| c.map(|c| (i, c))).collect();
        // Vectors decide about the granularity.
        codecs.sort_by_key(|(_, c)| c.dim.is_none());
        for (index, codec) in codecs {
            let entry = match (&codec.shared, codec.dim) {
                (Some(shared), _) => {
                    let mut base = 0;
                    for batch in batches {
                        let nulls = codes_of(&codec.name, batch.column(index), base)?.nulls;
                        codec.params(batch, nulls.as_ref(), base)?;
                        base += batch.num_rows();
                    }
                    let zeros = &shared.zero_points;
                    let zeros = if zeros.is_empty() { vec![0; shared.scales.len()] } else { zeros.clone() };
                    Some((shared.scales.clone(), zeros))
                }
                (None, None) => one_constant(&codec, index, batches)?,
                (None, Some(_)) => None,
            };
            let granularity = codec.dim.map(|_| codec.granularity);
            if let Some((scales, zeros)) = entry {
                add(codec.affine, granularity, (codec.name.clone(), scales, zeros))?;
            }
        }
    }
    let Some((affine, granularity)) = found else {
        let hint = "granularity=\"dimension\" or \"tensor\" makes ranges that fit other rows";
        return Err(refuse("every row of this result has ranges of its own".to_owned(), hint));
    };
    TableParams::from_scales(affine, granularity, entries)
        .map_err(|e| DecodeError::Value(Box::new(e.details().clone())))
}

/// The one scale and zero point of a plain column; `None` if no row has a value.
fn one_constant(
    codec: &super::codec::Codec,
    index: usize,
    batches: &[RecordBatch],
) -> Result<Constant, DecodeError> {
    let mut found: Option<(f32, i32)> = None;
    let mut base = 0;
    for batch in batches {
        let nulls = codes_of(&codec.name, batch.column(index), base)?.nulls;
        let (scales, zeros) = codec.params(batch, nulls.as_ref(), base)?;
        for (row, scale) in scales.iter().enumerate() {
            if nulls.as_ref().is_some_and(|n| n.is_null(row)) {
                continue;
            }
            let its = (*scale, zeros.get(row).copied().unwrap_or(0));
            if *found.get_or_insert(its) != its {
                let what = format!("column '{}' has other parameters from row {} on", codec.name, base + row);
                return Err(refuse(what, "it was joined from several results"));
            }
        }
        base += batch.num_rows();
    }
    Ok(found.map(|(scale, zero)| (vec![scale], vec![zero])))
}

fn refuse(what: String, hint: &str) -> DecodeError {
    DecodeError::Mixed(Box::new(Details::new(what).hint(hint)))
}
