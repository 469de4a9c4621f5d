"""Results mean the same after they travelled: no reader, writer or concatenation makes them decode
wrongly."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shmquant
from shmquant import InvalidInputError

RNG = np.random.default_rng(11)
X = RNG.standard_normal((40, 16), dtype=np.float32)
STATE = {"a": X, "b": X[:3] * 2, "scalar": np.float32(2.5)}
SPECS = [
    ("int8", {}),
    ("uint8", {"granularity": "dimension"}),
    ("uint8", {"granularity": "tensor"}),
    ("uint4", {"group_size": 8}),
    ("int4", {"granularity": "row"}),
    ("uint2", {"granularity": "dimension"}),
]
IDS = [f"{scheme}-{'-'.join(map(str, o.values()))}" for scheme, o in SPECS]


def table(x: np.ndarray = X) -> pa.Table:
    emb = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    return pa.table({"id": range(len(x)), "emb": emb})


def through_parquet(t: pa.Table, folder) -> pa.Table:
    pq.write_table(t, folder / "t.parquet")
    return pq.read_table(folder / "t.parquet")


def through_ipc_file(t: pa.Table, folder) -> pa.Table:
    with pa.ipc.new_file(folder / "t.arrow", t.schema) as sink:
        sink.write_table(t, max_chunksize=7)
    with pa.memory_map(str(folder / "t.arrow")) as file:
        return pa.ipc.open_file(file).read_all()


def through_a_stream(t: pa.Table, folder) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, t.schema) as writer:
        writer.write_table(t, max_chunksize=9)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def through_polars(t: pa.Table, folder) -> object:
    return pl.from_arrow(t)


def through_polars_ipc(t: pa.Table, folder) -> object:
    pl.from_arrow(t).write_ipc(folder / "t.ipc")
    return pl.read_ipc(folder / "t.ipc")


def through_a_filter(t: pa.Table, folder) -> pa.Table:
    return pa.concat_tables([t.slice(0, 15), t.slice(15)]).combine_chunks()


WAYS = [
    through_parquet,
    through_ipc_file,
    through_a_stream,
    through_polars,
    through_polars_ipc,
    through_a_filter,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("scheme", "options"), SPECS, ids=IDS)
def test_columns_decode_alike_after_every_way(q, tmp_path, scheme, options, way):
    r = q.quantize(table(), scheme, **options)
    expected = r.dequantize()
    assert np.abs(np.stack(expected["emb"].to_numpy()) - X).max() < 2.5
    back = shmquant.dequantize(way(r.table, tmp_path))
    assert back.column("emb").to_pylist() == expected.column("emb").to_pylist()


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("scheme", "options"), [SPECS[0], SPECS[2], SPECS[3]], ids=[IDS[0], IDS[2], IDS[3]])
def test_layers_decode_alike_after_every_way(q, tmp_path, scheme, options, way):
    r = q.quantize(STATE, scheme, overrides={"scalar": None}, **options)
    expected = r.dequantize()
    assert expected.column_names == ["layer_name", "weights", "shape"]
    back = shmquant.dequantize(way(r.table, tmp_path))
    assert back.column("weights").to_pylist() == expected.column("weights").to_pylist()
    assert expected["weights"][2].as_py() == [2.5]


def test_layers_decode_alike_after_duckdb_and_without_metadata(q):
    """DuckDB drops metadata; a layer's facts are columns."""
    t = q.quantize(STATE, "uint4", group_size=8).table
    back = duckdb.sql("SELECT * FROM t ORDER BY layer_name DESC").to_arrow_table()
    expected = dict(
        zip(t["layer_name"].to_pylist(), shmquant.dequantize(t)["weights"].to_pylist(), strict=True)
    )
    decoded = shmquant.dequantize(back)
    assert decoded["layer_name"].to_pylist() == ["scalar", "b", "a"]
    for name, weights in zip(decoded["layer_name"].to_pylist(), decoded["weights"].to_pylist(), strict=True):
        assert weights == expected[name]


def test_columns_without_their_metadata_are_refused_not_guessed(q):
    t = q.quantize(table(), "uint8").table  # noqa: F841 - duckdb finds it by name
    bare = duckdb.sql("SELECT * FROM t").to_arrow_table()
    with pytest.raises((InvalidInputError, shmquant.NotFoundError)):
        shmquant.dequantize(bare, columns=["emb"])


def test_rows_with_other_ranges_under_one_metadata_are_refused(q):
    """pyarrow concatenates tables under the first one's metadata; the ids of the rows tell."""
    a = q.quantize(table(X), "uint8", granularity="dimension").table
    b = q.quantize(table(X * 2), "uint8", granularity="dimension").table
    mixed = pa.Table.from_batches(
        a.to_batches() + [pa.record_batch(x.columns, a.schema) for x in b.to_batches()]
    )
    with pytest.raises(InvalidInputError, match="emb"):
        shmquant.dequantize(mixed)
    assert shmquant.dequantize(mixed.slice(0, 40)).equals(shmquant.dequantize(a))
    with pytest.raises(InvalidInputError, match="emb"):
        shmquant.dequantize(mixed.slice(40))


def test_rows_with_their_own_scales_concatenate_freely(q):
    a, b = q.quantize(table(X), "uint4", group_size=8), q.quantize(table(X * 2), "uint4", group_size=8)
    assert a.schema.equals(b.schema, check_metadata=True)
    both = shmquant.dequantize(pa.concat_tables([a.table, b.table]))
    expected = a.dequantize()["emb"].to_pylist() + b.dequantize()["emb"].to_pylist()
    assert both["emb"].to_pylist() == expected


def test_plain_columns_concatenate_freely(q):
    def plain(values: list) -> pa.Table:
        return q.quantize(pa.table({"p": values}), "uint8", columns=["p"]).table

    a, b = plain([0.0, 1.0, None]), plain([0.0, -5.0])
    assert a.schema.equals(b.schema, check_metadata=True)
    both = pa.concat_tables([a, b])
    for t in (both, both.combine_chunks(), pl.from_arrow(both)):
        assert shmquant.dequantize(t)["p"].to_pylist() == [0.0, 1.0, None, 0.0, -5.0]


def test_a_choice_of_columns_and_layers(q):
    t = table().append_column("other", table().column("emb"))
    r = q.quantize(t, "uint8")
    assert r.dequantize(columns=["other"]).column_names == ["other"]
    layers = q.quantize(STATE).dequantize(layers=["b"])
    assert layers["layer_name"].to_pylist() == ["b"]
    half = q.quantize(STATE).dequantize(dtype="float16")
    assert half.schema.field("weights").type.value_type == pa.float16()


def test_examples_in_docstrings():
    package = importlib.import_module("shmquant")
    failed = tried = 0
    for module in [package.__name__, *(f"shmquant.{m.name}" for m in pkgutil.iter_modules(package.__path__))]:
        results = doctest.testmod(importlib.import_module(module))
        failed, tried = failed + results.failed, tried + results.attempted
    assert tried >= 40
    assert failed == 0


def test_public_names_are_documented_and_open_is_left_to_the_builtin():
    namespace: dict[str, object] = {}
    exec("from shmquant import *", namespace)
    assert "open" not in namespace
    for name in shmquant.__all__:
        assert namespace[name] is getattr(shmquant, name)
    for thing in (shmquant.ShmQuantizer, shmquant.QuantizedTable, shmquant.Params, shmquant.Layer):
        for name, member in vars(thing).items():
            if not name.startswith("_"):
                assert (getattr(member, "__doc__", None) or "").strip(), f"{thing.__name__}.{name}"
