"""Real daemons for the tests: each in a process of its own, on a socket below the test's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemons import Daemon
from shmquant import ShmQuantizer
from stdlib_client import Lane, Session
from stdlib_oracle import WINDOW

# Whatever a test forgets to name must not reach a daemon that somebody works with.
os.environ["SHMQUANT_ADDRESS"] = "/nonexistent/shmquant-tests.sock"


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


@pytest.fixture
def session(address: str) -> Iterator[Session]:
    """A session of this process, by the client that is written with the standard library alone."""
    session = Session(address)
    yield session
    session.close()


@pytest.fixture
def lane(session: Session) -> Iterator[Lane]:
    """Its lane, with the smallest window."""
    lane = session.lane(WINDOW)
    yield lane
    lane.close()


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a new interpreter, its arguments in sys.argv."""

    def run(script: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)

    return run
