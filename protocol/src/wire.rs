//! Little-endian cursors over frames and descriptors: every read is checked, no length is believed before it is compared.

use thiserror::Error;

/// A frame or descriptor that does not follow PROTOCOL.md; always the sender's fault.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WireError {
    /// The bytes end before the value does.
    #[error("{what}: needs {need} bytes, {have} are left")]
    Short {
        /// The field being read.
        what: &'static str,
        /// Bytes the field needs.
        need: u64,
        /// Bytes that are left.
        have: u64,
    },
    /// A value outside its set or range.
    #[error("{what}: {value} is not allowed")]
    Value {
        /// The field.
        what: &'static str,
        /// The value found.
        value: u64,
    },
    /// A string that is not UTF-8.
    #[error("{what}: not UTF-8")]
    Utf8 {
        /// The field.
        what: &'static str,
    },
    /// Bytes after the end of the message.
    #[error("{extra} bytes too many")]
    Trailing {
        /// How many.
        extra: u64,
    },
    /// Sizes whose sum or product passes 2^63.
    #[error("{what}: the size overflows")]
    Overflow {
        /// The field.
        what: &'static str,
    },
}

/// Reads values from the front of a byte slice.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    bytes: &'a [u8],
}

macro_rules! read_number {
    ($($name:ident: $type:ty),*) => {$(
        #[doc = concat!("Reads one `", stringify!($type), "`.")]
        pub fn $name(&mut self, what: &'static str) -> Result<$type, WireError> {
            let (head, rest) = self.bytes.split_first_chunk().ok_or(self.short(what, size_of::<$type>() as u64))?;
            self.bytes = rest;
            Ok(<$type>::from_le_bytes(*head))
        }
    )*};
}

impl<'a> Reader<'a> {
    /// A reader at the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    read_number!(u8: u8, u16: u16, u32: u32, u64: u64, i32: i32, i64: i64, f32: f32, f64: f64);

    /// Reads `len` bytes.
    pub fn bytes(&mut self, len: u64, what: &'static str) -> Result<&'a [u8], WireError> {
        let short = self.short(what, len);
        let len = usize::try_from(len).map_err(|_| short.clone())?;
        let (head, rest) = self.bytes.split_at_checked(len).ok_or(short)?;
        self.bytes = rest;
        Ok(head)
    }

    /// Reads sixteen bytes (a token, a secret, a digest).
    pub fn key(&mut self, what: &'static str) -> Result<[u8; 16], WireError> {
        let (head, rest) = self.bytes.split_first_chunk().ok_or(self.short(what, 16))?;
        self.bytes = rest;
        Ok(*head)
    }

    /// Reads a string: its length, then UTF-8.
    pub fn string(&mut self, what: &'static str) -> Result<&'a str, WireError> {
        let len = self.u32(what)?;
        std::str::from_utf8(self.bytes(u64::from(len), what)?).map_err(|_| WireError::Utf8 { what })
    }

    /// Reads a count of things that take at least `least` bytes each, so that a giant count is refused before anything is reserved.
    pub fn count(&mut self, n: u64, least: u64, what: &'static str) -> Result<usize, WireError> {
        let need = n.checked_mul(least).ok_or(WireError::Overflow { what })?;
        if need > self.remaining() {
            return Err(self.short(what, need));
        }
        usize::try_from(n).map_err(|_| WireError::Overflow { what })
    }

    /// Bytes that are left.
    pub fn remaining(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Fails unless everything was read.
    pub fn finish(self) -> Result<(), WireError> {
        match self.bytes.len() {
            0 => Ok(()),
            extra => Err(WireError::Trailing { extra: extra as u64 }),
        }
    }

    fn short(&self, what: &'static str, need: u64) -> WireError {
        WireError::Short { what, need, have: self.remaining() }
    }
}

/// Appends values to a byte vector that is kept between messages.
#[derive(Debug)]
pub struct Writer<'a> {
    bytes: &'a mut Vec<u8>,
}

macro_rules! write_number {
    ($($name:ident: $type:ty),*) => {$(
        #[doc = concat!("Appends one `", stringify!($type), "`.")]
        pub fn $name(&mut self, value: $type) -> &mut Self {
            self.bytes.extend_from_slice(&value.to_le_bytes());
            self
        }
    )*};
}

impl<'a> Writer<'a> {
    /// A writer at the end of `bytes`.
    pub fn new(bytes: &'a mut Vec<u8>) -> Self {
        Self { bytes }
    }

    write_number!(u8: u8, u16: u16, u32: u32, u64: u64, i32: i32, i64: i64, f32: f32, f64: f64);

    /// Appends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends a string: its length, then its bytes.
    pub fn string(&mut self, text: &str) -> &mut Self {
        // A string past 4 GiB cannot stand in a 64 KiB frame or a window: the peer's length check refuses what is cut here.
        let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
        self.u32(len).raw(text.as_bytes())
    }
}
