"""Sections 1 and 3 of `protocol/PROTOCOL.md`: frames and messages, to bytes and back, with `struct` alone."""

import struct

VERSION = 1
REPLY = 0x8000
MAX_FRAME = 65_536
MAX_FDS = 8


def string(text):
    """Encode a *string*: its length, then its UTF-8."""
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw


def frame(kind, request, fixed=b"", tail=b""):
    """Put the header before a fixed part and a tail."""
    length = 16 + len(fixed) + len(tail)
    return struct.pack("<BBHIIHH", VERSION, 0, kind, length, request, len(fixed), 0) + fixed + tail


# ----------------------------------------------------------------------------------------------- 3. Messages

# A field is `name:code`: struct's code or a composite's name; in a tail `s` is a string, `*x` a list of x.
COMPOSITES = {
    "extent": "segment:Q generation:Q offset:Q length:Q",
    "release": "segment:Q generation:Q flags:Q",
    "lease": "extent:extent segment_size:Q flags:I reserved:I",
}
# type: (name, fixed part, tail)
MESSAGES = {
    0x0001: ("HELLO", "minor:I reserved:I", "library:s"),
    0x8001: (
        "HELLO reply",
        "minor:I backing:I instance:Q session:Q token:16s window:Q max_window:Q max_lanes:I poll:I",
        "library:s",
    ),
    0x0002: ("JOIN", "session:Q token:16s window:Q", ""),
    0x8002: ("JOIN reply", "lane:I reserved:I segment:Q generation:Q size:Q", ""),
    0x0003: (
        "QUANTIZE",
        "descriptor:Q ready:I timeout:I flags:I n:I digest:16s ring:Q",
        "releases:*release name:s",
    ),
    0x8003: ("QUANTIZE reply", "lease:lease report:Q ring:Q", ""),
    0x0004: ("WROTE", "chunks:I", ""),
    0x0005: ("CONSUMED", "chunks:I", ""),
    0x0006: ("CANCEL", "lane:I request:I", ""),
    0x0007: ("RELEASE", "n:I reserved:I", "releases:*release"),
    0x0008: ("UNMAP", "segment:Q", ""),
    0x0009: ("OPEN", "kind:I reserved:I ticket:Q secret:16s extent:extent", "name:s"),
    0x8009: ("OPEN reply", "lease:lease", "name:s"),
    0x000A: ("TICKET", "extent:extent", ""),
    0x800A: ("TICKET reply", "ticket:Q secret:16s", ""),
    0x000B: ("PUBLISH", "extent:extent flags:I reserved:I", "name:s"),
    0x800B: ("PUBLISH reply", "", ""),
    0x000C: ("ALLOC", "bytes:Q purpose:I timeout:I", ""),
    0x800C: ("ALLOC reply", "lease:lease", ""),
    0x000D: ("DROP", "", "name:s"),
    0x800D: ("DROP reply", "", ""),
    0x000E: ("LIST", "cursor:Q what:I reserved:I", ""),
    0x800E: ("LIST reply", "cursor:Q n:I reserved:I", "entries:*s"),
    0x000F: ("STAT", "", ""),
    0x800F: ("STAT reply", "", "stat:s"),
    0x0010: ("PING", "", ""),
    0x8010: ("PING reply", "", ""),
    0x0011: ("BYE", "", ""),
    0xFFFF: (
        "ERROR",
        "code:I reserved:I row:Q index:Q count:Q value:d",
        "message:s hint:s column:s",
    ),
}
TYPES = {name: kind for kind, (name, _, _) in MESSAGES.items()}
CODES = {
    1: "PROTOCOL",
    2: "VERSION",
    3: "INVALID_INPUT",
    4: "UNSUPPORTED",
    5: "NO_ROOM",
    6: "DEADLINE",
    7: "CANCELLED",
    8: "NOT_FOUND",
    9: "NAME_EXISTS",
    10: "GONE",
    11: "INTERNAL",
    12: "STOPPING",
    13: "LIMIT",
}
NAMED, REPLACE = 1, 2
NO_TIMEOUT = 0xFFFF_FFFF
INPUT, WARM = 0, 1
OPEN_NAME, OPEN_TICKET, OPEN_AGAIN = 0, 1, 2
LEASE_FD, LEASE_DATASET = 1, 2
DATASETS, RESULTS, SESSIONS, INPUTS = 0, 1, 2, 3
TAINTED = 1
# Strings that are there only sometimes.
OPTIONAL = {
    ("QUANTIZE", "name"): lambda values: values.get("flags", 0) & NAMED,
    ("OPEN", "name"): lambda values: values.get("kind", 0) == OPEN_NAME,
}


def _fields(layout):
    return [item.split(":") for item in layout.split()]


def _size(code):
    if code in COMPOSITES:
        return sum(_size(inner) for _, inner in _fields(COMPOSITES[code]))
    return struct.calcsize("<" + code)


def pack(layout, values):
    parts = []
    for name, code in _fields(layout):
        if code in COMPOSITES:
            parts.append(pack(COMPOSITES[code], values.get(name, {})))
        else:
            parts.append(struct.pack("<" + code, values.get(name, b"" if code == "16s" else 0)))
    return b"".join(parts)


def unpack(layout, raw):
    values, at = {}, 0
    for name, code in _fields(layout):
        # A shorter fixed part comes from an older peer: missing fields are 0.
        part = raw[at : at + _size(code)].ljust(_size(code), b"\0")
        at += _size(code)
        if code in COMPOSITES:
            values[name] = unpack(COMPOSITES[code], part)
        else:
            values[name] = struct.unpack("<" + code, part)[0]
    return values


def encode(name, request=0, /, **values):
    """Encode a message by its name in the page's table; a field that is not given is 0 or empty."""
    kind = TYPES[name]
    _, fixed, tail = MESSAGES[kind]
    parts = []
    for key, code in _fields(tail):
        if not OPTIONAL.get((name, key), lambda _: True)(values):
            continue
        if code == "s":
            parts.append(string(values.get(key, "")))
        else:
            items = values.get(key, [])
            values["n"] = len(items)
            parts += [string(i) if code == "*s" else pack(COMPOSITES[code[1:]], i) for i in items]
    return frame(kind, request, pack(fixed, values), b"".join(parts))


def decode(raw):
    """Decode a frame into its name, its request number and its fields."""
    version, _, kind, length, request, fixed_size, _ = struct.unpack_from("<BBHIIHH", raw)
    if version != VERSION or length != len(raw) or 16 + fixed_size > length or kind not in MESSAGES:
        says = f"version {version}, type {kind:#x}, length {length}"
        raise ValueError(f"a frame of {len(raw)} bytes says {says}")
    name, fixed, tail = MESSAGES[kind]
    values = unpack(fixed, raw[16 : 16 + fixed_size])
    at = 16 + fixed_size

    def take_string():
        nonlocal at
        (size,) = struct.unpack_from("<I", raw, at)
        text = raw[at + 4 : at + 4 + size]
        if len(text) != size:
            raise ValueError(f"{name}: a string of {size} bytes at {at} leaves the frame of {length}")
        at += 4 + size
        return text.decode()

    for key, code in _fields(tail):
        if not OPTIONAL.get((name, key), lambda _: True)(values):
            continue
        if code == "s":
            values[key] = take_string()
        elif code == "*s":
            values[key] = [take_string() for _ in range(values["n"])]
        else:
            size = _size(code[1:])
            values[key] = [
                unpack(COMPOSITES[code[1:]], raw[at + i * size : at + i * size + size])
                for i in range(values["n"])
            ]
            at += values["n"] * size
    if at != length:
        raise ValueError(f"{name}: {length - at} bytes are left after the tail")
    return name, request, values


def release_of(lease, tainted=False):
    """The *release* of one hold on a lease."""
    extent = lease["extent"]
    return {
        "segment": extent["segment"],
        "generation": extent["generation"],
        "flags": TAINTED if tainted else 0,
    }


class DaemonError(Exception):
    """An `ERROR` reply."""

    def __init__(self, fields):
        self.code = CODES.get(fields["code"], f"code {fields['code']}")
        self.message, self.hint = fields["message"], fields["hint"]
        self.column, self.row, self.index = fields["column"], fields["row"], fields["index"]
        self.count, self.value = fields["count"], fields["value"]
        super().__init__(f"{self.code}: {self.message}" + (f" (hint: {self.hint})" if self.hint else ""))
