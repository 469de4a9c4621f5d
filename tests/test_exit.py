"""Processes, threads and results end in every order: bytes stay, nothing hangs, nothing leaks."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from children import Child
from daemons import eventually
from shmquant import QuantizedTable, ShmQuantizer

X = np.random.default_rng(17).standard_normal((512, 64), dtype=np.float32)


def holdings(q: ShmQuantizer) -> dict[str, int]:
    """What is held and what runs."""
    now = json.loads(q._client.stat())
    names = ("sessions", "leases", "tickets", "datasets", "jobs", "waiting", "stray_releases")
    uses = ("results", "datasets", "filling", "growing", "leaving")
    return {name: now[name] for name in names} | {name: now["bytes_by_use"][name] for name in uses}


@pytest.fixture
def own(serve) -> Iterator[ShmQuantizer]:
    """A daemon whose counters are afterwards what they were before."""
    q = ShmQuantizer(serve("--budget", "512MiB").address)
    q.quantize(X)
    eventually(lambda: holdings(q)["leases"] == 0)
    before = holdings(q)
    yield q
    gc.collect()
    with contextlib.suppress(AssertionError):
        eventually(lambda: holdings(q) == before)
    assert holdings(q) == before


def crc(r: QuantizedTable) -> int:
    return zlib.crc32(r.codes("vector"))


# What the workers of the test below are: functions that every start method finds.
_inherited: list[QuantizedTable] = []


def serve_batches(address: str, todo, done) -> None:
    """One worker of a data loader: quantizes what it is told to, sends results back, keeps some alive."""
    q = ShmQuantizer(address)
    kept = []
    while (number := todo.get()) is not None:
        r = q.quantize(X * (number + 1))
        kept = [*kept[-3:], r]
        done.put((number, crc(r), r))
    done.put((None, [crc(r) for r in _inherited], None))
    done.close()
    done.join_thread()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_every_start_method_send_results_and_end(own, method):
    """As a DataLoader has it: workers live beside live results of the parent, whose lives go on."""
    context = multiprocessing.get_context(method)
    mine = [own.quantize(X * i) for i in (1, 2, 3)]
    sums = [crc(r) for r in mine]
    # Only a forked worker has them, too.
    _inherited.extend(mine)
    todo, done = context.Queue(), context.Queue()
    workers = [
        context.Process(target=serve_batches, args=(own.address, todo, done), daemon=True) for _ in range(3)
    ]
    try:
        for worker in workers:
            worker.start()
        for number in range(24):
            todo.put(number)
        for _ in workers:
            todo.put(None)
        received, ended = {}, 0
        while ended < len(workers):
            number, told, r = done.get(timeout=60)
            if number is None:
                assert told == (sums if method == "fork" else [])
                ended += 1
            else:
                assert crc(r) == told
                received[number] = (told, r)
        for worker in workers:
            worker.join(60)
            assert worker.exitcode == 0
    finally:
        _inherited.clear()
        for worker in workers:
            if worker.is_alive():
                worker.kill()
    assert sorted(received) == list(range(24))
    # The workers are gone; what they made is still here.
    for told, r in received.values():
        assert crc(r) == told
    assert [crc(r) for r in mine] == sums
    received.clear()
    del r
    todo.close()
    done.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_memory_is_not_used_again_under_a_child(own):
    """The parent gives results back after the fork and makes many more; the child's bytes do not change."""
    results = [own.quantize(X * i) for i in range(1, 9)]
    sums = [crc(r) for r in results]
    views = [r.codes("vector") for r in results]
    go, told = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(go[1])
            # Until the parent has released and written whatever it may write.
            os.read(go[0], 1)
            right = [zlib.crc32(v) for v in views] == sums
            right = right and [crc(r) for r in results] == sums
            # Dropping them here takes nothing from the parent.
            del views, results
            gc.collect()
            other = ShmQuantizer(own.address)
            right = right and crc(other.quantize(X)) == sums[0]
            os.write(told[1], b"+" if right else b"-")
            status = 0
        finally:
            os._exit(status)
    os.close(told[1])
    names = {r.segment_name for r in results}
    half = results[4:]
    del results[:4], views
    gc.collect()
    eventually(lambda: holdings(own)["leases"] == 4)
    for i in range(50):
        canary = own.quantize(np.full_like(X, -1.0 - i))
        assert canary.segment_name not in names
        assert (canary.codes("vector") == -127).all()
    os.write(go[1], b"!")
    assert os.read(told[0], 1) == b"+"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [crc(r) for r in half] == sums[4:]
    for fd in (*go, told[0]):
        os.close(fd)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_outlives_its_parent_with_the_parents_results(own):
    """The parent is killed; the grandchild, which only inherited the mapping, still reads the same bytes."""
    script = (
        "import os, sys, time, zlib, json, numpy as np\n"
        "from shmquant import ShmQuantizer\n"
        "r = ShmQuantizer(sys.argv[1]).quantize(np.arange(4096, dtype='f4').reshape(64, 64))\n"
        "before = zlib.crc32(r.codes('vector'))\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.close(write)\n"
        "    os.read(read, 1)\n"
        "    sys.stdin.readline()\n"
        "    print(json.dumps(zlib.crc32(r.codes('vector')) == before), flush=True)\n"
        "    os._exit(0)\n"
        "print(json.dumps(r.segment_name), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with Child(script, own.address) as parent:
        name = parent.answer()
        assert parent.process.wait() == -signal.SIGKILL
        eventually(lambda: holdings(own)["sessions"] == 1)
        for i in range(20):
            assert own.quantize(np.full_like(X, i + 1.0)).segment_name != name
        parent.tell("read")
        assert parent.answer() is True


def test_threads_drop_what_others_made(own):
    """Results are made in one thread, read in another and dropped in a third, while threads come and go."""
    failures: list[str] = []

    def use(results: list[QuantizedTable], sums: list[int]) -> None:
        for r, expected in zip(results, sums, strict=True):
            if crc(r) != expected:
                failures.append(r.segment_name)
        # The last reference goes in a thread that ends with it.
        threading.Thread(target=results.clear).start()

    for _ in range(6):
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda i: own.quantize(X * i), range(1, 17)))
        parts = [made[i::4] for i in range(4)]
        del made
        readers = [threading.Thread(target=use, args=(part, [crc(r) for r in part])) for part in parts]
        del parts
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        del readers
    assert not failures


ENDS = {
    "with a job of a daemon thread": (
        "started = threading.Event()\n"
        "def work():\n"
        "    big = np.ones((60_000, 1024), 'f4')\n"
        "    q.quantize(big, progress=lambda *_: started.set())\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "started.wait(60)\n"
    ),
    "with a daemon thread waiting for memory": (
        "held = q.quantize(np.ones((60_000, 1024), 'f4'))\n"
        "def work():\n"
        "    q.quantize(np.ones((1_000_000, 1024), np.float16), timeout=None)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
    ),
    "with results in cycles, globals and modules": (
        "class Node: pass\n"
        "node = Node(); node.me = node; node.r = q.quantize(x); node.t = node.r.table\n"
        "sys.modules['kept'] = node\n"
        "builtins_kept = [q.quantize(x).codes('vector')]\n"
    ),
    "by an exception": "r = q.quantize(x)\nraise SystemExit(3)\n",
    "by os._exit": "r = q.quantize(x); t = r.table\nos._exit(3)\n",
    "with a stream half read": (
        "import pyarrow as pa\n"
        "emb = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 64)\n"
        "s = q.quantize_stream(pa.table({'e': emb}).to_reader(max_chunksize=9)); b = s.read_next_batch()\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_an_interpreter_ends(own, python, how):
    script = (
        "import os, sys, threading, numpy as np\n"
        "from shmquant import ShmQuantizer\n"
        "q = ShmQuantizer(sys.argv[1], window=4 << 20); x = np.ones((64, 64), 'f4'); live = q.quantize(x)\n"
    )
    answer = python(script + ENDS[how], own.address)
    assert answer.returncode == (3 if "_exit" in how or "exception" in how else 0), answer.stderr
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr and "panicked" not in answer.stderr, answer.stderr


def test_exceptions_leave_with_blocks_and_views_intact(own):
    """The error is the one that was raised; views from inside live on, and the memory goes with them."""
    with pytest.raises(ZeroDivisionError) as error, own.quantize(X) as r:
        expected, view = crc(r), r.codes("vector")
        raise ZeroDivisionError
    assert error.value.__context__ is None
    assert zlib.crc32(view) == expected
    assert holdings(own)["leases"] == 1
    with pytest.raises(ValueError):
        _ = r.table
    del view, r, error
    gc.collect()
    eventually(lambda: holdings(own)["leases"] == 0)


def test_cycles_are_freed_by_the_collector(own):
    class Holder:
        pass

    gc.disable()
    try:
        for _ in range(10):
            a, b = Holder(), Holder()
            a.other, b.other = b, a
            a.r, b.t = (r := own.quantize(X)), r.table
            # A cycle through the views of the table, too.
            b.arrays = [b, b.t.column("vector"), r.codes("vector")]
            del a, b, r
        assert holdings(own)["leases"] == 10
        gc.collect()
        eventually(lambda: holdings(own)["leases"] == 0)
    finally:
        gc.enable()


def test_generators_and_iterators_give_back_when_closed(own):
    emb = pa.FixedSizeListArray.from_arrays(pa.array(X.reshape(-1)), 64)
    stream = own.quantize_stream(pa.table({"emb": emb}).to_reader(max_chunksize=50))
    batches = iter(stream)
    first = next(batches)
    expected = first.column("emb")[0].as_py()
    del stream, batches
    gc.collect()
    assert first.column("emb")[0].as_py() == expected
    assert holdings(own)["leases"] >= 1


AUTO_START = """
import json, sys, numpy as np
from shmquant import ShmQuantizer

q = ShmQuantizer(sys.argv[1])
print(q.quantize(np.ones((2, 2), "f4")).table.num_rows, json.loads(q._client.stat())["pid"])
"""


def test_an_auto_started_daemon_holds_no_pipe_of_its_caller(tmp_path):
    """`capture_output` reads until every writer has closed: a daemon that kept one would hang the caller."""
    address = tmp_path / "auto.sock"
    # A descriptor that is passed on must not be kept either.
    read, write = os.pipe()
    os.set_inheritable(write, True)
    done = subprocess.run(
        [sys.executable, "-c", AUTO_START, str(address)],
        capture_output=True, text=True, timeout=60, check=True, pass_fds=[write],
    )  # fmt: skip
    os.close(write)
    rows, pid = done.stdout.split()
    try:
        assert rows == "2"
        assert os.read(read, 1) == b"", "the daemon holds a descriptor of the process that started it"
        files = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)}
        assert not any(name.startswith("pipe:") for name in files), files
        q = ShmQuantizer(address)
        assert q.quantize(X).table.num_rows == 512
        # Once more, with the daemon there: also by a shell whose output is captured.
        again = subprocess.run(
            ["sh", "-c", '"$0" "$@" | cat', sys.executable, "-c", AUTO_START, str(address)],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert again.stdout.split() == ["2", pid]
    finally:
        os.close(read)
        os.kill(int(pid), signal.SIGTERM)
    eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_a_crowd_of_short_lives_leaves_nothing(own, python):
    """Twenty processes that end in four ways, some of them in the middle."""
    script = (
        "import os, sys, numpy as np\n"
        "from shmquant import ShmQuantizer\n"
        "q = ShmQuantizer(sys.argv[1], window=4 << 20); x = np.ones((256, 64), 'f4')\n"
        "held = [q.quantize(x * i) for i in range(1, 9)]; views = [r.table for r in held[::2]]\n"
        "way = int(sys.argv[2])\n"
        "if way == 0: os._exit(0)\n"
        "if way == 1: os.kill(os.getpid(), 9)\n"
        "if way == 2: q.quantize(np.ones((9000, 1024), 'f4'), progress=lambda *_: os._exit(0))\n"
    )
    with ThreadPoolExecutor(5) as pool:
        ends = list(pool.map(lambda i: python(script, own.address, str(i % 4)).returncode, range(20)))
    assert ends == [0, -9, 0, 0] * 5
