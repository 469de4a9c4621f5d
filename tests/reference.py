"""The formulas of docs/reference.md in numpy, for small exact checks."""

from __future__ import annotations

import numpy as np

TINY = np.float32(2.0**-126)
RANGES = {
    ("int8", "symmetric"): (-127, 127),
    ("int8", "asymmetric"): (-128, 127),
    ("uint8", "asymmetric"): (0, 255),
    ("int4", "symmetric"): (-8, 7),
    ("uint4", "asymmetric"): (0, 15),
    ("int2", "symmetric"): (-2, 1),
    ("uint2", "asymmetric"): (0, 3),
}
MAPPINGS = {scheme: mapping for (scheme, mapping) in reversed(RANGES)}
BITS = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}


def params(x: np.ndarray, scheme: str, mapping: str | None = None) -> tuple[np.float32, int]:
    """Scale and zero point of one domain."""
    mapping = mapping or MAPPINGS[scheme]
    qmin, qmax = RANGES[scheme, mapping]
    x = x.astype(np.float32).reshape(-1)
    low = np.float32(min(x.min(initial=0), 0))
    high = np.float32(max(x.max(initial=0), 0))
    if mapping == "symmetric":
        scale = np.float32(max(-low, high) / np.float32((qmax - qmin) / 2))
        return (np.float32(1), 0) if scale < TINY else (scale, 0)
    scale = np.float32((high - low) / np.float32(qmax - qmin))
    if scale < TINY:
        return np.float32(1), 0
    zero_point = np.float32(qmin) - np.rint(low / scale)
    return scale, int(np.clip(zero_point, qmin, qmax))


def codes(x: np.ndarray, scale: np.float32, zero_point: int, scheme: str, mapping: str | None = None):
    """Codes of one domain, one a byte."""
    mapping = mapping or MAPPINGS[scheme]
    qmin, qmax = RANGES[scheme, mapping]
    shifted = np.clip(x.astype(np.float32) / scale, qmin - zero_point, qmax - zero_point)
    kind = np.int8 if qmin < 0 else np.uint8
    return (np.rint(shifted).astype(np.int32) + zero_point).astype(kind)


def pack(flat: np.ndarray, bits: int) -> np.ndarray:
    """Several codes a byte, the first in the low bits."""
    per_byte = 8 // bits
    padded = np.zeros(-(-flat.size // per_byte) * per_byte, np.uint8)
    padded[: flat.size] = flat.view(np.uint8) & ((1 << bits) - 1)
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    return np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1).astype(np.uint8)


def groups(x: np.ndarray, size: int) -> list[np.ndarray]:
    """The groups of a matrix, row by row; the last of a row may be short."""
    return [row[i : i + size] for row in x for i in range(0, len(row), size)]


def decoded(q: np.ndarray, scale: np.float32, zero_point: int) -> np.ndarray:
    """Values of one domain."""
    return (q.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)
