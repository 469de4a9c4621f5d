//! What a process of the same user can do to a sealed segment that it was sent: read it, and nothing else.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests attack shared memory through raw pointers and fail by panicking"
)]

mod child;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use memmap2::{MmapOptions, UncheckedAdvice};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::mman::{ProtFlags, mprotect};
use nix::sys::uio::pwrite;
use nix::unistd::{ftruncate, write};
use shmquant_protocol::segment::{Backing, Kind, Mapping, Segment, SegmentName};
use shmquant_protocol::socket::Connection;

const SIZE: u64 = 64 << 10;

fn segment(kind: Kind, id: u64) -> Segment {
    let name = SegmentName { instance: u64::from(std::process::id()), kind, id };
    let segment = Segment::create(Backing::Memfd, &name, SIZE).unwrap();
    fill(&segment, 1);
    segment
}

fn fill(segment: &Segment, value: u8) {
    // SAFETY: all of the segment's own mapping, which nobody has a reference into.
    unsafe { segment.as_ptr().write_bytes(value, segment.len()) }
}

fn bytes(start: *const u8, len: usize) -> Vec<u8> {
    // SAFETY: the callers pass what lies in a mapping that they hold.
    (0..len).map(|i| unsafe { start.add(i).read_volatile() }).collect()
}

/// Sends a segment to a child that plays `role`, answers its first word with `0xAB` in every byte.
fn share(role: &str, segment: &Segment) {
    let (ours, theirs) = Connection::pair().unwrap();
    let child = child::spawn(role, theirs.into());
    ours.send(segment.path().to_str().unwrap().as_bytes(), &[segment.fd()]).unwrap();
    // A child that fails closes the connection: its own words are the better error.
    if ours.recv(&mut [0; 64], &mut Vec::new()).is_ok() {
        if !segment.name().kind.is_client_writable() {
            assert_eq!(bytes(segment.as_ptr(), segment.len()), vec![1; SIZE as usize], "it got through");
        }
        fill(segment, 0xAB);
        ours.send(b"written", &[]).unwrap();
    }
    child::expect_success(role, child);
}

#[test]
fn a_result_is_read_only_for_every_other_process() {
    let segment = segment(Kind::Result, 1);
    share("reader", &segment);
    assert_eq!(bytes(segment.as_ptr(), segment.len()), vec![0xAB; SIZE as usize]);
    // Not even its owner gets a second way to write.
    let again = Mapping::read_write(segment.fd(), SIZE, Backing::Memfd).unwrap_err();
    assert!(again.to_string().contains("Operation not permitted"), "{again}");
}

#[test]
fn windows_and_inputs_keep_their_size() {
    for (id, kind) in [(2, Kind::Window), (3, Kind::Input)] {
        share("writer", &segment(kind, id));
    }
}

#[test]
fn a_segment_carries_its_name_and_is_no_program() {
    let segment = segment(Kind::Result, 4);
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    assert!(maps.contains(&format!("/memfd:{} ", segment.name())), "{maps}");
    let seals = SealFlag::from_bits_retain(fcntl(segment.fd(), FcntlArg::F_GET_SEALS).unwrap());
    let expected = SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_FUTURE_WRITE
        | SealFlag::F_SEAL_SEAL;
    assert!(seals.contains(expected), "{seals:?}");
    // Linux 6.3 and later seal the mode, too.
    let exec = SealFlag::from_bits_retain(0x20);
    if seals.contains(exec) {
        let mode = nix::sys::stat::fstat(segment.fd()).unwrap().st_mode;
        assert_eq!(mode & 0o111, 0, "{mode:o}");
    }
}

#[test]
fn child() {
    let Some(role) = child::role() else { return };
    let stdin = io::stdin().as_fd().try_clone_to_owned().unwrap();
    let parent = Connection::from_fd(stdin).unwrap();
    let (mut buf, mut fds) = ([0; 256], Vec::new());
    let got = parent.recv(&mut buf, &mut fds).unwrap();
    let path = PathBuf::from(std::str::from_utf8(&buf[..got.len]).unwrap());
    let fd = fds.pop().unwrap();
    match role.as_str() {
        "reader" => read_only(&parent, &fd, &path),
        "writer" => write_but_not_resize(&parent, &fd, &path),
        other => panic!("no such role: {other}"),
    }
    println!("{}", child::done(&role));
}

fn read_only(parent: &Connection, fd: &OwnedFd, path: &Path) {
    let view = Mapping::read_only(fd.as_fd(), SIZE, Backing::Memfd).unwrap();
    assert_eq!(bytes(view.as_ptr(), view.len()), vec![1; SIZE as usize]);
    for (way, fd) in ways_in(fd, path) {
        try_to_write(&way, &fd);
        try_to_resize(&way, &fd);
    }
    let start = NonNull::new(view.as_ptr().cast_mut()).unwrap().cast();
    // SAFETY: all of a mapping held here; nothing of it is used as if it could not be written.
    let protect = unsafe { mprotect(start, view.len(), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE) };
    assert_eq!(protect, Err(Errno::EACCES));

    parent.send(b"tried", &[]).unwrap();
    parent.recv(&mut [0; 64], &mut Vec::new()).unwrap();
    assert_eq!(bytes(view.as_ptr(), view.len()), vec![0xAB; SIZE as usize], "the owner keeps writing");
}

fn write_but_not_resize(parent: &Connection, fd: &OwnedFd, path: &Path) {
    let view = Mapping::read_write(fd.as_fd(), SIZE, Backing::Memfd).unwrap();
    for (way, fd) in ways_in(fd, path) {
        try_to_resize(&way, &fd);
        // The same calls that a result refuses do work here: it is the seal that stops them.
        assert_eq!(pwrite(&fd, &[2; 100], 0), Ok(100), "{way}");
        assert!(MmapOptions::new().len(SIZE as usize).map_raw(fd.as_raw_fd()).is_ok(), "{way}");
    }
    assert_eq!(bytes(view.as_ptr(), 100), [2; 100]);

    parent.send(b"written", &[]).unwrap();
    parent.recv(&mut [0; 64], &mut Vec::new()).unwrap();
    assert_eq!(bytes(view.as_ptr(), view.len()), vec![0xAB; SIZE as usize]);
}

/// The descriptor as it was sent, and opened anew for writing by every path there is to it.
fn ways_in(fd: &OwnedFd, path: &Path) -> Vec<(String, OwnedFd)> {
    let own = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let mut ways = vec![("as sent".to_owned(), fd.try_clone().unwrap())];
    for path in [own.as_path(), path] {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        ways.push((format!("by {}", path.display()), file.into()));
        let truncated = OpenOptions::new().write(true).truncate(true).open(path).unwrap_err();
        assert_eq!(truncated.raw_os_error(), Some(libc::EPERM), "O_TRUNC of {}", path.display());
    }
    ways
}

fn try_to_write(way: &str, fd: &OwnedFd) {
    assert_eq!(write(fd, &[2; 16]), Err(Errno::EPERM), "write {way}");
    assert_eq!(pwrite(fd, &[2; 16], 4096), Err(Errno::EPERM), "pwrite {way}");
    // copy_file_range, sendfile or splice: whatever the standard library finds best.
    let mut source = tempfile::tempfile().unwrap();
    io::Write::write_all(&mut source, &[2; 4096]).unwrap();
    io::Seek::rewind(&mut source).unwrap();
    let copied = io::copy(&mut source, &mut File::from(fd.try_clone().unwrap())).unwrap_err();
    assert_eq!(copied.kind(), io::ErrorKind::PermissionDenied, "copy {way}");

    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let punch = fallocate(fd, FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep, 0, 4096);
    assert_eq!(punch, Err(Errno::EPERM), "punch a hole {way}");
    let zero = fallocate(fd, FallocateFlags::FALLOC_FL_ZERO_RANGE | keep, 0, 4096);
    assert!(zero.is_err(), "zero a range {way}");

    let map = MmapOptions::new().len(SIZE as usize).map_raw(fd.as_raw_fd()).unwrap_err();
    assert_eq!(map.raw_os_error(), Some(libc::EPERM), "map {way} for writing");
    let map = MmapOptions::new().len(SIZE as usize).map_raw_read_only(fd.as_raw_fd()).unwrap();
    let start = NonNull::new(map.as_mut_ptr()).unwrap().cast();
    // SAFETY: all of a mapping held here; nothing of it is used as if it could not be written.
    let protect = unsafe { mprotect(start, map.len(), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE) };
    assert_eq!(protect, Err(Errno::EACCES), "mprotect {way}");
    // SAFETY: as above; should it succeed, the bytes become zeros, which raw pointers bear.
    let removed = unsafe { map.unchecked_advise_range(UncheckedAdvice::Remove, 0, 4096) };
    assert!(removed.is_err(), "MADV_REMOVE {way}");
}

fn try_to_resize(way: &str, fd: &OwnedFd) {
    for size in [0, SIZE as i64 - 1, SIZE as i64 + 1] {
        assert_eq!(ftruncate(fd, size), Err(Errno::EPERM), "truncate {way} to {size}");
    }
    let grow = fallocate(fd, FallocateFlags::empty(), 0, SIZE as i64 + 4096);
    assert_eq!(grow, Err(Errno::EPERM), "grow {way}");
    let seal = fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE));
    assert_eq!(seal, Err(Errno::EPERM), "seal {way}");
}
