//! What the client streams to a daemon.

use std::ops::Range;

use crate::chunks::Chunk;
use crate::descriptor::Descriptor;

/// A table whose values can be written piece by piece.
pub trait Source: Sync {
    /// What is to be done, and the lengths of everything.
    fn descriptor(&self) -> &Descriptor;

    /// Writes the values of `chunk` of the descriptor's chunk list, or the bytes that it copies; `out` has exactly `chunk.work`
    /// bytes.
    fn fill(&self, chunk: &Chunk, out: &mut [u8]);

    /// A run of the bytes of an item's values as [`fill`](Self::fill) would write them, if they lie so in memory.
    fn slice(&self, _item: usize, _bytes: Range<u64>) -> Option<&[u8]> {
        None
    }

    /// Address and bytes of an item's values, if they lie one after another in this process and stay there while a request runs:
    /// where the daemon has that memory too, nothing is copied.
    fn lies_at(&self, _item: usize) -> Option<(usize, usize)> {
        None
    }
}
