"""The protocol, spoken by the second client to a real daemon; results against arithmetic in plain Python."""

import array
import base64
import json
import math
import mmap
import os
import struct
import sys
import uuid
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import stdlib_descriptor as d
import stdlib_messages as m
from stdlib_arrow import ArrowFile
from stdlib_client import Session
from stdlib_oracle import (
    INT8_ROWS,
    UINT4_GROUPS,
    WINDOW,
    asymmetric,
    by_groups,
    column_of,
    encode,
    error_of,
    f32,
    fnv1a,
    nibbles,
    numbers,
    put,
    quantize,
    row_ids,
    row_nibbles,
    symmetric,
    symmetric_codes,
)

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
    _, file, batch, _ = quantize(lane, column_of(50, 100, UINT4_GROUPS), [values])
    scales, zero_points, codes = by_groups(values, 100, 32, asymmetric, 0, 15)
    assert [field.name for field in file.fields] == ["emb", "emb_scale", "emb_zero_point", "emb_params_id"]
    number = fnv1a(b"uint4|asymmetric|group|100|32|lsb")
    facts = json.loads(batch["emb"].field.metadata["ARROW:extension:metadata"])
    assert facts["params_id"] == f"{number:016x}"
    assert row_ids(file, batch, "emb_params_id") == {number}
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


@pytest.mark.parametrize(
    ("rows", "ring"), [(3000, 0), (9000, 0), (9000, 2 << 20)], ids=["resident", "streamed", "ring"]
)
def test_a_tensor_in_two_passes(lane, rows, ring):
    k = 128
    lane.ring = ring
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
    number = fnv1a(packed)
    given = {"params_id": number, "scales": scales, "zero_points": zero_points}
    _, file, batch, _ = quantize(lane, column_of(1000, 3, spec, **given), [values])
    codes = array.array("b", bytes(len(values)))
    for i in range(3):
        codes[i::3] = array.array("b", encode(values[i::3], scales[i], zero_points[i], -128, 127))
    assert list(batch["emb"].values()) == list(codes)
    facts = f"int8|asymmetric|dimension|3|0|none|{number:016x}"
    assert row_ids(file, batch, "emb_params_id") == {fnv1a(facts.encode())}


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
    lease, first, _ = lane.quantize(column_of(4, 16, INT8_ROWS), [[numbers(64)]])
    other, second, _ = lane.quantize(column_of(4, 16, INT8_ROWS), [[numbers(64, 2)]])
    session.publish(lease, name)
    session.publish(lease, name)
    assert error_of(session.publish, other, name).code == "NAME_EXISTS"
    session.publish(other, name, replace=True)
    # Small ones share a segment, a dataset has its own: a copy.
    dataset, third, _ = session.open(name)
    assert dataset["extent"]["segment"] not in (lease["extent"]["segment"], other["extent"]["segment"])
    codes = [list(ArrowFile(view).batches[0]["emb"].values()) for view in (first, second, third)]
    assert codes[0] != codes[1] == codes[2]
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


@pytest.mark.parametrize("rows", [100, 9000], ids=["small", "large"])
def test_values_that_lie_in_an_input(session, lane, rows):
    k = 128
    values = numbers(rows * k)
    lease, memory = lane.allocate(len(values) * 4 + 64)
    memory[64:] = memoryview(values).cast("B")
    assert lease["extent"]["length"] == len(memory)
    placed = {"extent": lease["extent"], "offset": 64}
    asked = json.loads(session.stat())
    # Beside the values, whose stream is never read, those of a column that crosses.
    for spec in (INT8_ROWS, d.Spec(d.UINT8, d.ASYMMETRIC, d.TENSOR)):
        there = d.Item(d.VECTOR, "there", rows, k, 0, **placed)
        here = d.Item(d.VECTOR, "here", rows, k, 0)
        _, view, _ = lane.quantize(d.Descriptor(d.COLUMNS, [spec], rows, [there, here]), [[b""], [values]])
        (batch,) = ArrowFile(view).batches
        assert list(batch["there"].values()) == list(batch["here"].values())
        lane.consumed_notices = 0
        _, view, _ = lane.quantize(d.Descriptor(d.COLUMNS, [spec], rows, [there]), [[b""]])
        (batch,) = ArrowFile(view).batches
        assert lane.consumed_notices == 0
        if spec is INT8_ROWS:
            assert list(batch["there"].values()) == symmetric_codes(values, k)
    listed = {entry["segment"]: entry for entry in map(json.loads, session.list(m.INPUTS))}
    mine = listed[lease["extent"]["segment"]]
    assert (mine["state"], mine["length"], mine["holders"]) == ("input", len(memory), [os.getpid()])
    said = json.loads(session.stat())
    assert said["bytes_shared"] - asked["bytes_shared"] == 4 * rows * k * 4
    session.release(lease)
    # A release is not answered, and the lane is another connection.
    session.ping()
    wrong = d.Descriptor(d.COLUMNS, [INT8_ROWS], rows, [d.Item(d.VECTOR, "gone", rows, k, 0, **placed)])
    assert error_of(lane.quantize, wrong, [[b""]]).code == "GONE"
    again, _ = lane.allocate(len(values) * 4 + 64)
    extent = lease["extent"]
    assert again["extent"] == {**extent, "generation": extent["generation"] + 1}
    assert not again["flags"] & m.LEASE_FD


def test_memory_made_ready(session, lane):
    asked = json.loads(session.stat())
    lane.warm(3 << 20)
    said = json.loads(session.stat())
    assert said["bytes_by_use"]["pools"] - asked["bytes_by_use"]["pools"] == 3 << 20
    assert error_of(lane.allocate, 0).code == "INVALID_INPUT"
    assert error_of(lane.allocate, 1 << 50).code == "NO_ROOM"


def test_posix_segments(serve):
    session = Session(serve("--backing", "posix", "--no-poll", "--workers", "3").address)
    assert session.hello["backing"] == 1
    lane = session.lane(WINDOW)
    values = numbers(20_000 * 64)
    lease, _, batch, _ = quantize(lane, column_of(20_000, 64, INT8_ROWS), [values])
    assert lane.consumed_notices > 0
    assert list(batch["emb"].values()[-6400:]) == symmetric_codes(values[-6400:], 64)
    reply, (fd,) = session.call("OPEN", kind=m.OPEN_AGAIN, extent=lease["extent"])
    with pytest.raises(PermissionError):
        mmap.mmap(fd, reply["lease"]["segment_size"])
    os.close(fd)
    session.bye()
