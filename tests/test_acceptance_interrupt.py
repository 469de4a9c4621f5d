"""Ctrl-C in the middle of a long call: KeyboardInterrupt, and the daemon has everything back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from children import Child
from daemons import eventually
from processes import MIB
from shmquant import ShmQuantizer

# Zeros that were never written are one page of the kernel's: 4 GiB cross twice and cost nothing here.
WORK = """
import json, sys
import numpy as np
from shmquant import ShmQuantizer

q = ShmQuantizer(sys.argv[1])
way = sys.argv[2]
x = np.zeros((1 << 20, 1024), np.float32)
small = q.quantize(x[:10]).codes("vector").copy()
said = []

def tell(done, of):
    if not said and 0 < done < of:
        said.append(done)
        print(json.dumps("on its way"), flush=True)

try:
    if way == "layers":
        q.quantize({"a": x, "b": x}, "uint2", granularity="tensor", progress=tell, timeout=None)
    else:
        name = "never" if way == "published" else None
        q.quantize(x, "uint2", granularity="tensor", progress=tell, timeout=None, name=name)
except KeyboardInterrupt:
    again = q.quantize(x[:10]).codes("vector")
    print(json.dumps(["interrupted", len(q.results()), bool((again == small).all())]), flush=True)
    sys.stdin.read()
else:
    print(json.dumps("it came to its end"), flush=True)
"""


@pytest.mark.parametrize("way", ["vectors", "layers", "published"])
def test_an_interrupt_ends_a_long_call_on_both_sides(serve, way):
    daemon = serve("--budget", "1GiB")
    q = ShmQuantizer(daemon.address)

    def counted() -> dict[str, object]:
        return json.loads(q._client.stat())

    with Child(WORK, daemon.address, way) as child:
        assert child.answer() == "on its way"

        # The first values may be on their way before the daemon has looked at the request.
        def taken() -> bool:
            stat = counted()
            used = stat["bytes_by_use"]
            return used["growing"] + used["filling"] >= 256 * MIB and stat["jobs"] == 1

        eventually(taken)
        os.kill(child.pid, signal.SIGINT)
        assert child.answer() == ["interrupted", 1, True]
        # The job is gone while the session lives on, its small result held.
        eventually(lambda: counted()["jobs"] == 0 and counted()["bytes_by_use"]["filling"] == 0)
        assert counted()["leases"] == 1 and counted()["bytes_by_use"]["datasets"] == 0
        assert q.list() == []
        # Half the budget was promised to the interrupted call; all of it can be had again.
        assert child.end() == 0
    eventually(lambda: counted()["sessions"] == 1 and counted()["segments"] == 0)
    eventually(lambda: counted()["bytes"] == 0)
    assert counted()["leases"] == counted()["waiting"] == counted()["runs"] == 0


def test_an_interrupted_command_leaves_nothing(serve, tmp_path):
    """`shmquant quantize` is ended by the signal itself; the daemon cleans up after its process."""
    daemon = serve()
    q = ShmQuantizer(daemon.address)

    def counted(name: str) -> int:
        return json.loads(q._client.stat())[name]

    folder = tmp_path / "files"
    folder.mkdir()
    save_file({"w": np.zeros((1 << 17, 1024), np.float32)}, folder / "in.safetensors")
    command = [sys.executable, "-c", "from shmquant._cli import main; main()", "quantize"]
    command += ["in.safetensors", "out.arrow", "--scheme", "uint4", "--address", daemon.address]
    before = counted("requests")
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        eventually(lambda: counted("jobs") == 1 or counted("requests") > before or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 0), output
    eventually(lambda: counted("sessions") == 1 and counted("bytes") == 0 and counted("jobs") == 0)
    # Whole or not at all, and nothing beside it.
    files = {path.name for path in folder.iterdir()}
    if process.returncode == 0:
        assert files == {"in.safetensors", "out.arrow"}
        assert pa.ipc.open_file(str(folder / "out.arrow")).read_all().num_rows == 1
    else:
        assert files == {"in.safetensors"}
