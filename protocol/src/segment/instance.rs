//! The instance file of a daemon with POSIX segments, by which the next daemon knows what it may sweep.
//!
//! `/dev/shm/shmquant.<instance>.lock` is flock'd by the daemon for as long as it lives. The kernel drops
//! the lock with the process, however it ends, so an unlocked instance file means a dead daemon, and
//! everything that carries its instance in the name is nobody's.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use super::limits::{SHM_DIR, fd_refused};
use super::name::{PREFIX, parse_instance};
use super::{SegmentError, SegmentName};
use crate::failpoint::failpoint;

/// How often a new instance file may be taken from under us by sweepers before that is an error.
const ATTEMPTS: u32 = 64;

/// Says, for as long as it lives, that the POSIX segments of this instance have an owner.
///
/// Taken before the first segment is made and dropped after the last one is gone.
#[derive(Debug)]
pub struct InstanceGuard {
    instance: u64,
    path: PathBuf,
    lock: Flock<File>,
}

impl InstanceGuard {
    /// Announces an instance. Its number has to be fresh: one that is announced already is
    /// [`SegmentError::NameTaken`].
    pub fn acquire(instance: u64) -> Result<Self, SegmentError> {
        let path = Path::new(SHM_DIR).join(format!("{PREFIX}{instance:016x}.lock"));
        for _ in 0..ATTEMPTS {
            let file = match open_options().create_new(true).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(SegmentError::NameTaken { name: path.display().to_string() });
                }
                Err(error) => return Err(failed("creating", &path, &error)),
            };
            // Blocking is right: only a sweeper that saw the file before it was locked can hold it, and it
            // lets go at once.
            match lock(file, FlockArg::LockExclusive) {
                Ok(lock) if is_at(&lock, &path) => return Ok(Self { instance, path, lock }),
                // That sweeper took the file for a dead daemon's and removed it.
                Ok(_) => {}
                Err(errno) => {
                    let _ = fs::remove_file(&path);
                    return Err(fd_refused(format!("locking {}", path.display()), errno));
                }
            }
        }
        Err(SegmentError::Os { what: format!("locking {}", path.display()), errno: Errno::EAGAIN })
    }

    /// The number of this instance.
    pub fn instance(&self) -> u64 {
        self.instance
    }

    /// Where the instance file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for InstanceGuard {
    fn drop(&mut self) {
        // While segments of ours are left, the file has to stay: it is what lets the next daemon sweep them.
        let clean = matches!(segments_of(self.instance), Ok(left) if left.is_empty());
        if clean && is_at(&self.lock, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What a sweep removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Dead daemons whose traces were removed.
    pub instances: u64,
    /// Segments that were removed.
    pub segments: u64,
    /// Bytes of memory these segments held.
    pub bytes: u64,
}

/// Removes what killed daemons of this user left in `/dev/shm`, and never what a live one owns.
///
/// Two sweepers at once are fine, and so is a daemon that starts meanwhile. Segments without an instance
/// file are left alone: nothing proves that their owner is dead.
pub fn sweep_stale() -> Result<Swept, SegmentError> {
    let mut swept = Swept::default();
    for entry in shm_entries()? {
        let Some(instance) = entry.strip_suffix(".lock").and_then(|stem| {
            let digits = stem.strip_prefix(PREFIX)?;
            parse_instance(digits)
        }) else {
            continue;
        };
        let path = Path::new(SHM_DIR).join(&entry);
        // Gone meanwhile, or another user's: not ours to sweep.
        let Ok(file) = open_options().open(&path) else { continue };
        let Ok(lock) = lock(file, FlockArg::LockExclusiveNonblock) else { continue };
        // Without this, a file that was swept and made anew between open and flock would be a live one's.
        if !is_at(&lock, &path) || !is_ours(&path) {
            continue;
        }
        for segment in segments_of(instance)? {
            let path = Path::new(SHM_DIR).join(segment.to_string());
            if let Ok(meta) = fs::symlink_metadata(&path)
                && is_ours(&path)
                && fs::remove_file(&path).is_ok()
            {
                swept.segments += 1;
                swept.bytes += meta.blocks() * 512;
                failpoint("daemon.sweeping");
            }
        }
        // Last of all, so that a sweeper killed half-way is followed by another.
        if fs::remove_file(&path).is_ok() {
            swept.instances += 1;
        }
    }
    Ok(swept)
}

fn open_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options
}

fn lock(file: File, how: FlockArg) -> Result<Flock<File>, Errno> {
    let mut file = file;
    loop {
        match Flock::lock(file, how) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EINTR)) => file = back,
            Err((_, errno)) => return Err(errno),
        }
    }
}

/// Whether the locked file is (still) the one at `path`.
fn is_at(lock: &Flock<File>, path: &Path) -> bool {
    match (lock.metadata(), fs::symlink_metadata(path)) {
        (Ok(held), Ok(found)) => held.dev() == found.dev() && held.ino() == found.ino(),
        _ => false,
    }
}

fn is_ours(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.uid() == geteuid().as_raw())
}

fn segments_of(instance: u64) -> Result<Vec<SegmentName>, SegmentError> {
    let names = shm_entries()?.into_iter().filter_map(|entry| entry.parse::<SegmentName>().ok());
    Ok(names.filter(|name| name.instance == instance).collect())
}

fn shm_entries() -> Result<Vec<String>, SegmentError> {
    let dir = Path::new(SHM_DIR);
    let entries = fs::read_dir(dir).map_err(|error| failed("listing", dir, &error))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| OsStr::new(name).as_encoded_bytes().starts_with(PREFIX.as_bytes())).collect())
}

fn failed(verb: &str, path: &Path, error: &io::Error) -> SegmentError {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    fd_refused(format!("{verb} {}", path.display()), errno)
}
