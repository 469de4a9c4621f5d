//! Where the daemon is (PROTOCOL.md section 1).

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::unistd::geteuid;

use crate::message::MAJOR;
use crate::socket::{Connection, SocketError};

/// The variable that names another socket.
pub const ADDRESS_VARIABLE: &str = "SHMQUANT_ADDRESS";

/// Gives one more connection to a daemon inside this process.
pub type Connector = Arc<dyn Fn() -> io::Result<OwnedFd> + Send + Sync>;

/// Where a daemon is found.
#[derive(Clone)]
pub enum Address {
    /// The path of its socket.
    Path(PathBuf),
    /// Inside this process: each call gives one end of a `SOCK_SEQPACKET` pair that the daemon serves.
    InProcess(Connector),
}

impl Address {
    /// [`default_address`].
    pub fn from_env() -> Self {
        Self::Path(default_address())
    }

    pub(super) fn connect(&self, deadline: Instant) -> Result<Connection, SocketError> {
        match self {
            Self::Path(path) => {
                let connection = Connection::connect_until(path, Some(deadline))?;
                // Values are not handed to whoever sits at a path that anybody could have made.
                connection.require_same_user()?;
                Ok(connection)
            }
            Self::InProcess(connector) => {
                let fd = connector().map_err(|error| SocketError::Os {
                    what: format!("connecting to the daemon inside this process: {error}"),
                    errno: nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::ECONNREFUSED)),
                })?;
                Connection::from_fd(fd)
            }
        }
    }

    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            Self::InProcess(_) => None,
        }
    }
}

/// The socket that the environment names: `SHMQUANT_ADDRESS`, or the one below `XDG_RUNTIME_DIR`, or the one in `/tmp`.
pub fn default_address() -> PathBuf {
    let variable = |name| std::env::var_os(name);
    choose(variable(ADDRESS_VARIABLE), variable("XDG_RUNTIME_DIR"), geteuid().as_raw())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::InProcess(_) => f.write_str("inproc:"),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({self})")
    }
}

/// An empty variable counts as none, as shells write it.
fn choose(address: Option<OsString>, runtime: Option<OsString>, uid: u32) -> PathBuf {
    if let Some(address) = address.filter(|a| !a.is_empty()) {
        let path = PathBuf::from(address);
        // The daemon that is started works in `/`, and both must mean the same file.
        return std::path::absolute(&path).unwrap_or(path);
    }
    let socket = format!("shmquant-{MAJOR}.sock");
    match runtime.map(PathBuf::from).filter(|dir| dir.is_absolute()) {
        Some(dir) => dir.join("shmquant").join(socket),
        None => PathBuf::from(format!("/tmp/shmquant-{uid}")).join(socket),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_address_goes_before_the_runtime_directory_and_that_before_tmp() {
        let some = |text: &str| Some(OsString::from(text));
        assert_eq!(choose(some("/a/b.sock"), some("/run/user/7"), 7), Path::new("/a/b.sock"));
        assert_eq!(
            choose(some(""), some("/run/user/7"), 7),
            Path::new("/run/user/7/shmquant/shmquant-1.sock")
        );
        assert_eq!(choose(None, None, 7), Path::new("/tmp/shmquant-7/shmquant-1.sock"));
        assert_eq!(choose(None, some("relative"), 7), Path::new("/tmp/shmquant-7/shmquant-1.sock"));
    }

    #[test]
    fn a_relative_address_is_of_this_working_directory() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(choose(Some("x.sock".into()), None, 7), here.join("x.sock"));
    }
}
