"""What users would otherwise run in their own process: each peer is a function of one float32 matrix."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np


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


def faiss_sq8(x: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    """faiss' 8-bit scalar quantizer, a range for each dimension: training and codes."""
    import faiss

    faiss.omp_set_num_threads(threads)
    quantizer = faiss.ScalarQuantizer(x.shape[1], faiss.ScalarQuantizer.QT_8bit)

    def run() -> np.ndarray:
        quantizer.train(x)
        return quantizer.compute_codes(x)

    return run


def torch_int8_rows(x: np.ndarray, threads: int, compiled: bool) -> Callable[[], object]:
    """Symmetric int8 per row in torch, as it is written or compiled."""
    import torch

    torch.set_num_threads(threads)
    values = torch.from_numpy(x)

    def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = values.abs().amax(dim=1, keepdim=True) / 127
        return torch.round(values / scale).to(torch.int8), scale

    function = torch.compile(quantize) if compiled else quantize
    return lambda: function(values)


def of_this_machine(x: np.ndarray, threads: int) -> dict[str, Callable[[], object]]:
    """All that is installed, by name."""
    wanted: dict[str, Callable[[], Callable[[], object]]] = {
        "onnxruntime DynamicQuantizeLinear": lambda: onnxruntime_dynamic(x, threads),
        "faiss SQ 8 bit, train and encode": lambda: faiss_sq8(x, threads),
        "torch int8 row": lambda: torch_int8_rows(x, threads, compiled=False),
        "torch.compile int8 row": lambda: torch_int8_rows(x, threads, compiled=True),
        "numpy int8 row": lambda: numpy_int8_rows(x),
        "gguf-py Q8_0": lambda: gguf_q8_0(x),
    }
    found = {}
    for name, make in wanted.items():
        try:
            found[name] = make()
        except ImportError as missing:
            print(f"{name}: not compared, {missing}", file=sys.stderr)
    return found
