//! From codes back to values: `(q - zero_point) * scale`.

use crate::layout::{Granularity, Layout, Piece};
use crate::packing::take;
use crate::path::groups::{Coded, code_bytes};
use crate::path::{Kernels, TILE};
use crate::scheme::{Affine, ZeroPoints};
use crate::values::FloatType;

/// Runs of this many values or more are written past the cache.
const STREAM_FROM: usize = 1 << 20;

/// Groups that a path is given at most at once.
const BATCH: usize = 64;

/// Values of the codes of `[first, first + out.len())`.
///
/// `codes` begin with the byte that holds the first code, which must start on a byte; `scales` and `zero_points` are
/// those of the domains touched, in the order of [`Layout::param_range`].
///
/// # Panics
/// Where a slice has another length than the chunk asks for.
pub fn decode<'z>(
    codes: &[u8],
    first: u64,
    layout: &Layout,
    affine: &Affine,
    scales: &[f32],
    zero_points: impl Into<ZeroPoints<'z>>,
    out: &mut [f32],
) {
    Kernels::best().decode(codes, first, layout, affine, scales, zero_points.into(), out);
}

impl Kernels {
    /// [`decode`] on this path.
    #[allow(
        clippy::too_many_arguments,
        reason = "one call a chunk; a struct would only rename the same things"
    )]
    pub fn decode(
        &self,
        codes: &[u8],
        first: u64,
        layout: &Layout,
        affine: &Affine,
        scales: &[f32],
        zero_points: ZeroPoints<'_>,
        out: &mut [f32],
    ) {
        Decoder::new(self, codes, first, out.len(), layout, affine, scales, zero_points).read(0, out);
    }
}

/// The codes of a chunk with what it takes to read any part of them.
pub(crate) struct Decoder<'a> {
    kernels: &'a Kernels,
    codes: &'a [u8],
    first: u64,
    /// Bit position of the first code in the item's order.
    base_bit: usize,
    base_param: u64,
    layout: Layout,
    joined: Layout,
    affine: &'a Affine,
    scales: &'a [f32],
    zero_points: ZeroPoints<'a>,
    columns: Vec<i32>,
    scratch: [u8; TILE],
}

impl<'a> Decoder<'a> {
    #[allow(clippy::too_many_arguments, reason = "as `decode`")]
    pub(crate) fn new(
        kernels: &'a Kernels,
        codes: &'a [u8],
        first: u64,
        len: usize,
        layout: &Layout,
        affine: &'a Affine,
        scales: &'a [f32],
        zero_points: ZeroPoints<'a>,
    ) -> Self {
        let params = layout.param_range(first, len as u64);
        let bytes = layout.chunk_code_bytes(first, len as u64, affine.bits);
        assert!(codes.len() as u64 >= bytes, "{} code bytes for {len} values", codes.len());
        assert_eq!(scales.len() as u64, params.end - params.start, "scales of a chunk of {len}");
        assert!(zero_points.len().is_none_or(|n| n == scales.len()), "zero points of a chunk of {len}");
        let columns = match layout.granularity {
            Granularity::Dimension => (0..scales.len()).map(|i| zero_points.get(i)).collect(),
            _ => Vec::new(),
        };
        Self {
            kernels,
            codes,
            first,
            base_bit: if len == 0 { 0 } else { (layout.code_bit(first, affine.bits) & !7) as usize },
            base_param: params.start,
            layout: *layout,
            joined: layout.joined(affine.bits),
            affine,
            scales,
            zero_points,
            columns,
            scratch: [0; TILE],
        }
    }

    /// Values from offset `from` in the chunk on.
    pub(crate) fn read(&mut self, from: usize, out: &mut [f32]) {
        let layout = self.joined;
        let bits = self.affine.bits;
        let stored = self.layout.stored_bits(bits);
        let start = self.first + from as u64;
        let stream = out.len() >= STREAM_FROM;
        for piece in layout.pieces(start, out.len(), bits) {
            let mut at = 0;
            while at < piece.len {
                let run = self.groups(&piece, at, &mut out[piece.at + at..piece.at + piece.len], stream);
                if run > 0 {
                    at += run;
                    continue;
                }
                let col = piece.col + at as u64;
                let mut n = (piece.len - at).min(TILE);
                if layout.granularity == Granularity::Group {
                    let rest = layout.group - col % layout.group;
                    n = usize::try_from(rest).map_or(n, |rest| rest.min(n));
                }
                let element = piece.row * layout.k + col;
                let bit = layout.code_bit(element, bits) as usize - self.base_bit;
                let out = &mut out[piece.at + at..piece.at + at + n];
                let signed = self.affine.signed;
                let codes = if stored == 8 {
                    &self.codes[bit / 8..bit / 8 + n]
                } else {
                    take(self.kernels, self.codes, stored, signed, bit, &mut self.scratch[..n]);
                    &self.scratch[..n]
                };
                if layout.granularity == Granularity::Dimension {
                    let columns = col as usize..col as usize + n;
                    let (scales, zeros) = (&self.scales[columns.clone()], &self.columns[columns]);
                    self.kernels.decode_columns(codes, out, scales, zeros, signed);
                } else {
                    let param = (layout.param_index(element) - self.base_param) as usize;
                    self.kernels.decode_tile(
                        codes,
                        out,
                        self.scales[param],
                        self.zero_points.get(param),
                        signed,
                    );
                }
                at += n;
            }
        }
    }

    /// As many values as the path takes on its own from offset `at` of a piece on: groups that begin on bytes, or what is
    /// left of one.
    fn groups(&self, piece: &Piece, at: usize, out: &mut [f32], stream: bool) -> usize {
        let stored = self.layout.stored_bits(self.affine.bits);
        if !self.kernels.takes(FloatType::F32) || !matches!(stored, 4 | 8) {
            return 0;
        }
        let (left, col) = (piece.len - at, piece.col + at as u64);
        let (len, count) = match self.joined.granularity {
            Granularity::Dimension => return 0,
            Granularity::Group => {
                let rest = self.joined.group - col % self.joined.group;
                let len = usize::try_from(rest).map_or(left, |rest| rest.min(left));
                let whole = len as u64 == self.joined.group && (len * usize::from(stored)).is_multiple_of(8);
                (len, if whole { (left / len).min(BATCH) } else { 1 })
            }
            _ => (left, 1),
        };
        let element = piece.row * self.joined.k + col;
        let bit = self.joined.code_bit(element, self.affine.bits) as usize - self.base_bit;
        if !bit.is_multiple_of(8) {
            return 0;
        }
        let param = (self.joined.param_index(element) - self.base_param) as usize;
        let mut zeros = [0; BATCH];
        for (i, zero) in zeros.iter_mut().enumerate().take(count) {
            *zero = self.zero_points.get(param + i);
        }
        let taken = self.kernels.decode_groups(Coded {
            codes: &self.codes[bit / 8..bit / 8 + code_bytes(count * len, stored)],
            stored,
            signed: self.affine.signed,
            len,
            scales: &self.scales[param..param + count],
            zero_points: &zeros[..count],
            out: &mut out[..count * len],
            stream,
        });
        if taken { count * len } else { 0 }
    }
}
