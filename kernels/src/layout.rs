//! How one item lies in its flat element order: rows, domains that share parameters, places of codes.

use std::fmt;
use std::ops;
use std::str::FromStr;

use crate::fault::{Fault, by_name};

/// Which values share one scale and zero point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// All of them.
    Tensor,
    /// Those of one row.
    Row,
    /// Those of one vector component, over all rows.
    Dimension,
    /// Runs of `group` elements inside a row; the last of a row may be short.
    Group,
}

impl Granularity {
    /// All granularities.
    pub const ALL: [Self; 4] = [Self::Tensor, Self::Row, Self::Dimension, Self::Group];

    /// The granularity's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::Row => "row",
            Self::Dimension => "dimension",
            Self::Group => "group",
        }
    }
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Granularity {
    type Err = Fault;

    fn from_str(word: &str) -> Result<Self, Fault> {
        by_name("granularity", word, &Self::ALL, |g| g.name())
    }
}

/// The shape of an item and of its codes. Methods assume that [`Layout::sizes`] is `Some`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Rows (vectors, matrix rows, or values of a plain column).
    pub rows: u64,
    /// Elements of one row.
    pub k: u64,
    /// Elements of one group; only read for [`Granularity::Group`].
    pub group: u64,
    /// Which values share parameters.
    pub granularity: Granularity,
    /// Every row starts on a byte (vectors); otherwise codes run on and only the end is padded (layers).
    pub pad_rows: bool,
    /// Several codes a byte; otherwise one byte a code.
    pub packed: bool,
}

/// Totals of a layout, computed with checked arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Values.
    pub elements: u64,
    /// Scales (and zero points).
    pub params: u64,
    /// Bytes of codes.
    pub code_bytes: u64,
}

impl Layout {
    /// All totals, or `None` where the layout is impossible (a group of 0, sizes beyond 2^60).
    pub fn sizes(&self, bits: u8) -> Option<Sizes> {
        const MOST: u64 = 1 << 60;
        if self.granularity == Granularity::Group && self.group == 0 {
            return None;
        }
        if !matches!(bits, 1..=8) {
            return None;
        }
        let elements = self.rows.checked_mul(self.k)?;
        // One byte a row of padding and one parameter a row are bounded by rows + elements.
        if elements > MOST || self.rows > MOST || self.k > MOST {
            return None;
        }
        Some(Sizes { elements, params: self.n_params(), code_bytes: self.code_bytes(bits) })
    }

    /// Values.
    pub fn elements(&self) -> u64 {
        self.rows * self.k
    }

    /// Groups of one row (1 unless the granularity is group).
    pub fn groups_per_row(&self) -> u64 {
        match self.granularity {
            Granularity::Group => self.k.div_ceil(self.group.max(1)),
            _ => 1,
        }
    }

    /// Scales (and zero points) of the item: tensor 1, row `rows`, dimension `k`, group `rows * ceil(k / group)`.
    pub fn n_params(&self) -> u64 {
        match self.granularity {
            Granularity::Tensor => 1,
            Granularity::Row => self.rows,
            Granularity::Dimension => self.k,
            Granularity::Group => self.rows * self.groups_per_row(),
        }
    }

    /// Which parameter belongs to a flat element.
    pub fn param_index(&self, element: u64) -> u64 {
        match self.granularity {
            Granularity::Tensor => 0,
            Granularity::Row => element / self.k.max(1),
            Granularity::Dimension => element % self.k.max(1),
            Granularity::Group => {
                let (row, col) = (element / self.k.max(1), element % self.k.max(1));
                row * self.groups_per_row() + col / self.group.max(1)
            }
        }
    }

    /// The parameters that `[first, first + len)` touches: what the `scales`, `zero_points` and `ranges` of a chunk
    /// hold, in this order. Always all `k` for [`Granularity::Dimension`] and the one for [`Granularity::Tensor`].
    /// An empty chunk touches nothing else, but an item without elements is one chunk with all its parameters.
    pub fn param_range(&self, first: u64, len: u64) -> ops::Range<u64> {
        match self.granularity {
            Granularity::Tensor => 0..1,
            Granularity::Dimension => 0..self.k,
            _ if len == 0 => 0..if self.elements() == 0 { self.n_params() } else { 0 },
            _ => self.param_index(first)..self.param_index(first + len - 1) + 1,
        }
    }

    /// Bits that one code takes where it lies.
    pub fn stored_bits(&self, bits: u8) -> u8 {
        if self.packed { bits } else { 8 }
    }

    /// Bytes of one row's codes when rows start on bytes.
    pub fn row_bytes(&self, bits: u8) -> u64 {
        (self.k * u64::from(self.stored_bits(bits))).div_ceil(8)
    }

    /// Bytes of all codes.
    pub fn code_bytes(&self, bits: u8) -> u64 {
        if self.pad_rows {
            self.rows * self.row_bytes(bits)
        } else {
            (self.elements() * u64::from(self.stored_bits(bits))).div_ceil(8)
        }
    }

    /// The byte in which a flat element's code begins; for `elements()`, the end of all codes.
    pub fn code_byte_offset(&self, element: u64, bits: u8) -> u64 {
        if element >= self.elements() { self.code_bytes(bits) } else { self.code_bit(element, bits) / 8 }
    }

    /// Bytes of the codes of `[first, first + len)`, where `first` starts on a byte. A byte that the chunk shares
    /// with its successor counts, so only the last chunk of a row or item may end inside a byte.
    pub fn chunk_code_bytes(&self, first: u64, len: u64, bits: u8) -> u64 {
        if len == 0 {
            return 0;
        }
        let last = self.code_bit(first + len - 1, bits) + u64::from(self.stored_bits(bits));
        last.div_ceil(8) - self.code_bit(first, bits) / 8
    }

    /// The bit at which a flat element's code begins.
    pub(crate) fn code_bit(&self, element: u64, bits: u8) -> u64 {
        let stored = u64::from(self.stored_bits(bits));
        if self.pad_rows {
            let k = self.k.max(1);
            (element / k) * self.row_bytes(bits) * 8 + (element % k) * stored
        } else {
            element * stored
        }
    }

    /// The same places with as few rows as possible, so that loops run long: rows become groups, and rows whose
    /// codes adjoin become one row.
    pub(crate) fn joined(&self, bits: u8) -> Self {
        let mut out = *self;
        if out.granularity == Granularity::Row {
            out.granularity = Granularity::Group;
            out.group = out.k;
        }
        let adjoin = !out.pad_rows || (out.k * u64::from(out.stored_bits(bits))).is_multiple_of(8);
        let whole = match out.granularity {
            Granularity::Tensor => true,
            Granularity::Group => out.group != 0 && out.k.is_multiple_of(out.group),
            _ => false,
        };
        if adjoin && whole {
            out.k *= out.rows;
            out.rows = 1;
        }
        out
    }

    /// The same places of a [`Granularity::Dimension`] with short rows taken together, as far as codes adjoin and
    /// `len` elements are worth it, and how many rows now are one: its columns are the old ones as often.
    pub(crate) fn repeated(&self, bits: u8, len: usize) -> (Self, usize) {
        const LEAST: u64 = 512;
        let adjoin = !self.pad_rows || (self.k * u64::from(self.stored_bits(bits))).is_multiple_of(8);
        if !adjoin || self.k == 0 || self.k >= LEAST {
            return (*self, 1);
        }
        let times = LEAST.min(len as u64).div_ceil(self.k).max(1);
        (Self { rows: self.rows.div_ceil(times), k: self.k * times, ..*self }, times as usize)
    }

    /// The pieces of rows that `[first, first + len)` consists of.
    pub(crate) fn pieces(&self, first: u64, len: usize, bits: u8) -> Pieces {
        let k = self.k.max(1);
        Pieces {
            layout: *self,
            bits,
            base_bit: self.code_bit(first, bits) & !7,
            row: first / k,
            col: first % k,
            at: 0,
            len,
        }
    }
}

/// A part of one row inside a chunk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    /// Offset in the chunk.
    pub(crate) at: usize,
    pub(crate) len: usize,
    pub(crate) row: u64,
    pub(crate) col: u64,
    /// Where its codes begin, in bits from the chunk's first code byte.
    pub(crate) bit: usize,
}

/// Iterator over the [`Piece`]s of a chunk.
#[derive(Debug)]
pub(crate) struct Pieces {
    layout: Layout,
    bits: u8,
    base_bit: u64,
    row: u64,
    col: u64,
    at: usize,
    len: usize,
}

impl Pieces {
    /// How many whole rows are still to come, where the last piece ended a row.
    pub(crate) fn whole_rows(&self) -> usize {
        usize::try_from(self.layout.k).map_or(0, |k| (self.len - self.at).checked_div(k).unwrap_or(0))
    }

    /// Leaves out whole rows.
    pub(crate) fn skip_rows(&mut self, rows: usize) {
        self.at += rows * self.layout.k as usize;
        self.row += rows as u64;
    }
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let left = self.len - self.at;
        if left == 0 || self.layout.k == 0 {
            return None;
        }
        let len = usize::try_from(self.layout.k - self.col).map_or(left, |rest| rest.min(left));
        let element = self.row * self.layout.k + self.col;
        let bit = self.layout.code_bit(element, self.bits) - self.base_bit;
        let piece = Piece { at: self.at, len, row: self.row, col: self.col, bit: bit as usize };
        self.at += len;
        self.col = 0;
        self.row += 1;
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(rows: u64, k: u64, group: u64, granularity: Granularity) -> Layout {
        Layout { rows, k, group, granularity, pad_rows: false, packed: true }
    }

    #[test]
    fn counts_parameters_by_granularity() {
        assert_eq!(layout(3, 10, 4, Granularity::Tensor).n_params(), 1);
        assert_eq!(layout(3, 10, 4, Granularity::Row).n_params(), 3);
        assert_eq!(layout(3, 10, 4, Granularity::Dimension).n_params(), 10);
        assert_eq!(layout(3, 10, 4, Granularity::Group).n_params(), 9);
        assert_eq!(layout(3, 10, 4, Granularity::Group).param_index(19), 5);
        assert_eq!(layout(3, 10, 4, Granularity::Group).param_range(8, 6), 2..4);
        assert_eq!(layout(0, 10, 4, Granularity::Row).n_params(), 0);
        assert_eq!(layout(3, 0, 4, Granularity::Group).n_params(), 0);
    }

    #[test]
    fn pads_rows_or_the_end() {
        let flat = layout(3, 5, 0, Granularity::Row);
        let padded = Layout { pad_rows: true, ..flat };
        let bytes = Layout { packed: false, ..flat };
        assert_eq!((flat.code_bytes(4), padded.code_bytes(4), bytes.code_bytes(4)), (8, 9, 15));
        assert_eq!((flat.code_bytes(2), padded.code_bytes(2)), (4, 6));
        assert_eq!((flat.code_byte_offset(11, 4), padded.code_byte_offset(11, 4)), (5, 6));
        assert_eq!(flat.code_byte_offset(15, 4), 8);
    }

    #[test]
    fn refuses_impossible_sizes() {
        assert!(layout(3, 10, 0, Granularity::Group).sizes(4).is_none());
        assert!(layout(u64::MAX, 2, 1, Granularity::Row).sizes(4).is_none());
        assert!(layout(1 << 40, 1 << 40, 1, Granularity::Row).sizes(4).is_none());
        assert!(layout(0, u64::MAX, 1, Granularity::Row).sizes(4).is_none());
        assert!(layout(3, 10, 1, Granularity::Row).sizes(4).is_some());
    }
}
