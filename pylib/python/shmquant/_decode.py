"""From codes back to values, for any table that has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from . import _native
from ._errors import invalid
from ._input import read
from ._scheme import FloatType, spelled


@spelled
def dequantize(
    table: Any,
    *,
    columns: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    dtype: FloatType = "float32",
) -> pa.Table:
    """Decode a quantized table. Needs no daemon.

    Every fact comes from the table itself, so it may have travelled: through Parquet, polars, DuckDB (layers
    tables), concatenation, another host.

    Parameters
    ----------
    table : QuantizedTable, or anything with ``__arrow_c_stream__`` or ``__arrow_c_array__``
        A table of layers, or one with columns of codes.
    columns : sequence of str, optional
        Columns to decode and return; all by default.
    layers : sequence of str, optional
        Layers to decode and return; all by default.
    dtype : {"float32", "float16"}
        Type of the decoded values.

    Returns
    -------
    pyarrow.Table
        Columns of codes become ``FixedSizeList<float>`` or float columns and their parameter columns are
        gone; a table of layers becomes ``layer_name``, ``weights``, ``shape``.

    Raises
    ------
    InvalidInputError
        If nothing in the table can be decoded, or rows with different parameters were mixed under one set of
        metadata.
    NotFoundError
        If a name is not there.

    Notes
    -----
    ``(code - zero_point) * scale`` in float32, codes minus zero point exact [1]_.

    References
    ----------
    .. [1] ONNX, DequantizeLinear, https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html

    Examples
    --------
    >>> import numpy as np, shmquant
    >>> q = shmquant.ShmQuantizer(address="inproc:")
    >>> table = q.quantize(np.eye(2, 8, dtype="f4")).copy()
    >>> shmquant.dequantize(table).column("vector")[0].as_py()
    [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    if columns is not None and layers is not None:
        raise invalid("both columns= and layers= were given", "a table has one or the other")
    names = columns if columns is not None else layers
    if isinstance(names, str):
        raise invalid(f"{names!r} is one name, not a sequence of names", f"say [{names!r}]")
    source = read(table)
    if not isinstance(source, pa.Table):
        raise invalid("a dict has no codes to decode", "pass the table that quantize gave")
    decoded = _native.decode(source, None if names is None else list(names), dtype)
    return decoded if columns is None else decoded.select(list(columns))
