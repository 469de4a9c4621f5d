//! The way to the daemon that a command talks to.

use std::path::{Path, PathBuf};

use shmquant_protocol::client::{Address, Config, Session, StartCommand, default_address};

use super::error::CliError;

/// Where the daemon is, and how to start one.
#[derive(Debug)]
pub(super) struct Link {
    path: PathBuf,
    start: StartCommand,
}

impl Link {
    /// `address` if one was named, else the user's own.
    pub(super) fn new(address: Option<PathBuf>, start: StartCommand) -> Result<Self, CliError> {
        let address = address.filter(|path| !path.as_os_str().is_empty());
        let path = match address {
            Some(path) if path.as_os_str() == "inproc:" => {
                return Err(CliError::told(
                    "the address \"inproc:\" means a daemon inside the calling process, and a command has none",
                    "name a path with --address, or unset SHMQUANT_ADDRESS",
                ));
            }
            Some(path) => std::path::absolute(&path).unwrap_or(path),
            None => default_address(),
        };
        Ok(Self { path, start })
    }

    /// Path of the socket.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// How a daemon is started.
    pub(super) fn start(&self) -> &StartCommand {
        &self.start
    }

    /// A session at the daemon that runs; an error if none does.
    pub(super) fn running(&self) -> Session {
        Session::new(self.config(None))
    }

    /// A session at the daemon; one is started if none runs.
    pub(super) fn running_or_started(&self) -> Session {
        Session::new(self.config(Some(self.start.clone())))
    }

    /// This address; `start` starts a daemon if none runs there.
    pub(super) fn config(&self, start: Option<StartCommand>) -> Config {
        Config { address: Address::Path(self.path.clone()), start, ..Config::default() }
    }
}
