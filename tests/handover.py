"""Hand over many small results in one of the three ways and see that memory stays flat.

    python tests/handover.py ADDRESS TIMES WAY...

For each way, prints one line of JSON: what this process and the daemon took at a fifth of the way and at the
end. Runs under valgrind too; an address of ``inproc:`` has the daemon inside.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from daemons import eventually
from processes import status
from shmquant import ShmQuantizer


class WithoutPandas:
    """pyarrow would import it to see whether what it is given is pandas': most of a run under valgrind."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ImportError(name)


sys.meta_path.insert(0, WithoutPandas)
X = np.random.default_rng(7).standard_normal((12, 16), dtype=np.float32)
TABLE = pa.table(
    {
        "id": range(12),
        "emb": pa.FixedSizeListArray.from_arrays(pa.array(X.reshape(-1)), 16),
        "text": ["ä"] * 12,
    }
)
LAYERS = {"a": X, "b": X[:3], "bias": X[0]}
#: After so many all but the last one have to be back: on a busy machine releases may come late by any number.
ALIVE = 500


def shared(q: ShmQuantizer, i: int) -> object:
    """Shared memory: buffers over the segment itself, by both kinds of table."""
    if i % 2:
        t = q.quantize(TABLE, "uint8").table
        return t.column("emb"), t.column("emb_zero_point")[3].as_py()
    r = q.quantize(LAYERS, "uint4")
    return r.table.slice(1), r.layer("b").codes


def copied(q: ShmQuantizer, i: int) -> object:
    """An independent copy: Arrow's, or Python's own objects."""
    r = q.quantize(TABLE if i % 4 < 2 else LAYERS, "int8")
    if i % 2:
        return r.copy()
    return r.to_pydict()


def streamed(q: ShmQuantizer, i: int) -> object:
    """The C Data Interface: a capsule read by another, dropped unread, or read in part."""
    r = q.quantize(TABLE if i % 2 else LAYERS, "uint8")
    if i % 5 == 0:
        return r.__arrow_c_stream__()
    reader = pa.RecordBatchReader.from_stream(r)
    del r
    return reader if i % 5 == 1 else reader.read_all()


WAYS: dict[str, Callable[[ShmQuantizer, int], object]] = {
    "shared": shared,
    "copied": copied,
    "streamed": streamed,
}


def content(data: object) -> object:
    """What was handed over, as something to compare."""
    if isinstance(data, tuple):
        return [content(part) for part in data]
    if isinstance(data, pa.RecordBatchReader):
        data = data.read_all()
    if isinstance(data, pa.Table | pa.ChunkedArray):
        return data.to_pylist()
    if isinstance(data, np.ndarray):
        return data.tolist()
    return data if isinstance(data, dict | int) else None


def look(q: ShmQuantizer) -> dict[str, object]:
    """Memory of both sides, and what the daemon counts."""
    gc.collect()
    # What was dropped goes back with the next request, or by another thread within some milliseconds.
    eventually(lambda: json.loads(q._client.stat())["leases"] == 0)
    stat = json.loads(q._client.stat())
    names = ("segments", "bytes", "leases", "fds", "tickets", "jobs", "waiting", "retired", "stray_releases")
    return {
        "private": status()["RssAnon"],
        "daemon_private": status(stat["pid"])["RssAnon"],
        "arrow": pa.total_allocated_bytes(),
        "results": len(q.results()),
        "daemon": {name: stat[name] for name in names},
        "requests": stat["requests"],
        "recycled": stat["recycled"],
    }


def main(address: str, times: int, *ways: str) -> None:
    """Go each of these ways so often."""
    q = ShmQuantizer(address)
    for way in ways:
        hand_over = WAYS[way]
        # 20 is a multiple of every way's period.
        expected = [content(hand_over(q, i)) for i in range(20)]
        early: dict[str, object] = {}
        previous: object = None
        for i in range(times):
            if i == times // 5:
                previous = None
                early = look(q)
            # The one before is still alive while the next is made, as it is with every consumer that has a
            # variable for it.
            previous = hand_over(q, i)
            if i % ALIVE == 0:
                eventually(lambda: json.loads(q._client.stat())["leases"] <= 1)
            if i % 97 == 0 and content(previous) != expected[i % 20]:
                raise AssertionError(f"number {i} differs")
        previous = None
        print(json.dumps([early, look(q)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
