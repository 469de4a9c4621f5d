"""Other ways to another process: a matrix goes over, a quarter of it comes back; no arithmetic.

Each is called with nothing, takes one round trip, and has to be closed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from multiprocessing import shared_memory
from multiprocessing.connection import Connection

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

_SPAWN = multiprocessing.get_context("spawn")


class Flight:
    """Arrow Flight over the loopback."""

    def __init__(self, x: np.ndarray) -> None:
        rows, dim = x.shape
        self._table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), dim)})
        # Batches as large as gRPC takes without complaint.
        self._rows = max(1, (64 << 20) // (4 * dim))
        here, there = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve_flight, args=(there, rows, dim))
        self._process.start()
        self._client = flight.connect(f"grpc+tcp://127.0.0.1:{here.recv()}")

    def __call__(self) -> None:
        writer, reader = self._client.do_exchange(flight.FlightDescriptor.for_command(b"q"))
        writer.begin(self._table.schema)
        writer.write_table(self._table, max_chunksize=self._rows)
        writer.done_writing()
        reader.read_all()
        writer.close()

    def close(self) -> None:
        """End the server."""
        self._client.close()
        self._process.kill()
        self._process.join()


def _serve_flight(pipe: Connection, rows: int, dim: int) -> None:
    """Receive everything, answer with int8 vectors of the same shape that exist already."""
    answer = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * dim, np.int8)), dim)})

    class Server(flight.FlightServerBase):
        def do_exchange(self, context, descriptor, reader, writer) -> None:
            reader.read_all()
            writer.begin(answer.schema)
            writer.write_table(answer, max_chunksize=max(1, (64 << 20) // dim))

    server = Server("grpc+tcp://127.0.0.1:0")
    pipe.send(server.port)
    server.serve()


class SharedMemory:
    """``multiprocessing.shared_memory`` by hand: two blocks that stay, and a pipe to say when."""

    def __init__(self, x: np.ndarray) -> None:
        self._x = x.reshape(-1)
        self._block = shared_memory.SharedMemory(create=True, size=x.nbytes + x.nbytes // 4)
        self._there = np.frombuffer(self._block.buf, np.float32, x.size)
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve_shared_memory, args=(theirs, self._block.name, x.size))
        self._process.start()
        self._pipe.recv()

    def __call__(self) -> None:
        np.copyto(self._there, self._x)
        self._pipe.send_bytes(b"go")
        self._pipe.recv_bytes()

    def close(self) -> None:
        """End the other process, remove the block."""
        self._pipe.send_bytes(b"")
        self._process.join()
        self._there = None
        self._block.close()
        self._block.unlink()


def _serve_shared_memory(pipe: Connection, name: str, size: int) -> None:
    block = shared_memory.SharedMemory(name=name)
    answer = np.frombuffer(block.buf, np.uint8, size, offset=4 * size)
    values = np.zeros(size, np.uint8)
    pipe.send("ready")
    while pipe.recv_bytes():
        np.copyto(answer, values)
        pipe.send_bytes(b"done")
    del answer
    block.close()


class Iceoryx2:
    """iceoryx2, publish and subscribe both ways, both ends polling, but only while it is its turn."""

    def __init__(self, x: np.ndarray) -> None:
        self._x = x.reshape(-1).view(np.uint8)
        self._name = f"shmquant-bench-{os.getpid()}-{id(self)}"
        self._node, self._publisher, self._subscriber = _iceoryx2_ends(self._name, "to", "from", x.nbytes)
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve_iceoryx2, args=(theirs, self._name, x.nbytes))
        self._process.start()
        self._pipe.recv()
        self._publisher.update_connections()

    def begin(self) -> None:
        """Let the other end poll."""
        self._pipe.send("poll")
        self._pipe.recv()

    def end(self) -> None:
        """Let it sleep."""
        _iceoryx2_send(self._publisher, self._x[:1])

    def __call__(self) -> None:
        _iceoryx2_send(self._publisher, self._x)
        while (sample := self._subscriber.receive()) is None:
            pass
        sample.delete()

    def close(self) -> None:
        """End the other process."""
        self._pipe.send("end")
        self._process.join()
        self._publisher.delete()
        self._subscriber.delete()
        # What it leaves in /dev/shm otherwise.
        self._node = None


def _iceoryx2_ends(name: str, out: str, back: str, nbytes: int) -> tuple:
    """A node, a publisher of one service and a subscriber of another."""
    import iceoryx2

    iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
    node = iceoryx2.NodeBuilder.new().create(iceoryx2.ServiceType.Ipc)

    def service(which: str):
        named = node.service_builder(iceoryx2.ServiceName.new(f"{name}/{which}"))
        return named.publish_subscribe(iceoryx2.Slice[ctypes.c_uint8]).open_or_create()

    publisher = service(out).publisher_builder().initial_max_slice_len(nbytes).create()
    return node, publisher, service(back).subscriber_builder().create()


def _iceoryx2_send(publisher, data: np.ndarray) -> None:
    sample = publisher.loan_slice_uninit(data.nbytes)
    ctypes.memmove(sample.payload_ptr, data.ctypes.data, data.nbytes)
    sample.assume_init().send()


def _serve_iceoryx2(pipe: Connection, name: str, nbytes: int) -> None:
    node, publisher, subscriber = _iceoryx2_ends(name, "from", "to", nbytes // 4)
    answer = np.zeros(nbytes // 4, np.uint8)
    pipe.send("ready")
    while pipe.recv() == "poll":
        pipe.send("polling")
        while True:
            sample = subscriber.receive()
            if sample is None:
                continue
            size = sample.payload().len()
            sample.delete()
            if size != nbytes:
                break
            _iceoryx2_send(publisher, answer)
    publisher.delete()
    subscriber.delete()
    del node


# Of iceoryx2 only what fits several times: it keeps so many samples of the largest size.
_MOST = {"iceoryx2, both ends polling": 512 << 20}


def of_this_machine(x: np.ndarray) -> dict[str, Flight | SharedMemory | Iceoryx2]:
    """All that is installed, by name."""
    wanted = {
        "Arrow Flight": Flight,
        "multiprocessing.shared_memory by hand": SharedMemory,
        "iceoryx2, both ends polling": Iceoryx2,
    }
    found = {}
    for name, kind in wanted.items():
        if x.nbytes > _MOST.get(name, x.nbytes):
            continue
        try:
            found[name] = kind(x)
        except ImportError as missing:
            print(f"{name}: not compared, {missing}", file=sys.stderr)
    return found
