"""Daemons under test."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from shmquant._session import start_prefix


class Daemon:
    """A daemon under test."""

    def __init__(self, address: Path, *options: str) -> None:
        self.address = str(address)
        self.process = subprocess.Popen(
            # Should the tests be killed, it does not stay for ever.
            [*start_prefix(), "serve", "--address", self.address, "--idle-exit", "600s", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line.strip() == "ready", (line, self.process.communicate()[1])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; its exit status. It has half a minute: the watchdog of last resort."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()
                raise
        return self.process.returncode


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that another process does in its own time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
