"""Ranges found on some data, for use on other data."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from . import _native
from ._errors import invalid, not_found
from ._input import read
from ._options import SourceOptions


class Params:
    """Scales and zero points by column or layer, with the scheme they belong to.

    Made by :meth:`ShmQuantizer.fit`, or taken from a result (:attr:`QuantizedTable.params`). ``+`` gives the
    ranges of both sides. Compares, pickles, and goes to a file and back without loss.

    Examples
    --------
    >>> import numpy as np
    >>> from shmquant import Params, ShmQuantizer
    >>> q = ShmQuantizer(address="inproc:")
    >>> a = q.fit(np.zeros((2, 3), "f4"), scheme="uint8")
    >>> b = q.fit(np.ones((2, 3), "f4"), scheme="uint8")
    >>> Params.from_json((a + b).to_json()) == b + a
    True
    """

    def __init__(self, native: _native.Params) -> None:
        self._native = native

    @property
    def scheme(self) -> str:
        """The scheme's word."""
        return self._native.scheme

    @property
    def mapping(self) -> str:
        """Where the codes lie around zero."""
        return self._native.mapping

    @property
    def granularity(self) -> str:
        """Over what the ranges were taken; plain columns are always ``tensor``."""
        return self._native.granularity

    @property
    def names(self) -> list[str]:
        """The columns or layers that have ranges."""
        return self._native.names

    def scales(self, name: str) -> list[float]:
        """The scales of one column or layer."""
        return self._get(name)[0]

    def zero_points(self, name: str) -> list[int]:
        """The zero points of one column or layer."""
        return self._get(name)[1]

    def to_json(self) -> str:
        """JSON text; numbers are base64 of little-endian float32, so nothing is rounded."""
        return self._native.to_json()

    @classmethod
    def from_json(cls, text: str) -> Params:
        """Read the text of :meth:`to_json`.

        Raises
        ------
        InvalidInputError
            If it is not that, or was changed.
        """
        return cls(_native.Params.from_json(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Params:
        """Read a file that :meth:`save` wrote."""
        with open(path, encoding="utf-8") as file:
            return cls.from_json(file.read())

    def __add__(self, other: object) -> Params:
        if not isinstance(other, Params):
            return NotImplemented
        return Params(self._native.merge(other._native))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Params):
            return NotImplemented
        return self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __reduce__(self) -> tuple[Any, ...]:
        return Params.from_json, (self.to_json(),)

    def __repr__(self) -> str:
        return (
            f"<shmquant.Params: {self.scheme} {self.mapping}, {self.granularity}, of {', '.join(self.names)}>"
        )

    def _get(self, name: str) -> tuple[list[float], list[int]]:
        found = self._native.get(name)
        if found is None:
            raise not_found(
                f"params have no ranges for {name!r}", f"they have them for {', '.join(self.names)}"
            )
        return found

    @classmethod
    def _of_table(cls, table: pa.Table) -> Params:
        """The params of a result: those in its fields' metadata, or of whole layers and rows of layers."""
        if "quantized_data" in table.column_names:
            return cls(_of_layers(table))
        found = list(_of_columns(table))
        if not found:
            raise invalid(
                "the result has no params to give: rows and groups bring their own",
                'quantize with granularity="dimension" or "tensor", or use fit()',
            )
        vectors = [f for f in found if f[0]["dim"] is not None] or found
        kinds = {(f[0]["scheme"], f[0]["mapping"]) for f in found}
        spans = {f[0]["granularity"] for f in vectors}
        if len(kinds) > 1 or len(spans) > 1:
            raise invalid(
                "the result's columns have different schemes or granularities", "use fit() for each"
            )
        ((scheme, mapping),) = kinds
        entries = [(name, scales, zero_points) for _, name, scales, zero_points in found]
        return cls(_native.Params.from_scales(scheme, mapping, spans.pop(), entries))


def fit(data: Any, options: SourceOptions) -> Params:
    """Find the ranges of one table, or of all that an iterable gives."""
    if isinstance(data, (list, tuple)) or hasattr(data, "__next__"):
        total: _native.Params | None = None
        for part in data:
            one = _fit_one(part, options)
            total = one if total is None else total.merge(one)
        if total is None:
            raise invalid("there is nothing to fit: the iterable is empty")
        return Params(total)
    return Params(_fit_one(data, options))


def _fit_one(data: Any, options: SourceOptions) -> _native.Params:
    given = read(data)
    if isinstance(given, pa.Table):
        return _native.Params.fit(given, options)
    return _native.Params.fit_layers([(t.name, t.data, t.dtype, list(t.shape)) for t in given], options)


def _of_columns(table: pa.Table) -> Iterator[tuple[dict[str, Any], str, list[float], list[int]]]:
    for field in table.schema:
        metadata = field.metadata or {}
        if metadata.get(b"ARROW:extension:name") != b"shmquant.codes":
            continue
        meta = json.loads(metadata[b"ARROW:extension:metadata"])
        if meta["dim"] is None:
            scale = _one(table, field.name, meta["scale"])
            if scale is not None:
                zero_point = _one(table, field.name, meta["zero_point"])
                yield meta, field.name, [float(scale)], [int(zero_point or 0)]
        elif meta["params_b64"] is not None:
            scales = _numbers(meta["params_b64"]["scale"])
            zeros = meta["params_b64"].get("zero_point")
            zero_points = [int(z) for z in _numbers(zeros)] if zeros else [0] * len(scales)
            yield meta, field.name, scales, zero_points


def _one(table: pa.Table, column: str, source: dict[str, Any]) -> float | None:
    if "const" in source:
        return source["const"]
    values = {v for v in table.column(source["column"]).unique().to_pylist() if v is not None}
    if len(values) > 1:
        raise invalid(f"rows of column {column!r} have different params")
    return values.pop() if values else None


def _numbers(text: str) -> list[float]:
    return pa.Array.from_buffers(
        pa.float32(), len(raw := base64.b64decode(text)) // 4, [None, pa.py_buffer(raw)]
    ).to_pylist()


def _of_layers(table: pa.Table) -> _native.Params:
    rows = table.select(["layer_name", "scheme", "group_size", "scales", "zero_points"]).to_pylist()
    rows = [row for row in rows if row["scales"]]
    kinds = {(row["scheme"], row["group_size"], bool(row["zero_points"])) for row in rows}
    if len(kinds) != 1:
        raise invalid(
            "the layers have different schemes or granularities" if kinds else "no layer has params",
            "use fit()",
        )
    ((scheme, group_size, asymmetric),) = kinds
    if group_size > 0:
        raise invalid("the result has no params to give: groups bring their own", "use fit()")
    entries = [
        (row["layer_name"], row["scales"], [int(z) for z in row["zero_points"]] or [0] * len(row["scales"]))
        for row in rows
    ]
    mapping = "asymmetric" if asymmetric else "symmetric"
    return _native.Params.from_scales(scheme, mapping, "row" if group_size == 0 else "tensor", entries)
