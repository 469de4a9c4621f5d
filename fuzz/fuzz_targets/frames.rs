#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shmquant_fuzz::frames(data));
