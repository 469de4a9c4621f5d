//! What can go wrong between two ends of a connection.

use std::path::PathBuf;

use nix::errno::Errno;
use thiserror::Error;

/// Why a frame did not go out or come in, or why there is no connection.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The peer closed the connection, died, or it was shut down on this side.
    #[error("the connection is closed")]
    Closed,

    /// The peer has not read its frames for so long that the socket is full. A daemon disconnects it.
    #[error("the peer does not read: its socket is full")]
    PeerNotReading,

    /// Nothing could be sent or received until the deadline of the caller.
    #[error("the deadline passed while {what}")]
    Deadline {
        /// What was waited for.
        what: &'static str,
    },

    /// The frame is longer than the buffer it was received into. Its bytes and descriptors are gone: the
    /// peer broke the protocol.
    #[error("a frame of {len} bytes came where at most {room} are allowed")]
    FrameTruncated {
        /// Bytes of the frame.
        len: usize,
        /// Bytes of the buffer.
        room: usize,
    },

    /// A frame came without some of its descriptors, because this process has none left
    /// (`RLIMIT_NOFILE`). Its bytes are in the buffer, so that the request it answers can be told and the
    /// descriptors asked for again; those that did come were closed.
    #[error(
        "descriptors of a frame were lost: this process has used all {limit} of its file descriptors\n\
         hint: raise the limit with `ulimit -n`"
    )]
    FdsLost {
        /// Bytes of the frame, all of them in the buffer.
        len: usize,
        /// `RLIMIT_NOFILE`.
        limit: u64,
    },

    /// A frame came with more descriptors than any may have. They were closed: the peer broke the protocol.
    #[error("a frame came with more than {max} descriptors")]
    TooManyFdsReceived {
        /// Descriptors a frame may have.
        max: usize,
    },

    /// A frame that is empty or too long was to be sent. A fault of the calling code.
    #[error("a frame has 1 to {max} bytes, not {len}")]
    BadFrameLength {
        /// Its length.
        len: usize,
        /// The longest there is.
        max: usize,
    },

    /// More descriptors than a frame may have were to be sent. A fault of the calling code.
    #[error("a frame has at most {max} descriptors, not {count}")]
    TooManyFds {
        /// How many there were.
        count: usize,
        /// How many may be.
        max: usize,
    },

    /// The user has too many descriptors in flight: sent, but not yet received by anybody.
    #[error("too many file descriptors of this user are in flight")]
    FdsInFlight,

    /// This process has no descriptor left for a connection. One that was waiting to be accepted was
    /// closed.
    #[error(
        "{what}: this process has used all {limit} of its file descriptors\n\
         hint: raise the limit with `ulimit -n` (LimitNOFILE= in a systemd unit)"
    )]
    FdLimit {
        /// What needed the descriptor.
        what: &'static str,
        /// `RLIMIT_NOFILE`.
        limit: u64,
    },

    /// Nobody listens at this address.
    #[error("no daemon listens at {}", .path.display())]
    NotListening {
        /// The address.
        path: PathBuf,
    },

    /// A living daemon serves this address already.
    #[error("a daemon already serves {}", .path.display())]
    AlreadyServed {
        /// The address.
        path: PathBuf,
    },

    /// The directory of the socket is not this user's alone, so what is in it cannot be trusted.
    #[error(
        "{} is not a directory of this user alone ({reason})\n\
         hint: `chmod 700` it, or choose another address (SHMQUANT_ADDRESS)", .path.display()
    )]
    UnsafeDirectory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// There is something at the address that is not a socket, and it is not ours to remove.
    #[error("{} exists and is not a socket", .path.display())]
    NotASocket {
        /// The address.
        path: PathBuf,
    },

    /// The address does not fit into a socket address.
    #[error(
        "{} is {len} bytes long and a socket's path has at most {max}\n\
         hint: choose a shorter address (SHMQUANT_ADDRESS)", .path.display()
    )]
    PathTooLong {
        /// The address.
        path: PathBuf,
        /// Its length.
        len: usize,
        /// The longest there is.
        max: usize,
    },

    /// The process at the other end belongs to another user.
    #[error("the peer is user {peer}, and only user {ours} is served here")]
    ForeignPeer {
        /// User id of the peer.
        peer: u32,
        /// User id of this process.
        ours: u32,
    },

    /// The process at the other end is dead already.
    #[error("the peer has ended")]
    PeerGone,

    /// Any other refusal of the kernel.
    #[error("{what}: {}", .errno.desc())]
    Os {
        /// What was tried.
        what: String,
        /// How the kernel refused.
        errno: Errno,
    },
}
