//! From a result back to values.
