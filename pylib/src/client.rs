//! This process's session with one daemon.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use shmquant_daemon::Daemon;
use shmquant_protocol::client::{Address, ClientError, Config, Options, Session};
use shmquant_protocol::message::{Listing, Naming};

use crate::calls::{Cancel, Watch};
use crate::error::client;
use crate::input::InputMemory;
use crate::lease::{Lease, PrivateMapping};
use crate::source::Source;

/// Address of a daemon inside this process.
const IN_PROCESS: &str = "inproc:";

/// n, n_clipped, n_nonfinite, n_degenerate_groups, n_nulled; mse, sqnr_db, max_abs_err, cosine; bytes copied and shared.
type Report = (u64, u64, u64, u64, u64, Option<f64>, Option<f64>, Option<f64>, Option<f64>, u64, u64);

/// A session: connects when it is first used, again after the daemon went away.
#[pyclass(frozen, module = "shmquant._native")]
pub(crate) struct Client {
    session: Session,
    address: String,
}

#[pymethods]
impl Client {
    #[new]
    #[pyo3(signature = (address, *, start=None, lanes=None, window=None, poll=None))]
    fn new(
        address: OsString,
        start: Option<Vec<OsString>>,
        lanes: Option<u32>,
        window: Option<u64>,
        poll: Option<bool>,
    ) -> Self {
        let shown = address.to_string_lossy().into_owned();
        let address =
            if address == IN_PROCESS { in_process() } else { Address::Path(PathBuf::from(address)) };
        let start = start.and_then(|words| {
            let mut words = words.into_iter();
            words.next().map(|program| shmquant_daemon::cli::start_command(program, words.collect()))
        });
        let config = Config { address, start, window, max_lanes: lanes, poll };
        Self { session: Session::new(config), address: shown }
    }

    /// Where the daemon is.
    #[getter]
    fn address(&self) -> &str {
        &self.address
    }

    /// Quantize; a hold on the result, a report of each item, and bytes copied and shared in all.
    #[pyo3(signature = (source, *, timeout=None, name=None, replace=false, progress=None, cancel=None))]
    #[allow(clippy::too_many_arguments, reason = "Python's options")]
    fn quantize(
        &self,
        py: Python<'_>,
        source: Bound<'_, Source>,
        timeout: Option<f64>,
        name: Option<String>,
        replace: bool,
        progress: Option<Py<PyAny>>,
        cancel: Option<Py<Cancel>>,
    ) -> PyResult<(Lease, Vec<Report>, (u64, u64))> {
        let source = source.get();
        source.check_file(py)?;
        let watch = Watch::new(progress, cancel);
        let done = py.detach(|| {
            let interrupted = || watch.interrupted();
            let progress = |done, of| watch.progress(done, of);
            let named = name.map(|name| Naming { name, replace, digest: source.table().digest() });
            let options = Options {
                timeout: timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
                named,
                progress: if watch.has_progress() { Some(&progress) } else { None },
                interrupted: Some(&interrupted),
            };
            self.session.quantize(source.table(), &options)
        });
        let done = self.answer(py, &watch, done)?;
        source.check_file(py)?;
        let number = |value: f64| (!value.is_nan()).then_some(value);
        let report = done.report.iter().map(|item| {
            let (mse, sqnr) = (number(item.mse), number(item.sqnr_db));
            let (largest, cosine) = (number(item.max_abs_err), number(item.cosine));
            let counts = (item.n, item.n_clipped, item.n_nonfinite, item.n_degenerate_groups, item.n_nulled);
            let crossed = (item.bytes_copied, item.bytes_shared);
            (
                counts.0, counts.1, counts.2, counts.3, counts.4, mse, sqnr, largest, cosine, crossed.0,
                crossed.1,
            )
        });
        let report = report.collect();
        Ok((Lease::new(done.held), report, (done.bytes_copied, done.bytes_shared)))
    }

    /// Writable memory that the daemon reads where it lies.
    #[pyo3(signature = (nbytes, *, timeout=None))]
    fn allocate(&self, py: Python<'_>, nbytes: u64, timeout: Option<f64>) -> PyResult<InputMemory> {
        let made =
            self.wait(py, timeout, |session, timeout, stop| session.allocate(nbytes, timeout, Some(stop)));
        made.map(InputMemory::new)
    }

    /// Have memory made ready for a result.
    #[pyo3(signature = (nbytes, *, timeout=None))]
    fn warm(&self, py: Python<'_>, nbytes: u64, timeout: Option<f64>) -> PyResult<()> {
        self.wait(py, timeout, |session, timeout, stop| session.warm(nbytes, timeout, Some(stop)))
    }

    /// Open a dataset.
    fn open(&self, py: Python<'_>, name: &str) -> PyResult<Lease> {
        self.ask(py, |session| session.open(name)).map(Lease::new)
    }

    /// Open what a ticket holds; consumes it.
    fn open_ticket(&self, py: Python<'_>, ticket: u64, secret: [u8; 16]) -> PyResult<Lease> {
        self.ask(py, |session| session.open_ticket(ticket, secret)).map(Lease::new)
    }

    /// Make a ticket: a hold for whoever opens it first.
    fn ticket(&self, py: Python<'_>, lease: Bound<'_, Lease>) -> PyResult<(u64, [u8; 16])> {
        let held = lease.get().held()?;
        self.ask(py, |session| session.ticket(&held))
    }

    /// A private writable mapping of a result: writes to it are seen by nobody else.
    fn private(&self, py: Python<'_>, lease: Bound<'_, Lease>) -> PyResult<PrivateMapping> {
        let held = lease.get().held()?;
        let mapping = self.ask(py, |session| session.private_mapping(&held))?;
        Ok(PrivateMapping::new(lease.get(), held, mapping))
    }

    /// Remove a dataset's name.
    fn drop(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        self.ask(py, |session| session.drop_dataset(name))
    }

    /// The datasets, each a JSON object.
    fn list(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.ask(py, |session| session.list(Listing::Datasets))
    }

    /// What the daemon says of itself, a JSON object.
    fn stat(&self, py: Python<'_>) -> PyResult<String> {
        self.ask(py, Session::stat)
    }

    /// Ask whether the daemon answers.
    fn ping(&self, py: Python<'_>) -> PyResult<()> {
        self.ask(py, Session::ping)
    }

    /// End the session. Results that are held stay readable.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.session.close());
    }
}

impl Client {
    fn ask<T: Send>(
        &self,
        py: Python<'_>,
        request: impl FnOnce(&Session) -> Result<T, ClientError> + Send,
    ) -> PyResult<T> {
        py.detach(|| request(&self.session)).map_err(|error| failed(py, error))
    }

    /// Waits for what a request may have to wait for, and for Ctrl-C.
    fn wait<T: Send>(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        request: impl FnOnce(&Session, Option<Duration>, &(dyn Fn() -> bool + Sync)) -> Result<T, ClientError>
        + Send,
    ) -> PyResult<T> {
        let watch = Watch::new(None, None);
        let timeout = timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let done = py.detach(|| request(&self.session, timeout, &|| watch.interrupted()));
        self.answer(py, &watch, done)
    }

    fn answer<T>(&self, py: Python<'_>, watch: &Watch, result: Result<T, ClientError>) -> PyResult<T> {
        // An exception that a callback raised goes before what became of the call.
        if let Some(raised) = watch.raised() {
            return Err(raised);
        }
        result.map_err(|error| failed(py, error))
    }
}

/// The exception for a failed call; that of a signal's handler goes first, as it would between two lines of Python.
fn failed(py: Python<'_>, error: ClientError) -> PyErr {
    match py.check_signals() {
        Ok(()) => client(py, error),
        Err(raised) => raised,
    }
}

/// A daemon of this process, started by the first connection and kept until the session's end.
fn in_process() -> Address {
    let daemon: Mutex<Option<Daemon>> = Mutex::new(None);
    Address::InProcess(Arc::new(move || {
        let mut daemon = daemon.lock().unwrap_or_else(PoisonError::into_inner);
        if daemon.is_none() {
            let started = Daemon::in_process(shmquant_daemon::Config::default());
            *daemon = Some(started.map_err(std::io::Error::other)?);
        }
        match daemon.as_ref() {
            Some(daemon) => daemon.connect(),
            None => Err(std::io::Error::other("the daemon of this process has ended")),
        }
    }))
}

/// The address that is used where none is given: `SHMQUANT_ADDRESS`, else the user's own socket.
#[pyfunction]
pub(crate) fn default_address() -> OsString {
    match std::env::var_os("SHMQUANT_ADDRESS") {
        Some(address) if address == IN_PROCESS => address,
        _ => match Address::from_env() {
            Address::Path(path) => path.into_os_string(),
            Address::InProcess(_) => IN_PROCESS.into(),
        },
    }
}
