//! Files as input without copying: safetensors and Arrow IPC files, mapped.
//!
//! A mapped file is read where it lies, which has a price that no program can refuse: if another process truncates it
//! while it is mapped, the next access to the missing part ends this process with SIGBUS. Nobody truncates a model in
//! place on purpose (writers make a new file and rename it, which is harmless here), so the files are mapped all the
//! same; [`MappedFile::check`] tells whether size, modification time and inode are still what they were, and is asked
//! again after the values have been read, because values of two versions of a file are worth nothing.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use arrow_schema::ArrowError;

pub mod arrow_ipc;
mod mapped;
pub mod safetensors;

pub use mapped::MappedFile;

/// First bytes of an Arrow IPC file, and its last ones.
const ARROW_MAGIC: &[u8] = b"ARROW1";
/// First and last bytes of a Parquet file.
const PARQUET_MAGIC: &[u8] = b"PAR1";
/// What a message of an Arrow IPC stream starts with.
const CONTINUATION: &[u8] = &[0xff; 4];

/// A file format, told by a file's first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// safetensors: a header in JSON, then tensors.
    Safetensors,
    /// Arrow IPC, file format (also called Feather 2).
    ArrowFile,
    /// Arrow IPC, stream format.
    ArrowStream,
    /// Parquet.
    Parquet,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Safetensors => "safetensors",
            Self::ArrowFile => "Arrow IPC file",
            Self::ArrowStream => "Arrow IPC stream",
            Self::Parquet => "Parquet",
        })
    }
}

/// The format of a file that begins with `bytes`; `None` if it is none of those known.
pub fn detect(bytes: &[u8]) -> Option<Format> {
    if bytes.starts_with(ARROW_MAGIC) {
        return Some(Format::ArrowFile);
    }
    if bytes.starts_with(PARQUET_MAGIC) {
        return Some(Format::Parquet);
    }
    if bytes.starts_with(CONTINUATION) {
        return Some(Format::ArrowStream);
    }
    // safetensors has no magic: eight bytes of header length, then the header, a JSON object.
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let plausible = (2..=100_000_000).contains(&u64::from_le_bytes(*length));
    (plausible && rest.first() == Some(&b'{')).then_some(Format::Safetensors)
}

/// Why a file could not be used. The path is the one that was given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The system refused: the file is missing, unreadable, or the disk is full.
    #[error("{}: {what}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// How the system refused.
        source: io::Error,
    },

    /// The file begins like none of the known formats.
    #[error(
        "{} is no safetensors, Arrow IPC or Parquet file\n\
         hint: pickled checkpoints (.pt, .bin) can be converted with `safetensors.torch.save_file`", .path.display()
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },

    /// The file is of another format than the one it was opened as.
    #[error("{} is not a {expected} file", .path.display())]
    WrongFormat {
        /// The file.
        path: PathBuf,
        /// What was expected.
        expected: Format,
    },

    /// The file breaks its format: it was damaged, or cut off while it was copied.
    #[error("{}: {what}\nhint: the file is damaged or incomplete; copy or download it again", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which rule is broken.
        what: String,
    },

    /// A tensor is of a type that is not quantized, and the caller did not allow to leave it out.
    #[error(
        "{}: tensor {name:?} is {dtype}, and only F16, BF16, F32 and F64 can be quantized\n\
         hint: leave out the tensors of other types", .path.display()
    )]
    UnsupportedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type, as the file has it.
        dtype: String,
    },

    /// Somebody wrote the file while it was read. What has been read belongs to no version of it.
    #[error("{} was changed while it was read\nhint: try again when its writer has finished", .path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },

    /// Two tensors of one name were to be written.
    #[error("{}: there are two tensors named {name:?}", .path.display())]
    DuplicateTensor {
        /// The file.
        path: PathBuf,
        /// The name.
        name: String,
    },
}

impl FileError {
    fn io(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), what, source }
    }

    fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.into() }
    }

    fn arrow(path: &Path) -> impl FnOnce(ArrowError) -> Self {
        move |error| Self::damaged(path, error.to_string())
    }
}
