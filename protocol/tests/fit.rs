//! Ranges: found on some tables, merged, written down, used on others.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests report by panicking"
)]

mod tables;

use std::slice::from_ref;
use std::sync::Arc;

use arrow_array::types::Float32Type;
use arrow_array::{ArrayRef, FixedSizeListArray, Float32Array, ListArray, StringArray};
use shmquant_kernels::{Affine, Granularity, Mapping, OnNonFinite, Range, Scheme, params_from_range};
use shmquant_protocol::client::Source;
use shmquant_protocol::fit::TableParams;
use shmquant_protocol::table::{InputError, Override, OverrideSpec, Pattern, TableOptions};
use tables::{batches, says, table, values};

fn vectors(rows: &[Option<[f32; 3]>]) -> ArrayRef {
    let rows = rows.iter().map(|r| r.map(|r| r.map(Some)));
    Arc::new(FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(rows, 3))
}

fn fit(names: &[&str], chunks: &[Vec<ArrayRef>], options: &TableOptions) -> Result<TableParams, InputError> {
    let (schema, batches) = batches(names, chunks);
    TableParams::fit(schema, batches, options)
}

fn range(min: f32, max: f32) -> Range {
    Range { min, max }
}

fn uint8() -> TableOptions {
    TableOptions { scheme: Scheme::UInt8, ..TableOptions::default() }
}

const ROWS: [Option<[f32; 3]>; 4] =
    [Some([1.0, -2.0, 0.5]), None, Some([3.0, 4.0, 0.25]), Some([-1.0, 1.0, 0.75])];

#[test]
fn ranges_are_the_smallest_and_largest_values_with_zero() {
    let chunks = [vec![vectors(&ROWS[..1])], vec![vectors(&ROWS[1..])]];
    let of = |granularity| fit(&["emb"], &chunks, &TableOptions { granularity, ..uint8() }).unwrap();
    let columns = [range(-1.0, 3.0), range(-2.0, 4.0), range(0.0, 0.75)];
    // Nothing named: one range a dimension, because those of rows fit no other rows.
    let dimension = of(None);
    assert_eq!(
        (dimension.granularity(), dimension.ranges("emb")),
        (Granularity::Dimension, Some(&columns[..]))
    );
    assert_eq!(of(Some(Granularity::Tensor)).ranges("emb"), Some(&[range(-2.0, 4.0)][..]));
    let rows = [range(-2.0, 1.0), range(0.0, 0.0), range(0.0, 4.0), range(-1.0, 1.0)];
    assert_eq!(of(Some(Granularity::Row)).ranges("emb"), Some(&rows[..]));
    let affine = Affine::new(Scheme::UInt8, None).unwrap();
    let params = dimension.get("emb").unwrap();
    for (i, range) in columns.iter().enumerate() {
        let (scale, zero_point, _) = params_from_range(*range, &affine).unwrap();
        assert_eq!((params.scales[i], params.zero_points[i]), (scale, zero_point));
    }
    assert_eq!(
        (dimension.scheme(), dimension.mapping(), dimension.len()),
        (Scheme::UInt8, Mapping::Asymmetric, 1)
    );
}

#[test]
fn merging_is_fitting_both() {
    let part = |rows| fit(&["emb"], &[vec![vectors(rows)]], &uint8()).unwrap();
    let (a, b) = (part(&ROWS[..2]), part(&ROWS[2..]));
    assert_eq!(a.merge(&b).unwrap(), part(&ROWS));
    assert_eq!(b.merge(&a).unwrap(), part(&ROWS));
    let other = fit(&["emb"], &[vec![vectors(&ROWS)]], &TableOptions::default()).unwrap();
    says(
        a.merge(&other),
        &["params for uint8 asymmetric dimension and int8 symmetric dimension do not merge"],
    );
    let title = fit(&["title"], &[vec![vectors(&ROWS)]], &uint8()).unwrap();
    assert_eq!(a.merge(&title).unwrap().names().collect::<Vec<_>>(), ["emb", "title"]);
    let affine = Affine::new(Scheme::UInt8, None).unwrap();
    let scales = TableParams::from_scales(
        affine,
        Granularity::Dimension,
        [("emb".to_owned(), vec![1.0; 3], vec![0; 3])],
    );
    says(a.merge(&scales.unwrap()), &["hold scales without ranges"]);
}

#[test]
fn json_keeps_every_bit() {
    let third = vectors(&[Some([1.0 / 3.0, -f32::MIN_POSITIVE, 1e-45]), Some([f32::MAX / 3.0, 0.1, -0.7])]);
    let params = fit(&["emb"], &[vec![third]], &uint8()).unwrap();
    let text = params.to_json();
    assert_eq!(TableParams::from_json(&text).unwrap(), params);
    says(TableParams::from_json("{"), &["this is no params JSON"]);
    says(TableParams::from_json(&text.replace("\"v\":1", "\"v\":2")), &["params of version 2 are not known"]);
    says(TableParams::from_json(&text.replace("uint8", "uint9")), &["uint9"]);
    let id = format!("{:016x}", params.get("emb").unwrap().id);
    says(TableParams::from_json(&text.replace(&id, "0000000000000000")), &["are damaged: their id is not"]);
}

#[test]
fn params_bring_their_scheme_to_other_tables() {
    let params = fit(&["emb"], &[vec![vectors(&ROWS)]], &uint8()).unwrap();
    let own = params.get("emb").unwrap().clone();
    let options = TableOptions { params: Some(params), ..TableOptions::default() };
    // A sole vector column takes sole params whatever its name.
    for name in ["emb", "other"] {
        let it = table(&[name], &[vec![vectors(&ROWS[2..])]], &options).unwrap();
        assert_eq!(values(&it, 0).params.as_ref(), Some(&own));
        tables::crossed(&it);
    }
    let two = vec![vectors(&ROWS), vectors(&ROWS)];
    says(
        table(&["a", "b"], from_ref(&two), &options),
        &["params have no ranges for 'a'", "they have them for emb"],
    );
    says(table(&["emb", "b"], &[two], &options), &["params have no ranges for 'b'"]);
    let narrow: ArrayRef =
        Arc::new(FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>([Some([Some(1.0)])], 1));
    says(table(&["emb"], &[vec![narrow]], &options), &["'emb' needs 1 scales, its params have 3"]);
    let wrong = TableOptions { granularity: Some(Granularity::Row), ..options.clone() };
    says(
        table(&["emb"], &[vec![vectors(&ROWS)]], &wrong),
        &["granularity row does not fit params of granularity dimension"],
    );
    let wrong = TableOptions { group_size: Some(2), ..options.clone() };
    says(table(&["emb"], &[vec![vectors(&ROWS)]], &wrong), &["group_size 2 does not fit params"]);
    let stream = TableOptions { part_of_stream: true, ..options };
    assert!(table(&["emb"], &[vec![vectors(&ROWS)]], &stream).is_ok());
}

#[test]
fn plain_columns_and_layers_have_ranges_too() {
    let price: ArrayRef = Arc::new(Float32Array::from(vec![Some(2.0), None, Some(-6.0), Some(1.0)]));
    let columns = Some(vec!["emb".to_owned(), "price".to_owned()]);
    let names = ["emb", "price"];
    let chunk = vec![vectors(&ROWS), price];
    let params = fit(&names, from_ref(&chunk), &TableOptions { columns, ..uint8() }).unwrap();
    assert_eq!(params.ranges("price"), Some(&[range(-6.0, 2.0)][..]));
    assert_eq!(params.ranges("emb").map(<[Range]>::len), Some(3));
    // A plain column that has params is meant, without being named again.
    let options = TableOptions { params: Some(params), ..TableOptions::default() };
    let it = table(&names, &[chunk], &options).unwrap();
    assert_eq!(it.descriptor().items.len(), 2);
    assert_eq!(values(&it, 1).params.as_ref().map(|p| p.scales.len()), Some(1));
    tables::crossed(&it);

    let layers: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
    let weights: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>([
        Some(vec![Some(1.0), Some(-3.0)]),
        Some(vec![Some(2.0)]),
    ]));
    let columns = ["layer_name", "weights"];
    let params = fit(&columns, &[vec![layers.clone(), weights.clone()]], &uint8()).unwrap();
    assert_eq!((params.granularity(), params.ranges("a")), (Granularity::Row, Some(&[range(-3.0, 1.0)][..])));
    let options = TableOptions { params: Some(params), ..TableOptions::default() };
    let it = table(&columns, &[vec![layers.slice(1, 1), weights.slice(1, 1)]], &options).unwrap();
    assert_eq!(values(&it, 0).params.as_ref().map(|p| p.scales[0]), Some(2.0 / 255.0));
    let strange: ArrayRef = Arc::new(StringArray::from(vec!["c"]));
    says(
        table(&columns, &[vec![strange, weights.slice(0, 1)]], &options),
        &["params have no ranges for 'c'"],
    );
}

#[test]
fn ranges_that_fit_nothing_are_refused() {
    let with = |options: TableOptions| fit(&["emb"], &[vec![vectors(&ROWS)]], &options);
    says(
        with(TableOptions { granularity: Some(Granularity::Group), ..uint8() }),
        &["ranges of groups fit only"],
    );
    says(with(TableOptions { group_size: Some(4), ..uint8() }), &["ranges of groups fit only"]);
    let action = Some(OverrideSpec { scheme: Some(Scheme::Int4), ..OverrideSpec::default() });
    let overrides = vec![Override { pattern: Pattern::Exact("emb".to_owned()), action }];
    says(with(TableOptions { overrides, ..uint8() }), &["all params of one fit have the same scheme"]);
    let wide = vectors(&[Some([f32::MAX, 0.0, 0.0]), Some([-f32::MAX, 0.0, 0.0])]);
    says(fit(&["emb"], &[vec![wide]], &uint8()), &["'emb': the range", "at 0 overflows float32"]);
}

#[test]
fn what_is_not_finite_is_counted_over_all_chunks_of_a_column() {
    let mut rows = vec![Some([1.0, 2.0, 3.0]); 200_000];
    rows[7] = Some([1.0, f32::NAN, 9.0]);
    rows[150_000] = Some([f32::INFINITY, 2.0, -9.0]);
    let of = |on_nonfinite| fit(&["emb"], &[vec![vectors(&rows)]], &TableOptions { on_nonfinite, ..uint8() });
    let error = of(OnNonFinite::Error).unwrap_err();
    let details = error.details();
    assert_eq!((details.row, details.index), (Some(7), Some(1)));
    says(
        Err::<(), _>(error),
        &[
            "column 'emb' row 7 contains NaN or Inf at index 1 (2 in all, the first is NaN)",
            "hint: on_nonfinite=",
        ],
    );
    let saturated = [range(0.0, 1.0), range(0.0, 2.0), range(-9.0, 9.0)];
    assert_eq!(of(OnNonFinite::Saturate).unwrap().ranges("emb"), Some(&saturated[..]));
    let dropped = [range(0.0, 1.0), range(0.0, 2.0), range(0.0, 3.0)];
    assert_eq!(of(OnNonFinite::Null).unwrap().ranges("emb"), Some(&dropped[..]));
}
