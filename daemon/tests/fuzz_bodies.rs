//! The bodies of the fuzz targets on their corpora and on changes of these, the same ones in every run.
//!
//! `SHMQUANT_FUZZ_ROUNDS` multiplies the number of changes; a failure names the file that shows it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]

#[path = "../../fuzz/src/bodies.rs"]
mod bodies;
mod raw;
#[path = "../../fuzz/src/script.rs"]
mod script;
mod tables;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use fastrand::Rng;

/// A number below `n`, 0 if there is none.
fn below(random: &mut Rng, n: usize) -> usize {
    random.usize(..n.max(1))
}

/// Changes of the kinds that break parsers: bits, whole bytes, numbers at their limits, pieces left out, doubled or
/// taken from elsewhere.
fn change(bytes: &mut Vec<u8>, others: &[Vec<u8>], random: &mut Rng) {
    for _ in 0..1 + below(random, 4) {
        let at = below(random, bytes.len());
        match below(random, 8) {
            _ if bytes.is_empty() => bytes.push(random.u8(..)),
            0 => bytes[at] ^= 1 << below(random, 8),
            1 => bytes[at] = random.u8(..),
            2 | 3 => {
                const LIMITS: [u64; 8] = [0, 1, 0x7F, 0xFF, 1 << 31, u32::MAX as u64, 1 << 63, u64::MAX];
                let number = LIMITS[below(random, 8)].wrapping_add(below(random, 3) as u64).wrapping_sub(1);
                let len = [1, 2, 4, 8][below(random, 4)].min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&number.to_le_bytes()[..len]);
            }
            4 => drop(bytes.drain(at..at + below(random, (bytes.len() - at).min(32)))),
            5 => {
                let piece = bytes[at..at + below(random, (bytes.len() - at).min(64))].to_vec();
                bytes.splice(at..at, piece);
            }
            6 => {
                let other = &others[below(random, others.len())];
                let from = below(random, other.len());
                let to = from + below(random, (other.len() - from).min(64));
                bytes.splice(at..at, other[from..to].iter().copied());
            }
            _ => bytes.truncate(at),
        }
    }
}

fn run(target: &str, rounds: usize, body: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", corpus.display());
    let seeds: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
    seeds.iter().for_each(|seed| body(seed));
    let more = std::env::var("SHMQUANT_FUZZ_ROUNDS").ok().and_then(|n| n.parse::<usize>().ok()).unwrap_or(1);
    let mut random = Rng::with_seed(0x5EED);
    for round in 0..rounds * more {
        let mut bytes = seeds[below(&mut random, seeds.len())].clone();
        change(&mut bytes, &seeds, &mut random);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(&bytes))) {
            let file = std::env::temp_dir().join(format!("shmquant-fuzz-{target}-{round}"));
            std::fs::write(&file, &bytes).unwrap();
            eprintln!("round {round}: the bytes are in {}", file.display());
            resume_unwind(panic);
        }
    }
}

#[test]
fn frames() {
    run("frames", 400_000, bodies::frames);
}

#[test]
fn descriptors() {
    run("descriptors", 200_000, bodies::descriptors);
}

#[test]
fn planner() {
    run("planner", 40_000, bodies::planner);
}

#[test]
fn sessions() {
    run("sessions", 300, script::sessions);
}
