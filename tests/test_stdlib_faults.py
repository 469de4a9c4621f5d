"""The second client breaks the protocol's rules, one at a time; and the vectors that it wrote."""

import contextlib
import json
import math
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import make_vectors
import stdlib_descriptor as d
import stdlib_messages as m
from stdlib_client import Connection, Session
from stdlib_findings import findings
from stdlib_oracle import INT8_ROWS, WINDOW, closed, column_of, error_of, f32, numbers, put


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
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
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


# Findings.


def rows_of(spec=INT8_ROWS, **more):
    """Thirty vectors of sixteen, encoded by the client."""
    return column_of(30, 16, spec, encoded=True, **more)


def changed(descriptor, change, at=0):
    """Findings nobody can object to but those of one chunk: fields of its header, or the end of a part."""
    (item,) = descriptor.items
    spec = descriptor.specs[item.spec]
    chosen = d.cut(descriptor)[at]

    def of(chunk):
        places, _ = d.parts(item, spec, chunk.kind, chunk.first, chunk.count)
        header, given = {}, {}
        if chunk.kind == d.FUSED:
            given["scales"] = struct.pack("<f", 1.0) * (places["scales"][1] // 4)
        if (chunk.kind, chunk.first) == (chosen.kind, chosen.first):
            for name, value in change.items():
                if isinstance(value, bytes):
                    _, size = places[name]
                    given[name] = given.get(name, bytes(size))[: size - len(value)] + value
                else:
                    header[name] = value
        return findings(item, spec, chunk, header, **given)

    return of


N = 30 * 16
UINT4_ROWS = d.Spec(d.UINT4, d.ASYMMETRIC, packing=d.LSB)
SATURATED = d.Spec(d.INT8, on_nonfinite=d.SATURATE)
FAULT = {"fault": 1, "index": 5, "count": 1, "value": math.nan}
LIES = {
    "more values": (rows_of(), {"n": N + 1}),
    "very many values": (rows_of(), {"n": 2**64 - 1}),
    "more clipped ones": (rows_of(), {"n_clipped": N + 1}),
    "more that are not finite": (rows_of(SATURATED), {"n_nonfinite": N + 1}),
    "more degenerate domains": (rows_of(), {"n_degenerate_groups": N + 1}),
    "a fault that nobody has": (rows_of(), {**FAULT, "fault": 4}),
    "a fault of a large number": (rows_of(), {**FAULT, "fault": 2**63}),
    "a fault after the chunk": (rows_of(), {**FAULT, "index": N}),
    "a fault far after the chunk": (rows_of(), {**FAULT, "index": 2**64 - 1}),
    "no values at fault": (rows_of(), {**FAULT, "count": 0}),
    "more values at fault": (rows_of(), {**FAULT, "count": N + 1}),
    "scale 0": (rows_of(), {"scales": struct.pack("<f", 0)}),
    "scale -0": (rows_of(), {"scales": struct.pack("<f", -0.0)}),
    "a negative scale": (rows_of(), {"scales": struct.pack("<f", -1)}),
    "scale NaN": (rows_of(), {"scales": struct.pack("<f", math.nan)}),
    "scale infinity": (rows_of(), {"scales": struct.pack("<f", math.inf)}),
    "zero point 16 of uint4": (rows_of(UINT4_ROWS), {"zero_points": b"\x10"}),
    "zero point 255 of uint4": (rows_of(UINT4_ROWS), {"zero_points": b"\xff"}),
}
TENSOR = d.Spec(d.INT8, granularity=d.TENSOR)
TWO_CHUNKS = column_of(600, 512, TENSOR, encoded=True)
RANGES = {
    "NaN": (math.nan, 1),
    "to NaN": (-1, math.nan),
    "infinity": (-1, math.inf),
    "from infinity": (-math.inf, 1),
    "a min above 0": (0.5, 1),
    "a max below 0": (-1, -0.5),
    "the wrong way": (1, -1),
}
LIES |= {
    f"a range: {what}": (TWO_CHUNKS, {"ranges": struct.pack("<2f", *ends)}) for what, ends in RANGES.items()
}
METRICS = rows_of()
METRICS.flags = d.METRICS
LIES["sums of more values"] = (METRICS, {"sums_n": N + 1})
LIES["more values in the first pass"] = (TWO_CHUNKS, {"n": 600 * 512, "at": 1})
# The fault is in the item, but before the chunk.
LIES["a fault before the chunk"] = (TWO_CHUNKS, {**FAULT, "at": 1})
LIES["more clipped ones in the second pass"] = (TWO_CHUNKS, {"n_clipped": 600 * 512, "at": 3})


@pytest.mark.parametrize("what", LIES)
def test_findings_that_cannot_be(address, session, lane, what):
    descriptor, change = LIES[what]
    change = dict(change)
    at = change.pop("at", 0)
    neighbour = Session(address)
    other = neighbour.lane(WINDOW)
    request = other.ask("QUANTIZE", ready=0, **put(other, column_of(2, 16, INT8_ROWS), numbers(32).tobytes()))
    error = error_of(lane.quantize, descriptor, [[changed(descriptor, change, at)]])
    assert error.code == "PROTOCOL" and error.message
    closed(lane)
    session.ping()
    # A request of someone else that was running goes on, and the daemon takes another lane.
    other.send("WROTE", request, chunks=1)
    assert other.answer(request)[0]["report"] == 80
    again = session.lane(WINDOW)
    again.quantize(descriptor, [[changed(descriptor, {})]])
    again.close()
    neighbour.bye()


EIGHTH = d.Spec(d.UINT4, d.ASYMMETRIC, d.GROUP, packing=d.LSB, group_size=4)
SHORT_LAST = d.Spec(d.UINT4, d.ASYMMETRIC, d.GROUP, packing=d.LSB, group_size=8)
PLACED = {"extent": {"segment": 1, "generation": 1, "offset": 0, "length": 1 << 20}}


def layer_of(spec, rows=4, k=16, **more):
    """A table of one layer."""
    item = d.Item(d.LAYER, "layer", rows, k, encoded=True, **more)
    return d.Descriptor(d.LAYERS, [spec], 1, [item])


@pytest.mark.parametrize(
    "descriptor",
    [
        column_of(4, 16, EIGHTH, encoded=True),
        column_of(4, 17, SHORT_LAST, encoded=True),
        column_of(4, 7, INT8_ROWS, encoded=True),
        column_of(1, 65_537, d.Spec(d.INT8, granularity=d.DIMENSION), encoded=True),
        column_of(0, 16, INT8_ROWS, encoded=True),
        column_of(4, 0, INT8_ROWS, encoded=True),
        layer_of(d.Spec(d.AS_IS)),
        layer_of(INT8_ROWS, 0, 0, null=True),
        layer_of(INT8_ROWS, 4, 0, shape=[4, 0]),
    ],
    ids=[
        "groups of 4",
        "groups of 8, a short last one",
        "rows of 7",
        "too many dimensions",
        "no rows",
        "no elements",
        "scheme 0",
        "null layer",
        "empty layer",
    ],
)
def test_what_a_client_cannot_encode(lane, descriptor):
    error = error_of(lane.call, "QUANTIZE", ready=0, **put(lane, descriptor))
    assert error.code == "INVALID_INPUT" and error.message
    lane.quantize(column_of(2, 16, INT8_ROWS), [[numbers(32)]])


def test_values_are_encoded_or_in_an_extent_but_not_both(session, lane):
    fields = put(lane, rows_of(**PLACED))
    assert error_of(lane.call, "QUANTIZE", ready=0, **fields).code == "PROTOCOL"
    closed(lane)
    session.ping()


def fields_of(error):
    """Everything that an error says."""
    return {name: str(value) for name, value in vars(error).items()}


def with_values(n, values, code="f"):
    """Small numbers with a few others among them."""
    out = numbers(n, code=code)
    for index, value in values.items():
        out[index] = value
    return out


HUGE = f32(3e38)
# What is found, and the values that a daemon finds it in.
FAULTS = {
    "not finite": (
        (30, 16, INT8_ROWS, d.FLOAT32),
        with_values(N, {117: math.inf, 121: math.nan, 320: -math.inf}),
        {0: {"fault": 1, "index": 117, "count": 3, "value": math.inf}},
    ),
    "not finite in a second chunk": (
        (600, 512, INT8_ROWS, d.FLOAT32),
        with_values(600 * 512, {290_000: math.nan, 290_001: math.inf}),
        {1: {"fault": 1, "index": 290_000, "count": 2, "value": math.nan}},
    ),
    "not finite in both passes": (
        (600, 512, TENSOR, d.FLOAT32),
        with_values(600 * 512, {290_000: math.inf, 290_001: math.inf}),
        {1: {"fault": 1, "index": 290_000, "count": 2, "value": math.inf}},
    ),
    "a double too large": (
        (30, 16, INT8_ROWS, d.FLOAT64),
        with_values(N, {117: 1e300}, "d"),
        {0: {"fault": 2, "index": 117, "value": 1e300}},
    ),
    "a range": (
        (30, 16, d.Spec(d.INT8, d.ASYMMETRIC), d.FLOAT32),
        with_values(N, {117: -HUGE, 121: HUGE}),
        {0: {"fault": 3, "index": 112, "value": -HUGE, "max": HUGE}},
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_that_a_client_finds_reads_like_the_daemons_own(lane, what):
    (rows, k, spec, dtype), values, found = FAULTS[what]
    theirs = error_of(lane.quantize, column_of(rows, k, spec, dtype=dtype), [[values]])
    descriptor = column_of(rows, k, spec, dtype=dtype, encoded=True)
    ((at, header),) = found.items()
    ours = error_of(lane.quantize, descriptor, [[changed(descriptor, header, at)]])
    assert ours.code == "INVALID_INPUT"
    assert fields_of(ours) == fields_of(theirs)
    # The lane goes on.
    lane.quantize(column_of(2, 16, INT8_ROWS), [[numbers(32)]])


def test_faults_of_several_chunks_are_counted_together(lane):
    values = with_values(600 * 512, {1000: math.nan, 290_000: math.inf, 290_001: math.nan})
    theirs = error_of(lane.quantize, column_of(600, 512, INT8_ROWS), [[values]])
    descriptor = column_of(600, 512, INT8_ROWS, encoded=True)
    first = changed(descriptor, {"fault": 1, "index": 1000, "count": 1, "value": math.nan})
    second = changed(descriptor, {"fault": 1, "index": 290_000, "count": 2, "value": math.inf}, 1)
    ours = error_of(lane.quantize, descriptor, [[lambda chunk: (second if chunk.first else first)(chunk)]])
    assert (ours.row, ours.index) == (1, 488)
    assert fields_of(ours) == fields_of(theirs)


def test_a_range_that_overflows_only_when_merged(lane):
    spec = d.Spec(d.INT8, d.ASYMMETRIC, d.TENSOR)
    values = with_values(600 * 512, {1000: -HUGE, 290_000: HUGE})
    theirs = error_of(lane.quantize, column_of(600, 512, spec), [[values]])
    descriptor = column_of(600, 512, spec, encoded=True)
    first = changed(descriptor, {"ranges": struct.pack("<2f", -HUGE, 0)})
    second = changed(descriptor, {"ranges": struct.pack("<2f", 0, HUGE)}, 1)
    ours = error_of(lane.quantize, descriptor, [[lambda chunk: (second if chunk.first else first)(chunk)]])
    assert ours.code == "INVALID_INPUT"
    assert fields_of(ours) == fields_of(theirs)


@pytest.mark.parametrize("go_on", [False, True])
def test_a_faulty_layer_that_a_client_encodes(lane, go_on):
    values = [numbers(160), with_values(160, {37: math.nan, 38: math.inf}), numbers(160)]

    def describe(encoded):
        items = [
            d.Item(d.LAYER, name, 10, 16, shape=[10, 16], encoded=encoded and name == "bad")
            for name in ("first", "bad", "last")
        ]
        return d.Descriptor(d.LAYERS, [INT8_ROWS], 3, items, flags=d.CONTINUE_ON_ERROR if go_on else 0)

    descriptor = describe(True)
    header = {"fault": 1, "index": 37, "count": 2, "value": math.nan}

    def bad(chunk):
        return findings(descriptor.items[1], INT8_ROWS, chunk, header)

    streamed, encoded = [[each] for each in values], [[values[0]], [bad], [values[2]]]
    if go_on:
        _, theirs, told = lane.quantize(describe(False), streamed)
        _, ours, said = lane.quantize(descriptor, encoded)
        assert bytes(ours) == bytes(theirs) and str(said) == str(told)
    else:
        theirs = error_of(lane.quantize, describe(False), streamed)
        ours = error_of(lane.quantize, descriptor, encoded)
        assert (ours.code, ours.column, ours.row, ours.index) == ("INVALID_INPUT", "bad", 1, 37)
        assert fields_of(ours) == fields_of(theirs)


def test_a_session_ends_with_its_primary(session, lane):
    session.bye()
    closed(lane)


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
