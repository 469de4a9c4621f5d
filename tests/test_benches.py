"""The benchmark runs, part by part, and what it writes can be shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from watchdog import patience

PROGRAM = Path(__file__).parents[1] / "benches" / "run.py"


# What the results are shown as.
TABLES = {"speed": 3, "inputs": 2, "clients": 4, "cold": 1}


@pytest.mark.slow
@pytest.mark.parametrize("part", TABLES)
def test_a_part_runs(part, tmp_path):
    # One of them builds a program first.
    patience(900)
    command = [sys.executable, PROGRAM, part, "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / f"{part}.json").read_text())
    assert results["quick"]
    measured = [rows for rows in results.values() if isinstance(rows, list)]
    assert measured and all(measured)
    assert not [row for rows in measured for row in rows if "broken" in row]
    assert len(re.findall(r"^\|-", done.stdout, re.MULTILINE)) == TABLES[part]
