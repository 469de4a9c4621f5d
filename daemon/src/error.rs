//! Why a daemon does not start or stops, and the one place that turns inner errors into replies.

use std::io;

use nix::errno::Errno;
use shmquant_protocol::descriptor::DescriptorError;
use shmquant_protocol::message::{ErrorCode, Failure};
use shmquant_protocol::segment::SegmentError;
use shmquant_protocol::socket::SocketError;
use shmquant_protocol::wire::WireError;
use thiserror::Error;

use crate::life::IllegalMove;

/// Why a daemon could not be started or run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The address cannot be served; [`SocketError::AlreadyServed`] if a living daemon has it.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The instance of POSIX segments could not be announced, or stale ones not be swept.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The system refused something.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// How it was refused.
        #[source]
        error: io::Error,
    },
}

impl DaemonError {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { what, error }
    }

    pub(crate) fn errno(what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Io { what, error: errno.into() }
    }
}

/// Why a request, or the connection it came on, does not go on.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// Answer this; after `PROTOCOL` the connection is closed.
    Refused(Box<Failure>),
    /// The peer is gone, or has to go: there is nobody to answer.
    Lost,
}

impl Trouble {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Failure::new(code, message, hint).into()
    }

    pub(crate) fn protocol(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Protocol, message, "")
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Refused(Box::new(failure))
    }
}

impl From<WireError> for Trouble {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Value { what: "version", value } => Self::new(
                ErrorCode::Version,
                format!("protocol version {value} is not spoken here, version 1 is"),
                "use a client and a daemon of one major version",
            ),
            error => Self::protocol(error.to_string()),
        }
    }
}

impl From<DescriptorError> for Trouble {
    fn from(error: DescriptorError) -> Self {
        match error {
            DescriptorError::Wire(error) => Self::protocol(format!("descriptor: {error}")),
            DescriptorError::UnknownScheme(code) => Self::new(
                ErrorCode::Unsupported,
                format!("scheme {code} is not known to daemon {}", env!("CARGO_PKG_VERSION")),
                "the daemon is older than the client: stop it (`shmquant stop`), the next use starts the new one",
            ),
            DescriptorError::Invalid { name, what } => {
                let mut failure = Failure::new(ErrorCode::InvalidInput, format!("{name:?}: {what}"), "");
                failure.column = name;
                failure.into()
            }
            error => Self::protocol(format!("descriptor: {error}")),
        }
    }
}

impl From<SegmentError> for Trouble {
    fn from(error: SegmentError) -> Self {
        let text = error.to_string();
        let (message, hint) = match text.split_once("\nhint: ") {
            Some((message, hint)) => (message.to_owned(), hint.to_owned()),
            None => (text, String::new()),
        };
        let code = match error {
            SegmentError::NoRoom { .. } | SegmentError::AddressSpace { .. } => ErrorCode::NoRoom,
            SegmentError::FdLimit { .. }
            | SegmentError::SystemFdLimit { .. }
            | SegmentError::FileSizeLimit { .. }
            | SegmentError::BadSize { .. }
            | SegmentError::MapLimit { .. } => ErrorCode::Limit,
            _ => ErrorCode::Internal,
        };
        if code == ErrorCode::Internal {
            tracing::error!("{message}");
        }
        // Who reads this is another process, with limits of its own.
        Self::new(code, format!("in the daemon: {message}"), hint)
    }
}

impl From<SocketError> for Trouble {
    fn from(error: SocketError) -> Self {
        match error {
            error @ (SocketError::FrameTruncated { .. } | SocketError::TooManyFdsReceived { .. }) => {
                Self::protocol(error.to_string())
            }
            SocketError::Closed => Self::Lost,
            error => {
                tracing::debug!("a connection ends: {error}");
                Self::Lost
            }
        }
    }
}

impl From<IllegalMove> for Trouble {
    fn from(error: IllegalMove) -> Self {
        tracing::error!("{error}");
        Self::new(ErrorCode::Internal, error.to_string(), "")
    }
}

/// Cuts a text that a client gave, or that contains one, to what fits into a frame.
pub(crate) fn clipped(mut text: String, most: usize) -> String {
    if text.len() > most {
        let mut end = most;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str("...");
    }
    text
}

/// A failure whose frame is short enough.
pub(crate) fn fitted(failure: Failure) -> Failure {
    Failure {
        message: clipped(failure.message, 16_000),
        hint: clipped(failure.hint, 8_000),
        column: clipped(failure.column, 16_000),
        ..failure
    }
}
