//! The memfd backing: anonymous memory that the kernel itself keeps from shrinking and, for results, from
//! being written by anybody but its maker.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::limits::{Step, refused};
use super::{Backing, Kind, SegmentError, SegmentName};

/// A new, empty memfd that carries the segment's name and can be sealed.
pub(super) fn create(name: &SegmentName, size: u64) -> Result<OwnedFd, SegmentError> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    // Linux 6.3 and later: data, never a program. Hosts may demand it (vm.memfd_noexec), older kernels do
    // not know it.
    let noexec = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
    let label = name.to_string();
    let made = match memfd_create(label.as_str(), flags | noexec) {
        Err(Errno::EINVAL) => memfd_create(label.as_str(), flags),
        made => made,
    };
    made.map_err(|errno| refused(Step::Create, errno, Backing::Memfd, name, size))
}

/// Seals a populated, mapped memfd for good.
///
/// `FUTURE_WRITE` leaves the owner's existing mapping writable and refuses every other way to write, which
/// is why it comes after the mapping, and why that mapping cannot be made again.
pub(super) fn seal(fd: BorrowedFd<'_>, name: &SegmentName, size: u64) -> Result<(), SegmentError> {
    let mut seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    if name.kind == Kind::Result {
        seals |= SealFlag::F_SEAL_FUTURE_WRITE;
    }
    fcntl(fd, FcntlArg::F_ADD_SEALS(seals))
        .map(drop)
        .map_err(|errno| refused(Step::Seal, errno, Backing::Memfd, name, size))
}

/// Whether nobody can make the object behind this descriptor smaller.
pub(super) fn check_cannot_shrink(fd: impl AsFd) -> Result<(), SegmentError> {
    // EINVAL is what objects that know no seals say.
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS).unwrap_or(0);
    if SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK) {
        Ok(())
    } else {
        Err(SegmentError::NotSealed { seals })
    }
}
