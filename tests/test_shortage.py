"""Every kind of shortage: budget, descriptors, address space, file size, /dev/shm, a memory cgroup.

Whoever asks gets a typed error with the numbers and a hint, by the deadline; small requests move on;
afterwards everything is as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from children import Child
from daemons import eventually
from processes import MIB
from shmquant import DeadlineError, NoRoomError, ShmQuantizer
from shmquant._session import start_prefix

SMALL = np.ones((64, 64), np.float32)
# Smaller results would share segments.
OWN_SEGMENT = np.ones((640, 64), np.float32)
# Comes to 4 MiB, and is streamed through the smallest window.
BIG = np.ones((4096, 1024), np.float32)


def stat(q: ShmQuantizer) -> dict:
    return json.loads(q._client.stat())


def holdings(q: ShmQuantizer) -> dict[str, int]:
    """What is held and what runs; not idle memory, which comes and goes."""
    now = stat(q)
    names = ("sessions", "leases", "tickets", "datasets", "jobs", "waiting", "stray_releases")
    uses = ("results", "datasets", "filling", "growing", "leaving")
    return {name: now[name] for name in names} | {name: now["bytes_by_use"][name] for name in uses}


@contextlib.contextmanager
def unchanged(q: ShmQuantizer) -> Iterator[None]:
    """What the daemon counts is after this what it was before."""
    q.quantize(SMALL)
    eventually(lambda: holdings(q)["leases"] == 0)
    before = holdings(q)
    yield
    eventually(lambda: holdings(q) == before)


def told(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    """The text has all of these, and a hint that is an attribute, too."""
    text = str(error.value)
    for part in parts:
        assert part in text, text
    assert error.value.hint
    assert f"\nhint: {error.value.hint}" in text


def quantize_many(q: ShmQuantizer, most: int = 1000) -> None:
    """Hold results until there is no more room; they are dropped with the error."""
    held = []
    for _ in range(most):
        held.append(q.quantize(OWN_SEGMENT, timeout=10))
    raise AssertionError(f"{most} results and no shortage")


HOLDS = """
import json, sys, numpy as np
from shmquant import ShmQuantizer

q = ShmQuantizer(sys.argv[1], window=4 << 20)
held = [q.quantize(np.ones((4096, 1024), "f4")) for _ in range(int(sys.argv[2]))]
print(json.dumps([r.nbytes for r in held]), flush=True)
sys.stdin.readline()
"""


def test_who_waits_is_told_who_holds_what_and_small_requests_pass(serve):
    """A crowd waits for memory that one process holds: all of them return by their deadline."""
    q = ShmQuantizer(serve("--budget", "48MiB").address, window=4 * MIB)
    with unchanged(q), Child(HOLDS, q.address, 5) as holder:
        holder.answer()
        pid = holder.pid
        small = 0

        def wait(seconds: float) -> tuple[str, float]:
            start = time.monotonic()
            with pytest.raises(DeadlineError) as error:
                q.quantize(np.ones((16_384, 1024), np.float32), timeout=seconds)
            told(error, "no room for ", " of 48.0 MiB", f"process {pid} (", "holds 5 results, ", "waited ")
            return str(error.value), time.monotonic() - start

        with ThreadPoolExecutor(2) as pool:
            waits = [pool.submit(wait, seconds) for seconds in (1.0, 2.0)]
            eventually(lambda: stat(q)["waiting"] >= 1)
            while not all(w.done() for w in waits):
                assert q.quantize(SMALL, timeout=10).table.num_rows == 64
                small += 1
        for asked, done in zip((1.0, 2.0), waits, strict=True):
            text, took = done.result()
            # Not before its deadline; that it ends at all, the watchdog sees to.
            assert asked <= took, text
        assert small
        holder.end()
        eventually(lambda: stat(q)["sessions"] == 1)
        assert q.quantize(BIG, timeout=20).table.num_rows == 4096


def test_who_alone_could_help_is_told_at_once(serve):
    q = ShmQuantizer(serve("--budget", "24MiB").address, window=4 * MIB)
    with unchanged(q):
        held = [q.quantize(BIG)]
        with pytest.raises(NoRoomError) as error:
            for _ in range(10):
                # No limit of time: it would wait for ever.
                held.append(q.quantize(BIG, timeout=None))
        told(error, f"you hold {len(held)} results", "release them", held[0].segment_name)
        held.clear()
        # `error` has the frames of the failed calls, and they the results.
        del error


def test_memory_that_comes_free_goes_to_who_waits(serve):
    q = ShmQuantizer(serve("--budget", "24MiB").address, window=4 * MIB)
    with unchanged(q), Child(HOLDS, q.address, 2) as holder:
        holder.answer()
        answers: list[int] = []

        def ask() -> None:
            answers.append(q.quantize(np.ones((8192, 1024), np.float32), timeout=60).table.num_rows)

        waiter = threading.Thread(target=ask)
        waiter.start()
        eventually(lambda: stat(q)["waiting"] == 1)
        holder.process.kill()
        waiter.join(60)
        assert answers == [8192]


def test_a_daemon_out_of_descriptors_says_so_and_goes_on(serve):
    daemon = serve()
    q = ShmQuantizer(daemon.address, window=4 * MIB)
    with unchanged(q):
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        with pytest.raises(NoRoomError) as error:
            quantize_many(q)
        told(error, "in the daemon: ", "all 64 of its file descriptors", "ulimit -n", "this process holds ")
        # No descriptor to read /proc with does not mean that memory is without end.
        assert stat(q)["budget"] < 1 << 60
        # A new client is turned away, not left hanging.
        other = subprocess.run(
            [sys.executable, "-c", OPENS_A_SESSION, daemon.address],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert other.returncode == 0, other.stderr
        assert "DaemonError" in other.stdout or "NoRoomError" in other.stdout, other.stdout
        del error
        assert q.quantize(SMALL).table.num_rows == 64


def test_a_daemon_whose_log_nobody_reads_goes_on(serve):
    """Its standard error is a pipe, and full: what it has to say is lost, and nobody waits for it."""
    daemon = serve()
    pipe = os.open(f"/proc/{daemon.process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x" * 4096)
    os.close(pipe)
    assert ShmQuantizer(daemon.address, window=4 * MIB).quantize(SMALL, timeout=20).table.num_rows == 64


OPENS_A_SESSION = """
import sys, numpy as np
from shmquant import ShmQuantError, ShmQuantizer

try:
    print(ShmQuantizer(sys.argv[1]).quantize(np.ones((2, 2), "f4"), timeout=5).table.num_rows)
except ShmQuantError as error:
    print(type(error).__name__, error)
"""


def test_idle_memory_of_others_takes_no_descriptors_away(serve):
    """One session's pool is full of idle segments; another one's request gets their descriptors."""
    daemon = serve()
    q = ShmQuantizer(daemon.address, window=4 * MIB)
    held = [q.quantize(OWN_SEGMENT) for _ in range(40)]
    taken = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
    # Room for a session, a lane and its window, and for no results.
    limit = max(map(int, os.listdir(f"/proc/{daemon.process.pid}/fd"))) + 9
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    held.clear()
    eventually(lambda: stat(q)["leases"] == 0)
    assert taken > 40
    with Child(HOLDS_SMALL, daemon.address, 30) as other:
        assert other.answer() == [640] * 30
        assert stat(q)["retired"] >= 16
        assert other.end() == 0
    assert q.quantize(SMALL).table.num_rows == 64


HOLDS_SMALL = """
import json, sys, numpy as np
from shmquant import ShmQuantizer

q = ShmQuantizer(sys.argv[1], window=4 << 20)
held = [q.quantize(np.ones((640, 64), "f4")) for _ in range(int(sys.argv[2]))]
print(json.dumps([r.table.num_rows for r in held]), flush=True)
"""


def test_a_daemon_with_a_file_size_limit(serve):
    daemon = serve()
    q = ShmQuantizer(daemon.address, window=4 * MIB)
    with unchanged(q):
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))
        with pytest.raises(NoRoomError) as error:
            q.quantize(BIG)
        told(error, "in the daemon: ", f"limit of {2 * MIB} bytes", "ulimit -f")
        assert q.quantize(SMALL).table.num_rows == 64
        assert daemon.process.poll() is None, "killed by SIGXFSZ"


def test_a_daemon_without_address_space(serve):
    daemon = serve()
    q = ShmQuantizer(daemon.address, window=4 * MIB)
    with unchanged(q):
        pid = daemon.process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 8 * MIB
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(NoRoomError) as error:
            q.quantize(np.ones((16_384, 1024), np.float32))
        told(error, "in the daemon: ", f"address space limit: {limit} bytes", "ulimit -v")
        assert q.quantize(SMALL).table.num_rows == 64


# Runs short itself, after having used everything once; then has room again.
SHORT = """
import gc, json, os, resource, sys, numpy as np
from shmquant import NoRoomError, ShmQuantizer

q = ShmQuantizer(sys.argv[1], window=4 << 20)
x = np.ones((64, 64), "f4")
q.quantize(x)
held = [q.quantize(x)]
fill = []
if sys.argv[2] == "NOFILE":
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, old[1]))
    try:
        while True:
            fill.append(os.open("/dev/null", 0))
    except OSError:
        pass
elif sys.argv[2] == "AS":
    old = resource.getrlimit(resource.RLIMIT_AS)
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 20), old[1]))
elif sys.argv[2] == "FSIZE":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
error = None
try:
    for _ in range(300):
        held.append(q.quantize(x, timeout=10))
except NoRoomError as caught:
    error = [str(caught), caught.hint]
for fd in fill:
    os.close(fd)
if sys.argv[2] != "FSIZE":
    resource.setrlimit(getattr(resource, "RLIMIT_" + sys.argv[2]), old)
same = all(int(r.codes("vector").sum()) == 127 * 64 * 64 for r in held)
n = len(held)
held.clear()
again = [q.quantize(x).table.num_rows for _ in range(5)]
print(json.dumps([error, n, same, again]), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("limit", ["NOFILE", "AS", "FSIZE"])
def test_a_client_that_runs_short_itself(serve, limit):
    """It hears which limit; what it holds stays readable; with room again, it goes on."""
    q = ShmQuantizer(serve().address, window=4 * MIB)
    with unchanged(q), Child(SHORT, q.address, limit) as child:
        error, held, same, again = child.answer()
        assert same and again == [64] * 5
        if limit == "FSIZE":
            # It makes no files: its results are the daemon's.
            assert error is None and held == 301
        else:
            text, hint = error
            expected = "all 64 of its file descriptors" if limit == "NOFILE" else "address space limit: "
            assert expected in text and "in the daemon" not in text and "ulimit" in hint
        # One lease may wait for the end of its session: it was given in a reply whose descriptor was lost.
        eventually(lambda: stat(q)["leases"] <= 1)
        child.end()


PRIVATE_SHM = """
mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"
"""


def test_posix_segments_are_limited_by_dev_shm(tmp_path):
    """A /dev/shm of 24 MiB in a mount namespace of its own, for daemon and clients alike."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed: no /dev/shm of another size")
    beside = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    script = ["unshare", "-m", "sh", "-c", PRIVATE_SHM.format(size="24m"), "sh"]
    if subprocess.run([*script, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("mount namespaces are not permitted here: no /dev/shm of another size")
    done = subprocess.run(
        [*script, sys.executable, "-c", IN_A_SMALL_SHM, str(tmp_path / "posix.sock")],
        capture_output=True, text=True, timeout=100, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *beside])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


IN_A_SMALL_SHM = """
import json, os, sys, time, pytest, numpy as np
from pathlib import Path
from children import Child
from daemons import Daemon, eventually
from shmquant import DeadlineError, NoRoomError, ShmQuantizer
from test_shortage import BIG, HOLDS, SMALL, stat, told, unchanged

daemon = Daemon(Path(sys.argv[1]), "--backing", "posix")
q = ShmQuantizer(daemon.address, window=4 << 20)
with unchanged(q):
    held = []
    with pytest.raises(NoRoomError) as error:
        for _ in range(10):
            held.append(q.quantize(BIG, timeout=None))
    told(error, f"you hold {len(held)} results")
    assert 2 <= len(held) <= 4 and stat(q)["budget"] <= 24 << 20
    held.clear()
    del error
# Others hold it: told who, by the deadline; a small one moves meanwhile.
with unchanged(q), Child(HOLDS, daemon.address, 2) as holder:
    holder.answer()
    with pytest.raises(DeadlineError) as error:
        q.quantize(np.ones((10_000, 1024), "f4"), timeout=0.5)
    told(error, f"process {holder.pid} (", "holds 2 results")
    assert q.quantize(SMALL, timeout=10).table.num_rows == 64
    del error
    holder.end()
# Somebody else fills it: no SIGBUS, a typed error.
with unchanged(q):
    free = os.statvfs("/dev/shm")
    with open("/dev/shm/foreign", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - (1 << 20), 4096))
    with pytest.raises(NoRoomError) as error:
        q.quantize(BIG, timeout=5)
    told(error, "no room for ")
    os.unlink("/dev/shm/foreign")
    del error
    assert q.quantize(BIG, timeout=20).table.num_rows == 4096
assert daemon.stop() == 0
assert [name for name in os.listdir("/dev/shm") if name.startswith("shmquant")] == []
print("ok")
"""


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A memory cgroup below our own, v1 or v2."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    if "memory" in groups:
        parent, file = Path("/sys/fs/cgroup/memory") / groups["memory"].lstrip("/"), "memory.limit_in_bytes"
    else:
        parent, file = Path("/sys/fs/cgroup") / groups.get("", "").lstrip("/"), "memory.max"
    group = parent / f"shmquant-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        try:
            (group / file).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"no memory limit can be set here: {error}")
        yield group
    finally:

        def removed() -> bool:
            with contextlib.suppress(OSError):
                group.rmdir()
            return not group.exists()

        eventually(removed)


def test_a_memory_cgroup_is_a_shortage_and_no_death(tmp_path):
    """The group's limit is far below the host's memory: asked before it is met, since meeting it kills."""
    limit = 160 * MIB
    with memory_group(limit) as group:
        address = tmp_path / "group.sock"
        # Enters the group, then becomes the daemon.
        enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        command = [*start_prefix(), "serve", "--address", str(address), "--idle-exit", "600s"]
        process = subprocess.Popen(
            ["sh", "-c", enter, str(group), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout.readline().strip() == "ready", process.communicate()[1]
            q = ShmQuantizer(address, window=4 * MIB)
            with unchanged(q):
                held = []
                with pytest.raises(NoRoomError) as error:
                    for _ in range(100):
                        held.append(q.quantize(BIG, timeout=None))
                told(error, f"you hold {len(held)} results", "release them")
                assert 3 <= len(held) * 4 * MIB // (16 * MIB) <= limit // (16 * MIB)
                assert stat(q)["budget"] < limit
                # Never fits: at once, and still no kill.
                with pytest.raises(NoRoomError):
                    q.quantize(np.ones((65_536, 4096), np.int8).astype(np.float16), timeout=None)
                assert q.quantize(SMALL).table.num_rows == 64
                held.clear()
                del error
            assert process.poll() is None, "the group's OOM killer came"
        finally:
            process.terminate()
            process.communicate(timeout=30)


def test_limits_of_one_daemon_are_not_those_of_another(serve):
    """Two daemons of one user: one short of memory leaves the other alone."""
    short, other = (
        ShmQuantizer(serve("--budget", size).address, window=4 * MIB) for size in ("8MiB", "64MiB")
    )
    with unchanged(short), unchanged(other):
        with pytest.raises(NoRoomError):
            short.quantize(np.ones((8192, 1024), np.float32))
        assert other.quantize(np.ones((8192, 1024), np.float32)).table.num_rows == 8192
