//! What a running call asks of Python: has Ctrl-C been pressed, how does the caller's `progress` like this.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;

/// A flag by which another thread ends a running call.
#[pyclass(frozen, module = "shmquant._native")]
pub(crate) struct Cancel {
    flag: AtomicBool,
}

#[pymethods]
impl Cancel {
    #[new]
    fn new() -> Self {
        Self { flag: AtomicBool::new(false) }
    }

    /// End the call that was given this flag.
    fn set(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }
}

/// The callbacks of one call and the first exception that one of them raised.
pub(crate) struct Watch {
    cancel: Option<Py<Cancel>>,
    progress: Option<Py<PyAny>>,
    raised: Mutex<Option<PyErr>>,
    stop: AtomicBool,
}

impl Watch {
    pub(crate) fn new(progress: Option<Py<PyAny>>, cancel: Option<Py<Cancel>>) -> Self {
        Self { cancel, progress, raised: Mutex::new(None), stop: AtomicBool::new(false) }
    }

    /// Whether the call must end: a signal whose handler raised, a failed `progress`, or the flag.
    pub(crate) fn interrupted(&self) -> bool {
        if self.stop.load(Ordering::Relaxed) {
            return true;
        }
        if self.cancel.as_ref().is_some_and(|c| c.get().flag.load(Ordering::Relaxed)) {
            return true;
        }
        // Without an interpreter there is nobody left to wait for the result.
        Python::try_attach(|py| py.check_signals().is_err_and(|error| self.keep(error))).unwrap_or(true)
    }

    pub(crate) fn has_progress(&self) -> bool {
        self.progress.is_some()
    }

    pub(crate) fn progress(&self, done: u64, of: u64) {
        let Some(progress) = &self.progress else { return };
        if self.stop.load(Ordering::Relaxed) {
            return;
        }
        Python::try_attach(|py| {
            if let Err(error) = progress.call1(py, (done, of)) {
                self.keep(error);
            }
        });
    }

    /// The exception that ended the call, if one did.
    pub(crate) fn raised(&self) -> Option<PyErr> {
        self.raised.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn keep(&self, error: PyErr) -> bool {
        self.raised.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop.store(true, Ordering::Relaxed);
        true
    }
}
