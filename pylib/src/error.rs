//! The one place where errors become Python exceptions.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use shmquant_protocol::client::ClientError;
use shmquant_protocol::decode::DecodeError;
use shmquant_protocol::files::FileError;
use shmquant_protocol::message::{ErrorCode, Failure};
use shmquant_protocol::table::{Details, InputError};

/// The exceptions of `shmquant._errors`.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Base,
    InvalidInput,
    NoRoom,
    Daemon,
    Deadline,
    NotFound,
    NameExists,
    ResultGone,
}

impl Kind {
    fn class(self, py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
        static CLASSES: [PyOnceLock<Py<PyType>>; 8] = [const { PyOnceLock::new() }; 8];
        const NAMES: [&str; 8] = [
            "ShmQuantError",
            "InvalidInputError",
            "NoRoomError",
            "DaemonError",
            "DeadlineError",
            "NotFoundError",
            "NameExistsError",
            "ResultGoneError",
        ];
        CLASSES[self as usize].import(py, "shmquant._errors", NAMES[self as usize])
    }

    fn of(code: ErrorCode) -> Self {
        match code {
            ErrorCode::InvalidInput | ErrorCode::Unsupported => Self::InvalidInput,
            ErrorCode::NoRoom | ErrorCode::Limit => Self::NoRoom,
            ErrorCode::Deadline => Self::Deadline,
            ErrorCode::NotFound => Self::NotFound,
            ErrorCode::NameExists => Self::NameExists,
            ErrorCode::Gone => Self::ResultGone,
            ErrorCode::Cancelled => Self::Base,
            _ => Self::Daemon,
        }
    }

    /// An exception with this text, which ends in its hint if it has one.
    pub(crate) fn raise(self, py: Python<'_>, text: &str) -> PyErr {
        let made = || {
            let error = self.class(py)?.call1((text,))?;
            if let Some((_, hint)) = text.split_once("\nhint: ") {
                error.setattr("hint", hint)?;
            }
            Ok(error)
        };
        match made() {
            Ok(error) => PyErr::from_value(error),
            // The package is not there (a daemon's process), or out of memory.
            Err(error) => error,
        }
    }
}

pub(crate) fn client(py: Python<'_>, error: ClientError) -> PyErr {
    let text = error.to_string();
    let kind = match &error {
        ClientError::Refused(failure) => return refused(py, failure, &text),
        other => match other.code() {
            Some(code) => Kind::of(code),
            None => Kind::Daemon,
        },
    };
    kind.raise(py, &text)
}

fn refused(py: Python<'_>, failure: &Failure, text: &str) -> PyErr {
    let error = Kind::of(failure.code).raise(py, text);
    if failure.column.is_empty() {
        return error;
    }
    let value = error.value(py);
    let facts = || -> PyResult<()> {
        value.setattr("column", &failure.column)?;
        value.setattr("row", failure.row)?;
        value.setattr("index", failure.index)?;
        value.setattr("count", failure.count)?;
        value.setattr("value", failure.value)
    };
    match facts() {
        Ok(()) => error,
        Err(other) => other,
    }
}

pub(crate) fn input(py: Python<'_>, error: &InputError) -> PyErr {
    detailed(py, Kind::InvalidInput, &error.to_string(), error.details())
}

pub(crate) fn decode(py: Python<'_>, error: &DecodeError) -> PyErr {
    let kind = match error {
        DecodeError::NotFound(_) => Kind::NotFound,
        _ => Kind::InvalidInput,
    };
    detailed(py, kind, &error.to_string(), error.details())
}

fn detailed(py: Python<'_>, kind: Kind, text: &str, details: &Details) -> PyErr {
    let raised = kind.raise(py, text);
    let value = raised.value(py);
    let facts = || -> PyResult<()> {
        value.setattr("column", details.layer.as_ref().or(details.column.as_ref()))?;
        value.setattr("row", details.row)?;
        value.setattr("index", details.index)
    };
    match facts() {
        Ok(()) => raised,
        Err(other) => other,
    }
}

pub(crate) fn invalid(py: Python<'_>, text: impl std::fmt::Display) -> PyErr {
    Kind::InvalidInput.raise(py, &text.to_string())
}

pub(crate) fn file(py: Python<'_>, error: &FileError) -> PyErr {
    invalid(py, error)
}
