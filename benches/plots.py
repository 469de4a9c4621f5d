"""Draws what the parts have written as SVG files for docs/."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
# The same figures make the same file; text stays text.
matplotlib.rcParams.update({"svg.hashsalt": "shmquant", "svg.fonttype": "none", "font.size": 9})

# The backend comes first.
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402


def _by_case(rows: list[dict], x: str, y: str) -> dict[str, tuple[list, list]]:
    lines: dict[str, tuple[list, list]] = {}
    for row in rows:
        xs, ys = lines.setdefault(row["case"], ([], []))
        xs.append(row[x])
        ys.append(row[y])
    return lines


def _sizes(axes: Axes, kib: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(kib, [f"{n} KiB" if n < 1024 else f"{n >> 10} MiB" for n in kib])
    axes.minorticks_off()
    axes.set_xlabel("float32 input")


def throughput(axes: Axes, speed: dict) -> None:
    """GB/s by size."""
    rows = [row | {"kib": row["mib"] << 10} for row in speed["throughput"]]
    for case, (xs, ys) in _by_case(rows, "kib", "gb_s").items():
        ours = case.startswith("shmquant")
        axes.plot(xs, ys, marker="o" if ours else ".", linestyle="-" if ours else ":", label=case)
    _sizes(axes, sorted({row["kib"] for row in rows}))
    axes.set_ylabel("GB/s of input")
    axes.set_yscale("log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def latency(axes: Axes, speed: dict) -> None:
    """Time of one request by size."""
    for case, (xs, ys) in _by_case(speed["by_size"], "kib", "p50_us").items():
        axes.plot(xs, ys, marker="o" if case.startswith("shmquant") else ".", label=case)
    _sizes(axes, sorted({row["kib"] for row in speed["by_size"]}))
    axes.set_ylabel("µs, median")
    axes.set_yscale("log")
    axes.legend()


def scaling(axes: Axes, clients: dict) -> None:
    """Throughput of all by the number of clients."""
    rows = clients["throughput"]
    counts = [row["clients"] for row in rows]
    axes.plot(counts, [row["of_one"] for row in rows], marker="o", label="all of them")
    axes.axhline(0.95, linestyle=":", color="grey", label="0.95 of one")
    axes.set_xticks(counts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("client processes")
    axes.set_ylabel("throughput, one client = 1")
    axes.legend(loc="lower right")


def cold(axes: Axes, results: dict) -> None:
    """The first result beside those after it."""
    rows = results["cold"]
    at = range(len(rows))
    axes.bar([i - 0.2 for i in at], [row["cold_ms"] for row in rows], 0.4, label="first of a new daemon")
    axes.bar([i + 0.2 for i in at], [row["warm_ms"] for row in rows], 0.4, label="later ones")
    axes.set_xticks(list(at), [f"{row['mib']} MiB\n{row['case']}" for row in rows])
    axes.set_ylabel("ms, median")
    axes.set_yscale("log")
    axes.legend()


#: File, part that it shows, how.
PLOTS = (
    ("throughput", "speed", throughput),
    ("latency", "speed", latency),
    ("clients", "clients", scaling),
    ("cold", "cold", cold),
)


def draw(results: dict[str, dict], folder: Path) -> None:
    """Draw what the measured parts have to show."""
    for name, part, plot in PLOTS:
        if part not in results:
            continue
        figure, axes = pyplot.subplots(figsize=(8.5, 4), layout="constrained")
        plot(axes, results[part])
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)
