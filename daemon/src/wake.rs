//! How other threads wake a lane that waits for its client at the same time.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// A flag that can be polled beside a socket.
#[derive(Debug)]
pub(crate) struct Wake(EventFd);

impl Wake {
    pub(crate) fn new() -> Result<Self, Errno> {
        EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map(Self)
    }

    /// Raises the flag.
    pub(crate) fn signal(&self) {
        // It can only fail when the count is at 2^64 - 2: then the flag is up.
        let _ = self.0.write(1);
    }

    /// Lowers the flag.
    pub(crate) fn clear(&self) {
        let _ = self.0.read();
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
