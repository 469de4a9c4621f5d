"""Results handed over in three ways: 100,000 times each without a leak, under valgrind without a fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from processes import MIB
from watchdog import patience

SCRIPT = Path(__file__).with_name("handover.py")
WAYS = ["shared", "copied", "streamed"]
TIMES = int(os.environ.get("SHMQUANT_HANDOVERS", "100000"))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_handing_over_takes_no_memory(serve, way):
    patience(900)
    address = serve().address
    command = [sys.executable, str(SCRIPT), address, str(TIMES), way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    early, late = json.loads(done.stdout)
    print(early, late, sep="\n")
    assert late["private"] - early["private"] <= 4 * MIB
    assert late["daemon_private"] - early["daemon_private"] <= 4 * MIB
    assert late["arrow"] == early["arrow"]
    assert late["results"] == early["results"] == 0
    for name in ("leases", "tickets", "jobs", "waiting", "stray_releases", "retired"):
        assert late["daemon"][name] == early["daemon"][name] == 0, name
    # Two results are alive at a time, and 500 if all releases come late: a dozen segments that they share.
    more = late["daemon"]["segments"] - early["daemon"]["segments"]
    assert late["daemon"]["segments"] <= 16
    assert late["daemon"]["fds"] == early["daemon"]["fds"] + more
    assert late["daemon"]["bytes"] == early["daemon"]["bytes"] + more * MIB // 4
    # Small results share segments, which are filled and used again over and over.
    assert late["requests"] == TIMES + 20
    assert late["recycled"] >= late["requests"] // 256


VALGRIND = ["valgrind", "--undef-value-errors=no", "--leak-check=no", "--num-callers=40"]
# Of what it finds, this is ours to answer for: something of these on the stack.
OURS = ("_native", "libarrow", "/pyarrow/")


def under_valgrind(log: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python under memcheck, with allocators that it sees into."""
    command = [*VALGRIND, f"--log-file={log}", sys.executable, *arguments]
    env = os.environ | {"PYTHONMALLOC": "malloc", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def faults(log: Path, ours: tuple[str, ...]) -> list[str]:
    """Invalid reads, writes and frees with one of ours on the stack."""
    text = re.sub(r"^==\d+== ?", "", log.read_text(), flags=re.MULTILINE)
    assert "ERROR SUMMARY" in text
    blocks = [block for block in re.split(r"\n\s*\n", text) if "   at 0x" in block]
    return [block for block in blocks if any(name in block for name in ours)]


@pytest.mark.slow
def test_handing_over_touches_no_memory_that_is_not_its_own(serve, tmp_path):
    """A client under valgrind, whose daemon is native."""
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed: no search for invalid reads, writes and frees")
    patience(900)
    log = tmp_path / "valgrind.log"
    done = under_valgrind(log, str(SCRIPT), serve().address, "40", *WAYS)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    found = faults(log, OURS)
    assert not found, "\n\n".join(found)


def test_valgrind_would_tell(tmp_path):
    """The search finds what it is there for: here a read after free, by ctypes."""
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    log = tmp_path / "valgrind.log"
    script = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "at = libc.malloc(64)\n"
        "libc.free(ctypes.c_void_p(at))\n"
        "ctypes.string_at(at, 8)\n"
    )
    done = under_valgrind(log, "-S", "-c", script)
    assert done.returncode == 0, done.stderr
    assert any("Invalid read" in block for block in faults(log, ("_ctypes",)))
