"""Many clients, many sessions, many live results: what each of them costs the others.

Client processes are forked from one that has loaded everything but never talked to a daemon, so that five
hundred of them are ready within seconds and share their code.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa

from harness import Daemon, p99, vectors
from shmquant import ShmQuantError, ShmQuantizer

DIM = 384
COUNTS = (1, 2, 4, 8)
LIVE = (1, 1_000, 10_000, 100_000)
SESSIONS = (1, 100, 500)


class Client:
    """A process that answers each message with the result of a function of its own quantizer."""

    def __init__(self, address: str, **options: Any) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            # Not through the interpreter's exit: what the parent has registered there is not ours.
            try:
                self._pipe.close()
                _serve(theirs, ShmQuantizer(address=address, **options))
            finally:
                os._exit(0)
        theirs.close()

    def ask(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Let it call ``work(quantizer, *arguments)``."""
        self._pipe.send((work, arguments))

    def answer(self) -> Any:
        """What that returned; raises what it raised."""
        value = self._pipe.recv()
        if isinstance(value, Exception):
            raise value
        return value

    def do(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Ask and wait for the answer."""
        self.ask(work, *arguments)
        return self.answer()

    def close(self) -> None:
        """End it, and wait until it has ended."""
        # Clients that were forked later hold this pipe, too: closing it would tell nobody.
        self._pipe.send((None, ()))
        self._pipe.close()
        os.waitpid(self._pid, 0)


def _serve(pipe: Connection, q: ShmQuantizer) -> None:
    while True:
        try:
            work, arguments = pipe.recv()
        except (EOFError, ConnectionError):
            return
        if work is None:
            return
        try:
            pipe.send(work(q, *arguments))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


# What clients do. Tables are made before the processes are forked, and so are the imports that it takes.

_tables: dict[tuple[int, int], pa.Table] = {}


def table(rows: int, dim: int) -> pa.Table:
    """The table of that shape."""
    if (rows, dim) not in _tables:
        _tables[rows, dim] = vectors(rows, dim)[1]
    return _tables[rows, dim]


def small_table() -> pa.Table:
    """4 KiB of values."""
    return table(8, 128)


def large_table(mib: int) -> pa.Table:
    """So many MiB of values."""
    return table(mib * (1 << 20) // (4 * DIM), DIM)


def touch(q: ShmQuantizer) -> None:
    """Make the session and its window."""
    q.quantize(small_table(), "int8").release()


def keep_busy(q: ShmQuantizer, mib: int, begin: float, end: float) -> int:
    """Requests that were finished between two moments, one after the other."""
    data = large_table(mib)
    done = 0
    while (now := time.monotonic()) < end:
        q.quantize(data, "int8").release()
        done += now >= begin and time.monotonic() <= end
    return done


def small_calls(q: ShmQuantizer, calls: int, until: float = 0.0) -> list[float]:
    """Seconds of each of so many small requests, or of as many as there are until then."""
    data = small_table()
    times = []
    while len(times) < calls and not (until and time.monotonic() >= until):
        start = time.perf_counter()
        q.quantize(data, "int8").release()
        times.append(time.perf_counter() - start)
    return times


def descriptors_and_mappings(pid: int | str) -> tuple[int, int]:
    """How many of each a process has."""
    with open(f"/proc/{pid}/maps") as maps:
        return len(os.listdir(f"/proc/{pid}/fd")), sum(1 for _ in maps)


# The measurements.


def throughput(mib: int, rounds: int, seconds: float) -> list[dict]:
    """1, 2, 4, 8 clients in turns: all of their throughput, and how evenly it is shared."""
    large_table(mib)
    with Daemon() as daemon:
        clients = [Client(daemon.address) for _ in range(max(COUNTS))]
        for client in clients:
            client.do(keep_busy, mib, 0.0, time.monotonic() + 0.2)
        rates: dict[int, list[float]] = {n: [] for n in COUNTS}
        fairness: dict[int, list[float]] = {n: [] for n in COUNTS}
        for _ in range(rounds):
            for n in COUNTS:
                # The first moments, when some have not begun yet, do not count.
                begin = time.monotonic() + 0.2
                for client in clients[:n]:
                    client.ask(keep_busy, mib, begin, begin + seconds)
                done = [client.answer() for client in clients[:n]]
                rates[n].append(sum(done) * (mib << 20) / seconds)
                fairness[n].append(max(done) / max(1, min(done)))
        for client in clients:
            client.close()
    return [
        {
            "clients": n,
            "mib": mib,
            "gb_s": statistics.median(rates[n]) / 1e9,
            "of_one": statistics.median(b / a for a, b in zip(rates[1], rates[n], strict=True)),
            "most_by_least": statistics.median(fairness[n]),
        }
        for n in COUNTS
    ]


def beside(mib: int, rounds: int, seconds: float) -> list[dict]:
    """4 KiB requests alone and beside another process whose large requests never end."""
    rows = []
    small_table(), large_table(mib)
    for polling in (True, False):
        with Daemon(*([] if polling else ["--no-poll"])) as daemon:
            poll = None if polling else False
            small, large = Client(daemon.address, poll=poll), Client(daemon.address, poll=poll)
            large.do(keep_busy, mib, 0.0, time.monotonic() + 0.2)
            small.do(small_calls, 200)
            times: dict[bool, list[float]] = {False: [], True: []}
            jobs = 0
            for _ in range(rounds):
                times[False] += small.do(small_calls, 1 << 40, time.monotonic() + seconds / 2)
                begin = time.monotonic()
                large.ask(keep_busy, mib, begin, begin + seconds + 0.2)
                small.do(small_calls, 1 << 40, begin + 0.1)
                times[True] += small.do(small_calls, 1 << 40, begin + 0.1 + seconds)
                jobs += large.answer()
            small.close()
            large.close()
        rows += [
            {
                "polling": polling,
                "beside_mib": mib if busy else 0,
                "calls": len(seconds_each),
                "large_jobs": jobs if busy else 0,
                "p50_us": statistics.median(seconds_each) * 1e6,
                "p99_us": p99(seconds_each) * 1e6,
                "max_us": max(seconds_each) * 1e6,
            }
            for busy, seconds_each in times.items()
        ]
    return rows


def hold(q: ShmQuantizer, wanted: int, calls: int) -> dict:
    """Make results until so many live, then time calls; says where it ended if it could not."""
    data = small_table()
    start, before = time.perf_counter(), len(_held)
    broken = None
    while len(_held) < wanted:
        try:
            _held.append(q.quantize(data, "int8"))
        except ShmQuantError as error:
            broken = f"{type(error).__name__}: {error}"
            break
    took, made = time.perf_counter() - start, len(_held) - before
    if broken:
        return {"live": len(_held), "wanted": wanted, "broken": broken}
    gc.collect()
    times = small_calls(q, calls)
    return {
        "live": len(_held),
        "wanted": wanted,
        "making_us": took / max(1, made) * 1e6,
        "p50_us": statistics.median(times) * 1e6,
        "p99_us": p99(times) * 1e6,
        "client": descriptors_and_mappings("self"),
    }


_held: list[Any] = []


def live_results(calls: int, most: int) -> list[dict]:
    """Cost of a small call while so many small results live in the same process."""
    rows = []
    small_table()
    with Daemon() as daemon:
        client = Client(daemon.address)
        for wanted in sorted({min(n, most) for n in LIVE}):
            row = client.do(hold, wanted, calls)
            rows.append(row | {"daemon": descriptors_and_mappings(daemon.pid)})
            if "broken" in row:
                break
        client.close()
    return rows


def sessions(calls: int, most: int) -> list[dict]:
    """Cost of a small call while so many sessions, each of its own process, are connected."""
    rows = []
    small_table()
    with Daemon() as daemon:
        clients = [Client(daemon.address)]
        clients[0].do(touch)
        for wanted in sorted({min(n, most) for n in SESSIONS}):
            start, before = time.perf_counter(), len(clients)
            broken = None
            try:
                while len(clients) < wanted:
                    clients.append(Client(daemon.address))
                    clients[-1].do(touch)
            except RuntimeError as error:
                broken = str(error)
            making = (time.perf_counter() - start) / max(1, len(clients) - before)
            row = {"sessions": len(clients), "wanted": wanted}
            if not broken:
                times = clients[0].do(small_calls, calls)
                # Each session once in turn: its thread, its window and its process were all asleep.
                turn = [client.do(small_calls, 1)[0] for client in clients]
                row |= {
                    "making_us": making * 1e6,
                    "p50_us": statistics.median(times) * 1e6,
                    "p99_us": p99(times) * 1e6,
                    "turn_p50_us": statistics.median(turn) * 1e6,
                }
            rows.append(row | {"daemon": descriptors_and_mappings(daemon.pid)})
            if broken:
                rows[-1]["broken"] = broken
                break
        for client in clients:
            client.close()
    return rows


def limits() -> dict:
    """What the machine lets one process have."""
    with open("/proc/sys/vm/max_map_count") as count:
        return {"descriptors": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "mappings": int(count.read())}


def run(quick: bool) -> dict:
    """All of it: about a minute and a half, or some seconds."""
    return {
        "limits": limits(),
        "throughput": throughput(16 if quick else 64, 2 if quick else 7, 0.5 if quick else 1.0),
        "beside": beside(256 if quick else 1024, 2 if quick else 4, 1.0 if quick else 2.0),
        "live": live_results(200 if quick else 2000, 1_000 if quick else 100_000),
        "sessions": sessions(200 if quick else 2000, 20 if quick else 500),
    }


def tables(results: dict) -> str:
    """The results as Markdown."""
    rows = results["throughput"]
    lines = [
        f"Clients, each a process that quantizes {rows[0]['mib']} MiB again and again:",
        "",
        "| clients | GB/s of all | x one client's | most / least of a client |",
        "|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['clients']} | {r['gb_s']:.1f} | {r['of_one']:.2f} | {r['most_by_least']:.2f} |" for r in rows
    ]
    lines += [
        "",
        "4 KiB requests of one process, alone and while another quantizes without a pause:",
        "",
        "| beside | polling | p50 µs | p99 µs | worst µs |",
        "|---|---|--:|--:|--:|",
    ]
    lines += [
        f"| {str(r['beside_mib']) + ' MiB' if r['beside_mib'] else 'nothing'} "
        f"| {'yes' if r['polling'] else 'no'} "
        f"| {r['p50_us']:.0f} | {r['p99_us']:.0f} | {r['max_us']:.0f} |"
        for r in results["beside"]
    ]
    lines += [
        "",
        "4 KiB requests while small results live in the same process:",
        "",
        "| live | p50 µs | p99 µs | making one, µs | descriptors, mappings of the client | of the daemon |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [_live(r) for r in results["live"]]
    lines += [
        "",
        "4 KiB requests while other sessions are connected, each of a process of its own:",
        "",
        "| sessions | p50 µs | p99 µs | each once, µs | making one, µs | daemon's descriptors, mappings |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [_session(r) for r in results["sessions"]]
    return "\n".join(lines)


def _live(r: dict) -> str:
    daemon = "{:,}, {:,}".format(*r["daemon"])
    if "broken" in r:
        return f"| {r['live']:,} of {r['wanted']:,} | {r['broken'].splitlines()[0]} | | | | {daemon} |"
    client = "{:,}, {:,}".format(*r["client"])
    return (
        f"| {r['live']:,} | {r['p50_us']:.1f} | {r['p99_us']:.1f} | {r['making_us']:.0f} "
        f"| {client} | {daemon} |"
    )


def _session(r: dict) -> str:
    daemon = "{:,}, {:,}".format(*r["daemon"])
    if "broken" in r:
        return f"| {r['sessions']} of {r['wanted']} | {r['broken'].splitlines()[0]} | | | | {daemon} |"
    return (
        f"| {r['sessions']} | {r['p50_us']:.1f} | {r['p99_us']:.1f} | {r['turn_p50_us']:.0f} "
        f"| {r['making_us']:.0f} | {daemon} |"
    )
