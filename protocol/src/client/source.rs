//! What the client streams to a daemon.

use crate::chunks::Chunk;
use crate::descriptor::Descriptor;

/// A table whose values can be written piece by piece.
pub trait Source: Sync {
    /// What is to be done, and the lengths of everything.
    fn descriptor(&self) -> &Descriptor;

    /// Writes the values of `chunk` of the descriptor's chunk list; `out` has exactly `chunk.bytes` bytes.
    fn fill(&self, chunk: &Chunk, out: &mut [u8]);

    /// Address and bytes of an item's values, if they lie one after another in this process and stay there while a request runs:
    /// where the daemon has that memory too, nothing is copied.
    fn lies_at(&self, _item: usize) -> Option<(usize, usize)> {
        None
    }
}
