//! The end of a job: faults decided, parameters and validity written, the file made whole, the report.

use std::collections::HashMap;

use shmquant_protocol::descriptor::{Params, TableKind};
use shmquant_protocol::message::Failure;

use super::access::Whole;
use super::outcome::{Outcome, fold, report};
use super::writer::Writer;
use super::{Job, columns, fault, layers, validate};
use crate::plan::Table;

/// A finished result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complete {
    /// Bytes of the file, from the extent's start.
    pub length: u64,
    /// The report of PROTOCOL.md section 7: 80 bytes for each layer, vector and plain column.
    pub report: Vec<u8>,
}

/// See [`Job::complete`].
pub(super) fn complete(job: &Job, whole: Whole<'_>) -> Result<Complete, Failure> {
    let plan = &*job.plan;
    let descriptor = plan.descriptor();
    let tolerant = descriptor.continue_on_error && descriptor.table != TableKind::Columns;
    let mut outcomes: Vec<Outcome> = Vec::with_capacity(descriptor.items.len());
    let mut faulty = None;
    for (index, item) in descriptor.items.iter().enumerate() {
        let outcome = match plan.values(index) {
            Some((values, spec, _)) => {
                let outcome = fold(job, index, values, spec)?;
                if let (false, None, Some((fault, count))) = (tolerant, &faulty, &outcome.fault) {
                    faulty = Some(fault::failure(index, item, values, fault, *count));
                }
                outcome
            }
            None => Outcome::default(),
        };
        outcomes.push(outcome);
    }
    // When all have been looked at: a client that breaks the rules is told that first.
    if let Some(failure) = faulty {
        return Err(failure);
    }
    let mut writer = Writer::new(plan, whole);
    let mut embedded: HashMap<usize, Params> = HashMap::new();
    match plan.table() {
        Table::Layers(batches) => {
            for batch in batches {
                layers::write(&mut writer, job, batch, &outcomes)?;
            }
        }
        Table::Columns(quantized) => {
            for column in quantized {
                columns::write(&mut writer, job, column, &mut outcomes[column.item], &mut embedded)?;
            }
        }
    }
    if embedded.is_empty() {
        writer.finish(plan.fixed_schema_texts())?;
    } else {
        let none = Params { id: 0, scales: Vec::new(), zero_points: Vec::new() };
        let schema = plan.schema(&|item| embedded.get(&item).unwrap_or(&none).clone());
        writer.finish(&plan.schema_texts(&schema))?;
    }
    validate::kept_columns(job)?;
    let mut text = Vec::new();
    for (index, outcome) in outcomes.iter().enumerate() {
        if plan.values(index).is_some() {
            report(&mut text, outcome, descriptor.metrics);
        }
    }
    Ok(Complete { length: plan.result_bytes(), report: text })
}
