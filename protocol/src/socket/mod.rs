//! Connections between clients and the daemon: whole frames with descriptors over `SOCK_SEQPACKET`.
//!
//! A frame and its descriptors travel in one message, so neither can be paired with the wrong other. A
//! frame is never empty, because the kernel cannot tell an empty one from the end of the connection.

mod error;
mod listener;
mod sys;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{
    self, AddressFamily, Shutdown, SockFlag, SockType, UnixAddr, getsockopt, setsockopt, socket, socketpair,
    sockopt,
};
use nix::sys::time::{TimeSpec, TimeVal, TimeValLike};
use nix::unistd::geteuid;

pub use error::SocketError;
pub use listener::{LOCK_SUFFIX, Listener};

pub use crate::message::{MAX_FDS, MAX_FRAME};

use sys::Arrived;

/// The longest path a Unix socket can have, in bytes (`sun_path` less its closing zero).
const MAX_PATH: usize = 107;

/// The send buffer a connection needs for a longest frame beside others, in bytes.
const SEND_BUFFER: usize = 3 * MAX_FRAME;

/// One end of a connection.
///
/// All methods take `&self`: one thread may receive while another sends, and
/// [`shutdown`](Self::shutdown) from any thread ends both.
#[derive(Debug)]
pub struct Connection {
    fd: OwnedFd,
}

/// A frame that has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Bytes of the frame, at the start of the buffer; never 0.
    pub len: usize,
    /// Descriptors that came with it.
    pub fds: usize,
}

/// Who is at the other end, as the kernel noted when the connection was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCred {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Process id, 0 when the process is of a pid namespace that is not visible here.
    pub pid: i32,
}

impl Connection {
    /// Two connected ends in this process.
    pub fn pair() -> Result<(Self, Self), SocketError> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| refused("making a pair of sockets", errno))?;
        Ok((Self::ready(a)?, Self::ready(b)?))
    }

    /// Connects to a daemon, however long its queue of unaccepted connections takes.
    pub fn connect(path: &Path) -> Result<Self, SocketError> {
        Self::connect_until(path, None)
    }

    /// Connects to a daemon unless that takes longer than the deadline.
    pub fn connect_until(path: &Path, deadline: Option<Instant>) -> Result<Self, SocketError> {
        let address = address(path)?;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|errno| refused("making a socket", errno))?;
        loop {
            if let Some(deadline) = deadline {
                // A timeout of 0 would mean none at all.
                let left = remaining(deadline, "connecting")?.as_micros().clamp(1, i64::MAX as u128) as i64;
                setsockopt(&fd, sockopt::SendTimeout, &TimeVal::microseconds(left))
                    .map_err(|errno| refused("setting a timeout", errno))?;
            }
            match socket::connect(fd.as_raw_fd(), &address) {
                Ok(()) => break,
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(Errno::ENOENT | Errno::ECONNREFUSED | Errno::ENOTDIR) => {
                    return Err(SocketError::NotListening { path: path.to_owned() });
                }
                Err(errno) => {
                    return Err(SocketError::Os { what: format!("connecting to {}", path.display()), errno });
                }
            }
        }
        if deadline.is_some() {
            setsockopt(&fd, sockopt::SendTimeout, &TimeVal::microseconds(0))
                .map_err(|errno| refused("clearing a timeout", errno))?;
        }
        Self::ready(fd)
    }

    /// Takes over a socket that came from elsewhere, if it is of the right type.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, SocketError> {
        match getsockopt(&fd, sockopt::SockType) {
            Ok(SockType::SeqPacket) => Self::ready(fd),
            Ok(_) => Err(refused("using a socket that is not SOCK_SEQPACKET", Errno::EPROTOTYPE)),
            Err(errno) => Err(refused("using a descriptor as a socket", errno)),
        }
    }

    /// Gives the longest frame room beside others, on hosts whose default is small.
    fn ready(fd: OwnedFd) -> Result<Self, SocketError> {
        let room = getsockopt(&fd, sockopt::SndBuf).map_err(|errno| refused("looking at a socket", errno))?;
        if room < SEND_BUFFER {
            setsockopt(&fd, sockopt::SndBuf, &SEND_BUFFER)
                .map_err(|errno| refused("enlarging a send buffer", errno))?;
        }
        Ok(Self { fd })
    }

    /// Who is at the other end.
    pub fn peer_cred(&self) -> Result<PeerCred, SocketError> {
        let cred = getsockopt(&self.fd, sockopt::PeerCredentials)
            .map_err(|errno| refused("asking for the peer", errno))?;
        Ok(PeerCred { uid: cred.uid(), gid: cred.gid(), pid: cred.pid() })
    }

    /// Who is at the other end, refused unless it is this process's own user.
    ///
    /// Both sides ask: a daemon serves one user, and a client must not hand its data to whoever listens at
    /// a path that anybody could have made.
    pub fn require_same_user(&self) -> Result<PeerCred, SocketError> {
        let cred = self.peer_cred()?;
        let ours = geteuid().as_raw();
        if cred.uid == ours { Ok(cred) } else { Err(SocketError::ForeignPeer { peer: cred.uid, ours }) }
    }

    /// A descriptor that becomes readable when the process at the other end ends.
    ///
    /// The end of the connection is not its death: a grandchild may hold the socket.
    pub fn peer_pidfd(&self) -> Result<OwnedFd, SocketError> {
        let found = match getsockopt(&self.fd, sockopt::PeerPidfd) {
            // Before Linux 6.5 the process can only be looked up by its number. Another process may have
            // that by now if the peer has ended already: then its user differs or the socket says EOF.
            Err(Errno::ENOPROTOOPT) => sys::pidfd_open(self.peer_cred()?.pid),
            // A peer that was reaped already, in kernels that keep no pidfd for it.
            Err(Errno::ESRCH | Errno::EINVAL | Errno::ENODATA) => Err(Errno::ESRCH),
            found => found,
        };
        match found {
            Ok(fd) => Ok(fd),
            Err(Errno::ESRCH) => Err(SocketError::PeerGone),
            Err(errno) => Err(refused("watching the peer's process", errno)),
        }
    }

    /// Sends a frame with its descriptors, or fails at once: a peer that does not read is
    /// [`SocketError::PeerNotReading`].
    pub fn send(&self, frame: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        if frame.is_empty() || frame.len() > MAX_FRAME {
            return Err(SocketError::BadFrameLength { len: frame.len(), max: MAX_FRAME });
        }
        if fds.len() > MAX_FDS {
            return Err(SocketError::TooManyFds { count: fds.len(), max: MAX_FDS });
        }
        loop {
            match sys::send(self.fd.as_fd(), frame, fds, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(SocketError::PeerNotReading),
                Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => return Err(SocketError::Closed),
                Err(Errno::ETOOMANYREFS) => return Err(SocketError::FdsInFlight),
                Err(errno) => return Err(refused("sending a frame", errno)),
            }
        }
    }

    /// Sends like [`send`](Self::send), waiting for the peer to read until the deadline.
    pub fn send_until(
        &self,
        frame: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<(), SocketError> {
        loop {
            match self.send(frame, fds) {
                Err(SocketError::PeerNotReading) => {
                    self.wait(PollFlags::POLLOUT, deadline, "sending a frame")?;
                }
                result => return result,
            }
        }
    }

    /// Receives the next frame, however long it takes. Cleared of what was in it, `fds` holds the frame's
    /// descriptors afterwards; on every error it is empty.
    pub fn recv(&self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<Received, SocketError> {
        loop {
            // EAGAIN: the socket was made non-blocking by whoever shares it.
            match self.recv_flags(buf, fds, 0)? {
                Some(received) => return Ok(received),
                None => self.wait(PollFlags::POLLIN, None, "receiving a frame")?,
            }
        }
    }

    /// Receives the next frame if there is one.
    pub fn try_recv(&self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<Option<Received>, SocketError> {
        self.recv_flags(buf, fds, libc::MSG_DONTWAIT)
    }

    /// Receives the next frame: asks for it again and again for as long as `spin`, which answers sooner
    /// than sleeping, then sleeps until it comes or the deadline passes.
    pub fn recv_spin(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        spin: Duration,
        deadline: Option<Instant>,
    ) -> Result<Received, SocketError> {
        if let Some(received) = self.try_recv(buf, fds)? {
            return Ok(received);
        }
        if !spin.is_zero() {
            let started = Instant::now();
            while started.elapsed() < spin {
                std::hint::spin_loop();
                if let Some(received) = self.try_recv(buf, fds)? {
                    return Ok(received);
                }
            }
        }
        if deadline.is_none() {
            return self.recv(buf, fds);
        }
        loop {
            self.wait(PollFlags::POLLIN, deadline, "receiving a frame")?;
            if let Some(received) = self.try_recv(buf, fds)? {
                return Ok(received);
            }
        }
    }

    /// Ends the connection for both sides: whoever waits on it, in any thread, gets
    /// [`SocketError::Closed`]. Frames that arrived before may still be received.
    pub fn shutdown(&self) {
        // The only refusal is that the peer did it first.
        let _ = socket::shutdown(self.fd.as_raw_fd(), Shutdown::Both);
    }

    fn recv_flags(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        flags: libc::c_int,
    ) -> Result<Option<Received>, SocketError> {
        fds.clear();
        let mut was_reset = false;
        loop {
            let error = match sys::recv(self.fd.as_fd(), buf, fds, flags) {
                Ok(Arrived { len: 1.., cut: false, fds_cut: false }) if fds.len() > MAX_FDS => {
                    SocketError::TooManyFdsReceived { max: MAX_FDS }
                }
                Ok(Arrived { len: len @ 1.., cut: false, fds_cut: false }) => {
                    return Ok(Some(Received { len, fds: fds.len() }));
                }
                // An empty frame is the end, too: nobody who keeps to the protocol sends one.
                Ok(Arrived { len: 0, .. }) => SocketError::Closed,
                Ok(Arrived { len, cut: true, .. }) => SocketError::FrameTruncated { len, room: buf.len() },
                // All that fit came, so it was not our own limit that cut the rest.
                Ok(Arrived { .. }) if fds.len() == MAX_FDS => {
                    SocketError::TooManyFdsReceived { max: MAX_FDS }
                }
                Ok(Arrived { len, .. }) => SocketError::FdsLost { len, limit: fd_limit() },
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Ok(None),
                // The peer closed without having read all that was sent. The kernel says so once, before the
                // frames that the peer sent: its last words are still to be read.
                Err(Errno::ECONNRESET) if !was_reset => {
                    was_reset = true;
                    continue;
                }
                Err(Errno::ECONNRESET | Errno::ENOTCONN) => SocketError::Closed,
                Err(errno) => refused("receiving a frame", errno),
            };
            fds.clear();
            return Err(error);
        }
    }

    /// Sleeps until the socket is ready, has failed or has ended.
    fn wait(
        &self,
        events: PollFlags,
        deadline: Option<Instant>,
        what: &'static str,
    ) -> Result<(), SocketError> {
        loop {
            let left = deadline.map(|deadline| remaining(deadline, what)).transpose()?;
            let mut polled = [PollFd::new(self.fd.as_fd(), events)];
            match ppoll(&mut polled, left.map(TimeSpec::from_duration), None) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(refused(what, errno)),
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Connection> for OwnedFd {
    fn from(connection: Connection) -> OwnedFd {
        connection.fd
    }
}

/// Time that is left, or the error that none is.
fn remaining(deadline: Instant, what: &'static str) -> Result<Duration, SocketError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(SocketError::Deadline { what }) } else { Ok(left) }
}

fn address(path: &Path) -> Result<UnixAddr, SocketError> {
    let len = path.as_os_str().len();
    if len > MAX_PATH {
        return Err(SocketError::PathTooLong { path: path.to_owned(), len, max: MAX_PATH });
    }
    UnixAddr::new(path)
        .map_err(|errno| SocketError::Os { what: format!("using {} as an address", path.display()), errno })
}

fn refused(what: &'static str, errno: Errno) -> SocketError {
    match errno {
        Errno::EMFILE => SocketError::FdLimit { what, limit: fd_limit() },
        errno => SocketError::Os { what: what.to_owned(), errno },
    }
}

fn fd_limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft)
}
