"""Section 6 of `protocol/PROTOCOL.md`: findings, as a client makes them of its values.

The formulas are those of `stdlib_oracle`.
"""

import array
from itertools import pairwise

import stdlib_descriptor as d
from stdlib_messages import pack
from stdlib_oracle import TINY, asymmetric, encode, f32, symmetric

HEADER = (
    "n:Q n_clipped:Q n_nonfinite:Q n_degenerate_groups:Q "
    "sums_n:Q xx:d ee:d xy:d yy:d max_error:d "
    "fault:Q index:Q count:Q value:d max:d reserved:Q"
)
CODES = {
    (d.INT8, d.SYMMETRIC): (-127, 127),
    (d.INT8, d.ASYMMETRIC): (-128, 127),
    (d.UINT8, d.ASYMMETRIC): (0, 255),
    (d.INT4, d.SYMMETRIC): (-8, 7),
    (d.UINT4, d.ASYMMETRIC): (0, 15),
    (d.INT2, d.SYMMETRIC): (-2, 1),
    (d.UINT2, d.ASYMMETRIC): (0, 3),
}


def findings(item, spec, chunk, header=None, **given):
    """A chunk's bytes: a header of the given fields, and the given parts; what is not given is zeros."""
    places, size = d.parts(item, spec, chunk.kind, chunk.first, chunk.count)
    raw = bytearray(size)
    given["header"] = pack(HEADER, {"n": chunk.count, **(header or {})})
    for name, part in given.items():
        at, room = places[name]
        if len(part) != room:
            raise ValueError(f"{name} of {len(part)} bytes where there are {room}")
        raw[at : at + room] = part
    return raw


def pack_codes(item, spec, first, codes):
    """The codes of a run as they lie in the result: a layer flat, every other row for itself."""
    if spec.packing == d.UNPACKED:
        return bytes(code & 255 for code in codes)
    bits = d.BITS[spec.scheme]
    step = 8 // bits

    def flat(codes):
        codes = [*codes, *[0] * (-len(codes) % step)]
        mask = (1 << bits) - 1
        lanes = [[(code & mask) << i * bits for code in codes[i::step]] for i in range(step)]
        return bytes(map(sum, zip(*lanes, strict=True)))

    if item.role == d.LAYER:
        return flat(codes)
    rows = d.rows_touched(item, first, len(codes))
    cuts = [max(row * item.k - first, 0) for row in rows] + [len(codes)]
    return b"".join(flat(codes[a:b]) for a, b in pairwise(cuts))


def domains(item, spec, first, count):
    """The domains of a run, in the order of their parameters: `(parameter, slice of the run)`."""
    if spec.granularity == d.TENSOR:
        return [(0, slice(0, count))]
    if spec.granularity == d.DIMENSION:
        return [(i, slice((i - first) % item.k, count, item.k)) for i in range(item.k)]
    step = item.k if spec.granularity == d.ROW else spec.group_size
    cuts = []
    for row in d.rows_touched(item, first, count):
        cuts += range(row * item.k, (row + 1) * item.k, step)
    cuts = [max(at - first, 0) for at in cuts if at + step > first and at < first + count] + [count]
    parameters = d.touched(item, spec, first, count)
    return [(p, slice(a, b)) for p, (a, b) in zip(parameters, pairwise(cuts), strict=True)]


def range_of(values):
    """The range of values, with 0 inside."""
    return min(0.0, *values), max(0.0, *values)


class Encoder:
    """Makes the findings of an item's chunks, called once for each in order; all values are finite."""

    def __init__(self, descriptor, index, values):
        self.item = descriptor.items[index]
        self.spec = descriptor.specs[self.item.spec]
        self.low, self.high = CODES[self.spec.scheme, self.spec.mapping]
        self.values = values
        # parameter: its range, from Scan chunks
        self.ranges = {}

    def __call__(self, chunk):
        """The findings of a chunk."""
        run = self.values[chunk.first : chunk.first + chunk.count]
        here = domains(self.item, self.spec, chunk.first, chunk.count)
        if chunk.kind == d.SCAN:
            return self._scan(chunk, run, here)
        return self._encode(chunk, run, here)

    def _scan(self, chunk, run, here):
        ranges = array.array("f")
        for parameter, place in here:
            mine = range_of(run[place])
            known = self.ranges.get(parameter, (0.0, 0.0))
            self.ranges[parameter] = (min(known[0], mine[0]), max(known[1], mine[1]))
            ranges.extend(mine)
        return findings(self.item, self.spec, chunk, ranges=ranges.tobytes())

    def _encode(self, chunk, run, here):
        codes = array.array("h", bytes(2 * len(run)))
        clipped = degenerate = 0
        scales, zero_points = array.array("f"), array.array("h")
        for parameter, place in here:
            if self.item.scales:
                scale, zero_point = self.item.scales[parameter], self.item.zero_points[parameter]
            else:
                ends = range_of(run[place]) if chunk.kind == d.FUSED else self.ranges[parameter]
                scale, zero_point = self.parameters(ends)
                degenerate += chunk.kind == d.FUSED and self._is_degenerate(ends)
            clipped += self._clipped(run[place], scale, zero_point)
            codes[place] = array.array("h", encode(run[place], scale, zero_point, self.low, self.high))
            scales.append(scale)
            zero_points.append(zero_point)
        given = {"codes": pack_codes(self.item, self.spec, chunk.first, codes)}
        if chunk.kind == d.FUSED:
            given["scales"] = scales.tobytes()
            if self.spec.mapping == d.ASYMMETRIC:
                given["zero_points"] = bytes(z & 255 for z in zero_points)
        header = {"n_clipped": clipped, "n_degenerate_groups": degenerate}
        return findings(self.item, self.spec, chunk, header, **given)

    def parameters(self, ends):
        """Scale and zero point of a range."""
        method = symmetric if self.spec.mapping == d.SYMMETRIC else asymmetric
        return method(ends, self.low, self.high)[:2]

    def _clipped(self, values, scale, zero_point):
        lowest, highest = self.low - zero_point, self.high - zero_point
        quotients = array.array("f", (v / scale for v in values))
        return sum(not lowest <= round(q) <= highest for q in quotients)

    def _is_degenerate(self, ends):
        width = 2 * max(map(abs, ends)) if self.spec.mapping == d.SYMMETRIC else f32(ends[1] - ends[0])
        return f32(width / (self.high - self.low)) < TINY
