"""Sections 4 to 6 of `protocol/PROTOCOL.md`: the descriptor's bytes, the chunks that follow from it, and what
an encoded chunk is made of."""

import struct
from dataclasses import dataclass, field

from stdlib_messages import COMPOSITES, pack, string

MAGIC = 0x3144_5153
LAYERS, COLUMNS = 1, 2
METRICS, CONTINUE_ON_ERROR, LARGE_NAMES = 1, 2, 4
AS_IS, INT8, UINT8, INT4, UINT4, INT2, UINT2 = range(7)
SYMMETRIC, ASYMMETRIC = 1, 2
TENSOR, ROW, DIMENSION, GROUP = 1, 2, 3, 4
ERROR, NULL, SATURATE = 0, 1, 2
UNPACKED, LSB = 0, 1
LAYER, VECTOR, PLAIN, KEEP = 1, 2, 3, 4
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = 1, 2, 3, 4
NULL_LAYER, EXTENT, ENCODED = 1, 2, 4
ELEMENT_SIZE = {FLOAT16: 2, BFLOAT16: 2, FLOAT32: 4, FLOAT64: 8}
BITS = {INT8: 8, UINT8: 8, INT4: 4, UINT4: 4, INT2: 2, UINT2: 2}


@dataclass
class Spec:
    """How values become codes."""

    scheme: int
    mapping: int = SYMMETRIC
    granularity: int = ROW
    on_nonfinite: int = ERROR
    packing: int = UNPACKED
    group_size: int = 0

    def encode(self):
        """Twelve bytes."""
        head = (self.scheme, self.mapping, self.granularity, self.on_nonfinite, self.packing)
        return struct.pack("<5B3xI", *head, self.group_size)


@dataclass
class Item:
    """A layer, a vector column or a plain column that is quantized."""

    role: int
    name: str
    rows: int
    k: int
    spec: int = 0
    dtype: int = FLOAT32
    null: bool = False
    null_count: int = 0
    shape: list = field(default_factory=list)
    params_id: int = 0
    scales: list = field(default_factory=list)
    zero_points: list = field(default_factory=list)
    extent: dict | None = None  # where the values lie, unless they cross through the window
    offset: int = 0
    encoded: bool = False  # the client encodes the values

    def encode(self):
        """The item's bytes in the descriptor."""
        parts = [struct.pack("<B", self.role), string(self.name)]
        flags = (NULL_LAYER if self.null else 0) | (EXTENT if self.extent else 0)
        flags |= ENCODED if self.encoded else 0
        parts.append(struct.pack("<HBB", self.spec, self.dtype, flags))
        parts.append(struct.pack("<QQQ", self.rows, self.k, self.null_count))
        parts.append(struct.pack(f"<B{len(self.shape)}q", len(self.shape), *self.shape))
        n = len(self.scales)
        parts.append(struct.pack("<Q", n))
        if n:
            parts.append(struct.pack(f"<Q{n}f{n}i", self.params_id, *self.scales, *self.zero_points))
        if self.extent:
            parts.append(pack(COMPOSITES["extent"], self.extent) + struct.pack("<Q", self.offset))
        return b"".join(parts)


@dataclass
class Field:
    """The Arrow type of a kept column; `type` is the page's code."""

    type: int
    flags: int = 1
    a: int = 0
    b: int = 0
    timezone: str = ""
    metadata: list = field(default_factory=list)
    children: list = field(default_factory=list)  # (name, Field)

    def encode(self):
        """The field's bytes in the descriptor."""
        parts = [struct.pack("<BBii", self.type, self.flags, self.a, self.b), string(self.timezone)]
        parts.append(struct.pack("<I", len(self.metadata)))
        parts += [string(key) + string(value) for key, value in self.metadata]
        parts.append(struct.pack("<H", len(self.children)))
        parts += [string(name) + child.encode() for name, child in self.children]
        return b"".join(parts)


@dataclass
class Data:
    """The buffers of a kept column: their sizes, in IPC order."""

    length: int
    null_count: int = 0
    buffers: list = field(default_factory=list)
    children: list = field(default_factory=list)

    def encode(self):
        """The data's bytes in the descriptor."""
        n = len(self.buffers)
        head = struct.pack(f"<QQH{n}QH", self.length, self.null_count, n, *self.buffers, len(self.children))
        return head + b"".join(child.encode() for child in self.children)

    def preorder(self):
        """The sizes of all buffers that are not empty, nodes in preorder."""
        own = [size for size in self.buffers if size]
        return own + [size for child in self.children for size in child.preorder()]


@dataclass
class Kept:
    """A column that goes along as it is."""

    name: str
    field: Field
    data: Data
    role: int = KEEP

    def encode(self):
        """The item's bytes in the descriptor."""
        return struct.pack("<B", KEEP) + string(self.name) + self.field.encode() + self.data.encode()


@dataclass
class Descriptor:
    """What is to be quantized, and how; `rows` is the table's (layers: their number)."""

    table: int
    specs: list
    rows: int
    items: list
    flags: int = 0
    metadata: list = field(default_factory=list)

    def encode(self):
        """The bytes that lie at the window's start."""
        parts = [struct.pack("<IBBH", MAGIC, self.table, self.flags, len(self.specs))]
        parts += [spec.encode() for spec in self.specs]
        parts.append(struct.pack("<I", len(self.metadata)))
        parts += [string(key) + string(value) for key, value in self.metadata]
        parts.append(struct.pack("<QI", self.rows, len(self.items)))
        return b"".join(parts + [item.encode() for item in self.items])


# ------------------------------------------------------------------------------------------------- 5. Chunks

CHUNK = 1_048_576
COPY, FUSED, SCAN, ENCODE = "copy", "fused", "scan", "encode"


@dataclass
class Chunk:
    """A run of one stream: which bytes, and where they lie in the window."""

    item: int
    stream: int  # among the item's streams: [validity,] values, or the kept buffers that are not empty
    kind: str
    begin: int
    bytes: int  # 0 if the values lie in an extent
    repeats: bool = False  # an Encode chunk that takes the bytes of a Scan chunk over the same elements
    first: int = 0  # of Fused, Scan and Encode chunks: the first element
    count: int = 0  # and how many
    start: int = 0  # the cursor where it starts
    at: int = 0  # its offset in the window


def ceil64(n):
    """Round up to 64."""
    return (n + 63) // 64 * 64


def value_runs(item, spec):
    """Cut an item's values: `(kind, first element, elements)` of every chunk."""
    rows, k, n = item.rows, item.k, item.rows * item.k
    limit = CHUNK // ELEMENT_SIZE[item.dtype]
    aligned = item.role in (VECTOR, PLAIN) or k % 8 == 0 or rows == 1
    whole_rows = 8 * k <= limit or (aligned and k <= limit)
    rows_a_chunk = limit // k if aligned else limit // k // 8 * 8

    def by_rows():
        step = rows_a_chunk * k
        return [(at, min(step, n - at)) for at in range(0, n, step)]

    def within_rows(step):
        return [(r * k + at, min(step, k - at)) for r in range(rows) for at in range(0, k, step)]

    if not item.scales:
        fused = None
        if spec.granularity in (TENSOR, DIMENSION):
            fused = [(0, n)] if n <= limit else None
        elif whole_rows:
            fused = by_rows()
        elif spec.granularity == GROUP and aligned and 8 * spec.group_size <= limit:
            fused = within_rows(8 * spec.group_size * (limit // (8 * spec.group_size)))
        if fused is not None:
            return [(FUSED, *run) for run in fused]
    if item.role == LAYER:
        runs = [(at, min(limit, n - at)) for at in range(0, n, limit)]
    else:
        runs = by_rows() if whole_rows else within_rows(limit)
    scans = [] if item.scales else [(SCAN, *run) for run in runs]
    return scans + [(ENCODE, *run) for run in runs]


def cut(descriptor):
    """All chunks in order, not yet placed."""
    chunks = []

    def copy(item, stream, size, placed=False):
        for at in range(0, size, CHUNK):
            chunks.append(Chunk(item, stream, COPY, at, 0 if placed else min(CHUNK, size - at)))

    for index, item in enumerate(descriptor.items):
        if item.role == KEEP:
            for stream, size in enumerate(item.data.preorder()):
                copy(index, stream, size)
            continue
        stream = 0
        if item.null_count:
            copy(index, stream, (item.rows + 7) // 8)
            stream += 1
        if item.rows * item.k == 0:
            continue
        size, spec = ELEMENT_SIZE[item.dtype], descriptor.specs[item.spec]
        if spec.scheme == AS_IS:
            copy(index, stream, item.rows * item.k * size, item.extent is not None)
            continue
        for kind, first, count in value_runs(item, spec):
            repeats = kind == ENCODE and not item.scales and not item.encoded
            taken = 0 if item.extent else count * size
            if item.encoded:
                _, taken = parts(item, spec, kind, first, count)
            chunks.append(Chunk(index, stream, kind, first * size, taken, repeats, first, count))
    return chunks


def place(chunks, descriptor_bytes, window, wanted=0):
    """Give every chunk its place; the ring's bytes if the list is streamed, None if it is resident."""
    base = ceil64(descriptor_bytes)
    ring = (window - base) // 64 * 64
    resident = sum(ceil64(chunk.bytes) for chunk in chunks if not chunk.repeats) <= ring
    if not resident and wanted:
        ring = min(ring, wanted // 64 * 64)
    cursor, scanned = 0, {}
    for chunk in chunks:
        size = ceil64(chunk.bytes)
        key = (chunk.item, chunk.begin)
        if resident and chunk.repeats:
            chunk.start = scanned[key]
        else:
            if not resident and size and cursor // ring != (cursor + size - 1) // ring:
                cursor = (cursor // ring + 1) * ring
            chunk.start = cursor
            cursor += size
            if chunk.kind == SCAN:
                scanned[key] = chunk.start
        chunk.at = base + chunk.start % ring
    return None if resident else ring


# ----------------------------------------------------------------------------------------------- 6. Findings

HEADER = 128


def touched(item, spec, first, count):
    """The parameters of the domains that a run of elements belongs to."""
    if spec.granularity == TENSOR:
        return range(1)
    if spec.granularity == DIMENSION:
        return range(item.k)
    group = item.k if spec.granularity == ROW else spec.group_size
    groups = (item.k + group - 1) // group

    def of(element):
        return element // item.k * groups + element % item.k // group

    return range(of(first), of(first + count - 1) + 1)


def rows_touched(item, first, count):
    """The rows that a run of elements lies in."""
    return range(first // item.k, (first + count - 1) // item.k + 1)


def code_bytes(item, spec, first, count):
    """The bytes of the codes of a run of elements: a layer is packed flat, every other row for itself."""
    codes_a_byte = 8 // BITS[spec.scheme] if spec.packing == LSB else 1
    if item.role == LAYER:
        return -(-count // codes_a_byte)
    rows, end = rows_touched(item, first, count), first + count
    inside = [min(end, (row + 1) * item.k) - max(first, row * item.k) for row in (rows[0], rows[-1])]
    whole = -(-item.k // codes_a_byte)
    ends = inside[: len(rows)]
    return sum(-(-n // codes_a_byte) for n in ends) + (len(rows) - len(ends)) * whole


def parts(item, spec, kind, first, count):
    """Where a chunk's parts lie, `{name: (offset, bytes)}`, and the chunk's bytes."""
    parameters = len(touched(item, spec, first, count))
    sizes = {"header": HEADER}
    if kind in (FUSED, ENCODE):
        sizes["codes"] = code_bytes(item, spec, first, count)
    if kind == FUSED:
        sizes["scales"] = 4 * parameters
        if spec.mapping == ASYMMETRIC:
            sizes["zero_points"] = parameters
    if kind == SCAN:
        sizes["ranges"] = 8 * parameters
    elif item.role in (VECTOR, PLAIN) and spec.on_nonfinite == NULL:
        sizes["dropped"] = -(-len(rows_touched(item, first, count)) // 8)
    places, end = {}, 0
    for name, size in sizes.items():
        places[name] = (end, size)
        end = (end + size + 7) // 8 * 8
    return places, end
