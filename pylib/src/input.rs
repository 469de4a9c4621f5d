//! Writable shared memory as a Python object with the buffer protocol.
#![allow(unsafe_code, reason = "the buffer protocol hands out addresses")]

use std::ffi::c_int;

use pyo3::ffi;
use pyo3::prelude::*;
use shmquant_protocol::client::Input;

use crate::lease::{fill, forget_format};

/// Memory for values that this process writes and the daemon reads where they lie.
///
/// Lives as long as the last buffer over it; its end gives the memory back.
#[pyclass(frozen, weakref, module = "shmquant._native")]
pub(crate) struct InputMemory {
    input: Input,
}

impl InputMemory {
    pub(crate) fn new(input: Input) -> Self {
        Self { input }
    }
}

#[pymethods]
impl InputMemory {
    /// Bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.input.len()
    }

    /// Name of its segment.
    #[getter]
    fn segment_name(&self) -> String {
        self.input.segment_name()
    }

    /// # Safety
    /// Called by Python with a valid view to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let input = &slf.get().input;
        let (at, len) = (input.as_ptr().cast(), input.len());
        // SAFETY: `view` is Python's to be filled; the memory is writable and mapped for as long as the input lives, which is as
        // long as this object, which the view keeps.
        unsafe { fill(view, flags, at, len, false, slf.clone().into_any()) }
    }

    /// # Safety
    /// Called by Python for a view that `__getbuffer__` filled.
    #[allow(clippy::unused_self, reason = "Python's signature")]
    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: `fill` made the format, if there is one, and nobody else frees it.
        unsafe { forget_format(view) }
    }
}
