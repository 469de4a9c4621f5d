//! Kills at every step of both life cycles, on both sides: what is left, who is harmed, who notices.
#![cfg(debug_assertions)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a step that fails is how a test fails")]

mod clients;
mod daemons;
#[path = "../../../protocol/tests/layers/mod.rs"]
mod layers;
mod life;
#[path = "../native/mod.rs"]
mod native;
mod neighbours;
mod place;

/// Not a test: the part that a child process plays.
#[test]
fn child() {
    clients::play();
}
