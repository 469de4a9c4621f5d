//! What can go wrong for a client.

use std::time::Duration;

use thiserror::Error;

use crate::field::UnsupportedType;
use crate::message::{ErrorCode, Failure};
use crate::segment::SegmentError;
use crate::socket::SocketError;
use crate::wire::WireError;

/// Why a call to the daemon has no result.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The daemon refused the request; it and the session are fine.
    #[error("{}", refusal(.0))]
    Refused(Box<Failure>),

    /// There is no session: nobody listens, or a daemon could not be started.
    #[error("cannot reach a daemon at {address}: {what}")]
    Connect {
        /// Where a daemon was looked for.
        address: String,
        /// What happened there.
        what: String,
    },

    /// The connection broke while a request was running. The next call connects anew.
    #[error("the connection to the daemon was lost while {what}: {source}")]
    Lost {
        /// What was being done.
        what: &'static str,
        /// How the connection ended.
        source: SocketError,
    },

    /// The request's own time ran out on this side.
    #[error(
        "no result within {} s\nhint: allow more time, or ask `shmquant status` what the daemon is doing",
        .timeout.as_secs_f64()
    )]
    Deadline {
        /// The time the request had.
        timeout: Duration,
    },

    /// The caller's `interrupted` said so.
    #[error("cancelled")]
    Cancelled,

    /// The daemon broke PROTOCOL.md; the session is given up.
    #[error("the daemon broke the protocol: {0}")]
    Protocol(String),

    /// Shared memory or file descriptors of this process went short.
    #[error(transparent)]
    Segment(#[from] SegmentError),

    /// A column to be published has a type that a published table cannot have.
    #[error("column {column:?} has type {}, which a published table cannot have", .kind.0)]
    Column {
        /// Its name.
        column: String,
        /// The type.
        kind: UnsupportedType,
    },

    /// The description of the table does not fit even into the largest window.
    #[error(
        "the table's description takes {bytes} bytes and a daemon's window holds one of {most}\n\
         hint: quantize fewer columns or layers at once, or start the daemon with a larger --max-window"
    )]
    TooLarge {
        /// Bytes of the descriptor.
        bytes: u64,
        /// The largest descriptor that fits.
        most: u64,
    },

    /// The result belongs to a session that has ended (a fork, a restart of the daemon). Its bytes stay readable.
    #[error("the result is of a session that has ended; it can be read, but not {what}")]
    OtherSession {
        /// What was asked.
        what: &'static str,
    },

    /// The session was closed by its owner.
    #[error("the session is closed")]
    Closed,

    /// This process was forked off, and a daemon that runs inside a process stays in its parent.
    #[error(
        "the daemon runs inside the parent process and was not forked along\n\
         hint: use a daemon of its own (an address instead of \"inproc:\"), or the start method \"spawn\""
    )]
    Forked,
}

impl ClientError {
    /// The protocol's code for this error, where it has one: the daemon's, or the same seen from this side.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused(failure) => Some(failure.code),
            Self::Deadline { .. } => Some(ErrorCode::Deadline),
            Self::Cancelled => Some(ErrorCode::Cancelled),
            Self::OtherSession { .. } => Some(ErrorCode::Gone),
            Self::TooLarge { .. } => Some(ErrorCode::NoRoom),
            Self::Segment(
                SegmentError::NoRoom { .. }
                | SegmentError::FdLimit { .. }
                | SegmentError::SystemFdLimit { .. }
                | SegmentError::MapLimit { .. }
                | SegmentError::AddressSpace { .. }
                | SegmentError::FileSizeLimit { .. },
            ) => Some(ErrorCode::Limit),
            Self::Column { .. } => Some(ErrorCode::Unsupported),
            _ => None,
        }
    }

    pub(super) fn lost(what: &'static str, source: SocketError) -> Self {
        match source {
            // Only this call fails, by a limit of this process: the session is fine.
            SocketError::FdsLost { limit, .. } | SocketError::FdLimit { limit, .. } => {
                Self::Segment(SegmentError::FdLimit { what: what.to_owned(), limit })
            }
            source => Self::Lost { what, source },
        }
    }

    pub(super) fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol(what.into())
    }

    pub(super) fn broken(error: &WireError) -> Self {
        Self::Protocol(error.to_string())
    }
}

fn refusal(failure: &Failure) -> String {
    match failure.hint.as_str() {
        "" => failure.message.clone(),
        hint => format!("{}\nhint: {hint}", failure.message),
    }
}
