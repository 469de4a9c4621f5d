//! The floating-point mode of threads that compute: denormals are numbers, whatever the process does.
#![allow(unsafe_code, reason = "the mode register is reached by assembly only")]

use std::marker::PhantomData;

/// While it lives, this thread does not flush denormals to zero.
///
/// A host process may have told it to (torch's `set_flush_denormal`), and a thread inherits the mode of the one that started
/// it; results must not depend on either. What was set before is set again on drop.
#[derive(Debug)]
pub struct NoFlushing {
    /// The bits that were set.
    before: Mode,
    /// The mode is the thread's.
    _not_send: PhantomData<*const ()>,
}

#[cfg(target_arch = "x86_64")]
type Mode = u32;
#[cfg(not(target_arch = "x86_64"))]
type Mode = u64;

impl NoFlushing {
    /// Turns off flushing on this thread.
    #[must_use = "it ends when it is dropped"]
    pub fn new() -> Self {
        let mode = mode();
        let before = mode & FLUSHING;
        if before != 0 {
            set(mode & !FLUSHING);
        }
        Self { before, _not_send: PhantomData }
    }
}

impl Default for NoFlushing {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for NoFlushing {
    fn drop(&mut self) {
        // What else the mode tells, such as which exceptions there were, stays.
        if self.before != 0 {
            set(mode() | self.before);
        }
    }
}

/// FTZ and DAZ.
#[cfg(target_arch = "x86_64")]
const FLUSHING: Mode = (1 << 15) | (1 << 6);
/// FZ and FZ16.
#[cfg(target_arch = "aarch64")]
const FLUSHING: Mode = (1 << 24) | (1 << 19);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const FLUSHING: Mode = 0;

fn mode() -> Mode {
    #[cfg(target_arch = "x86_64")]
    {
        let mut mode = 0u32;
        // SAFETY: stores the 32 bits of MXCSR to a local variable.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mode, options(nostack)) };
        mode
    }
    #[cfg(target_arch = "aarch64")]
    {
        let mode: u64;
        // SAFETY: reads FPCR.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) mode, options(nomem, nostack)) };
        mode
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    0
}

/// `mode` is one that this thread had, but for the bits of [`FLUSHING`].
fn set(mode: Mode) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: loads MXCSR with a value that it had but for two bits, which is valid.
    unsafe {
        // What computes must not be moved across: no option says that memory is left alone.
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mode, options(nostack));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: writes FPCR with a value that it had but for two bits, which is valid.
    unsafe {
        std::arch::asm!("msr fpcr, {}", in(reg) mode, options(nostack));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = mode;
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[test]
    fn denormals_count_while_it_lives_and_the_mode_comes_back() {
        let half = || black_box(f32::MIN_POSITIVE) * black_box(0.5);
        let plain = mode();
        assert!(half() > 0.0);
        set(plain | FLUSHING);
        let flushed = half();
        let inside = {
            let _exact = NoFlushing::new();
            half()
        };
        let after = mode();
        set(plain);
        assert!(inside > 0.0);
        assert_eq!(after & FLUSHING, FLUSHING);
        if FLUSHING != 0 {
            assert_eq!(flushed, 0.0);
        }
    }
}
