"""What `quantize` gives back: a table whose memory is shared."""

from __future__ import annotations

import itertools
import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from . import _native, _session
from ._decode import dequantize
from ._errors import DaemonError, invalid, not_found
from ._layer import Layer
from ._optional import need

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    import torch

    from ._params import Params
    from ._scheme import FloatType

_CODES_KEY = b"ARROW:extension:metadata"
_CODES_NAME = (b"ARROW:extension:name", b"shmquant.codes")


_alive: weakref.WeakSet[QuantizedTable] = weakref.WeakSet()


class ItemStats(NamedTuple):
    """What happened to the values of one column or layer."""

    #: Values in all.
    n: int
    #: Values outside the given parameters' range.
    n_clipped: int
    #: NaN and infinities (``on_nonfinite`` other than "error").
    n_nonfinite: int
    #: Domains whose values are all (nearly) zero: their scale is 1.
    n_degenerate_groups: int
    #: Rows that became null (``on_nonfinite="null"``).
    n_nulled: int
    #: Mean squared error; None unless ``metrics=True``.
    mse: float | None
    #: Signal to quantization noise, in dB; None unless ``metrics=True``, infinite without error.
    sqnr_db: float | None
    #: Largest absolute error; None unless ``metrics=True``.
    max_abs_err: float | None
    #: Cosine of originals and decoded values; None unless ``metrics=True``.
    cosine: float | None
    #: Bytes that crossed to the daemon for it: codes and parameters, or values where the daemon made those.
    bytes_copied: int
    #: Bytes of its values that the daemon read where they lay; see :meth:`ShmQuantizer.empty`.
    bytes_shared: int


@dataclass(frozen=True)
class PassedThrough:
    """The columns that never left the caller, and their places between the quantized ones."""

    #: For each column of the finished table: names in the result, or no name and a column's number here.
    outputs: list[tuple[list[str], int]]
    columns: pa.Table

    @classmethod
    def of(cls, outputs: list[tuple[list[str], int]], table: pa.Table) -> PassedThrough:
        """Keep what passes through of `table`, and not the values that were quantized."""
        number = itertools.count()
        places = [(names, next(number) if index >= 0 else -1) for names, index in outputs]
        return cls(places, table.select([index for _, index in outputs if index >= 0]))

    def among(self, quantized: pa.Table) -> pa.Table:
        """The finished table, in the order of the input."""
        fields: list[pa.Field] = []
        arrays: list[pa.ChunkedArray] = []
        for names, index in self.outputs:
            if index >= 0:
                fields.append(self.columns.schema.field(index))
                arrays.append(self.columns.column(index))
            for name in names:
                fields.append(quantized.schema.field(name))
                arrays.append(quantized.column(name))
        schema = pa.schema(fields, metadata=self.columns.schema.metadata)
        return pa.Table.from_arrays(arrays, schema=schema)

    def __getstate__(self) -> dict[str, Any]:
        # Through IPC, which takes of a slice what it shows; a buffer would travel as a whole.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.columns.schema) as writer:
            writer.write_table(self.columns)
        return {"outputs": self.outputs, "columns": sink.getvalue().to_pybytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "outputs", state["outputs"])
        object.__setattr__(self, "columns", pa.ipc.open_stream(state["columns"]).read_all())


class QuantizedTable:
    """A quantized table over shared memory; made by :class:`ShmQuantizer`.

    Its memory is given back when this object and the last view of it (a table, a column, a numpy array) are
    gone. Leaving a ``with`` block drops this object's references and leaves views alone; :meth:`release`
    insists.

    Pickling makes a ticket: whoever unpickles it first, in this or another process of the host, reads the
    same memory. Columns that were passed through travel by value.

    Attributes
    ----------
    name : str or None
        The name it is published under.
    nbytes : int
        Bytes of shared memory.
    segment_name : str
        Name of its segment, as in ``/proc/self/maps``.
    bytes_copied, bytes_shared : int
        Bytes that crossed to the daemon in the call that made it (codes and parameters of values that this
        process encoded, columns that go along), and bytes of values that the daemon read where they lay;
        0 for a result that was opened.

    Examples
    --------
    >>> import numpy as np, shmquant
    >>> q = shmquant.ShmQuantizer(address="inproc:")
    >>> with q.quantize(np.ones((3, 64), "f4"), scheme="int8") as r:
    ...     r.codes("vector").shape
    (3, 64)
    """

    def __init__(
        self,
        settings: _session.Settings,
        lease: _native.Lease,
        *,
        passed: PassedThrough | None = None,
        report: tuple[list[str], list[tuple[Any, ...]]] = ([], []),
        crossed: tuple[int, int] = (0, 0),
    ) -> None:
        self._settings = settings
        self._lease: _native.Lease | None = lease
        self._passed = passed
        self._report = report
        self._table: pa.Table | None = None
        self._rows: dict[str, int] | None = None
        self.name: str | None = lease.name
        self.nbytes: int = lease.nbytes
        self.segment_name: str = lease.segment_name
        self.bytes_copied, self.bytes_shared = crossed
        _session.remember(lease, settings.address)
        _alive.add(self)

    @property
    def table(self) -> pa.Table:
        """The result as a pyarrow table.

        Its quantized buffers lie in the shared memory, those of passed-through columns in the caller's own.

        Raises
        ------
        ValueError
            After :meth:`release` or the end of a ``with`` block.
        """
        if self._table is None:
            quantized = pa.ipc.open_file(pa.py_buffer(self._held())).read_all()
            self._table = quantized if self._passed is None else self._passed.among(quantized)
        return self._table

    @property
    def schema(self) -> pa.Schema:
        """The schema of :attr:`table`."""
        return self.table.schema

    @property
    def stats(self) -> dict[str, ItemStats]:
        """Counters, and metrics if asked for, of each quantized column or layer.

        Empty for a result that was opened and not made here. A layer whose name is not the first of its kind
        is found under ``name#row``.
        """
        names, rows = self._report
        found: dict[str, ItemStats] = {}
        for row, (name, numbers) in enumerate(zip(names, rows, strict=False)):
            found[f"{name}#{row}" if name in found else name] = ItemStats(*numbers)
        return found

    @property
    def params(self) -> Params:
        """The parameters of its tensor and dimension columns, to quantize other data alike.

        Raises
        ------
        InvalidInputError
            If it has none: rows and groups bring their own.
        """
        from ._params import Params

        return Params._of_table(self.table)

    def codes(self, column: str) -> np.ndarray[Any, Any]:
        """The codes of one column.

        Parameters
        ----------
        column : str
            A vector or plain column; of layers, see :meth:`layer`.

        Returns
        -------
        numpy.ndarray
            int8 or uint8 of shape (n, W), W bytes a vector; (n,) for a plain column. A view, not writeable.
            Null rows hold any codes. (Only a table of more than one batch is copied together.)

        Notes
        -----
        numpy multiplies int8 matrices in int8 and wraps: cast, ``codes.astype("i4") @ ...``, or dequantize.
        """
        np = need("numpy", "codes")
        chunks = []
        for chunk in self._codes_column(column).chunks:
            width = chunk.type.list_size if pa.types.is_fixed_size_list(chunk.type) else None
            values = chunk.values if width is not None else chunk
            start = chunk.offset * width if width is not None else chunk.offset
            kind = np.int8 if pa.types.is_int8(values.type) else np.uint8
            data = values.buffers()[1]
            n = len(chunk) * (width or 1)
            offset = start if width is None else values.offset + start
            flat = np.frombuffer(data, kind, n, offset) if data is not None and n else np.empty(0, kind)
            chunks.append(flat if width is None else flat.reshape(len(chunk), width))
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def scales(self, column: str) -> np.ndarray[Any, Any]:
        """The scales of one column.

        Returns
        -------
        numpy.ndarray
            float32: (n,) for granularity row, (n, groups) for group, (D,) for dimension, (1,) for tensor.
        """
        return self._parameters(column, "scale")

    def zero_points(self, column: str) -> np.ndarray[Any, Any]:
        """The zero points of one column, shaped as :meth:`scales`; a single 0 if its mapping is symmetric."""
        return self._parameters(column, "zero_point")

    def layer(self, name: str) -> Layer:
        """One layer of a layers table.

        Raises
        ------
        NotFoundError
            If there is none of that name.
        """
        table = self.table
        if "layer_name" not in table.column_names or "quantized_data" not in table.column_names:
            raise invalid("this result has columns, not layers", "see codes() and scales()")
        if self._rows is None:
            names = table.column("layer_name").to_pylist()
            # Of layers of one name the first is meant.
            self._rows = {n: row for row, n in reversed(list(enumerate(names)))}
        row = self._rows.get(name)
        if row is None:
            raise not_found(f"no layer {name!r} among {len(self._rows)}", _near(name, list(self._rows)))
        return Layer(_one_row(table, row))

    def torch(self, column: str) -> torch.Tensor:
        """The codes of one column as a tensor.

        Parameters
        ----------
        column : str
            A vector or plain column.

        Returns
        -------
        torch.Tensor
            int8 or uint8 of shape (n, W) or (n,), over a private writable mapping of the same memory:
            writing to it copies the page for this process and changes nothing for anyone else.
        """
        torch = need("torch", "torch()")
        codes = self.codes(column)
        held = self._held()
        at = codes.__array_interface__["data"][0] - held.pointer
        kind = torch.int8 if codes.dtype.name == "int8" else torch.uint8
        if codes.size == 0 or not 0 <= at < held.nbytes:
            # Nothing to map, or gathered from several batches: a tensor of its own.
            return torch.tensor(codes.copy())
        flat = torch.frombuffer(self._private(), dtype=kind, count=codes.size, offset=at)
        return flat.reshape(codes.shape)

    def dequantize(
        self,
        *,
        columns: Sequence[str] | None = None,
        layers: Sequence[str] | None = None,
        dtype: FloatType = "float32",
    ) -> pa.Table:
        """Decode the table, or some of its columns or layers; see :func:`shmquant.dequantize`."""
        return dequantize(self.table, columns=columns, layers=layers, dtype=dtype)

    def to_pydict(self) -> dict[str, list[Any]]:
        """The table as Python objects, column by column."""
        return self.table.to_pydict()

    def copy(self) -> pa.Table:
        """An independent pyarrow table: it shares no memory with the daemon or the caller."""
        table = self.table
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return pa.ipc.open_file(sink.getvalue()).read_all()

    def release(self) -> None:
        """Give the memory back now. Does nothing if that has been done.

        Raises
        ------
        BufferError
            If views of it are still alive; nothing has changed then.
        """
        if self._lease is None:
            return
        self._table = None
        if not self._lease.release():
            raise BufferError(
                f"{self._lease.views} buffer(s) over this result are still alive\n"
                "hint: delete the tables and arrays made from it; the memory is given back with the last one"
            )
        self._forget()

    def _try_release(self) -> bool:
        try:
            held = self._lease is not None
            self.release()
        except BufferError:
            return False
        return held

    def __enter__(self) -> QuantizedTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Views that outlive the block keep the memory; without any, it goes back here.
        self._forget()

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """The table as an Arrow C stream."""
        return self.table.__arrow_c_stream__(requested_schema)

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        if self._lease is None:
            return "<shmquant.QuantizedTable: released>"
        name = f" {self.name!r}" if self.name else ""
        table = self.table
        return (
            f"<shmquant.QuantizedTable{name}: {table.num_rows} rows, {', '.join(table.column_names)}; "
            f"{self.nbytes} bytes in {self.segment_name}>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        ticket, secret = _session.client(self._settings).ticket(self._held())
        address = self._settings.address
        crossed = (self.bytes_copied, self.bytes_shared)
        return _unpickle, (address, os.getpid(), ticket, secret, self._passed, self._report, crossed)

    def _held(self) -> _native.Lease:
        if self._lease is None:
            raise ValueError("this result has been released\nhint: read it before, or copy() it")
        return self._lease

    def _private(self) -> _native.PrivateMapping:
        return _session.client(self._settings).private(self._held())

    def _forget(self) -> None:
        self._lease = self._table = self._passed = self._rows = None

    def _codes_column(self, column: str) -> pa.ChunkedArray:
        self._meta(column)
        return self.table.column(column)

    def _meta(self, column: str) -> dict[str, Any]:
        schema = self.table.schema
        if column not in schema.names:
            hint = "see layer()" if "quantized_data" in schema.names else _near(column, schema.names)
            raise not_found(f"no column {column!r}", hint)
        metadata = schema.field(column).metadata or {}
        if metadata.get(_CODES_NAME[0]) != _CODES_NAME[1]:
            raise invalid(f"column {column!r} has no codes: it was passed through, or holds parameters")
        return json.loads(metadata[_CODES_KEY])

    def _parameters(self, column: str, which: str) -> np.ndarray[Any, Any]:
        np = need("numpy", f"{which}s")
        ((kind, where),) = self._meta(column)[which].items()
        if kind == "const":
            return np.array([where], dtype=np.int32)
        if kind == "params":
            import base64

            text = self._meta(column)["params_b64"][where]
            return np.frombuffer(base64.b64decode(text), dtype="<f4")
        column_of = self.table.column(where)
        # combine_chunks() copies even a single chunk.
        values = column_of.chunk(0) if column_of.num_chunks == 1 else _joined(column_of)
        if pa.types.is_dictionary(values.type):
            return values.dictionary.to_numpy(zero_copy_only=False)
        if pa.types.is_fixed_size_list(values.type):
            # Not flatten(): it leaves null rows out.
            width = values.type.list_size
            inner = values.values.slice(values.offset * width, len(values) * width)
            return _numbers(np, inner).reshape(len(values), width)
        return _numbers(np, values)


def _numbers(np: Any, array: pa.Array) -> np.ndarray[Any, Any]:
    """The values of a primitive array, nulls included, without a copy."""
    kind = array.type.to_pandas_dtype()
    data = array.buffers()[1]
    if data is None or not len(array):
        return np.empty(0, kind)
    return np.frombuffer(data, kind, len(array), array.offset * np.dtype(kind).itemsize)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    joined = column.combine_chunks()
    if isinstance(joined, pa.ChunkedArray):
        joined = joined.chunk(0) if joined.num_chunks else pa.array([], joined.type)
    return joined


def _one_row(table: pa.Table, row: int) -> pa.RecordBatch:
    for batch in table.slice(row, 1).to_batches():
        if batch.num_rows:
            return batch
    raise not_found(f"row {row} of {table.num_rows}")


def _near(name: str, names: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(names[:8])}"


def alive(address: str) -> list[QuantizedTable]:
    """The result objects of this process at one daemon."""
    return [result for result in list(_alive) if result._settings.address == address]


def _unpickle(
    address: str,
    sender: int,
    ticket: int,
    secret: bytes,
    passed: PassedThrough | None,
    report: tuple[list[str], list[tuple[Any, ...]]],
    crossed: tuple[int, int],
) -> QuantizedTable:
    if address == _session.IN_PROCESS and sender != os.getpid():
        raise DaemonError(
            f"the result belongs to a daemon inside process {sender}\n"
            "hint: use a daemon of its own (an address instead of 'inproc:'), or copy() the result"
        )
    settings = _session.Settings(address)
    lease = _session.client(settings).open_ticket(ticket, secret)
    return QuantizedTable(settings, lease, passed=passed, report=report, crossed=crossed)
