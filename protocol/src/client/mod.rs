//! The Rust client.

mod source;

pub use source::Source;
