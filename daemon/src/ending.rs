//! The end of a result's file, once more at the end of its segment.
//!
//! A segment is larger than the file in it, and who maps a dataset by its path sees the segment. An Arrow IPC file is
//! read from its end; what lies between its messages and its footer does not matter. So with a second footer the whole
//! segment is the same file as the extent.
#![allow(unsafe_code, reason = "the result's memory is reached through its address")]

use crate::memory::Memory;

/// After the footer's flatbuffer: its length, and the magic.
const TRAILER: usize = 10;
const MAGIC: &[u8; 6] = b"ARROW1";

/// Repeats the end of a file of `length` bytes at the end of the memory, which only the caller may be writing to. Gives
/// the file's length, which grows to the whole memory if there is no room for two ends; `None` if there is no file.
pub(crate) fn repeat(memory: &dyn Memory, length: u64) -> Option<u64> {
    let length = usize::try_from(length).ok().filter(|length| *length <= memory.len())?;
    if length == memory.len() {
        return Some(length as u64);
    }
    let trailer = length.checked_sub(TRAILER)?;
    let end = read(memory, trailer, TRAILER)?;
    let ([l0, l1, l2, l3, ..], MAGIC) = (&end[..], end.last_chunk::<6>()?) else { return None };
    let footer_length = usize::try_from(i32::from_le_bytes([*l0, *l1, *l2, *l3])).ok()?;
    let mut tail = read(memory, trailer.checked_sub(footer_length)?, footer_length)?;
    // Flatbuffers are read where they lie, at a multiple of 8; what follows their last byte does not count.
    let pad = (memory.len() - TRAILER).checked_sub(footer_length)? % 8;
    tail.resize(footer_length + pad, 0);
    let padded = i32::try_from(tail.len()).ok()?;
    tail.extend_from_slice(&padded.to_le_bytes());
    tail.extend_from_slice(MAGIC);
    let start = memory.len().checked_sub(tail.len()).filter(|start| *start >= trailer - footer_length)?;
    // SAFETY: `start + tail.len()` is the memory's length, it is mapped writable, and nobody else has it yet.
    unsafe { std::ptr::copy_nonoverlapping(tail.as_ptr(), memory.as_ptr().wrapping_add(start), tail.len()) };
    Some(if start < length { memory.len() } else { length } as u64)
}

fn read(memory: &dyn Memory, at: usize, len: usize) -> Option<Vec<u8>> {
    at.checked_add(len).filter(|end| *end <= memory.len())?;
    let mut bytes = vec![0; len];
    // SAFETY: the range was compared with the mapping; the vector is memory of its own.
    unsafe { std::ptr::copy_nonoverlapping(memory.as_ptr().wrapping_add(at), bytes.as_mut_ptr(), len) };
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::cell::UnsafeCell;

    use super::*;

    struct Private(UnsafeCell<Vec<u8>>);

    // SAFETY: used by one thread.
    unsafe impl Send for Private {}
    // SAFETY: used by one thread.
    unsafe impl Sync for Private {}

    impl Memory for Private {
        fn as_ptr(&self) -> *mut u8 {
            // SAFETY: no reference to the bytes is held while this one is made.
            unsafe { (*self.0.get()).as_mut_ptr() }
        }

        fn len(&self) -> usize {
            // SAFETY: as above.
            unsafe { (*self.0.get()).len() }
        }
    }

    /// `messages` bytes, a footer, and `slack` bytes to the end of the memory.
    fn file(footer: &[u8], slack: usize) -> (Private, u64) {
        let mut bytes = vec![1u8; 64];
        bytes.extend_from_slice(footer);
        bytes.extend_from_slice(&(footer.len() as i32).to_le_bytes());
        bytes.extend_from_slice(MAGIC);
        let length = bytes.len();
        bytes.resize(length + slack, 0xa5);
        (Private(UnsafeCell::new(bytes)), length as u64)
    }

    fn footer_of(file: &[u8]) -> (usize, Vec<u8>) {
        let (rest, magic) = file.split_last_chunk::<6>().unwrap();
        let (rest, length) = rest.split_last_chunk::<4>().unwrap();
        let start = rest.len() - i32::from_le_bytes(*length) as usize;
        assert_eq!(magic, MAGIC);
        (start, rest[start..].to_vec())
    }

    #[test]
    fn both_ends_are_read_whatever_the_room() {
        for footer_length in [8, 13, 14, 40] {
            let footer: Vec<u8> = (0..footer_length).collect();
            let taken = 64 + footer.len() + TRAILER;
            // The memory ends at a multiple of 8, as segments do.
            for slack in (0..160).filter(|slack| (taken + slack).is_multiple_of(8)) {
                let (memory, length) = file(&footer, slack);
                let new = repeat(&memory, length).unwrap();
                let bytes = memory.0.into_inner();
                assert!(new == length || new == bytes.len() as u64, "{slack}");
                assert!(bytes[..64].iter().all(|b| *b == 1), "{slack}: a message was overwritten");
                for end in [new as usize, bytes.len()] {
                    let (start, found) = footer_of(&bytes[..end]);
                    assert_eq!(found[..footer.len()], footer[..], "{slack}");
                    assert!(found[footer.len()..].iter().all(|b| *b == 0) && start % 8 == 0, "{slack}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_file_is_left_alone() {
        let (memory, length) = file(&[7; 16], 64);
        assert_eq!(repeat(&memory, length - 1), None);
        assert_eq!(repeat(&memory, 5), None);
        assert_eq!(repeat(&memory, 1 << 40), None);
        let bytes = memory.0.into_inner();
        assert!(bytes[length as usize..].iter().all(|b| *b == 0xa5));
    }
}
