//! What a layers table needs when its chunks have ended: everything but codes and parameters.

use shmquant_kernels::Granularity;
use shmquant_protocol::descriptor::{Body, Spec, Values};
use shmquant_protocol::message::Failure;

use super::Job;
use super::columns::put_params;
use super::fault;
use super::outcome::{Outcome, numbers};
use super::writer::Writer;
use crate::plan::{
    Batch, Binary, FLOAT_METRICS, List, Place, ValuesTarget, Words, Zeros, axes, bit_width, error_cap, words,
};

/// One row of the batch.
struct Row<'a> {
    index: usize,
    name: &'a str,
    values: &'a Values,
    spec: &'a Spec,
    target: &'a ValuesTarget,
    outcome: &'a Outcome,
    words: [&'static str; 3],
}

impl Row<'_> {
    /// The data is null: there was none, or a fault or the policy took it away.
    fn is_null(&self) -> bool {
        self.values.null || self.outcome.nulled > 0
    }

    /// Its length along each axis.
    fn shape(&self) -> impl Iterator<Item = i64> + '_ {
        let flat = self.values.shape.is_empty().then_some(self.values.elements() as i64);
        self.values.shape.iter().copied().chain(flat).take(axes(self.values))
    }

    fn has_metrics(&self, asked: bool) -> bool {
        asked && self.spec.affine.is_some() && !self.is_null()
    }

    /// 0: the whole row, -1: the whole layer, -2: each position along the last axis.
    fn group_size(&self) -> i32 {
        match self.spec.granularity {
            _ if self.spec.affine.is_none() => 0,
            Granularity::Tensor => -1,
            Granularity::Row => 0,
            Granularity::Dimension => -2,
            Granularity::Group => i32::try_from(self.spec.group_size).unwrap_or(i32::MAX),
        }
    }
}

/// Writes one batch.
pub(super) fn write(
    w: &mut Writer<'_>,
    job: &Job,
    batch: &Batch,
    outcomes: &[Outcome],
) -> Result<(), Failure> {
    let plan = &*job.plan;
    let descriptor = plan.descriptor();
    let rows: Vec<Row<'_>> = batch
        .rows
        .clone()
        .filter_map(|index| {
            let (values, spec, target) = plan.values(index)?;
            let item = descriptor.items.get(index)?;
            let words = words(values, spec);
            Some(Row { index, name: &item.name, values, spec, target, outcome: outcomes.get(index)?, words })
        })
        .collect();
    for row in &rows {
        params_and_codes(w, job, row)?;
    }
    let valid = || rows.iter().map(|r| !r.is_null());

    strings(w, &batch.name, rows.iter().map(|r| r.name))?;
    w.validity(batch.data.node, valid())?;
    w.offsets(batch.data.offsets, batch.data.large, rows.iter().map(|r| r.target.code_bytes))?;
    lengths(w, &batch.scales, valid(), rows.iter().map(|r| r.target.params))?;
    let zeros = |r: &Row<'_>| zeros_place(r.target).map_or(0, |_| r.target.params);
    lengths(w, &batch.zeros, valid(), rows.iter().map(zeros))?;
    let shaped = rows.iter().map(|r| !(r.values.null && r.values.shape.is_empty()));
    lengths(w, &batch.shape, shaped, rows.iter().map(|r| axes(r.values) as u64))?;
    w.fill(batch.shape.data, rows.iter().flat_map(|r| r.shape()).map(i64::to_le_bytes))?;
    w.fill(batch.bit_width, rows.iter().map(|r| [bit_width(r.spec, r.values.dtype)]))?;
    let dictionaries = match plan.words() {
        Some(words) => words,
        None => return Err(fault::internal("a layers table without dictionaries")),
    };
    for (column, id) in [batch.scheme, batch.src_dtype, batch.packing].into_iter().enumerate() {
        let known = &dictionaries[column].words;
        let index = |r: &Row<'_>| known.iter().position(|w| *w == r.words[column]).unwrap_or(0) as u8;
        w.fill(id, rows.iter().map(|r| [index(r)]))?;
    }
    w.fill(batch.group_size, rows.iter().map(|r| r.group_size().to_le_bytes()))?;
    w.fill(batch.axis, rows.iter().map(|r| [axes(r.values).saturating_sub(1) as u8]))?;
    metrics(w, batch, &rows, descriptor.metrics)?;
    errors(w, job, &batch.error, &rows)?;
    for words in &batch.words {
        dictionary(w, words)?;
    }
    Ok(())
}

/// Given parameters go to their place; what a null row has left behind goes away.
fn params_and_codes(w: &mut Writer<'_>, job: &Job, row: &Row<'_>) -> Result<(), Failure> {
    let file = job.plan.file();
    let target = row.target;
    if row.is_null() {
        w.at(file.at(target.codes), target.code_bytes)?.fill(0);
        let bytes = target.params * 4;
        for place in target.scales.into_iter().chain(zeros_place(target)) {
            w.at(file.at(place), bytes)?.fill(0);
        }
        return Ok(());
    }
    match &row.values.params {
        Some(params) if target.params > 0 => put_params(w, job, target, params),
        _ => Ok(()),
    }
}

fn zeros_place(target: &ValuesTarget) -> Option<Place> {
    match target.zeros {
        Zeros::F32(place) => Some(place),
        _ => None,
    }
}

fn strings<'a>(
    w: &mut Writer<'_>,
    column: &Binary,
    texts: impl Iterator<Item = &'a str> + Clone,
) -> Result<(), Failure> {
    w.offsets(column.offsets, column.large, texts.clone().map(|t| t.len() as u64))?;
    w.fill(column.data, texts.flat_map(str::bytes).map(|b| [b]))
}

fn lengths(
    w: &mut Writer<'_>,
    list: &List,
    valid: impl Iterator<Item = bool>,
    lengths: impl Iterator<Item = u64>,
) -> Result<(), Failure> {
    w.validity(list.node, valid)?;
    w.offsets(list.offsets, list.large, lengths)
}

fn metrics(w: &mut Writer<'_>, batch: &Batch, rows: &[Row<'_>], asked: bool) -> Result<(), Failure> {
    w.validity(batch.metrics, rows.iter().map(|r| r.has_metrics(asked)))?;
    for (i, (node, data)) in batch.numbers.iter().enumerate() {
        if i < FLOAT_METRICS {
            let number = |r: &Row<'_>| if r.has_metrics(asked) { numbers(r.outcome)[i] } else { f64::NAN };
            w.validity(*node, rows.iter().map(|r| !number(r).is_nan()))?;
            let or_zero = |x: f64| if x.is_nan() { 0.0 } else { x };
            w.fill(*data, rows.iter().map(|r| or_zero(number(r)).to_le_bytes()))?;
        } else {
            let count = |r: &Row<'_>| match (r.has_metrics(asked), i == FLOAT_METRICS) {
                (false, _) => 0,
                (true, true) => r.outcome.counters.n_clipped,
                (true, false) => r.outcome.counters.n_degenerate_groups,
            };
            w.fill(*data, rows.iter().map(|r| count(r).to_le_bytes()))?;
        }
    }
    Ok(())
}

fn errors(w: &mut Writer<'_>, job: &Job, column: &Binary, rows: &[Row<'_>]) -> Result<(), Failure> {
    let descriptor = job.plan.descriptor();
    let texts: Vec<Option<String>> = rows
        .iter()
        .map(|r| {
            let (fault, count) = r.outcome.fault.as_ref()?;
            let item = descriptor.items.get(r.index)?;
            debug_assert!(matches!(item.body, Body::Values(_)));
            let mut text = fault::failure(r.index, item, r.values, fault, *count).message;
            while text.len() > error_cap(descriptor, r.name) {
                text.pop();
            }
            Some(text)
        })
        .collect();
    w.validity(column.node, texts.iter().map(Option::is_some))?;
    let text = |t: &'_ Option<String>| t.as_ref().map_or(0, |t| t.len() as u64);
    w.offsets(column.offsets, column.large, texts.iter().map(text))?;
    w.fill(column.data, texts.iter().flatten().flat_map(|t| t.bytes()).map(|b| [b]))
}

fn dictionary(w: &mut Writer<'_>, words: &Words) -> Result<(), Failure> {
    w.offsets(words.offsets, false, words.words.iter().map(|t| t.len() as u64))?;
    w.fill(words.data, words.words.iter().flat_map(|t| t.bytes()).map(|b| [b]))
}
