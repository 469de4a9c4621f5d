"""Values that the second client encodes itself: what it finds crosses, and comes back in the result."""

import array
import base64
import json
import math
import random
import struct
import sys
import uuid
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import stdlib_descriptor as d
from stdlib_client import digest_of
from stdlib_findings import Encoder, findings
from stdlib_oracle import (
    INT8_ROWS,
    UINT4_GROUPS,
    WINDOW,
    asymmetric,
    by_groups,
    column_of,
    f32,
    nibbles,
    numbers,
    quantize,
    row_nibbles,
    symmetric,
)


def handmade(descriptor, index=0, header=None, **made):
    """Findings of an item by hand: `made` has for each part what makes it of a chunk, or its bytes."""
    item = descriptor.items[index]
    spec = descriptor.specs[item.spec]

    def of(chunk):
        there, _ = d.parts(item, spec, chunk.kind, chunk.first, chunk.count)
        given = {
            name: make(chunk) if callable(make) else make for name, make in made.items() if name in there
        }
        # Counts are told once of each element, with its code.
        return findings(item, spec, chunk, {"n": 0} if chunk.kind == d.SCAN else header, **given)

    return of


def random_codes(n, seed=1):
    """Signed codes of any size."""
    return random.Random(seed).randbytes(n).replace(b"\x80", b"\x81")


def test_encoded_rows_come_back_as_they_were_sent(lane):
    rows, k = 100, 64
    descriptor = column_of(rows, k, d.Spec(d.INT8, on_nonfinite=d.SATURATE), encoded=True)
    codes = random_codes(rows * k)
    scales = array.array("f", (2.0 ** (row - 50) for row in range(rows)))
    counts = {"n": 6400, "n_clipped": 7, "n_nonfinite": 5, "n_degenerate_groups": 3}
    source = handmade(descriptor, header=counts, codes=codes, scales=scales.tobytes())
    _, file, batch, (report,) = quantize(lane, descriptor, [source])
    assert [field.name for field in file.fields] == ["emb", "emb_scale"]
    assert batch["emb"].values().tobytes() == codes
    assert batch["emb_scale"].values().tobytes() == scales.tobytes()
    assert batch["emb"].null_count == batch["emb_scale"].null_count == 0
    assert {name: report[name] for name in counts} == counts
    assert report["n_nulled"] == 0 and math.isnan(report["mse"])


def test_encoded_groups_come_back_packed_and_with_zero_points(lane):
    rows, k = 50, 99
    descriptor = column_of(rows, k, UINT4_GROUPS, encoded=True)
    codes = row_nibbles([code & 15 for code in random_codes(rows * k)], k)
    scales = array.array("f", (1 + i / 128 for i in range(rows * 4)))
    zero_points = [i % 16 for i in range(rows * 4)]
    parts = {"codes": codes, "scales": scales.tobytes(), "zero_points": bytes(zero_points)}
    _, _, batch, _ = quantize(lane, descriptor, [handmade(descriptor, **parts)])
    assert list(batch["emb"].values()) == codes
    assert list(batch["emb_scale"].values()) == list(scales)
    assert list(batch["emb_zero_point"].values()) == zero_points


def test_signed_zero_points_of_encoded_rows(lane):
    descriptor = column_of(4, 8, d.Spec(d.INT8, d.ASYMMETRIC), encoded=True)
    zero_points = [-128, -1, 0, 127]
    parts = {
        "codes": bytes(range(112, 144)),
        "scales": struct.pack("<4f", 1, 2, 3, 4),
        "zero_points": struct.pack("4b", *zero_points),
    }
    _, _, batch, _ = quantize(lane, descriptor, [handmade(descriptor, **parts)])
    assert batch["emb"].values().tobytes() == bytes(range(112, 144))
    assert list(batch["emb_zero_point"].values()) == zero_points


@pytest.mark.parametrize("ring", [0, 2 << 20])
def test_encoded_rows_through_a_smaller_window(lane, ring):
    rows, k = 50_000, 100
    lane.ring = ring
    descriptor = column_of(rows, k, INT8_ROWS, encoded=True)
    codes = random_codes(rows * k)
    assert len(codes) > WINDOW
    scales = array.array("f", (1 + row / 1024 for row in range(rows)))

    def codes_of(chunk):
        return codes[chunk.first : chunk.first + chunk.count]

    def scales_of(chunk):
        return scales[chunk.first // k : (chunk.first + chunk.count) // k].tobytes()

    source = handmade(descriptor, codes=codes_of, scales=scales_of)
    _, _, batch, (report,) = quantize(lane, descriptor, [source])
    assert batch["emb"].values().tobytes() == codes
    assert batch["emb_scale"].values().tobytes() == scales.tobytes()
    assert report["n"] == rows * k
    assert lane.consumed_notices > 0


@pytest.mark.parametrize("rows", [3000, 40_000], ids=["resident", "streamed"])
def test_an_encoded_tensor_in_two_passes(lane, rows):
    k = 128
    descriptor = column_of(rows, k, d.Spec(d.UINT8, d.ASYMMETRIC, d.TENSOR), encoded=True)
    codes = random.Random(1).randbytes(rows * k)
    sent = []

    def ranges_of(chunk):
        sent.append((f32(-0.3 / len(sent)) if sent else 0.0, f32(0.7 * (len(sent) % 3))))
        return struct.pack("<2f", *sent[-1])

    def codes_of(chunk):
        return codes[chunk.first : chunk.first + chunk.count]

    source = handmade(descriptor, ranges=ranges_of, codes=codes_of)
    _, _, batch, (report,) = quantize(lane, descriptor, [source])
    assert batch["emb"].values().tobytes() == codes
    assert len(sent) > 1
    scale, zero_point, _ = asymmetric([end for ends in sent for end in ends], 0, 255)
    facts = json.loads(batch["emb"].field.metadata["ARROW:extension:metadata"])
    assert base64.b64decode(facts["params_b64"]["scale"]) == struct.pack("<f", scale)
    assert base64.b64decode(facts["params_b64"]["zero_point"]) == struct.pack("<f", zero_point)
    assert report["n"] == rows * k
    assert (lane.consumed_notices > 0) == (rows == 40_000)


def test_encoded_dimensions_in_two_passes(lane):
    rows, k = 20_000, 30
    descriptor = column_of(rows, k, d.Spec(d.INT8, d.SYMMETRIC, d.DIMENSION), encoded=True)
    codes = random_codes(rows * k)
    largest = [0.0] * k

    def ranges_of(chunk):
        ends = array.array("f")
        for i in range(k):
            # Dimension 0 has zeros alone.
            ends.extend((f32(-i * 0.1), f32(i * chunk.first * 1e-5)))
            largest[i] = max(largest[i], -ends[-2], ends[-1])
        return ends.tobytes()

    def codes_of(chunk):
        return codes[chunk.first : chunk.first + chunk.count]

    source = handmade(descriptor, ranges=ranges_of, codes=codes_of)
    _, _, batch, (report,) = quantize(lane, descriptor, [source])
    assert batch["emb"].values().tobytes() == codes
    scales = [symmetric([end], -127, 127)[0] for end in largest]
    facts = json.loads(batch["emb"].field.metadata["ARROW:extension:metadata"])
    assert base64.b64decode(facts["params_b64"]["scale"]) == struct.pack(f"<{k}f", *scales)
    assert report["n_degenerate_groups"] == 1


def test_dropped_rows_are_null(lane):
    rows, k = 20, 16
    spec = d.Spec(d.INT8, d.ASYMMETRIC, on_nonfinite=d.NULL)
    descriptor = column_of(rows, k, spec, encoded=True, null_count=2)
    valid = (0xFFFFF & ~(1 << 3 | 1 << 17)).to_bytes(3, "little")
    parts = {
        "codes": random_codes(rows * k),
        "scales": struct.pack("<20f", *[0.5] * rows),
        "zero_points": bytes(rows),
        # One of them is null already, and four are not there.
        "dropped": (1 << 3 | 1 << 5 | 0b11111 << 19).to_bytes(3, "little"),
    }
    source = handmade(descriptor, header={"n_nonfinite": 3}, **parts)
    _, _, batch, (report,) = quantize(lane, descriptor, [valid, source])
    for name in ("emb", "emb_scale", "emb_zero_point"):
        bits = int.from_bytes(batch[name].buffers[0][:3], "little")
        assert [row for row in range(rows) if not bits >> row & 1] == [3, 5, 17, 19], name
        assert batch[name].null_count == 4
    assert report["n_nulled"] == 2 and report["n_nonfinite"] == 3


def test_a_row_that_one_of_its_chunks_drops(lane):
    rows, k = 3, 300_001
    descriptor = column_of(rows, k, d.Spec(d.INT8, on_nonfinite=d.NULL), encoded=True)
    encodes = [chunk for chunk in d.cut(descriptor) if chunk.kind == d.ENCODE]
    assert len(encodes) == 6

    codes = random_codes(rows * k)
    source = handmade(
        descriptor,
        ranges=struct.pack("<2f", -1, 127),
        codes=lambda chunk: codes[chunk.first : chunk.first + chunk.count],
        dropped=lambda chunk: bytes([chunk.first == encodes[3].first]),
    )
    _, _, batch, (report,) = quantize(lane, descriptor, [source])
    assert batch["emb"].buffers[0][0] & 7 == batch["emb_scale"].buffers[0][0] & 7 == 0b101
    assert report["n_nulled"] == 1
    sent = batch["emb"].values().tobytes()
    assert sent[:k] == codes[:k] and sent[2 * k :] == codes[2 * k :]


def test_encoded_layers_beside_others(lane):
    odd, half, flat = numbers(7 * 33), numbers(32, 2), numbers(12 * 8, 3)
    items = [
        d.Item(d.LAYER, "odd", 7, 33, 1, shape=[7, 33], encoded=True),
        d.Item(d.LAYER, "none", 0, 0, null=True),
        d.Item(d.LAYER, "as it is", 1, 32, 2),
        d.Item(d.LAYER, "streamed", 7, 33, 1, shape=[7, 33]),
        d.Item(d.LAYER, "rows", 12, 8, 0, shape=[3, 4, 8], encoded=True),
    ]
    descriptor = d.Descriptor(d.LAYERS, [INT8_ROWS, UINT4_GROUPS, d.Spec(d.AS_IS)], 5, items)
    codes = nibbles([code & 15 for code in random_codes(7 * 33)])
    scales = array.array("f", (1 + i / 128 for i in range(14)))
    parts = {"codes": codes, "scales": scales.tobytes(), "zero_points": bytes(range(14))}
    sources = [
        [handmade(descriptor, 0, **parts)],
        [],
        [half],
        [odd],
        [Encoder(descriptor, 4, flat)],
    ]
    _, _, batch, reports = quantize(lane, descriptor, *sources)
    assert batch["quantized_data"].item(0) == bytes(codes)
    assert batch["scales"].item(0) == list(scales)
    assert batch["zero_points"].item(0) == list(range(14))
    assert batch["quantized_data"].item(1) is None
    assert batch["quantized_data"].item(2) == half.tobytes()
    _, _, expected = by_groups(odd, 33, 32, asymmetric, 0, 15)
    assert batch["quantized_data"].item(3) == bytes(nibbles(expected))
    scales, _, expected = by_groups(flat, 8, 8, symmetric, -127, 127)
    assert batch["quantized_data"].item(4) == struct.pack("96b", *expected)
    assert batch["scales"].item(4) == scales
    assert [report["n"] for report in reports] == [231, 0, 32, 231, 96]


def test_an_encoded_layer_whose_groups_cross_its_chunks(lane):
    rows, k = 5, 100_001
    groups = -(-k // 32)
    items = [d.Item(d.LAYER, "wide", rows, k, shape=[rows, k], encoded=True)]
    descriptor = d.Descriptor(d.LAYERS, [UINT4_GROUPS], 1, items)
    # An odd number of codes: the last half byte is a pad.
    codes = bytearray(random.Random(1).randbytes((rows * k + 1) // 2))
    codes[-1] &= 15
    merged = {}

    def ranges_of(chunk):
        ends = array.array("f")
        for group in d.touched(items[0], UINT4_GROUPS, chunk.first, chunk.count):
            mine = (f32(-0.1 * (group % 7)), f32(chunk.first * 1e-3 + group % 5))
            known = merged.get(group, (0.0, 0.0))
            merged[group] = (min(mine[0], known[0]), max(mine[1], known[1]))
            ends.extend(mine)
        return ends.tobytes()

    def codes_of(chunk):
        return codes[chunk.first // 2 : (chunk.first + chunk.count + 1) // 2]

    source = handmade(descriptor, ranges=ranges_of, codes=codes_of)
    _, _, batch, _ = quantize(lane, descriptor, [source])
    assert batch["quantized_data"].item(0) == codes
    params = [asymmetric(merged[group], 0, 15)[:2] for group in range(rows * groups)]
    assert batch["scales"].item(0) == [scale for scale, _ in params]
    assert batch["zero_points"].item(0) == [zero_point for _, zero_point in params]


def test_metrics_of_encoded_values(lane):
    descriptor = column_of(8, 64, INT8_ROWS, encoded=True)
    descriptor.flags = d.METRICS
    sums = {"sums_n": 512, "xx": 800.0, "ee": 8.0, "xy": 600.0, "yy": 450.0, "max_error": 0.75}
    parts = {"codes": bytes(512), "scales": struct.pack("<8f", *[1.0] * 8)}
    _, _, _, (report,) = quantize(lane, descriptor, [handmade(descriptor, header=sums, **parts)])
    assert report["mse"] == 8 / 512
    assert report["sqnr_db"] == 20
    assert report["max_abs_err"] == 0.75
    assert report["cosine"] == 1


def columns_both_ways(rows, k, spec, **more):
    """A table of one vector column, made by `encoded`, and its values."""
    return lambda encoded: column_of(rows, k, spec, encoded=encoded, **more), [numbers(rows * k)]


def layers_both_ways(encoded):
    """Layers of odd rows, in one pass and in two."""
    specs = [d.Spec(d.INT2, packing=d.LSB), UINT4_GROUPS]
    shapes = [(0, 99, 33), (1, 99, 33), (0, 3, 100_001), (1, 3, 100_001)]
    items = [
        d.Item(d.LAYER, f"{i}", rows, k, spec, shape=[rows, k], encoded=encoded)
        for i, (spec, rows, k) in enumerate(shapes)
    ]
    return d.Descriptor(d.LAYERS, specs, len(items), items)


GIVEN = {"params_id": 5, "scales": [0.5, 0.25, 200.0], "zero_points": [1, -2, 3]}
BOTH_WAYS = {
    "rows": columns_both_ways(6000, 96, INT8_ROWS),
    "rows with zero points": columns_both_ways(2000, 96, d.Spec(d.INT8, d.ASYMMETRIC)),
    "rows in two passes": columns_both_ways(2, 300_001, INT8_ROWS),
    "packed groups": columns_both_ways(3000, 99, UINT4_GROUPS),
    "groups in rows longer than a chunk": columns_both_ways(1, 300_001, UINT4_GROUPS),
    "a tensor": columns_both_ways(500, 96, d.Spec(d.UINT8, d.ASYMMETRIC, d.TENSOR)),
    "a tensor in two passes": columns_both_ways(
        3000, 128, d.Spec(d.UINT2, d.ASYMMETRIC, d.TENSOR, packing=d.LSB)
    ),
    "dimensions": columns_both_ways(500, 96, d.Spec(d.INT8, d.SYMMETRIC, d.DIMENSION)),
    "dimensions in two passes": columns_both_ways(6000, 50, d.Spec(d.INT8, d.ASYMMETRIC, d.DIMENSION)),
    "given parameters": columns_both_ways(2000, 3, d.Spec(d.INT8, d.ASYMMETRIC, d.DIMENSION), **GIVEN),
    "layers": (layers_both_ways, [numbers(99 * 33), numbers(99 * 33), numbers(300_003), numbers(300_003)]),
}


@pytest.mark.parametrize("what", BOTH_WAYS)
def test_encoded_values_make_the_same_file_as_streamed_ones(lane, what):
    describe, values = BOTH_WAYS[what]
    _, streamed, told = lane.quantize(describe(False), [[each] for each in values])
    descriptor = describe(True)
    encoders = [[Encoder(descriptor, i, each)] for i, each in enumerate(values)]
    _, encoded, said = lane.quantize(descriptor, encoders)
    assert bytes(encoded) == bytes(streamed)
    # As text, for a NaN is not itself.
    assert str(said) == str(told)


def test_an_encoded_column_beside_others(session, lane):
    rows, k = 3000, 128
    values = numbers(rows * k)
    lease, memory = lane.allocate(len(values) * 4)
    memory[:] = memoryview(values).cast("B")
    for spec in (INT8_ROWS, d.Spec(d.UINT8, d.ASYMMETRIC, d.TENSOR)):
        items = [
            d.Item(d.VECTOR, "encoded", rows, k, encoded=True),
            d.Item(d.VECTOR, "there", rows, k, extent=lease["extent"]),
            d.Item(d.VECTOR, "here", rows, k),
        ]
        descriptor = d.Descriptor(d.COLUMNS, [spec], rows, items)
        sources = [[Encoder(descriptor, 0, values)], [b""], [values]]
        _, _, batch, _ = quantize(lane, descriptor, *sources)
        assert (
            list(batch["encoded"].values()) == list(batch["there"].values()) == list(batch["here"].values())
        )
    session.release(lease)


def test_an_encoded_request_finds_the_dataset_of_a_streamed_one(session, lane):
    name = f"encoded/{uuid.uuid4()}"
    values = numbers(640)
    streamed, encoded = column_of(40, 16, INT8_ROWS), column_of(40, 16, INT8_ROWS, encoded=True)
    digest = digest_of([[values]])
    first, view, _ = lane.quantize(streamed, [[values]], name=name)
    again, _, reports = lane.quantize(encoded, [[Encoder(encoded, 0, values)]], name=name, digest=digest)
    assert again["extent"] == first["extent"] and reports == []
    other, replaced, reports = lane.quantize(
        encoded, [[Encoder(encoded, 0, values)]], name=name, digest=bytes(16), replace=True
    )
    assert other["extent"] != first["extent"] and len(reports) == 1
    assert bytes(replaced) == bytes(view)
    session.drop(name)
