//! Memory of Python objects as Arrow buffers.
#![allow(unsafe_code, reason = "a buffer is made from the address that the buffer protocol gives")]

use std::ptr::NonNull;
use std::sync::Arc;

use arrow_buffer::Buffer;
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use shmquant_protocol::table::LayerInput;

use crate::error::invalid;
use crate::options::word;

/// Keeps the exporter's memory in place. Python gives `Py_buffer`s back under the GIL, which dropping a `PyBuffer` takes.
struct Exported {
    _view: PyBuffer<u8>,
}

/// Name, contiguous bytes, type of the values, shape.
pub(crate) type GivenLayer<'py> = (String, Bound<'py, PyAny>, String, Vec<i64>);

/// Layers as the client takes them; refers to the caller's memory.
pub(crate) fn given_layers(py: Python<'_>, layers: Vec<GivenLayer<'_>>) -> PyResult<Vec<LayerInput>> {
    let layers = layers.into_iter().map(|(name, data, dtype, shape)| {
        Ok(LayerInput { name, values: bytes_of(&data)?, dtype: word(py, &dtype)?, shape })
    });
    layers.collect()
}

/// The bytes behind `object`, which must be C-contiguous; nothing is copied.
fn bytes_of(object: &Bound<'_, PyAny>) -> PyResult<Buffer> {
    let view = PyBuffer::<u8>::get(object)?;
    if !view.is_c_contiguous() {
        return Err(invalid(object.py(), "an array that is not contiguous reached the extension"));
    }
    let len = view.len_bytes();
    let Some(start) = NonNull::new(view.buf_ptr().cast::<u8>()).filter(|_| len > 0) else {
        return Ok(Buffer::from(Vec::<u8>::new()));
    };
    let owner = Arc::new(Exported { _view: view });
    // SAFETY: the exporter keeps `len` bytes at `start` in place until the view is given back, and `owner` holds the view. Another
    // thread may write them meanwhile; they are copied as bytes and nothing is derived from them.
    Ok(unsafe { Buffer::from_custom_allocation(start, len, owner) })
}
