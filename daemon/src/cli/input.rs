//! Files as tables or layers, whatever their format.

use std::fs::File;
use std::path::Path;

use arrow_array::RecordBatch;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use shmquant_protocol::files::arrow_ipc::{self, Batches};
use shmquant_protocol::files::safetensors::{self, OtherTypes, Tensors};
use shmquant_protocol::files::{Format, MappedFile};

use super::error::CliError;

/// Most rows of a Parquet file in one batch, and most bytes, since offsets into a batch's binary values have 31 bits.
const PARQUET_ROWS: usize = 1 << 16;
const PARQUET_BYTES: i64 = 1 << 30;

/// A file that has been opened: what it is, how large, and what is in it.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) format: Format,
    pub(super) bytes: u64,
    pub(super) content: Content,
    file: MappedFile,
}

/// What is in a file.
#[derive(Debug)]
pub(super) enum Content {
    Tensors(Tensors),
    Table(Batches),
}

impl Input {
    /// Opens `path` by its first bytes, not by its name.
    pub(super) fn open(path: &Path, other: OtherTypes) -> Result<Self, CliError> {
        let file = MappedFile::open(path)?;
        let format = file.format()?;
        let content = match format {
            Format::Safetensors => Content::Tensors(safetensors::read(&file, other)?),
            Format::ArrowFile | Format::ArrowStream => Content::Table(arrow_ipc::read(&file)?),
            Format::Parquet => Content::Table(parquet(path)?),
        };
        Ok(Self { format, bytes: file.len() as u64, content, file })
    }

    /// Whether what has been read is of one version of the file.
    pub(super) fn check(&self) -> Result<(), CliError> {
        Ok(self.file.check()?)
    }
}

fn parquet(path: &Path) -> Result<Batches, CliError> {
    let file = File::open(path).map_err(CliError::io(path, "cannot open it"))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(CliError::parquet(path))?;
    let schema = builder.schema().clone();
    let groups = builder.metadata().row_groups();
    let (rows, bytes) = groups.iter().fold((0i64, 0i64), |(rows, bytes), group| {
        (rows.saturating_add(group.num_rows()), bytes.saturating_add(group.total_byte_size()))
    });
    let row = bytes / rows.max(1) + 1;
    let rows = usize::try_from(PARQUET_BYTES / row).unwrap_or(1).clamp(1, PARQUET_ROWS);
    let reader = builder.with_batch_size(rows).build().map_err(CliError::parquet(path))?;
    let batches: Result<Vec<RecordBatch>, _> = reader.collect();
    let batches = batches.map_err(|error| CliError::parquet(path)(error.into()))?;
    Ok(Batches { schema, batches })
}
