"""What callers hand in, brought into the two forms that the extension takes.

Those are an Arrow table, and named tensors.

Nothing is copied where the memory can be used as it lies: only strided, big-endian and non-CPU tensors, and
bfloat16 matrices (Arrow has no such type), are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ._errors import InvalidInputError, invalid
from ._optional import need

#: The column that a bare (n, D) array becomes.
VECTOR_COLUMN = "vector"

FLOATS = ("float16", "bfloat16", "float32", "float64")
_KINDS = (
    "pass an Arrow table (pyarrow, polars, duckdb, pandas, nanoarrow: anything with __arrow_c_stream__ or "
    "__arrow_c_array__), a numpy array of shape (n, D), or a dict of arrays or tensors"
)


@dataclass(frozen=True)
class Tensor:
    """One layer: its bytes in row-major order behind the buffer protocol."""

    name: str
    data: Any
    dtype: str
    shape: tuple[int, ...]


def read(data: Any) -> pa.Table | list[Tensor]:
    """Bring `data` into one of the two forms.

    Raises
    ------
    InvalidInputError
        If it is none of the kinds that are taken.
    """
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, Mapping):
        if not data:
            raise invalid(
                "nothing to quantize in an empty dict", "a dict is a state dict: {layer name: array}"
            )
        return [_tensor(name, value) for name, value in data.items()]
    if isinstance(data, pa.RecordBatch):
        return pa.Table.from_batches([data])
    if hasattr(data, "__arrow_c_stream__"):
        return _read_stream(data)
    if hasattr(data, "__arrow_c_array__"):
        try:
            return pa.Table.from_batches([pa.record_batch(data)])
        except (TypeError, pa.ArrowInvalid) as error:
            raise _not_a_table(data) from error
    if _is_torch(data) or hasattr(data, "__array__"):
        return _matrix(data)
    raise invalid(f"data of type {_name(data)} cannot be quantized", _KINDS)


def _read_stream(data: Any) -> pa.Table:
    try:
        return pa.RecordBatchReader.from_stream(data).read_all()
    except (TypeError, pa.ArrowInvalid) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise _not_a_table(data) from error


def _not_a_table(data: Any) -> InvalidInputError:
    return invalid(
        f"{_name(data)} is Arrow data, but no table (a struct without nulls at its top)",
        "give the column a name: pa.table({'emb': data})",
    )


def _matrix(data: Any) -> pa.Table:
    np = need("numpy", "an array as input")
    if _is_torch(data):
        cpu = data.detach().cpu()
        # Arrow and numpy have no bfloat16; widening is exact.
        array = (cpu.float() if str(cpu.dtype) == "torch.bfloat16" else cpu).numpy()
    else:
        array = np.asarray(data)
    if array.ndim != 2:
        raise invalid(
            f"an array of shape {array.shape} is not a matrix of vectors (n, D)",
            'reshape it to (n, D), or name it as a layer: {"w": array}',
        )
    if array.dtype.name not in FLOATS:
        raise invalid(
            f"an array of {array.dtype.name} cannot be quantized", f"use one of {', '.join(FLOATS)}"
        )
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    rows, dim = array.shape
    if dim == 0:
        raise invalid(f"an array of shape {array.shape} has vectors without elements")
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(-1)
    values = pa.Array.from_buffers(
        pa.from_numpy_dtype(flat.dtype), flat.size, [None, pa.py_buffer(flat.view(np.uint8))]
    )
    column = pa.FixedSizeListArray.from_arrays(values, dim)
    assert len(column) == rows
    return pa.table({VECTOR_COLUMN: column})


def _tensor(name: Any, value: Any) -> Tensor:
    if not isinstance(name, str):
        raise invalid(f"layer name {name!r} is a {_name(name)}, not a string")
    if _is_torch(value):
        torch = sys.modules["torch"]
        cpu = value.detach().cpu().contiguous()
        dtype = str(cpu.dtype).removeprefix("torch.")
        _check_float(name, dtype)
        return Tensor(name, cpu.reshape(-1).view(torch.uint8).numpy(), dtype, tuple(cpu.shape))
    if not hasattr(value, "__array__") and not hasattr(value, "__array_interface__"):
        raise invalid(
            f"layer {name!r} is a {_name(value)}, not an array or tensor",
            "a dict is a state dict: {layer name: array}",
        )
    np = need("numpy", "a dict of arrays")
    array = np.asarray(value)
    _check_float(name, array.dtype.name)
    shape = array.shape
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(-1)
    # As bytes, since ml_dtypes' bfloat16 does not come through the buffer protocol.
    return Tensor(name, flat.view(np.uint8), array.dtype.name, shape)


def _check_float(name: str, dtype: str) -> None:
    if dtype not in FLOATS:
        raise invalid(
            f"layer {name!r} is {dtype}: only {', '.join(FLOATS)} can be quantized",
            "leave it out of the dict, or convert it",
        )


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
