//! The daemon's end of an address: a socket file of this user alone, and one daemon behind it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    self, AddressFamily, Backlog, Shutdown, SockFlag, SockType, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::geteuid;

use super::{Connection, SocketError, address, fd_limit, refused, sys};

/// What is appended to a socket's path to get the path of the file that its daemon keeps locked.
pub const LOCK_SUFFIX: &str = ".lock";

/// How often the lock file may vanish between being opened and being locked before that is an error.
const ATTEMPTS: u32 = 16;

/// A socket that daemons listen on: mode 0600, in a directory of mode 0700, one living daemon at a time.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    /// Device and inode of the socket file: only that one is removed at the end.
    file: (u64, u64),
    /// A descriptor in reserve, given up to close a connection that there is no descriptor for.
    spare: Mutex<Option<File>>,
    // After everything else: it says that the address is served.
    _lock: Flock<File>,
}

impl Listener {
    /// Serves an address: makes the directory if needed and takes the place of a daemon that has died.
    ///
    /// A living one keeps its address, also against a caller that races with it:
    /// [`SocketError::AlreadyServed`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let address = address(path)?;
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        make_private(dir)?;
        let lock = take_lock(path)?;
        remove_stale(path)?;

        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
            .map_err(|errno| refused("making a socket", errno))?;
        // A socket file gets the mode of its socket: this way it is never there with another one.
        fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|errno| refused("setting the mode of a socket", errno))?;
        bind(fd.as_raw_fd(), &address).map_err(|errno| at(path, "binding", errno))?;
        let made = fs::symlink_metadata(path).map_err(|error| failed(path, "looking at", &error))?;
        // From here on the value removes the file when something fails.
        let listener = Self {
            fd,
            path: path.to_owned(),
            file: (made.dev(), made.ino()),
            spare: Mutex::new(spare()),
            _lock: lock,
        };
        listen(&listener.fd, Backlog::MAXALLOWABLE).map_err(|errno| at(path, "listening at", errno))?;
        Ok(listener)
    }

    /// Waits for the next client.
    ///
    /// When this process has no descriptor left, the client is disconnected at once, rather than left
    /// waiting, and the error is [`SocketError::FdLimit`]. After [`shutdown`](Self::shutdown) it is
    /// [`SocketError::Closed`].
    pub fn accept(&self) -> Result<Connection, SocketError> {
        loop {
            match sys::accept(self.fd.as_fd()) {
                Ok(fd) => return Connection::ready(fd),
                // The client gave up in the queue, or a signal came.
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(Errno::EINVAL) => return Err(SocketError::Closed),
                Err(Errno::EMFILE) => {
                    self.turn_away();
                    return Err(SocketError::FdLimit { what: "accepting a connection", limit: fd_limit() });
                }
                Err(errno) => return Err(at(&self.path, "accepting a connection at", errno)),
            }
        }
    }

    /// Ends listening: a thread in [`accept`](Self::accept) gets [`SocketError::Closed`], and clients are
    /// refused.
    pub fn shutdown(&self) {
        // Refused only if it was done before.
        let _ = socket::shutdown(self.fd.as_raw_fd(), Shutdown::Both);
    }

    /// The address.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Closes the connection at the head of the queue with the help of the spare descriptor.
    ///
    /// Without this an accept loop would spin, and the client would wait for ever.
    fn turn_away(&self) {
        let mut slot = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        drop(slot.take());
        // Somebody waits there, or accept would not have got as far as the limit; another thread may have
        // been faster, so do not block for the next.
        let mut polled = [nix::poll::PollFd::new(self.fd.as_fd(), nix::poll::PollFlags::POLLIN)];
        if nix::poll::poll(&mut polled, nix::poll::PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            drop(sys::accept(self.fd.as_fd()));
        }
        *slot = spare();
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // The lock is still held, so this can only be another daemon's file if somebody emptied the
        // directory, lock file and all. The lock file itself stays: removing it would let two daemons lock
        // two files of one name.
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

/// Makes the directory, or checks that the one there is this user's alone.
fn make_private(dir: &Path) -> Result<(), SocketError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|error| failed(dir, "making the directory", &error))?;
    // A link is followed: what counts is who can put sockets into the directory behind it, and whether the
    // link itself can be swapped is a matter of the directories above, which are the user's choice.
    let meta = fs::metadata(dir).map_err(|error| failed(dir, "looking at", &error))?;
    let unsafe_because = |reason: String| SocketError::UnsafeDirectory { path: dir.to_owned(), reason };
    let ours = geteuid().as_raw();
    if !meta.is_dir() {
        Err(unsafe_because("it is no directory".to_owned()))
    } else if meta.uid() != ours {
        Err(unsafe_because(format!("its owner is user {}, not {ours}", meta.uid())))
    } else if meta.mode() & 0o077 != 0 {
        Err(unsafe_because(format!("its mode is {:o}", meta.mode() & 0o7777)))
    } else {
        Ok(())
    }
}

/// Locks the file beside the socket, or finds that a living daemon has done so.
fn take_lock(socket: &Path) -> Result<Flock<File>, SocketError> {
    let mut path = socket.as_os_str().to_owned();
    path.push(LOCK_SUFFIX);
    let path = PathBuf::from(path);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    for _ in 0..ATTEMPTS {
        let file = options.open(&path).map_err(|error| failed(&path, "opening", &error))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(SocketError::AlreadyServed { path: socket.to_owned() });
            }
            Err((_, errno)) => return Err(at(&path, "locking", errno)),
        };
        // Somebody may clean the directory up between open and lock: a lock on a file without a name
        // excludes nobody.
        let held = lock.metadata().map_err(|error| failed(&path, "looking at", &error))?;
        if fs::symlink_metadata(&path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (held.dev(), held.ino()))
        {
            return Ok(lock);
        }
    }
    Err(at(&path, "locking", Errno::EAGAIN))
}

/// Removes the socket of a dead daemon. The caller holds the lock.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(path, "looking at", &error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    // The lock says that nobody is there. A cleaner of old files may have removed a living daemon's lock
    // file, though, so ask the socket itself, too.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
        .map_err(|errno| refused("making a socket", errno))?;
    match connect(probe.as_raw_fd(), &address(path)?) {
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => {}
        // Connected, or a full queue, or a socket of another type: somebody lives there.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => {
            return Err(SocketError::AlreadyServed { path: path.to_owned() });
        }
        Err(errno) => return Err(at(path, "probing", errno)),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed(path, "removing the socket of a dead daemon", &error))
        }
        _ => Ok(()),
    }
}

fn at(path: &Path, verb: &str, errno: Errno) -> SocketError {
    match errno {
        Errno::EMFILE => SocketError::FdLimit { what: "listening", limit: fd_limit() },
        errno => SocketError::Os { what: format!("{verb} {}", path.display()), errno },
    }
}

fn failed(path: &Path, verb: &str, error: &io::Error) -> SocketError {
    at(path, verb, Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}
