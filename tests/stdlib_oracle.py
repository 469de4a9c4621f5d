"""Formulas in plain Python, and small things that the tests of the second client share."""

import array
import random
import struct

import pytest

import stdlib_descriptor as d
import stdlib_messages as m
from stdlib_arrow import ArrowFile

WINDOW = 4 << 20
TINY = 2.0**-126


def numbers(n, seed=1, code="f"):
    """Values that differ in sign and size."""
    raw = array.array("h", random.Random(seed).randbytes(2 * n))
    return array.array(code, (v * abs(v) / 1e6 for v in raw))


def f32(value):
    """Round to the nearest float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def encode(values, scale, zero_point, low, high):
    """Codes of one domain; array('f') rounds quotients to float32."""
    lowest, highest = low - zero_point, high - zero_point
    quotients = array.array("f", (v / scale for v in values))
    return [zero_point + round(min(max(q, lowest), highest)) for q in quotients]


def symmetric(values, low, high):
    """Scale, zero point and codes of one domain, by the page of formulas."""
    scale = f32(max(map(abs, values), default=0.0) / ((high - low) / 2))
    scale = 1.0 if scale < TINY else scale
    return scale, 0, encode(values, scale, 0, low, high)


def asymmetric(values, low, high):
    """The same with a zero point."""
    smallest, largest = min(0.0, *values), max(0.0, *values)
    scale = f32(f32(largest - smallest) / (high - low))
    if scale < TINY:
        return 1.0, 0, encode(values, 1.0, 0, low, high)
    zero_point = min(max(low - round(f32(smallest / scale)), low), high)
    return scale, zero_point, encode(values, scale, zero_point, low, high)


def by_groups(values, k, group, method, low, high):
    """Scales, zero points and codes of groups along rows."""
    scales, zero_points, codes = [], [], []
    for row in range(0, len(values), k):
        for at in range(row, row + k, group):
            s, z, q = method(values[at : min(at + group, row + k)], low, high)
            scales.append(s)
            zero_points.append(z)
            codes += q
    return scales, zero_points, codes


def nibbles(codes):
    """Pack pairs of four bits, the first one low, padded at the end."""
    codes = [*codes, 0] if len(codes) % 2 else codes
    return [a & 15 | (b & 15) << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)]


def row_nibbles(codes, k):
    """Pack every row for itself."""
    return [byte for at in range(0, len(codes), k) for byte in nibbles(codes[at : at + k])]


def column_of(rows, k, spec, **more):
    """A table of one vector column."""
    return d.Descriptor(d.COLUMNS, [spec], rows, [d.Item(d.VECTOR, "emb", rows, k, **more)])


INT8_ROWS = d.Spec(d.INT8)
UINT4_GROUPS = d.Spec(d.UINT4, d.ASYMMETRIC, d.GROUP, packing=d.LSB, group_size=32)


def quantize(lane, descriptor, *sources, **options):
    """Quantize and read the file; `sources` has the streams of each item."""
    lease, view, reports = lane.quantize(descriptor, sources, **options)
    file = ArrowFile(view)
    (batch,) = file.batches
    return lease, file, batch, reports


def error_of(call, *arguments, **options):
    """The daemon's error."""
    with pytest.raises(m.DaemonError) as caught:
        call(*arguments, **options)
    return caught.value


def symmetric_codes(values, k):
    """Codes of int8 rows."""
    return by_groups(values, k, k, symmetric, -127, 127)[2]


def fnv1a(data):
    """FNV-1a, 64 bits."""
    number = 0xCBF29CE484222325
    for byte in data:
        number = (number ^ byte) * 0x100000001B3 % 2**64
    return number


def row_ids(file, batch, name):
    """What the rows of a column of ids say, each id once."""
    ids = batch[name]
    dictionary = file.dictionaries[ids.field.dictionary]
    return {dictionary.values()[i] for i in ids.values()}


def put(lane, descriptor, values=b""):
    """Write a descriptor, and values of one chunk, into the window; gives the fields of a QUANTIZE."""
    raw = descriptor.encode()
    lane.window[: len(raw)] = raw
    at = d.ceil64(len(raw))
    lane.window[at : at + len(values)] = bytes(values)
    return {"descriptor": len(raw), "timeout": m.NO_TIMEOUT}


def closed(connection):
    """The daemon has closed the connection, and said no more."""
    with pytest.raises(ConnectionError):
        connection.receive()
