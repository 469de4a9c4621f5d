"""What the kernel says of processes: memory, mappings, faults, bytes read."""

from __future__ import annotations

import re
from pathlib import Path

MIB = 1 << 20


def status(pid: int | str = "self") -> dict[str, int]:
    """Bytes of `VmHWM`, `RssAnon`, `RssShmem` and their like."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def reset_peak(pid: int | str = "self") -> None:
    """Let `VmHWM` count from here."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def minor_faults(pid: int | str = "self") -> int:
    """Page faults served without a disk, of all threads."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def bytes_read(pid: int | str = "self") -> int:
    """Bytes that all calls of `read` and its like have given."""
    return int(re.search(r"^rchar: (\d+)$", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE).group(1))


def mappings(pid: int | str = "self") -> list[str]:
    """The lines of `maps`, without addresses: what is mapped, not where."""
    return [line.split(maxsplit=1)[1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]


def segments(pid: int | str = "self") -> list[str]:
    """The shared segments that a process has mapped, each as often as it has."""
    return re.findall(r"shmquant\.[0-9a-f]+\.\w+\.\d+", "\n".join(mappings(pid)))


def share(pid: int | str, segment: str) -> int:
    """A process's proportional share (PSS) of the resident memory of a segment, in bytes."""
    shared = 0
    inside = False
    with open(f"/proc/{pid}/smaps") as smaps:
        for line in smaps:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = re.search(re.escape(segment) + r"(?!\d)", line) is not None
            elif inside and line.startswith("Pss:"):
                shared += int(line.split()[1]) << 10
    return shared
