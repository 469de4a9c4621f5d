"""What users would otherwise run or send over: each peer is a function of one float32 matrix."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight


def numpy_int8_rows(x: np.ndarray) -> Callable[[], None]:
    """Symmetric int8 per row in plain numpy: what a notebook does."""

    def run() -> None:
        scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        np.rint(x / scale).astype(np.int8)

    return run


def onnxruntime_dynamic(x: np.ndarray, threads: int) -> Callable[[], object]:
    """``DynamicQuantizeLinear`` (uint8, one range for the tensor) on onnxruntime's CPU provider."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])],
        "q",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])],
        [
            helper.make_tensor_value_info("y", TensorProto.UINT8, [None, None]),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("z", TensorProto.UINT8, []),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # Bound to memory that is reused, so that the peer pays no first touch either.
    binding = session.io_binding()
    out = np.zeros(x.shape, dtype=np.uint8)
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.uint8, out.shape, out.ctypes.data)
    binding.bind_output("s", "cpu")
    binding.bind_output("z", "cpu")

    def run() -> tuple[np.ndarray, np.ndarray]:
        session.run_with_iobinding(binding)
        # The binding knows addresses only: input and output must live as long as this function.
        return x, out

    return run


def gguf_q8_0(x: np.ndarray) -> Callable[[], None]:
    """gguf-py's Q8_0 blocks (numpy inside)."""
    from gguf import GGMLQuantizationType, quants

    return lambda: quants.quantize(x, GGMLQuantizationType.Q8_0)


class FlightPeer:
    """Arrow Flight between processes: the table goes over, a quarter of it comes back; no arithmetic."""

    def __init__(self, x: np.ndarray) -> None:
        rows, dim = x.shape
        self.table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), dim)})
        here, there = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=serve_flight, args=(there, rows, dim)
        )
        self.process.start()
        self.client = flight.connect(f"grpc+tcp://127.0.0.1:{here.recv()}")

    def __call__(self) -> None:
        writer, reader = self.client.do_exchange(flight.FlightDescriptor.for_command(b"q"))
        writer.begin(self.table.schema)
        # Batches as large as gRPC takes without complaint.
        writer.write_table(
            self.table, max_chunksize=max(1, (64 << 20) // (4 * self.table["x"].type.list_size))
        )
        writer.done_writing()
        reader.read_all()
        writer.close()

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.join()


def serve_flight(pipe, rows: int, dim: int) -> None:
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
