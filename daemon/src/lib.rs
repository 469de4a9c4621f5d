//! The shmquant daemon: sessions, segments, planner, engine, catalog.
//!
//! The way of a request: `server` accepts a connection, `lane` reads its frames, `quantize` takes a
//! `QUANTIZE` through [`plan`], `admission`, [`job`] and [`engine`] to a lease in the `books`. Everything
//! that is allocated has an owner there from the same step on: the end of a session is all that crash reclaim
//! is.

mod admission;
mod books;
mod catalog;
pub mod cli;
mod config;
mod daemon;
mod ending;
pub mod engine;
mod error;
mod growth;
mod headroom;
mod hub;
mod inputs;
pub mod job;
mod lane;
mod life;
pub mod memory;
pub mod plan;
mod pool;
mod port;
mod quantize;
mod reaper;
mod registry;
mod requests;
mod serve;
mod server;
mod session;
mod shared;
mod stat;
mod tickets;
mod wake;
mod watcher;

pub use config::Config;
pub use daemon::{Daemon, Stopper};
pub use error::DaemonError;
pub use serve::{READY, serve_main};
