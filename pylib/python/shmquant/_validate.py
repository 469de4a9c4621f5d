"""What quantization cost: originals against decoded values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ._decode import dequantize
from ._errors import invalid, not_found
from ._input import Tensor, read
from ._optional import need
from ._scheme import spelled

if TYPE_CHECKING:
    import numpy as np

#: Elements that are summed together before they are added to the rest: results then do not depend on how a
#: table is cut.
_BLOCK = 4096
_MOST_QUERIES = 256
_MOST_VECTORS = 20_000


@dataclass(frozen=True)
class Validation:
    """How far one column or layer is from its originals.

    Attributes
    ----------
    n : int
        Values compared; null rows are left out.
    mse : float
        Mean squared error, ``sum((x - y)**2) / n``.
    sqnr_db : float or None
        ``10 log10(sum(x**2) / sum((x - y)**2))``; infinite without error, None without signal.
    max_abs_err : float
        Largest ``|x - y|``.
    cosine : float or None
        ``sum(x y) / sqrt(sum(x**2) sum(y**2))``; None if either is zero.
    recall_at_k : float or None
        Vectors only: of the `k` vectors with the largest inner product with a query, the share that the
        decoded vectors find too.
    """

    n: int
    mse: float
    sqnr_db: float | None
    max_abs_err: float
    cosine: float | None
    recall_at_k: float | None


@spelled
def validate(original: Any, quantized: Any, *, k: int = 10) -> dict[str, Validation]:
    """Compare a quantized table with what it was made from.

    Parameters
    ----------
    original : object
        What was given to ``quantize``.
    quantized : QuantizedTable or Arrow table
        What came back, or the same read from elsewhere. Rows are in the same order; layers are matched by
        name.
    k : int
        Neighbours for ``recall_at_k``, which takes at most 256 of the vectors as queries and 20,000 as the
        collection, evenly spaced.

    Returns
    -------
    dict of str to Validation
        One for each quantized column or layer.

    Raises
    ------
    InvalidInputError
        If the two do not have the same shape.

    Notes
    -----
    All sums are float64 over blocks of 4,096 elements; ``sqnr_db`` is torchao's ``compute_error`` [1]_.

    References
    ----------
    .. [1] torchao.quantization.utils.compute_error

    Examples
    --------
    >>> import numpy as np, shmquant
    >>> x = np.random.default_rng(0).standard_normal((50, 64), dtype="f4")
    >>> r = shmquant.ShmQuantizer(address="inproc:").quantize(x, scheme="int8")
    >>> shmquant.validate(x, r)["vector"].sqnr_db > 40
    True
    """
    if k < 1:
        raise invalid(f"k is {k}", "it is the number of neighbours, 1 or more")
    np = need("numpy", "validate")
    source = read(original)
    table = quantized if isinstance(quantized, pa.Table) else read(quantized)
    if not isinstance(table, pa.Table):
        raise invalid(
            "a dict is not a quantized table", "the originals go first: validate(original, quantized)"
        )
    decoded = dequantize(table)
    found: dict[str, Validation] = {}
    if "quantized_data" in table.column_names:
        originals = dict(_layers(np, source))
        for name, weights in zip(
            decoded.column("layer_name").to_pylist(),
            _chunked_lists(np, decoded.column("weights")),
            strict=True,
        ):
            if name not in originals:
                raise not_found(f"layer {name!r} is not among the originals")
            if weights is not None and originals[name] is not None:
                found[name] = _compare(np, name, originals[name], weights, None)
        return found
    if not isinstance(source, pa.Table):
        raise invalid("the originals are layers and the quantized table has columns")
    for column in decoded.column_names:
        if (table.schema.field(column).metadata or {}).get(b"ARROW:extension:name") == b"shmquant.codes":
            if column not in source.column_names:
                raise not_found(f"column {column!r} is not among the originals")
            x, y = _rows(np, source.column(column)), _rows(np, decoded.column(column))
            if len(x) != len(y):
                raise invalid(f"column {column!r} has {len(x)} rows, its codes {len(y)}")
            both = [i for i in range(len(x)) if x[i] is not None and y[i] is not None]
            x = np.array([x[i] for i in both], dtype=np.float32)
            y = np.array([y[i] for i in both], dtype=np.float32)
            found[column] = _compare(np, column, x, y, k if x.ndim == 2 else None)
    return found


def _compare(np: Any, name: str, x: Any, y: Any, k: int | None) -> Validation:
    if x.shape != y.shape and x.size != y.size:
        raise invalid(f"{name!r} has the shape {x.shape}, decoded {y.shape}")
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    signal = error = decoded = product = largest = 0.0
    for start in range(0, flat_x.size, _BLOCK):
        a = flat_x[start : start + _BLOCK].astype(np.float64)
        b = flat_y[start : start + _BLOCK].astype(np.float64)
        signal += float((a * a).sum())
        decoded += float((b * b).sum())
        product += float((a * b).sum())
        error += float(((a - b) ** 2).sum())
        largest = max(largest, float(np.abs(a - b).max()))
    n = int(flat_x.size)
    sqnr = None if signal == 0 else float("inf") if error == 0 else float(10 * np.log10(signal / error))
    norm = float(np.sqrt(signal * decoded))
    recall = _recall(np, x, y, k) if k is not None and len(x) else None
    return Validation(n, error / n if n else 0.0, sqnr, largest, product / norm if norm else None, recall)


def _recall(np: Any, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], k: int) -> float:
    def evenly(most: int) -> Any:
        return np.unique(np.linspace(0, len(x) - 1, min(most, len(x))).astype(np.int64))

    queries, collection = x[evenly(_MOST_QUERIES)], evenly(_MOST_VECTORS)
    k = min(k, len(collection))

    def nearest(vectors: Any) -> Any:
        return np.argsort(-(queries @ vectors[collection].T), axis=1, kind="stable")[:, :k]

    exact, ours = nearest(x), nearest(y)
    hits = sum(len(set(a) & set(b)) for a, b in zip(exact.tolist(), ours.tolist(), strict=True))
    return hits / (k * len(queries))


def _layers(np: Any, source: pa.Table | list[Tensor]) -> Iterator[tuple[str, Any]]:
    if isinstance(source, list):
        for tensor in source:
            yield tensor.name, _floats(np, tensor.data, tensor.dtype)
        return
    for column in ("layer_name", "weights"):
        if column not in source.column_names:
            raise invalid(f"the originals have no column {column!r}")
    names = source.column("layer_name").to_pylist()
    dtypes = (
        source.column("dtype").to_pylist() if "dtype" in source.column_names else ["float32"] * len(names)
    )
    weights = source.column("weights")
    if pa.types.is_binary(weights.type) or pa.types.is_large_binary(weights.type):
        for name, data, dtype in zip(names, weights, dtypes, strict=True):
            raw = data.as_buffer()
            yield name, None if raw is None else _floats(np, np.frombuffer(raw, np.uint8), dtype)
    else:
        yield from zip(names, _chunked_lists(np, weights), strict=True)


def _floats(np: Any, data: Any, dtype: str) -> Any:
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(dtype)


def _chunked_lists(np: Any, column: pa.ChunkedArray) -> Iterator[Any]:
    for scalar in column:
        yield None if not scalar.is_valid else scalar.values.to_numpy(zero_copy_only=False)


def _rows(np: Any, column: pa.ChunkedArray) -> Mapping[int, Any] | list[Any]:
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column = column.cast(kind.storage_type)
        kind = column.type
    if pa.types.is_floating(kind):
        # NaN stands for null, as pandas has it.
        return [None if v is None or v != v else v for v in column.to_pylist()]
    return list(_chunked_lists(np, column))
