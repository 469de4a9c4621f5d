"""Any Arrow reader takes a dataset by its path; whatever travels decodes rightly or is refused."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shmquant
from children import Child
from shmquant import InvalidInputError, NotFoundError

RNG = np.random.default_rng(23)
X = RNG.standard_normal((30, 24), dtype=np.float32)
LAYERS = {"a": X, "b": X[:3] * 2, "empty": X[:0]}


def table(x: np.ndarray) -> pa.Table:
    emb = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(x).reshape(-1)), x.shape[1])
    return pa.table({"id": range(len(x)), "emb": emb})


# ------------------------------------------------------------------------------------- by path, without us

BY_PATH = """
import json, sys, zlib
import pyarrow as pa
import {reader}

path, column = sys.argv[1:]
{read}
(chunk,) = t.column(column).chunks
if pa.types.is_fixed_size_list(chunk.type):
    data = chunk.values.buffers()[1]
    checksum = zlib.crc32(data)
else:
    data = max((b for b in chunk.buffers() if b is not None), key=lambda b: b.size)
    checksum = zlib.crc32(chunk[0].as_py())
inside = False
for line in open("/proc/self/maps"):
    start, end = (int(address, 16) for address in line.split()[0].split("-"))
    inside |= "shmquant." in line and start <= data.address and data.address + data.size <= end
assert not any(name.startswith("shmquant") for name in sys.modules)
print(json.dumps([t.num_rows, t.column_names, checksum, inside]))
"""
READERS = {
    "pyarrow.ipc": "t = pyarrow.ipc.open_file(pa.memory_map(path)).read_all()",
    "polars": "t = polars.read_ipc(path).to_arrow()",
}


@pytest.mark.parametrize("backing", ["memfd", "posix"])
@pytest.mark.parametrize("reader", READERS)
def test_a_dataset_is_read_by_its_path_without_this_library(serve, backing, reader):
    q = shmquant.ShmQuantizer(serve("--backing", backing).address)
    # Large enough that nobody would copy it by the way.
    x = RNG.standard_normal((5000, 256), dtype=np.float32)
    columns, layers = (
        q.quantize(table(x), "uint8", name="columns"),
        q.quantize({"w": x}, "uint4", name="layers"),
    )
    expected = {
        "columns": (columns.table, "emb", zlib.crc32(columns.codes("emb"))),
        "layers": (layers.table, "quantized_data", zlib.crc32(layers.layer("w").codes)),
    }
    entries = q.list()
    assert {entry["name"] for entry in entries} == set(expected)
    for entry in entries:
        t, column, checksum = expected[entry["name"]]
        with Child(BY_PATH.format(reader=reader, read=READERS[reader]), entry["path"], column) as child:
            # Polars reads; since its version 2 it has no option to map.
            maps = reader != "polars"
            assert child.answer() == [t.num_rows, t.column_names, checksum, maps]
            assert child.end() == 0


# ------------------------------------------------------------------------ tables that are put together again

KINDS: dict[str, dict[str, Any]] = {
    "int8-row": {"scheme": "int8"},
    "uint8-row": {"scheme": "uint8"},
    "uint4-row": {"scheme": "uint4"},
    "int8-group": {"scheme": "int8", "group_size": 8},
    "uint4-group": {"scheme": "uint4", "group_size": 8},
    "int2-group": {"scheme": "int2", "group_size": 24},
    "int8-tensor": {"scheme": "int8", "granularity": "tensor"},
    "uint4-tensor": {"scheme": "uint4", "granularity": "tensor"},
    "uint8-dimension": {"scheme": "uint8", "granularity": "dimension"},
    "int4-dimension": {"scheme": "int4", "granularity": "dimension"},
}
SHARED = [kind for kind in KINDS if kind.endswith(("tensor", "dimension"))]


def by_concat(tables: list[pa.Table], folder: Path) -> Any:
    return pa.concat_tables(tables)


def by_promoting_concat(tables: list[pa.Table], folder: Path) -> Any:
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def by_batches(tables: list[pa.Table], folder: Path) -> Any:
    schema = tables[0].schema
    return pa.RecordBatchReader.from_batches(schema, [b for t in tables for b in t.to_batches()]).read_all()


def by_parquet(tables: list[pa.Table], folder: Path) -> Any:
    with pq.ParquetWriter(folder / "t.parquet", tables[0].schema) as writer:
        for t in tables:
            writer.write_table(t)
    return pq.read_table(folder / "t.parquet")


def by_parquet_dataset(tables: list[pa.Table], folder: Path) -> Any:
    for i, t in enumerate(tables):
        pq.write_table(t, folder / f"{i}.parquet")
    return pq.read_table(folder)


def by_ipc(tables: list[pa.Table], folder: Path) -> Any:
    with pa.ipc.new_stream(folder / "t.arrows", tables[0].schema) as writer:
        for t in tables:
            writer.write_table(t.unify_dictionaries())
    with pa.memory_map(str(folder / "t.arrows")) as source:
        return pa.ipc.open_stream(source).read_all()


def by_polars(tables: list[pa.Table], folder: Path) -> Any:
    return pl.concat([pl.from_arrow(t) for t in tables], how="vertical")


def by_polars_parquet(tables: list[pa.Table], folder: Path) -> Any:
    by_polars(tables, folder).write_parquet(folder / "t.parquet")
    return pl.read_parquet(folder / "t.parquet")


WAYS = [
    by_concat,
    by_promoting_concat,
    by_batches,
    by_parquet,
    by_parquet_dataset,
    by_ipc,
    by_polars,
    by_polars_parquet,
]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)


def decoded(data: Any) -> list[list[float]]:
    return shmquant.dequantize(data).column("emb").to_pylist()


@ways
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SHARED])
def test_tables_with_ranges_of_their_rows_decode_after_every_joining(q, tmp_path, kind, way):
    made = [q.quantize(table(X * scale), **KINDS[kind]) for scale in (1, 7)]
    expected = [row for r in made for row in decoded(r.table)]
    assert decoded(way([r.table for r in made], tmp_path)) == expected


@ways
@pytest.mark.parametrize("kind", SHARED)
def test_tables_of_shared_params_decode_after_every_joining(q, tmp_path, kind, way):
    options = KINDS[kind]
    params = q.fit([table(X), table(X * 7)], **options)
    made = [q.quantize(table(X * scale), params=params).table for scale in (1, 7)]
    assert made[0].schema.equals(made[1].schema, check_metadata=True)
    expected = [row for t in made for row in decoded(t)]
    assert decoded(way(made, tmp_path)) == expected


@ways
@pytest.mark.parametrize("kind", SHARED)
def test_tables_of_other_params_are_refused_after_every_joining(q, tmp_path, kind, way):
    """Each under its own ranges is right; together, one metadata would stand for both."""
    made = [q.quantize(table(X * scale), **KINDS[kind]).table for scale in (1, 7)]
    expected = [row for t in made for row in decoded(t)]
    try:
        joined = way(made, tmp_path)
    except (pl.exceptions.PolarsError, pa.ArrowException):
        return  # refused by the reader itself
    with pytest.raises(InvalidInputError, match="emb"):
        shmquant.dequantize(joined)
    # Rows of the first are still right, those of the second alone are not taken for the first's.
    if isinstance(joined, pa.Table):
        assert decoded(joined.slice(0, 30)) == expected[:30]
        for part in (joined.slice(29, 2), joined.slice(30), joined.take([31, 40])):
            with pytest.raises(InvalidInputError, match="emb"):
                shmquant.dequantize(part)


# Two tables each, of one Arrow type but not of one meaning: dimension and options.
TWINS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "group size": [(16, {"scheme": "uint4", "group_size": 8}), (16, {"scheme": "uint4", "group_size": 12})],
    "group size of bytes": [(16, {"scheme": "int8", "group_size": g}) for g in (8, 10)],
    "dimension": [(15, {"scheme": "uint4"}), (16, {"scheme": "uint4"})],
    "dimension of groups": [
        (15, {"scheme": "int4", "group_size": 8}),
        (16, {"scheme": "int4", "group_size": 8}),
    ],
    "scheme": [(8, {"scheme": "uint4"}), (16, {"scheme": "uint2"})],
    "dimension under the same params": [(15, {"scheme": "uint4"}), (16, {"scheme": "uint4"})],
}


@ways
@pytest.mark.parametrize("turn", [1, -1], ids=["one-two", "two-one"])
@pytest.mark.parametrize("twins", TWINS)
def test_tables_of_other_specs_are_refused_after_every_joining(q, tmp_path, twins, turn, way):
    """Arrow compares types, and the first table's metadata would stand for both."""
    made = []
    for dim, options in TWINS[twins][::turn]:
        if "params" in twins:
            options = {"params": q.fit(table(X), "uint4", granularity="tensor")}
        made.append(q.quantize(table(X[:, :dim]), **options).table)
    assert made[0].schema.equals(made[1].schema)
    try:
        joined = way(made, tmp_path)
    except pl.exceptions.PolarsError:
        return  # refused by the reader itself
    with pytest.raises(InvalidInputError, match="tables with different specs or ranges were joined"):
        shmquant.dequantize(joined)
    if isinstance(joined, pa.Table):
        assert decoded(joined.slice(0, 30)) == decoded(made[0])
        with pytest.raises(InvalidInputError, match="emb"):
            shmquant.dequantize(joined.slice(30))


@pytest.mark.parametrize("turn", [1, -1], ids=["fewer-first", "more-first"])
@pytest.mark.parametrize(
    "twins",
    [
        [(8, {"scheme": "uint8"}), (16, {"scheme": "uint4"})],
        [(8, {"scheme": "int8"}), (8, {"scheme": "int8", "mapping": "asymmetric"})],
        [(8, {"scheme": "int8"}), (8, {"scheme": "int8", "granularity": "dimension"})],
    ],
    ids=["packed", "asymmetric", "dimension"],
)
def test_a_union_of_columns_is_no_way_to_other_specs(q, twins, turn):
    """Columns that one of the tables has alone are null in the rows of the other."""
    made = [q.quantize(table(X[:, :dim]), **options).table for dim, options in twins[::turn]]
    assert made[0].schema.field("emb").type == made[1].schema.field("emb").type
    with pytest.raises(pa.ArrowInvalid):
        pa.concat_tables(made)
    joined = pa.concat_tables(made, promote_options="default")
    with pytest.raises(InvalidInputError, match="emb"):
        shmquant.dequantize(joined)
    assert decoded(joined.slice(0, 30)) == decoded(made[0])


def test_the_joined_tables_that_are_refused_name_row_and_way_out(q):
    joined = pa.concat_tables([q.quantize(table(X), "uint4", group_size=size).table for size in (8, 9)])
    with pytest.raises(InvalidInputError) as caught:
        shmquant.dequantize(joined)
    assert caught.value.column == "emb" and caught.value.row == 30
    assert "hint: dequantize each table before joining them" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_duckdb_leaves_nothing_that_could_be_decoded_wrongly(q, kind):
    """It drops the metadata of fields, so vectors are refused; their rows' own columns stay readable."""
    t = q.quantize(table(X), **KINDS[kind]).table
    back = duckdb.sql("SELECT * FROM t ORDER BY id DESC").to_arrow_table()
    assert back.column_names == t.column_names and back.num_rows == 30
    with pytest.raises((InvalidInputError, NotFoundError)):
        shmquant.dequantize(back, columns=["emb"])
    codes = np.array(back.column("emb").to_pylist())[::-1]
    assert np.array_equal(codes, np.array(t.column("emb").to_pylist()))
    # The metadata put back, it decodes: which ranges were meant is told by the rows.
    emb = back.column("emb").cast(t.schema.field("emb").type)
    again = back.set_column(1, t.schema.field("emb"), emb)
    assert decoded(again)[::-1] == decoded(t)


@pytest.mark.parametrize("scheme", ["int8", "uint8", "int4", "uint4", "int2", "uint2"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_layers_of_any_specs_join_freely(q, tmp_path, scheme, granularity):
    """Each row brings its own facts, so even other schemes and group sizes mix."""
    options = {"group_size": 8} if granularity == "group" else {"granularity": granularity}
    made = [
        q.quantize(LAYERS, scheme, **options).table,
        q.quantize({"c": X * 7}, "uint4", group_size=5).table,
        q.quantize({"d": X, "e": X}, "int8", overrides={"e": None}).table,
    ]
    expected = [row for t in made for row in shmquant.dequantize(t).column("weights").to_pylist()]
    assert len(expected) == 6
    for way in (by_concat, by_promoting_concat, by_parquet, by_ipc, by_polars, by_polars_parquet):
        joined = way([t.unify_dictionaries() for t in made], tmp_path)
        assert shmquant.dequantize(joined).column("weights").to_pylist() == expected, way.__name__
    one = pa.concat_tables(made)  # noqa: F841 - duckdb finds it by name
    back = duckdb.sql("SELECT * FROM one").to_arrow_table()
    assert shmquant.dequantize(back).column("weights").to_pylist() == expected


def test_metadata_is_of_spec_and_params_only(q):
    """So that tables of one spec have one schema, whatever they hold."""
    for options in KINDS.values():
        params = None
        if "granularity" in options:
            params = q.fit(table(X), **options)
        schemas = [
            q.quantize(table(x), **({"params": params} if params else options)).schema
            for x in (X, X[:1], X * 100)
        ]
        assert all(s.equals(schemas[0], check_metadata=True) for s in schemas[1:])
        facts = json.loads(schemas[0].field("emb").metadata[b"ARROW:extension:metadata"])
        assert facts["scheme"] == options["scheme"] and facts["dim"] == 24
