//! A file mapped read-only, as Arrow buffers that keep the mapping alive.
#![allow(unsafe_code, reason = "a mapping of a file is raw memory; this is where it becomes an Arrow buffer")]

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use arrow_buffer::Buffer;
use memmap2::{Advice, Mmap};

use super::{FileError, Format, detect};

/// A file in memory. Cheap to clone; the mapping ends with the last clone and the last buffer made of it.
#[derive(Debug, Clone)]
pub struct MappedFile {
    path: PathBuf,
    file: Arc<File>,
    stamp: Stamp,
    buffer: Buffer,
}

/// What changes when a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl MappedFile {
    /// Maps `path`.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let file = File::open(path).map_err(FileError::io(path, "cannot open it"))?;
        let metadata = file.metadata().map_err(FileError::io(path, "cannot ask for its size"))?;
        if !metadata.is_file() {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
            return Err(FileError::io(path, "cannot map it")(source));
        }
        let stamp = Stamp::of(&metadata);
        // The kernel maps no empty file.
        let buffer = if stamp.size == 0 { Buffer::default() } else { map(path, &file, stamp.size)? };
        Ok(Self { path: path.to_owned(), file: Arc::new(file), stamp, buffer })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All its bytes, and a hold on the mapping.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Its format, by its first bytes.
    pub fn format(&self) -> Result<Format, FileError> {
        detect(&self.buffer).ok_or_else(|| FileError::UnknownFormat { path: self.path.clone() })
    }

    /// Whether the file is still the one that was mapped; to be asked before values are read and again after it.
    pub fn check(&self) -> Result<(), FileError> {
        let metadata = self.file.metadata().map_err(FileError::io(&self.path, "cannot ask for its size"))?;
        if Stamp::of(&metadata) == self.stamp {
            Ok(())
        } else {
            Err(FileError::Changed { path: self.path.clone() })
        }
    }
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

fn map(path: &Path, file: &File, size: u64) -> Result<Buffer, FileError> {
    let size = usize::try_from(size).map_err(|_| {
        FileError::io(path, "cannot map it")(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "larger than memory",
        ))
    })?;
    // SAFETY: the mapping is read-only, private to this module's buffers, and of a regular file. That nobody shortens
    // or rewrites the file meanwhile cannot be proven; the module's head says so, `check` detects it.
    let mapping = unsafe { memmap2::MmapOptions::new().len(size).map(file) };
    let mapping = mapping.map_err(FileError::io(path, "cannot map it"))?;
    // Values are read once, front to back: read ahead of them. Only advice, so a refusal does no harm.
    let _ = mapping.advise(Advice::Sequential);
    let start = NonNull::from(&mapping[..]).cast::<u8>();
    let owner: Arc<Mmap> = Arc::new(mapping);
    // SAFETY: `start` is valid for `size` bytes until `owner`, which the buffer keeps, unmaps them.
    Ok(unsafe { Buffer::from_custom_allocation(start, size, owner) })
}
