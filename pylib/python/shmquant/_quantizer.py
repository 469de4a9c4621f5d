"""The handle on a session: everything that a daemon is asked for."""

from __future__ import annotations

import asyncio
import builtins
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Unpack

import pyarrow as pa

from . import _native, _session
from ._calls import QuantizeOptions
from ._errors import NoRoomError, invalid
from ._input import Tensor, read
from ._memory import Allocator
from ._options import Overrides, SourceOptions, dataset_name, source_options
from ._params import Params, fit
from ._result import PassedThrough, QuantizedTable, alive
from ._scheme import Granularity, Mapping, Nulls, OnNonFinite, Scheme, spelled

_TIMEOUT = 30.0


class ResultInfo(NamedTuple):
    """One result that this process holds."""

    #: Name of its segment, as in ``/proc/self/maps``.
    segment_name: str
    #: Bytes of shared memory.
    nbytes: int
    #: The name it is published under.
    name: str | None
    #: Buffers that are over it; 0 if nobody reads it.
    views: int


class ShmQuantizer(Allocator):
    """A handle on this process's session with a daemon. Cheap; safe to share between threads.

    Nothing happens until the first call: that connects, and starts a daemon if none is running.

    Parameters
    ----------
    address : str or path, optional
        Socket of the daemon. By default the one of ``SHMQUANT_ADDRESS``, else the user's own. ``"inproc:"``
        runs the daemon inside this process.
    lanes : int, optional
        Requests that may run at once.
    window : int, optional
        Bytes of the segment through which codes and kept columns cross; by default what the daemon proposes.
    poll : bool, optional
        Whether to spin some microseconds for a reply before sleeping; by default what the daemon proposes.

    Examples
    --------
    >>> import numpy as np
    >>> from shmquant import ShmQuantizer
    >>> q = ShmQuantizer(address="inproc:")
    >>> r = q.quantize(np.ones((2, 4), "f4"), scheme="int8")
    >>> r.codes("vector").tolist()
    [[127, 127, 127, 127], [127, 127, 127, 127]]
    """

    @spelled
    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        lanes: int | None = None,
        window: int | None = None,
        poll: bool | None = None,
    ) -> None:
        self._settings = _session.settings(address, lanes, window, poll)

    @property
    def address(self) -> str:
        """Where the daemon is looked for."""
        return self._settings.address

    @spelled
    def quantize(
        self,
        data: Any,
        scheme: Scheme = "int8",
        *,
        columns: Sequence[str] | None = None,
        granularity: Granularity | None = None,
        group_size: int | None = None,
        mapping: Mapping | None = None,
        params: Params | QuantizedTable | None = None,
        overrides: Overrides | None = None,
        on_nonfinite: OnNonFinite = "error",
        nulls: Nulls = "error",
        continue_on_error: bool = False,
        metrics: bool = False,
        name: str | None = None,
        replace: bool = False,
        keep: Sequence[str] | None = None,
        progress: Callable[[int, int], object] | None = None,
        timeout: float | None = _TIMEOUT,
    ) -> QuantizedTable:
        """Quantize a table, a matrix of vectors or a state dict.

        Parameters
        ----------
        data : object
            Anything with ``__arrow_c_stream__`` or ``__arrow_c_array__`` (pyarrow, polars, duckdb, pandas,
            nanoarrow, ...), a numpy array of shape (n, D), whose column becomes ``"vector"``, or a dict of
            arrays or tensors: a state dict. ``layer_name`` and ``weights`` make a table of layers; else
            every float vector column is quantized.
        scheme : str
            Number format; :func:`shmquant.schemes` lists them.
        columns : sequence of str, optional
            Which columns; the way to quantize plain float columns too.
        granularity : {"tensor", "row", "dimension", "group"}, optional
            Over what a range is taken. By default ``row`` for vectors and for layers of 8 bits, ``group``
            for layers of fewer, ``tensor`` for plain columns.
        group_size : int, optional
            Elements of a group within a row, 128 by default; asks for granularity ``group``.
        mapping : {"symmetric", "asymmetric"}, optional
            Where codes lie around zero; by default the scheme's own.
        params : Params or QuantizedTable, optional
            Ranges found before; they bring their scheme along.
        overrides : dict, optional
            What differs for some layers or columns, e.g.
            ``{"re:.*embed.*": None, "lm_head.*": {"scheme": "int8"}}``: an exact name goes before the first
            pattern that fits, that before the default. None leaves a layer as it is.
        on_nonfinite : {"error", "null", "saturate"}
            What NaN and infinities do: raise, make the row null, or clip (NaN counts as 0).
        nulls : {"error", "zero"}
            What a null inside a vector does. Null vectors stay null.
        continue_on_error : bool
            Layers: a faulty layer becomes a null row with its ``error``.
        metrics : bool
            Measure mean squared error, SQNR, largest error and cosine while the values are at hand.
        name : str, optional
            Publish the result: any process of this user can :meth:`open` it. The same name, options and
            values find the existing dataset.
        replace : bool
            Take the place of another dataset of that name. Who holds the old one keeps it.
        keep : sequence of str, optional
            Which other columns a published result takes along; all by default.
        progress : callable, optional
            Called as ``progress(bytes_done, bytes_in_all)`` now and then.
        timeout : float, optional
            Seconds for the whole call, waiting for memory included; None for no limit.

        Returns
        -------
        QuantizedTable
            Over shared memory, without a copy.

        Raises
        ------
        InvalidInputError
            The data or an option; the text names column, row, index and value.
        NoRoomError
            No memory within `timeout`, or only this call could have freed it.
        DeadlineError
            `timeout` ran out.
        NameExistsError
            `name` belongs to another spec or other values.
        DaemonError
            No daemon, or it went away. The next call connects anew.

        Examples
        --------
        >>> import numpy as np, pyarrow as pa
        >>> from shmquant import ShmQuantizer
        >>> vectors = pa.FixedSizeListArray.from_arrays(np.arange(8, dtype="f4"), 4)
        >>> table = pa.table({"id": [7, 8], "emb": vectors})
        >>> ShmQuantizer(address="inproc:").quantize(table, scheme="uint8").table.column_names
        ['id', 'emb', 'emb_scale', 'emb_zero_point']
        """
        options = source_options(
            scheme=scheme,
            columns=columns,
            granularity=granularity,
            group_size=group_size,
            mapping=mapping,
            params=params,
            overrides=overrides,
            on_nonfinite=on_nonfinite,
            nulls=nulls,
            continue_on_error=continue_on_error,
            metrics=metrics,
            name=name,
            replace=replace,
            keep=keep,
        )
        source, table = _source(data, options)
        return self._run(source, table, name, replace, progress, timeout, None)

    @spelled
    def quantize_file(
        self,
        path: str | os.PathLike[str],
        scheme: Scheme = "int8",
        **options: Unpack[QuantizeOptions],
    ) -> QuantizedTable:
        """Quantize a file: safetensors (a row a tensor), Arrow IPC or Parquet.

        safetensors and Arrow IPC files are mapped and streamed, never read as a whole. Tensors that are not
        floats are left out; ``shmquant info`` names them.

        Parameters
        ----------
        path : str or path
            The file; its format is told by its first bytes.
        scheme, **options
            As for :meth:`quantize`.

        Returns
        -------
        QuantizedTable

        Raises
        ------
        InvalidInputError
            The file is missing, damaged, of another format, or was written while it was read; else as
            :meth:`quantize`.
        """
        name, replace, progress, timeout, rest = _split(options)
        native = source_options(scheme=scheme, name=name, replace=replace, **rest)
        given = os.fsdecode(path)
        if _native.file_format(given) == "Parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(given, memory_map=True)
            source = _native.Source.from_arrow(table, native)
        else:
            source, table = _native.Source.from_file(given, native)
        return self._run(source, table, name, replace, progress, timeout, None)

    @spelled
    async def quantize_async(
        self, data: Any, scheme: Scheme = "int8", **options: Unpack[QuantizeOptions]
    ) -> QuantizedTable:
        """Quantize without blocking the event loop: as :meth:`quantize`, on another thread.

        Cancelling the task cancels the daemon's work.

        Examples
        --------
        >>> import asyncio, numpy as np
        >>> from shmquant import ShmQuantizer
        >>> q = ShmQuantizer(address="inproc:")
        >>> asyncio.run(q.quantize_async(np.ones((2, 4), "f4"))).table.num_rows
        2
        """
        cancel = _native.Cancel()

        def work() -> QuantizedTable:
            name, replace, progress, timeout, rest = _split(options)
            native = source_options(scheme=scheme, name=name, replace=replace, **rest)
            source, table = _source(data, native)
            return self._run(source, table, name, replace, progress, timeout, cancel)

        try:
            return await asyncio.to_thread(work)
        except asyncio.CancelledError:
            cancel.set()
            raise

    @spelled
    def quantize_stream(
        self, reader: Any, scheme: Scheme = "int8", **options: Unpack[QuantizeOptions]
    ) -> pa.RecordBatchReader:
        """Quantize a stream batch by batch, each when it is asked for.

        Parameters
        ----------
        reader : object
            Anything with ``__arrow_c_stream__``, or an iterable of pyarrow.RecordBatch.
        scheme, **options
            As for :meth:`quantize`. A granularity whose ranges span rows (tensor, dimension) needs
            ``params=``, so that all batches agree. There is no name: a stream is not one result.

        Returns
        -------
        pyarrow.RecordBatchReader
            Each batch lies in shared memory and gives it back when it is dropped.

        Examples
        --------
        >>> import numpy as np, pyarrow as pa
        >>> from shmquant import ShmQuantizer
        >>> vectors = pa.FixedSizeListArray.from_arrays(np.arange(8, dtype="f4"), 4)
        >>> stream = pa.table({"emb": vectors}).to_reader(max_chunksize=1)
        >>> [b.num_rows for b in ShmQuantizer(address="inproc:").quantize_stream(stream)]
        [1, 1]
        """
        name, _, progress, timeout, rest = _split(options)
        if name is not None:
            raise invalid("a stream cannot be published", "publish its parts, or quantize it as one table")
        native = source_options(scheme=scheme, part_of_stream=True, **rest)
        if hasattr(reader, "__arrow_c_stream__"):
            reader = pa.RecordBatchReader.from_stream(reader)
            empty = pa.RecordBatch.from_pylist([], schema=reader.schema)
        else:
            reader, empty = iter(reader), None

        def results() -> Iterator[pa.RecordBatch]:
            for batch in reader:
                if batch.num_rows:
                    source, table = _source(batch, native)
                    yield from self._run(
                        source, table, None, False, progress, timeout, None
                    ).table.to_batches()

        batches = results()
        # The schema of what comes is known with the first batch; without one, from an empty table.
        first = next(batches, None)
        if first is None:
            if empty is None:
                raise invalid("the stream has no batches and no schema", "pass a pyarrow.RecordBatchReader")
            source, table = _source(empty, native)
            schema = self._run(source, table, None, False, None, timeout, None).schema
            return pa.RecordBatchReader.from_batches(schema, iter(()))

        def rejoined() -> Iterator[pa.RecordBatch]:
            yield first
            yield from batches

        return pa.RecordBatchReader.from_batches(first.schema, rejoined())

    @spelled
    def quantize_arrow(self, table: Any, bit_width: int = 4, group_size: int = 128) -> pa.Table:
        """Quantize a table of layers, as the earlier in-process extension did.

        Parameters
        ----------
        table : object
            Arrow data with columns ``layer_name``, ``weights`` and perhaps ``shape``.
        bit_width : {8, 4, 2}
            uint8, uint4 or uint2, asymmetric.
        group_size : int
            Elements that share a scale.

        Returns
        -------
        pyarrow.Table
            Over shared memory; begins with ``layer_name``, ``quantized_data``, ``scales``, ``zero_points``,
            ``shape``, ``bit_width``.

        Raises
        ------
        InvalidInputError
            ``Invalid bit_width: 3``, ``Missing required column 'layer_name'``, ``Layer 'x' contains NaN or
            Inf at index 7``.
        """
        scheme: Scheme
        if bit_width == 8:
            scheme = "uint8"
        elif bit_width == 4:
            scheme = "uint4"
        elif bit_width == 2:
            scheme = "uint2"
        else:
            raise invalid(f"Invalid bit_width: {bit_width!r}", "it is 8, 4 or 2")
        data = read(table)
        if isinstance(data, pa.Table):
            for column in ("layer_name", "weights"):
                if column not in data.column_names:
                    raise invalid(
                        f"Missing required column {column!r}", f"the table has {', '.join(data.column_names)}"
                    )
        options = source_options(scheme=scheme, granularity="group", group_size=group_size, layers=True)
        source, given = _source(data, options)
        return self._run(source, given, None, False, None, _TIMEOUT, None).table

    @spelled
    def quantize_arrow_batch(
        self, batch: pa.RecordBatch, bit_width: int = 4, group_size: int = 128
    ) -> pa.RecordBatch:
        """Quantize one record batch of layers; see :meth:`quantize_arrow`.

        Returns
        -------
        pyarrow.RecordBatch
        """
        batches = self.quantize_arrow(batch, bit_width, group_size).combine_chunks().to_batches()
        return batches[0]

    @spelled
    def fit(
        self,
        data: Any,
        scheme: Scheme = "int8",
        *,
        columns: Sequence[str] | None = None,
        granularity: Granularity | None = None,
        mapping: Mapping | None = None,
        on_nonfinite: OnNonFinite = "error",
        nulls: Nulls = "error",
    ) -> Params:
        """Find ranges, to quantize many tables alike. Runs in this process.

        Parameters
        ----------
        data : object
            What :meth:`quantize` takes, or an iterable of it.
        scheme, columns, mapping, on_nonfinite, nulls
            As for :meth:`quantize`.
        granularity : {"dimension", "tensor", "row"}, optional
            By default ``dimension`` for vectors, ``tensor`` for plain columns.

        Returns
        -------
        Params
            For ``params=``; ``+`` merges two of them.

        Examples
        --------
        >>> import numpy as np
        >>> from shmquant import ShmQuantizer
        >>> q = ShmQuantizer(address="inproc:")
        >>> params = q.fit([np.zeros((2, 4), "f4"), np.ones((3, 4), "f4")], scheme="uint8")
        >>> q.quantize(np.ones((1, 4), "f4"), params=params).codes("vector").tolist()
        [[255, 255, 255, 255]]
        """
        return fit(
            data,
            source_options(
                scheme=scheme,
                columns=columns,
                granularity=granularity,
                mapping=mapping,
                on_nonfinite=on_nonfinite,
                nulls=nulls,
            ),
        )

    def open(self, name: str) -> QuantizedTable:
        """Open a dataset that this or another process published.

        Raises
        ------
        NotFoundError
            If there is none of that name.
        """
        return QuantizedTable(self._settings, self._client.open(dataset_name(name)))

    def list(self) -> list[dict[str, Any]]:
        """List the published datasets: name, bytes, path and more of each."""
        return [json.loads(entry) for entry in self._client.list()]

    def drop(self, name: str) -> None:
        """Remove a dataset's name. Its memory goes with the last process that holds it.

        Raises
        ------
        NotFoundError
            If there is none of that name.
        """
        self._client.drop(dataset_name(name))

    def results(self) -> builtins.list[ResultInfo]:
        """List the results of this daemon that this process holds, oldest first."""
        return [
            ResultInfo(lease.segment_name, lease.nbytes, lease.name, lease.views)
            for lease in _session.held(self.address)
        ]

    def release_all(self) -> int:
        """Give back every result of this process that has no live view.

        Returns
        -------
        int
            How many were given back. Their objects are as after :meth:`QuantizedTable.release`.
        """
        return sum(result._try_release() for result in alive(self.address))

    def __repr__(self) -> str:
        return f"ShmQuantizer(address={self.address!r})"

    @property
    def _client(self) -> _native.Client:
        return _session.client(self._settings)

    def _run(
        self,
        source: _native.Source,
        table: pa.Table | None,
        name: str | None,
        replace: bool,
        progress: Callable[[int, int], object] | None,
        timeout: float | None,
        cancel: _native.Cancel | None,
    ) -> QuantizedTable:
        def call(seconds: float | None) -> tuple[_native.Lease, list[tuple[Any, ...]], tuple[int, int]]:
            return self._client.quantize(
                source, timeout=seconds, name=name, replace=replace, progress=progress, cancel=cancel
            )

        lease, report, crossed = self._retried(call, timeout)
        passed = None
        # Where nothing passes through, the result is the finished table as it is.
        if name is None and table is not None and (source.passes_through or table.schema.metadata):
            passed = PassedThrough.of(source.outputs, table)
        return QuantizedTable(
            self._settings, lease, passed=passed, report=(source.items, report), crossed=crossed
        )

    def _with_holdings(self, error: NoRoomError) -> NoRoomError:
        holdings = self.results()
        if not holdings:
            return error
        largest = sorted(holdings, key=lambda r: -r.nbytes)
        lines = [
            f"  {r.nbytes} bytes, {r.views} views, {r.name or 'not published'} ({r.segment_name})"
            for r in largest[:10]
        ]
        if len(largest) > 10:
            lines.append(f"  and {len(largest) - 10} more")
        total = sum(r.nbytes for r in holdings)
        text = "\n".join([f"{error}", f"this process holds {len(holdings)} results, {total} bytes:", *lines])
        told = NoRoomError(text)
        told.__dict__.update(error.__dict__)
        return told


def open(name: str, address: str | os.PathLike[str] | None = None) -> QuantizedTable:
    """Open a dataset that this or another process published; short for ``ShmQuantizer(address).open(name)``.

    Raises
    ------
    NotFoundError
        If there is none of that name.
    """
    return ShmQuantizer(address).open(name)


def _source(data: Any, options: SourceOptions) -> tuple[_native.Source, pa.Table | None]:
    # What quantize_arrow() has read is not read again.
    tensors_already = isinstance(data, list) and data and isinstance(data[0], Tensor)
    given = data if tensors_already else read(data)
    if isinstance(given, pa.Table):
        return _native.Source.from_arrow(given, options), given
    for option, value in (("columns", options["columns"]), ("keep", options["keep"])):
        if value is not None:
            raise invalid(
                f"{option} does not go with a state dict: its result has columns of its own",
                "overrides={name: None} leaves a layer as it is",
            )
    tensors = [(t.name, t.data, t.dtype, list(t.shape)) for t in given]
    return _native.Source.from_layers(tensors, options), None


def _split(
    options: QuantizeOptions,
) -> tuple[str | None, bool, Callable[[int, int], object] | None, float | None, dict[str, Any]]:
    """The options of the call, and those of the source."""
    rest: dict[str, Any] = dict(options)
    name = rest.pop("name", None)
    replace = rest.pop("replace", False)
    progress = rest.pop("progress", None)
    return name, replace, progress, rest.pop("timeout", _TIMEOUT), rest
