//! The options dict of `shmquant._options` as the client's options.

use std::str::FromStr;

use pyo3::prelude::*;
use shmquant_kernels::{Granularity, Mapping, OnNonFinite, Scheme};
use shmquant_protocol::table::{Override, OverrideSpec, Pattern, TableOptions};

use crate::error::{Kind, input, invalid};
use crate::params::Params;

/// `_options.SourceOptions`: every key is present.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct SourceOptions<'py> {
    scheme: String,
    columns: Option<Vec<String>>,
    granularity: Option<String>,
    group_size: Option<u32>,
    mapping: Option<String>,
    params: Option<Bound<'py, Params>>,
    overrides: Vec<(String, Option<SpecOptions>)>,
    on_nonfinite: String,
    nulls: String,
    continue_on_error: bool,
    metrics: bool,
    named: bool,
    keep: Option<Vec<String>>,
    layers: Option<bool>,
    part_of_stream: bool,
}

/// What one override changes.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct SpecOptions {
    scheme: Option<String>,
    mapping: Option<String>,
    granularity: Option<String>,
    group_size: Option<u32>,
    on_nonfinite: Option<String>,
}

impl SourceOptions<'_> {
    pub(crate) fn table_options(self, py: Python<'_>) -> PyResult<TableOptions> {
        let nulls_as_zero = match self.nulls.as_str() {
            "error" => false,
            "zero" => true,
            other => {
                let text = format!("nulls {other:?} is not known\nhint: it is one of error, zero");
                return Err(invalid(py, text));
            }
        };
        let overrides = self.overrides.into_iter().map(|(pattern, action)| {
            let pattern = Pattern::parse(&pattern).map_err(|error| input(py, &error))?;
            let action = action.map(|spec| spec.parse(py)).transpose()?;
            Ok(Override { pattern, action })
        });
        Ok(TableOptions {
            scheme: word(py, &self.scheme)?,
            mapping: some_word::<Mapping>(py, self.mapping.as_deref())?,
            granularity: some_word::<Granularity>(py, self.granularity.as_deref())?,
            group_size: self.group_size,
            packed: None,
            on_nonfinite: word::<OnNonFinite>(py, &self.on_nonfinite)?,
            nulls_as_zero,
            metrics: self.metrics,
            continue_on_error: self.continue_on_error,
            columns: self.columns,
            named: self.named,
            keep: self.keep,
            overrides: overrides.collect::<PyResult<_>>()?,
            params: self.params.map(|params| params.get().params().clone()),
            layers: self.layers,
            part_of_stream: self.part_of_stream,
        })
    }
}

impl SpecOptions {
    fn parse(self, py: Python<'_>) -> PyResult<OverrideSpec> {
        Ok(OverrideSpec {
            scheme: some_word::<Scheme>(py, self.scheme.as_deref())?,
            mapping: some_word(py, self.mapping.as_deref())?,
            granularity: some_word(py, self.granularity.as_deref())?,
            group_size: self.group_size,
            packed: None,
            on_nonfinite: some_word(py, self.on_nonfinite.as_deref())?,
        })
    }
}

/// One of an option's words; the error names them all.
pub(crate) fn word<T: FromStr<Err: std::fmt::Display>>(py: Python<'_>, text: &str) -> PyResult<T> {
    text.parse().map_err(|error: T::Err| Kind::InvalidInput.raise(py, &error.to_string()))
}

fn some_word<T: FromStr<Err: std::fmt::Display>>(py: Python<'_>, text: Option<&str>) -> PyResult<Option<T>> {
    text.map(|text| word(py, text)).transpose()
}
