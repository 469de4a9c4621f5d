"""Processes of a test that are told things and answer, line by line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


class Child:
    """A new interpreter that runs a script, its arguments in `sys.argv`; one line of JSON is one answer."""

    def __init__(self, script: str, *arguments: object, **options: Any) -> None:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def answer(self) -> Any:
        """Wait for the next answer; the end of the process is none."""
        line = self.process.stdout.readline()
        assert line, f"the child ended with {self.process.wait()}"
        return json.loads(line)

    def tell(self, line: str = "") -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """Let it run to its end; its exit status."""
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.stdout.close()
        return self.process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
