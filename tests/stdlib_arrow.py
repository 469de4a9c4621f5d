"""Read an Arrow IPC file with `struct` alone: as much of its flatbuffers as finding the buffers needs.

Section 8 of `protocol/PROTOCOL.md` says that a result is such a file; this is the proof that nothing else is
needed to read one. Types that shmquant never writes (unions, run-end encoding, list views) are refused.
"""

import struct
from dataclasses import dataclass

ARROW_MAGIC = b"ARROW1"
# The members of Arrow's `Type` union that are read here.
TYPES = {
    1: "null",
    2: "int",
    3: "float",
    4: "binary",
    5: "utf8",
    6: "bool",
    7: "decimal",
    8: "date",
    9: "time",
    10: "timestamp",
    11: "interval",
    12: "list",
    13: "struct",
    15: "fixed_size_binary",
    16: "fixed_size_list",
    17: "map",
    18: "duration",
    19: "large_binary",
    20: "large_utf8",
    21: "large_list",
}
BUFFERS = {
    "null": 0,
    "struct": 1,
    "fixed_size_list": 1,
    "binary": 3,
    "utf8": 3,
    "large_binary": 3,
    "large_utf8": 3,
}
SCHEMA, DICTIONARY_BATCH, RECORD_BATCH = 1, 2, 3


class Table:
    """A flatbuffers table at a place in a buffer; its fields by their slots."""

    def __init__(self, buffer, at):
        self.buffer, self.at = buffer, at
        self.vtable = at - struct.unpack_from("<i", buffer, at)[0]

    @classmethod
    def root(cls, buffer):
        """The table that a buffer's first offset names."""
        return cls(buffer, struct.unpack_from("<I", buffer, 0)[0])

    def _place(self, slot):
        (size,) = struct.unpack_from("<H", self.buffer, self.vtable)
        entry = 4 + 2 * slot
        (offset,) = struct.unpack_from("<H", self.buffer, self.vtable + entry) if entry < size else (0,)
        return self.at + offset if offset else None

    def scalar(self, slot, code, default=0):
        """A number."""
        place = self._place(slot)
        return default if place is None else struct.unpack_from("<" + code, self.buffer, place)[0]

    def _reference(self, slot):
        place = self._place(slot)
        return None if place is None else place + struct.unpack_from("<I", self.buffer, place)[0]

    def table(self, slot):
        """A table, or None."""
        at = self._reference(slot)
        return None if at is None else Table(self.buffer, at)

    def text(self, slot):
        """A string, empty if it is not there."""
        at = self._reference(slot)
        if at is None:
            return ""
        (size,) = struct.unpack_from("<I", self.buffer, at)
        return bytes(self.buffer[at + 4 : at + 4 + size]).decode()

    def structs(self, slot, code):
        """A vector of structs, each unpacked by `code`."""
        at = self._reference(slot)
        if at is None:
            return []
        (n,) = struct.unpack_from("<I", self.buffer, at)
        size = struct.calcsize("<" + code)
        return [struct.unpack_from("<" + code, self.buffer, at + 4 + i * size) for i in range(n)]

    def tables(self, slot):
        """A vector of tables."""
        at = self._reference(slot)
        if at is None:
            return []
        (n,) = struct.unpack_from("<I", self.buffer, at)
        places = range(at + 4, at + 4 + 4 * n, 4)
        return [Table(self.buffer, p + struct.unpack_from("<I", self.buffer, p)[0]) for p in places]


@dataclass
class Field:
    """A field of the schema."""

    name: str
    type: str
    detail: tuple  # int: (bits, signed); float: (precision,); fixed sizes: (size,)
    metadata: dict
    children: list
    dictionary: int | None

    @classmethod
    def read(cls, table):
        """Read Arrow's `Field`."""
        name, detail = TYPES[table.scalar(2, "B")], ()
        inner, encoding = table.table(3), table.table(4)
        if name == "int":
            detail = (inner.scalar(0, "i"), bool(inner.scalar(1, "B")))
        elif name == "float":
            detail = (inner.scalar(0, "h"),)
        elif name in ("fixed_size_list", "fixed_size_binary"):
            detail = (inner.scalar(0, "i"),)
        children = [cls.read(child) for child in table.tables(5)]
        metadata = {pair.text(0): pair.text(1) for pair in table.tables(6)}
        dictionary = encoding.scalar(0, "q") if encoding else None
        return cls(table.text(0), name, detail, metadata, children, dictionary)


@dataclass
class Column:
    """A node of a record batch: its length, its buffers (views of the file) and its children."""

    field: Field
    length: int
    null_count: int
    buffers: list
    children: list

    def values(self):
        """The numbers of a plain or fixed-size-list column, flat; the values buffer, cut to its length."""
        if self.field.type == "fixed_size_list":
            return self.children[0].values()
        if self.field.type == "int":
            bits, signed = self.field.detail
            code = {8: "b", 16: "h", 32: "i", 64: "q"}[bits]
            code = code if signed else code.upper()
        else:
            code = {0: "e", 1: "f", 2: "d"}[self.field.detail[0]]
        size = struct.calcsize("<" + code)
        return self.buffers[1][: self.length * size].cast("B").cast(code)

    def offsets(self):
        """The offsets of a list, string or binary column."""
        code, size = ("q", 8) if self.field.type.startswith("large_") else ("i", 4)
        return self.buffers[1][: (self.length + 1) * size].cast(code) if self.length else [0]

    def item(self, row):
        """One row of a list, string or binary column: numbers, text or bytes; None if it is null."""
        if self.null_count and not self.buffers[0][row // 8] >> row % 8 & 1:
            return None
        begin, end = self.offsets()[row], self.offsets()[row + 1]
        if self.field.type.endswith("list"):
            return list(self.children[0].values()[begin:end])
        raw = bytes(self.buffers[2][begin:end])
        return raw.decode() if self.field.type.endswith("utf8") else raw


class ArrowFile:
    """An Arrow IPC file in memory: `fields`, `metadata`, `batches` (name → Column) and `dictionaries`."""

    def __init__(self, view):
        self.view = view
        if bytes(view[:6]) != ARROW_MAGIC or bytes(view[-6:]) != ARROW_MAGIC:
            raise ValueError("not an Arrow IPC file")
        (size,) = struct.unpack_from("<i", view, len(view) - 10)
        footer = Table.root(view[len(view) - 10 - size : len(view) - 10])
        schema = footer.table(1)
        self.fields = [Field.read(field) for field in schema.tables(1)]
        self.metadata = {pair.text(0): pair.text(1) for pair in schema.tables(2)}
        self.dictionaries = {}
        values_of = {}
        for place in self.fields:
            self._dictionary_fields(place, values_of)
        for block in footer.structs(2, "qi4xq"):
            header, body = self._message(*block, DICTIONARY_BATCH)
            number = header.scalar(0, "q")
            (self.dictionaries[number],) = self._columns(header.table(1), body, [values_of[number]])
        self.batches = []
        for block in footer.structs(3, "qi4xq"):
            header, body = self._message(*block, RECORD_BATCH)
            columns = self._columns(header, body, self.fields)
            self.batches.append({column.field.name: column for column in columns})

    def _dictionary_fields(self, place, values_of):
        if place.dictionary is not None:
            values_of[place.dictionary] = Field("", place.type, place.detail, {}, place.children, None)
            place.type, place.detail, place.children = "int", (8, True), []
        for child in place.children:
            self._dictionary_fields(child, values_of)

    def _message(self, offset, metadata_size, body_size, kind):
        """A message's header and body; its metadata begins with a continuation mark and its size."""
        message = Table.root(self.view[offset + 8 : offset + metadata_size])
        if message.scalar(1, "B") != kind:
            raise ValueError(f"the block at {offset} is a message of kind {message.scalar(1, 'B')}")
        body = offset + metadata_size
        return message.table(2), self.view[body : body + body_size]

    def _columns(self, batch, body, fields):
        if batch.table(3) is not None:
            raise ValueError("the buffers are compressed")
        nodes, buffers = iter(batch.structs(1, "qq")), iter(batch.structs(2, "qq"))

        def column(place):
            length, null_count = next(nodes)
            spans = [next(buffers) for _ in range(BUFFERS.get(place.type, 2))]
            views = [body[begin : begin + size] for begin, size in spans]
            return Column(place, length, null_count, views, [column(child) for child in place.children])

        return [column(place) for place in fields]
