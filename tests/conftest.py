"""Real daemons for the tests: each in a process of its own, on a socket below the test's folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shmquant import ShmQuantizer
from shmquant._session import start_prefix

# Whatever a test forgets to name must not reach a daemon that somebody works with.
os.environ["SHMQUANT_ADDRESS"] = "/nonexistent/shmquant-tests.sock"


class Daemon:
    """A daemon under test."""

    def __init__(self, address: Path, *options: str) -> None:
        self.address = str(address)
        self.process = subprocess.Popen(
            [*start_prefix(), "serve", "--address", self.address, *options],
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


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Start daemons with options; all end with the test."""
    started: list[Daemon] = []

    def start(*options: str) -> Daemon:
        daemon = Daemon(tmp_path / f"{len(started)}.sock", *options)
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        daemon.stop()


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A daemon that the tests share which leave nothing behind."""
    daemon = Daemon(tmp_path_factory.mktemp("daemon") / "shared.sock", "--budget", "1GiB")
    yield daemon.address
    assert daemon.stop() == 0


@pytest.fixture
def q(address: str) -> ShmQuantizer:
    """A handle on the shared daemon."""
    return ShmQuantizer(address)


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a new interpreter, its arguments in sys.argv."""

    def run(script: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)

    return run


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that another process does in its own time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
