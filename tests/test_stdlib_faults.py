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
from stdlib_oracle import INT8_ROWS, WINDOW, closed, column_of, error_of, numbers, put


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
