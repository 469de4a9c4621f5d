"""The command `shmquant`. Loads the extension only: a daemon has no use for pyarrow."""

from __future__ import annotations

import sys

from . import _native
from ._session import start_prefix


def main() -> None:
    """Run the command that the arguments name and exit with its status."""
    sys.exit(_native.cli(["shmquant", *sys.argv[1:]], start_prefix()))
