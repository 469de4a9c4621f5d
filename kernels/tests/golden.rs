//! Every path against codes that the reference packages made; see `tests/golden/make.py`.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;
use shmquant_kernels::{
    Affine, Fault, Granularity, Kernels, Layout, OnNonFinite, Range, Values, ZeroPoints, ZeroPointsMut,
    params_from_range,
};

struct Golden {
    layout: Layout,
    affine: Affine,
    name: String,
    x: Vec<f32>,
    scales: Vec<f32>,
    zero_points: Vec<i32>,
    codes: Vec<u8>,
    codes_by_row: Vec<u8>,
}

fn load(path: &Path) -> Vec<Golden> {
    let bytes = std::fs::read(path).expect("a golden file");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors header");
    let words = header.metadata().as_ref().expect("metadata");
    assert!(words["written_by"].contains("onnxruntime"), "{}", words["written_by"]);
    let scheme = words["scheme"].parse().expect("a scheme");
    let mapping = match words["mapping"].as_str() {
        "symmetric" => shmquant_kernels::Mapping::Symmetric,
        _ => shmquant_kernels::Mapping::Asymmetric,
    };
    let affine = Affine::new(scheme, Some(mapping)).expect("a combination of the table");
    let tensors = SafeTensors::deserialize(&bytes).expect("tensors");
    let cases: Vec<Value> = serde_json::from_str(&words["cases"]).expect("a list of cases");
    let number = |case: &Value, key: &str| case[key].as_u64().expect("a number");
    cases
        .iter()
        .map(|case| {
            let name = case["name"].as_str().expect("a name").to_owned();
            let data = |part: &str| {
                tensors.tensor(&format!("{name}.{part}")).expect("a tensor of the case").data().to_vec()
            };
            let floats =
                |part: &str| data(part).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let granularity: Granularity =
                case["granularity"].as_str().expect("a word").parse().expect("a granularity");
            Golden {
                layout: Layout {
                    rows: number(case, "rows"),
                    k: number(case, "k"),
                    group: number(case, "group"),
                    granularity,
                    pad_rows: false,
                    packed: true,
                },
                affine,
                x: floats("x"),
                scales: floats("scales"),
                zero_points: data("zero_points")
                    .as_chunks()
                    .0
                    .iter()
                    .map(|b| i32::from_le_bytes(*b))
                    .collect(),
                codes: data("codes"),
                codes_by_row: data("codes_by_row"),
                name,
            }
        })
        .collect()
}

fn files() -> Vec<std::path::PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("the golden folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    files
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn check(golden: &Golden, kernels: &Kernels, pad_rows: bool) -> Result<(), Fault> {
    let layout = Layout { pad_rows, ..golden.layout };
    let Golden { affine, name, x, .. } = golden;
    let want = if pad_rows { &golden.codes_by_row } else { &golden.codes };
    let what = format!("{} {} {name} {}", affine.scheme, affine.mapping, kernels.name());
    let values = Values::from_f32(x);
    let mut nulled = Vec::new();

    let mut codes = vec![0xa5; want.len()];
    let mut scales = vec![0.0; golden.scales.len()];
    let mut zeros = vec![0.5; golden.scales.len()];
    let counters = kernels.fused(
        values,
        0,
        &layout,
        affine,
        OnNonFinite::Error,
        &mut codes,
        &mut scales,
        ZeroPointsMut::F32(&mut zeros),
        &mut nulled,
    )?;
    assert!(same_bits(&scales, &golden.scales), "{what}");
    assert!(zeros.iter().zip(&golden.zero_points).all(|(a, &b)| *a == b as f32), "{what}");
    assert_eq!(&codes, want, "{what}");
    assert_eq!(counters.n, x.len() as u64);

    let mut ranges = vec![Range::EMPTY; scales.len()];
    kernels.scan(values, 0, &layout, OnNonFinite::Error, &mut ranges)?;
    for (range, (&scale, &zero)) in ranges.iter().zip(golden.scales.iter().zip(&golden.zero_points)) {
        let (s, z, _) = params_from_range(*range, affine)?;
        assert_eq!((s.to_bits(), z), (scale.to_bits(), zero), "{what}");
    }

    codes.fill(0x5a);
    let zeros = ZeroPoints::I32(&golden.zero_points);
    kernels.encode(
        values,
        0,
        &layout,
        affine,
        OnNonFinite::Error,
        &golden.scales,
        zeros,
        &mut codes,
        &mut nulled,
    )?;
    assert_eq!(&codes, want, "{what}");
    assert!(nulled.is_empty());
    Ok(())
}

#[test]
fn codes_are_those_of_the_reference_packages() -> Result<(), Fault> {
    let files = files();
    assert_eq!(files.len(), 7, "one file a scheme and mapping");
    for path in files {
        let cases = load(&path);
        assert!(cases.len() > 40, "{}", path.display());
        for golden in &cases {
            for kernels in Kernels::all() {
                for pad_rows in [false, true] {
                    check(golden, kernels, pad_rows)?;
                }
            }
        }
    }
    Ok(())
}
