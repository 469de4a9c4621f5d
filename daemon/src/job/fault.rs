//! What a fault in the data is called when the caller hears of it.

use shmquant_kernels::Fault;
use shmquant_protocol::descriptor::{Item, Role, Values};
use shmquant_protocol::message::{ErrorCode, Failure};

/// The reply to a fault of an item; `count` is that of all its chunks.
pub(super) fn failure(index: usize, item: &Item, values: &Values, fault: &Fault, count: u64) -> Failure {
    let k = values.k.max(1);
    let place = |flat: u64| match values.role {
        Role::Layer => (index as u64, flat),
        Role::Vector | Role::Plain => (flat / k, flat % k),
    };
    let name = |row: u64| match values.role {
        Role::Layer => format!("Layer '{}'", item.name),
        Role::Vector | Role::Plain => format!("column '{}' row {row}", item.name),
    };
    let (message, hint, (row, index), value) = match fault {
        Fault::NonFinite { index, value, .. } => {
            let (row, at) = place(*index);
            let message = format!(
                "{} contains NaN or Inf at index {at} ({count} in all, the first is {value})",
                name(row)
            );
            let hint = "on_nonfinite=\"null\" drops the row, \"saturate\" clips it";
            (message, hint, (row, at), f64::from(*value))
        }
        Fault::Overflow { index, value } => {
            let (row, at) = place(*index);
            let message = format!("{} has {value:e} at index {at}, which does not fit float32", name(row));
            (message, "scale the values down before they are quantized", (row, at), *value)
        }
        Fault::RangeOverflow { index, min, max } => {
            let (row, at) = place(*index);
            let message =
                format!("{}: the range [{min:e}, {max:e}] from index {at} on overflows float32", name(row));
            let hint = "a symmetric scheme (int8, int4, int2) needs no range, or scale the values down";
            (message, hint, (row, at), f64::from(*max))
        }
        other => return Failure::new(ErrorCode::Internal, format!("'{}': {other}", item.name), ""),
    };
    let mut failure = Failure::new(ErrorCode::InvalidInput, message, hint);
    (failure.row, failure.index, failure.count, failure.value) = (row, index, count, value);
    failure.column = item.name.clone();
    failure
}

/// A fault of our own.
pub(super) fn internal(what: impl Into<String>) -> Failure {
    Failure::new(ErrorCode::Internal, what, "this is a bug in the daemon, not in the data")
}
