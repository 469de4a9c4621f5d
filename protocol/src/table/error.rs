//! What is wrong with a table, or with what was asked to be done with it.

use std::fmt;

use thiserror::Error;

/// Why a table cannot be quantized; always the caller's to mend.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InputError {
    /// An option, or two that exclude each other.
    #[error("{0}")]
    Argument(Box<Details>),
    /// A column: missing, of the wrong type, or in the way of a result's column.
    #[error("{0}")]
    Column(Box<Details>),
    /// A value inside a column or layer.
    #[error("{0}")]
    Value(Box<Details>),
}

impl InputError {
    /// What is wrong and where.
    pub fn details(&self) -> &Details {
        match self {
            Self::Argument(d) | Self::Column(d) | Self::Value(d) => d,
        }
    }

    pub(crate) fn argument(argument: &'static str, what: impl Into<String>) -> Details {
        Details { argument: Some(argument), ..Details::new(what) }
    }

    pub(crate) fn column(column: &str, what: impl Into<String>) -> Details {
        Details { column: Some(column.to_owned()), ..Details::new(what) }
    }

    pub(crate) fn layer(layer: &str, row: usize, what: impl Into<String>) -> Details {
        Details { layer: Some(layer.to_owned()), row: Some(row as u64), ..Details::new(what) }
    }
}

/// The place of a fault, as far as it has one, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Details {
    /// One sentence: what, and which value.
    pub what: String,
    /// The option's name.
    pub argument: Option<&'static str>,
    /// The column's name.
    pub column: Option<String>,
    /// The layer's name.
    pub layer: Option<String>,
    /// Row of the table, counted over all its chunks.
    pub row: Option<u64>,
    /// Element of the row or layer.
    pub index: Option<u64>,
    /// The value found.
    pub value: Option<String>,
    /// What to do.
    pub hint: Option<String>,
}

impl Details {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), ..Self::default() }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn value(mut self, value: impl ToString) -> Self {
        self.value = Some(value.to_string());
        self
    }

    pub(crate) fn in_column(mut self, column: &str) -> Self {
        self.column = Some(column.to_owned());
        self
    }

    pub(crate) fn at(mut self, row: usize, index: Option<usize>) -> Self {
        self.row = Some(row as u64);
        self.index = index.map(|i| i as u64);
        self
    }
}

impl fmt::Display for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}
