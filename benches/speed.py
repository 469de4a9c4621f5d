"""End to end by size, and small requests one after the other, beside peers and what the machine allows."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import limits
import peers
import transports
from harness import Daemon, median_ratio, p99, pin, take_turns, vectors
from shmquant import ShmQuantizer

DIM = 384


def throughput(address: str, mib: int, rounds: int) -> list[dict]:
    """End to end from private memory: a table of vectors goes in, a result comes back, and is dropped."""
    x, table = vectors(mib * (1 << 20) // (4 * DIM), DIM, seed=mib)
    threads = min(2, len(os.sched_getaffinity(0)))
    q = ShmQuantizer(address=address)
    others = transports.of_this_machine(x)

    def ours(**options: object) -> Callable[[], None]:
        return lambda: q.quantize(table, **options).release()

    cases = {
        "memcpy, 2 threads": limits.memcpy(x.nbytes, 2),
        "shmquant int8 row": ours(scheme="int8"),
        "shmquant int8 group 128": ours(scheme="int8", granularity="group", group_size=128),
        "shmquant uint4 group 128": ours(scheme="uint4", granularity="group", group_size=128),
        "shmquant uint8 tensor": ours(scheme="uint8", granularity="tensor"),
        "shmquant uint8 dimension": ours(scheme="uint8", granularity="dimension"),
        **peers.of_this_machine(x, threads),
        **{f"{name}, there and a quarter back": each for name, each in others.items()},
    }
    times = take_turns(cases, rounds)
    for other in others.values():
        other.close()
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
    x, table = vectors(8, 128)
    q = ShmQuantizer(address=address)
    quiet = ShmQuantizer(address=sleepy, poll=False)
    bare = limits.SocketPeer()
    others = transports.of_this_machine(x)
    cases = {
        "bare socket round trip, without polling": bare,
        "shmquant, result object": lambda: q.quantize(table, scheme="int8"),
        "shmquant, with .table": lambda: q.quantize(table, scheme="int8").table,
        "shmquant, result object, without polling": lambda: quiet.quantize(table, scheme="int8"),
        "shmquant, with .table, without polling": lambda: quiet.quantize(table, scheme="int8").table,
        "numpy in process": peers.numpy_int8_rows(x),
        **{f"{name}, 4 KiB there, 1 KiB back": each for name, each in others.items()},
    }
    # In runs: a peer that was left alone for a while has gone to sleep, which is another measurement.
    times = take_turns(cases, rounds, calls=100)
    bare.close()
    for other in others.values():
        other.close()
    return [
        {
            "case": name,
            "p50_us": statistics.median(seconds) * 1e6,
            "p99_us": p99(seconds) * 1e6,
            "of_bare": statistics.median(seconds)
            / statistics.median(times["bare socket round trip, without polling"]),
        }
        for name, seconds in times.items()
    ]


def placed(daemon: Daemon, sleepy: Daemon, rounds: int) -> list[dict]:
    """The same small request where both sides are kept to one core, and where each has its own.

    Left to itself the kernel puts two processes that wake each other now here, now there, and what
    waking costs depends on that more than on anything that they do.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    table = vectors(8, 128)[1]
    q = ShmQuantizer(address=daemon.address)
    quiet = ShmQuantizer(address=sleepy.address, poll=False)
    bare = limits.SocketPeer()
    cases = {
        "bare socket round trip, without polling": bare,
        "shmquant, result object": lambda: q.quantize(table, scheme="int8"),
        "shmquant, result object, without polling": lambda: quiet.quantize(table, scheme="int8"),
    }
    rows = []
    # The threads that there will be are there.
    take_turns(cases, 1, calls=10)
    for where, ours, theirs in (("one core", cores[0], cores[0]), ("two cores", cores[0], cores[-1])):
        before = pin(os.getpid(), {ours})
        for pid in (daemon.pid, sleepy.pid, bare.pid):
            pin(pid, {theirs})
        times = take_turns(cases, rounds, calls=100)
        pin(os.getpid(), before)
        limit = statistics.median(times["bare socket round trip, without polling"])
        rows += [
            {
                "where": where,
                "case": name,
                "p50_us": statistics.median(seconds) * 1e6,
                "p99_us": p99(seconds) * 1e6,
                "beyond_us": (statistics.median(seconds) - 1.5 * limit) * 1e6,
            }
            for name, seconds in times.items()
        ]
    for pid in (daemon.pid, sleepy.pid):
        pin(pid, before)
    bare.close()
    return rows


def by_size(address: str, sizes: list[int], rounds: int) -> list[dict]:
    """One request of each size, in KiB, ours against a copy and against numpy: where which cost rules."""
    q = ShmQuantizer(address=address)
    rows = []
    for kib in sizes:
        x, table = vectors(kib * 1024 // (4 * 128), 128)
        cases = {
            "shmquant int8 row": lambda table=table: q.quantize(table, scheme="int8").release(),
            "memcpy, 1 thread": limits.memcpy(x.nbytes, 1),
            "numpy int8 row": peers.numpy_int8_rows(x),
        }
        times = take_turns(cases, rounds, calls=max(3, min(100, 4096 // kib)))
        rows += [
            {
                "kib": kib,
                "case": name,
                "p50_us": statistics.median(seconds) * 1e6,
                "p99_us": p99(seconds) * 1e6,
            }
            for name, seconds in times.items()
        ]
    return rows


def run(quick: bool) -> dict:
    """All of it."""
    sizes = [16] if quick else [64, 256, 1024]
    with Daemon() as daemon, Daemon("--no-poll") as sleepy:
        return {
            "latency": latency(daemon.address, sleepy.address, 3 if quick else 30),
            "placed": placed(daemon, sleepy, 3 if quick else 15),
            "by_size": by_size(daemon.address, [4, 64] if quick else [4, 16, 64, 256, 1024, 4096, 16384], 5),
            "throughput": [
                row for mib in sizes for row in throughput(daemon.address, mib, 3 if quick else 7)
            ],
        }


def tables(results: dict) -> str:
    """The results as Markdown."""
    lines: list[str] = []
    for mib in dict.fromkeys(row["mib"] for row in results["throughput"]):
        lines += [f"{mib} MiB of float32 vectors, dimension {DIM}, end to end from private memory:", ""]
        lines += ["| case | ms | GB/s of input | x memcpy | int8 row is faster by |", "|---|--:|--:|--:|--:|"]
        lines += [
            f"| {r['case']} | {r['ms']:.1f} | {r['gb_s']:.2f} | {r['of_memcpy']:.2f} "
            f"| {r['int8_row_is_faster']:.2f} |"
            for r in results["throughput"]
            if r["mib"] == mib
        ]
        lines += [""]
    lines += ["4 KiB of vectors, Python to Python:", ""]
    lines += ["| case | p50 µs | p99 µs | x bare round trip |", "|---|--:|--:|--:|"]
    lines += [
        f"| {r['case']} | {r['p50_us']:.1f} | {r['p99_us']:.1f} | {r['of_bare']:.2f} |"
        for r in results["latency"]
    ]
    lines += ["", "The same with client and daemon kept to these cores:", ""]
    lines += ["| on | case | p50 µs | p99 µs | beyond 1.5 x bare, µs |", "|---|---|--:|--:|--:|"]
    lines += [
        f"| {r['where']} | {r['case']} | {r['p50_us']:.1f} | {r['p99_us']:.1f} | {r['beyond_us']:.1f} |"
        for r in results["placed"]
    ]
    return "\n".join(lines)
