//! Writes the codes of one chunk: runs of groups and columns where the path takes them straight from the source, tile
//! by tile where it does not or where values are not finite.

use crate::fault::{Counters, Fault};
use crate::layout::{Layout, Piece};
use crate::packing::put;
use crate::path::groups::{Columns, Groups, code_bytes};
use crate::path::{BLOCK, Step, TILE};
use crate::quantize::at_element;
use crate::scheme::{Affine, Arith, ZeroPoints, ZeroPointsMut, params_from_range};
use crate::source::Source;
use crate::values::{FloatType, Values};

/// Chunks of this many values or more write past the cache: their codes would push out what is read next.
const STREAM_FROM: usize = 1 << 17;

/// Groups that a path is given at most at once.
const BATCH: usize = 256;

pub(crate) struct Encoder<'a> {
    source: Source<'a>,
    affine: &'a Affine,
    stored: u8,
    codes: &'a mut [u8],
    tile: [f32; TILE],
    /// Codes one a byte, on their way to places inside bytes.
    scratch: [u8; BLOCK],
    scales: [f32; BATCH],
    zero_points: [i32; BATCH],
    counters: Counters,
}

/// The parameters of a run of groups. `first` is the index of the first group's.
pub(crate) enum Params<'p, 'z> {
    /// To be found.
    Own { scales: &'p mut [f32], zero_points: &'p mut ZeroPointsMut<'z>, first: usize },
    /// Given, one of each a group.
    Given { scales: &'p [f32], zero_points: ZeroPoints<'z>, first: usize },
    /// Given, the same for all.
    Same { scale: f32, zero_point: i32 },
}

/// The parameters of every column.
pub(crate) struct ColumnParams {
    scales: Vec<f32>,
    /// The scales, or their reciprocals.
    factors: Vec<f32>,
    zero_points: Vec<i32>,
    straight: bool,
}

impl ColumnParams {
    /// As many times as rows were taken together.
    pub(crate) fn new(scales: &[f32], zero_points: ZeroPoints<'_>, affine: &Affine, times: usize) -> Self {
        let zeros: Vec<i32> = (0..scales.len()).map(|i| zero_points.get(i)).collect();
        let straight = scales.iter().zip(&zeros).all(|(&scale, &zero)| suits(scale, zero, affine));
        let scales = scales.repeat(times);
        let factors = match affine.arith {
            Arith::Div => scales.clone(),
            Arith::Recip => scales.iter().map(|scale| 1.0 / scale).collect(),
        };
        Self { scales, factors, zero_points: zeros.repeat(times), straight }
    }
}

/// Whether given parameters are such that a path needs no closer look: no quotient of a finite value is NaN, and 0
/// has a code.
fn suits(scale: f32, zero_point: i32, affine: &Affine) -> bool {
    let factor = match affine.arith {
        Arith::Div => scale,
        Arith::Recip => 1.0 / scale,
    };
    scale > 0.0 && factor.is_finite() && (affine.qmin..=affine.qmax).contains(&zero_point)
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(source: Source<'a>, layout: &Layout, affine: &'a Affine, codes: &'a mut [u8]) -> Self {
        let counters = Counters {
            n: source.values.len() as u64,
            n_nonfinite: source.nulled_values,
            ..Counters::default()
        };
        Self {
            source,
            affine,
            stored: layout.stored_bits(affine.bits),
            codes,
            tile: [0.0; TILE],
            scratch: [0; BLOCK],
            scales: [0.0; BATCH],
            zero_points: [0; BATCH],
            counters,
        }
    }

    /// As many of `count` domains like `part`, their codes `stride` bits apart, as the path can take on its own:
    /// straight from the source, or from a tile where values have to be widened or rows left out.
    pub(crate) fn groups(
        &mut self,
        part: &Piece,
        count: usize,
        stride: usize,
        params: &mut Params<'_, '_>,
    ) -> usize {
        let kernels = self.source.kernels;
        if !kernels.takes(FloatType::F32) {
            return 0;
        }
        let len = part.len;
        let in_place = part.bit.is_multiple_of(8) && (stride.is_multiple_of(8) || count == 1);
        let stored = if in_place { self.stored } else { 8 };
        let most = if in_place { BATCH } else { BLOCK / len };
        let stream = in_place && kernels.streams && self.source.values.len() >= STREAM_FROM;
        // Small at first: where the path stops early, little was prepared in vain.
        let mut batch = 16;
        let mut done = 0;
        while done < count {
            let at = part.at + done * len;
            let n = (count - done).min(most).min(batch);
            let direct = self.source.direct(at, n * len);
            let n = self.prepare(params, done, if direct { n } else { n.min(TILE / len) });
            if n == 0 {
                break;
            }
            batch = BATCH;
            let values = if direct {
                self.source.values.slice(at..at + n * len)
            } else {
                let tile = &mut self.tile[..n * len];
                self.source.load_unchecked(at, tile);
                Values::from_f32(tile)
            };
            let bit = part.bit + done * stride;
            let codes = if in_place {
                &mut self.codes[bit / 8..bit / 8 + n * code_bytes(len, stored)]
            } else {
                &mut self.scratch[..n * len]
            };
            let run = kernels.groups(Groups {
                values,
                len,
                codes,
                scales: &mut self.scales[..n],
                zero_points: &mut self.zero_points[..n],
                given: !matches!(params, Params::Own { .. }),
                affine: self.affine,
                stored,
                stream,
            });
            if !in_place {
                put(kernels, &self.scratch[..run.groups * len], self.stored, self.codes, bit);
            }
            self.counters.n_clipped += run.clipped;
            self.counters.n_degenerate_groups += run.degenerate;
            if let Params::Own { scales, zero_points, first } = params {
                let from = *first + done;
                scales[from..from + run.groups].copy_from_slice(&self.scales[..run.groups]);
                zero_points.set_all(from, &self.zero_points[..run.groups]);
            }
            done += run.groups;
            if run.groups < n {
                break;
            }
        }
        done
    }

    /// Brings given parameters of up to `n` groups from the `done`th on into place; how many suit the path.
    fn prepare(&mut self, params: &Params<'_, '_>, done: usize, n: usize) -> usize {
        match *params {
            Params::Own { .. } => n,
            Params::Same { scale, zero_point } => {
                self.scales[..n].fill(scale);
                self.zero_points[..n].fill(zero_point);
                if suits(scale, zero_point, self.affine) { n } else { 0 }
            }
            Params::Given { scales, ref zero_points, first } => {
                for i in 0..n {
                    let (scale, zero_point) = (scales[first + done + i], zero_points.get(first + done + i));
                    if !suits(scale, zero_point, self.affine) {
                        return i;
                    }
                    (self.scales[i], self.zero_points[i]) = (scale, zero_point);
                }
                n
            }
        }
    }

    /// One whole domain: a single load where it fits a tile.
    pub(crate) fn fuse(&mut self, part: &Piece) -> Result<(f32, i32), Fault> {
        let mut infinities = 0;
        let range = if part.len <= TILE {
            let loaded = self.source.load(part.at, &mut self.tile[..part.len])?;
            self.counters.n_nonfinite += loaded.nonfinite;
            infinities = loaded.infinities;
            loaded.range
        } else {
            self.source.range(part.at, part.len, &mut self.tile)?
        };
        let (scale, zero_point, degenerate) = params_from_range(range, self.affine)
            .map_err(|fault| at_element(fault, self.source.first + part.at as u64))?;
        self.counters.n_degenerate_groups += u64::from(degenerate);
        if part.len <= TILE {
            self.write(part.len, part.bit, &Step::new(scale, zero_point, self.affine), infinities);
        } else {
            self.encode(part, scale, zero_point)?;
        }
        Ok((scale, zero_point))
    }

    /// A part of a domain whose parameters are known.
    pub(crate) fn encode(&mut self, part: &Piece, scale: f32, zero_point: i32) -> Result<(), Fault> {
        let step = Step::new(scale, zero_point, self.affine);
        let stored = usize::from(self.stored);
        let block = if self.source.direct(part.at, part.len) { BLOCK } else { TILE };
        let mut done = 0;
        while done < part.len {
            let len = (part.len - done).min(block);
            let count = (part.len - done) / len;
            let rest = Piece { at: part.at + done, len, bit: part.bit + done * stored, ..*part };
            let run = self.groups(&rest, count, len * stored, &mut Params::Same { scale, zero_point });
            done += run * len;
            if run == count {
                continue;
            }
            // The block that the path stopped at.
            let end = done + len;
            while done < end {
                let n = (end - done).min(TILE);
                let loaded = self.source.load(part.at + done, &mut self.tile[..n])?;
                self.counters.n_nonfinite += loaded.nonfinite;
                self.write(n, part.bit + done * stored, &step, loaded.infinities);
                done += n;
            }
        }
        Ok(())
    }

    /// A part of a row with parameters for every column.
    pub(crate) fn encode_columns(&mut self, piece: &Piece, params: &ColumnParams) -> Result<(), Fault> {
        let kernels = self.source.kernels;
        let mut done = 0;
        while done < piece.len {
            let n = (piece.len - done).min(TILE);
            let at = piece.at + done;
            let bit = piece.bit + done * usize::from(self.stored);
            let from = piece.col as usize + done;
            done += n;
            if params.straight && kernels.takes(FloatType::F32) && self.straight(at, n, bit, params, from) {
                continue;
            }
            let loaded = self.source.load(at, &mut self.tile[..n])?;
            self.counters.n_nonfinite += loaded.nonfinite;
            let (scales, zeros) = (&params.scales[from..from + n], &params.zero_points[from..from + n]);
            let clipped =
                kernels.encode_columns(&self.tile[..n], &mut self.scratch[..n], scales, zeros, self.affine);
            self.counters.n_clipped += clipped - loaded.infinities.min(clipped);
            put(kernels, &self.scratch[..n], self.stored, self.codes, bit);
        }
        Ok(())
    }

    /// Columns from `from` on by the path's own means; `false` where it has to be done again in another way.
    fn straight(&mut self, at: usize, n: usize, bit: usize, params: &ColumnParams, from: usize) -> bool {
        let kernels = self.source.kernels;
        let values = if self.source.direct(at, n) {
            self.source.values.slice(at..at + n)
        } else {
            self.source.load_unchecked(at, &mut self.tile[..n]);
            Values::from_f32(&self.tile[..n])
        };
        let in_place = bit.is_multiple_of(8);
        let stored = if in_place { self.stored } else { 8 };
        let clipped = kernels.columns(Columns {
            values,
            codes: if in_place {
                &mut self.codes[bit / 8..bit / 8 + code_bytes(n, stored)]
            } else {
                &mut self.scratch[..n]
            },
            factors: &params.factors[from..from + n],
            zero_points: &params.zero_points[from..from + n],
            affine: self.affine,
            stored,
            stream: in_place && kernels.streams && self.source.values.len() >= STREAM_FROM,
        });
        let Some(clipped) = clipped else { return false };
        if !in_place {
            put(kernels, &self.scratch[..n], self.stored, self.codes, bit);
        }
        self.counters.n_clipped += clipped;
        true
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

    pub(crate) fn finish(&self, nulled_rows: &mut Vec<u64>) -> Counters {
        nulled_rows.extend_from_slice(&self.source.nulled);
        self.counters
    }
}
