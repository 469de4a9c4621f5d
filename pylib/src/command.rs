//! The command `shmquant`, run from the extension, and the list of schemes.

use std::ffi::OsString;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use shmquant_daemon::cli::{main_with, start_command};
use shmquant_kernels::Scheme;

/// Run the command line `argv`, the program's name first; `start` begins a command line that runs this extension.
#[pyfunction]
pub(crate) fn cli(py: Python<'_>, argv: Vec<OsString>, start: Vec<OsString>) -> i32 {
    let mut start = start.into_iter();
    let program = start.next().unwrap_or_else(|| "shmquant".into());
    py.detach(|| main_with(argv, start_command(program, start.collect())))
}

/// The schemes by their words, with one line on each.
#[pyfunction]
pub(crate) fn schemes(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let words = PyDict::new(py);
    for scheme in Scheme::ALL {
        words.set_item(scheme.name(), scheme.description())?;
    }
    Ok(words)
}
