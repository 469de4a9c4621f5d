//! Arrow IPC files and streams, read where they lie.
//!
//! The reader of `arrow-ipc` trusts the buffers' places in a message and panics where they are wrong, so every message
//! is checked here first: its own place in the file, and that of each of its buffers in its body. The few panics that
//! are left in it (lengths whose product overflows) end in an error too.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_ipc::convert::try_fb_to_schema;
use arrow_ipc::reader::{FileDecoder, StreamDecoder, read_footer_length};
use arrow_ipc::{Block, Message, RecordBatch as Layout, root_as_footer, root_as_message};
use arrow_schema::{Schema, SchemaRef};

use super::{FileError, Format, MappedFile};

/// What the last ten bytes of a file hold: the footer's length and the magic.
const TRAILER: usize = 10;
/// Bytes before the metadata of a message: continuation and length.
const PREFIX: usize = 8;

/// A file's table. The batches' buffers are the mapping, but for compressed or misaligned ones, which are copied.
#[derive(Debug, Clone)]
pub struct Batches {
    /// The schema, also where there are no batches.
    pub schema: SchemaRef,
    /// The record batches.
    pub batches: Vec<RecordBatch>,
}

impl Batches {
    /// Rows in all.
    pub fn rows(&self) -> u64 {
        self.batches.iter().map(|batch| batch.num_rows() as u64).sum()
    }
}

/// Reads a mapped Arrow IPC file, or a stream kept in a file.
pub fn read(file: &MappedFile) -> Result<Batches, FileError> {
    match file.format()? {
        Format::ArrowFile => read_file(file.path(), file.buffer()),
        Format::ArrowStream => read_stream(file.path(), file.buffer()),
        Format::Safetensors | Format::Parquet => {
            Err(FileError::WrongFormat { path: file.path().to_owned(), expected: Format::ArrowFile })
        }
    }
}

/// Reads bytes of the file format, for example those of a leased result; `path` is for errors.
pub fn read_file(path: &Path, bytes: &Buffer) -> Result<Batches, FileError> {
    guarded(path, || parse_file(path, bytes))
}

/// Reads bytes of the stream format; `path` is for errors.
pub fn read_stream(path: &Path, bytes: &Buffer) -> Result<Batches, FileError> {
    guarded(path, || parse_stream(path, bytes))
}

fn guarded(path: &Path, read: impl FnOnce() -> Result<Batches, FileError>) -> Result<Batches, FileError> {
    // Nothing outlives a panic: the reader only builds values of its own, and the bytes are immutable.
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(FileError::damaged(path, "Arrow IPC: impossible lengths")))
}

fn parse_file(path: &Path, bytes: &Buffer) -> Result<Batches, FileError> {
    let damaged = |what: &str| FileError::damaged(path, format!("Arrow IPC file: {what}"));
    let (rest, trailer) = bytes.split_last_chunk::<TRAILER>().ok_or_else(|| damaged("no footer"))?;
    let footer_length = read_footer_length(*trailer).map_err(|_| damaged("it does not end with a footer"))?;
    let footer = rest.len().checked_sub(footer_length).ok_or_else(|| damaged("the footer is cut off"))?;
    // Flatbuffers want an alignment that footers of some writers do not have.
    let footer = Buffer::from(&rest[footer..]);
    let footer = root_as_footer(&footer).map_err(|e| damaged(&format!("footer: {e}")))?;
    let schema = footer.schema().ok_or_else(|| damaged("the footer has no schema"))?;
    if !schema.endianness().equals_to_target_endianness() {
        return Err(damaged("its byte order is not this machine's"));
    }
    let schema: SchemaRef = Arc::new(try_fb_to_schema(schema).map_err(FileError::arrow(path))?);
    let mut decoder = FileDecoder::new(schema.clone(), footer.version());
    for block in footer.dictionaries().iter().flatten() {
        let message = message_of(path, bytes, block)?;
        decoder.read_dictionary(block, &message).map_err(FileError::arrow(path))?;
    }
    let mut batches = Vec::new();
    for block in footer.recordBatches().iter().flatten() {
        let message = message_of(path, bytes, block)?;
        batches.extend(decoder.read_record_batch(block, &message).map_err(FileError::arrow(path))?);
    }
    Ok(Batches { schema, batches })
}

fn parse_stream(path: &Path, bytes: &Buffer) -> Result<Batches, FileError> {
    let mut decoder = StreamDecoder::new();
    let mut batches = Vec::new();
    let mut rest = bytes.clone();
    while !rest.is_empty() {
        let Some(length) = stream_message(path, &rest)? else { break };
        let mut message = rest.slice_with_length(0, length);
        while !message.is_empty() {
            batches.extend(decoder.decode(&mut message).map_err(FileError::arrow(path))?);
        }
        rest = rest.slice(length);
    }
    let schema = decoder.schema().ok_or_else(|| FileError::damaged(path, "Arrow IPC stream: no schema"))?;
    Ok(Batches { schema, batches })
}

/// The schema alone: of a file from its footer, of a stream from its first message.
pub fn schema(file: &MappedFile) -> Result<Schema, FileError> {
    let (path, bytes) = (file.path(), file.buffer());
    if file.format()? == Format::ArrowStream {
        let length = stream_message(path, bytes)?.ok_or_else(|| FileError::damaged(path, "it is empty"))?;
        return arrow_ipc::convert::try_schema_from_ipc_buffer(&bytes[..length])
            .map_err(FileError::arrow(path));
    }
    read(file).map(|batches| batches.schema.as_ref().clone())
}

/// The bytes of a file's block, checked.
fn message_of(path: &Path, bytes: &Buffer, block: &Block) -> Result<Buffer, FileError> {
    let damaged = |what: String| FileError::damaged(path, format!("Arrow IPC file: {what}"));
    let (offset, metadata, body) = (block.offset(), block.metaDataLength(), block.bodyLength());
    let place = || {
        let (offset, metadata) = (usize::try_from(offset).ok()?, usize::try_from(metadata).ok()?);
        let length = metadata.checked_add(usize::try_from(body).ok()?)?;
        (metadata >= PREFIX && offset.checked_add(length)? <= bytes.len())
            .then_some((offset, metadata, length))
    };
    let (offset, metadata, length) = place()
        .ok_or_else(|| damaged(format!("a message of {metadata} + {body} bytes at {offset} is outside")))?;
    let message = bytes.slice_with_length(offset, length);
    // Before 0.15 there was no continuation, only the length.
    let skip = if message.starts_with(super::CONTINUATION) { PREFIX } else { PREFIX / 2 };
    let parsed = root_as_message(&message[skip..metadata]).map_err(|e| damaged(format!("message: {e}")))?;
    check_buffers(&parsed, &message[metadata..]).map_err(damaged)?;
    Ok(message)
}

/// Length of a stream's next message, body and padding included, checked; `None` at its end.
fn stream_message(path: &Path, bytes: &[u8]) -> Result<Option<usize>, FileError> {
    let damaged = |what: String| FileError::damaged(path, format!("Arrow IPC stream: {what}"));
    let cut = || damaged("it is cut off inside a message".to_owned());
    let (prefix, rest) = bytes.split_first_chunk::<PREFIX>().ok_or_else(cut)?;
    let [c0, c1, c2, c3, l0, l1, l2, l3] = *prefix;
    if [c0, c1, c2, c3] != *super::CONTINUATION {
        return Err(damaged("a message without continuation marker".to_owned()));
    }
    let metadata = usize::try_from(i32::from_le_bytes([l0, l1, l2, l3])).map_err(|_| cut())?;
    if metadata == 0 {
        return Ok(None);
    }
    let (message, rest) = rest.split_at_checked(metadata).ok_or_else(cut)?;
    let message = root_as_message(message).map_err(|e| damaged(format!("message: {e}")))?;
    let body =
        usize::try_from(message.bodyLength()).ok().and_then(|body| rest.get(..body)).ok_or_else(cut)?;
    check_buffers(&message, body).map_err(damaged)?;
    Ok(Some(PREFIX + metadata + body.len()))
}

fn check_buffers(message: &Message<'_>, body: &[u8]) -> Result<(), String> {
    let layout = match (message.header_as_record_batch(), message.header_as_dictionary_batch()) {
        (Some(batch), _) => Some(batch),
        (None, Some(dictionary)) => dictionary.data(),
        (None, None) => None,
    };
    let Some(layout) = layout else { return Ok(()) };
    check_nodes(&layout)?;
    for buffer in layout.buffers().iter().flatten() {
        let (offset, length) = (buffer.offset(), buffer.length());
        let range = || {
            let start = usize::try_from(offset).ok()?;
            body.get(start..start.checked_add(usize::try_from(length).ok()?)?)
        };
        let bytes = range().ok_or_else(|| {
            format!("a buffer of {length} bytes at {offset} is outside its body of {} bytes", body.len())
        })?;
        if offset % 8 != 0 {
            return Err(format!("a buffer at {offset}, which is not a multiple of 8"));
        }
        if layout.compression().is_some() {
            check_compressed(bytes)?;
        }
    }
    Ok(())
}

/// A compressed buffer begins with its length before compression, which the reader allocates on its word.
fn check_compressed(bytes: &[u8]) -> Result<(), String> {
    let Some((length, _)) = bytes.split_first_chunk::<8>() else {
        return if bytes.is_empty() { Ok(()) } else { Err("a compressed buffer without length".to_owned()) };
    };
    let length = i64::from_le_bytes(*length);
    // -1: it was not worth compressing.
    let possible = length == -1
        || usize::try_from(length).is_ok_and(|length| Vec::<u8>::new().try_reserve_exact(length).is_ok());
    if possible { Ok(()) } else { Err(format!("a compressed buffer of {length} bytes")) }
}

fn check_nodes(layout: &Layout<'_>) -> Result<(), String> {
    for node in layout.nodes().iter().flatten() {
        if node.length() < 0 || node.null_count() < 0 || node.null_count() > node.length() {
            return Err(format!("an array of {} values with {} nulls", node.length(), node.null_count()));
        }
    }
    if layout.length() < 0 {
        return Err(format!("a batch of {} rows", layout.length()));
    }
    Ok(())
}
