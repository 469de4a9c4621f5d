"""The protocol, spoken by the second client to a real daemon; results against arithmetic in plain Python."""

import array
import base64
import contextlib
import json
import math
import mmap
import os
import random
import socket
import struct
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import make_vectors
import stdlib_descriptor as d
import stdlib_messages as m
from stdlib_arrow import ArrowFile
from stdlib_client import Connection, Session

WINDOW = 4 << 20
TINY = 2.0**-126


@pytest.fixture
def session(address):
    """A session of this process."""
    session = Session(address)
    yield session
    session.close()


@pytest.fixture
def lane(session):
    """A lane with the smallest window."""
    lane = session.lane(WINDOW)
    yield lane
    lane.close()


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


# Results.


def test_rows_in_one_round_trip(lane):
    values = numbers(100 * 64)
    lease, file, batch, (report,) = quantize(lane, column_of(100, 64, INT8_ROWS), [values])
    scales, _, codes = by_groups(values, 64, 64, symmetric, -127, 127)
    assert list(batch["emb"].values()) == codes
    assert list(batch["emb_scale"].values()) == scales
    assert [field.name for field in file.fields] == ["emb", "emb_scale"]
    assert report["n"] == 6400 and report["n_nonfinite"] == 0 and math.isnan(report["mse"])
    assert lane.consumed_notices == 0
    assert lease["flags"] & m.LEASE_FD


def test_groups_with_a_short_last_one(lane):
    values = numbers(50 * 100)
    _, _, batch, _ = quantize(lane, column_of(50, 100, UINT4_GROUPS), [values])
    scales, zero_points, codes = by_groups(values, 100, 32, asymmetric, 0, 15)
    assert list(batch["emb"].values()) == row_nibbles(codes, 100)
    assert list(batch["emb_scale"].values()) == scales
    assert list(batch["emb_zero_point"].values()) == zero_points
    assert batch["emb_scale"].field.detail == (4,)


def test_odd_rows_are_padded_each(lane):
    values = numbers(9 * 33)
    _, _, batch, _ = quantize(lane, column_of(9, 33, UINT4_GROUPS), [values])
    _, _, codes = by_groups(values, 33, 32, asymmetric, 0, 15)
    assert batch["emb"].field.detail == (17,)
    assert list(batch["emb"].values()) == row_nibbles(codes, 33)


def test_rows_through_a_smaller_window(lane):
    rows, k = 20_000, 96
    values = numbers(rows * k)
    assert len(values) * 4 > WINDOW
    _, _, batch, (report,) = quantize(lane, column_of(rows, k, INT8_ROWS), [values])
    scales, _, codes = by_groups(values, k, k, symmetric, -127, 127)
    assert list(batch["emb_scale"].values()) == scales
    assert list(batch["emb"].values()) == codes
    assert report["n"] == rows * k
    assert lane.consumed_notices > 0


def test_groups_of_rows_longer_than_a_chunk(lane):
    rows, k = 5, 300_000
    values = numbers(rows * k)
    _, _, batch, _ = quantize(lane, column_of(rows, k, UINT4_GROUPS), [values])
    scales, zero_points, codes = by_groups(values, k, 32, asymmetric, 0, 15)
    assert list(batch["emb_scale"].values()) == scales
    assert list(batch["emb_zero_point"].values()) == zero_points
    assert list(batch["emb"].values()) == row_nibbles(codes, k)
    assert lane.consumed_notices > 0


@pytest.mark.parametrize("rows", [3000, 9000], ids=["resident", "streamed"])
def test_a_tensor_in_two_passes(lane, rows):
    k = 128
    values = numbers(rows * k)
    spec = d.Spec(d.UINT8, d.ASYMMETRIC, d.TENSOR)
    descriptor = column_of(rows, k, spec)
    _, _, batch, _ = quantize(lane, descriptor, [values])
    scale, zero_point, codes = asymmetric(values, 0, 255)
    assert list(batch["emb"].values()) == codes
    facts = json.loads(batch["emb"].field.metadata["ARROW:extension:metadata"])
    assert base64.b64decode(facts["params_b64"]["scale"]) == struct.pack("<f", scale)
    assert base64.b64decode(facts["params_b64"]["zero_point"]) == struct.pack("<f", zero_point)
    assert (lane.consumed_notices > 0) == (rows == 9000)
    assert all(chunk.kind in (d.SCAN, d.ENCODE) for chunk in d.cut(descriptor))


def test_given_parameters(lane):
    scales, zero_points = [0.5, 0.25, 2.0], [1, -2, 3]
    values = numbers(3 * 1000)
    spec = d.Spec(d.INT8, d.ASYMMETRIC, d.DIMENSION)
    packed = struct.pack("<3f3i", *scales, *zero_points)
    number = params_id(packed)
    given = {"params_id": number, "scales": scales, "zero_points": zero_points}
    _, file, batch, _ = quantize(lane, column_of(1000, 3, spec, **given), [values])
    codes = array.array("b", bytes(len(values)))
    for i in range(3):
        codes[i::3] = array.array("b", encode(values[i::3], scales[i], zero_points[i], -128, 127))
    assert list(batch["emb"].values()) == list(codes)
    ids = batch["emb_params_id"]
    dictionary = file.dictionaries[min(file.dictionaries)]
    assert {dictionary.values()[i] for i in ids.values()} == {number}


def params_id(packed):
    """FNV-1a, 64 bits."""
    number = 0xCBF29CE484222325
    for byte in packed:
        number = (number ^ byte) * 0x100000001B3 % 2**64
    return number


@pytest.mark.parametrize(("dtype", "code"), [(d.FLOAT16, "e"), (d.FLOAT64, "d"), (d.BFLOAT16, None)])
def test_other_types_of_values(lane, dtype, code):
    exact = [v / 8 for v in range(-120, 120)]
    if code is None:
        raw = b"".join(struct.pack("<f", v)[2:] for v in exact)
    else:
        raw = struct.pack(f"<{len(exact)}{code}", *exact)
    _, _, batch, _ = quantize(lane, column_of(10, 24, INT8_ROWS, dtype=dtype), [raw])
    scales, _, codes = by_groups(exact, 24, 24, symmetric, -127, 127)
    assert list(batch["emb"].values()) == codes
    assert list(batch["emb_scale"].values()) == scales


def test_null_rows(lane):
    values = numbers(20 * 16)
    for row in (3, 17):
        values[row * 16 : row * 16 + 16] = array.array("f", bytes(64))
    values[5 * 16 + 2] = math.nan
    valid = (0xFFFFF & ~(1 << 3 | 1 << 17)).to_bytes(3, "little")
    spec = d.Spec(d.INT8, on_nonfinite=d.NULL)
    descriptor = column_of(20, 16, spec, null_count=2)
    _, _, batch, (report,) = quantize(lane, descriptor, [valid, values])
    assert batch["emb"].null_count == 3
    bits = int.from_bytes(batch["emb"].buffers[0][:3], "little")
    assert [row for row in range(20) if not bits >> row & 1] == [3, 5, 17]
    assert report["n_nulled"] == 1 and report["n_nonfinite"] == 1
    _, _, codes = symmetric(values[:16], -127, 127)
    assert list(batch["emb"].values()[:16]) == codes


def test_layers(lane):
    odd, half, flat = numbers(7 * 33), numbers(32, 2), numbers(12 * 8, 3)
    groups = d.Spec(d.UINT4, d.ASYMMETRIC, d.GROUP, packing=d.LSB, group_size=32)
    items = [
        d.Item(d.LAYER, "odd", 7, 33, 1, shape=[7, 33]),
        d.Item(d.LAYER, "none", 0, 0, null=True),
        d.Item(d.LAYER, "as it is", 1, 32, 2),
        d.Item(d.LAYER, "rows", 12, 8, 0, shape=[3, 4, 8]),
    ]
    descriptor = d.Descriptor(d.LAYERS, [INT8_ROWS, groups, d.Spec(d.AS_IS)], 4, items)
    _, file, batch, _ = quantize(lane, descriptor, [odd], [], [half], [flat])
    assert [batch["layer_name"].item(i) for i in range(4)] == ["odd", "none", "as it is", "rows"]
    scales, zero_points, codes = by_groups(odd, 33, 32, asymmetric, 0, 15)
    assert batch["quantized_data"].item(0) == bytes(nibbles(codes))
    assert batch["scales"].item(0) == scales
    assert batch["zero_points"].item(0) == zero_points
    assert batch["shape"].item(0) == [7, 33]
    assert batch["quantized_data"].item(1) is None
    assert batch["quantized_data"].item(2) == half.tobytes()
    scales, _, codes = by_groups(flat, 8, 8, symmetric, -127, 127)
    assert batch["quantized_data"].item(3) == struct.pack("96b", *codes)
    assert batch["scales"].item(3) == scales
    assert batch["shape"].item(3) == [3, 4, 8]
    assert batch["bit_width"].values()[3] == 8
    assert batch["group_size"].values()[0] == 32
    assert {field.name for field in file.fields} >= {"scheme", "src_dtype", "packing", "axis", "error"}


def test_metrics(lane):
    values = numbers(8 * 64)
    descriptor = column_of(8, 64, INT8_ROWS)
    descriptor.flags = d.METRICS
    _, _, _, (report,) = quantize(lane, descriptor, [values])
    scales, _, codes = by_groups(values, 64, 64, symmetric, -127, 127)
    errors = [v - f32(q * scales[i // 64]) for i, (v, q) in enumerate(zip(values, codes, strict=True))]
    assert report["max_abs_err"] == max(map(abs, errors))
    assert report["mse"] == pytest.approx(sum(e * e for e in errors) / len(errors))
    assert report["cosine"] == pytest.approx(1, abs=1e-3)


# Leases and names.


def put(lane, descriptor, values=b""):
    """Write a descriptor, and values of one chunk, into the window; gives the fields of a QUANTIZE."""
    raw = descriptor.encode()
    lane.window[: len(raw)] = raw
    at = d.ceil64(len(raw))
    lane.window[at : at + len(values)] = bytes(values)
    return {"descriptor": len(raw), "timeout": m.NO_TIMEOUT}


def test_a_result_is_read_only_and_cannot_be_resized(lane):
    values = numbers(64).tobytes()
    fields = put(lane, column_of(4, 16, INT8_ROWS), values)
    reply, (fd,) = lane.call("QUANTIZE", ready=1, **fields)
    size = reply["lease"]["segment_size"]
    with pytest.raises(PermissionError):
        mmap.mmap(fd, size)
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    for other in (0, 2 * size):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, other)
    os.close(fd)


def test_a_segments_descriptor_comes_once(session, lane):
    descriptor, values = column_of(4, 16, INT8_ROWS), numbers(64)
    first, view, _ = lane.quantize(descriptor, [[values]])
    del view
    again, view, name = session.open(again=first)
    assert name == "" and again["flags"] & m.LEASE_FD, "kind 2 sends it again"
    assert again["extent"] == first["extent"]
    del view
    session.release(first, again)
    session.ping()
    second, view, _ = lane.quantize(descriptor, [[values]])
    assert second["extent"]["segment"] == first["extent"]["segment"], "idle memory of a session is used again"
    assert second["extent"]["generation"] > first["extent"]["generation"]
    assert not second["flags"] & m.LEASE_FD
    assert list(ArrowFile(view).batches[0]["emb"].values()) == symmetric_codes(values, 16)


def symmetric_codes(values, k):
    """Codes of int8 rows."""
    return by_groups(values, k, k, symmetric, -127, 127)[2]


def test_an_old_generation_is_gone(session, lane):
    descriptor, values = column_of(4, 16, INT8_ROWS), numbers(64)
    old, view, _ = lane.quantize(descriptor, [[values]])
    del view
    session.release(old)
    assert error_of(session.ticket, old).code == "GONE"
    new, _, _ = lane.quantize(descriptor, [[values]])
    assert new["extent"]["segment"] == old["extent"]["segment"]
    for call in (session.ticket, lambda lease: session.publish(lease, "old")):
        error = error_of(call, old)
        assert error.code == "GONE" and error.message
    assert error_of(session.open, again=old).code == "GONE"
    session.release(old)
    session.release(old, old, new)
    session.ping()


def test_releases_travel_with_a_request(session, lane):
    descriptor, values = column_of(4, 16, INT8_ROWS), numbers(64)
    first, view, _ = lane.quantize(descriptor, [[values]])
    del view
    releases = [m.release_of(first)]
    second, _, _ = lane.quantize(descriptor, [[values]], releases=releases)
    assert second["extent"]["segment"] == first["extent"]["segment"]


def test_tainted_memory_is_not_used_again_and_is_unmapped(session, lane):
    descriptor, values = column_of(4, 16, INT8_ROWS), numbers(64)
    first, view, _ = lane.quantize(descriptor, [[values]])
    del view
    session.release(first, tainted=True)
    assert first["extent"]["segment"] in session.segments
    session.ping()
    second, _, _ = lane.quantize(descriptor, [[values]])
    assert second["extent"]["segment"] != first["extent"]["segment"]
    session.ping()
    assert first["extent"]["segment"] not in session.segments, "UNMAP was heard"


def kept_table(values, texts):
    """A table of 40 vectors with an id, a text and a struct to be kept, and the streams of each item."""
    raw = [text.encode() for text in texts]
    offsets = array.array("i", [0])
    for text in raw:
        offsets.append(offsets[-1] + len(text))
    ids = array.array("q", range(40))
    valid = (2**40 - 2).to_bytes(5, "little")
    items = [
        d.Kept("id", d.Field(6), d.Data(40, 1, [5, 320])),
        d.Item(d.VECTOR, "emb", 40, 16),
        d.Kept("text", d.Field(32, 0, metadata=[("lang", "de")]), d.Data(40, 0, [0, 164, offsets[-1]])),
        d.Kept(
            "pair",
            d.Field(43, 0, children=[("n", d.Field(6, 0))]),
            d.Data(40, 0, [0], [d.Data(40, 0, [0, 320])]),
        ),
    ]
    descriptor = d.Descriptor(d.COLUMNS, [INT8_ROWS], 40, items, metadata=[("made by", "a test")])
    return descriptor, [[valid, ids], [values], [offsets, b"".join(raw)], [ids]]


def test_a_dataset_with_kept_columns(address, session, lane):
    name = f"kept/{uuid.uuid4()}"
    values, texts = numbers(640), [f"Zeile {i}" * (i % 3) for i in range(40)]
    descriptor, sources = kept_table(values, texts)
    lease, file, batch, reports = quantize(lane, descriptor, *sources, name=name)
    assert lease["flags"] & m.LEASE_DATASET and len(reports) == 1
    assert file.metadata["made by"] == "a test"
    again, _, _, reports = quantize(lane, descriptor, *sources, name=name)
    assert again["extent"] == lease["extent"] and reports == [], "the dataset existed already"

    other = Session(address)
    opened, view, called = other.open(name)
    assert called == name and opened["extent"] == lease["extent"]
    batch = ArrowFile(view).batches[0]
    assert list(batch) == ["id", "emb", "emb_scale", "text", "pair"]
    assert list(batch["emb"].values()) == symmetric_codes(values, 16)
    assert [batch["text"].item(i) for i in range(40)] == texts
    assert batch["text"].field.metadata == {"lang": "de"}
    assert batch["id"].null_count == 1 and list(batch["id"].values())[1:] == list(range(1, 40))
    assert list(batch["pair"].children[0].values()) == list(range(40))

    values[0] += 1
    error = error_of(lane.quantize, *kept_table(values, texts), name=name)
    assert error.code == "NAME_EXISTS" and name in error.message and error.hint
    replaced, _, _ = lane.quantize(*kept_table(values, texts), name=name, replace=True)
    assert replaced["extent"]["segment"] != lease["extent"]["segment"]
    assert list(batch["emb"].values()) == symmetric_codes([values[0] - 1, *values[1:]], 16), "still there"

    (entry,) = [entry for entry in map(json.loads, session.list()) if entry["name"] == name]
    assert entry["length"] == replaced["extent"]["length"]
    session.drop(name)
    assert error_of(session.drop, name).code == "NOT_FOUND"
    assert error_of(other.open, name).code == "NOT_FOUND"
    other.bye()


def test_kept_columns_are_checked(lane):
    descriptor, sources = kept_table(numbers(640), ["x"] * 40)
    for wrong in (array.array("i", [0, 9, *range(2, 41)]), array.array("i", [*range(40), 1 << 30])):
        sources[2][0] = wrong
        error = error_of(lane.quantize, descriptor, sources)
        assert error.code == "INVALID_INPUT" and error.column == "text" and "text" in error.message


def test_a_ticket_is_good_for_one(address, session, lane):
    values = numbers(64)
    lease, _, _ = lane.quantize(column_of(4, 16, INT8_ROWS), [[values]])
    ticket = session.ticket(lease)
    other = Session(address)
    wrong = {**ticket, "secret": bytes(16)}
    assert error_of(other.open, ticket=wrong).code == "NOT_FOUND"
    _, view, name = other.open(ticket=ticket)
    assert name == "" and list(ArrowFile(view).batches[0]["emb"].values()) == symmetric_codes(values, 16)
    assert error_of(other.open, ticket=ticket).code == "NOT_FOUND"
    session.release(lease)
    session.bye()
    other.ping()
    assert list(ArrowFile(view).batches[0]["emb"].values()) == symmetric_codes(values, 16)
    other.bye()


def test_publishing_what_exists(session, lane):
    name = f"published/{uuid.uuid4()}"
    lease, _, _ = lane.quantize(column_of(4, 16, INT8_ROWS), [[numbers(64)]])
    other, _, _ = lane.quantize(column_of(4, 16, INT8_ROWS), [[numbers(64, 2)]])
    session.publish(lease, name)
    session.publish(lease, name)
    assert error_of(session.publish, other, name).code == "NAME_EXISTS"
    session.publish(other, name, replace=True)
    assert session.open(name)[0]["extent"] == other["extent"]
    session.drop(name)


def test_what_the_daemon_says_of_itself(session, lane):
    lease, _, _ = lane.quantize(column_of(4, 16, INT8_ROWS), [[numbers(64)]])
    stat = json.loads(session.stat())
    assert stat["sessions"] >= 1 and stat["leases"] >= 1 and stat["version"] == session.hello["library"]
    results = [json.loads(entry) for entry in session.list(m.RESULTS)]
    extent = lease["extent"]
    assert (extent["segment"], extent["generation"]) in {(r["segment"], r["generation"]) for r in results}
    sessions = [json.loads(entry) for entry in session.list(m.SESSIONS)]
    assert {os.getpid()} <= {entry["pid"] for entry in sessions}
    lane.call("PING")


# Faults.


def test_a_nan_is_named(lane):
    values = numbers(30 * 16)
    values[7 * 16 + 5], values[7 * 16 + 9], values[20 * 16] = math.nan, math.inf, -math.inf
    error = error_of(lane.quantize, column_of(30, 16, INT8_ROWS), [[values]])
    assert error.code == "INVALID_INPUT"
    assert (error.column, error.row, error.index) == ("emb", 7, 5)
    assert error.count == 3 and math.isnan(error.value)
    assert "'emb'" in error.message and "row 7" in error.message and "on_nonfinite" in error.hint
    # The lane goes on.
    lane.quantize(column_of(2, 16, INT8_ROWS), [[numbers(32)]])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"scheme": 99}, "UNSUPPORTED"),
        ({"granularity": 9}, "PROTOCOL"),
        ({"granularity": d.GROUP, "group_size": 0}, "PROTOCOL"),
    ],
)
def test_a_spec_that_makes_no_sense(lane, change, code):
    spec = d.Spec(**{"scheme": d.INT8, **change})
    fields = put(lane, column_of(4, 16, spec))
    error = error_of(lane.call, "QUANTIZE", ready=0, **fields)
    assert error.code == code and error.message
    if code == "PROTOCOL":
        closed(lane)
    else:
        lane.call("PING")


def closed(connection):
    """The daemon has closed the connection, and said no more."""
    with pytest.raises(ConnectionError):
        connection.receive()


REFUSED = [pair for pair in make_vectors.REFUSED if pair[1]]


@pytest.mark.parametrize(("what", "raw"), REFUSED, ids=[what for what, _ in REFUSED])
def test_a_bad_frame_ends_the_connection(address, what, raw):
    session = Session(address)
    session.socket.send(raw)
    name, _, fields, _ = session.receive()
    assert name == "ERROR"
    assert m.CODES[fields["code"]] == ("VERSION" if "version" in what else "PROTOCOL")
    assert fields["message"]
    closed(session)


def test_a_frame_that_is_too_long_ends_the_connection(address):
    session = Session(address)
    session.socket.send(m.frame(16, 1, b"", bytes(m.MAX_FRAME - 15)))
    assert error_of(session.answer, 0).code == "PROTOCOL"
    closed(session)


def test_what_was_said_survives_a_reset(address):
    session = Session(address)
    # The daemon closes after the first one, with the others unread.
    session.socket.setblocking(False)
    with contextlib.suppress(BrokenPipeError, BlockingIOError):
        for _ in range(50):
            session.ask("HELLO")
    session.socket.settimeout(30)
    assert error_of(session.answer, 2).code == "PROTOCOL"
    closed(session)


def test_descriptors_that_nobody_asked_for_are_closed(session):
    session.ping()
    before = json.loads(session.stat())["fds"]
    read, write = os.pipe()
    for _ in range(40):
        session.requests += 1
        frame = m.encode("PING", session.requests)
        socket.send_fds(session.socket, [frame], [write] * m.MAX_FDS)
        session.answer(session.requests)
    os.close(write)
    assert os.read(read, 1) == b"", "no copy of the other end is left"
    os.close(read)
    assert json.loads(session.stat())["fds"] < before + 40


def test_who_does_not_read_is_disconnected(address):
    session = Session(address)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            session.ask("STAT")
    Session(address).ping()


def test_an_unmap_unasked_makes_the_descriptor_come_again(session, lane):
    descriptor, values = column_of(4, 16, INT8_ROWS), numbers(64)
    first, view, _ = lane.quantize(descriptor, [[values]])
    del view
    session.release(first)
    session.notice("UNMAP", 0, {"segment": first["extent"]["segment"]})
    session.ping()
    second, view, _ = lane.quantize(descriptor, [[values]])
    assert second["flags"] & m.LEASE_FD
    assert list(ArrowFile(view).batches[0]["emb"].values()) == symmetric_codes(values, 16)


JOIN = """
import sys
sys.path.insert(0, sys.argv[1])
from stdlib_client import Connection
from stdlib_messages import DaemonError
try:
    Connection(sys.argv[2]).call("JOIN", session=int(sys.argv[3]), token=bytes.fromhex(sys.argv[4]))
except DaemonError as error:
    print(error.code)
"""


def test_only_the_sessions_process_joins(address, session):
    token, number = session.hello["token"], session.hello["session"]
    connection = Connection(address)
    assert error_of(connection.call, "JOIN", session=number, token=bytes(16)).code == "PROTOCOL"
    closed(connection)
    arguments = [str(Path(__file__).parent), address, str(number), token.hex()]
    ran = subprocess.run([sys.executable, "-c", JOIN, *arguments], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "PROTOCOL\n", ran.stderr


def test_a_longer_fixed_part_is_understood(address):
    connection = Connection(address)
    connection.socket.send(m.frame(1, 1, struct.pack("<IIQ", 7, 0, 99), m.string("of later")))
    name, request, fields, _ = connection.receive()
    assert (name, request) == ("HELLO reply", 1) and fields["session"]
    connection.close()


@pytest.mark.parametrize(
    "first", [("PING", {}), ("QUANTIZE", {}), ("BYE", {}), ("JOIN", {"session": 1, "token": bytes(16)})]
)
def test_a_connection_begins_with_hello_or_a_good_join(address, first):
    connection = Connection(address)
    assert error_of(connection.call, first[0], **first[1]).code == "PROTOCOL"
    closed(connection)


@pytest.mark.parametrize("name", ["HELLO", "JOIN", "QUANTIZE", "WROTE", "CONSUMED", "PING reply"])
def test_what_has_no_place_on_a_primary(session, name):
    assert error_of(session.call, name).code == "PROTOCOL"
    closed(session)


@pytest.mark.parametrize("name", ["HELLO", "JOIN", "BYE", "CONSUMED"])
def test_what_has_no_place_on_a_lane(session, lane, name):
    assert error_of(lane.call, name).code == "PROTOCOL"
    closed(lane)
    session.ping()


@pytest.mark.parametrize(
    ("first", "second"), [(0, 5), (1, 0), (0, 0xFFFF_FFFF)], ids=["too many", "backwards", "far too many"]
)
def test_a_watermark_that_cannot_be(session, lane, first, second):
    fields = put(lane, column_of(4, 400_000, INT8_ROWS))
    chunks = len(d.cut(column_of(4, 400_000, INT8_ROWS)))
    request = lane.ask("QUANTIZE", ready=first, **fields)
    lane.send("WROTE", request, chunks=second + chunks if second == 5 else second)
    assert error_of(lane.answer, request).code == "PROTOCOL"
    closed(lane)
    session.ping()


def test_one_request_at_a_time(session, lane):
    fields = put(lane, column_of(4, 400_000, INT8_ROWS))
    request = lane.ask("QUANTIZE", ready=0, **fields)
    lane.ask("PING")
    assert error_of(lane.answer, request).code == "PROTOCOL"
    closed(lane)
    session.ping()


@pytest.mark.parametrize("on", ["lane", "primary"])
def test_cancelling(session, lane, on):
    fields = put(lane, column_of(4, 400_000, INT8_ROWS))
    request = lane.ask("QUANTIZE", ready=0, **fields)
    (lane if on == "lane" else session).send("CANCEL", **{"lane": lane.lane, "request": request})
    assert error_of(lane.answer, request).code == "CANCELLED"
    lane.send("WROTE", request, chunks=1)
    lane.quantize(column_of(2, 16, INT8_ROWS), [[numbers(32)]])


def test_a_lane_that_ends_takes_its_request_along(session):
    lane = session.lane(WINDOW)
    lane.ask("QUANTIZE", ready=0, **put(lane, column_of(4, 400_000, INT8_ROWS)))
    lane.close()
    other = session.lane(WINDOW)
    other.quantize(column_of(2, 16, INT8_ROWS), [[numbers(32)]])
    other.close()


def test_a_window_has_limits(session):
    small = session.lane(1)
    assert small.size == WINDOW
    small.close()
    error = error_of(session.lane, session.hello["max_window"] + 1)
    assert error.code == "LIMIT" and str(session.hello["max_window"]) in error.message
    session.ping()


def test_a_descriptor_has_limits(lane):
    error = error_of(lane.call, "QUANTIZE", descriptor=WINDOW // 4 + 1, timeout=m.NO_TIMEOUT)
    assert error.code == "LIMIT"
    assert error_of(lane.call, "QUANTIZE", descriptor=2**63, timeout=m.NO_TIMEOUT).code == "LIMIT"
    assert error_of(lane.call, "QUANTIZE", descriptor=0, timeout=m.NO_TIMEOUT).code == "PROTOCOL"


def test_a_session_ends_with_its_primary(session, lane):
    session.bye()
    closed(lane)


# Vectors.


def test_the_vectors_are_what_the_page_says():
    for name, text in make_vectors.files().items():
        assert (make_vectors.FOLDER / name).read_text(encoding="utf-8") == text, "run tests/make_vectors.py"


@pytest.mark.parametrize("name", sorted(m.TYPES))
def test_every_message_comes_back(name):
    fields = [values for each, _, values in make_vectors.MESSAGES if each == name]
    assert fields
    for values in fields:
        raw = m.encode(name, 3, **values)
        again, request, decoded = m.decode(raw)
        assert (again, request) == (name, 3)
        assert m.encode(name, 3, **decoded) == raw
