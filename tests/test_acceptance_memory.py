"""Zero copy: where results lie, what opening one costs, what many readers cost, what quantizing costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from children import Child
from daemons import Daemon
from processes import MIB, reset_peak, share, status
from shmquant import ShmQuantizer

DIM = 1024
# 64 MiB of vectors; the large table is 64 chunks over this one buffer: 4 GiB cross, 1 GiB comes of it.
ROWS, CHUNKS = 16_384, 64
WINDOW = 16 * MIB


class Datasets(NamedTuple):
    daemon: Daemon
    q: ShmQuantizer
    #: How far the peaks of the daemon and of this process rose while the large one was made.
    daemon_growth: int
    client_growth: int


def vectors(rows: int, chunks: int = 1) -> pa.Table:
    values = np.random.default_rng(3).standard_normal((rows, DIM), dtype=np.float32)
    chunk = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), DIM)
    return pa.table({"emb": pa.chunked_array([chunk] * chunks)})


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datasets]:
    """Datasets "tiny", "small" (1 MiB), "readers" (64 MiB) and "large" (1 GiB) of one daemon."""
    daemon = Daemon(tmp_path_factory.mktemp("memory") / "daemon.sock", "--budget", "3GiB")
    q = ShmQuantizer(daemon.address, window=WINDOW)
    for name, rows in (("tiny", 16), ("small", MIB // DIM), ("readers", 4 * ROWS)):
        q.quantize(vectors(rows), name=name)
    big = vectors(ROWS, CHUNKS)
    growth = []
    before = {pid: status(pid)["VmRSS"] for pid in (daemon.process.pid, "self")}
    for pid in before:
        reset_peak(pid)
    r = q.quantize(big, name="large", timeout=None)
    growth = [status(pid)["VmHWM"] - then for pid, then in before.items()]
    assert r.table.num_rows == ROWS * CHUNKS
    del r, big
    yield Datasets(daemon, q, *growth)
    assert daemon.stop() == 0


def mapping(segment: str) -> range:
    """Where this process has a segment."""
    (line,) = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if f"{segment} " in f"{line} "
    ]
    start, _, end = line.split()[0].partition("-")
    return range(int(start, 16), int(end, 16))


@pytest.mark.parametrize("scheme", ["int8", "uint4", "uint2"])
def test_every_quantized_buffer_of_a_result_lies_in_its_segment(q, scheme):
    for data in (vectors(100), {"a": np.ones((64, 256), "f4"), "b": np.ones(7, "f4")}):
        r = q.quantize(data, scheme, metrics=True)
        inside = mapping(r.segment_name)
        buffers = [
            buffer
            for column in r.table.columns
            for chunk in column.chunks
            for buffer in chunk.buffers()
            if buffer is not None and buffer.size
        ]
        assert buffers
        for buffer in buffers:
            assert buffer.address in inside and buffer.address + buffer.size <= inside.stop


OPENS = """
import gc, json, resource, sys, time
from processes import bytes_read, status
from shmquant import ShmQuantizer

q = ShmQuantizer(sys.argv[1])
q.open("tiny").table
gc.collect()
for name in ("tiny", "small", "large", "small", "large"):
    read, shm = bytes_read(), status()["RssShmem"]
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    r = q.open(name)
    t = r.table
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(json.dumps({"name": name, "nbytes": r.nbytes, "rows": t.num_rows, "faults": faults,
        "read": bytes_read() - read, "resident": status()["RssShmem"] - shm, "us": round(seconds * 1e6)}))
"""


def test_opening_costs_the_same_for_a_mebibyte_and_a_gibibyte(datasets, record_property):
    """Told by what the kernel counts; the times are printed and held to nothing."""
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    with Child(OPENS, datasets.daemon.address, env=path) as child:
        _, *opens = [child.answer() for _ in range(5)]
        assert child.end() == 0
    print(*opens, sep="\n")
    record_property("opens", json.dumps(opens))
    for small, large in zip(opens[::2], opens[1::2], strict=True):
        assert large["nbytes"] > 1000 * small["nbytes"] > 1000 * MIB and large["rows"] == ROWS * CHUNKS
        assert large["faults"] <= small["faults"] + 16
        # What is read is what /proc says of itself, and no data.
        assert large["read"] <= small["read"] + 4096
        # Where there are huge pages, what is read at both ends is mapped by one of them each.
        assert large["resident"] <= small["resident"] + 2 * (2 * MIB) + 256 * 1024


READS = """
import json, sys, zlib
from shmquant import ShmQuantizer

r = ShmQuantizer(sys.argv[1]).open("readers")
print(json.dumps([zlib.crc32(r.codes("emb")), float(r.scales("emb").sum()), r.segment_name]), flush=True)
sys.stdin.read()
"""


def test_sixteen_readers_cost_one_copy(datasets):
    r = datasets.q.open("readers")
    segment, nbytes = r.segment_name, r.nbytes
    del r
    with ExitStack() as stack:
        readers = [stack.enter_context(Child(READS, datasets.daemon.address)) for _ in range(16)]
        answers = {tuple(reader.answer()) for reader in readers}
        assert len(answers) == 1 and {name for _, _, name in answers} == {segment}
        processes = [reader.pid for reader in readers]
        shares = [share(pid, segment) for pid in (*processes, datasets.daemon.process.pid, "self")]
        assert all(part > nbytes // 20 for part in shares[:16]), "a reader has not read all"
        assert 0.95 * nbytes <= sum(shares) <= 1.05 * nbytes
        assert [reader.end() for reader in readers] == [0] * 16


def test_four_gibibytes_cost_the_result_and_the_windows(datasets):
    """Values stream through the window: neither side ever holds them a second time."""
    nbytes = datasets.q.open("large").nbytes
    assert nbytes >= ROWS * CHUNKS * (DIM + 4)
    print(f"daemon +{datasets.daemon_growth / MIB:.0f} MiB, client +{datasets.client_growth / MIB:.0f} MiB")
    assert datasets.daemon_growth <= nbytes + WINDOW + 64 * MIB
    assert datasets.client_growth <= WINDOW + 64 * MIB
    used = json.loads(datasets.q._client.stat())["bytes_by_use"]
    assert used["windows"] == WINDOW and used["filling"] == used["growing"] == 0
