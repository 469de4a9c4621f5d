//! What all chunks of an item found, folded in their order.

use shmquant_kernels::{Counters, Fault, OnNonFinite, Sums};
use shmquant_protocol::chunks::Action;
use shmquant_protocol::descriptor::{Role, Spec, Values};
use shmquant_protocol::message::{ErrorCode, Failure};

use super::fault::internal;
use super::item::Known;
use super::{Job, Stopped};

/// One item's numbers.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    pub(super) counters: Counters,
    pub(super) sums: Sums,
    /// The first fault, and how many values of its kind there are.
    pub(super) fault: Option<(Fault, u64)>,
    /// Rows, values or the layer that the policy or a fault turned into null.
    pub(super) nulled: u64,
}

/// Folds the chunks of one item.
pub(super) fn fold(job: &Job, item: usize, values: &Values, spec: &Spec) -> Result<Outcome, Failure> {
    let state = &job.items[item];
    let chunks = &job.plan.chunks().chunks;
    let mut out = Outcome::default();
    let mut kind = None;
    for index in state.chunks.clone() {
        let action = chunks[index].action;
        match job.slots[index].found.get() {
            None => return Err(internal(format!("chunk {index} has not run"))),
            Some(Err(Stopped::Broken(what))) => return Err(internal(format!("chunk {index}: {what}"))),
            Some(Err(Stopped::Violation(what))) => {
                return Err(Failure::new(ErrorCode::Protocol, format!("chunk {index}: {what}"), ""));
            }
            Some(Err(Stopped::Fault(fault))) => {
                let first = *kind.get_or_insert(action);
                let (_, count) = out.fault.get_or_insert((fault.clone(), 0));
                // A second pass over the same values would find them again.
                if let (true, Fault::NonFinite { count: n, .. }) = (first == action, fault) {
                    *count += n;
                }
            }
            Some(Ok(found)) => {
                out.counters.add(found.counters);
                out.sums.add(found.sums);
            }
        }
        if action == Action::Scan && index + 1 == state.barrier && out.fault.is_none() {
            match state.known.get() {
                Some(Known::Fault(fault)) => out.fault = Some((fault.clone(), 1)),
                Some(Known::Broken) => return Err(internal("parameters lie outside the result")),
                _ => {}
            }
        }
    }
    if let Some((_, count)) = &mut out.fault {
        *count = (*count).max(1);
    }
    if let Some(Known::Own { degenerate, .. } | Known::InPlace { degenerate }) = state.known.get() {
        out.counters.n_degenerate_groups += degenerate;
    }
    if values.role == Role::Layer {
        let dropped = spec.on_nonfinite == OnNonFinite::Null && out.counters.n_nonfinite > 0;
        if spec.affine.is_none() {
            out.counters.n = values.elements();
        }
        if dropped || out.fault.is_some() {
            let (n, n_nonfinite) = (values.elements(), out.counters.n_nonfinite);
            out.counters = Counters { n, n_nonfinite, ..Counters::default() };
            out.sums = Sums::default();
            out.nulled = 1;
        }
        if let Some((Fault::NonFinite { .. }, count)) = &out.fault {
            out.counters.n_nonfinite = *count;
        }
    }
    Ok(out)
}

/// Appends an item's 80 bytes of the report.
pub(super) fn report(out: &mut Vec<u8>, outcome: &Outcome, metrics: bool) {
    let c = &outcome.counters;
    for n in [c.n, c.n_clipped, c.n_nonfinite, c.n_degenerate_groups, outcome.nulled] {
        out.extend_from_slice(&n.to_le_bytes());
    }
    for number in numbers(outcome) {
        out.extend_from_slice(&if metrics { number } else { f64::NAN }.to_le_bytes());
    }
    out.extend_from_slice(&[0; 8]);
}

/// The four error metrics.
pub(super) fn numbers(outcome: &Outcome) -> [f64; 4] {
    let s = &outcome.sums;
    [s.mse(), s.sqnr_db(), s.max_abs_err(), s.cosine()]
}
