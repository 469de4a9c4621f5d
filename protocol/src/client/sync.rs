//! The atomics of `returns`, which `protocol/loom` replaces to try every order of their steps.

pub(super) use std::sync::atomic::{AtomicPtr, Ordering};
