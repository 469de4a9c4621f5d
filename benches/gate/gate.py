"""Instructions per value of the hot kernels and of one small request, held against those in figures.json.

Instructions do not depend on what else the machine does, so this can be a gate where times cannot. Figures
belong to one compiler: another one makes other code. Callgrind runs what valgrind's own CPU has, which is
AVX2 and, up to valgrind 3.19 at least, not AVX-512: each figure says which path it is of, and paths that are
not counted are named.

``python benches/gate/gate.py`` compares, ``--update`` writes the figures anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import request

ROOT = Path(__file__).resolve().parents[2]
FIGURES = Path(__file__).with_name("figures.json")
# Code of the same compiler differs a little with where buffers lie.
ALLOWED = 0.02
# Of a request, threads that keep house are counted, too.
ALLOWED_REQUEST = 0.05


class Unable(Exception):
    """Instructions cannot be counted here, or not be compared; the reason."""


@dataclass
class Counted:
    """Instructions per value by path and case, and the paths of this machine that valgrind cannot run."""

    compiler: str
    figures: dict[str, dict[str, float]]
    not_counted: list[str]


def run(*command: str | Path) -> str:
    """What a command prints; its errors are passed on."""
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stderr}")
    return done.stdout


def compiler() -> str:
    """The compiler and the machine that it writes for."""
    lines = dict(line.split(": ", 1) for line in run("rustc", "-vV").splitlines() if ": " in line)
    return f"rustc {lines['release']} {lines['host']}"


def build() -> Path:
    """The program that runs one kernel, in the profile that is shipped."""
    messages = run(
        "cargo", "build", "--quiet", "--release", "--locked", "-p", "shmquant-kernels",
        "--example", "gate", "--message-format", "json",
    )  # fmt: skip
    made = (json.loads(line) for line in messages.splitlines())
    return next(
        Path(message["executable"])
        for message in made
        if message.get("executable") and message["target"]["name"] == "gate"
    )


def listed(output: str) -> list[tuple[str, str, int]]:
    """Path, case and number of values of each line."""
    rows = (line.split("\t") for line in output.splitlines())
    return [(path, case, int(values)) for path, case, values in rows]


def count(program: Path, path: str, case: str) -> int:
    """Instructions inside the kernel."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        run(
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={out}",
            "--toggle-collect=*counted_kernel*", program, path, case,
        )  # fmt: skip
        totals = next(line for line in out.read_text().splitlines() if line.startswith("totals:"))
    return int(totals.split()[1])


def check_tools() -> None:
    """Whether there is what it takes."""
    for tool in ("valgrind", "callgrind_control", "cargo", "rustc"):
        if shutil.which(tool) is None:
            raise Unable(f"{tool} is not installed")


def check_compiler(figures: dict, here: str) -> None:
    """Whether the figures are of the compiler that is here."""
    if figures["compiler"] != here:
        raise Unable(f"the figures are of {figures['compiler']}, this is {here}")


def check_requests(figures: dict) -> None:
    """Whether there are figures of a request."""
    if "instructions_per_request" not in figures:
        raise Unable("no figures of a request are kept; `python benches/gate/gate.py --update` makes them")


def measure() -> Counted:
    """Counts every case on every path that valgrind can run."""
    check_tools()
    program = build()
    here = listed(run(program))
    cases = listed(run("valgrind", "--quiet", "--tool=none", program))
    figures: dict[str, dict[str, float]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = pool.map(lambda row: count(program, row[0], row[1]), cases)
        for (path, case, values), instructions in zip(cases, counts, strict=True):
            figures.setdefault(path, {})[case] = round(instructions / values, 4)
    not_counted = sorted({path for path, _, _ in here} - set(figures))
    return Counted(compiler(), figures, not_counted)


def compare(figures: dict, counted: Counted) -> tuple[list[str], list[str]]:
    """What is wrong, and what is only worth saying."""
    check_compiler(figures, counted.compiler)
    wrong, notes = [], []
    kept = figures["instructions_per_value"]
    for path in sorted(kept.keys() | counted.figures.keys()):
        if path not in counted.figures or path not in kept:
            where = "where the figures were made" if path in kept else "here"
            notes.append(f"{path}: not compared, valgrind runs it only {where}")
            continue
        before, now = kept[path], counted.figures[path]
        for case in sorted(before.keys() | now.keys()):
            if case not in before or case not in now:
                wrong.append(f"{path} {case}: {'no figure kept' if case in now else 'no such case now'}")
            elif now[case] > before[case] * (1 + ALLOWED):
                wrong.append(f"{path} {case}: {now[case]} instructions a value, {before[case]} before")
            elif now[case] < before[case] * (1 - ALLOWED):
                notes.append(f"{path} {case}: {now[case]} instructions a value, {before[case]} before")
    return wrong, notes


def compare_requests(figures: dict, counted: dict[str, float]) -> tuple[list[str], list[str]]:
    """The same for a request, by side."""
    wrong, notes = [], []
    for side, before in figures["instructions_per_request"].items():
        now = counted[side]
        told = f"{side}: {now} instructions a request, {before} before"
        if now > before * (1 + ALLOWED_REQUEST):
            wrong.append(told)
        elif now < before * (1 - ALLOWED_REQUEST):
            notes.append(told)
    return wrong, notes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the figures anew")
    options = parser.parse_args()
    try:
        counted = measure()
        requests = request.measure()
        if options.update:
            kept = {
                "compiler": counted.compiler,
                "valgrind": run("valgrind", "--version").strip(),
                "not_counted": counted.not_counted,
                "instructions_per_request": requests,
                "instructions_per_value": counted.figures,
            }
            FIGURES.write_text(json.dumps(kept, indent=2) + "\n")
            print(f"wrote {FIGURES.relative_to(ROOT)}: {', '.join(counted.figures)}")
            return 0
        figures = json.loads(FIGURES.read_text())
        wrong, notes = compare(figures, counted)
        check_requests(figures)
        more = compare_requests(figures, requests)
        wrong, notes = wrong + more[0], notes + more[1]
    except Unable as reason:
        print(f"instructions are not compared: {reason}")
        return 0
    print(f"counted: {', '.join(counted.figures)}; not counted: {', '.join(counted.not_counted) or 'none'}")
    print("\n".join(notes + wrong))
    if wrong:
        print("hint: `python benches/gate/gate.py --update` where the new figures are meant", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
