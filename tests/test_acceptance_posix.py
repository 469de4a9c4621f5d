"""Segments with names in /dev/shm, for peers that trust each other: the same promises, and no litter."""

from __future__ import annotations

import json
import os
import pickle
import signal
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from children import Child
from daemons import Daemon, eventually
from processes import segments
from shmquant import ShmQuantizer

X = np.random.default_rng(9).standard_normal((3000, 64), dtype=np.float32)


def names_of(q: ShmQuantizer) -> set[Path]:
    """What is in /dev/shm of this daemon."""
    instance = json.loads(q._client.stat())["instance"]
    return {path for path in Path("/dev/shm").iterdir() if instance in path.name}


@pytest.fixture
def posix(tmp_path: Path):
    """Daemons at one address, one after the other."""
    started: list[Daemon] = []

    def start() -> Daemon:
        started.append(Daemon(tmp_path / "posix.sock", "--backing", "posix"))
        return started[-1]

    yield start
    for daemon in started:
        daemon.stop()


OPENS = """
import json, sys, zlib
from shmquant import ShmQuantizer

r = ShmQuantizer(sys.argv[1]).open("shared")
print(json.dumps([zlib.crc32(r.codes("vector")), r.segment_name]))
"""
LOADS = """
import json, pickle, sys, zlib

r = pickle.loads(bytes.fromhex(sys.stdin.readline()))
print(json.dumps([zlib.crc32(r.codes("vector")), r.segment_name]))
"""


def test_posix_segments_are_shared_in_every_way(posix):
    daemon = posix()
    q = ShmQuantizer(daemon.address)
    assert json.loads(q._client.stat())["backing"] == "posix"
    r = q.quantize(X, "uint8")
    checksum = zlib.crc32(r.codes("vector"))
    with pytest.raises(ValueError, match="read-only"):
        r.codes("vector")[0] = 1
    published = q.quantize(X, "uint8", name="shared")
    with Child(OPENS, daemon.address) as child:
        assert child.answer() == [checksum, published.segment_name]
        assert child.end() == 0
    with Child(LOADS) as child:
        child.tell(pickle.dumps(r).hex())
        assert child.answer() == [checksum, r.segment_name]
        assert child.end() == 0
    (entry,) = q.list()
    assert entry["path"].startswith("/dev/shm/")
    assert os.stat(entry["path"]).st_mode & 0o077 == 0
    codes = pa.ipc.open_file(pa.memory_map(entry["path"])).read_all().column("vector").chunk(0)
    assert zlib.crc32(codes.values.buffers()[1]) == checksum
    # Steady state: the same names again, though not that which another session has leased.
    del r
    q.quantize(X, "uint8")
    eventually(lambda: json.loads(q._client.stat())["leases"] == 1)
    before = names_of(q)
    for _ in range(20):
        q.quantize(X, "uint8")
        # A hold may go back beside the next call, which would get another segment if it were faster.
        eventually(lambda: json.loads(q._client.stat())["leases"] == 1)
    assert names_of(q) == before
    del published, codes
    q.drop("shared")
    assert daemon.stop() == 0
    assert not any(path.exists() for path in before)


def test_a_new_daemon_sweeps_up_after_a_killed_one(posix):
    first = posix()
    q = ShmQuantizer(first.address)
    r = q.quantize(X, "int8")
    q.quantize({"w": X}, "uint4", name="shared")
    before = r.codes("vector").copy()
    left = names_of(q)
    assert len(left) >= 3, "a window, a result and a dataset"
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    assert all(path.exists() for path in left)

    second = posix()
    # By this one, or by another daemon that has started just now and is at it.
    eventually(lambda: not any(path.exists() for path in left))
    # What was held stays readable, and the same handle goes on with the new daemon.
    assert np.array_equal(r.codes("vector"), before) and r.segment_name in segments()
    assert q.list() == []
    made = q.quantize(X, "int8")
    assert np.array_equal(made.codes("vector"), before)
    assert names_of(q) and not names_of(q) & left
    del r, made
    assert second.stop() == 0


def test_a_sweep_spares_the_living(posix, serve):
    living = ShmQuantizer(serve("--backing", "posix").address)
    r = living.quantize(X, name="living")
    names = names_of(living)
    killed = posix()
    q = ShmQuantizer(killed.address)
    q.quantize(X)
    left = names_of(q)
    killed.stop(signal.SIGKILL)
    posix()
    eventually(lambda: not any(path.exists() for path in left))
    assert names_of(living) == names
    assert np.array_equal(living.open("living").codes("vector"), r.codes("vector"))
