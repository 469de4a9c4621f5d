"""The command `shmquant`. Loads the extension only: a daemon has no use for pyarrow."""

from __future__ import annotations

import signal
import sys

from . import _native
from ._session import start_prefix


def main() -> None:
    """Run the command that the arguments name and exit with its status."""
    # Python's handler would only note the interrupt for an interpreter that waits for us, and the daemon's
    # would call it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(_native.cli(["shmquant", *sys.argv[1:]], start_prefix()))
