//! The system calls of this module that have no safe form which neither allocates nor loses descriptors.
//!
//! (nix allocates for every control message, and returns an error without the descriptors that did arrive
//! when the message was truncated, which leaks them.)
#![allow(
    unsafe_code,
    reason = "sendmsg, recvmsg, accept4 and pidfd_open speak in raw structures and numbers"
)]

use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;

use super::MAX_FDS;

const FD_BYTES: u32 = (MAX_FDS * size_of::<RawFd>()) as u32;
// SAFETY: pure arithmetic, unsafe by declaration only.
const CONTROL_BYTES: usize = unsafe { libc::CMSG_SPACE(FD_BYTES) } as usize;

/// Room for one SCM_RIGHTS message with `MAX_FDS` descriptors, aligned as its header has to be.
#[repr(C)]
union Control {
    bytes: [MaybeUninit<u8>; CONTROL_BYTES],
    _header: libc::cmsghdr,
}

/// What a received message was.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrived {
    /// Bytes of the frame, also of one that was cut.
    pub(super) len: usize,
    /// The frame was longer than the buffer.
    pub(super) cut: bool,
    /// Descriptors of the frame were dropped by the kernel.
    pub(super) fds_cut: bool,
}

/// Sends one frame with its descriptors. The caller has checked that there are at most `MAX_FDS`.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    frame: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: libc::c_int,
) -> Result<usize, Errno> {
    let mut part = libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
    let mut control = Control { bytes: [MaybeUninit::zeroed(); CONTROL_BYTES] };
    // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        assert!(fds.len() <= MAX_FDS, "checked by the caller");
        let bytes = (fds.len() * size_of::<RawFd>()) as u32;
        message.msg_control = (&raw mut control).cast();
        // SAFETY: pure arithmetic.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as _;
        // SAFETY: `control` is aligned for a header and has room for it and MAX_FDS descriptors, which is
        // not less than fds.len(), so the first header and its data lie inside.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(bytes) as _;
            let data = libc::CMSG_DATA(header).cast::<RawFd>();
            for (i, fd) in fds.iter().enumerate() {
                data.add(i).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    // SAFETY: `message` points to one buffer and one control buffer, both alive and as long as it says;
    // sendmsg only reads them.
    Errno::result(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })
        .map(isize::cast_unsigned)
}

/// Receives one frame into `buf` and its descriptors, close-on-exec and owned at once, into `fds`.
pub(super) fn recv(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    flags: libc::c_int,
) -> Result<Arrived, Errno> {
    let mut part = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let mut control = Control { bytes: [MaybeUninit::uninit(); CONTROL_BYTES] };
    // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CONTROL_BYTES as _;
    let flags = flags | libc::MSG_CMSG_CLOEXEC | libc::MSG_TRUNC;
    // SAFETY: `message` points to one buffer and one control buffer, both alive, borrowed mutably and as
    // long as it says.
    let len = Errno::result(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) })?;
    // SAFETY: the kernel has set msg_controllen to what it wrote, so every header that these macros find
    // and its cmsg_len bytes are initialised and inside `control`. The descriptors in it were made for this
    // process by this very call, so nobody else owns them.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for i in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok(Arrived {
        len: len.cast_unsigned(),
        cut: message.msg_flags & libc::MSG_TRUNC != 0,
        fds_cut: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Accepts one connection, close-on-exec.
pub(super) fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    // SAFETY: the caller's address is not asked for, which null pointers say.
    let fd = Errno::result(unsafe {
        libc::accept4(listener.as_raw_fd(), ptr::null_mut(), ptr::null_mut(), libc::SOCK_CLOEXEC)
    })?;
    // SAFETY: accept4 has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor of the process that has this id now.
pub(super) fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: takes two numbers and touches no memory of ours.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: pidfd_open has just made this descriptor for us; it is close-on-exec by definition.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
