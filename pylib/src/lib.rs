//! `shmquant._native`: the part of the Python package that is Rust.

/// The compiled half of the `shmquant` package. Private: import `shmquant` instead.
#[pyo3::pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
