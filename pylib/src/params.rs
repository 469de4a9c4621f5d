//! Ranges that many tables share.

use arrow_pyarrow::{PyArrowType, Table as PyArrowTable};
use pyo3::prelude::*;
use shmquant_kernels::{Affine, Granularity, Mapping, Scheme};
use shmquant_protocol::fit::TableParams;

use crate::error::{self, invalid};
use crate::options::{SourceOptions, word};
use crate::tensor::{GivenLayer, given_layers};

/// Scales and zero points by column or layer.
#[pyclass(frozen, module = "shmquant._native")]
pub(crate) struct Params {
    params: TableParams,
}

impl Params {
    pub(crate) fn params(&self) -> &TableParams {
        &self.params
    }
}

#[pymethods]
impl Params {
    /// Smallest and largest values of Arrow data with `__arrow_c_stream__`.
    #[staticmethod]
    fn fit(py: Python<'_>, table: PyArrowType<PyArrowTable>, options: SourceOptions<'_>) -> PyResult<Self> {
        let options = options.table_options(py)?;
        let (batches, schema) = table.0.into_inner();
        let params = py.detach(|| TableParams::fit(schema, batches, &options));
        Ok(Self { params: params.map_err(|e| error::input(py, &e))? })
    }

    /// Smallest and largest values of layers by (name, contiguous bytes, type of the values, shape).
    #[staticmethod]
    fn fit_layers(py: Python<'_>, layers: Vec<GivenLayer<'_>>, options: SourceOptions<'_>) -> PyResult<Self> {
        let options = options.table_options(py)?;
        let layers = given_layers(py, layers)?;
        let params = py.detach(|| TableParams::fit_layers(layers, &options));
        Ok(Self { params: params.map_err(|e| error::input(py, &e))? })
    }

    /// Params known by (name, scales, zero points).
    #[staticmethod]
    fn from_scales(
        py: Python<'_>,
        scheme: &str,
        mapping: &str,
        granularity: &str,
        entries: Vec<(String, Vec<f32>, Vec<i32>)>,
    ) -> PyResult<Self> {
        let scheme = word::<Scheme>(py, scheme)?;
        let mapping = word::<Mapping>(py, mapping)?;
        let affine = Affine::new(scheme, Some(mapping)).map_err(|e| invalid(py, e))?;
        let params = TableParams::from_scales(affine, word::<Granularity>(py, granularity)?, entries);
        Ok(Self { params: params.map_err(|e| error::input(py, &e))? })
    }

    /// Reads the text of `to_json`.
    #[staticmethod]
    fn from_json(py: Python<'_>, text: &str) -> PyResult<Self> {
        Ok(Self { params: TableParams::from_json(text).map_err(|e| error::input(py, &e))? })
    }

    /// JSON text that loses nothing.
    fn to_json(&self) -> String {
        self.params.to_json()
    }

    /// The ranges of both.
    fn merge(&self, py: Python<'_>, other: Bound<'_, Self>) -> PyResult<Self> {
        let merged = self.params.merge(&other.get().params);
        Ok(Self { params: merged.map_err(|e| error::input(py, &e))? })
    }

    /// The scheme's word.
    #[getter]
    fn scheme(&self) -> &'static str {
        self.params.scheme().name()
    }

    /// The mapping's word.
    #[getter]
    fn mapping(&self) -> &'static str {
        self.params.mapping().name()
    }

    /// The granularity's word.
    #[getter]
    fn granularity(&self) -> &'static str {
        self.params.granularity().name()
    }

    /// Columns or layers.
    #[getter]
    fn names(&self) -> Vec<&str> {
        self.params.names().collect()
    }

    /// Scales and zero points of one column or layer, None if it has none.
    fn get(&self, name: &str) -> Option<(Vec<f32>, Vec<i32>)> {
        self.params.get(name).map(|found| (found.scales.clone(), found.zero_points.clone()))
    }
}
