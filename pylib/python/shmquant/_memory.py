"""Memory for input that the daemon reads where it lies."""

from __future__ import annotations

import gc
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from . import _native
from ._errors import NoRoomError, invalid
from ._input import FLOATS
from ._optional import need
from ._options import timeout_seconds
from ._scheme import spelled

if TYPE_CHECKING:
    import numpy as np

_TIMEOUT = 30.0
_ALIGN = 64
_MOST = (1 << 63) - 1

T = TypeVar("T")


class InputTable:
    """Columns of floats to be written and quantized; made by :meth:`ShmQuantizer.allocate`.

    ``columns["name"]`` is a writable numpy array, ``columns.table`` a pyarrow table over the same memory.

    Attributes
    ----------
    schema : pyarrow.Schema
        The schema of :attr:`table`.
    num_rows : int
        Its rows.
    """

    def __init__(self, schema: pa.Schema, num_rows: int, columns: dict[str, np.ndarray[Any, Any]]) -> None:
        self.schema = schema
        self.num_rows = num_rows
        self._columns = columns

    def __getitem__(self, column: str) -> np.ndarray[Any, Any]:
        """The values of one column: (rows,), or (rows, width) for vectors."""
        try:
            return self._columns[column]
        except KeyError:
            raise KeyError(f"no column {column!r} among {', '.join(self._columns)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def table(self) -> pa.Table:
        """The columns as a pyarrow table, over the same memory: it shows what is written."""
        arrays = []
        for field in self.schema:
            values = self._columns[field.name]
            flat = _floats(field).to_pandas_dtype()
            array = pa.Array.from_buffers(
                pa.from_numpy_dtype(flat), values.size, [None, pa.py_buffer(values.reshape(-1).view("u1"))]
            )
            if pa.types.is_fixed_size_list(field.type):
                array = pa.FixedSizeListArray.from_arrays(array, type=field.type)
            arrays.append(array)
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def __repr__(self) -> str:
        return f"InputTable({self.num_rows} rows of {', '.join(self._columns)})"


class Allocator:
    """The part of :class:`ShmQuantizer` that asks for memory."""

    @property
    def _client(self) -> _native.Client:
        raise NotImplementedError

    def _with_holdings(self, error: NoRoomError) -> NoRoomError:
        raise NotImplementedError

    @spelled
    def empty(
        self, shape: int | Sequence[int], dtype: Any = "float32", *, timeout: float | None = _TIMEOUT
    ) -> np.ndarray[Any, Any]:
        """Make a numpy array in memory that the daemon reads where it lies.

        :meth:`quantize` copies nothing of it: not of the array, its slices of whole rows, nor of an Arrow
        table or a state dict made from them. The memory is given back when the last view of it is gone.

        Parameters
        ----------
        shape : int or sequence of int
            Its shape.
        dtype : str or numpy.dtype
            float16, float32 or float64; bfloat16 where ml_dtypes is installed.
        timeout : float, optional
            Seconds to wait for the memory; None for no limit.

        Returns
        -------
        numpy.ndarray
            Writable, aligned to 64 bytes. It holds zeros, or what earlier arrays of this process left there.

        Raises
        ------
        InvalidInputError
            Another dtype, a negative size.
        NoRoomError
            No memory within `timeout`, or only this process could free it.

        Notes
        -----
        Each array is a segment of its own, of 64 KiB at least: made for large ones. A child made by ``fork``
        shares the memory with its parent and copies it when it quantizes.

        Examples
        --------
        >>> from shmquant import ShmQuantizer
        >>> q = ShmQuantizer(address="inproc:")
        >>> x = q.empty((1000, 64))
        >>> x[:] = 1.0
        >>> q.quantize(x[100:200]).bytes_copied
        0
        """
        np = need("numpy", "empty()")
        sizes = _shape(shape)
        kind = _dtype(np, dtype)
        count = math.prod(sizes)
        if count == 0:
            return np.empty(sizes, kind)
        memory = self._input(count * kind.itemsize, timeout)
        return np.frombuffer(memory, "u1").view(kind).reshape(sizes)

    @spelled
    def allocate(self, schema: Any, rows: int, *, timeout: float | None = _TIMEOUT) -> InputTable:
        """Make columns of floats in memory that the daemon reads where it lies, as :meth:`empty` does.

        Parameters
        ----------
        schema : pyarrow.Schema
            Its columns: float16, float32, float64, or fixed_size_list of these.
        rows : int
            Their length.
        timeout : float, optional
            Seconds to wait for the memory; None for no limit.

        Returns
        -------
        InputTable
            ``["column"]`` is a writable numpy array, ``.table`` a pyarrow table over the same memory.

        Raises
        ------
        InvalidInputError
            A column of another type, or of a name that there is twice.
        NoRoomError
            No memory within `timeout`, or only this process could free it.

        Examples
        --------
        >>> import pyarrow as pa
        >>> from shmquant import ShmQuantizer
        >>> q = ShmQuantizer(address="inproc:")
        >>> t = q.allocate(pa.schema({"emb": pa.list_(pa.float32(), 64), "price": pa.float64()}), 100)
        >>> t["emb"][:] = 1.0
        >>> t["price"][:] = 2.0
        >>> q.quantize(t.table, columns=["emb", "price"]).bytes_copied
        0
        """
        np = need("numpy", "allocate()")
        schema = pa.schema(schema)
        (count,) = _shape(rows)
        places = []
        at = 0
        for field in schema:
            if schema.get_field_index(field.name) < 0:
                raise invalid(f"there is more than one column {field.name!r}", "rename one of them")
            kind = _dtype(np, _floats(field).to_pandas_dtype())
            vectors = pa.types.is_fixed_size_list(field.type)
            sizes = (count, field.type.list_size) if vectors else (count,)
            places.append((field.name, kind, sizes, at))
            at += -(-math.prod(sizes) * kind.itemsize // _ALIGN) * _ALIGN
        memory = np.frombuffer(self._input(at, timeout), "u1") if at else np.empty(0, "u1")
        columns = {
            name: memory[at : at + math.prod(sizes) * kind.itemsize].view(kind).reshape(sizes)
            for name, kind, sizes, at in places
        }
        return InputTable(schema, count, columns)

    @spelled
    def warm(self, nbytes: int, *, timeout: float | None = _TIMEOUT) -> None:
        """Have memory made ready for a result of up to `nbytes` bytes.

        The next result of this process that takes between half of it and all of it is written there, without
        the page faults of new memory. What is not used goes as other idle memory goes, after some time.

        Parameters
        ----------
        nbytes : int
            Bytes of the result; see :attr:`QuantizedTable.nbytes`.
        timeout : float, optional
            Seconds to wait for the memory; None for no limit.

        Raises
        ------
        NoRoomError
            No memory within `timeout`, or more than a session may keep idle.

        Examples
        --------
        >>> from shmquant import ShmQuantizer
        >>> ShmQuantizer(address="inproc:").warm(1 << 20)
        """
        (size,) = _shape(nbytes)
        if size:
            self._retried(lambda seconds: self._client.warm(size, timeout=seconds), timeout)

    def _input(self, nbytes: int, timeout: float | None) -> _native.InputMemory:
        if nbytes > _MOST:
            raise invalid(f"an array of {nbytes} bytes is more than any memory")
        return self._retried(lambda seconds: self._client.allocate(nbytes, timeout=seconds), timeout)

    def _retried(self, call: Callable[[float | None], T], timeout: float | None) -> T:
        """Call with the seconds that are left, once more after a shortage that garbage may have caused."""
        seconds = timeout_seconds(timeout)
        started = time.monotonic()
        try:
            return call(seconds)
        except NoRoomError:
            # Results in reference cycles hold memory until they are collected.
            gc.collect()
            left = None if seconds is None else max(0.0, started + seconds - time.monotonic())
            try:
                return call(left)
            except NoRoomError as error:
                raise self._with_holdings(error) from None


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    given = shape if isinstance(shape, (tuple, list)) else (shape,)
    try:
        sizes = tuple(operator.index(size) for size in given)
    except TypeError:
        raise invalid(f"{shape!r} is not a whole number, nor a sequence of them") from None
    if any(not 0 <= size <= _MOST for size in sizes):
        raise invalid(f"{shape!r} has a size that is negative or too large")
    return sizes


def _dtype(np: Any, dtype: Any) -> Any:
    if dtype == "bfloat16":
        dtype = need("ml_dtypes", "dtype bfloat16").bfloat16
    try:
        kind = np.dtype(dtype)
    except TypeError:
        raise invalid(f"dtype {dtype!r} is not known", f"use one of {', '.join(FLOATS)}") from None
    if kind.name not in FLOATS or not kind.isnative:
        raise invalid(f"an array of {kind.name} cannot be quantized", f"use one of {', '.join(FLOATS)}")
    return kind


def _floats(field: pa.Field) -> pa.DataType:
    """The float type of a column or of its vectors."""
    kind = field.type.value_type if pa.types.is_fixed_size_list(field.type) else field.type
    if not pa.types.is_floating(kind):
        error = invalid(
            f"column {field.name!r} has type {field.type}: neither floats nor vectors of them",
            "allocate float16, float32, float64 or fixed_size_list of these; add other columns to .table",
        )
        error.column = field.name
        raise error
    return kind
