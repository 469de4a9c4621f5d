//! From values to codes: whole domains in one go, or ranges first and codes afterwards.

use crate::encoder::{ColumnParams, Encoder, Params};
use crate::fault::{Counters, Fault, OnNonFinite};
use crate::layout::{Granularity, Layout, Piece, Pieces};
use crate::path::groups::Widen;
use crate::path::{BLOCK, Kernels, TILE};
use crate::scheme::{Affine, Range, ZeroPoints, ZeroPointsMut, params_from_range};
use crate::source::Source;
use crate::values::Values;

/// Quantizes a chunk whose domains (rows, groups, the whole tensor) are complete: range, parameters and codes, each
/// domain while it is in the cache.
///
/// `first` is the flat index of the chunk's first element, which must lie on a whole code byte. `codes` are exactly
/// the chunk's code bytes, `scales` and `zero_points` exactly the parameters that [`Layout::param_range`] names. A
/// byte that ends the chunk is padded with 0. Under [`OnNonFinite::Null`] chunks must hold whole rows; the rows left
/// out are appended to `nulled_rows`, with the codes and parameters of a row of zeros. After a fault the outputs
/// hold no meaning.
///
/// # Errors
/// [`Fault::NonFinite`], [`Fault::Overflow`] and [`Fault::RangeOverflow`], with flat indices of the item.
///
/// # Panics
/// Where an output has another length than the chunk asks for.
#[allow(
    clippy::too_many_arguments,
    reason = "one call a chunk; a struct would only rename the same nine things"
)]
pub fn fused(
    values: Values<'_>,
    first: u64,
    layout: &Layout,
    affine: &Affine,
    policy: OnNonFinite,
    codes: &mut [u8],
    scales: &mut [f32],
    zero_points: ZeroPointsMut<'_>,
    nulled_rows: &mut Vec<u64>,
) -> Result<Counters, Fault> {
    Kernels::best().fused(values, first, layout, affine, policy, codes, scales, zero_points, nulled_rows)
}

/// First pass over domains larger than a chunk: merges the values of `[first, first + len)` into the ranges of the
/// domains it touches, in the order of [`Layout::param_range`] (all `k` columns for [`Granularity::Dimension`]).
///
/// Ranges begin as [`Range::EMPTY`]. Under [`OnNonFinite::Null`] chunks must hold whole rows.
///
/// # Errors
/// [`Fault::NonFinite`] and [`Fault::Overflow`].
///
/// # Panics
/// Where `ranges` has another length than the chunk asks for.
pub fn scan(
    values: Values<'_>,
    first: u64,
    layout: &Layout,
    policy: OnNonFinite,
    ranges: &mut [Range],
) -> Result<(), Fault> {
    Kernels::best().scan(values, first, layout, policy, ranges)
}

/// Second pass, or given parameters: codes of `[first, first + len)` from the scales and zero points of the domains
/// it touches, in the order of [`Layout::param_range`]. Scales are finite and above 0.
///
/// The policy is applied here as well, because given parameters come without a scan; what is counted is the same.
/// Rows left out are appended to `nulled_rows`, with the code of 0.0 throughout.
///
/// # Errors
/// [`Fault::NonFinite`] and [`Fault::Overflow`].
///
/// # Panics
/// Where a slice has another length than the chunk asks for.
#[allow(clippy::too_many_arguments, reason = "as `fused`")]
pub fn encode<'z>(
    values: Values<'_>,
    first: u64,
    layout: &Layout,
    affine: &Affine,
    policy: OnNonFinite,
    scales: &[f32],
    zero_points: impl Into<ZeroPoints<'z>>,
    codes: &mut [u8],
    nulled_rows: &mut Vec<u64>,
) -> Result<Counters, Fault> {
    let zeros = zero_points.into();
    Kernels::best().encode(values, first, layout, affine, policy, scales, zeros, codes, nulled_rows)
}

impl Kernels {
    /// [`fused`] on this path.
    #[allow(clippy::too_many_arguments, clippy::missing_errors_doc, reason = "as the free function")]
    pub fn fused(
        &self,
        values: Values<'_>,
        first: u64,
        layout: &Layout,
        affine: &Affine,
        policy: OnNonFinite,
        codes: &mut [u8],
        scales: &mut [f32],
        mut zero_points: ZeroPointsMut<'_>,
        nulled_rows: &mut Vec<u64>,
    ) -> Result<Counters, Fault> {
        check(values, first, layout, affine, codes.len(), scales.len(), zero_points.len());
        if values.is_empty() {
            scales.fill(1.0);
            (0..scales.len()).for_each(|i| zero_points.set(i, 0));
            return Ok(Counters { n_degenerate_groups: scales.len() as u64, ..Counters::default() });
        }
        if matches!(layout.granularity, Granularity::Tensor | Granularity::Dimension) {
            let mut ranges = vec![Range::EMPTY; scales.len()];
            self.scan(values, first, layout, policy, &mut ranges)?;
            let mut degenerate = 0;
            for (i, range) in ranges.iter().enumerate() {
                let (scale, zero_point, is_degenerate) =
                    params_from_range(*range, affine).map_err(|fault| at_element(fault, first + i as u64))?;
                scales[i] = scale;
                zero_points.set(i, zero_point);
                degenerate += u64::from(is_degenerate);
            }
            let zeros = zero_points.as_ref();
            let mut counters =
                self.encode(values, first, layout, affine, policy, scales, zeros, codes, nulled_rows)?;
            counters.n_degenerate_groups = degenerate;
            return Ok(counters);
        }

        let source = Source::new(self, values, first, layout, policy)?;
        let joined = layout.joined(affine.bits);
        let mut work = Encoder::new(source, layout, affine, codes);
        let base = layout.param_index(first);
        let mut pieces = joined.pieces(first, values.len(), affine.bits);
        while let Some(piece) = pieces.next() {
            let mut at = 0;
            while at < piece.len {
                let part = part_in_group(&joined, &piece, at, affine);
                let param = (joined.param_index(part.row * joined.k + part.col) - base) as usize;
                let (count, stride) = adjoining(&joined, &piece, &part, &pieces, affine);
                let mut params = Params::Own { scales, zero_points: &mut zero_points, first: param };
                let run = work.groups(&part, count, stride, &mut params);
                if run > 0 {
                    pieces.skip_rows((run * part.len - 1) / piece.len);
                    at += run * part.len;
                    continue;
                }
                let (scale, zero_point) = work.fuse(&part)?;
                scales[param] = scale;
                zero_points.set(param, zero_point);
                at += part.len;
            }
        }
        Ok(work.finish(nulled_rows))
    }

    /// [`scan`] on this path.
    #[allow(clippy::missing_errors_doc, reason = "as the free function")]
    pub fn scan(
        &self,
        values: Values<'_>,
        first: u64,
        layout: &Layout,
        policy: OnNonFinite,
        ranges: &mut [Range],
    ) -> Result<(), Fault> {
        let params = layout.param_range(first, values.len() as u64);
        assert_eq!(ranges.len() as u64, params.end - params.start, "ranges of a chunk of {}", values.len());
        let mut source = Source::new(self, values, first, layout, policy)?;
        let mut tile = [0f32; TILE];
        if layout.granularity == Granularity::Dimension {
            return scan_columns(&mut source, layout, ranges, &mut tile);
        }
        // 8 bits: codes play no part here, so rows may always be joined.
        let joined = layout.joined(8);
        for piece in joined.pieces(first, values.len(), 8) {
            let mut at = 0;
            while at < piece.len {
                let part = part_in_group(&joined, &piece, at, &BYTES);
                let index = joined.param_index(part.row * joined.k + part.col) - params.start;
                ranges[index as usize].merge(source.range(part.at, part.len, &mut tile)?);
                at += part.len;
            }
        }
        Ok(())
    }

    /// [`encode`] on this path.
    #[allow(clippy::too_many_arguments, clippy::missing_errors_doc, reason = "as the free function")]
    pub fn encode(
        &self,
        values: Values<'_>,
        first: u64,
        layout: &Layout,
        affine: &Affine,
        policy: OnNonFinite,
        scales: &[f32],
        zero_points: ZeroPoints<'_>,
        codes: &mut [u8],
        nulled_rows: &mut Vec<u64>,
    ) -> Result<Counters, Fault> {
        check(values, first, layout, affine, codes.len(), scales.len(), zero_points.len());
        let source = Source::new(self, values, first, layout, policy)?;
        let mut work = Encoder::new(source, layout, affine, codes);
        if layout.granularity == Granularity::Dimension {
            let (wide, times) = layout.repeated(affine.bits, values.len());
            let params = ColumnParams::new(scales, zero_points, affine, times);
            for piece in wide.pieces(first, values.len(), affine.bits) {
                work.encode_columns(&piece, &params)?;
            }
            return Ok(work.finish(nulled_rows));
        }
        let joined = layout.joined(affine.bits);
        let base = layout.param_range(first, values.len() as u64).start;
        let mut pieces = joined.pieces(first, values.len(), affine.bits);
        while let Some(piece) = pieces.next() {
            let mut at = 0;
            while at < piece.len {
                let part = part_in_group(&joined, &piece, at, affine);
                let param = (joined.param_index(part.row * joined.k + part.col) - base) as usize;
                if part.len <= BLOCK {
                    let (count, stride) = adjoining(&joined, &piece, &part, &pieces, affine);
                    let mut params = Params::Given { scales, zero_points, first: param };
                    let run = work.groups(&part, count, stride, &mut params);
                    if run > 0 {
                        pieces.skip_rows((run * part.len - 1) / piece.len);
                        at += run * part.len;
                        continue;
                    }
                }
                work.encode(&part, scales[param], zero_points.get(param))?;
                at += part.len;
            }
        }
        Ok(work.finish(nulled_rows))
    }
}

/// The first pass where every column has a range of its own.
fn scan_columns(
    source: &mut Source<'_>,
    layout: &Layout,
    ranges: &mut [Range],
    tile: &mut [f32; TILE],
) -> Result<(), Fault> {
    let len = source.values.len();
    let (wide, times) = layout.repeated(8, len);
    let mut min: Vec<f32> = std::iter::repeat_n(&*ranges, times).flatten().map(|range| range.min).collect();
    let mut max: Vec<f32> = std::iter::repeat_n(&*ranges, times).flatten().map(|range| range.max).collect();
    for piece in wide.pieces(source.first, len, 8) {
        let mut done = 0;
        while done < piece.len {
            let n = (piece.len - done).min(TILE);
            let (at, column) = (piece.at + done, piece.col as usize + done);
            let (min, max) = (&mut min[column..column + n], &mut max[column..column + n]);
            done += n;
            if source.direct(at, n) {
                let values = source.values.slice(at..at + n);
                if source.kernels.widen(Widen { values, min, max }) {
                    continue;
                }
            }
            let tile = &mut tile[..n];
            if source.load(at, tile)?.infinities > 0 {
                tile.iter_mut().filter(|v| v.is_infinite()).for_each(|v| *v = 0.0);
            }
            source.kernels.merge_columns(tile, min, max);
        }
    }
    for (i, (&min, &max)) in min.iter().zip(&max).enumerate() {
        ranges[i % layout.k as usize].merge(Range { min, max });
    }
    Ok(())
}

/// How many domains as long as `part` adjoin it, itself included, and how many bits one's codes lie from the next's:
/// those in the rest of its piece, or, where rows are domains that begin on bytes, those that follow it.
fn adjoining(layout: &Layout, piece: &Piece, part: &Piece, rest: &Pieces, affine: &Affine) -> (usize, usize) {
    let codes = part.len * usize::from(layout.stored_bits(affine.bits));
    if layout.granularity != Granularity::Group || part.len as u64 != layout.group {
        return (1, codes);
    }
    if part.len == piece.len && part.len as u64 == layout.k {
        return (1 + rest.whole_rows(), layout.row_bytes(affine.bits) as usize * 8);
    }
    ((piece.len - (part.at - piece.at)) / part.len, codes)
}

/// Stands in where only places in the value order matter.
const BYTES: Affine = Affine {
    scheme: crate::Scheme::Int8,
    mapping: crate::Mapping::Symmetric,
    arith: crate::Arith::Div,
    qmin: -127,
    qmax: 127,
    bits: 8,
    signed: true,
};

fn check(
    values: Values<'_>,
    first: u64,
    layout: &Layout,
    affine: &Affine,
    codes: usize,
    scales: usize,
    zero_points: Option<usize>,
) {
    let len = values.len() as u64;
    let params = layout.param_range(first, len);
    assert!(len == 0 || first + len <= layout.elements(), "a chunk of {len} at {first} of {layout:?}");
    assert!(
        len == 0 || layout.code_bit(first, affine.bits).is_multiple_of(8),
        "a chunk begins inside a byte at {first}"
    );
    assert_eq!(
        codes as u64,
        layout.chunk_code_bytes(first, len, affine.bits),
        "code bytes of a chunk of {len}"
    );
    assert_eq!(scales as u64, params.end - params.start, "scales of a chunk of {len}");
    assert!(zero_points.is_none_or(|n| n == scales), "{zero_points:?} zero points, {scales} scales");
}

/// The part of a piece, from offset `at` in it, that lies in one domain.
fn part_in_group(layout: &Layout, piece: &Piece, at: usize, affine: &Affine) -> Piece {
    let col = piece.col + at as u64;
    let mut len = piece.len - at;
    if layout.granularity == Granularity::Group {
        let rest = layout.group - col % layout.group;
        len = usize::try_from(rest).map_or(len, |rest| rest.min(len));
    }
    let bit = piece.bit + at * usize::from(layout.stored_bits(affine.bits));
    Piece { at: piece.at + at, len, row: piece.row, col, bit }
}

pub(crate) fn at_element(fault: Fault, element: u64) -> Fault {
    match fault {
        Fault::RangeOverflow { min, max, .. } => Fault::RangeOverflow { index: element, min, max },
        other => other,
    }
}
