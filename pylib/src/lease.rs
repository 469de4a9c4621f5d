//! A held result as a Python object with the buffer protocol.
#![allow(unsafe_code, reason = "the buffer protocol hands out addresses")]

use std::ffi::{CString, c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use shmquant_protocol::client::Held;
use shmquant_protocol::segment::Mapping;

/// One hold on a result in shared memory, readable through the buffer protocol.
///
/// Lives as long as the last buffer over it; its end gives the memory back.
#[pyclass(frozen, weakref, module = "shmquant._native")]
pub(crate) struct Lease {
    held: Mutex<Option<Arc<Held>>>,
    /// Buffers over it.
    views: Arc<AtomicU64>,
    pointer: usize,
    nbytes: usize,
    segment_name: String,
    name: Option<String>,
    created: bool,
}

impl Lease {
    pub(crate) fn new(held: Held) -> Self {
        Self {
            views: Arc::default(),
            pointer: held.as_ptr() as usize,
            nbytes: held.len(),
            segment_name: held.segment_name(),
            name: held.name().map(str::to_owned),
            created: held.created(),
            held: Mutex::new(Some(Arc::new(held))),
        }
    }

    pub(crate) fn held(&self) -> PyResult<Arc<Held>> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).clone();
        held.ok_or_else(|| PyValueError::new_err("this result has been released"))
    }
}

#[pymethods]
impl Lease {
    /// Address of the first byte.
    #[getter]
    fn pointer(&self) -> usize {
        self.pointer
    }

    /// Bytes of the result.
    #[getter]
    fn nbytes(&self) -> usize {
        self.nbytes
    }

    /// Name of its segment.
    #[getter]
    fn segment_name(&self) -> &str {
        &self.segment_name
    }

    /// The name it is published under.
    #[getter]
    fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Whether the call that gave it computed it, too.
    #[getter]
    fn created(&self) -> bool {
        self.created
    }

    /// Buffers that are over it.
    #[getter]
    fn views(&self) -> u64 {
        self.views.load(Ordering::Acquire)
    }

    /// Whether it has been given back.
    #[getter]
    fn released(&self) -> bool {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Give the memory back unless buffers are over it; whether it is given back.
    fn release(&self) -> bool {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        // No buffer is made meanwhile: that takes the same lock.
        if self.views.load(Ordering::Acquire) > 0 {
            return false;
        }
        *held = None;
        true
    }

    /// # Safety
    /// Called by Python with a valid view to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let held = this.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.is_none() {
            return Err(PyBufferError::new_err("this result has been released"));
        }
        // SAFETY: `view` is Python's to be filled; the memory is read-only and stays mapped while `held` is there, and that is not
        // taken out while a view is counted.
        unsafe { fill(view, flags, this.pointer as *mut c_void, this.nbytes, true, slf.clone().into_any()) }?;
        this.views.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// # Safety
    /// Called by Python for a view that `__getbuffer__` filled.
    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        self.views.fetch_sub(1, Ordering::AcqRel);
        // SAFETY: `fill` made the format, if there is one, and nobody else frees it.
        unsafe { forget_format(view) }
    }
}

/// A private writable mapping of a result; counts as a view of it.
#[pyclass(frozen, module = "shmquant._native")]
pub(crate) struct PrivateMapping {
    mapping: Mapping,
    offset: usize,
    held: Arc<Held>,
    views: Arc<AtomicU64>,
}

impl PrivateMapping {
    pub(crate) fn new(lease: &Lease, held: Arc<Held>, mapping: Mapping) -> Self {
        lease.views.fetch_add(1, Ordering::AcqRel);
        Self { mapping, offset: held.extent().offset as usize, held, views: lease.views.clone() }
    }
}

#[pymethods]
impl PrivateMapping {
    /// # Safety
    /// Called by Python with a valid view to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let Some(start) = this.mapping.as_mut_ptr() else {
            return Err(PyBufferError::new_err("the mapping is not writable"));
        };
        let at = start.wrapping_add(this.offset).cast();
        // SAFETY: `view` is Python's to be filled; the mapping is this object's own, which the view keeps alive, and the extent
        // was compared with the segment's size when the result was received.
        unsafe { fill(view, flags, at, this.held.len(), false, slf.clone().into_any()) }
    }

    /// # Safety
    /// Called by Python for a view that `__getbuffer__` filled.
    #[allow(clippy::unused_self, reason = "Python's signature")]
    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: as for `Lease`.
        unsafe { forget_format(view) }
    }
}

impl Drop for PrivateMapping {
    fn drop(&mut self) {
        self.views.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Fills `view` with `len` bytes at `start`.
///
/// # Safety
/// `view` is valid for writes; the bytes stay where they are for as long as `owner` lives.
pub(crate) unsafe fn fill(
    view: *mut ffi::Py_buffer,
    flags: c_int,
    start: *mut c_void,
    len: usize,
    read_only: bool,
    owner: Bound<'_, PyAny>,
) -> PyResult<()> {
    if view.is_null() {
        return Err(PyBufferError::new_err("there is no view to fill"));
    }
    if read_only && flags & ffi::PyBUF_WRITABLE == ffi::PyBUF_WRITABLE {
        return Err(PyBufferError::new_err("a result is read-only: it is shared with other processes"));
    }
    // SAFETY: by this function's contract. `shape` and `strides` point into the view itself, which Python allows.
    unsafe {
        (*view).obj = owner.into_ptr();
        (*view).buf = start;
        (*view).len = len as isize;
        (*view).readonly = c_int::from(read_only);
        (*view).itemsize = 1;
        (*view).format = if flags & ffi::PyBUF_FORMAT == ffi::PyBUF_FORMAT {
            CString::from(c"B").into_raw()
        } else {
            std::ptr::null_mut()
        };
        (*view).ndim = 1;
        (*view).shape =
            if flags & ffi::PyBUF_ND == ffi::PyBUF_ND { &raw mut (*view).len } else { std::ptr::null_mut() };
        (*view).strides = if flags & ffi::PyBUF_STRIDES == ffi::PyBUF_STRIDES {
            &raw mut (*view).itemsize
        } else {
            std::ptr::null_mut()
        };
        (*view).suboffsets = std::ptr::null_mut();
        (*view).internal = std::ptr::null_mut();
    }
    Ok(())
}

/// # Safety
/// `view` was filled by [`fill`].
pub(crate) unsafe fn forget_format(view: *mut ffi::Py_buffer) {
    // SAFETY: `fill` made it with `CString::into_raw`.
    unsafe {
        if !(*view).format.is_null() {
            drop(CString::from_raw((*view).format));
            (*view).format = std::ptr::null_mut();
        }
    }
}
