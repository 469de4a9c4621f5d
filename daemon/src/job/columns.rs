//! What a quantized column needs when its chunks have ended: parameters in their place, one validity for all its parts.

use std::collections::HashMap;

use shmquant_protocol::descriptor::Params;
use shmquant_protocol::message::{ErrorCode, Failure};

use super::Job;
use super::fault::internal;
use super::item::Known;
use super::outcome::Outcome;
use super::writer::Writer;
use crate::plan::{Column, ValuesTarget, Zeros, refuse, row_id, with_id};

/// Writes everything of one column but its codes; embedded parameters go to `embedded`.
pub(super) fn write(
    w: &mut Writer<'_>,
    job: &Job,
    column: &Column,
    outcome: &mut Outcome,
    embedded: &mut HashMap<usize, Params>,
) -> Result<(), Failure> {
    let plan = &*job.plan;
    let (values, spec, target) =
        plan.values(column.item).ok_or_else(|| internal("a quantized column without values"))?;
    let params = private_params(job, column.item, target, values.elements() == 0);
    let params = match plan.is_embedded(column.item) {
        true => Some(params.ok_or_else(|| internal("the parameters were never made"))?),
        false => {
            params.iter().try_for_each(|params| put_params(w, job, target, params))?;
            None
        }
    };
    if let Some(id) = column.params_id {
        w.fill(id, [row_id(values, spec, params.as_ref()).to_le_bytes()])?;
    }
    embedded.extend(params.map(|params| (column.item, params)));
    for id in &column.indices {
        w.buffer(*id)?.fill(0);
    }
    outcome.nulled = validity(w, job, column, values.rows, values.null_count)?;
    Ok(())
}

/// Writes parameters that the chunks kept to themselves.
pub(super) fn put_params(
    w: &mut Writer<'_>,
    job: &Job,
    target: &ValuesTarget,
    params: &Params,
) -> Result<(), Failure> {
    let file = job.plan.file();
    let Some(scales) = target.scales else { return Ok(()) };
    let n = target.params;
    let out = w.at(file.at(scales), n * 4)?;
    for (out, scale) in out.as_chunks_mut::<4>().0.iter_mut().zip(&params.scales) {
        *out = scale.to_le_bytes();
    }
    match target.zeros {
        Zeros::None | Zeros::Private => {}
        Zeros::F32(place) => {
            let out = w.at(file.at(place), n * 4)?;
            for (out, zero) in out.as_chunks_mut::<4>().0.iter_mut().zip(&params.zero_points) {
                *out = (*zero as f32).to_le_bytes();
            }
        }
        // Both keep the low byte of a zero point inside their own range.
        Zeros::I8(place) | Zeros::U8(place) => {
            let out = w.at(file.at(place), n)?;
            for (out, zero) in out.iter_mut().zip(&params.zero_points) {
                *out = *zero as u8;
            }
        }
    }
    Ok(())
}

/// Parameters that are not in the result yet: given ones, those of a second pass, those of no values.
fn private_params(job: &Job, item: usize, target: &ValuesTarget, empty: bool) -> Option<Params> {
    let given = job.plan.values(item).and_then(|(values, ..)| values.params.as_ref());
    if let Some(given) = given {
        // Identity is what the parameters are, whatever the client called them.
        return Some(with_id(given.scales.clone(), given.zero_points.clone()));
    }
    match job.items.get(item)?.known.get() {
        Some(Known::Own { scales, zeros, .. }) => Some(with_id(scales.clone(), zeros.clone())),
        _ if empty => {
            let n = target.params as usize;
            Some(with_id(vec![1.0; n], vec![0; n]))
        }
        _ => None,
    }
}

/// Joins the input's nulls with the rows that the policy dropped, for all parts of a column; gives the number of the
/// latter.
fn validity(
    w: &mut Writer<'_>,
    job: &Job,
    column: &Column,
    rows: u64,
    announced: u64,
) -> Result<u64, Failure> {
    let file = job.plan.file();
    let state = &job.items[column.item];
    let buffers: Vec<_> = column.nullable.iter().filter_map(|n| file.node(*n).0).collect();
    let Some((first, others)) = buffers.split_first() else { return Ok(0) };
    if file.buffer(*first).1 == 0 {
        return Ok(0);
    }
    let (mut nulls_in, mut nulls) = (0u64, 0u64);
    let whole = rows / 8;
    for (i, byte) in w.buffer(*first)?.iter_mut().enumerate() {
        let mask = if i as u64 == whole { (1u8 << (rows % 8)) - 1 } else { 0xff };
        let given = if announced > 0 { *byte & mask } else { mask };
        *byte = given & !state.nulled_byte(i);
        nulls_in += u64::from(mask.count_ones() - given.count_ones());
        nulls += u64::from(mask.count_ones() - byte.count_ones());
    }
    if nulls_in != announced {
        let name = &job.plan.descriptor().items[column.item].name;
        let what = format!("its validity has {nulls_in} nulls, {announced} were announced");
        return Err(refuse(ErrorCode::InvalidInput, name, &what));
    }
    for other in others {
        w.copy(*first, *other)?;
    }
    for node in &column.nullable {
        w.nulls_in(*node, nulls);
    }
    Ok(nulls - nulls_in)
}
