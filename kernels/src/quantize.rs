//! From values to codes: whole domains in one go, or ranges first and codes afterwards.

use crate::fault::{Counters, Fault, OnNonFinite};
use crate::layout::{Granularity, Layout, Piece};
use crate::packing::put;
use crate::path::{Kernels, Step, TILE};
use crate::scheme::{Affine, Range, ZeroPoints, ZeroPointsMut, params_from_range};
use crate::source::Source;
use crate::values::{FloatType, Values};

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
        for piece in joined.pieces(first, values.len(), affine.bits) {
            let mut at = 0;
            while at < piece.len {
                let part = part_in_group(&joined, &piece, at, affine);
                let param = (joined.param_index(part.row * joined.k + part.col) - base) as usize;
                let groups = (piece.len - at) / part.len;
                let run = work.fuse_groups(&part, groups, &mut scales[param..], &mut zero_points, param);
                if run > 0 {
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
        // 8 bits: codes play no part here, so rows may always be joined.
        let joined = layout.joined(8);
        for piece in joined.pieces(first, values.len(), 8) {
            let mut at = 0;
            while at < piece.len {
                let part = part_in_group(&joined, &piece, at, &BYTES);
                let mut done = 0;
                while done < part.len {
                    let tile = &mut tile[..(part.len - done).min(TILE)];
                    let loaded = source.load(part.at + done, tile)?;
                    if joined.granularity == Granularity::Dimension {
                        let column = part.col as usize + done;
                        let columns = &mut ranges[column..column + tile.len()];
                        if loaded.infinities > 0 {
                            tile.iter_mut().filter(|v| v.is_infinite()).for_each(|v| *v = 0.0);
                        }
                        self.merge_columns(tile, columns);
                    } else {
                        let index = joined.param_index(part.row * joined.k + part.col) - params.start;
                        ranges[index as usize].merge(loaded.range);
                    }
                    done += tile.len();
                }
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
        let joined = layout.joined(affine.bits);
        let mut work = Encoder::new(source, layout, affine, codes);
        let base = layout.param_range(first, values.len() as u64).start;
        let columns: Vec<i32> = match joined.granularity {
            Granularity::Dimension => (0..scales.len()).map(|i| zero_points.get(i)).collect(),
            _ => Vec::new(),
        };
        for piece in joined.pieces(first, values.len(), affine.bits) {
            if joined.granularity == Granularity::Dimension {
                work.encode_columns(&piece, scales, &columns)?;
                continue;
            }
            let mut at = 0;
            while at < piece.len {
                let part = part_in_group(&joined, &piece, at, affine);
                let param = (joined.param_index(part.row * joined.k + part.col) - base) as usize;
                let step = Step::new(scales[param], zero_points.get(param), affine);
                work.encode(&part, &step)?;
                at += part.len;
            }
        }
        Ok(work.finish(nulled_rows))
    }
}

/// Chunks of this many values or more write past the cache: their codes would push out what is read next.
const STREAM_FROM: usize = 1 << 17;

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

fn at_element(fault: Fault, element: u64) -> Fault {
    match fault {
        Fault::RangeOverflow { min, max, .. } => Fault::RangeOverflow { index: element, min, max },
        other => other,
    }
}

/// Writes the codes of one chunk, tile by tile.
struct Encoder<'a> {
    source: Source<'a>,
    affine: &'a Affine,
    stored: u8,
    codes: &'a mut [u8],
    tile: [f32; TILE],
    scratch: [u8; TILE],
    counters: Counters,
}

impl<'a> Encoder<'a> {
    fn new(source: Source<'a>, layout: &Layout, affine: &'a Affine, codes: &'a mut [u8]) -> Self {
        let counters = Counters {
            n: source.values.len() as u64,
            n_nonfinite: source.nulled_values,
            ..Counters::default()
        };
        let stored = layout.stored_bits(affine.bits);
        Self { source, affine, stored, codes, tile: [0.0; TILE], scratch: [0; TILE], counters }
    }

    /// One whole domain: a single load where it fits a tile.
    fn fuse(&mut self, part: &Piece) -> Result<(f32, i32), Fault> {
        let mut range = Range::EMPTY;
        let mut infinities = 0;
        let mut done = 0;
        while done < part.len {
            let n = (part.len - done).min(TILE);
            let loaded = self.source.load(part.at + done, &mut self.tile[..n])?;
            range.merge(loaded.range);
            if part.len <= TILE {
                self.counters.n_nonfinite += loaded.nonfinite;
                infinities = loaded.infinities;
            }
            done += n;
        }
        let (scale, zero_point, degenerate) = params_from_range(range, self.affine)
            .map_err(|fault| at_element(fault, self.source.first + part.at as u64))?;
        self.counters.n_degenerate_groups += u64::from(degenerate);
        let step = Step::new(scale, zero_point, self.affine);
        if part.len <= TILE {
            self.write(part.len, part.bit, &step, infinities);
        } else {
            self.encode(part, &step)?;
        }
        Ok((scale, zero_point))
    }

    /// As many adjoining groups like `part` as the path can take on its own, at most `groups`: straight from the
    /// source, or from a tile where values have to be widened or rows left out.
    fn fuse_groups(
        &mut self,
        part: &Piece,
        groups: usize,
        scales: &mut [f32],
        zero_points: &mut ZeroPointsMut<'_>,
        param: usize,
    ) -> usize {
        const BATCH: usize = 256;
        let kernels = self.source.kernels;
        let bits = usize::from(self.affine.bits);
        if self.stored != self.affine.bits
            || !part.bit.is_multiple_of(8)
            || !kernels.takes_groups_of(part.len)
        {
            return 0;
        }
        let direct = self.source.values.dtype() == FloatType::F32 && self.source.nulled.is_empty();
        let batch = if direct { BATCH } else { TILE / part.len };
        let stream = self.source.values.len() >= STREAM_FROM;
        let mut zeros = [0; BATCH];
        let mut done = 0;
        while done < groups && batch > 0 {
            let n = (groups - done).min(batch);
            let at = part.at + done * part.len;
            let values = if direct {
                self.source.values.slice(at..at + n * part.len)
            } else {
                let tile = &mut self.tile[..n * part.len];
                self.source.load_unchecked(at, tile);
                Values::from_f32(tile)
            };
            let byte = part.bit / 8 + done * part.len * bits / 8;
            let codes = &mut self.codes[byte..byte + n * part.len * bits / 8];
            let (scales, zeros) = (&mut scales[done..done + n], &mut zeros[..n]);
            let run = kernels.groups(values, part.len, codes, scales, zeros, self.affine, stream);
            self.counters.n_clipped += run.clipped;
            self.counters.n_degenerate_groups += run.degenerate;
            for (i, &zero_point) in zeros.iter().enumerate().take(run.groups) {
                zero_points.set(param + done + i, zero_point);
            }
            done += run.groups;
            if run.groups < n {
                break;
            }
        }
        done
    }

    /// A part of a domain whose parameters are known.
    fn encode(&mut self, part: &Piece, step: &Step) -> Result<(), Fault> {
        let mut done = 0;
        while done < part.len {
            let n = (part.len - done).min(TILE);
            let loaded = self.source.load(part.at + done, &mut self.tile[..n])?;
            self.counters.n_nonfinite += loaded.nonfinite;
            self.write(n, part.bit + done * usize::from(self.stored), step, loaded.infinities);
            done += n;
        }
        Ok(())
    }

    /// A part of a row with parameters for every column.
    fn encode_columns(&mut self, piece: &Piece, scales: &[f32], zero_points: &[i32]) -> Result<(), Fault> {
        let mut done = 0;
        while done < piece.len {
            let n = (piece.len - done).min(TILE);
            let loaded = self.source.load(piece.at + done, &mut self.tile[..n])?;
            self.counters.n_nonfinite += loaded.nonfinite;
            let columns = piece.col as usize + done..piece.col as usize + done + n;
            let kernels = self.source.kernels;
            let (scales, zeros) = (&scales[columns.clone()], &zero_points[columns]);
            let clipped =
                kernels.encode_columns(&self.tile[..n], &mut self.scratch[..n], scales, zeros, self.affine);
            self.counters.n_clipped += clipped - loaded.infinities.min(clipped);
            let bit = piece.bit + done * usize::from(self.stored);
            put(kernels, &self.scratch[..n], self.stored, self.codes, bit);
            done += n;
        }
        Ok(())
    }

    /// Encodes the first `n` values of the tile to a bit position.
    fn write(&mut self, n: usize, bit: usize, step: &Step, infinities: u64) {
        let kernels = self.source.kernels;
        let tile = &self.tile[..n];
        let clipped = if self.stored == 8 {
            kernels.encode_tile(tile, &mut self.codes[bit / 8..bit / 8 + n], step)
        } else {
            let scratch = &mut self.scratch[..n];
            let clipped = kernels.encode_tile(tile, scratch, step);
            put(kernels, scratch, self.stored, self.codes, bit);
            clipped
        };
        // Infinities lie outside any bounds, but they are counted as what they are.
        self.counters.n_clipped += clipped - infinities.min(clipped);
    }

    fn finish(self, nulled_rows: &mut Vec<u64>) -> Counters {
        nulled_rows.extend_from_slice(&self.source.nulled);
        self.counters
    }
}
