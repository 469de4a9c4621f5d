//! Arrow buffers as they cross to the daemon, written on demand from the pieces in which the caller holds them.

use std::ops::Range;

use arrow_buffer::bit_iterator::BitSliceIterator;
use arrow_buffer::bit_mask::set_bits;
use arrow_buffer::{BooleanBuffer, Buffer, NullBuffer};

/// One canonical buffer: the pieces of all chunks, one after another.
#[derive(Debug)]
pub(crate) enum Stream {
    /// Bytes as they are.
    Bytes(Pieces<Buffer>),
    /// Bits, least significant first.
    Bits(Pieces<Bits>),
    /// Rows of equal size, zeros where they are null.
    Rows(Pieces<Rows>),
    /// Offsets that continue from chunk to chunk.
    Offsets(Pieces<Offsets>),
    /// Views whose buffers were renumbered.
    Views(Pieces<Views>),
}

impl Stream {
    /// Nothing.
    pub(crate) fn empty() -> Self {
        Self::Bytes(Pieces::default())
    }

    /// Bytes in all.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Bytes(p) => p.total,
            Self::Rows(p) => p.total,
            Self::Bits(p) => p.total.div_ceil(8),
            Self::Offsets(p) => p.total,
            Self::Views(p) => p.total,
        }
    }

    /// Address and bytes of all of it, if it lies in memory as it crosses.
    pub(crate) fn lies_at(&self) -> Option<(usize, usize)> {
        match self {
            Self::Bytes(p) => p.lies_at(|piece| Some(piece.as_slice())),
            Self::Rows(p) => p.lies_at(Rows::dense),
            Self::Bits(_) | Self::Offsets(_) | Self::Views(_) => None,
        }
    }

    /// A run of its bytes, if they lie in memory as they cross.
    pub(crate) fn slice(&self, bytes: Range<u64>) -> Option<&[u8]> {
        match self {
            Self::Bytes(p) => p.slice(bytes, |piece| Some(piece.as_slice())),
            Self::Rows(p) => p.slice(bytes, Rows::dense),
            Self::Bits(_) | Self::Offsets(_) | Self::Views(_) => None,
        }
    }

    /// Writes the bytes from `first` on. Offsets and views are asked for whole, as chunks of a multiple of 16 bytes do.
    pub(crate) fn write(&self, first: u64, out: &mut [u8]) {
        let count = out.len() as u64;
        match self {
            Self::Bytes(p) => p.each(first, count, |piece, from, at, n| {
                out[at..at + n].copy_from_slice(&piece.as_slice()[from..from + n]);
            }),
            Self::Bits(p) => {
                out.fill(0);
                let first = first * 8;
                let bits = (count * 8).min(p.total.saturating_sub(first));
                p.each(first, bits, |piece, from, at, n| piece.write(from, at, n, out));
            }
            Self::Rows(p) => {
                p.each(first, count, |piece, from, at, n| piece.write(from, &mut out[at..at + n]))
            }
            Self::Offsets(p) => {
                p.each(first, count, |piece, from, at, n| piece.write(from, &mut out[at..at + n]));
            }
            Self::Views(p) => {
                p.each(first, count, |piece, from, at, n| piece.write(from, &mut out[at..at + n]))
            }
        }
    }
}

/// Pieces of one stream with the places at which they begin (in bytes; for bits, in bits).
#[derive(Debug)]
pub(crate) struct Pieces<P> {
    starts: Vec<u64>,
    pieces: Vec<P>,
    total: u64,
}

impl<P> Default for Pieces<P> {
    fn default() -> Self {
        Self { starts: Vec::new(), pieces: Vec::new(), total: 0 }
    }
}

impl<P> Pieces<P> {
    pub(crate) fn of(piece: P, len: usize) -> Self {
        let mut it = Self::default();
        it.push(piece, len);
        it
    }

    pub(crate) fn push(&mut self, piece: P, len: usize) {
        if len > 0 {
            self.starts.push(self.total);
            self.pieces.push(piece);
            self.total += len as u64;
        }
    }

    /// Address and bytes, if every piece is bytes in memory and ends where the next one begins.
    fn lies_at<'a>(&'a self, bytes: impl Fn(&'a P) -> Option<&'a [u8]>) -> Option<(usize, usize)> {
        let mut all = None;
        for piece in &self.pieces {
            let here = bytes(piece)?;
            let (address, len) = (here.as_ptr() as usize, here.len());
            all = match all {
                None => Some((address, len)),
                Some((start, before)) if start + before == address => Some((start, before + len)),
                Some(_) => return None,
            };
        }
        all
    }

    /// A run of bytes, if one piece has all of it as bytes in memory.
    fn slice<'a>(&'a self, range: Range<u64>, bytes: impl Fn(&'a P) -> Option<&'a [u8]>) -> Option<&'a [u8]> {
        let index = self.starts.partition_point(|start| *start <= range.start).checked_sub(1)?;
        let start = *self.starts.get(index)?;
        bytes(self.pieces.get(index)?)?.get((range.start - start) as usize..(range.end - start) as usize)
    }

    /// Calls `f(piece, place in the piece, place in the range, length)` for every piece of a range, in order.
    fn each(&self, first: u64, count: u64, mut f: impl FnMut(&P, usize, usize, usize)) {
        let mut index = self.starts.partition_point(|start| *start <= first).saturating_sub(1);
        let mut done = 0;
        while done < count {
            let (Some(start), Some(piece)) = (self.starts.get(index), self.pieces.get(index)) else { return };
            let end = self.starts.get(index + 1).copied().unwrap_or(self.total);
            let from = first + done - start;
            let n = (end - start - from).min(count - done);
            f(piece, from as usize, done as usize, n as usize);
            done += n;
            index += 1;
        }
    }
}

/// A run of bits.
#[derive(Debug)]
pub(crate) enum Bits {
    /// As somebody else holds them, at any bit.
    Of(BooleanBuffer),
    /// All 1.
    Ones,
}

impl Bits {
    /// The validity of `len` rows.
    pub(crate) fn validity(nulls: Option<&NullBuffer>) -> Self {
        nulls.map_or(Self::Ones, |n| Self::Of(n.inner().clone()))
    }

    fn write(&self, from: usize, at: usize, n: usize, out: &mut [u8]) {
        match self {
            Self::Of(bits) => {
                set_bits(out, bits.values(), at, bits.offset() + from, n);
            }
            Self::Ones => {
                let end = at + n;
                let (head, tail) = (at.next_multiple_of(8).min(end), (end / 8 * 8).max(at));
                (at..head).for_each(|bit| out[bit / 8] |= 1 << (bit % 8));
                if head < tail {
                    out[head / 8..tail / 8].fill(0xff);
                }
                (tail.max(head)..end).for_each(|bit| out[bit / 8] |= 1 << (bit % 8));
            }
        }
    }
}

/// Rows of equal size in one chunk of a column.
#[derive(Debug)]
pub(crate) struct Rows {
    /// The chunk's values, in bytes.
    pub(crate) values: Buffer,
    /// How many.
    pub(crate) len: usize,
    /// Bytes of one row; where it is 0 nothing is ever written.
    pub(crate) row_bytes: usize,
    /// Where rows begin.
    pub(crate) starts: Starts,
    /// Rows to fill with zeros.
    pub(crate) nulls: Option<NullBuffer>,
    /// Single elements to replace by 0, over all of `values`.
    pub(crate) holes: Option<Holes>,
}

/// Null elements that count as zeros.
#[derive(Debug)]
pub(crate) struct Holes {
    pub(crate) nulls: NullBuffer,
    /// Bytes of one element.
    pub(crate) size: usize,
}

/// Where the rows of a chunk begin in its values.
#[derive(Debug)]
pub(crate) enum Starts {
    /// One after another.
    Dense,
    /// At these elements (offsets of a list; a row that is not null ends where the next one begins).
    At {
        /// Element offsets, one a row and the end.
        offsets: Vec32Or64,
        /// Bytes of one element.
        size: usize,
    },
}

/// Offsets of a list or large list.
#[derive(Debug)]
pub(crate) enum Vec32Or64 {
    Small(arrow_buffer::OffsetBuffer<i32>),
    Large(arrow_buffer::OffsetBuffer<i64>),
}

impl Vec32Or64 {
    pub(crate) fn get(&self, row: usize) -> usize {
        match self {
            Self::Small(o) => o[row] as usize,
            Self::Large(o) => o[row] as usize,
        }
    }
}

impl Rows {
    /// Writes the bytes of the rows from byte `first` on, counted as if all rows lay one after another.
    pub(crate) fn write(&self, first: usize, out: &mut [u8]) {
        let last = first + out.len();
        let rows = first / self.row_bytes..last.div_ceil(self.row_bytes);
        match &self.nulls {
            None => self.copy(rows, first, out),
            Some(nulls) => {
                let mut done = rows.start;
                runs(nulls, rows.start, rows.len(), |a, b| {
                    self.zero(done..a, first, out);
                    self.copy(a..b, first, out);
                    done = b;
                });
                self.zero(done..rows.end, first, out);
            }
        }
    }

    /// Its bytes, if nothing has to be put in or left out.
    fn dense(&self) -> Option<&[u8]> {
        if self.nulls.is_some() || self.holes.is_some() {
            return None;
        }
        let first = self.start(0);
        self.values.as_slice().get(first..first.checked_add(self.len.checked_mul(self.row_bytes)?)?)
    }

    fn start(&self, row: usize) -> usize {
        match &self.starts {
            Starts::Dense => row * self.row_bytes,
            Starts::At { offsets, size } => offsets.get(row) * size,
        }
    }

    fn part(&self, rows: &Range<usize>, first: usize, len: usize) -> Range<usize> {
        let from = (rows.start * self.row_bytes).max(first);
        let to = (rows.end * self.row_bytes).min(first + len);
        from..to.max(from)
    }

    fn zero(&self, rows: Range<usize>, first: usize, out: &mut [u8]) {
        let part = self.part(&rows, first, out.len());
        if rows.start < rows.end {
            out[part.start - first..part.end - first].fill(0);
        }
    }

    /// Copies a run of rows that are not null: they lie one after another.
    fn copy(&self, rows: Range<usize>, first: usize, out: &mut [u8]) {
        if rows.is_empty() {
            return;
        }
        let part = self.part(&rows, first, out.len());
        let source = self.start(rows.start) + part.start - rows.start * self.row_bytes;
        let out = &mut out[part.start - first..part.end - first];
        out.copy_from_slice(&self.values.as_slice()[source..source + out.len()]);
        if let Some(Holes { nulls, size }) = &self.holes {
            // Chunks cut at whole elements.
            let elements = source / size..(source + out.len()) / size;
            let mut done = elements.start;
            let mut hole = |a: usize, b: usize| {
                out[a * size - source..b * size - source].fill(0);
            };
            runs(nulls, elements.start, elements.len(), |a, b| {
                hole(done, a);
                done = b;
            });
            hole(done, elements.end);
        }
    }
}

/// Runs of valid rows inside `[start, start + len)`.
fn runs(nulls: &NullBuffer, start: usize, len: usize, mut f: impl FnMut(usize, usize)) {
    let bits = nulls.inner();
    for (a, b) in BitSliceIterator::new(bits.values(), bits.offset() + start, len) {
        f(start + a, start + b);
    }
}

/// Offsets of one chunk, its first one left out because the chunk before ends there.
#[derive(Debug)]
pub(crate) struct Offsets {
    /// `None` for the 0 with which all offsets begin.
    pub(crate) offsets: Option<Buffer>,
    /// Added to every offset.
    pub(crate) shift: i64,
    pub(crate) width: OffsetWidth,
}

/// Bytes of an offset, as somebody holds it and as it crosses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OffsetWidth {
    /// 4 bytes.
    Small,
    /// 4 bytes that cross as 8.
    Widened,
    /// 8 bytes.
    Large,
}

impl OffsetWidth {
    /// Bytes of an offset as somebody holds it.
    pub(crate) fn held(self) -> usize {
        match self {
            Self::Small | Self::Widened => 4,
            Self::Large => 8,
        }
    }

    /// Bytes of an offset as it crosses.
    pub(crate) fn crossing(self) -> usize {
        match self {
            Self::Small => 4,
            Self::Widened | Self::Large => 8,
        }
    }
}

impl Offsets {
    fn write(&self, from: usize, out: &mut [u8]) {
        let Some(offsets) = &self.offsets else { return out.fill(0) };
        let (held, crossing) = (self.width.held(), self.width.crossing());
        let (from, count) = (from / crossing * held, out.len() / crossing * held);
        let source = &offsets.as_slice()[from..from + count];
        match self.width {
            OffsetWidth::Small => {
                for (out, offset) in out.as_chunks_mut::<4>().0.iter_mut().zip(source.as_chunks::<4>().0) {
                    // The joined offsets were shown to fit when the stream was made.
                    *out = i32::from_le_bytes(*offset).wrapping_add(self.shift as i32).to_le_bytes();
                }
            }
            OffsetWidth::Widened => {
                for (out, offset) in out.as_chunks_mut::<8>().0.iter_mut().zip(source.as_chunks::<4>().0) {
                    *out = i64::from(i32::from_le_bytes(*offset)).wrapping_add(self.shift).to_le_bytes();
                }
            }
            OffsetWidth::Large => {
                for (out, offset) in out.as_chunks_mut::<8>().0.iter_mut().zip(source.as_chunks::<8>().0) {
                    *out = i64::from_le_bytes(*offset).wrapping_add(self.shift).to_le_bytes();
                }
            }
        }
    }
}

/// Views of one chunk.
#[derive(Debug)]
pub(crate) struct Views {
    pub(crate) views: Buffer,
    /// The joined column's number of each of the chunk's buffers.
    pub(crate) buffers: Vec<u32>,
    /// Null slots become empty views.
    pub(crate) nulls: Option<NullBuffer>,
}

impl Views {
    fn write(&self, from: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.views.as_slice()[from..from + out.len()]);
        for (i, view) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let words = u128::from_le_bytes(*view);
            let (length, buffer) = (words as u32, (words >> 64) as u32);
            if self.nulls.as_ref().is_some_and(|n| n.is_null(from / 16 + i)) {
                *view = [0; 16];
            } else if length > 12 {
                let buffer = self.buffers.get(buffer as usize).copied().unwrap_or(u32::MAX);
                view[8..12].copy_from_slice(&buffer.to_le_bytes());
            }
        }
    }
}
