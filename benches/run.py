"""Ours against peers and limits, alternating in one run; medians and ratios. ``make bench`` runs it.

An absolute time on a shared virtual machine proves nothing, so every figure stands beside a limit or a peer
measured in the same run. Results go to ``benches/out/results.json``; ``--write-docs`` puts the tables into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
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

import numpy as np
import pyarrow as pa

import limits
import peers
from shmquant import ShmQuantizer

HERE = Path(__file__).parent
DIM = 384


def measure(cases: dict[str, Callable[[], None]], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of each call of each case, the cases taking turns of so many ``calls``.

    There are ``rounds`` turns, before them two to warm up, which are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 2):
        for name, run in cases.items():
            for _ in range(calls):
                start = time.perf_counter()
                run()
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
    return times


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times faster ours is: the median over turns, so that a noisy minute hits both."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def throughput(address: str, mib: int, rounds: int) -> list[dict]:
    """End to end from private memory: a table of vectors goes in, a result comes back, and is dropped."""
    rng = np.random.default_rng(mib)
    x = rng.standard_normal((mib * (1 << 20) // (4 * DIM), DIM), dtype=np.float32)
    table = pa.table({"emb": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), DIM)})
    threads = min(2, len(os.sched_getaffinity(0)))
    q = ShmQuantizer(address=address)
    flight = peers.FlightPeer(x)

    def ours(**options: object) -> Callable[[], None]:
        return lambda: q.quantize(table, **options).release()

    cases = {
        "memcpy, 2 threads": limits.memcpy(x.nbytes, 2),
        "shmquant int8 row": ours(scheme="int8"),
        "shmquant int8 group 128": ours(scheme="int8", granularity="group", group_size=128),
        "shmquant uint4 group 128": ours(scheme="uint4", granularity="group", group_size=128),
        "shmquant uint8 tensor": ours(scheme="uint8", granularity="tensor"),
        "onnxruntime DynamicQuantizeLinear": peers.onnxruntime_dynamic(x, threads),
        "numpy int8 row": peers.numpy_int8_rows(x),
        "gguf-py Q8_0": peers.gguf_q8_0(x),
        "Arrow Flight, there and a quarter back": flight,
    }
    times = measure(cases, rounds)
    flight.close()
    copy = times["memcpy, 2 threads"]
    return [
        {
            "mib": mib,
            "case": name,
            "ms": statistics.median(seconds) * 1e3,
            "gb_s": x.nbytes / statistics.median(seconds) / 1e9,
            "of_memcpy": median_ratio(seconds, copy),
            "int8_row_is_faster": median_ratio(times["shmquant int8 row"], seconds),
        }
        for name, seconds in times.items()
    ]


def latency(address: str, sleepy: str, rounds: int) -> list[dict]:
    """One small request after the other: 4 KiB of vectors, Python to Python.

    The daemon at ``address`` polls, the one at ``sleepy`` does not.
    """
    x = np.random.default_rng(4).standard_normal((8, 128), dtype=np.float32)
    table = pa.table({"emb": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 128)})
    q = ShmQuantizer(address=address)
    quiet = ShmQuantizer(address=sleepy, poll=False)
    bare = limits.SocketPeer()
    cases = {
        "bare socket round trip, without polling": bare,
        "shmquant, result object": lambda: q.quantize(table, scheme="int8"),
        "shmquant, with .table": lambda: q.quantize(table, scheme="int8").table,
        "shmquant, result object, without polling": lambda: quiet.quantize(table, scheme="int8"),
        "shmquant, with .table, without polling": lambda: quiet.quantize(table, scheme="int8").table,
        "numpy in process": peers.numpy_int8_rows(x),
    }
    # In runs: a peer that was left alone for a while has gone to sleep, which is another measurement.
    times = measure(cases, rounds, calls=100)
    bare.close()
    return [
        {
            "case": name,
            "p50_us": statistics.median(seconds) * 1e6,
            "p99_us": statistics.quantiles(seconds, n=100)[98] * 1e6,
            "of_bare": statistics.median(seconds)
            / statistics.median(times["bare socket round trip, without polling"]),
        }
        for name, seconds in times.items()
    ]


def tables(results: dict) -> str:
    """The results as Markdown."""
    lines = [f"Measured on {results['machine']}.", "", "**End to end from private memory**"]
    for mib in dict.fromkeys(row["mib"] for row in results["throughput"]):
        lines += ["", f"{mib} MiB of float32 vectors, dimension {DIM}:", ""]
        lines += ["| case | ms | GB/s of input | x memcpy | int8 row is faster by |", "|---|--:|--:|--:|--:|"]
        lines += [
            f"| {r['case']} | {r['ms']:.1f} | {r['gb_s']:.2f} | {r['of_memcpy']:.2f} "
            f"| {r['int8_row_is_faster']:.2f} |"
            for r in results["throughput"]
            if r["mib"] == mib
        ]
    lines += ["", "**4 KiB of vectors, Python to Python**", ""]
    lines += ["| case | p50 µs | p99 µs | x bare round trip |", "|---|--:|--:|--:|"]
    lines += [
        f"| {r['case']} | {r['p50_us']:.1f} | {r['p99_us']:.1f} | {r['of_bare']:.2f} |"
        for r in results["latency"]
    ]
    return "\n".join(lines)


def machine() -> str:
    """What it ran on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    release = platform.release().split("-")[0]
    return (
        f"{model[1] if model else platform.machine()}, {len(os.sched_getaffinity(0))} cores, Linux {release}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256], help="MiB of input")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/performance.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shmquant-bench-") as folder:
        address, sleepy = (str(Path(folder) / f"{name}.sock") for name in ("daemon", "sleepy"))
        command = Path(sys.executable).with_name("shmquant")
        subprocess.run([command, "serve", "--no-poll", "--detach", "--address", sleepy], check=True)
        results = {
            "machine": machine(),
            "latency": latency(address, sleepy, 30),
            "throughput": [row for mib in args.sizes for row in throughput(address, mib, args.rounds)],
        }
        for each in (address, sleepy):
            stop = [command, "stop", "--force", "--address", each]
            subprocess.run(stop, check=True, stdout=subprocess.DEVNULL)
    (HERE / "out").mkdir(exist_ok=True)
    (HERE / "out" / "results.json").write_text(json.dumps(results, indent=1))
    text = tables(results)
    print(text)
    if args.write_docs:
        page = HERE.parent / "docs" / "performance.md"
        marked = re.compile(r"(<!-- tables -->\n).*?(<!-- end -->)", re.S)
        page.write_text(marked.sub(lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text()))


if __name__ == "__main__":
    main()
