//! What the daemon says about each quantized item (PROTOCOL.md section 7).

use crate::chunks::ChunkList;
use crate::descriptor::{Body, Descriptor};
use crate::wire::{Reader, WireError};

/// Bytes of one item.
pub(super) const ITEM_BYTES: u64 = 80;

/// How the values of one layer or column came through.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ItemReport {
    /// Values.
    pub n: u64,
    /// Values outside the range, which were clipped to it.
    pub n_clipped: u64,
    /// NaN and infinite values.
    pub n_nonfinite: u64,
    /// Groups (rows, tensors) whose values are all alike, so that they have no range.
    pub n_degenerate_groups: u64,
    /// Rows that became null.
    pub n_nulled: u64,
    /// Mean squared error; NaN unless metrics were asked for, and so are the next three.
    pub mse: f64,
    /// Signal to quantization noise, in dB.
    pub sqnr_db: f64,
    /// Largest absolute error.
    pub max_abs_err: f64,
    /// Cosine of the angle between values and decoded codes.
    pub cosine: f64,
    /// Bytes that crossed to the daemon for it.
    pub bytes_copied: u64,
    /// Bytes of its values that the daemon read where they lay.
    pub bytes_shared: u64,
}

impl ItemReport {
    pub(super) fn read_all(bytes: &[u8]) -> Vec<Self> {
        // Pieces are whole, so that no read fails.
        bytes.chunks_exact(ITEM_BYTES as usize).filter_map(|piece| Self::read(piece).ok()).collect()
    }

    /// Adds to each report what this side knows: how the values of its item crossed.
    pub(super) fn tell_ways(reports: &mut [Self], descriptor: &Descriptor, list: &ChunkList) {
        let mut copied = vec![0; descriptor.items.len()];
        for chunk in list.chunks.iter().filter(|chunk| !chunk.shared) {
            if let Some(bytes) = copied.get_mut(chunk.item as usize) {
                *bytes += chunk.bytes;
            }
        }
        let quantized = descriptor.items.iter().zip(copied).filter_map(|(item, copied)| match &item.body {
            Body::Values(values) => Some((values.place().map_or(0, |_| values.bytes()), copied)),
            Body::Keep { .. } => None,
        });
        for (report, (shared, copied)) in reports.iter_mut().zip(quantized) {
            (report.bytes_shared, report.bytes_copied) = (shared, copied);
        }
    }

    fn read(bytes: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::new(bytes);
        Ok(Self {
            n: r.u64("n")?,
            n_clipped: r.u64("n_clipped")?,
            n_nonfinite: r.u64("n_nonfinite")?,
            n_degenerate_groups: r.u64("n_degenerate_groups")?,
            n_nulled: r.u64("n_nulled")?,
            mse: r.f64("mse")?,
            sqnr_db: r.f64("sqnr_db")?,
            max_abs_err: r.f64("max_abs_err")?,
            cosine: r.f64("cosine")?,
            bytes_copied: 0,
            bytes_shared: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_lie_eighty_bytes_apart() {
        let mut bytes = vec![0; 160];
        bytes[80..88].copy_from_slice(&7u64.to_le_bytes());
        bytes[80 + 64..80 + 72].copy_from_slice(&0.5f64.to_le_bytes());
        let items = ItemReport::read_all(&bytes);
        assert_eq!(items.len(), 2);
        assert_eq!((items[0].n, items[1].n, items[1].cosine), (0, 7, 0.5));
    }
}
