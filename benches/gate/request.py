"""Instructions of one small request, the daemon's and the client's, counted on the wheel as installed.

Both sides sleep while they wait: how long a side polls depends on the other one, and so would the count. A
side runs under callgrind, the other as it is; what is counted lies between two moments of a warm process.
Repeated runs differ by a thousandth (daemon) and half a hundredth (client, Python and pyarrow included).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from shmquant._session import start_prefix

CALLS = 100
SAMPLES = 3

CLIENT = """
import sys
import numpy as np, pyarrow as pa
from shmquant import ShmQuantizer

x = np.random.default_rng(0).standard_normal((8, 128), dtype=np.float32)
table = pa.table({"emb": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 128)})
q = ShmQuantizer(sys.argv[1], poll=False)
for line in sys.stdin:
    for _ in range(int(line)):
        q.quantize(table, "int8").release()
    print("done", flush=True)
"""


class Side:
    """A process whose instructions can be counted, or that runs as it is."""

    def __init__(self, folder: Path, counted: bool, command: list[str]) -> None:
        self._out = folder / "callgrind"
        tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={self._out}"] if counted else []
        self.process = subprocess.Popen(
            [*tool, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._dumps = 0

    def line(self) -> str:
        """What it says next; its errors if it has ended instead."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended: {self.process.communicate()[1]}")
        return line.strip()

    def count(self, work: Callable[[], None]) -> int:
        """Instructions of all of its threads meanwhile."""
        control = ["callgrind_control"]
        subprocess.run([*control, "--zero", str(self.process.pid)], check=True, capture_output=True)
        work()
        subprocess.run([*control, "--dump", str(self.process.pid)], check=True, capture_output=True)
        self._dumps += 1
        text = self._out.with_name(f"{self._out.name}.{self._dumps}").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("totals:")).split()[1])

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.communicate()


def sampled(side: str) -> list[float]:
    """Instructions of one request on one ``side``, ``daemon`` or ``client``, several times."""
    with tempfile.TemporaryDirectory() as name:
        address = os.path.join(name, "d.sock")
        serve = [*start_prefix(), "serve", "--no-poll", "--workers", "1", "--address", address]
        daemon = Side(Path(name), side == "daemon", serve)
        try:
            if daemon.line() != "ready":
                raise RuntimeError("the daemon is not ready")
            client = Side(Path(name), side == "client", [sys.executable, "-c", CLIENT, address])
            try:

                def calls(number: int = CALLS) -> None:
                    client.process.stdin.write(f"{number}\n")
                    client.process.stdin.flush()
                    client.line()

                calls()
                counted = {"daemon": daemon, "client": client}[side]
                # The first one holds some of what came before it.
                counted.count(calls)
                return [counted.count(calls) / CALLS for _ in range(SAMPLES)]
            finally:
                client.close()
        finally:
            daemon.close()


def measure() -> dict[str, float]:
    """The median of the samples of each side."""
    return {side: round(statistics.median(sampled(side))) for side in ("daemon", "client")}
