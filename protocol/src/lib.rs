//! What both sides of shmquant must agree on: frames, descriptors, chunk lists and segments, and the Rust client.
//!
//! `PROTOCOL.md` beside this crate draws every byte; the modules follow its sections.

pub mod chunks;
pub mod client;
pub mod decode;
pub mod descriptor;
pub mod failpoint;
pub mod field;
pub mod files;
pub mod findings;
pub mod fit;
pub mod message;
pub mod meta;
pub mod segment;
pub mod socket;
pub mod table;
pub mod wire;
