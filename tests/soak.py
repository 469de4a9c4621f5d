"""A daemon under mixed load from clients that come, go, fork and are killed, for as long as is asked.

    python tests/soak.py --minutes 10 --clients 50

Every client checks every byte that it reads against the sum that was taken when the result was made, by
itself or by whoever sent it. The daemon's memory, descriptors, mappings and counters are taken down every
second. In the end all clients are gone and the verdict is given: no wrong byte, counters at zero, nothing
that grew after the warm-up. Written to benches/out/soak.json and docs/soak.svg.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from daemons import Daemon
from processes import MIB, status
from shmquant import DeadlineError, NoRoomError, QuantizedTable, ShmQuantError, ShmQuantizer

ROOT = Path(__file__).resolve().parent.parent
SIZES = [(4, 16), (64, 64), (256, 256), (1024, 384), (4096, 512)]
SCHEMES = ["int8", "uint8", "uint4", "int2"]
#: Part of the run after which nothing may grow any more.
WARM_UP = 0.4
COUNTERS = ("sessions", "leases", "tickets", "datasets", "jobs", "waiting", "lanes")


def crc(r: QuantizedTable) -> int:
    """The sum of all bytes of a result's codes."""
    return zlib.crc32(r.codes("vector"))


class Client:
    """One life: mixed work until its time is over, or until somebody kills it."""

    def __init__(self, address: str, seed: int, box: Path) -> None:
        self.q = ShmQuantizer(address, window=4 * MIB)
        self.random = random.Random(seed)
        self.box = box
        self.done = Counter[str]()
        self.held: list[tuple[QuantizedTable, int]] = []
        values = np.random.default_rng(seed).standard_normal((4096, 512), dtype=np.float32)
        self.inputs = [values[:rows, :dim] for rows, dim in SIZES]

    def check(self, r: QuantizedTable, expected: int) -> None:
        self.done["checked"] += 1
        if crc(r) != expected:
            # The one thing that must never happen; the driver looks for this status.
            print(f"{os.getpid()}: {r.segment_name} has changed", file=sys.stderr, flush=True)
            os._exit(66)

    def make(self, **options: object) -> QuantizedTable:
        x = self.random.choices(self.inputs, [30, 30, 20, 15, 5])[0]
        return self.q.quantize(x, self.random.choice(SCHEMES), timeout=20, **options)

    def quantize(self) -> None:
        r = self.make()
        self.held.append((r, crc(r)))
        del self.held[: max(0, len(self.held) - 6)]

    def reread(self) -> None:
        for r, expected in self.held:
            self.check(r, expected)

    def publish(self) -> None:
        name = f"soak/{self.random.randrange(8)}"
        r = self.make(name=name, replace=True)
        self.held.append((r, crc(r)))

    def open(self) -> None:
        """Two readers of one dataset agree, and so does one reader with itself later."""
        names = [entry["name"] for entry in self.q.list() if entry["state"] == "complete"]
        if names:
            r = self.q.open(self.random.choice(names))
            self.held.append((r, crc(r)))

    def drop(self) -> None:
        self.q.drop(f"soak/{self.random.randrange(8)}")

    def send(self) -> None:
        """A ticket for whoever finds it."""
        if self.held:
            r, expected = self.random.choice(self.held)
            path = self.box / f"{os.getpid()}-{self.random.randrange(1 << 60)}"
            path.with_suffix(".part").write_bytes(pickle.dumps((expected, pickle.dumps(r))))
            path.with_suffix(".part").rename(path.with_suffix(".ticket"))

    def receive(self) -> None:
        tickets = sorted(self.box.glob("*.ticket"))
        if tickets:
            path = self.random.choice(tickets)
            mine = path.with_suffix(f".{os.getpid()}")
            path.rename(mine)
            expected, data = pickle.loads(mine.read_bytes())
            mine.unlink()
            r = pickle.loads(data)
            self.check(r, expected)
            self.held.append((r, expected))

    def fork(self) -> None:
        """The child reads what was there before it, after the parent has made room and more results."""
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(write)
                os.read(read, 1)
                self.reread()
                own = self.make()
                self.check(own, crc(own))
                os._exit(0)
            except ShmQuantError:
                os._exit(0)
            finally:
                os._exit(67)
        os.close(read)
        try:
            del self.held[:3]
            for _ in range(3):
                self.quantize()
        finally:
            os.close(write)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 66:
            os._exit(66)
        if code != 0:
            raise AssertionError(f"a forked child ended with {code}")

    WORK = (
        (quantize, 60),
        (reread, 12),
        (publish, 5),
        (open, 8),
        (drop, 2),
        (send, 5),
        (receive, 6),
        (fork, 2),
    )

    def live(self, until: float) -> None:
        works, weights = zip(*self.WORK, strict=True)
        while time.monotonic() < until:
            work = self.random.choices(works, weights)[0]
            try:
                work(self)
                self.done[work.__name__] += 1
            except (NoRoomError, DeadlineError) as error:
                # What a crowded daemon says; what this one holds may be the reason.
                self.done[type(error).__name__] += 1
                self.held.clear()
            except (ShmQuantError, FileNotFoundError) as error:
                # The name went, the ticket was another's: that is what mixed means.
                self.done[type(error).__name__] += 1
        self.reread()
        print(json.dumps(self.done))


class Soak:
    """The driver: keeps clients alive, kills some, samples the daemon."""

    def __init__(self, seconds: float, clients: int, seed: int, folder: Path) -> None:
        self.seconds, self.clients = seconds, clients
        self.random = random.Random(seed)
        self.folder = folder
        self.box = folder / "box"
        self.box.mkdir()
        # A log file, since nobody reads its standard error while this runs.
        log = folder / "soak.log"
        self.daemon = Daemon(folder / "soak.sock", "--budget", "1GiB", "--log", str(log))
        # As tickets have it: one session for both.
        self.q = ShmQuantizer(self.daemon.address)
        self.running: list[subprocess.Popen[str]] = []
        self.done = Counter[str]()
        self.lives = self.killed = 0
        self.faults: list[str] = []
        self.samples: list[dict[str, int]] = []

    def start(self) -> None:
        life = self.random.uniform(0.1, 0.5) * min(self.seconds, 120)
        arguments = [self.daemon.address, str(self.random.randrange(1 << 30)), str(life), str(self.box)]
        command = [sys.executable, str(Path(__file__).resolve()), "--client", *arguments]
        self.running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        self.lives += 1

    def end(self, client: subprocess.Popen[str]) -> None:
        """Take down how a life went."""
        out, err = client.communicate()
        if "has changed" in err:
            self.faults.append(err[-2000:])
        elif client.returncode == 0:
            self.done.update(json.loads(out))
        elif client.returncode == -signal.SIGKILL:
            self.killed += 1
        else:
            self.faults.append(f"a client ended with {client.returncode}: {err[-2000:]}")

    def sample(self, began: float) -> None:
        pid = self.daemon.process.pid
        stat, memory = json.loads(self.q._client.stat()), status(pid)
        self.samples.append(
            {
                "t": round(time.monotonic() - began, 3),
                "private": memory["VmRSS"] - memory["RssShmem"],
                "shared": memory["RssShmem"],
                "fds": len(os.listdir(f"/proc/{pid}/fd")),
                "mappings": Path(f"/proc/{pid}/maps").read_text().count("\n"),
                "bytes": stat["bytes"],
                "segments": stat["segments"],
                "requests": stat["requests"],
                "stray_releases": stat["stray_releases"],
                **{name: stat[name] for name in COUNTERS},
            }
        )

    def run(self) -> dict[str, object]:
        began = time.monotonic()
        until, tick = began + self.seconds, began
        while time.monotonic() < until and not self.faults:
            for client in [c for c in self.running if c.poll() is not None]:
                self.running.remove(client)
                self.end(client)
            # They come a few at a time: starting an interpreter is the most expensive thing here.
            for _ in range(min(4, self.clients - len(self.running))):
                self.start()
            if self.running and self.random.random() < 0.3:
                self.random.choice(self.running).kill()
            if self.daemon.process.poll() is not None:
                self.faults.append(f"the daemon ended with {self.daemon.process.returncode}")
                break
            self.sample(began)
            tick += 1.0
            time.sleep(max(0.0, tick - time.monotonic()))
        # Half of what is left is killed, the others end in their time.
        for client in self.running[::2]:
            client.kill()
        for client in self.running:
            self.end(client)
        self.running.clear()
        return self.verdict(began)

    def settle(self, began: float) -> dict[str, int]:
        """Take away what is meant to stay, and wait for the rest."""
        for path in self.box.glob("*.ticket"):
            with contextlib.suppress(ShmQuantError):
                pickle.loads(pickle.loads(path.read_bytes())[1])
        for entry in self.q.list():
            self.q.drop(entry["name"])
        until = time.monotonic() + 30
        while True:
            self.sample(began)
            last = self.samples[-1]
            left = {name: last[name] for name in COUNTERS if name not in ("sessions", "lanes", "tickets")}
            if (not any(left.values()) and last["sessions"] == 1) or time.monotonic() > until:
                return left | {"other sessions": last["sessions"] - 1}
            time.sleep(0.2)

    def verdict(self, began: float) -> dict[str, object]:
        alive = self.daemon.process.poll() is None
        left = self.settle(began) if alive else {}
        for name, value in left.items():
            if value:
                self.faults.append(f"{value} {name} left")
        after = [s for s in self.samples if s["t"] > WARM_UP * self.seconds and s["t"] < self.seconds]
        growth = {}
        half = len(after) // 2
        # A leak of one of these for each client, request or kill would be thousands.
        for name, most in (("private", 16 * MIB), ("fds", 100), ("mappings", 100)):
            if half:
                # Segments take one of each; how many there are follows the load, up to the budget.
                known = 0 if name == "private" else 1
                early, late = (
                    max(s[name] - known * s["segments"] for s in part)
                    for part in (after[:half], after[half:])
                )
                growth[name] = late - early
                # Load is random, so peaks of two halves differ; a leak goes on and does not.
                if late > early * 1.25 + most:
                    self.faults.append(f"{name} grew from {early} to {late} after the warm-up")
        if alive and self.samples[-1]["stray_releases"]:
            self.faults.append(f"{self.samples[-1]['stray_releases']} releases of what was not held")
        end = self.samples[-1]
        if alive and (code := self.daemon.stop()) != 0:
            self.faults.append(f"the daemon ended with {code}")
        return {
            "verdict": "; ".join(self.faults) or "flat, counters back at zero, no byte changed",
            "ok": not self.faults,
            "seconds": round(time.monotonic() - began, 1),
            "clients": self.clients,
            "lives": self.lives,
            "kills": self.killed,
            "requests": end["requests"],
            "done": dict(self.done),
            "growth": growth,
            "tickets of the killed": end["tickets"],
            "end": end,
            "samples": self.samples,
        }

    def close(self) -> None:
        for client in self.running:
            client.kill()
            client.communicate()
        if self.daemon.process.poll() is None:
            self.daemon.process.kill()
            self.daemon.process.communicate()


def plot(report: dict[str, object], path: Path) -> None:
    """Lines over time, one small panel each, as SVG."""
    samples = report["samples"]
    panels = [
        ("private memory, MiB", "private", MIB),
        ("shared memory, MiB", "shared", MIB),
        ("descriptors", "fds", 1),
        ("mappings", "mappings", 1),
        ("sessions", "sessions", 1),
        ("leases", "leases", 1),
    ]
    width, height = 340, 130
    end = max(s["t"] for s in samples) or 1
    parts = []
    for i, (title, name, unit) in enumerate(panels):
        left, top = (i % 2) * width + 45, (i // 2) * height + 25
        values = [s[name] / unit for s in samples]
        most = max(values) or 1
        points = " ".join(
            f"{left + 280 * s['t'] / end:.1f},{top + 80 - 80 * v / most:.1f}"
            for s, v in zip(samples, values, strict=True)
        )
        parts.append(
            f'<text x="{left}" y="{top - 8}">{title}</text>'
            f'<text x="{left - 5}" y="{top + 8}" text-anchor="end">{most:.0f}</text>'
            f'<text x="{left - 5}" y="{top + 80}" text-anchor="end">0</text>'
            f'<text x="{left + 280}" y="{top + 93}" text-anchor="end">{end:.0f} s</text>'
            f'<path d="M{left} {top}v80h280" fill="none" stroke="#999"/>'
            f'<polyline points="{points}" fill="none" stroke="#1864ab"/>'
        )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {3 * height}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
        + "".join(parts)
        + "</svg>\n"
    )


def soak(seconds: float, clients: int, seed: int) -> dict[str, object]:
    """Run it; the report."""
    with tempfile.TemporaryDirectory(prefix="shmquant-soak-") as folder:
        run = Soak(seconds, clients, seed, Path(folder))
        try:
            return run.run()
        finally:
            run.close()


def main() -> int:
    if sys.argv[1:2] == ["--client"]:
        address, seed, life, box = sys.argv[2:]
        Client(address, int(seed), Path(box)).live(time.monotonic() + float(life))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    report = soak(given.minutes * 60, given.clients, given.seed)
    out = ROOT / "benches" / "out" / "soak.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, ROOT / "docs" / "soak.svg")
    print(json.dumps({name: value for name, value in report.items() if name != "samples"}, indent=1))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
