"""More patience for one long test than the watchdog of every test has."""

from __future__ import annotations

import faulthandler
import sys


def patience(seconds: float) -> None:
    """Let the running test take so long before it becomes a stack of every thread and a red run.

    pytest disarms it at the test's end and arms its own anew for the next.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
