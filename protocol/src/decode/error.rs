//! Why a result does not decode.

use thiserror::Error;

use crate::table::Details;

/// Why codes could not be turned back into values.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// What was asked for: a type that Arrow lacks.
    #[error("{0}")]
    Argument(Box<Details>),
    /// No such column or layer, or nothing that decodes.
    #[error("{0}")]
    NotFound(Box<Details>),
    /// A column without its metadata or its parameters, or of another type than a result has.
    #[error("{0}")]
    Column(Box<Details>),
    /// A value that does not fit the others of its row.
    #[error("{0}")]
    Value(Box<Details>),
    /// Rows that were quantized with other parameters than those at hand.
    #[error("{0}")]
    Mixed(Box<Details>),
}

impl DecodeError {
    /// What is wrong and where.
    pub fn details(&self) -> &Details {
        match self {
            Self::Argument(d) | Self::NotFound(d) | Self::Column(d) | Self::Value(d) | Self::Mixed(d) => d,
        }
    }

    pub(super) fn column(column: &str, what: impl Into<String>) -> Self {
        Self::Column(Box::new(Details::new(what).in_column(column)))
    }

    pub(super) fn layer(layer: &str, row: usize, what: &str) -> Self {
        let details = Details { layer: Some(layer.to_owned()), row: Some(row as u64), ..Details::default() };
        Self::Value(Box::new(Details { what: format!("Layer '{layer}' (row {row}): {what}"), ..details }))
    }
}

impl From<Details> for DecodeError {
    fn from(details: Details) -> Self {
        Self::Value(Box::new(details))
    }
}
