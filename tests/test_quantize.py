"""Numbers, schemas and every kind of input, through a real daemon."""

from __future__ import annotations

import duckdb
import ml_dtypes
import nanoarrow
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import reference as ref
import shmquant
from shmquant import InvalidInputError

RNG = np.random.default_rng(7)
SCHEMES = list(ref.RANGES)


def vectors(n: int, dim: int) -> np.ndarray:
    return RNG.standard_normal((n, dim), dtype=np.float32)


def fixed(x: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])


@pytest.mark.parametrize(("scheme", "mapping"), SCHEMES)
def test_rows_of_vectors_follow_the_formula_byte_by_byte(q, scheme, mapping):
    x = vectors(33, 37)
    x[3] = 0
    r = q.quantize(x, scheme, granularity="row", mapping=mapping)
    found = r.codes("vector")
    for row in range(len(x)):
        scale, zero_point = ref.params(x[row], scheme, mapping)
        assert r.scales("vector")[row] == scale
        zeros = r.zero_points("vector")
        assert zeros[row if len(zeros) > 1 else 0] == zero_point
        codes = ref.codes(x[row], scale, zero_point, scheme, mapping)
        expected = codes if ref.BITS[scheme] == 8 else ref.pack(codes, ref.BITS[scheme])
        assert np.array_equal(found[row].view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize(("scheme", "mapping"), SCHEMES)
def test_groups_of_layers_follow_the_formula_byte_by_byte(q, scheme, mapping):
    x = RNG.standard_normal((5, 100), dtype=np.float32)
    layer = q.quantize({"w": x}, scheme, granularity="group", group_size=32, mapping=mapping).layer("w")
    parts, scales, zeros, values = [], [], [], []
    for group in ref.groups(x, 32):
        scale, zero_point = ref.params(group, scheme, mapping)
        parts.append(ref.codes(group, scale, zero_point, scheme, mapping))
        scales.append(scale)
        zeros.append(zero_point)
        values.append(ref.decoded(parts[-1], scale, zero_point))
    flat = np.concatenate(parts)
    expected = flat.view(np.uint8) if ref.BITS[scheme] == 8 else ref.pack(flat, ref.BITS[scheme])
    assert np.array_equal(layer.codes.view(np.uint8), expected)
    assert np.array_equal(layer.scales, np.array(scales, np.float32))
    assert layer.zero_points.tolist() == ([] if mapping == "symmetric" else zeros)
    assert np.array_equal(layer.dequantize(), np.concatenate(values).reshape(x.shape))
    assert (layer.shape, layer.bit_width, layer.group_size) == ((5, 100), ref.BITS[scheme], 32)
    assert (layer.scheme, layer.src_dtype) == (scheme, "float32")


@pytest.mark.parametrize("granularity", ["tensor", "dimension"])
def test_ranges_over_all_rows_are_in_the_metadata_and_marked_on_each_row(q, granularity):
    x = vectors(50, 8)
    r = q.quantize(x, "uint8", granularity=granularity)
    domains = [x] if granularity == "tensor" else list(x.T)
    expected = [ref.params(d, "uint8") for d in domains]
    assert r.scales("vector").tolist() == [float(s) for s, _ in expected]
    assert r.zero_points("vector").tolist() == [z for _, z in expected]
    ids = r.table.column("vector_params_id")
    assert ids.type == pa.dictionary(pa.int8(), pa.uint64())
    assert len(set(ids.to_pylist())) == 1
    for i, (scale, zero_point) in enumerate(expected):
        part = slice(None) if granularity == "tensor" else i
        codes = ref.codes(x[:, part], scale, zero_point, "uint8")
        assert np.array_equal(r.codes("vector")[:, part], codes)


def test_defaults_are_rows_for_eight_bits_and_groups_of_128_below(q):
    x = {"w": RNG.standard_normal((2, 256), dtype=np.float32)}
    assert q.quantize(x).layer("w").scheme == "int8"
    assert q.quantize(x).layer("w").group_size == 0
    assert q.quantize(x, "uint4").layer("w").group_size == 128
    assert len(q.quantize(x, "uint4").layer("w").scales) == 4


def test_columns_that_are_not_quantized_come_back_from_the_callers_own_buffers(q):
    names = pa.array(["a", None, "ccc"])
    table = pa.table({"id": [1, 2, 3], "emb": fixed(vectors(3, 16)), "name": names}).replace_schema_metadata(
        {"made": "here"}
    )
    out = q.quantize(table, "uint8").table
    assert out.column_names == ["id", "emb", "emb_scale", "emb_zero_point", "name"]
    assert out.column("name").chunk(0).buffers()[2].address == names.buffers()[2].address
    assert out.schema.metadata == {b"made": b"here"}
    assert out.column("id").equals(table.column("id"))


def test_plain_columns_are_quantized_when_they_are_named(q):
    price = pa.array([1.0, None, -3.0, 0.5], pa.float64())
    r = q.quantize(pa.table({"price": price, "other": price}), columns=["price"])
    assert r.table.column_names == ["price", "price_scale", "price_zero_point", "other"]
    scale, _ = ref.params(np.array([1.0, -3.0, 0.5]), "int8")
    assert r.scales("price").tolist() == [float(scale)]
    assert r.table.column("price").null_count == 1
    assert r.codes("price")[[0, 2, 3]].tolist() == [42, -127, 21]
    decoded = r.dequantize(columns=["price"]).column("price").to_pylist()
    assert decoded[1] is None
    assert decoded[2] == -3.0


def test_nan_of_pandas_is_null_and_of_others_an_error(q):
    values = [1.0, float("nan"), -3.0]
    r = q.quantize(pd.DataFrame({"price": values}), columns=["price"])
    assert r.dequantize().column("price").to_pylist()[1] is None
    with pytest.raises(InvalidInputError, match="column 'price' row 1 contains NaN or Inf"):
        q.quantize(pl.DataFrame({"price": values}), columns=["price"])


def test_null_vectors_stay_null(q):
    x = vectors(3, 4)
    column = pa.array([x[0].tolist(), None, x[2].tolist()], pa.list_(pa.float32(), 4))
    r = q.quantize(pa.table({"emb": column}), "uint8")
    for name in ("emb", "emb_scale", "emb_zero_point"):
        assert r.table.column(name).is_valid().to_pylist() == [True, False, True]
    assert np.array_equal(r.codes("emb")[2], q.quantize(x, "uint8").codes("vector")[2])
    assert r.dequantize().column("emb").is_valid().to_pylist() == [True, False, True]


def sources() -> dict[str, object]:
    x = np.arange(24, dtype=np.float32).reshape(6, 4) - 10
    table = pa.table({"emb": fixed(x)})
    frame = pl.from_arrow(table)
    duckdb_source = table  # noqa: F841 - duckdb finds it by name
    return {
        "pyarrow.Table": table,
        "pyarrow.Table in chunks": pa.concat_tables([table.slice(0, 2), table.slice(2, 1), table.slice(3)]),
        "pyarrow.Table sliced": pa.concat_tables([table, table]).slice(6),
        "pyarrow.RecordBatch": table.to_batches()[0],
        "pyarrow.RecordBatchReader": table.to_reader(max_chunksize=4),
        "pyarrow lists": pa.table({"emb": pa.array(x.tolist(), pa.list_(pa.float32()))}),
        "pyarrow large lists": pa.table({"emb": pa.array(x.tolist(), pa.large_list(pa.float32()))}),
        "pyarrow tensors": pa.table(
            {"emb": pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [4]), fixed(x))}
        ),
        "float16": pa.table({"emb": fixed(x.astype(np.float16))}),
        "float64": pa.table({"emb": fixed(x.astype(np.float64))}),
        "polars arrays": frame,
        "polars lists": frame.with_columns(pl.col("emb").arr.to_list()),
        "polars lazily": frame.lazy().collect(),
        "pandas": pd.DataFrame({"emb": list(x)}),
        "duckdb": duckdb.sql("SELECT emb FROM duckdb_source"),
        "nanoarrow": nanoarrow.Array(table.to_batches()[0]),
        "nanoarrow stream": nanoarrow.ArrayStream(table),
        "numpy": x,
        "numpy strided": np.repeat(x, 2, axis=1)[:, ::2],
        "numpy fortran": np.asfortranarray(x),
        "numpy big-endian": x.astype(">f4"),
        "ml_dtypes": x.astype(ml_dtypes.bfloat16),
    }


@pytest.mark.parametrize("kind", list(sources()))
def test_every_kind_of_table_gives_the_same_codes(q, kind):
    expected = q.quantize(np.arange(24, dtype=np.float32).reshape(6, 4) - 10, "uint8")
    r = q.quantize(sources()[kind], "uint8")
    column = r.table.column_names[0]
    assert np.array_equal(r.codes(column), expected.codes("vector"))
    assert np.array_equal(r.scales(column), expected.scales("vector"))
    assert np.array_equal(r.zero_points(column), expected.zero_points("vector"))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", ">f4"])
def test_state_dicts_keep_names_shapes_and_types(q, dtype):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    x = (np.arange(60, dtype=np.float32) / 8).reshape(3, 4, 5).astype(kind)
    r = q.quantize({"b": x, "a": x[0], "scalar": x[0, 0, 0]}, "int8")
    assert r.table.column("layer_name").to_pylist() == ["b", "a", "scalar"]
    assert r.layer("b").shape == (3, 4, 5)
    assert r.layer("b").src_dtype == ("float32" if dtype == ">f4" else dtype)
    assert len(r.layer("b").scales) == 12
    values = x.astype(np.float32)
    assert np.abs(r.layer("b").dequantize() - values).max() <= values.max() / 254 + 1e-6
    assert np.array_equal(r.layer("a").codes, r.layer("b").codes[:20])


def test_state_dicts_are_read_where_they_lie(q):
    """The values that cross are those at the time of the call, strided views included."""
    x = np.zeros((4, 6), np.float32)
    view = x[::2, ::3]
    x[2, 3] = 127
    assert q.quantize({"w": view}).layer("w").dequantize().tolist() == [[0, 0], [0, 127]]


def test_layers_tables_take_every_string_type_and_binary_bfloat16(q):
    x = RNG.standard_normal(12).astype(ml_dtypes.bfloat16)
    table = pa.table(
        {
            "layer_name": pa.array(["x"], pa.large_string()),
            "weights": pa.array([x.tobytes()], pa.binary()),
            "dtype": ["bfloat16"],
            "shape": pa.array([[3, 4]], pa.list_(pa.int64())),
        }
    )
    r = q.quantize(table, "int8")
    assert r.schema.field("layer_name").type == pa.large_string()
    same = q.quantize({"x": x.reshape(3, 4)}, "int8")
    assert np.array_equal(r.layer("x").codes, same.layer("x").codes)
    assert r.layer("x").src_dtype == "bfloat16"


def test_schema_of_a_layers_table(q):
    r = q.quantize({"w": np.ones((2, 4), np.float32)}, "uint4")
    words = pa.dictionary(pa.int8(), pa.string())
    assert dict(zip(r.schema.names, r.schema.types, strict=True)) == {
        "layer_name": pa.string(),
        "quantized_data": pa.binary(),
        "scales": pa.list_(pa.float32()),
        "zero_points": pa.list_(pa.float32()),
        "shape": pa.list_(pa.int64()),
        "bit_width": pa.uint8(),
        "scheme": words,
        "src_dtype": words,
        "packing": words,
        "group_size": pa.int32(),
        "axis": pa.int8(),
        "metrics": r.schema.field("metrics").type,
        "error": pa.string(),
    }
    assert {f.name: f.type for f in r.schema.field("metrics").type} == {
        "mse": pa.float64(),
        "sqnr_db": pa.float64(),
        "max_abs_err": pa.float64(),
        "cosine": pa.float64(),
        "n_clipped": pa.int64(),
        "n_degenerate": pa.int64(),
    }


def test_overrides_go_by_exact_name_then_first_pattern(q):
    x = np.ones((2, 4), np.float32)
    r = q.quantize(
        {"embed.weight": x, "lm_head.weight": x, "h.0.q": x, "h.1.q": x},
        "uint4",
        overrides={"re:.*embed.*": None, "lm_head.*": {"scheme": "int8"}, "h.1.q": {"scheme": "uint2"}},
    )
    assert r.table.column("scheme").to_pylist() == ["float32", "int8", "uint4", "uint2"]
    assert r.layer("embed.weight").codes.tobytes() == x.tobytes()
    assert np.array_equal(r.layer("embed.weight").dequantize(), x)


def test_metrics_are_measured_by_the_daemon_and_by_validate_alike(q):
    x = vectors(40, 96)
    r = q.quantize(x, "uint8", metrics=True)
    ours = shmquant.validate(x, r)["vector"]
    stats = r.stats["vector"]
    error = r.dequantize().column("vector").combine_chunks().flatten().to_numpy() - x.reshape(-1)
    assert stats.mse == pytest.approx(float((error.astype(np.float64) ** 2).mean()), rel=1e-12)
    assert ours.mse == pytest.approx(stats.mse, rel=1e-12)
    assert ours.sqnr_db == pytest.approx(stats.sqnr_db, rel=1e-12)
    assert ours.max_abs_err == stats.max_abs_err
    assert ours.cosine == pytest.approx(stats.cosine, rel=1e-12)
    assert 0.9 < ours.recall_at_k <= 1
    assert q.quantize(x, "uint8").stats["vector"].mse is None


def test_validate_of_layers_goes_by_name(q):
    x = {"a": vectors(4, 64), "b": np.zeros((2, 8), np.float32)}
    found = shmquant.validate(x, q.quantize(x, "int8"))
    assert found["a"].sqnr_db > 30
    assert found["a"].recall_at_k is None
    assert (found["b"].mse, found["b"].sqnr_db) == (0, None)


def test_counters_say_what_happened(q):
    x = vectors(4, 8)
    x[1] = 0
    x[2, 5] = np.nan
    stats = q.quantize(x, on_nonfinite="null").stats["vector"]
    assert (stats.n_nonfinite, stats.n_nulled) == (1, 1)
    assert stats.n_degenerate_groups >= 1
    r = q.quantize(x, on_nonfinite="saturate")
    assert r.codes("vector")[2, 5] == 0
    assert r.stats["vector"].n_nonfinite == 1
    assert r.table.column("vector").null_count == 0


def test_a_faulty_layer_does_not_stop_the_others_if_told_so(q):
    good = np.ones(4, np.float32)
    bad = np.array([1, np.inf], np.float32)
    r = q.quantize({"good": good, "bad": bad}, continue_on_error=True)
    assert r.layer("good").error is None
    assert "Layer 'bad' contains NaN or Inf at index 1" in r.layer("bad").error
    assert r.table.column("quantized_data").is_valid().to_pylist() == [True, False]
    with pytest.raises(InvalidInputError, match="bad"):
        r.layer("bad").dequantize()


@pytest.mark.parametrize("scheme", ["int8", "uint4"])
def test_empty_things_stay_empty(q, scheme):
    empty = pa.table({"emb": pa.array([], pa.list_(pa.float32(), 8)), "id": pa.array([], pa.int64())})
    r = q.quantize(empty, scheme)
    assert r.table.num_rows == 0
    assert r.codes("emb").shape == (0, 8 if scheme == "int8" else 4)
    layer = q.quantize({"none": np.zeros((0, 4), np.float32)}, scheme).layer("none")
    assert len(layer.codes) == 0
    assert layer.dequantize().shape == (0, 4)


def test_tables_beyond_the_window_stream_through_it(address):
    """Values of twice the window, in two passes."""
    q = shmquant.ShmQuantizer(address, window=4 << 20)
    x = vectors(20_000, 128)
    r = q.quantize(x, "uint8", granularity="dimension")
    for i in (0, 127):
        scale, zero_point = ref.params(x[:, i], "uint8")
        assert np.array_equal(r.codes("vector")[:, i], ref.codes(x[:, i], scale, zero_point, "uint8"))


def test_progress_is_told_and_ends_with_all(q):
    told = []
    x = vectors(2000, 384)
    q.quantize(x, progress=lambda done, of: told.append((done, of)))
    assert told
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == x.nbytes


def test_schemes_and_the_typed_literal_are_the_same_words():
    from typing import get_args

    assert list(shmquant.schemes()) == list(get_args(shmquant.Scheme))


@pytest.mark.parametrize("granularity", ["row", "tensor", "dimension"])
def test_tables_of_one_shape_share_nothing_but_their_layout(q, granularity):
    """What is kept of one request for the next must not show in its values, null counts or parameters."""
    for bad in ([], [2], [], [0, 7], [5], [5]):
        x = vectors(8, 16) * np.float32(1 + len(bad))
        good = np.setdiff1d(np.arange(8), bad)
        x[bad, 3] = np.nan
        r = q.quantize(x, "int8", granularity=granularity, on_nonfinite="null")
        codes = r.table.column("vector").chunk(0)
        assert codes.null_count == len(bad)
        assert [i for i, valid in enumerate(codes.is_valid().to_pylist()) if not valid] == bad
        assert r.stats["vector"].n_nulled == len(bad)
        decoded = np.stack(r.dequantize().column("vector").take(good).to_numpy())
        assert np.abs(decoded - x[good]).max() <= np.abs(x[good]).max() / 127
        r.table.validate(full=True)


def test_results_of_different_tables_do_not_mix(q):
    """More shapes than a lane keeps layouts of, in turn."""
    for _ in range(3):
        for dim in (4, 8, 12, 16, 20, 24):
            x = vectors(3, dim)
            r = q.quantize({"a": x}, "uint8") if dim == 8 else q.quantize(x, "uint8")
            found = r.table
            assert found.num_rows == (1 if dim == 8 else 3)
            if dim != 8:
                assert np.array_equal(
                    r.codes("vector")[1], ref.codes(x[1], *ref.params(x[1], "uint8"), "uint8")
                )
