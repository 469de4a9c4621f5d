"""What every part of the benchmark needs: a daemon of its own, taking turns, and ratios of turns."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

COMMAND = Path(sys.executable).with_name("shmquant")


class Daemon:
    """A daemon that nobody else uses, as long as the block lasts."""

    def __init__(self, *options: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shmquant-bench-")
        self.address = str(Path(self._folder.name) / "daemon.sock")
        self._command = [COMMAND, "serve", "--address", self.address, *options]

    def __enter__(self) -> Daemon:
        # A benchmark that is killed must not leave a daemon behind for ever.
        command = [*self._command, "--idle-exit", "600s"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self._process.stdout.readline()
        if line.strip() != "ready":
            raise RuntimeError(f"no daemon: {line}{self._process.communicate()[1]}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.communicate()
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid


def vectors(rows: int, dim: int, seed: int = 0) -> tuple[np.ndarray, pa.Table]:
    """A matrix of float32 vectors and the Arrow table over it."""
    x = np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)
    return x, pa.table({"emb": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), dim)})


def pin(pid: int, cores: set[int]) -> set[int]:
    """Keep all threads of a process to these cores; gives those that it had."""
    before = os.sched_getaffinity(pid)
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), cores)
    return before


def take_turns(cases: dict[str, Callable[[], object]], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of each call of each case, the cases taking turns of so many ``calls``.

    There are ``rounds`` turns, before them two to warm up, which are not counted. A case that takes a core
    while it waits has ``begin`` and ``end``, so that it does so in its own turns only.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 2):
        for name, run in cases.items():
            if begin := getattr(run, "begin", None):
                begin()
            for _ in range(calls):
                start = time.perf_counter()
                run()
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
            if end := getattr(run, "end", None):
                end()
    return times


def median_ratio(below: list[float], above: list[float]) -> float:
    """The median of the turns' ratios, so that a noisy minute hits both."""
    return statistics.median(b / a for a, b in zip(below, above, strict=True))


def p99(seconds: list[float]) -> float:
    """The time that one call in a hundred exceeds."""
    return statistics.quantiles(seconds, n=100)[98]


def machine() -> str:
    """What it ran on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    release = platform.release().split("-")[0]
    return (
        f"{model[1] if model else platform.machine()}, {len(os.sched_getaffinity(0))} cores, Linux {release}"
    )
