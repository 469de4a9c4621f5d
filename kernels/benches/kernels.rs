//! Input bandwidth of the kernels next to memcpy of the same buffer in the same run.
//!
//! `cargo bench -p shmquant-kernels [-- MiB [words that a case's name contains]]`. `cached` is one thread on 256 KiB in
//! billions of elements a second; `stream` is two threads on the whole buffer in GB/s of input and as a ratio to what
//! two threads of memcpy reached right before and after.
#![allow(unsafe_code, clippy::print_stdout, clippy::expect_used, reason = "a program for people to run")]

use std::time::Instant;

use shmquant_kernels::{
    Affine, FloatType, Granularity, Kernels, Layout, Mapping, OnNonFinite, Range, Scheme, Values, ZeroPoints,
    ZeroPointsMut,
};

const ROW: usize = 1024;
const CACHED: usize = 64 * ROW;
const CHUNK: usize = 256 * ROW;
const THREADS: usize = 2;

#[derive(Clone, Copy)]
enum Work {
    Fused(Granularity),
    Scan(Granularity),
    Encode(Granularity),
    Decode(Granularity),
    Measure(Granularity),
}

struct Case {
    name: &'static str,
    scheme: Scheme,
    mapping: Option<Mapping>,
    work: Work,
    /// The same bytes are read as values of this format.
    dtype: FloatType,
    k: usize,
    group: u64,
    packed: bool,
}

fn cases() -> Vec<Case> {
    use Granularity::{Dimension, Group, Row, Tensor};
    let case = |name, scheme, work| Case {
        name,
        scheme,
        mapping: None,
        work,
        dtype: FloatType::F32,
        k: ROW,
        group: 128,
        packed: true,
    };
    let of = |dtype, name, scheme, work| Case { dtype, ..case(name, scheme, work) };
    let (half, bf16) = (FloatType::F16, FloatType::Bf16);
    vec![
        case("int8 row", Scheme::Int8, Work::Fused(Row)),
        case("int8 group128", Scheme::Int8, Work::Fused(Group)),
        case("uint8 row", Scheme::UInt8, Work::Fused(Row)),
        case("int4 row", Scheme::Int4, Work::Fused(Row)),
        case("int4 group128", Scheme::Int4, Work::Fused(Group)),
        case("uint4 group128", Scheme::UInt4, Work::Fused(Group)),
        case("uint2 group128", Scheme::UInt2, Work::Fused(Group)),
        of(bf16, "int8 row bf16", Scheme::Int8, Work::Fused(Row)),
        of(bf16, "uint4 group128 bf16", Scheme::UInt4, Work::Fused(Group)),
        of(half, "int8 row f16", Scheme::Int8, Work::Fused(Row)),
        of(half, "encode int8 tensor f16", Scheme::Int8, Work::Encode(Tensor)),
        of(FloatType::F64, "int8 row f64", Scheme::Int8, Work::Fused(Row)),
        Case { k: 1000, ..case("int8 row1000", Scheme::Int8, Work::Fused(Row)) },
        Case { k: 333, ..case("int4 row333", Scheme::Int4, Work::Fused(Row)) },
        Case { k: 1000, group: 100, ..case("uint4 group100", Scheme::UInt4, Work::Fused(Group)) },
        Case { group: 64, ..case("uint4 group64", Scheme::UInt4, Work::Fused(Group)) },
        Case { group: 32, ..case("uint4 group32", Scheme::UInt4, Work::Fused(Group)) },
        Case { group: 16, ..case("uint4 group16", Scheme::UInt4, Work::Fused(Group)) },
        Case { group: 64, ..case("int8 group64", Scheme::Int8, Work::Fused(Group)) },
        Case { group: 32, ..case("int8 group32", Scheme::Int8, Work::Fused(Group)) },
        Case { group: 16, ..case("int8 group16", Scheme::Int8, Work::Fused(Group)) },
        Case { group: 32, ..case("uint8 group32", Scheme::UInt8, Work::Fused(Group)) },
        Case { group: 16, ..case("uint8 group16", Scheme::UInt8, Work::Fused(Group)) },
        Case { group: 32, ..case("int4 group32", Scheme::Int4, Work::Fused(Group)) },
        Case { group: 16, ..case("int4 group16", Scheme::Int4, Work::Fused(Group)) },
        Case { group: 32, ..case("uint2 group32", Scheme::UInt2, Work::Fused(Group)) },
        Case { group: 16, ..case("uint2 group16", Scheme::UInt2, Work::Fused(Group)) },
        Case { group: 32, ..case("int2 group32", Scheme::Int2, Work::Fused(Group)) },
        Case { group: 16, ..case("int2 group16", Scheme::Int2, Work::Fused(Group)) },
        Case { group: 16, ..of(bf16, "uint4 group16 bf16", Scheme::UInt4, Work::Fused(Group)) },
        Case { group: 16, ..case("encode uint4 group16", Scheme::UInt4, Work::Encode(Group)) },
        Case { k: 48, ..case("int8 row48", Scheme::Int8, Work::Fused(Row)) },
        Case { group: 32, ..case("encode uint4 group32", Scheme::UInt4, Work::Encode(Group)) },
        Case { k: 999, group: 100, ..case("uint4 group100 of 999", Scheme::UInt4, Work::Fused(Group)) },
        Case { packed: false, ..case("uint4 group128 unpacked", Scheme::UInt4, Work::Fused(Group)) },
        Case { packed: false, ..case("uint2 row unpacked", Scheme::UInt2, Work::Fused(Row)) },
        case("scan tensor", Scheme::Int8, Work::Scan(Tensor)),
        case("scan dimension", Scheme::Int8, Work::Scan(Dimension)),
        case("encode int8 tensor", Scheme::Int8, Work::Encode(Tensor)),
        case("encode uint8 tensor", Scheme::UInt8, Work::Encode(Tensor)),
        case("encode int8 row", Scheme::Int8, Work::Encode(Row)),
        case("encode uint4 group128", Scheme::UInt4, Work::Encode(Group)),
        case("encode uint8 dimension", Scheme::UInt8, Work::Encode(Dimension)),
        case("encode uint4 dimension", Scheme::UInt4, Work::Encode(Dimension)),
        Case { k: 4, ..case("encode uint8 dimension4", Scheme::UInt8, Work::Encode(Dimension)) },
        case("decode int8 row", Scheme::Int8, Work::Decode(Row)),
        case("decode uint4 group128", Scheme::UInt4, Work::Decode(Group)),
        case("measure int8 row", Scheme::Int8, Work::Measure(Row)),
        case("measure uint4 group128", Scheme::UInt4, Work::Measure(Group)),
    ]
}

/// Values of one call. Decoding is asked for whole items.
fn chunk_of(case: &Case) -> usize {
    if matches!(case.work, Work::Decode(_)) { 16 * CHUNK } else { CHUNK }
}

struct Buffers {
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    out: Vec<f32>,
    ranges: Vec<Range>,
}

impl Buffers {
    fn new(values: usize) -> Self {
        Self {
            codes: vec![1; 2 * values],
            scales: vec![1.0; (values / 8).max(ROW)],
            zeros: vec![0.0; (values / 8).max(ROW)],
            out: vec![0.0; values],
            ranges: vec![Range::EMPTY; ROW],
        }
    }
}

fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: every byte of an f32 is a byte.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), std::mem::size_of_val(values)) }
}

/// One chunk of whole rows.
fn chunk(kernels: &Kernels, case: &Case, values: &[f32], b: &mut Buffers, at: usize, total: usize) {
    let affine = Affine::new(case.scheme, case.mapping).expect("a combination of the table");
    let granularity = match case.work {
        Work::Fused(g) | Work::Scan(g) | Work::Encode(g) | Work::Decode(g) | Work::Measure(g) => g,
    };
    let layout = Layout {
        rows: (total * 4 / case.dtype.size() / case.k) as u64,
        k: case.k as u64,
        group: case.group,
        granularity,
        pad_rows: false,
        packed: case.packed,
    };
    let input = Values::from_bytes(bytes_of(values), case.dtype);
    let at = at * 4 / case.dtype.size();
    let (first, len) = (at as u64, input.len() as u64);
    let params = layout.param_range(first, len);
    let params = params.start as usize..params.end as usize;
    let from = layout.code_byte_offset(first, affine.bits) as usize;
    let codes = from..from + layout.chunk_code_bytes(first, len, affine.bits) as usize;
    let policy = OnNonFinite::Error;
    let mut nulled = Vec::new();
    match case.work {
        Work::Fused(_) => {
            let zeros = match affine.mapping {
                Mapping::Symmetric => ZeroPointsMut::None,
                Mapping::Asymmetric => ZeroPointsMut::F32(&mut b.zeros[params.clone()]),
            };
            kernels
                .fused(
                    input,
                    first,
                    &layout,
                    &affine,
                    policy,
                    &mut b.codes[codes],
                    &mut b.scales[params],
                    zeros,
                    &mut nulled,
                )
                .expect("finite values");
        }
        Work::Scan(_) => {
            kernels.scan(input, first, &layout, policy, &mut b.ranges[params]).expect("finite values");
        }
        Work::Encode(_) => {
            let zeros = ZeroPoints::F32(&b.zeros[params.clone()]);
            kernels
                .encode(
                    input,
                    first,
                    &layout,
                    &affine,
                    policy,
                    &b.scales[params],
                    zeros,
                    &mut b.codes[codes],
                    &mut nulled,
                )
                .expect("finite values");
        }
        Work::Measure(_) => {
            let zeros = ZeroPoints::F32(&b.zeros[params.clone()]);
            let sums = kernels.measure(
                input,
                first,
                &layout,
                &affine,
                &b.scales[params],
                zeros,
                &b.codes[codes],
                policy,
            );
            std::hint::black_box(sums);
        }
        Work::Decode(_) => {
            let zeros = ZeroPoints::F32(&b.zeros[params.clone()]);
            let out = &mut b.out[at..at + input.len()];
            kernels.decode(&b.codes[codes], first, &layout, &affine, &b.scales[params], zeros, out);
        }
    }
}

/// Seconds of the fastest of `times` runs.
fn fastest(times: usize, mut run: impl FnMut()) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..times {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn on_threads(parts: &mut [(&[f32], Buffers)], run: impl Fn(&[f32], &mut Buffers) + Sync) {
    std::thread::scope(|scope| {
        for (values, buffers) in parts.iter_mut() {
            let run = &run;
            scope.spawn(move || run(values, buffers));
        }
    });
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let mib: usize = words.first().and_then(|word| word.parse().ok()).unwrap_or(256);
    let wanted =
        |name: &str| words.iter().filter(|w| w.parse::<usize>().is_err()).all(|w| name.contains(w.as_str()));
    let n = mib * (1 << 20) / 4;
    let mut state = 1u64;
    let values: Vec<f32> = (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 6.0;
            // Both halves are read as 16-bit floats too, and shall be as large.
            f32::from_bits(value.to_bits() & 0xffff_0000 | value.to_bits() >> 16)
        })
        .collect();
    let half = n / THREADS / CHUNK * CHUNK;
    let mut parts: Vec<_> =
        values.chunks_exact(half).take(THREADS).map(|part| (part, Buffers::new(half))).collect();
    let bytes = (half * THREADS * 4) as f64;
    println!("{mib} MiB of f32, {THREADS} threads");
    for case in cases() {
        for kernels in Kernels::all() {
            let name = format!("{} {}", case.name, kernels.name());
            if !wanted(&name) {
                continue;
            }
            let mut small = Buffers::new(CACHED);
            // Whole rows, of the wider formats too.
            let (few, many) =
                (CACHED / (2 * case.k) * 2 * case.k, chunk_of(&case).min(half) / (2 * case.k) * 2 * case.k);
            let cached = fastest(5, || {
                for _ in 0..100 {
                    chunk(kernels, &case, &values[..few], &mut small, 0, few);
                }
            });
            let (mut copied, mut streamed) = (f64::MAX, f64::MAX);
            for _ in 0..3 {
                copied = copied.min(fastest(2, || on_threads(&mut parts, |v, b| b.out.copy_from_slice(v))));
                streamed = streamed.min(fastest(2, || {
                    on_threads(&mut parts, |values, buffers| {
                        for (i, part) in values.chunks_exact(many).enumerate() {
                            chunk(kernels, &case, part, buffers, i * many, values.len());
                        }
                    });
                }));
            }
            println!(
                "{name:34} cached {:6.2} G/s   stream {:6.1} GB/s   {:5.2} of memcpy {:5.1}",
                100.0 * (few * 4 / case.dtype.size()) as f64 / cached / 1e9,
                bytes / streamed / 1e9,
                copied / streamed,
                bytes / copied / 1e9,
            );
        }
    }
}
