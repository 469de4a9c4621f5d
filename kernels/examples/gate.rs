//! Runs one hot kernel once over a fixed buffer, so that its instructions can be counted; see `benches/gate/gate.py`.
//!
//! `gate` lists, a line each, path, case and number of values; `gate PATH CASE` runs one of them. What is counted lies
//! in `counted_kernel`.
#![allow(clippy::print_stdout, clippy::expect_used, clippy::panic, reason = "a program for a script to run")]

use half::{bf16, f16};
use shmquant_kernels::{
    Affine, FloatType, Granularity, Kernels, Layout, Mapping, OnNonFinite, Range, Scheme, Values, ZeroPoints,
    ZeroPointsMut,
};

const ROWS: usize = 64;

#[derive(Clone, Copy)]
enum Work {
    Fused,
    Scan,
    Encode,
    Decode,
    Measure,
}

struct Case {
    work: Work,
    scheme: Scheme,
    granularity: Granularity,
    k: usize,
    group: usize,
    dtype: FloatType,
    packed: bool,
}

impl Case {
    fn name(&self) -> String {
        let work = match self.work {
            Work::Fused => "fused",
            Work::Scan => "scan",
            Work::Encode => "encode",
            Work::Decode => "decode",
            Work::Measure => "measure",
        };
        let group = match self.granularity {
            Granularity::Group => self.group,
            _ => self.k,
        };
        let packed = if self.packed { "" } else { " unpacked" };
        format!("{work} {} {} {group} {}{packed}", self.scheme, self.granularity, self.dtype)
    }
}

/// What users wait for, and what is easily lost: tails, columns, widened formats.
fn cases() -> Vec<Case> {
    use Granularity::{Dimension, Group, Row, Tensor};
    use Scheme::{Int4, Int8, UInt2, UInt4, UInt8};
    let case = |work, scheme, granularity| Case {
        work,
        scheme,
        granularity,
        k: 1024,
        group: 128,
        dtype: FloatType::F32,
        packed: true,
    };
    vec![
        case(Work::Fused, Int8, Row),
        case(Work::Fused, UInt8, Row),
        case(Work::Fused, UInt4, Group),
        case(Work::Fused, UInt2, Group),
        Case { dtype: FloatType::Bf16, ..case(Work::Fused, Int8, Row) },
        Case { dtype: FloatType::F16, ..case(Work::Fused, Int8, Row) },
        Case { dtype: FloatType::F64, ..case(Work::Fused, Int8, Row) },
        Case { k: 1000, group: 100, ..case(Work::Fused, UInt4, Group) },
        Case { group: 16, ..case(Work::Fused, UInt4, Group) },
        Case { group: 32, ..case(Work::Encode, UInt4, Group) },
        Case { k: 333, ..case(Work::Fused, Int4, Row) },
        Case { packed: false, ..case(Work::Fused, UInt4, Group) },
        case(Work::Scan, Int8, Tensor),
        case(Work::Scan, Int8, Dimension),
        case(Work::Encode, Int8, Tensor),
        case(Work::Encode, UInt4, Group),
        case(Work::Encode, UInt8, Dimension),
        Case { k: 4, ..case(Work::Encode, UInt8, Dimension) },
        case(Work::Decode, Int8, Row),
        case(Work::Decode, UInt4, Group),
        case(Work::Decode, UInt8, Dimension),
        case(Work::Measure, Int8, Row),
        case(Work::Measure, UInt4, Group),
    ]
}

/// All that a kernel reads and writes.
struct Buffers {
    layout: Layout,
    affine: Affine,
    bytes: Vec<u8>,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    ranges: Vec<Range>,
    out: Vec<f32>,
}

impl Buffers {
    fn new(case: &Case) -> Self {
        let layout = Layout {
            rows: (ROWS * 1024 / case.k) as u64,
            k: case.k as u64,
            group: case.group as u64,
            granularity: case.granularity,
            pad_rows: false,
            packed: case.packed,
        };
        let affine = Affine::new(case.scheme, None).expect("a default mapping");
        let sizes = layout.sizes(affine.bits).expect("a possible layout");
        let mut bytes = Vec::new();
        for i in 0..sizes.elements {
            // No two neighbours alike, and all of them exact in every format.
            let value = ((i * 37 + 11) % 255) as f32 / 64.0 - 2.0;
            match case.dtype {
                FloatType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                FloatType::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                FloatType::F32 => bytes.extend(value.to_le_bytes()),
                FloatType::F64 => bytes.extend(f64::from(value).to_le_bytes()),
            }
        }
        Self {
            layout,
            affine,
            bytes,
            codes: vec![1; sizes.code_bytes as usize],
            scales: vec![0.5; sizes.params as usize],
            zeros: vec![0.0; sizes.params as usize],
            ranges: vec![Range::EMPTY; sizes.params as usize],
            out: vec![0.0; sizes.elements as usize],
        }
    }
}

#[inline(never)]
fn counted_kernel(kernels: &Kernels, case: &Case, b: &mut Buffers) {
    let Buffers { layout, affine, bytes, codes, scales, zeros, ranges, out } = b;
    let values = Values::from_bytes(bytes, case.dtype);
    let policy = OnNonFinite::Error;
    match case.work {
        Work::Fused => {
            let zeros = match affine.mapping {
                Mapping::Symmetric => ZeroPointsMut::None,
                Mapping::Asymmetric => ZeroPointsMut::F32(zeros),
            };
            kernels
                .fused(values, 0, layout, affine, policy, codes, scales, zeros, &mut Vec::new())
                .expect("finite values");
        }
        Work::Scan => kernels.scan(values, 0, layout, policy, ranges).expect("finite values"),
        Work::Encode => {
            let zeros = ZeroPoints::F32(zeros);
            kernels
                .encode(values, 0, layout, affine, policy, scales, zeros, codes, &mut Vec::new())
                .expect("finite values");
        }
        Work::Decode => kernels.decode(codes, 0, layout, affine, scales, ZeroPoints::F32(zeros), out),
        Work::Measure => {
            let zeros = ZeroPoints::F32(zeros);
            let sums = kernels.measure(values, 0, layout, affine, scales, zeros, codes, policy);
            std::hint::black_box(sums);
        }
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [path, name] = words.as_slice() else {
        for kernels in Kernels::all() {
            for case in cases() {
                println!("{}\t{}\t{}", kernels.name(), case.name(), Buffers::new(&case).out.len());
            }
        }
        return;
    };
    let kernels = Kernels::all().into_iter().find(|kernels| kernels.name() == path);
    let case = cases().into_iter().find(|case| case.name() == *name);
    let (Some(kernels), Some(case)) = (kernels, case) else {
        panic!("no path {path} on this machine, or no case {name}");
    };
    let mut buffers = Buffers::new(&case);
    counted_kernel(kernels, &case, &mut buffers);
    std::hint::black_box(&buffers.codes);
}
