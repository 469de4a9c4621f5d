//! Why a command did not do what it was asked. The texts are the users': what happened, with which value, and a hint.

use std::io;
use std::path::{Path, PathBuf};

use parquet::errors::ParquetError;
use shmquant_protocol::client::ClientError;
use shmquant_protocol::decode::DecodeError;
use shmquant_protocol::files::FileError;
use shmquant_protocol::table::InputError;

use crate::error::DaemonError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Input(#[from] InputError),
    #[error("{}: {error}", .path.display())]
    Decode { path: PathBuf, error: DecodeError },
    #[error("{}: {error}", .path.display())]
    Parquet { path: PathBuf, error: ParquetError },
    #[error("{}: {what}: {error}", .path.display())]
    Io { path: PathBuf, what: &'static str, error: io::Error },
    #[error("standard output: {0}")]
    Stdout(io::Error),
    #[error("{what}\nhint: {hint}")]
    Told { what: String, hint: String },
}

impl CliError {
    /// What happened, and what to do about it.
    pub(super) fn told(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Told { what: what.into(), hint: hint.into() }
    }

    pub(super) fn io(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { path: path.to_owned(), what, error }
    }

    pub(super) fn parquet(path: &Path) -> impl FnOnce(ParquetError) -> Self {
        move |error| Self::Parquet { path: path.to_owned(), error }
    }

    pub(super) fn decode(path: &Path) -> impl FnOnce(DecodeError) -> Self {
        move |error| Self::Decode { path: path.to_owned(), error }
    }
}
