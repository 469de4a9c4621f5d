"""Write `protocol/tests/vectors/*.json`: frames, descriptors and chunk lists that all must agree on.

They come from the client that was written from the page, not from the Rust sources that are held to them.
`python tests/make_vectors.py` writes them; a test demands that they are what this file writes.
"""

import json
import math
from pathlib import Path

import stdlib_descriptor as d
import stdlib_messages as m

FOLDER = Path(__file__).parent.parent / "protocol" / "tests" / "vectors"
KEY = bytes(range(16))
EXTENT = {"segment": 7, "generation": 3, "offset": 4096, "length": 123_456}
DATASET = {"extent": EXTENT, "segment_size": 2**21, "flags": m.LEASE_FD | m.LEASE_DATASET}
RELEASES = [
    {"segment": 7, "generation": 3, "flags": 0},
    {"segment": 2**63, "generation": 2**40, "flags": m.TAINTED},
]

MIN_RING = 2 << 20
MESSAGES = [
    ("HELLO", 1, {"minor": 0, "library": "shmquant 0.1.0"}),
    ("HELLO", 0xFFFF_FFFF, {"minor": 9, "library": ""}),
    (
        "HELLO reply",
        1,
        {
            "minor": 0,
            "backing": 1,
            "instance": 0x0123_4567_89AB_CDEF,
            "session": 5,
            "token": KEY,
            "window": 64 << 20,
            "max_window": 256 << 20,
            "max_lanes": 16,
            "poll": 50,
            "library": "shmquant 0.1.0",
        },
    ),
    ("JOIN", 1, {"session": 5, "token": KEY, "window": 4 << 20}),
    ("JOIN reply", 1, {"lane": 2, "segment": 11, "generation": 1, "size": 4 << 20}),
    ("QUANTIZE", 2, {"descriptor": 97, "ready": 1, "timeout": m.NO_TIMEOUT, "ring": MIN_RING}),
    ("QUANTIZE", 3, {"descriptor": 97, "ready": 0, "timeout": 30_000, "releases": RELEASES}),
    (
        "QUANTIZE",
        4,
        {
            "descriptor": 97,
            "ready": 4,
            "timeout": 0,
            "flags": m.NAMED | m.REPLACE,
            "digest": KEY,
            "releases": RELEASES[:1],
            "name": "müsli",
        },
    ),
    ("QUANTIZE reply", 2, {"lease": {**DATASET, "flags": m.LEASE_FD}, "report": 80, "ring": MIN_RING}),
    ("QUANTIZE reply", 4, {"lease": {**DATASET, "flags": m.LEASE_DATASET}, "report": 0}),
    ("WROTE", 3, {"chunks": 12}),
    ("CONSUMED", 3, {"chunks": 9}),
    ("CANCEL", 0, {"lane": 2, "request": 3}),
    ("RELEASE", 0, {"releases": RELEASES}),
    ("RELEASE", 0, {"releases": []}),
    ("UNMAP", 0, {"segment": 7}),
    ("OPEN", 5, {"kind": m.OPEN_NAME, "name": "embeddings/2026"}),
    ("OPEN", 6, {"kind": m.OPEN_TICKET, "ticket": 99, "secret": KEY}),
    ("OPEN", 7, {"kind": m.OPEN_AGAIN, "extent": EXTENT}),
    ("OPEN reply", 5, {"lease": DATASET, "name": "embeddings/2026"}),
    ("OPEN reply", 6, {"lease": {**DATASET, "flags": 0}, "name": ""}),
    ("TICKET", 8, {"extent": EXTENT}),
    ("TICKET reply", 8, {"ticket": 99, "secret": KEY}),
    ("PUBLISH", 9, {"extent": EXTENT, "flags": 0, "name": "a"}),
    ("PUBLISH", 10, {"extent": EXTENT, "flags": m.REPLACE, "name": "x" * 1024}),
    ("PUBLISH reply", 9, {}),
    ("ALLOC", 17, {"bytes": 3 << 30, "purpose": m.INPUT, "timeout": 30_000}),
    ("ALLOC", 18, {"bytes": 1, "purpose": m.WARM, "timeout": m.NO_TIMEOUT}),
    ("ALLOC reply", 17, {"lease": {**DATASET, "flags": m.LEASE_FD}}),
    ("ALLOC reply", 18, {"lease": {"extent": dict.fromkeys(EXTENT, 0), "segment_size": 0, "flags": 0}}),
    ("DROP", 11, {"name": "a"}),
    ("DROP reply", 11, {}),
    ("LIST", 12, {"cursor": 0, "what": m.DATASETS}),
    ("LIST", 13, {"cursor": 4, "what": m.RESULTS}),
    ("LIST", 14, {"cursor": 0, "what": m.SESSIONS}),
    ("LIST", 15, {"cursor": 9, "what": m.INPUTS}),
    ("LIST reply", 12, {"cursor": 4, "entries": ['{"name":"a"}', "{}"]}),
    ("LIST reply", 13, {"cursor": 0, "entries": []}),
    ("STAT", 15, {}),
    ("STAT reply", 15, {"stat": '{"version":"0.1.0"}'}),
    ("PING", 16, {}),
    ("PING reply", 16, {}),
    ("BYE", 0, {}),
    *(
        ("ERROR", 2, {"code": code, "message": name, "hint": "", "column": ""})
        for code, name in m.CODES.items()
    ),
    (
        "ERROR",
        2,
        {
            "code": 3,
            "row": 4,
            "index": 2,
            "count": 3,
            "value": -math.inf,
            "message": 'column "emb", row 4: -inf',
            "hint": 'pass on_nonfinite="saturate"',
            "column": "emb",
        },
    ),
]


def patched(name, at, new, /, **values):
    """A frame with some bytes replaced."""
    raw = bytearray(m.encode(name, 1, **values))
    raw[at : at + len(new)] = new
    return bytes(raw)


PING = m.encode("PING", 1)
# Frames of a newer or older minor version, and the frame that they mean.
GROWTH = [
    ("a longer fixed part", m.frame(14, 1, bytes(24), b""), m.frame(14, 1, bytes(16), b"")),
    (
        "a longer fixed part before a tail",
        m.frame(1, 1, bytes(12), m.string("new")),
        m.frame(1, 1, bytes(8), m.string("new")),
    ),
    ("a shorter fixed part", m.frame(14, 1, bytes(8), b""), m.frame(14, 1, bytes(16), b"")),
    ("no fixed part", m.frame(14, 1), m.frame(14, 1, bytes(16), b"")),
    ("reserved bytes that are not zero", PING[:1] + b"\7" + PING[2:14] + b"\7\7", PING),
]
REFUSED = [
    ("empty", b""),
    ("shorter than the header", PING[:15]),
    ("version 0", patched("PING", 0, b"\0")),
    ("version 2", patched("PING", 0, b"\2")),
    ("length one less than the datagram", patched("PING", 4, b"\x0f")),
    ("length one more than the datagram", patched("PING", 4, b"\x11")),
    ("length of 4 GiB", patched("PING", 4, b"\xff\xff\xff\xff")),
    ("a type that nobody has", patched("PING", 2, b"\x12\x00")),
    ("a request's reply that nobody has", patched("PING", 2, b"\x04\x80")),
    ("a fixed part that leaves the frame", patched("PING", 12, b"\1\0")),
    ("bytes after the tail", m.frame(16, 1, b"", b"\0")),
    ("a string that leaves the frame", m.frame(13, 1, b"", b"\2\0\0\0a")),
    ("a string's length that leaves the frame", m.frame(13, 1, b"", b"\1\0\0")),
    ("a string of 4 GiB", m.frame(13, 1, b"", b"\xff\xff\xff\xffa")),
    ("a name that is not UTF-8", m.frame(13, 1, b"", b"\1\0\0\0\xff")),
    ("an empty name", m.encode("DROP", 1, name="")),
    ("a name of 1025 bytes", m.encode("DROP", 1, name="x" * 1025)),
    ("a name with a NUL", m.encode("DROP", 1, name="a\0b")),
    ("more releases than bytes", patched("RELEASE", 16, b"\xff\xff\xff\xff")),
    ("half a release", m.frame(7, 0, b"\1\0\0\0\0\0\0\0", bytes(12))),
    ("OPEN of kind 3", patched("OPEN", 16, b"\3", kind=1)),
    ("OPEN by ticket with a name", m.frame(9, 1, b"\1".ljust(64, b"\0"), m.string("a"))),
    ("ALLOC of purpose 2", m.encode("ALLOC", 1, bytes=1, purpose=2)),
    ("LIST of what 4", m.encode("LIST", 1, what=4)),
    ("more entries than bytes", patched("LIST reply", 24, b"\xff\xff\xff\xff")),
]


def row_spec(scheme=d.INT8, **more):
    """The usual spec: a range a row."""
    return d.Spec(scheme, **more)


UINT4_GROUPS = d.Spec(d.UINT4, d.ASYMMETRIC, d.GROUP, packing=d.LSB, group_size=32)
TENSOR = d.Spec(d.UINT8, d.ASYMMETRIC, d.TENSOR)
DIMENSION = d.Spec(d.INT8, d.SYMMETRIC, d.DIMENSION)
LEFT = d.Spec(d.AS_IS)
PLACED = {"extent": {"segment": 9, "generation": 2, "offset": 64, "length": 2**40}, "offset": 8}
MIN_WINDOW = 4 << 20


def vectors(rows, k, spec=0, **more):
    """A vector column."""
    return d.Item(d.VECTOR, "emb", rows, k, spec, **more)


def layer(name, rows, k, **more):
    """A layer, with its shape."""
    more.setdefault("shape", [rows, k])
    return d.Item(d.LAYER, name, rows, k, **more)


def columns(rows, items, specs, **more):
    """A columns table."""
    return d.Descriptor(d.COLUMNS, specs, rows, items, **more)


def layers(items, specs, **more):
    """A layers table."""
    return d.Descriptor(d.LAYERS, specs, len(items), items, **more)


def kept_table():
    """One column of each way a kept column can look."""
    rows = 1000
    item = d.Field(11)
    kept = [
        d.Kept("id", d.Field(6, 0), d.Data(rows, 0, [0, 8 * rows])),
        d.Kept("text", d.Field(32), d.Data(rows, 10, [125, 4 * (rows + 1), 2_500_000])),
        d.Kept(
            "tags",
            d.Field(40, children=[("item", item)]),
            d.Data(rows, 0, [0, 4 * (rows + 1)], [d.Data(300_000, 1, [37_500, 1_200_000])]),
        ),
        d.Kept(
            "kind",
            d.Field(50, 3, a=3, children=[("values", d.Field(32))]),
            d.Data(rows, 0, [0, rows], [d.Data(3, 0, [0, 16, 30])]),
        ),
        d.Kept("at", d.Field(25, a=1, timezone="UTC"), d.Data(rows, 0, [0, 8 * rows])),
        d.Kept("price", d.Field(13, a=12, b=2), d.Data(rows, 0, [0, 16 * rows])),
        d.Kept(
            "pair",
            d.Field(
                43, children=[("a", d.Field(3, 0)), ("b", d.Field(35))], metadata=[("k", "v"), ("l", "")]
            ),
            d.Data(rows, 0, [0], [d.Data(rows, 0, [0, rows]), d.Data(rows, 0, [0, 16 * rows, 777])]),
        ),
        d.Kept("nothing", d.Field(1), d.Data(rows, rows)),
    ]
    items = [kept[0], vectors(rows, 64), *kept[1:]]
    return columns(rows, items, [row_spec()], metadata=[("a", "1"), ("schlüssel", "wert")])


def encoded_column(rows, k, spec, **more):
    """A table of one vector column that the client encodes."""
    return columns(rows, [vectors(rows, k, encoded=True, **more)], [spec])


INT8_ASYMMETRIC_ROWS = d.Spec(d.INT8, d.ASYMMETRIC)
INT4_GROUPS = d.Spec(d.INT4, d.SYMMETRIC, d.GROUP, packing=d.LSB, group_size=24)
UINT2_GROUPS = d.Spec(d.UINT2, d.ASYMMETRIC, d.GROUP, packing=d.LSB, group_size=32)
# Every way that an encoded chunk is made of parts.
ENCODED = [
    ("encoded rows, one chunk", encoded_column(100, 64, row_spec())),
    ("encoded rows, the shortest", encoded_column(999, 8, INT8_ASYMMETRIC_ROWS)),
    ("encoded rows with zero points, streamed", encoded_column(50_000, 100, INT8_ASYMMETRIC_ROWS)),
    ("encoded rows: resident where values would not be", encoded_column(30_000, 96, row_spec())),
    ("encoded rows, packed", encoded_column(3001, 77, d.Spec(d.INT2, packing=d.LSB))),
    ("encoded rows longer than a chunk: two passes", encoded_column(3, 300_001, row_spec())),
    (
        "encoded rows longer than a chunk, packed, zero points, dropped ones: two passes",
        encoded_column(3, 300_001, d.Spec(d.UINT4, d.ASYMMETRIC, on_nonfinite=d.NULL, packing=d.LSB)),
    ),
    ("encoded rows longer than a chunk, streamed", encoded_column(15, 400_000, row_spec())),
    ("encoded groups, a short last one", encoded_column(10_000, 100, UINT4_GROUPS)),
    ("encoded groups, a padded byte a row", encoded_column(9000, 129, UINT2_GROUPS)),
    (
        "encoded groups, one a row",
        encoded_column(777, 33, d.Spec(d.UINT4, d.ASYMMETRIC, d.GROUP, 0, d.LSB, 40)),
    ),
    ("encoded groups in rows longer than a chunk", encoded_column(3, 300_001, UINT4_GROUPS)),
    (
        "encoded groups too long to be cut at, across chunks: two passes",
        encoded_column(2, 300_001, d.Spec(d.INT4, d.SYMMETRIC, d.GROUP, 0, d.LSB, 40_000)),
    ),
    ("encoded tensor in one chunk", encoded_column(512, 512, TENSOR)),
    ("encoded tensor in more: two passes", encoded_column(513, 512, TENSOR)),
    ("encoded tensor, two passes, streamed", encoded_column(10_000, 512, TENSOR)),
    ("encoded tensor, a value a row", encoded_column(1000, 1, TENSOR)),
    ("encoded dimension in one chunk", encoded_column(300, 50, d.Spec(d.INT8, d.ASYMMETRIC, d.DIMENSION))),
    ("encoded dimension, two passes, resident", encoded_column(20_000, 50, DIMENSION)),
    ("encoded dimension, two passes, streamed", encoded_column(90_000, 50, DIMENSION)),
    ("encoded dimension, as many as may be", encoded_column(9, 65_536, DIMENSION)),
    ("an encoded dimension whose chunks are larger than its values", encoded_column(1, 65_536, DIMENSION)),
    (
        "encoded by given parameters",
        encoded_column(
            400_000,
            3,
            d.Spec(d.INT8, d.ASYMMETRIC, d.DIMENSION),
            params_id=0x1122,
            scales=[0.5, 0.25, 2.0],
            zero_points=[1, -2, 127],
        ),
    ),
    (
        "encoded by given parameters, a row each, with dropped ones",
        encoded_column(
            9,
            33,
            d.Spec(d.UINT4, d.ASYMMETRIC, on_nonfinite=d.NULL, packing=d.LSB),
            params_id=7,
            scales=[0.5] * 9,
            zero_points=[8] * 9,
        ),
    ),
    (
        "encoded beside nulls, dropped ones",
        encoded_column(20_000, 32, row_spec(on_nonfinite=d.NULL), null_count=17),
    ),
    (
        "encoded rows beside nulls without elements",
        columns(
            20_000,
            [
                vectors(20_000, 0, null_count=2),
                vectors(20_000, 100, encoded=True, null_count=1, dtype=d.FLOAT16),
            ],
            [row_spec(on_nonfinite=d.NULL)],
        ),
    ),
    (
        "encoded: every type of value",
        columns(
            9000,
            [
                d.Item(d.VECTOR, "half", 9000, 100, 0, d.FLOAT16, encoded=True),
                d.Item(d.VECTOR, "brain", 9000, 100, 0, d.BFLOAT16, encoded=True),
                d.Item(d.VECTOR, "double", 9000, 100, 0, d.FLOAT64, encoded=True),
                d.Item(d.VECTOR, "all", 9000, 100, 2, d.FLOAT64, encoded=True),
            ],
            [row_spec(on_nonfinite=d.SATURATE), UINT4_GROUPS, TENSOR],
            flags=d.METRICS,
        ),
    ),
    (
        "encoded plain columns",
        columns(
            400_000,
            [
                d.Item(d.PLAIN, "one pass", 400_000, 1, 0, d.FLOAT16, encoded=True),
                d.Item(d.PLAIN, "two passes", 400_000, 1, 1, encoded=True, null_count=5),
                d.Item(
                    d.PLAIN, "given", 400_000, 1, 0, d.FLOAT64, params_id=3, scales=[0.25], zero_points=[9]
                ),
                d.Item(
                    d.PLAIN,
                    "given, encoded",
                    400_000,
                    1,
                    1,
                    d.FLOAT64,
                    params_id=3,
                    scales=[0.25],
                    zero_points=[-9],
                    encoded=True,
                ),
            ],
            [TENSOR, d.Spec(d.INT8, d.ASYMMETRIC, d.TENSOR, on_nonfinite=d.NULL)],
        ),
    ),
    (
        "encoded layers: odd k in one pass, codes across bytes",
        layers(
            [
                layer("rows", 4097, 129, spec=0, encoded=True),
                layer("groups", 5000, 33, spec=1, encoded=True),
                layer("short groups", 999, 25, spec=2, encoded=True),
                layer("packed rows", 777, 9, spec=3, encoded=True),
            ],
            [row_spec(on_nonfinite=d.NULL), UINT4_GROUPS, INT4_GROUPS, d.Spec(d.INT2, packing=d.LSB)],
        ),
    ),
    (
        "encoded layers: odd k in two passes, domains across chunks, codes across bytes",
        layers(
            [
                layer("rows", 9, 100_001, spec=0, encoded=True),
                layer("groups", 9, 100_001, spec=1, encoded=True),
                layer("groups of 24", 9, 100_001, spec=2, encoded=True, dtype=d.FLOAT64),
                layer("packed rows", 9, 100_001, spec=3, encoded=True, dtype=d.FLOAT16),
                layer("tensor", 701, 701, spec=4, encoded=True),
            ],
            [
                INT8_ASYMMETRIC_ROWS,
                UINT4_GROUPS,
                INT4_GROUPS,
                d.Spec(d.INT2, packing=d.LSB),
                d.Spec(d.UINT2, d.ASYMMETRIC, d.TENSOR, packing=d.LSB),
            ],
        ),
    ),
    (
        "encoded layers beside streamed ones, in an extent, null, empty, as they are",
        layers(
            [
                layer("encoded", 700, 500, spec=0, encoded=True),
                layer("streamed", 700, 500, spec=0),
                layer("none", 0, 0, null=True, shape=[]),
                layer("there", 700, 500, spec=0, **PLACED),
                layer("as it is", 700, 500, spec=2, dtype=d.FLOAT16),
                layer("no shape", 1, 100_001, spec=1, shape=[], encoded=True),
                layer("empty", 4, 0, spec=0),
                layer("cube", 64, 16, spec=1, shape=[8, 8, 16], encoded=True),
            ],
            [row_spec(), d.Spec(d.UINT8, d.ASYMMETRIC, d.TENSOR), LEFT],
            flags=d.METRICS | d.CONTINUE_ON_ERROR,
        ),
    ),
    (
        "encoded columns beside streamed ones and ones in an extent, two passes each",
        columns(
            9000,
            [
                d.Item(d.VECTOR, "streamed", 9000, 128, 0, null_count=1),
                d.Item(d.VECTOR, "encoded", 9000, 128, 0, null_count=9, encoded=True),
                d.Item(d.VECTOR, "there", 9000, 128, 0, **PLACED),
                d.Item(d.VECTOR, "again", 9000, 33, 1, d.FLOAT16, encoded=True),
            ],
            [TENSOR, d.Spec(d.UINT2, d.ASYMMETRIC, on_nonfinite=d.NULL, packing=d.LSB)],
        ),
    ),
]


# How the Rust test's arrow library prints their types.
KEPT_TYPES = {
    "id": "Int64",
    "text": "Utf8",
    "tags": "List(Float32)",
    "kind": "Dictionary(Int8, Utf8)",
    "at": 'Timestamp(ms, "UTC")',
    "price": "Decimal128(12, 2)",
    "pair": 'Struct("a": non-null Int8, "b": Utf8View)',
    "nothing": "Null",
}

DESCRIPTORS = [
    ("rows, one chunk", columns(100, [vectors(100, 64)], [row_spec()])),
    ("rows, streamed", columns(30_000, [vectors(30_000, 96)], [row_spec()])),
    ("rows that just fill a resident window", columns(16_380, [vectors(16_380, 64)], [row_spec()])),
    ("one row more than a resident window", columns(16_384, [vectors(16_384, 64)], [row_spec()])),
    ("rows longer than a chunk: two passes", columns(3, [vectors(3, 300_001)], [row_spec()])),
    (
        "rows longer than a chunk, streamed: scanned chunks are written twice",
        columns(5, [vectors(5, 400_000)], [row_spec()]),
    ),
    ("groups, whole rows", columns(10_000, [vectors(10_000, 33)], [UINT4_GROUPS])),
    ("groups in rows longer than a chunk", columns(3, [vectors(3, 300_000)], [UINT4_GROUPS])),
    (
        "groups too long to be cut at: two passes",
        columns(2, [vectors(2, 300_000)], [d.Spec(d.INT4, d.SYMMETRIC, d.GROUP, 0, d.LSB, 40_000)]),
    ),
    ("tensor in one chunk", columns(512, [vectors(512, 512)], [TENSOR])),
    ("tensor in more: two passes", columns(513, [vectors(513, 512)], [TENSOR])),
    ("dimension, two passes, streamed", columns(40_000, [vectors(40_000, 50)], [DIMENSION])),
    (
        "given parameters",
        columns(
            40_000,
            [vectors(40_000, 3, params_id=0x1122, scales=[0.5, 0.25, 2.0], zero_points=[0, 0, 0])],
            [DIMENSION],
        ),
    ),
    ("nulls", columns(20_000, [vectors(20_000, 32, null_count=17)], [row_spec(on_nonfinite=d.NULL)])),
    ("nulls of vectors without elements", columns(9, [vectors(9, 0, null_count=2)], [row_spec()])),
    ("no rows", columns(0, [vectors(0, 64)], [row_spec()])),
    (
        "every type of value",
        columns(
            5000,
            [
                d.Item(d.VECTOR, "half", 5000, 100, 0, d.FLOAT16),
                d.Item(d.VECTOR, "brain", 5000, 100, 0, d.BFLOAT16),
                d.Item(d.VECTOR, "double", 5000, 100, 0, d.FLOAT64),
                d.Item(d.PLAIN, "price", 5000, 1, 1, null_count=1),
            ],
            [row_spec(on_nonfinite=d.SATURATE), TENSOR],
            flags=d.METRICS,
        ),
    ),
    ("kept columns", kept_table()),
    (
        "layers: odd k, null, as it is, one row, no shape, empty",
        layers(
            [
                layer("odd", 4097, 129, spec=0),
                layer("odd groups", 1000, 33, spec=1),
                layer("none", 0, 0, null=True, shape=[]),
                layer("as it is", 700, 500, spec=2, dtype=d.FLOAT16),
                layer("one row", 1, 200_001, spec=0, shape=[200_001]),
                layer("no shape", 1, 77, spec=1, shape=[]),
                layer("empty", 4, 0, spec=0),
                layer("cube", 64, 16, spec=0, shape=[8, 8, 16]),
            ],
            [row_spec(), UINT4_GROUPS, LEFT],
            flags=d.CONTINUE_ON_ERROR | d.LARGE_NAMES,
        ),
    ),
    (
        "values in an extent: one pass, two passes",
        columns(
            9000,
            [vectors(9000, 128, **PLACED), d.Item(d.VECTOR, "b", 9000, 50, 1, d.FLOAT64, **PLACED)],
            [row_spec(), TENSOR],
        ),
    ),
    (
        "values in an extent beside streamed ones",
        columns(
            9000,
            [
                d.Item(d.VECTOR, "a", 9000, 128, 0, null_count=1),
                d.Item(d.VECTOR, "b", 9000, 128, 1, **PLACED),
                d.Item(d.VECTOR, "c", 9000, 128, 1),
                d.Item(d.PLAIN, "d", 9000, 1, 1, d.FLOAT16, **PLACED),
            ],
            [row_spec(), TENSOR],
        ),
    ),
    (
        "layers in an extent, one of them as it is",
        layers(
            [layer("a", 700, 500, spec=0, **PLACED), layer("b", 700, 500, spec=1, **PLACED)],
            [row_spec(), LEFT],
        ),
    ),
    (
        "layers: rows too long to be cut unaligned",
        layers([layer("wide", 9, 100_001, spec=0), layer("tensor", 700, 701, spec=1)], [row_spec(), TENSOR]),
    ),
    *ENCODED,
]


def plain(value):
    """JSON's form of a value: bytes as hex, what JSON cannot say as text, no reserved fields."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if key not in ("reserved", "n")}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def item_fields(item):
    """A descriptor's item in words."""
    if item.role == d.KEEP:
        return {"role": d.KEEP, "name": item.name, "arrow": KEPT_TYPES[item.name]}
    return plain(vars(item))


def chunk_fields(chunk, resident):
    """A chunk in a row: item, stream, kind, begin, bytes, start, at, and whether the client writes it."""
    written = not (resident and chunk.repeats)
    start = chunk.start if written else None
    return [chunk.item, chunk.stream, chunk.kind, chunk.begin, chunk.bytes, start, chunk.at, written]


def descriptor_vector(name, descriptor):
    """A descriptor, its bytes, and its chunks in the smallest window, in a ring of it, in a large window."""
    raw = descriptor.encode()
    lists = []
    for window, ring in ((MIN_WINDOW, 0), (MIN_WINDOW, MIN_RING), (64 << 20, 0)):
        chunks = d.cut(descriptor)
        resident = d.place(chunks, len(raw), window, ring) is None
        lists.append(
            {
                "window": window,
                "ring": ring,
                "resident": resident,
                "chunks": [chunk_fields(chunk, resident) for chunk in chunks],
            }
        )
    return {
        "what": name,
        "hex": raw.hex(),
        "table": descriptor.table,
        "flags": descriptor.flags,
        "rows": descriptor.rows,
        "metadata": descriptor.metadata,
        "specs": [plain(vars(spec)) for spec in descriptor.specs],
        "items": [item_fields(item) for item in descriptor.items],
        "lists": lists,
    }


def files():
    """Every file's name and text."""
    messages = []
    for name, request, values in MESSAGES:
        raw = m.encode(name, request, **values)
        fields = m.decode(raw)[2]
        messages.append({"name": name, "request": request, "fields": plain(fields), "hex": raw.hex()})
    growth = [{"what": what, "hex": raw.hex(), "means": means.hex()} for what, raw, means in GROWTH]
    refused = [{"what": what, "hex": raw.hex()} for what, raw in REFUSED]
    descriptors = [descriptor_vector(*each) for each in DESCRIPTORS]
    contents = {"messages": messages, "growth": growth, "refused": refused, "descriptors": descriptors}
    return {f"{name}.json": text(entries) for name, entries in contents.items()}


def text(entries):
    """One entry a line, so that a difference is a line."""
    lines = (json.dumps(entry, ensure_ascii=False) for entry in entries)
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in files().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
