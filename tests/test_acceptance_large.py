"""More than offsets of 32 bits can tell: results beyond 2 GiB, and single layers and columns beyond it."""

from __future__ import annotations

import zlib

import numpy as np
import pyarrow as pa
import pytest

from children import Child
from processes import MIB, status
from shmquant import ShmQuantizer
from watchdog import patience

SIDE = 8192
LAYERS = 40


def memory_for(gib: float) -> None:
    """Skip on a machine that has not so much to spare."""
    with open("/proc/meminfo") as file:
        facts = dict(line.split(":") for line in file)
    free = int(facts["MemAvailable"].split()[0]) << 10
    if free < gib * 1024 * MIB:
        pytest.skip(f"{free >> 20} MiB of memory are available, {gib} GiB are needed")


def answer(serve, script: str, gib: float) -> object:
    """What a client of its own says; of what it works with, the daemon's own memory has nothing."""
    memory_for(gib)
    patience(600)
    daemon = serve("--budget", "3GiB")
    with Child(script, daemon.address) as child:
        said = child.answer()
        assert child.end() == 0
    assert status(daemon.process.pid)["RssAnon"] < 64 * MIB
    return said


@pytest.mark.slow
def test_a_table_beyond_two_gibibytes_comes_in_several_batches(serve):
    """40 layers of 64 Mi weights: 2.5 GiB of codes."""
    memory_for(5)
    patience(600)
    daemon = serve("--budget", "4GiB")
    q = ShmQuantizer(daemon.address)
    weights = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32)
    r = q.quantize({f"layer.{i}": weights for i in range(LAYERS)}, "int8", timeout=None)
    assert r.nbytes > LAYERS * SIDE * SIDE > 2**31
    t = r.table
    data = t.column("quantized_data")
    assert t.num_rows == LAYERS and t.schema.field("quantized_data").type == pa.binary()
    # A second batch only where one would have passed 2^31: 31 layers of 2^26 bytes still fit.
    assert [len(chunk) for chunk in data.chunks] == [31, 9]
    assert t.column("layer_name").to_pylist() == [f"layer.{i}" for i in range(LAYERS)]
    assert [batch.num_rows for batch in t.to_batches()] == [31, 9]

    small = q.quantize({"same": weights}, "int8").layer("same")
    codes, scales = zlib.crc32(small.codes), zlib.crc32(small.scales)
    for i in range(LAYERS):
        layer = r.layer(f"layer.{i}")
        assert layer.shape == (SIDE, SIDE)
        assert (zlib.crc32(layer.codes), zlib.crc32(layer.scales)) == (codes, scales), i
    s = np.abs(weights[5]).max() / np.float32(127)
    assert np.array_equal(r.layer("layer.39").codes.reshape(SIDE, SIDE)[5], np.rint(weights[5] / s))
    assert np.abs(r.layer("layer.35").dequantize()[:64] - weights[:64]).max() < 0.05


ONE = """
import json, sys
import numpy as np
import pyarrow as pa
from shmquant import ShmQuantizer

# 2^31 and some weights, most of which are the kernel's one page of zeros.
rows, dim = 32_769, 65_536
weights = np.zeros((rows, dim), np.float16)
marked = [0, 1, 777, 32_767, 32_768]
rng = np.random.default_rng(1)
for row in marked:
    weights[row] = rng.standard_normal(dim)
q = ShmQuantizer(sys.argv[1])
r = q.quantize({"small": weights[:2], "large": weights}, "int8", timeout=None)
field = r.schema.field("quantized_data")
layer = r.layer("large")
codes = layer.codes.reshape(rows, dim)
scales = layer.scales.reshape(rows)
right = True
for row in marked:
    scale = np.abs(weights[row].astype("f4")).max() / np.float32(127)
    right &= bool(scales[row] == scale)
    right &= np.array_equal(codes[row], np.rint(weights[row].astype("f4") / scale))
others = [row for row in range(0, rows, 1000) if row not in marked]
right &= not codes[others].any() and bool((scales[others] == 1).all())
right &= np.array_equal(r.layer("small").codes.reshape(2, dim), codes[:2])
print(json.dumps([str(field.type), codes.size, right, r.table.num_rows, pa.total_allocated_bytes()]))
"""


@pytest.mark.slow
def test_a_layer_of_two_gibibytes_is_a_large_binary(serve):
    kind, size, right, rows, allocated = answer(serve, ONE, gib=4)
    assert (kind, rows) == ("large_binary", 2) and size == 32_769 * 65_536 > 2**31
    assert right
    assert allocated < MIB


TEXTS = """
import json, sys, zlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from shmquant import ShmQuantizer

# 35 chunks of one text of 64 MiB, a short one and a null: 2.2 GiB together, which take their memory once.
long = "".join(f"{i:016x}" for i in range(1 << 22))
texts = pa.array([long, "short", None])
chunks = 35
rows = 3 * chunks
many = lambda values: pa.chunked_array([values] * chunks)
ids = pa.array(range(rows))
emb = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(rows * 4, dtype="f4")), 4)
tags = many(pa.array(["a", None, "c"]))
lists = many(pa.array([[], ["x"], ["y", "z"]]))
table = pa.table({"id": ids, "emb": emb, "text": many(texts), "tag": tags, "lists": lists})
q = ShmQuantizer(sys.argv[1])
q.quantize(table, "int8", name="texts", timeout=None)

r = q.open("texts")
t = r.table
text = t.column("text")
want = [zlib.crc32(long.encode()), zlib.crc32(b"short"), None] * chunks
got = []
for value in text.chunk(0):
    buffer = value.as_buffer() if value.is_valid else None
    got.append(None if buffer is None else zlib.crc32(buffer))
print(json.dumps({
    "types": {f.name: str(f.type) for f in t.schema},
    "rows": t.num_rows,
    "batches": len(t.to_batches()),
    "texts": got == want,
    "others": t.column("id").to_pylist() == list(range(rows))
        and t.column("tag").to_pylist() == tags.to_pylist()
        and t.column("lists").to_pylist() == lists.to_pylist(),
    "bytes": r.nbytes,
    "allocated": pa.total_allocated_bytes(),
}))
"""


@pytest.mark.slow
def test_a_kept_column_beyond_two_gibibytes_is_a_large_one(serve):
    """Published with the codes: that column alone changes its type, and no second copy is made of it."""
    facts = answer(serve, TEXTS, gib=5)
    assert facts["types"] == {
        "id": "int64",
        "emb": "fixed_size_list<item: int8>[4]",
        "emb_scale": "float",
        "text": "large_string",
        "tag": "string",
        "lists": "list<item: string>",
    }
    assert (facts["rows"], facts["batches"]) == (105, 1)
    assert facts["texts"] and facts["others"]
    assert facts["bytes"] > 35 << 26 > 2**31
    assert facts["allocated"] < 256 * MIB
