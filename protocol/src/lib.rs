//! What both sides of shmquant must agree on: frames, descriptors, chunk lists and segments, and the Rust client.
//!
//! `PROTOCOL.md` beside this crate draws every byte; the modules follow its sections.

pub mod chunks;
pub mod descriptor;
pub mod field;
pub mod message;
pub mod segment;
pub mod socket;
pub mod meta;
pub mod wire;
