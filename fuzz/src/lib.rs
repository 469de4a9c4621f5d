//! What the fuzz targets run. The bodies are shared with the daemon's tests, and so is what they stand on.

mod bodies;
#[path = "../../daemon/tests/raw/mod.rs"]
mod raw;
mod script;
#[path = "../../daemon/tests/tables/mod.rs"]
mod tables;

/// A datagram.
pub fn frames(data: &[u8]) {
    bodies::frames(data);
}

/// A descriptor, and chunk lists.
pub fn descriptors(data: &[u8]) {
    bodies::descriptors(data);
}

/// A descriptor and what is in the window, to the result.
pub fn planner(data: &[u8]) {
    bodies::planner(data);
}

/// What some clients of one daemon do.
pub fn sessions(data: &[u8]) {
    script::sessions(data);
}
