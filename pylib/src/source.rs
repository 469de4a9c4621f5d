//! What is to be quantized, as the client streams it.

use std::path::PathBuf;

use arrow_array::RecordBatch;
use arrow_pyarrow::{IntoPyArrow, PyArrowType, Table as PyArrowTable};
use arrow_schema::SchemaRef;
use pyo3::prelude::*;
use shmquant_protocol::client::Source as _;
use shmquant_protocol::descriptor::Body;
use shmquant_protocol::files::{Format, MappedFile, arrow_ipc, safetensors};
use shmquant_protocol::table::{Output, Table, TableOptions};

use crate::error::{self, file, invalid};
use crate::options::SourceOptions;
use crate::tensor::{GivenLayer, given_layers};

/// A table with everything decided that does not need a daemon. Refers to the caller's memory.
#[pyclass(frozen, module = "shmquant._native")]
pub(crate) struct Source {
    table: Table,
    /// The file it lies in.
    file: Option<MappedFile>,
}

impl Source {
    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// Whether the file is still the one that was read.
    pub(crate) fn check_file(&self, py: Python<'_>) -> PyResult<()> {
        self.file.as_ref().map_or(Ok(()), MappedFile::check).map_err(|e| file(py, &e))
    }
}

#[pymethods]
impl Source {
    /// Arrow data with `__arrow_c_stream__`.
    #[staticmethod]
    fn from_arrow(
        py: Python<'_>,
        table: PyArrowType<PyArrowTable>,
        options: SourceOptions<'_>,
    ) -> PyResult<Self> {
        let options = options.table_options(py)?;
        let (batches, schema) = table.0.into_inner();
        Ok(Self { table: of_batches(py, schema, batches, &options)?, file: None })
    }

    /// Layers by (name, contiguous bytes, type of the values, shape).
    #[staticmethod]
    fn from_layers(
        py: Python<'_>,
        layers: Vec<GivenLayer<'_>>,
        options: SourceOptions<'_>,
    ) -> PyResult<Self> {
        let options = options.table_options(py)?;
        let layers = given_layers(py, layers)?;
        let made = py.detach(|| Table::from_layers(layers, false, &options));
        Ok(Self { table: made.map_err(|e| error::input(py, &e))?, file: None })
    }

    /// A safetensors or Arrow IPC file; for the latter also its table, from which columns pass through.
    #[staticmethod]
    fn from_file<'py>(
        py: Python<'py>,
        path: PathBuf,
        options: SourceOptions<'_>,
    ) -> PyResult<(Self, Option<Bound<'py, PyAny>>)> {
        let options = options.table_options(py)?;
        let mapped = py.detach(|| MappedFile::open(&path)).map_err(|e| file(py, &e))?;
        match mapped.format().map_err(|e| file(py, &e))? {
            Format::Safetensors => {
                let tensors = py.detach(|| safetensors::read(&mapped, safetensors::OtherTypes::Skip));
                let layers = tensors.map_err(|e| file(py, &e))?.layers;
                if options.columns.is_some() {
                    return Err(invalid(
                        py,
                        "columns= was given for a safetensors file, which has layers\n\
                         hint: overrides={\"re:...\": None} leaves layers as they are",
                    ));
                }
                let table = py.detach(|| Table::from_layers(layers, false, &options));
                Ok((Self { table: table.map_err(|e| error::input(py, &e))?, file: Some(mapped) }, None))
            }
            _ => {
                let read = py.detach(|| arrow_ipc::read(&mapped)).map_err(|e| file(py, &e))?;
                let given = PyArrowTable::try_new(read.batches.clone(), read.schema.clone());
                let given = given.map_err(|e| invalid(py, e))?.into_pyarrow(py)?;
                let table = of_batches(py, read.schema, read.batches, &options)?;
                Ok((Self { table, file: Some(mapped) }, Some(given)))
            }
        }
    }

    /// Whether it is a table of layers.
    #[getter]
    fn is_layers(&self) -> bool {
        self.table.is_layers()
    }

    /// Whether columns of the finished table are the input's own.
    #[getter]
    fn passes_through(&self) -> bool {
        self.table.outputs().iter().any(|output| matches!(output, Output::PassThrough { .. }))
    }

    /// The finished table's columns in order: names of quantized ones with -1, or no name and the input's column.
    #[getter]
    fn outputs(&self) -> Vec<(Vec<String>, i64)> {
        let output = |output: &Output| match output {
            Output::Quantized { names } => (names.clone(), -1),
            Output::PassThrough { index } => (Vec::new(), *index as i64),
            Output::Kept { name } => (vec![name.clone()], -1),
        };
        self.table.outputs().iter().map(output).collect()
    }

    /// Names of the quantized columns or layers, in the order of the report.
    #[getter]
    fn items(&self) -> Vec<&str> {
        let items = &self.table.descriptor().items;
        items.iter().filter(|i| matches!(i.body, Body::Values(_))).map(|i| i.name.as_str()).collect()
    }

    /// Bytes that cross to the daemon.
    #[getter]
    fn input_bytes(&self) -> u64 {
        self.table.input_bytes()
    }
}

/// The format of a file, told by its first bytes.
#[pyfunction]
pub(crate) fn file_format(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    let format = py.detach(|| MappedFile::open(&path)?.format());
    Ok(format.map_err(|e| file(py, &e))?.to_string())
}

fn of_batches(
    py: Python<'_>,
    schema: SchemaRef,
    batches: Vec<RecordBatch>,
    options: &TableOptions,
) -> PyResult<Table> {
    py.detach(|| Table::from_batches(schema, batches, options)).map_err(|e| error::input(py, &e))
}
