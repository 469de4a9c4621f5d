//! The command from end to end: the real binary, a real daemon on a socket of its own, real files.

mod daemons;
mod data;
mod files;
mod listing;
#[path = "../native/mod.rs"]
mod native;
mod place;
mod refusals;

pub(crate) type Outcome = Result<(), Box<dyn std::error::Error>>;
