//! What is written when all chunks have ended: offsets, validity, metadata, and zeros wherever nothing else is.

use shmquant_protocol::message::Failure;

use super::access::Whole;
use super::fault::internal;
use crate::plan::{BufferId, END, MAGIC, NodeId, Plan, SchemaTexts};

const ALIGN: u64 = shmquant_protocol::chunks::ALIGN;

/// The result with the null counts and buffer lengths that its messages will tell.
pub(super) struct Writer<'a> {
    plan: &'a Plan,
    whole: Whole<'a>,
    nulls: Vec<u64>,
    used: Vec<u64>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(plan: &'a Plan, whole: Whole<'a>) -> Self {
        let (nulls, used) = (plan.file().null_counts(), plan.file().buffer_bytes());
        Self { plan, whole, nulls, used }
    }

    /// A run of bytes of the file.
    pub(super) fn at(&mut self, at: u64, bytes: u64) -> Result<&mut [u8], Failure> {
        self.whole
            .bytes(at, bytes)
            .ok_or_else(|| internal(format!("{bytes} bytes at {at} are outside the result")))
    }

    /// A whole buffer.
    pub(super) fn buffer(&mut self, id: BufferId) -> Result<&mut [u8], Failure> {
        let (at, bytes) = self.plan.file().buffer(id);
        self.at(at, bytes)
    }

    /// Fills a buffer from its start; what is behind the last value counts as unused.
    pub(super) fn fill<const N: usize>(
        &mut self,
        id: BufferId,
        values: impl IntoIterator<Item = [u8; N]>,
    ) -> Result<(), Failure> {
        let (out, _) = self.buffer(id)?.as_chunks_mut::<N>();
        let (mut n, mut values) = (0, values.into_iter());
        for (out, value) in out.iter_mut().zip(&mut values) {
            *out = value;
            n += 1;
        }
        match values.next() {
            Some(_) => Err(internal(format!("more than {n} values for a buffer"))),
            None => {
                self.used[id.index()] = n * N as u64;
                Ok(())
            }
        }
    }

    /// Offsets of values of these lengths.
    pub(super) fn offsets(
        &mut self,
        id: BufferId,
        large: bool,
        lengths: impl IntoIterator<Item = u64>,
    ) -> Result<(), Failure> {
        let mut end = 0u64;
        let ends = std::iter::once(0).chain(lengths.into_iter().map(|n| {
            end += n;
            end
        }));
        match large {
            true => self.fill(id, ends.map(|end| end.to_le_bytes())),
            // The plan keeps every offset below 2^31.
            false => self.fill(id, ends.map(|end| (end as u32).to_le_bytes())),
        }
    }

    /// Validity of an array.
    pub(super) fn validity(
        &mut self,
        node: NodeId,
        valid: impl IntoIterator<Item = bool>,
    ) -> Result<(), Failure> {
        let (Some(id), _) = self.plan.file().node(node) else { return Ok(()) };
        let mut nulls = 0;
        let out = self.buffer(id)?;
        out.fill(0);
        for (i, valid) in valid.into_iter().enumerate() {
            match (valid, out.get_mut(i / 8)) {
                (true, Some(byte)) => *byte |= 1 << (i % 8),
                (true, None) => {}
                (false, Some(_)) => nulls += 1,
                (false, None) => return Err(internal("a null where none was expected")),
            }
        }
        self.nulls_in(node, nulls);
        Ok(())
    }

    /// The null count of an array; without nulls its validity buffer is empty.
    pub(super) fn nulls_in(&mut self, node: NodeId, nulls: u64) {
        self.nulls[node.index()] = nulls;
        if let (0, (Some(id), _)) = (nulls, self.plan.file().node(node)) {
            self.used[id.index()] = 0;
        }
    }

    /// Copies one whole buffer to another of the same size.
    pub(super) fn copy(&mut self, from: BufferId, to: BufferId) -> Result<(), Failure> {
        let ((from, bytes), (to, _)) = (self.plan.file().buffer(from), self.plan.file().buffer(to));
        self.whole.copy(from, to, bytes).ok_or_else(|| internal("a copy leaves the result"))
    }

    /// Writes all metadata and clears all that no buffer uses: recycled memory never shows what it held.
    pub(super) fn finish(mut self, schema: &SchemaTexts) -> Result<(), Failure> {
        let plan = self.plan;
        let file = plan.file();
        for (index, (at, bytes)) in file.buffers().enumerate() {
            let used = self.used[index].min(bytes);
            let end = bytes.next_multiple_of(ALIGN);
            self.at(at + used, end - used)?.fill(0);
        }
        self.at(0, MAGIC.len() as u64)?.copy_from_slice(&MAGIC);
        let (message, footer) = schema;
        let (at, bytes) = file.schema();
        self.head(at, bytes, message)?;
        let (nulls, used) = (std::mem::take(&mut self.nulls), std::mem::take(&mut self.used));
        for (at, bytes, message) in &plan.heads(nulls, used).heads {
            self.head(*at, *bytes, message)?;
        }
        let (end, length) = (file.end(), file.length());
        let mut tail = END.to_vec();
        tail.extend_from_slice(footer);
        tail.extend_from_slice(&(footer.len() as u32).to_le_bytes());
        tail.extend_from_slice(&MAGIC[..6]);
        if end + tail.len() as u64 != length {
            return Err(internal(format!(
                "a footer of {} bytes has another length than planned",
                footer.len()
            )));
        }
        self.at(end, tail.len() as u64)?.copy_from_slice(&tail);
        Ok(())
    }

    fn head(&mut self, at: u64, bytes: u64, message: &[u8]) -> Result<(), Failure> {
        let out = self.at(at, bytes)?;
        let (prefix, body) = out.split_at_mut(8.min(out.len()));
        if body.len() < message.len() || prefix.len() < 8 {
            return Err(internal(format!("metadata of {} bytes for {}", message.len(), body.len())));
        }
        prefix[..4].fill(0xff);
        prefix[4..].copy_from_slice(&(body.len() as u32).to_le_bytes());
        let (text, padding) = body.split_at_mut(message.len());
        text.copy_from_slice(message);
        padding.fill(0);
        Ok(())
    }
}
