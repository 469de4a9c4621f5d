"""Ours against peers and limits, taking turns in one run; medians and ratios. ``make bench`` runs it.

An absolute time on a shared virtual machine proves nothing, so every figure stands beside a limit or a peer
measured in the same run. Each part writes ``benches/out/<part>.json``; ``--write-docs`` puts tables and plots
of what is there into docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import clients
import cold
import inputs
import speed
from harness import machine

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PARTS = {"speed": speed, "inputs": inputs, "clients": clients, "cold": cold}


def write_docs(out: Path) -> None:
    """Put what the parts have written into the page and the plots."""
    # Not installed for those who only measure.
    import plots

    shown = {}
    page = DOCS / "performance.md"
    text = page.read_text()
    for name, part in PARTS.items():
        written = out / f"{name}.json"
        if not written.exists():
            print(f"docs: {name} has not been measured, its tables stay")
            continue
        results = json.loads(written.read_text())
        shown[name] = results
        images = "\n".join(
            f"![{plot.__doc__.rstrip('.')}]({file}.svg)" for file, of, plot in plots.PLOTS if of == name
        )
        block = f"Measured on {results['machine']}.\n\n{images}\n\n{part.tables(results)}"
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        text, found = marked.subn(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text)
        if found != 1:
            raise RuntimeError(f"{page} has {found} places for {name}, not 1")
    page.write_text(text)
    plots.draw(shown, DOCS)


def measure(name: str, quick: bool, out: Path) -> None:
    """Run one part, keep its results and show them."""
    start = time.monotonic()
    results = {"machine": machine(), "load": os.getloadavg()[0], "quick": quick}
    results |= PARTS[name].run(quick)
    out.mkdir(exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"## {name}, {time.monotonic() - start:.0f} s\n\n{PARTS[name].tables(results)}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small and few: only to see that it runs")
    parser.add_argument("--write-docs", action="store_true", help="put tables and plots into docs/")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of the results")
    args = parser.parse_args()
    parts = args.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if len(parts) == 1:
        measure(parts[0], args.quick, args.out)
    else:
        for name in parts:
            # A process for each: threads and memory of one part are none of another's.
            command = [sys.executable, __file__, name, "--out", args.out]
            command += ["--quick"] if args.quick else []
            subprocess.run(command, check=True)
    if args.write_docs:
        write_docs(args.out)


if __name__ == "__main__":
    main()
