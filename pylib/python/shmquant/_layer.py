"""One layer of a quantized layers table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ._optional import need

if TYPE_CHECKING:
    import numpy as np

    from ._scheme import FloatType


class Layer:
    """One row of a layers table, its arrays as views of the shared memory.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
        The row, by itself.

    Attributes
    ----------
    name : str
        The layer's name.
    shape : tuple of int or None
        Its shape; None if none was given.
    scheme : str or None
        The word given to ``quantize``; the type of its values if it was left as it is.
    bit_width : int or None
        Bits of one code.
    group_size : int or None
        Elements that share a scale; 0 is a whole row, -1 the tensor.
    packing : str or None
        ``"none"`` (a byte a code) or ``"lsb"`` (the first code in the low bits).
    src_dtype : str or None
        Type of the original values.
    metrics : dict or None
        Mean squared error and its kin, if they were asked for.
    error : str or None
        Why the layer has no codes (``continue_on_error=True``).
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self.name: str = self._value("layer_name")
        shape = self._value("shape")
        self.shape: tuple[int, ...] | None = tuple(shape) if shape else None
        self.scheme: str | None = self._value("scheme")
        self.bit_width: int | None = self._value("bit_width")
        self.group_size: int | None = self._value("group_size")
        self.axis: int | None = self._value("axis")
        self.packing: str | None = self._value("packing")
        self.src_dtype: str | None = self._value("src_dtype")
        self.metrics: dict[str, Any] | None = self._value("metrics")
        self.error: str | None = self._value("error")

    @property
    def codes(self) -> np.ndarray[Any, Any]:
        """The stored bytes: a view of shape (bytes,), not writeable; int8 where a byte is a signed code."""
        np = need("numpy", "Layer.codes")
        column = self._batch.column("quantized_data")
        _, offsets, data = column.buffers()
        wide = pa.types.is_large_binary(column.type)
        ends = np.frombuffer(offsets, dtype=np.int64 if wide else np.int32)
        first, last = int(ends[column.offset]), int(ends[column.offset + 1])
        signed = self.packing == "none" and (self.scheme or "").startswith("int")
        kind = np.int8 if signed else np.uint8
        if data is None or first == last:
            return np.empty(0, dtype=kind)
        return np.frombuffer(data, dtype=kind, count=last - first, offset=first)

    @property
    def scales(self) -> np.ndarray[Any, Any]:
        """One float32 a domain, row-major ``rows x groups``: a view, not writeable."""
        return self._floats("scales")

    @property
    def zero_points(self) -> np.ndarray[Any, Any]:
        """One integral float32 a domain; empty if the mapping is symmetric. A view, not writeable."""
        return self._floats("zero_points")

    def dequantize(self, dtype: FloatType = "float32") -> np.ndarray[Any, Any]:
        """Decode the layer: ``(code - zero_point) * scale``.

        Parameters
        ----------
        dtype : {"float32", "float16"}
            Type of the values.

        Returns
        -------
        numpy.ndarray
            Of the layer's shape; of shape (n,) if none was given.

        Raises
        ------
        InvalidInputError
            If the layer has no codes: it was null, or failed under ``continue_on_error=True``.
        """
        from ._decode import dequantize
        from ._errors import invalid

        need("numpy", "Layer.dequantize")
        if not self._batch.column("quantized_data").is_valid()[0].as_py():
            raise invalid(f"layer {self.name!r} has no codes: {self.error or 'its weights were null'}")
        weights = dequantize(self._batch, dtype=dtype).column("weights").chunk(0)
        values = weights.flatten().to_numpy(zero_copy_only=True)
        return values if self.shape is None else values.reshape(self.shape)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape)) if self.shape else "no shape"
        return f"<shmquant.Layer {self.name!r}: {self.scheme}, {shape}>"

    def _value(self, column: str) -> Any:
        return self._batch.column(column)[0].as_py()

    def _floats(self, name: str) -> np.ndarray[Any, Any]:
        column = self._batch.column(name)
        return column.flatten().to_numpy(zero_copy_only=True)
