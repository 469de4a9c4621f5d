//! The floating-point mode of threads that compute: denormals are numbers, whatever the process does.
#![allow(unsafe_code, reason = "the mode register is reached by assembly only")]

/// Turns off flushing of denormals to zero on this thread.
///
/// A thread inherits the mode of the one that started it, and a host process (torch's
/// `set_flush_denormal`) may have changed that; results must not depend on it.
pub(crate) fn no_flushing() {
    #[cfg(target_arch = "x86_64")]
    {
        const FTZ: u32 = 1 << 15;
        const DAZ: u32 = 1 << 6;
        let mut mode = 0u32;
        // SAFETY: stores the 32 bits of MXCSR to a local variable.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mode, options(nostack)) };
        if mode & (FTZ | DAZ) != 0 {
            let mode = mode & !(FTZ | DAZ);
            // SAFETY: loads MXCSR with a value that it had but for two bits, which is valid.
            unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mode, options(nostack, readonly)) };
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        const FZ: u64 = 1 << 24;
        const FZ16: u64 = 1 << 19;
        let mode: u64;
        // SAFETY: reads FPCR.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) mode, options(nomem, nostack)) };
        if mode & (FZ | FZ16) != 0 {
            // SAFETY: writes FPCR with a value that it had but for two bits, which is valid.
            unsafe { std::arch::asm!("msr fpcr, {}", in(reg) mode & !(FZ | FZ16), options(nomem, nostack)) };
        }
    }
}
