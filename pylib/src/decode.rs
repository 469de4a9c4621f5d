//! From codes back to values, in this process.

use arrow_pyarrow::{IntoPyArrow, PyArrowType, Table as PyArrowTable};
use pyo3::prelude::*;
use shmquant_kernels::FloatType;
use shmquant_protocol::decode::table as decode_table;

use crate::error;
use crate::options::word;

/// Decode Arrow data with `__arrow_c_stream__`: the columns or layers `names`, or all.
#[pyfunction]
pub(crate) fn decode(
    py: Python<'_>,
    table: PyArrowType<PyArrowTable>,
    names: Option<Vec<String>>,
    dtype: &str,
) -> PyResult<Py<PyAny>> {
    let dtype = word::<FloatType>(py, dtype)?;
    let (batches, schema) = table.0.into_inner();
    let decoded = py.detach(|| decode_table(&schema, &batches, names.as_deref(), dtype));
    let (schema, batches) = decoded.map_err(|e| error::decode(py, &e))?;
    let table = PyArrowTable::try_new(batches, schema).map_err(|e| error::invalid(py, e))?;
    Ok(table.into_pyarrow(py)?.unbind())
}
