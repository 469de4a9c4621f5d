//! Kept columns are checked where they are: values that came from a client are believed only now that it cannot change them.

use std::sync::Arc;

use arrow_buffer::Buffer;
use arrow_ipc::convert::try_fb_to_schema;
use arrow_ipc::reader::{FileDecoder, read_footer_length};
use arrow_ipc::{Block, Footer, root_as_footer_with_opts};
use arrow_schema::{ArrowError, SchemaRef};
use flatbuffers::VerifierOptions;
use shmquant_protocol::message::{ErrorCode, Failure};

use super::Job;
use super::fault::internal;
use crate::plan::refuse;

/// Most columns that are read one by one to find the bad one.
const MOST_TRIED: usize = 256;

/// Reads the kept columns of the finished file as any reader would, with all checks.
pub(super) fn kept_columns(job: &Job) -> Result<(), Failure> {
    let kept = job.plan.kept_fields();
    if kept.is_empty() {
        return Ok(());
    }
    let file = job.result.buffer().ok_or_else(|| internal("the result is not in memory"))?;
    let Err(all) = read(&file, None) else { return Ok(()) };
    // Which one it was is worth reading again, but not once for each of thousands.
    for field in kept.into_iter().take(MOST_TRIED) {
        if let Err(error) = read(&file, Some(field)) {
            let name = schema(&file).map(|s| s.field(field).name().clone()).unwrap_or_default();
            let mut failure = refuse(ErrorCode::InvalidInput, &name, &error.to_string());
            failure.message = format!("column '{name}' is not valid Arrow data: {error}");
            return Err(failure);
        }
    }
    let what = format!("a kept column is not valid Arrow data: {all}");
    Err(Failure::new(ErrorCode::InvalidInput, what, ""))
}

/// Reads everything, or one column.
fn read(file: &Buffer, field: Option<usize>) -> Result<(), ArrowError> {
    let footer = footer(file)?;
    let schema = Arc::new(try_fb_to_schema(footer.schema().ok_or_else(missing)?)?);
    let mut decoder = FileDecoder::new(schema, footer.version()).with_require_alignment(true);
    if let Some(field) = field {
        decoder = decoder.with_projection(vec![field]);
    }
    for block in footer.dictionaries().iter().flatten() {
        decoder.read_dictionary(block, &part(file, block)?)?;
    }
    for block in footer.recordBatches().iter().flatten() {
        decoder.read_record_batch(block, &part(file, block)?)?;
    }
    Ok(())
}

fn schema(file: &Buffer) -> Result<SchemaRef, ArrowError> {
    Ok(Arc::new(try_fb_to_schema(footer(file)?.schema().ok_or_else(missing)?)?))
}

fn footer(file: &Buffer) -> Result<Footer<'_>, ArrowError> {
    let bytes = file.as_slice();
    let trailer = bytes.last_chunk::<10>().ok_or_else(missing)?;
    let length = read_footer_length(*trailer)?;
    let end = bytes.len() - trailer.len();
    let start = end.checked_sub(length).ok_or_else(missing)?;
    // The tables are as many as the descriptor's fields, which were counted already.
    let options = VerifierOptions { max_tables: usize::MAX, max_depth: 128, ..VerifierOptions::default() };
    root_as_footer_with_opts(&options, &bytes[start..end]).map_err(|e| ArrowError::ParseError(e.to_string()))
}

fn part(file: &Buffer, block: &Block) -> Result<Buffer, ArrowError> {
    let at = usize::try_from(block.offset()).map_err(|_| missing())?;
    let length = block.metaDataLength() as i64 + block.bodyLength();
    let length = usize::try_from(length).map_err(|_| missing())?;
    if at.checked_add(length).is_none_or(|end| end > file.len()) {
        return Err(missing());
    }
    Ok(file.slice_with_length(at, length))
}

fn missing() -> ArrowError {
    ArrowError::ParseError("the file is cut short".to_owned())
}
