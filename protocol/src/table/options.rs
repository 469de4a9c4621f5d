//! What the caller asks for; [`super::Table`] turns it into specs with nothing left open.

use regex::Regex;
use shmquant_kernels::{Granularity, Mapping, OnNonFinite, Scheme};

use super::error::InputError;
use crate::fit::TableParams;

/// How a table is to be quantized. What is `None` takes the default of its kind of column.
#[derive(Debug, Clone)]
pub struct TableOptions {
    /// Number format.
    pub scheme: Scheme,
    /// Symmetric or asymmetric; by default the scheme's own.
    pub mapping: Option<Mapping>,
    /// Over what a range is taken; by default `row` for vectors and for layers of 8 bits, `group` for layers of fewer,
    /// `tensor` for plain columns.
    pub granularity: Option<Granularity>,
    /// Elements of a group, by default 128; asks for granularity `group` if none is named.
    pub group_size: Option<u32>,
    /// Several codes a byte; by default wherever codes have fewer than 8 bits.
    pub packed: Option<bool>,
    /// What NaN and infinities do.
    pub on_nonfinite: OnNonFinite,
    /// A null inside a vector or layer counts as 0 instead of being an error.
    pub nulls_as_zero: bool,
    /// Measure what was lost.
    pub metrics: bool,
    /// Layers: a faulty layer becomes a null row with an error text, the others go on.
    pub continue_on_error: bool,
    /// Columns to quantize; by default every column of float vectors.
    pub columns: Option<Vec<String>>,
    /// The result gets a name: the other columns are copied into it.
    pub named: bool,
    /// The other columns that the result keeps; by default all.
    pub keep: Option<Vec<String>>,
    /// What is different for some layers or columns: an exact name wins over the first pattern that fits.
    pub overrides: Vec<Override>,
    /// Ranges found before; they bring their scheme, mapping and granularity along.
    pub params: Option<TableParams>,
    /// Whether this must be a layers table (or must not); by default the columns decide.
    pub layers: Option<bool>,
    /// The table is one of several that belong together: ranges that span rows must then be given in `params`, and an
    /// override may name a layer of another part.
    pub part_of_stream: bool,
}

impl Default for TableOptions {
    fn default() -> Self {
        Self {
            scheme: Scheme::Int8,
            mapping: None,
            granularity: None,
            group_size: None,
            packed: None,
            on_nonfinite: OnNonFinite::Error,
            nulls_as_zero: false,
            metrics: false,
            continue_on_error: false,
            columns: None,
            named: false,
            keep: None,
            overrides: Vec::new(),
            params: None,
            layers: None,
            part_of_stream: false,
        }
    }
}

/// Another treatment for the layers or columns that a pattern names.
#[derive(Debug, Clone)]
pub struct Override {
    /// Which.
    pub pattern: Pattern,
    /// How; `None` leaves them as they are.
    pub action: Option<OverrideSpec>,
}

/// Names of layers or columns.
#[derive(Debug, Clone)]
pub enum Pattern {
    /// This one.
    Exact(String),
    /// All that match.
    Regex(Regex),
}

impl Pattern {
    /// `re:` begins a regular expression that must match from the name's start; `*` and `?` make a pattern of whole
    /// names; anything else is a name.
    pub fn parse(text: &str) -> Result<Self, InputError> {
        let source = if let Some(expression) = text.strip_prefix("re:") {
            format!("^(?:{expression})")
        } else if text.contains(['*', '?']) {
            let escaped = regex::escape(text).replace(r"\*", ".*").replace(r"\?", ".");
            format!("(?s)^{escaped}$")
        } else {
            return Ok(Self::Exact(text.to_owned()));
        };
        Regex::new(&source).map(Self::Regex).map_err(|e| {
            let reason = e.to_string();
            let reason = reason.lines().last().unwrap_or_default().trim().to_owned();
            let details =
                InputError::argument("overrides", format!("override {text:?} is no pattern: {reason}"));
            let details =
                details.value(text).hint("a name without \"re:\", \"*\" and \"?\" is taken literally");
            InputError::Argument(Box::new(details))
        })
    }
}

/// What an override changes. With a `scheme` it begins from that scheme's defaults, without one from the table's options.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OverrideSpec {
    /// Number format.
    pub scheme: Option<Scheme>,
    /// Symmetric or asymmetric.
    pub mapping: Option<Mapping>,
    /// Over what a range is taken.
    pub granularity: Option<Granularity>,
    /// Elements of a group.
    pub group_size: Option<u32>,
    /// Several codes a byte.
    pub packed: Option<bool>,
    /// What NaN and infinities do.
    pub on_nonfinite: Option<OnNonFinite>,
}
