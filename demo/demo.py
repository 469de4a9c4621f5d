"""The main job on real weights: quantize a model, publish it, let four processes read one copy.

Run by ``make demo``; ``SHMQUANT_WEIGHTS`` names the safetensors file of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from shmquant import ShmQuantizer

READERS = 4
NAME = "minilm/u4"


def main() -> None:
    weights = Path(os.environ["SHMQUANT_WEIGHTS"])
    with tempfile.TemporaryDirectory(prefix="shmquant-demo-") as folder:
        bf16 = Path(folder) / "model-bf16.safetensors"
        layers = {k: v for k, v in load_file(weights).items() if v.dtype == np.float32}
        save_file({k: v.astype(ml_dtypes.bfloat16) for k, v in layers.items()}, bf16)

        # A daemon of the demo's own, started by the first call and gone soon after the last.
        address = str(Path(folder) / "daemon.sock")
        q = ShmQuantizer(address=address)
        print(f"{weights.name}: {len(layers)} float layers, {mib(sum(v.nbytes for v in layers.values()))}\n")
        for source in (weights, bf16):
            for scheme in ("int8", "uint4"):
                show(q, source, scheme)
        share(q, weights, address)
        subprocess.run([*shmquant(), "stop", "--force", "--address", address], check=True)


def show(q: ShmQuantizer, path: Path, scheme: str) -> None:
    """Quantize one file, print the layers and the totals."""
    group = {"group_size": 128} if scheme == "uint4" else {"granularity": "group", "group_size": 128}
    with q.quantize_file(path, scheme=scheme, metrics=True, **group) as r:
        table = r.table.select(["layer_name", "shape", "quantized_data", "src_dtype", "metrics"])
        rows = [
            (name, shape, len(data), metrics["sqnr_db"])
            for name, shape, data, metrics in zip(
                table["layer_name"].to_pylist(),
                table["shape"].to_pylist(),
                table["quantized_data"].to_pylist(),
                table["metrics"].to_pylist(),
                strict=True,
            )
        ]
        nbytes, source = r.nbytes, table["src_dtype"][0].as_py()
        del table
    width = {"float32": 4, "bfloat16": 2}[source]
    total = sum(int(np.prod(shape)) for _, shape, _, _ in rows) * width
    # Once more without metrics: what a user's second call costs, from the same segment.
    times = []
    for _ in range(5):
        start = time.perf_counter()
        q.quantize_file(path, scheme=scheme, **group).release()
        times.append(time.perf_counter() - start)
    seconds = sorted(times)[2]
    worst = sorted(rows, key=lambda row: row[3] if row[3] is not None else np.inf)
    print(f"{path.name} -> {scheme}, group 128, from {source}")
    for name, shape, data, sqnr in [*sorted(rows, key=lambda row: -row[2])[:4], worst[0]]:
        note = "  (lowest SQNR)" if (name, shape, data, sqnr) == worst[0] else ""
        text = "-" if sqnr is None else f"{sqnr:6.2f} dB"
        print(f"  {name:<52} {'x'.join(map(str, shape)):>12} {kib(data):>12}  {text}{note}")
    mean = np.mean([row[3] for row in rows if row[3] is not None and np.isfinite(row[3])])
    print(
        f"  {len(rows)} layers, {mib(total)} in, {mib(nbytes)} out, mean SQNR {mean:.2f} dB, "
        f"{seconds * 1e3:.1f} ms, {total / seconds / 1e9:.2f} GB/s\n"
    )


def share(q: ShmQuantizer, path: Path, address: str) -> None:
    """Publish, let other processes open it by name, and add up what all of them cost."""
    r = q.quantize_file(path, scheme="uint4", group_size=128, name=NAME)
    expected = checksum(r)
    command = [sys.executable, __file__, "--read", address]
    readers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(READERS)
    ]
    answers = [json.loads(reader.stdout.readline()) for reader in readers]
    # All hold the dataset now; each counts its share while the others still do.
    for reader in readers:
        print(file=reader.stdin, flush=True)
    pss = [json.loads(reader.stdout.readline()) for reader in readers]
    own = segment_pss(os.getpid(), r)
    pid = json.loads(
        subprocess.run(
            [*shmquant(), "status", "--json", "--address", address],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )["pid"]
    daemon = segment_pss(pid, r)
    for reader in readers:
        reader.communicate("\n")
    total = sum(pss) + own + daemon
    print(f"published as {NAME!r}: {mib(r.nbytes)}")
    for reader, answer, share_of in zip(readers, answers, pss, strict=True):
        same = "same bytes" if answer["checksum"] == expected else "OTHER BYTES"
        print(
            f"  process {reader.pid}: opened in {answer['ms']:.2f} ms, "
            f"{answer['layers']} layers, {same}, PSS {mib(share_of)}"
        )
    print(
        f"  this process {mib(own)}, the daemon {mib(daemon)}: together {mib(total)} "
        f"= {total / r.nbytes:.2f} copies"
    )
    if any(answer["checksum"] != expected for answer in answers) or total > 1.05 * r.nbytes + (1 << 16):
        sys.exit("the readers do not share one unchanged copy")


def read(address: str) -> None:
    """A reader: open by name, report, stay until told."""
    q = ShmQuantizer(address=address)
    start = time.perf_counter()
    r = q.open(NAME)
    table = r.table
    took = time.perf_counter() - start
    print(json.dumps({"ms": took * 1e3, "layers": table.num_rows, "checksum": checksum(r)}), flush=True)
    sys.stdin.readline()
    print(segment_pss(os.getpid(), r), flush=True)
    sys.stdin.readline()


def checksum(r) -> int:
    """Sum of all bytes of the codes; reads every page."""
    column = r.table["quantized_data"].chunk(0)
    return int(np.frombuffer(column.buffers()[2], dtype=np.uint8).sum(dtype=np.uint64))


def segment_pss(pid: int, r) -> int:
    """Proportional set size, in bytes, of the result's segment in one process (/proc/PID/smaps)."""
    name = re.compile(re.escape(r.segment_name) + r"(?![0-9])")
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            inside = name.search(line) is not None
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


def shmquant() -> list[str]:
    """The command that the wheel installed beside this interpreter."""
    return [str(Path(sys.executable).with_name("shmquant"))]


def mib(n: float) -> str:
    return f"{n / (1 << 20):.2f} MiB"


def kib(n: float) -> str:
    return f"{n / 1024:.1f} KiB"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(sys.argv[2])
    else:
        main()
