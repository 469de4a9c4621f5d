"""Zero-copy input: values in memory of the daemon's; beside it the kernel alone on the same pages."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from harness import Daemon, median_ratio, take_turns, vectors
from shmquant import ShmQuantizer

DIM = 384
ROOT = Path(__file__).parent.parent
CASES = {
    "int8 row": ("int8", {"granularity": "row"}, 0),
    "int8 group 128": ("int8", {"granularity": "group", "group_size": 128}, 128),
    "uint4 group 128": ("uint4", {"granularity": "group", "group_size": 128}, 128),
}


class Kernel:
    """The kernel on an array's own pages, in a process of its own, with as many threads as the daemon has."""

    def __init__(
        self, program: Path, daemon: int, segment: str, rows: int, scheme: str, options: dict
    ) -> None:
        fds = Path(f"/proc/{daemon}/fd").iterdir()
        path = next(fd for fd in fds if _segment(os.readlink(fd)) == segment)
        granularity, group = options["granularity"], options.get("group_size", 0)
        threads = len(os.sched_getaffinity(0))
        command = [program, path, rows, DIM, scheme, granularity, group, threads]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([str(word) for word in command], stdin=pipe, stdout=pipe, text=True)

    def __call__(self) -> float:
        """Quantize once; the seconds it took."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()) / 1e9

    def __enter__(self) -> Kernel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stdin.close()
        self._process.wait()


def build() -> Path:
    """The program that runs the kernel alone, in the profile that is shipped."""
    command = ["cargo", "build", "--quiet", "--release", "--locked", "-p", "shmquant-daemon"]
    command += ["--example", "kernel_rate", "--message-format", "json"]
    messages = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    made = (json.loads(line) for line in messages.splitlines())
    return next(
        Path(message["executable"])
        for message in made
        if message.get("executable") and message["target"]["name"] == "kernel_rate"
    )


def measure(daemon: Daemon, program: Path, mib: int, rounds: int) -> list[dict]:
    """One size: from an input, from private memory, and the kernel alone, taking turns."""
    q = ShmQuantizer(address=daemon.address)
    rows = mib * (1 << 20) // (4 * DIM)
    # From here on the only input of its size.
    x = q.empty((rows, DIM))
    x[:] = np.random.default_rng(mib).standard_normal(x.shape, dtype=np.float32)
    private = x.copy()
    maps = Path("/proc/self/maps").read_text().splitlines()
    segment = next(_segment(line) for line in maps if _holds(line, x.ctypes.data))
    # In runs: who was left alone for a while has gone to sleep, which is another measurement.
    calls = max(1, min(20, 256 // mib))
    found = []
    for name, (scheme, options, _) in CASES.items():
        times: dict[str, list[float]] = {"input": [], "private": [], "kernel": []}
        with Kernel(program, daemon.pid, segment, rows, scheme, options) as kernel:
            for turn in range(rounds + 2):
                taken = {"kernel": [kernel() for _ in range(calls)]}
                for where, data in (("input", x), ("private", private)):
                    taken[where] = []
                    for _ in range(calls):
                        start = time.perf_counter()
                        result = q.quantize(data, scheme=scheme, **options)
                        taken[where].append(time.perf_counter() - start)
                        assert result.bytes_shared == (x.nbytes if where == "input" else 0)
                        result.release()
                if turn >= 2:
                    for where, seconds in taken.items():
                        times[where] += seconds
        found.append(
            {
                "mib": mib,
                "case": name,
                **{f"{where}_gb_s": x.nbytes / statistics.median(s) / 1e9 for where, s in times.items()},
                "of_kernel": median_ratio(times["input"], times["kernel"]),
                "of_private": median_ratio(times["input"], times["private"]),
            }
        )
    return found


def files(daemon: Daemon, mib: int, rounds: int) -> list[dict]:
    """A file whose pages are in the page cache, beside the same values in private memory, taking turns."""
    q = ShmQuantizer(address=daemon.address)
    x, table = vectors(mib * (1 << 20) // (4 * DIM), DIM, seed=mib)
    found = []
    with tempfile.TemporaryDirectory(prefix="shmquant-bench-") as folder:
        arrow, tensors = Path(folder) / "x.arrow", Path(folder) / "x.safetensors"
        with pa.ipc.new_file(arrow, table.schema) as writer:
            writer.write_table(table)
        save_file({"x": x}, tensors)
        layer = {"x": x}
        cases = {
            "Arrow IPC, int8 row": (arrow, table, {"scheme": "int8"}),
            "safetensors, int8 group 128": (
                tensors,
                layer,
                {"scheme": "int8", "granularity": "group", "group_size": 128},
            ),
        }
        for name, (path, private, options) in cases.items():
            times = take_turns(
                {
                    "file": lambda p=path, o=options: q.quantize_file(p, **o).release(),
                    "private": lambda p=private, o=options: q.quantize(p, **o).release(),
                },
                rounds,
            )
            found.append(
                {
                    "mib": mib,
                    "case": name,
                    **{f"{where}_gb_s": x.nbytes / statistics.median(s) / 1e9 for where, s in times.items()},
                    "of_private": median_ratio(times["file"], times["private"]),
                }
            )
    return found


def _segment(text: str) -> str | None:
    found = re.search(r"shmquant\.\S+", text)
    return found and found[0]


def _holds(line: str, address: int) -> bool:
    first, _, last = line.split()[0].partition("-")
    return int(first, 16) <= address < int(last, 16)


def run(quick: bool) -> dict:
    """All sizes."""
    program = build()
    sizes, rounds = ([16], 3) if quick else ([1, 16, 256, 1024], 15)
    with Daemon() as daemon:
        return {
            "inputs": [row for mib in sizes for row in measure(daemon, program, mib, rounds)],
            "files": [row for mib in sizes if mib >= 16 for row in files(daemon, mib, rounds)],
        }


def tables(results: dict) -> str:
    """As the page shows them."""
    lines = [
        "| MiB | scheme | from `q.empty`, GB/s | from private memory, GB/s | kernel alone, GB/s "
        "| of the kernel | of private memory |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in results["inputs"]:
        rates = " | ".join(f"{r[f'{where}_gb_s']:.1f}" for where in ("input", "private", "kernel"))
        lines.append(f"| {r['mib']} | {r['case']} | {rates} | {r['of_kernel']:.2f} | {r['of_private']:.2f} |")
    lines += ["", "`quantize_file` of a file that is in the page cache:", ""]
    lines += [
        "| MiB | file, scheme | from the file, GB/s | from private memory, GB/s | of private memory |",
        "|---:|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r['mib']} | {r['case']} | {r['file_gb_s']:.1f} | {r['private_gb_s']:.1f} "
        f"| {r['of_private']:.2f} |"
        for r in results["files"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small and few: only to see that it runs")
    print(tables(run(parser.parse_args().quick)))
