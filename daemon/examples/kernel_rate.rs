//! Runs a kernel over a segment that somebody else has, as the daemon's workers would with nothing else to do; see `benches/inputs.py`.
//!
//! `kernel_rate PATH ROWS K SCHEME GRANULARITY GROUP THREADS` maps float32 values and, for each line on its standard input, quantizes
//! them all and prints the nanoseconds that it took. Where the codes go is private memory that was used before.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a program for a script to run"
)]
#![allow(unsafe_code, reason = "values are read where they lie in shared memory")]

use std::fs::File;
use std::io::{BufRead, Write};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::time::Instant;

use shmquant_kernels::{
    Affine, FloatType, Granularity, Layout, OnNonFinite, Scheme, Values, ZeroPointsMut, fused,
};
use shmquant_protocol::chunks::CHUNK_BYTES;
use shmquant_protocol::segment::{Backing, Mapping};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, rows, k, scheme, granularity, group, threads] = &args[..] else {
        panic!("PATH ROWS K SCHEME GRANULARITY GROUP THREADS");
    };
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let (rows, k, group, threads) = (number(rows), number(k), number(group), number(threads));
    let affine = Affine::new(scheme.parse::<Scheme>().unwrap(), None).unwrap();
    let granularity = granularity.parse::<Granularity>().unwrap();
    let packed = affine.bits < 8;
    let layout = Layout { rows, k, group, granularity, pad_rows: true, packed };
    let file = File::open(path).unwrap();
    let values = Mapping::read_only(file.as_fd(), rows * k * 4, Backing::Memfd).unwrap();
    let base = values.as_ptr() as usize;

    let sizes = layout.sizes(affine.bits).unwrap();
    let (mut codes, mut scales, mut zeros) = (
        vec![1u8; sizes.code_bytes as usize],
        vec![1f32; sizes.params as usize],
        vec![1f32; sizes.params as usize],
    );
    let step = CHUNK_BYTES / 4 / k;
    let (code_step, param_step) = (
        layout.chunk_code_bytes(0, step.min(rows) * k, affine.bits) as usize,
        layout.param_range(0, step.min(rows) * k).end as usize,
    );
    for line in std::io::stdin().lock().lines() {
        line.unwrap();
        let began = Instant::now();
        let parts =
            codes.chunks_mut(code_step).zip(scales.chunks_mut(param_step)).zip(zeros.chunks_mut(param_step));
        let chunks = Mutex::new((0..rows).step_by(step as usize).zip(parts));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let next = chunks.lock().unwrap().next();
                        let Some((row, ((codes, scales), zeros))) = next else { return };
                        let count = step.min(rows - row) * k;
                        // SAFETY: inside the mapping, which has all rows.
                        let values = unsafe {
                            Values::new(
                                (base + (row * k * 4) as usize) as *const u8,
                                count as usize,
                                FloatType::F32,
                            )
                        };
                        let (first, policy) = (row * k, OnNonFinite::Error);
                        let zeros = ZeroPointsMut::F32(zeros);
                        let mut nulled = Vec::new();
                        fused(values, first, &layout, &affine, policy, codes, scales, zeros, &mut nulled)
                            .unwrap();
                    }
                });
            }
        });
        println!("{}", began.elapsed().as_nanos());
        std::io::stdout().flush().unwrap();
    }
}
