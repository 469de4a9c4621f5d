//! What can be wrong with values, what to do about it, and what is counted on the way.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Why values could not be quantized, or a request is not one this crate knows.
///
/// The first three are the data's fault, the others the caller's.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Fault {
    /// A NaN or an infinity under [`OnNonFinite::Error`].
    #[error(
        "{count} non-finite value(s), the first is {value} at element {index}\n\
         hint: on_nonfinite=\"null\" or \"saturate\" accepts them"
    )]
    NonFinite {
        /// Flat index, in the item, of the first one.
        index: u64,
        /// How many the chunk holds.
        count: u64,
        /// The first one.
        value: f32,
    },
    /// A finite f64 that f32 cannot hold.
    #[error("the value {value:e} at element {index} does not fit float32")]
    Overflow {
        /// Flat index in the item.
        index: u64,
        /// The value as it came.
        value: f64,
    },
    /// `max - min` of one domain (row, group, dimension, tensor) is not finite in f32.
    #[error(
        "the range [{min:e}, {max:e}] of the values from element {index} on overflows float32\n\
         hint: a symmetric scheme needs no range"
    )]
    RangeOverflow {
        /// Flat index, in the item, of the domain's first element.
        index: u64,
        /// Smallest value, or 0.
        min: f32,
        /// Largest value, or 0.
        max: f32,
    },
    /// A word that names no scheme, mapping, granularity or policy.
    #[error("unknown {what} {word:?}\nhint: one of {known}")]
    UnknownWord {
        /// What the word should have named.
        what: &'static str,
        /// The word as it came.
        word: String,
        /// The words that exist, comma separated.
        known: String,
    },
    /// A mapping that the scheme does not have.
    #[error("scheme {scheme} has no {mapping} mapping")]
    UnsupportedMapping {
        /// The scheme.
        scheme: crate::Scheme,
        /// The mapping it lacks.
        mapping: crate::Mapping,
    },
}

/// What to do with NaN and infinities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum OnNonFinite {
    /// Refuse the chunk, naming the first one.
    #[default]
    Error,
    /// Leave the row out: of the ranges, of the codes (it gets the code of 0.0), and list it.
    Null,
    /// Keep them out of the range; infinities take the outermost codes, NaN the code of 0.0.
    Saturate,
}

impl OnNonFinite {
    /// All policies.
    pub const ALL: [Self; 3] = [Self::Error, Self::Null, Self::Saturate];

    /// The policy's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Null => "null",
            Self::Saturate => "saturate",
        }
    }
}

impl fmt::Display for OnNonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for OnNonFinite {
    type Err = Fault;

    fn from_str(word: &str) -> Result<Self, Fault> {
        by_name("on_nonfinite policy", word, &Self::ALL, |p| p.name())
    }
}

/// Finds the entry of `all` whose name is `word`, or says which words there are.
pub(crate) fn by_name<T: Copy>(
    what: &'static str,
    word: &str,
    all: &[T],
    name: impl Fn(T) -> &'static str,
) -> Result<T, Fault> {
    all.iter().copied().find(|&entry| name(entry) == word).ok_or_else(|| Fault::UnknownWord {
        what,
        word: word.to_owned(),
        known: all.iter().map(|&entry| name(entry)).collect::<Vec<_>>().join(", "),
    })
}

/// What was counted while values were encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Values seen.
    pub n: u64,
    /// Finite values whose quotient, rounded, fell outside the clamp bounds.
    pub n_clipped: u64,
    /// NaN and infinities.
    pub n_nonfinite: u64,
    /// Domains whose own scale would have been below [`crate::TINY`] (constant zero, mostly).
    pub n_degenerate_groups: u64,
}

impl Counters {
    /// Adds what another chunk counted.
    pub fn add(&mut self, other: Self) {
        self.n += other.n;
        self.n_clipped += other.n_clipped;
        self.n_nonfinite += other.n_nonfinite;
        self.n_degenerate_groups += other.n_degenerate_groups;
    }
}
