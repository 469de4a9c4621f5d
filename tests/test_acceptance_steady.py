"""From the second use of a segment on: one round trip, no faults, no mappings, the same memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from children import Child
from processes import segments
from relay import CLIENT, DAEMON, Relay
from shmquant import ShmQuantizer

CALLS = 200
X = np.random.default_rng(5).standard_normal((4000, 384), dtype=np.float32)
SIZES = [10, 600, 4000]
REQUESTS = [
    ("int8", {}),
    ("uint8", {"granularity": "tensor"}),
    ("uint8", {"granularity": "dimension"}),
    ("uint4", {"group_size": 64}),
]


@pytest.fixture
def relay(serve, tmp_path):
    relay = Relay(str(tmp_path / "relay.sock"), serve().address)
    yield relay
    relay.close()


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize(("scheme", "options"), REQUESTS, ids=lambda value: str(value))
def test_a_table_that_fits_the_window_takes_one_round_trip(relay, rows, scheme, options):
    q = ShmQuantizer(relay.address)
    data = pa.table({"emb": pa.FixedSizeListArray.from_arrays(pa.array(X[:rows].reshape(-1)), 384)})
    # Whatever moves on to the next result while the last is read needs two pieces of memory.
    for _ in range(3):
        q.quantize(data, scheme, **options).codes("emb").sum()
    # What is given back a moment too late for a call makes the pool grow by one more piece, once.
    for _ in range(3):
        used, relay.descriptors = set(segments()), 0
        relay.frames.clear()
        for _ in range(20):
            q.quantize(data, scheme, **options).codes("emb").sum()
        frames = relay.frames
        assert frames.pop((CLIENT, "QUANTIZE")) == frames.pop((DAEMON, "QUANTIZE reply")) == 20
        # What else there is needs no answer and gets none: how far the window is written, if there is more
        # than one chunk, and what an idle client gives back.
        wrote = frames.pop((CLIENT, "WROTE"), 0)
        assert (wrote == 0) == (X[:rows].nbytes <= 1 << 20)
        frames.pop((CLIENT, "RELEASE"), None)
        assert not frames
        # A descriptor comes once for each segment, so mostly not at all.
        assert relay.descriptors == len(set(segments()) - used)
        if not relay.descriptors:
            return
    pytest.fail("new memory again and again")


STEADY = """
import gc, json, sys
import numpy as np, pyarrow as pa
from processes import mappings, minor_faults, segments
from shmquant import ShmQuantizer

address, daemon, rows, calls, layers = sys.argv[1], *map(int, sys.argv[2:])
q = ShmQuantizer(address)
x = np.random.default_rng(0).standard_normal((rows, 384), dtype=np.float32)
table = pa.table({"emb": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 384)})
names = set()

def work():
    if layers:
        r = q.quantize({"w": x}, "uint4")
        r.layer("w").codes.max()
    else:
        r = q.quantize(table)
        r.codes("emb").max()
    names.add(r.segment_name)

def look():
    stat = json.loads(q._client.stat())
    return {
        "faults": [minor_faults(), minor_faults(daemon)],
        "mappings": [len(mappings()), len(mappings(daemon))],
        "segments": [segments(), segments(daemon)],
        "used": sorted(names),
        "stat": {key: stat[key] for key in ("requests", "segments", "bytes", "fds", "retired")},
    }

for _ in range(50):
    work()
look()
# The collector's own pages are not what is counted.
gc.collect()
gc.freeze()
before = look()
names.clear()
# Given back a moment too late for a call, a piece makes the pool grow by another, once: look again then.
for _ in range(3):
    for _ in range(calls):
        work()
    after = look()
    if after["segments"] == before["segments"]:
        break
    before = look()
    names.clear()
print(json.dumps([before, after]))
"""


@pytest.mark.parametrize("layers", [0, 1], ids=["columns", "layers"])
@pytest.mark.parametrize("rows", SIZES)
def test_two_hundred_calls_map_nothing_and_fault_no_pages(serve, rows, layers):
    daemon = serve()
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    arguments = (daemon.address, daemon.process.pid, rows, CALLS, layers)
    with Child(STEADY, *arguments, env=path) as child:
        before, after = child.answer()
        assert child.end() == 0
    print(json.dumps([before, after]))
    for key in ("mappings", "segments"):
        assert after[key] == before[key]
    # The same memory again and again.
    assert set(after["used"]) <= set(before["segments"][0]) and len(after["used"]) <= 3
    requests = after["stat"].pop("requests") - before["stat"].pop("requests")
    assert requests == CALLS
    assert after["stat"] == before["stat"]
    # A page of the result, touched anew by either side in each call, would be CALLS at least.
    for then, now in zip(before["faults"], after["faults"], strict=True):
        assert now - then < CALLS // 4, (before["faults"], after["faults"])
