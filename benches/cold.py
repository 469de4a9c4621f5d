"""Cold against warm: the first result of a size, whose memory has to be made, and those after it."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import pyarrow as pa

from harness import Daemon, median_ratio, vectors
from shmquant import ShmQuantizer

DIM = 384
CASES = {
    "int8 row": {"scheme": "int8"},
    "uint4 group 128": {"scheme": "uint4", "granularity": "group", "group_size": 128},
}
WARM = 3


def faults(pid: int | str) -> int:
    """Page faults of a process so far that needed no disk. Pages that are made in bulk are none."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def processor_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sample(table: pa.Table, options: dict) -> dict:
    """One fresh daemon: the connection, the first result, and some after it."""
    small = vectors(8, 128)[1]
    with Daemon() as daemon:
        q = ShmQuantizer(address=daemon.address)
        start = time.perf_counter()
        q.quantize(small, "int8").release()
        connected = time.perf_counter() - start
        before = faults(daemon.pid), faults("self"), processor_seconds(daemon.pid)
        start = time.perf_counter()
        q.quantize(table, **options).release()
        cold = time.perf_counter() - start
        after = faults(daemon.pid), faults("self"), processor_seconds(daemon.pid)
        warm = []
        for _ in range(WARM):
            start = time.perf_counter()
            q.quantize(table, **options).release()
            warm.append(time.perf_counter() - start)
        last = faults(daemon.pid), faults("self")
    return {
        "connect": connected,
        "cold": cold,
        "warm": statistics.median(warm),
        "daemon_cpu": after[2] - before[2],
        "cold_faults": (after[0] - before[0], after[1] - before[1]),
        "warm_faults": ((last[0] - after[0]) / WARM, (last[1] - after[1]) / WARM),
    }


def run(quick: bool) -> dict:
    """All of it."""
    rows = []
    for mib in [16] if quick else [64, 256, 1024]:
        table = vectors(mib * (1 << 20) // (4 * DIM), DIM, seed=mib)[1]
        samples: dict[str, list[dict]] = {name: [] for name in CASES}
        for _ in range(3 if quick else 7):
            for name, options in CASES.items():
                samples[name].append(sample(table, options))
        for name, taken in samples.items():
            column = {key: [each[key] for each in taken] for key in ("connect", "cold", "warm", "daemon_cpu")}
            rows.append(
                {
                    "mib": mib,
                    "case": name,
                    "cold_ms": statistics.median(column["cold"]) * 1e3,
                    "warm_ms": statistics.median(column["warm"]) * 1e3,
                    "cold_by_warm": median_ratio(column["warm"], column["cold"]),
                    "connect_ms": statistics.median(column["connect"]) * 1e3,
                    "daemon_cpu_ms": statistics.median(column["daemon_cpu"]) * 1e3,
                    "cold_faults": [statistics.median(e["cold_faults"][i] for e in taken) for i in (0, 1)],
                    "warm_faults": [statistics.median(e["warm_faults"][i] for e in taken) for i in (0, 1)],
                }
            )
    return {"cold": rows}


def tables(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "| input | case | cold ms | warm ms | cold / warm | connecting ms | faults: daemon, client | warm |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['mib']} MiB | {r['case']} | {r['cold_ms']:.1f} | {r['warm_ms']:.1f} | {r['cold_by_warm']:.2f} "
        f"| {r['connect_ms']:.1f} | {r['cold_faults'][0]:.0f}, {r['cold_faults'][1]:.0f} "
        f"| {r['warm_faults'][0]:.0f}, {r['warm_faults'][1]:.0f} |"
        for r in results["cold"]
    ]
    return "\n".join(lines)
