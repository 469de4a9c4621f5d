//! Result files: written without a name in the folder of their place and then put there, so that nobody ever sees half a
//! file, and a kill in the middle leaves nothing behind.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;
use arrow_ipc::writer::FileWriter;
use arrow_schema::{ArrowError, SchemaRef};
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::libc::O_TMPFILE;
use nix::unistd::linkat;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use tempfile::{Builder, NamedTempFile};

use super::error::CliError;

const BUFFER: usize = 1 << 20;
/// What names begin with that a file has on its way.
const PREFIX: &str = ".shmquant.";
/// As any new file: what the umask leaves of it.
const MODE: u32 = 0o666;

/// A format that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Arrow,
    Parquet,
    Safetensors,
}

impl Kind {
    /// By the name's extension.
    pub(super) fn of(path: &Path) -> Result<Self, CliError> {
        let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default().to_ascii_lowercase();
        match extension.as_str() {
            "arrow" | "ipc" | "feather" => Ok(Self::Arrow),
            "parquet" | "pq" => Ok(Self::Parquet),
            "safetensors" => Ok(Self::Safetensors),
            _ => Err(CliError::told(
                format!("{}: the name does not tell a format", path.display()),
                "end it with .arrow, .parquet or .safetensors",
            )),
        }
    }
}

/// A file on its way.
#[derive(Debug)]
pub(super) struct Sink {
    path: PathBuf,
    file: Place,
}

#[derive(Debug)]
enum Place {
    /// Gets a name when it is complete; gone with this process when it never is.
    Unnamed(File),
    /// The same under a name from the start, where the file system has no files without.
    Beside(NamedTempFile),
    /// There is a device or a pipe of that name: written to as it is.
    There(File),
}

impl Sink {
    pub(super) fn create(path: &Path) -> Result<Self, CliError> {
        let special = fs::metadata(path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir());
        let file = if special {
            let opened = File::options().write(true).open(path);
            Place::There(opened.map_err(CliError::io(path, "cannot open it"))?)
        } else {
            let dir = folder(path);
            match File::options().read(true).write(true).mode(MODE).custom_flags(O_TMPFILE).open(dir) {
                Ok(file) => Place::Unnamed(file),
                // Whatever it was, this says it about the name that was asked for.
                Err(_) => {
                    let mut builder = Builder::new();
                    builder.prefix(PREFIX).permissions(Permissions::from_mode(MODE));
                    let file = builder.tempfile_in(dir);
                    Place::Beside(file.map_err(CliError::io(path, "cannot create it"))?)
                }
            }
        };
        Ok(Self { path: path.to_owned(), file })
    }

    /// Writes bytes as they are.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        self.file().write_all(bytes).map_err(CliError::io(&self.path, "cannot write it"))
    }

    /// Writes record batches as an Arrow IPC file.
    pub(super) fn arrow(&mut self, schema: &SchemaRef, batches: &[RecordBatch]) -> Result<(), CliError> {
        let path = self.path.clone();
        let write = |out: BufWriter<&mut File>| -> Result<(), ArrowError> {
            let mut writer = FileWriter::try_new(out, schema)?;
            for batch in batches {
                writer.write(batch)?;
            }
            writer.finish()
        };
        write(self.buffered())
            .map_err(|error| CliError::io(&path, "cannot write it")(io::Error::other(error)))
    }

    /// Writes record batches as a Parquet file.
    pub(super) fn parquet(&mut self, schema: &SchemaRef, batches: &[RecordBatch]) -> Result<(), CliError> {
        let path = self.path.clone();
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(1).map_err(CliError::parquet(&path))?))
            .set_created_by(format!("shmquant {}", env!("CARGO_PKG_VERSION")));
        let write = |out: BufWriter<&mut File>| {
            let mut writer = ArrowWriter::try_new(out, schema.clone(), Some(properties.build()))?;
            for batch in batches {
                writer.write(batch)?;
            }
            writer.close().map(|_| ())
        };
        write(self.buffered()).map_err(CliError::parquet(&path))
    }

    /// For writers of other formats.
    pub(super) fn buffered(&mut self) -> BufWriter<&mut File> {
        BufWriter::with_capacity(BUFFER, self.file())
    }

    /// Moves the file to its place and tells its size.
    pub(super) fn finish(self) -> Result<u64, CliError> {
        let Self { path, file } = self;
        let size = match file {
            Place::Unnamed(file) => {
                name(&file, &path).map_err(CliError::io(&path, "cannot create it"))?;
                file.metadata().map(|m| m.len())
            }
            Place::Beside(file) => {
                let file =
                    file.persist(&path).map_err(|e| CliError::io(&path, "cannot create it")(e.error))?;
                file.metadata().map(|m| m.len())
            }
            Place::There(file) => file.metadata().map(|m| m.len()),
        };
        size.map_err(CliError::io(&path, "cannot ask for its size"))
    }

    fn file(&mut self) -> &mut File {
        match &mut self.file {
            Place::Beside(file) => file.as_file_mut(),
            Place::Unnamed(file) | Place::There(file) => file,
        }
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Gives a file without a name the name `path`, whatever had it before: a link takes no name that is taken, so the file
/// has another for a moment.
fn name(file: &File, path: &Path) -> io::Result<()> {
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    let link = |at: &Path| {
        linkat(AT_FDCWD, open.as_str(), AT_FDCWD, at, AtFlags::AT_SYMLINK_FOLLOW).map_err(io::Error::from)
    };
    let named = Builder::new().prefix(PREFIX).make_in(folder(path), link)?;
    named.into_temp_path().persist(path).map_err(|e| e.error)
}
