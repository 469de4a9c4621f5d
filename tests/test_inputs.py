"""Input in memory that the daemon has, too: nothing is copied, and the results are the same."""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from daemons import Daemon, eventually
from processes import segments
from shmquant import InvalidInputError, NoRoomError, ShmQuantizer

X = np.random.default_rng(7).standard_normal((3000, 96), dtype=np.float32)


def shared(q, values, skip=0):
    """The same numbers in memory of the daemon's, `skip` rows after its beginning."""
    array = q.empty((len(values) + skip, *values.shape[1:]), values.dtype)
    array[skip:] = values
    return array[skip:]


def vectors(array, dim=96):
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), dim)


def crossed(result):
    return result.bytes_copied, result.bytes_shared


def same(q, data, private, nbytes, **options):
    """Nothing of `data` is copied, and its result is that of `private`."""
    one, other = q.quantize(data, **options), q.quantize(private, **options)
    assert crossed(one) == (0, nbytes)
    assert other.bytes_shared == 0 and other.bytes_copied > 0
    assert one.table.equals(other.table, check_metadata=True)
    for key, stats in one.stats.items():
        assert stats.bytes_copied == 0 and stats[:9] == other.stats[key][:9]
    assert sum(stats.bytes_shared for stats in one.stats.values()) == nbytes


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("int8", {"granularity": "row"}),
        ("uint8", {"granularity": "tensor"}),
        ("uint8", {"granularity": "dimension", "metrics": True}),
        ("uint4", {"group_size": 32}),
    ],
    ids=str,
)
def test_an_array_is_read_where_it_lies(q, dtype, scheme, options):
    values = X.astype(dtype)
    array = shared(q, values)
    assert array.flags.writeable and array.ctypes.data % 64 == 0 and array.dtype == dtype
    same(q, array, values, values.nbytes, scheme=scheme, **options)


def test_slices_tables_and_state_dicts_are_recognised(q):
    x = shared(q, X, skip=5)
    for part in (slice(0, 1), slice(7, 1000), slice(2999, 3000)):
        same(q, x[part], X[part], X[part].nbytes)
    table = pa.table({"id": range(3000), "emb": vectors(x)})
    private = pa.table({"id": range(3000), "emb": vectors(X)})
    same(q, table, private, X.nbytes)
    same(q, table.slice(11, 500), private.slice(11, 500), 500 * 96 * 4)
    same(q, table.slice(11, 500).to_batches()[0], private.slice(11, 500), 500 * 96 * 4)
    # Chunks that lie one after another are one piece.
    cut = pa.concat_tables([table.slice(0, 100), table.slice(100, 50)])
    same(q, cut, private.slice(0, 150), 150 * 96 * 4)
    lists = pa.ListArray.from_arrays(pa.array(np.arange(3001, dtype="i4") * 96), pa.array(x.reshape(-1)))
    same(q, pa.table({"emb": lists}), pa.table({"emb": vectors(X)}), X.nbytes, scheme="uint4")
    plain = pa.table({"price": pa.array(x.reshape(-1)[96:])})
    same(q, plain, pa.table({"price": X.reshape(-1)[96:]}), X.nbytes - 384, columns=["price"])
    state = {"a": x, "b": x[3:4], "c": x.reshape(-1)[1:12], "d": x[:64, :]}
    private = {"a": X, "b": X[3:4], "c": X.reshape(-1)[1:12], "d": X[:64]}
    same(q, state, private, X.nbytes + 384 + 44 + 64 * 384, scheme="uint4", overrides={"c": None})


def test_only_private_memory_is_copied(q):
    x = shared(q, X)
    r = q.quantize({"a": x, "b": X, "c": x[:, :32], "d": x[::2]})
    assert crossed(r) == (sum(stats.bytes_copied for stats in r.stats.values()), X.nbytes)
    assert (r.stats["a"].bytes_copied, r.stats["a"].bytes_shared) == (0, X.nbytes)
    for name, values in {"b": X, "c": X[:, :32], "d": X[::2]}.items():
        # This process encodes them: int8 codes and scales cross, not the values.
        assert values.size < r.stats[name].bytes_copied < values.nbytes
        assert r.stats[name].bytes_shared == 0
    assert r.table.equals(q.quantize({"a": X, "b": X, "c": X[:, :32], "d": X[::2]}).table)
    # A table of several windows, its private column streamed beside the others.
    big = np.tile(X, (20, 1))
    names = ["a", "b", "c"]
    place = shared(q, big)
    mixed = pa.table({"a": vectors(place), "b": vectors(big), "c": vectors(place)})
    r = q.quantize(mixed, scheme="uint8", granularity="tensor")
    assert r.bytes_shared == 2 * big.nbytes and big.size < r.bytes_copied < big.nbytes
    codes = [r.codes(name) for name in names]
    assert all(np.array_equal(codes[0], other) for other in codes[1:])
    # Nulls have to become zeros.
    holes = pa.FixedSizeListArray.from_arrays(
        pa.array(x.reshape(-1)), 96, mask=pa.array([i == 4 for i in range(3000)])
    )
    assert q.quantize(pa.table({"emb": holes})).bytes_shared == 0


def test_bfloat16(q):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = X.astype(ml_dtypes.bfloat16)
    array = q.empty(X.shape, "bfloat16")
    array[:] = values
    same(q, {"w": array}, {"w": values}, values.nbytes, scheme="uint4")


def test_columns_of_a_schema(q):
    schema = pa.schema(
        [
            pa.field("emb", pa.list_(pa.float32(), 96), metadata={"unit": "none"}),
            pa.field("half", pa.list_(pa.field("x", pa.float16(), nullable=False), 3)),
            pa.field("price", pa.float64(), nullable=False),
        ],
        metadata={"made": "here"},
    )
    t = q.allocate(schema, 3000)
    assert list(t) == ["emb", "half", "price"] and len(t) == 3 and t.num_rows == 3000
    t["emb"][:] = X
    t["half"][:] = X[:, :3]
    t["price"][:] = X[:, 5]
    assert t.table.schema.equals(schema, check_metadata=True)
    t.table.validate(full=True)
    assert all(t[name].ctypes.data % 64 == 0 and t[name].flags.writeable for name in t)
    private = pa.table([pa.array(column.to_pylist(), column.type) for column in t.table], schema=schema)
    nbytes = X.nbytes + 3000 * (6 + 8)
    same(q, t.table, private, nbytes, columns=["emb", "half", "price"])
    # It shows what is written, also later.
    table = t.table
    t["price"][7] = 42.0
    assert table["price"][7].as_py() == 42.0
    del t
    assert table["price"][7].as_py() == 42.0
    assert crossed(q.quantize(table, columns=["price"])) == (0, 24_000)
    with pytest.raises(KeyError, match="no column 'x' among emb"):
        q.allocate(schema, 0)["x"]
    assert q.allocate(schema, 0).table.num_rows == 0

    for kind in (pa.int32(), pa.string(), pa.list_(pa.float32()), pa.list_(pa.int8(), 4)):
        with pytest.raises(InvalidInputError, match="column 'b' has type") as error:
            q.allocate(pa.schema([("a", pa.float32()), ("b", kind)]), 10)
        assert error.value.column == "b" and error.value.hint
    with pytest.raises(InvalidInputError, match="more than one column 'a'"):
        q.allocate(pa.schema([("a", pa.float32()), ("a", pa.float32())]), 10)


def test_what_cannot_be_made_is_refused(q):
    for shape in (-1, (4, -1), 1.5, "ab", None, (1 << 62, 4)):
        with pytest.raises(InvalidInputError):
            q.empty(shape)
    for dtype in ("int8", "float128", ">f4", "what", object):
        with pytest.raises(InvalidInputError) as error:
            q.empty(4, dtype)
        assert "float16" in error.value.hint
    with pytest.raises(NoRoomError, match="1\\.0 TiB"):
        q.empty(1 << 38)
    with pytest.raises(TypeError, match="no option 'size'"):
        q.empty(4, size=4)
    for shape in (0, (3, 0), ()):
        array = q.empty(shape, "float16")
        assert array.shape == (shape if isinstance(shape, tuple) else (shape,)) and array.flags.writeable


def test_memory_goes_with_the_last_view_and_comes_back(serve):
    q = ShmQuantizer(serve("--budget", "64MiB").address)

    def inputs():
        return json.loads(q._client.stat())["bytes_by_use"]["inputs"]

    x = q.empty((1 << 20, 4))
    table = pa.table({"emb": vectors(x, 4)}).slice(5, 100)
    column = x[10]
    del x
    gc.collect()
    assert inputs() == 16 << 20
    column[:] = 3.0
    assert table["emb"][5].as_py() == [3.0] * 4
    with pytest.raises(NoRoomError, match="your inputs take 16\\.0 MiB"):
        q.empty(14 << 20)
    del column, table
    gc.collect()
    # It goes back beside the next request, which may be faster.
    eventually(lambda: inputs() == 0)
    again = q.empty((1 << 20, 4))
    assert inputs() == 16 << 20 and again[10].tolist() == [3.0] * 4


def test_results_are_sources_too(q, python):
    name = f"inputs/{os.getpid()}"
    table = pa.table({"emb": vectors(X), "price": X[:, 0].astype("f8")})
    q.quantize(table, name=name)
    opened = q.open(name)
    prices = opened.table.select(["price"])
    same(q, prices, table.select(["price"]), 24_000, columns=["price"])
    scales = opened.table.select(["emb_scale"])
    assert crossed(q.quantize(scales, columns=["emb_scale"])) == (0, 12_000)
    assert crossed(opened) == (0, 0)
    # What was released is nobody's address any more.
    q.drop(name)


def test_names_do_not_depend_on_where_values_lie(q):
    name = f"places/{os.getpid()}"
    made = q.quantize(shared(q, X), name=name)
    assert crossed(made) == (0, X.nbytes)
    for data in (X, shared(q, X, skip=3)):
        found = q.quantize(data, name=name)
        assert found.segment_name == made.segment_name and found.bytes_shared == 0
    q.drop(name)


STEADY = """
import json, sys
import numpy as np
from processes import mappings, minor_faults, segments
from shmquant import ShmQuantizer

q, daemon = ShmQuantizer(sys.argv[1]), int(sys.argv[2])
x = q.empty((20_000, 384))
x[:] = np.random.default_rng(0).standard_normal(x.shape, dtype=np.float32)

def work(calls):
    for _ in range(calls):
        r = q.quantize(x)
        assert (r.bytes_copied, r.bytes_shared) == (0, x.nbytes)
        r.codes("vector").max()

def look():
    stat = json.loads(q._client.stat())
    sizes = {key: stat[key] for key in ("segments", "bytes", "fds", "retired", "bytes_copied")}
    return [len(mappings()), len(mappings(daemon)), segments(), segments(daemon), sizes]

work(10)
for _ in range(3):
    before = look()
    work(50)
    after = look()
    if before == after:
        break
print(json.dumps([before, after]))
"""


def test_the_steady_state_is_one_round_trip_whatever_the_size(serve, tmp_path, python):
    from relay import CLIENT, DAEMON, Relay

    daemon = serve()
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = python(STEADY, daemon.address, str(daemon.process.pid), env=env)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert before == after and after[-1]["bytes_copied"] == 0

    relay = Relay(str(tmp_path / "relay.sock"), daemon.address)
    try:
        q = ShmQuantizer(relay.address)
        x = shared(q, np.tile(X, (10, 1)))
        for _ in range(3):
            q.quantize(x)
        relay.frames.clear()
        for _ in range(20):
            q.quantize(x)
        frames = relay.frames
        assert frames.pop((CLIENT, "QUANTIZE")) == frames.pop((DAEMON, "QUANTIZE reply")) == 20
        frames.pop((CLIENT, "RELEASE"), None)
        assert not frames
    finally:
        relay.close()


FORK = """
import os, sys
import numpy as np
from shmquant import ShmQuantizer

q = ShmQuantizer(sys.argv[1])
x = q.empty((1000, 64))
x[:] = np.arange(64_000, dtype="f4").reshape(x.shape)
expected = q.quantize(x).codes("vector").copy()
child = os.fork()
if child == 0:
    # The child has the array, but its session does not know the memory: what crosses is copied.
    r = q.quantize(x)
    fine = r.bytes_shared == 0 and r.bytes_copied > x.size and (r.codes("vector") == expected).all()
    x[0, 0] = -1.0
    own = q.empty((10, 64))
    own[:] = 1.0
    fine &= q.quantize(own).bytes_copied == 0
    del x, r, own
    os._exit(0 if fine else 1)
assert os.waitpid(child, 0)[1] == 0
assert x[0, 0] == -1.0, "shared mappings are"
assert q.quantize(x).bytes_copied == 0
segment = set(line for line in open("/proc/self/maps") if ".input." in line)
assert len(segment) == 1
del x
# What a child may still map is not used again.
again = q.empty((1000, 64))
assert not again.any(), "it is new"
"""


def test_a_forked_child_copies_and_the_memory_is_retired(serve, python):
    done = python(FORK, serve().address)
    assert done.returncode == 0, done.stderr


def test_after_a_restart_it_is_private_memory(tmp_path):
    address = str(tmp_path / "again.sock")
    first = Daemon(address)
    q = ShmQuantizer(address)
    x = shared(q, X)
    before = q.quantize(x)
    first.stop()
    second = Daemon(address)
    try:
        r = q.quantize(x)
        assert r.bytes_shared == 0 and r.bytes_copied > X.size and r.table.equals(before.table)
        assert np.array_equal(x, X)
        assert crossed(q.quantize(shared(q, X))) == (0, X.nbytes)
    finally:
        second.stop()


def test_inside_this_process():
    q = ShmQuantizer(address="inproc:")
    same(q, shared(q, X), X, X.nbytes)


def test_posix_segments(serve):
    q = ShmQuantizer(serve("--backing", "posix").address)
    x = shared(q, X)
    same(q, x, X, X.nbytes, scheme="uint4")
    assert any(".input." in name for name in segments())
    del x
    gc.collect()
    eventually(lambda: json.loads(q._client.stat())["bytes_by_use"]["inputs"] == 0)
    again = q.empty(X.shape)
    assert np.array_equal(again, X)


def test_warm_memory(serve):
    q = ShmQuantizer(serve("--budget", "256MiB").address)

    def stat():
        return json.loads(q._client.stat())

    q.warm(8 << 20)
    before = stat()
    assert before["bytes_by_use"]["pools"] == 8 << 20
    r = q.quantize(np.ones((1 << 16, 96), "f4"))
    assert 4 << 20 < r.nbytes <= 8 << 20
    assert stat()["segments"] == before["segments"] and stat()["recycled"] == before["recycled"] + 1
    q.warm(0)
    with pytest.raises(NoRoomError, match="at most"):
        q.warm(200 << 20)
    for size in (-1, 0.5, 1 << 63):
        with pytest.raises(InvalidInputError):
            q.warm(size)


def test_counters_travel_along(q):
    r = q.quantize(shared(q, X))
    copy = pickle.loads(pickle.dumps(r))
    assert crossed(copy) == (0, X.nbytes) and copy.stats["vector"].bytes_shared == X.nbytes
    assert math.prod(X.shape) == copy.stats["vector"].n
