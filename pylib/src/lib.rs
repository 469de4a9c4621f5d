//! `shmquant._native`: the part of the Python package that is Rust.
//!
//! Thin on purpose: it hands Python's objects to the Rust client, and results back as objects that own memory. Waiting
//! happens without the GIL; memory is given back by dropping, which takes no lock and talks to nobody.

mod calls;
mod client;
mod command;
mod decode;
mod error;
mod input;
mod lease;
mod options;
mod params;
mod source;
mod tensor;

/// The compiled half of the `shmquant` package. Private: import `shmquant` instead.
#[pyo3::pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::calls::Cancel;
    #[pymodule_export]
    use super::client::{Client, default_address};
    #[pymodule_export]
    use super::command::{cli, schemes};
    #[pymodule_export]
    use super::decode::decode;
    #[pymodule_export]
    use super::input::InputMemory;
    #[pymodule_export]
    use super::lease::{Lease, PrivateMapping};
    #[pymodule_export]
    use super::params::Params;
    #[pymodule_export]
    use super::source::{Source, file_format};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
