"""Zero copy, life and death of results, and how they reach other processes."""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import shmquant
from daemons import eventually
from shmquant import NotFoundError, QuantizedTable, ResultGoneError, ShmQuantizer

X = np.random.default_rng(1).standard_normal((64, 32), dtype=np.float32)
TABLE = pa.table(
    {
        "id": range(64),
        "emb": pa.FixedSizeListArray.from_arrays(pa.array(X.reshape(-1)), 32),
        "text": ["ä"] * 64,
    }
)


def mapped(segment: str) -> list[tuple[int, int, str]]:
    """Start, end and permissions of this process's mappings of a segment."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if re.search(re.escape(segment) + r"(?!\d)", line):
            start, end, permissions = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line).groups()
            found.append((int(start, 16), int(end, 16), permissions))
    return found


def quantized_buffers(table: pa.Table, columns: list[str]) -> list[pa.Buffer]:
    return [
        buffer
        for column in columns
        for chunk in table.column(column).chunks
        for buffer in chunk.buffers()
        if buffer is not None and buffer.size
    ]


def test_quantized_buffers_lie_inside_the_read_only_mapping(q):
    for data, columns in ((TABLE, ["emb", "emb_scale", "emb_zero_point"]), ({"w": X}, None)):
        r = q.quantize(data, "uint8")
        ((start, end, permissions),) = mapped(r.segment_name)
        assert permissions == "r--s"
        for buffer in quantized_buffers(r.table, columns or r.table.column_names):
            assert start <= buffer.address <= buffer.address + buffer.size <= end
            assert buffer.address % 8 == 0


def test_numpy_views_are_views_and_cannot_be_written(q):
    r = q.quantize(TABLE, "uint8")
    codes = r.codes("emb")
    ((start, end, _),) = mapped(r.segment_name)
    assert start <= codes.__array_interface__["data"][0] < end
    for view in (codes, r.scales("emb"), q.quantize({"w": X}).layer("w").codes):
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    with pytest.raises(TypeError, match="read-only"):
        memoryview(r._lease)[0] = 1


def test_a_private_mapping_is_writable_and_changes_nothing_for_others(q):
    r = q.quantize(TABLE, "uint8")
    private = np.frombuffer(r._private(), dtype=np.uint8)
    at = r.codes("emb").__array_interface__["data"][0] - r._lease.pointer
    before = r.codes("emb").copy()
    assert np.array_equal(private[at : at + 64 * 32], before.reshape(-1))
    private[at : at + 10] = 99
    assert np.array_equal(r.codes("emb"), before)
    with pytest.raises(BufferError):
        r.release()
    del private
    r.release()


def test_tensors_of_torch(q):
    torch = pytest.importorskip("torch")
    r = q.quantize(TABLE, "int8")
    tensor = r.torch("emb")
    assert tensor.dtype == torch.int8
    assert np.array_equal(tensor.numpy(), r.codes("emb"))
    before = r.codes("emb").copy()
    tensor.add_(1)
    assert np.array_equal(r.codes("emb"), before)
    state = {"w": torch.ones(2, 3, dtype=torch.bfloat16)}
    assert q.quantize(state).layer("w").src_dtype == "bfloat16"


def test_memory_goes_back_with_the_last_view(q):
    gc.collect()
    before = q.results()
    r = q.quantize(X)
    name = r.segment_name
    (made,) = q.results()[len(before) :]
    assert (made.segment_name, made.nbytes, made.name) == (name, r.nbytes, None)
    last = r.codes("vector")[3:5]
    del r
    gc.collect()
    assert [i.segment_name for i in q.results()[len(before) :]] == [name]
    assert last.shape == (2, 32)
    del last
    assert q.results() == before


def test_memory_is_used_again_from_the_second_result_on(q):
    """Steady state: the session's own memory, hot, and nothing mapped anew."""
    segments = set()
    for _ in range(20):
        r = q.quantize(X)
        segments.add(r.segment_name)
        del r
    assert len(segments) <= 2


def test_a_with_block_drops_our_references_and_no_views(q):
    with q.quantize(X) as r:
        codes = r.codes("vector")
        first = codes.copy()
    assert np.array_equal(codes, first)
    with pytest.raises(ValueError, match="released"):
        r.table  # noqa: B018
    with pytest.raises(RuntimeError, match="mine"), q.quantize(X) as r:
        raise RuntimeError("mine")
    assert "released" in repr(r)


def test_release_insists(q):
    r = q.quantize(X)
    view = r.table.column("vector")
    with pytest.raises(BufferError, match=r"1 buffer\(s\) over this result are still alive\nhint: delete"):
        r.release()
    assert r.table.num_rows == 64
    del view
    r.release()
    r.release()
    for use in (lambda: r.table, lambda: r.codes("vector"), lambda: pickle.dumps(r), lambda: pa.table(r)):
        with pytest.raises(ValueError, match="released"):
            use()


def test_release_all_spares_what_is_viewed(serve):
    q = ShmQuantizer(serve().address)
    kept = q.quantize(X)
    view = kept.codes("vector")
    others = [q.quantize(X) for _ in range(3)]
    assert others[0].table.num_rows == 64
    assert q.release_all() == 3
    assert [i.segment_name for i in q.results()] == [kept.segment_name]
    assert view.shape == (64, 32)
    with pytest.raises(ValueError, match="released"):
        others[0].table  # noqa: B018
    del view
    assert q.release_all() == 1


def test_a_copy_shares_nothing(q):
    r = q.quantize(TABLE, "uint8")
    own = r.copy()
    assert own.equals(r.table)
    assert own.schema.equals(r.schema, check_metadata=True)
    ranges = mapped(r.segment_name)
    for buffer in quantized_buffers(own, own.column_names):
        assert not any(start <= buffer.address < end for start, end, _ in ranges)
    r.release()
    assert shmquant.dequantize(own).column("emb").type == pa.list_(pa.float32(), 32)


def test_arrow_consumers_take_the_object_itself(q):
    import duckdb
    import polars as pl

    r = q.quantize(TABLE, "uint8")
    assert pa.table(r).equals(r.table)
    assert pl.DataFrame(r).shape == (64, 5)
    assert duckdb.sql("SELECT count(*), sum(emb[1]) FROM r").fetchall()[0] == (
        64,
        int(r.codes("emb")[:, 0].sum()),
    )
    assert set(r.to_pydict()) == {"id", "emb", "emb_scale", "emb_zero_point", "text"}


def checksum(r: QuantizedTable) -> tuple[int, list[str], str]:
    total = int(r.codes("emb").sum())
    return total, r.table.column_names, r.table.column("text")[0].as_py()


def test_pickles_are_tickets_to_the_same_memory(q):
    r = q.quantize(TABLE.slice(10, 20), "uint8")
    data = pickle.dumps(r)
    assert len(data) < 5000
    again = pickle.loads(data)
    assert again.segment_name == r.segment_name
    assert again.table.equals(r.table)
    assert again.schema.equals(r.schema, check_metadata=True)
    assert again.stats == r.stats
    with pytest.raises((ResultGoneError, NotFoundError)):
        pickle.loads(data)
    twin = copy.copy(r)
    r.release()
    assert twin.table.equals(again.table)


def test_results_travel_through_a_pool_both_ways(address):
    r = ShmQuantizer(address).quantize(TABLE, "uint8")
    expected = checksum(r)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(checksum, [r, r, r])) == [expected] * 3
        made = pool.submit(make, address).result(60)
    assert checksum(made) == expected


def make(address: str) -> QuantizedTable:
    return ShmQuantizer(address).quantize(TABLE, "uint8")


def put(address: str, queue) -> None:
    queue.put(make(address))


def test_a_ticket_survives_its_sender(address):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    sender = context.Process(target=put, args=(address, queue))
    sender.start()
    sender.join(60)
    assert sender.exitcode == 0
    assert checksum(queue.get(timeout=60)) == checksum(make(address))


READER = """
import sys
from shmquant import ShmQuantizer
r = ShmQuantizer(sys.argv[1]).open(sys.argv[2])
t = r.table
print(int(r.codes("emb").sum()), ",".join(t.column_names), t["text"][0], r.segment_name, flush=True)
sys.stdin.readline()
print(int(r.codes("emb").sum()))
"""


def test_datasets_are_opened_by_name_with_all_columns(q, address, python):
    r = q.quantize(TABLE, "uint8", name="result/by-name")
    total = str(int(r.codes("emb").sum()))
    answer = python(READER, address, "result/by-name", input="\n")
    assert answer.stderr == ""
    columns = "id,emb,emb_scale,emb_zero_point,text"
    assert answer.stdout.split() == [total, columns, "ä", r.segment_name, total]
    (entry,) = (e for e in q.list() if e["name"] == "result/by-name")
    # Any Arrow reader maps the dataset by its path.
    with pa.memory_map(entry["path"]) as file:
        assert pa.ipc.open_file(file).read_all().equals(r.table)
    assert shmquant.open("result/by-name", address).table.equals(r.table)
    q.drop("result/by-name")
    with pytest.raises(NotFoundError):
        q.open("result/by-name")
    assert r.codes("emb").sum() == int(total)


def test_keep_chooses_what_a_dataset_takes_along(q):
    r = q.quantize(TABLE, "uint8", name="result/keep", keep=["text"])
    assert r.table.column_names == ["emb", "emb_scale", "emb_zero_point", "text"]
    q.drop("result/keep")


def test_what_is_held_outlives_the_daemon(serve):
    daemon = serve()
    q = ShmQuantizer(daemon.address)
    r = q.quantize(TABLE, "uint8")
    expected = r.codes("emb").copy()
    daemon.stop(signal.SIGKILL)
    assert np.array_equal(r.codes("emb"), expected)
    assert r.table.column("text")[0].as_py() == "ä"
    del r
    gc.collect()


def test_a_forked_child_gets_a_session_of_its_own(q):
    r = q.quantize(TABLE, "uint8")
    expected = int(r.codes("emb").sum())
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            same = int(r.codes("emb").sum()) == expected
            own = int(q.quantize(TABLE, "uint8").codes("emb").sum()) == expected
            status = 0 if same and own else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert int(r.codes("emb").sum()) == expected
    # What a child saw is given up, not used again.
    tainted = r.segment_name
    del r
    names = {q.quantize(TABLE, "uint8").segment_name for _ in range(5)}
    assert tainted not in names or sys.platform != "linux"


def test_exit_with_live_results_is_quiet(address, python):
    script = (
        "import sys, atexit, numpy as np\n"
        "from shmquant import ShmQuantizer\n"
        "q = ShmQuantizer(sys.argv[1])\n"
        "r = q.quantize(np.ones((8, 8), 'f4')); t = r.table; c = r.codes('vector')\n"
        "cycle = [r]; cycle.append(cycle)\n"
        "atexit.register(lambda: print(q.quantize(np.ones((8, 8), 'f4')).table.num_rows))\n"
    )
    answer = python(script, address)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "8\n", "")


def test_the_daemon_forgets_a_killed_process(serve, python):
    daemon = serve()
    script = (
        "import os, sys, numpy as np\n"
        "from shmquant import ShmQuantizer\n"
        "r = ShmQuantizer(sys.argv[1]).quantize(np.ones((1000, 1000), 'f4'))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert python(script, daemon.address).returncode == -9
    q = ShmQuantizer(daemon.address)
    # Only our own session remains.
    eventually(lambda: json.loads(q._client.stat())["sessions"] == 1)


def test_a_result_does_not_keep_the_values_it_was_made_from(q):
    emb = pa.FixedSizeListArray.from_arrays(pa.array(X.reshape(-1).copy()), 32)
    before = pa.total_allocated_bytes()
    table = pa.table({"id": range(64), "emb": pa.array(emb.to_pylist(), emb.type)})
    assert pa.total_allocated_bytes() >= before + X.nbytes
    r = q.quantize(table)
    del table
    assert pa.total_allocated_bytes() < before + X.nbytes
    assert r.table.column("id").to_pylist() == list(range(64))
