"""What callers are told when something is wrong."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

import shmquant
from shmquant import (
    DaemonError,
    DeadlineError,
    InvalidInputError,
    NameExistsError,
    NoRoomError,
    NotFoundError,
    Params,
    ShmQuantError,
    ShmQuantizer,
)

X = np.ones((4, 8), np.float32)


def lists(values: list, kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"emb": pa.array(values, kind or pa.list_(pa.float32()))})


def layers(weights: list, names: list | None = None, **more: list) -> pa.Table:
    return pa.table({"layer_name": names or ["x"], "weights": weights, **more})


NAN_AT_7 = [*([0.0] * 7), float("nan"), 1.0, float("inf"), float("-inf")]

CASES = {
    "nan in a layer": (
        lambda q: q.quantize(layers([NAN_AT_7])),
        r"Layer 'x' contains NaN or Inf at index 7 \(3 in all, the first is NaN\)",
    ),
    "nan in a column": (
        lambda q: q.quantize(lists([[0.0] * 11, NAN_AT_7])),
        r"column 'emb' row 1 contains NaN or Inf at index 7 \(3 in all, the first is NaN\)\nhint: on_non",
    ),
    "nothing to quantize": (lambda q: q.quantize(pa.table({"a": [1]})), "nothing to quantize"),
    "integers by name": (lambda q: q.quantize(pa.table({"a": [1]}), columns=["a"]), "'a'"),
    "no such column": (lambda q: q.quantize(lists([[1.0]]), columns=["embb"]), "embb"),
    "one name for many": (
        lambda q: q.quantize(lists([[1.0]]), columns="emb"),
        r"hint: say columns=\['emb'\]",
    ),
    "ragged": (lambda q: q.quantize(lists([[1.0], [1.0, 2.0]])), "emb"),
    "null element": (
        lambda q: q.quantize(lists([[1.0, None]])),
        r"row 0 has a null at index 1\nhint: nulls=",
    ),
    "null layer name": (
        lambda q: q.quantize(layers([[1.0]], pa.array([None], pa.string()))),
        "layer_name|null",
    ),
    "wrong shape": (lambda q: q.quantize(layers([[1.0, 2.0]], shape=[[3]])), "shape"),
    "name taken": (
        lambda q: q.quantize(pa.table({"emb": [[1.0]], "emb_scale": [1]})),
        "emb_scale",
    ),
    "unknown scheme": (lambda q: q.quantize(X, "int3"), r'unknown scheme "int3"\nhint: one of int8, uint8'),
    "scheme is no word": (lambda q: q.quantize(X, 8), "scheme 8 is a int, not a word"),
    "mapping": (lambda q: q.quantize(X, "uint4", mapping="symmetric"), "symmetric"),
    "granularity": (lambda q: q.quantize(X, granularity="channel"), r'"channel"\nhint: one of tensor, row'),
    "group_size": (lambda q: q.quantize(X, group_size=0), "group_size 0"),
    "group_size without groups": (lambda q: q.quantize(X, group_size=4, granularity="row"), "group_size"),
    "on_nonfinite": (lambda q: q.quantize(X, on_nonfinite="drop"), "drop"),
    "nulls": (lambda q: q.quantize(X, nulls="drop"), r'nulls "drop" is not known'),
    "timeout": (lambda q: q.quantize(X, timeout=-1), "timeout -1"),
    "replace without name": (lambda q: q.quantize(X, replace=True), "replace=True"),
    "keep without name": (lambda q: q.quantize(X, keep=[]), "keep="),
    "override option": (
        lambda q: q.quantize({"w": X}, overrides={"w": {"bits": 4}}),
        r"override 'w' has no option 'bits'\nhint: it takes scheme",
    ),
    "override of nothing": (lambda q: q.quantize({"w": X}, overrides={"v": None}), "override 'v'"),
    "override regex": (lambda q: q.quantize({"w": X}, overrides={"re:(": None}), "re:\\("),
    "one-dimensional": (lambda q: q.quantize(X[0]), r"shape \(8,\).*\nhint: reshape"),
    "integer array": (lambda q: q.quantize(X.astype(int)), "int64 cannot be quantized"),
    "integer layer": (lambda q: q.quantize({"w": X.astype(int)}), "layer 'w' is int64"),
    "list layer": (lambda q: q.quantize({"w": [1.0]}), "layer 'w' is a list, not an array"),
    "layer name": (lambda q: q.quantize({1: X}), "layer name 1 is a int"),
    "columns of a state dict": (
        lambda q: q.quantize({"w": X}, columns=["w"]),
        "columns does not go with a state dict",
    ),
    "keep of a state dict": (
        lambda q: q.quantize({"w": X}, keep=["w"], name="n"),
        "keep does not go with a state dict",
    ),
    "list": (lambda q: q.quantize([1, 2, 3]), "data of type list.*\nhint: pass an Arrow table"),
    "no name": (lambda q: q.quantize(X, name=""), "name '' has 0 bytes"),
    "long name": (lambda q: q.open("é" * 513), "has 1026 bytes\nhint: a name has 1 to 1024"),
    "name with NUL": (lambda q: q.drop("a\0"), "NUL"),
    "name with a surrogate": (lambda q: q.open("\udc80"), "cannot be written in UTF-8"),
    "name is no string": (lambda q: q.quantize(X, name=3), "name 3 is a int, not a string"),
    "unknown input": (lambda q: q.quantize("table"), "data of type str.*\nhint: pass an Arrow table"),
    "array without name": (
        lambda q: q.quantize(pa.array([[1.0]])),
        "no table.*\nhint: give the column a name",
    ),
    "missing file": (lambda q: q.quantize_file("/nonexistent"), "/nonexistent: cannot open it"),
    "params": (lambda q: q.quantize(X, params={"scale": 1}), "params is a dict"),
    "params of rows": (lambda q: q.quantize(X, params=q.quantize(X)), "no params to give"),
    "params and scheme": (
        lambda q: q.quantize(X, "uint4", params=q.fit(X, "uint8")),
        "scheme='uint4' contradicts params= of uint8",
    ),
    "params of another width": (lambda q: q.quantize(X, params=q.fit(X[:, :4], "uint8")), "vector"),
    "params text": (lambda q: Params.from_json("{}"), "params"),
    "fit of nothing": (lambda q: q.fit([]), "nothing to fit"),
    "fit of groups": (lambda q: q.fit(X, granularity="group"), "group"),
    "named stream": (lambda q: q.quantize_stream(lists([[1.0]]), name="n"), "a stream cannot be published"),
    "stream without params": (
        lambda q: q.quantize_stream(lists([[1.0]]), granularity="tensor").read_all(),
        "params",
    ),
    "no lanes": (lambda q: ShmQuantizer(q.address, lanes=0), r"lanes 0 is not between 1.*\nhint: lanes="),
    "lanes are no number": (
        lambda q: ShmQuantizer(q.address, lanes="x"),
        r"lanes 'x' is a str, not a whole number\nhint: lanes= takes how many requests",
    ),
    "too many lanes": (lambda q: ShmQuantizer(q.address, lanes=1 << 32), "lanes 4294967296 is not between"),
    "window": (
        lambda q: ShmQuantizer(q.address, window=-1),
        r"window -1 is not between 1.*\nhint: window= takes bytes",
    ),
    "window is no number": (lambda q: ShmQuantizer(q.address, window=1e6), "window 1000000.0 is a float"),
    "window is a bool": (lambda q: ShmQuantizer(q.address, window=True), "window True is not between"),
    "poll": (lambda q: ShmQuantizer(q.address, poll="no"), r"poll 'no' is a str\nhint: say poll=True"),
    "empty dict": (lambda q: q.quantize({}), r"nothing to quantize in an empty dict\nhint: a dict is"),
    "fit of an empty dict": (lambda q: q.fit({}), "nothing to quantize in an empty dict"),
    "dequantize of floats": (lambda q: shmquant.dequantize(lists([[1.0]])), None),
    "codes of a passed column": (
        lambda q: q.quantize(pa.table({"emb": [[1.0]], "id": [1]})).codes("id"),
        "column 'id' has no codes",
    ),
    "layer of columns": (lambda q: q.quantize(X).layer("x"), "columns, not layers"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_bad_input_is_a_value_error_that_says_what_and_what_to_do(q, case):
    call, text = CASES[case]
    with pytest.raises(ShmQuantError, match=text) as caught:
        call(q)
    assert isinstance(caught.value, (InvalidInputError, NotFoundError))
    if "\nhint: " in str(caught.value):
        assert caught.value.hint == str(caught.value).split("\nhint: ", 1)[1]


def test_facts_are_attributes_too(q):
    with pytest.raises(InvalidInputError) as caught:
        q.quantize(lists([[0.0] * 11, NAN_AT_7]))
    error = caught.value
    assert (error.column, error.row, error.index, error.count) == ("emb", 1, 7, 3)
    assert np.isnan(error.value)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.row) == (InvalidInputError, str(error), 1)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("bits", 'scheme="uint4"'),
        ("dtype", 'scheme="int8"'),
        ("group", "group_size=128"),
        ("colums", "columns"),
    ],
)
def test_other_spellings_are_type_errors_that_name_the_right_word(q, word, hint):
    for call in (q.quantize, q.quantize_file, q.quantize_async, q.quantize_stream):
        with pytest.raises(TypeError, match=f"has no option '{word}'\nhint: .*{hint}"):
            call(X, **{word: 4})


def test_names_that_are_not_there(q):
    r = q.quantize({"encoder.0.q": X})
    with pytest.raises(
        LookupError, match=r"no layer 'encoder.0.k' among 1\nhint: did you mean 'encoder.0.q'"
    ):
        r.layer("encoder.0.k")
    with pytest.raises(NotFoundError, match="nobody/here"):
        q.open("nobody/here")
    with pytest.raises(NotFoundError, match="nobody/here"):
        q.drop("nobody/here")
    with pytest.raises(NotFoundError):
        r.dequantize(layers=["encoder.0.k"])


def test_a_name_belongs_to_its_spec_and_values(q):
    first = q.quantize(X, name="errors/name")
    again = q.quantize(X, name="errors/name")
    assert again.segment_name == first.segment_name
    with pytest.raises(NameExistsError, match="errors/name"):
        q.quantize(X * 2, name="errors/name")
    with pytest.raises(NameExistsError, match="errors/name"):
        q.quantize(X, "uint8", name="errors/name")
    other = q.quantize(X * 2, name="errors/name", replace=True)
    assert other.segment_name != first.segment_name
    assert first.scales("vector")[0] * 2 == other.scales("vector")[0]
    q.drop("errors/name")


def test_shortage_of_memory_lists_what_this_process_holds(serve):
    daemon = serve("--budget", "64MiB")
    q = ShmQuantizer(daemon.address)
    big = np.ones((10_000, 1024), np.float32)
    held = [q.quantize(big[:2000])]
    with pytest.raises(MemoryError) as caught:
        for _ in range(100):
            held.append(q.quantize(big))
    assert isinstance(caught.value, NoRoomError)
    text = str(caught.value)
    assert f"this process holds {len(held)} results" in text
    assert held[0].segment_name in text
    # What is given back can be had again.
    held.clear()
    assert q.quantize(big).codes("vector").shape == (10_000, 1024)


def test_results_in_reference_cycles_are_collected_before_a_shortage_is_told(serve):
    daemon = serve("--budget", "64MiB")
    q = ShmQuantizer(daemon.address)
    big = np.ones((10_000, 1024), np.float32)
    for _ in range(20):
        cycle = [q.quantize(big)]
        cycle.append(cycle)
        del cycle


def test_a_result_that_never_fits_is_refused_at_once(serve):
    q = ShmQuantizer(serve("--budget", "64MiB").address)
    with pytest.raises(NoRoomError):
        q.quantize(np.ones((100_000, 1024), np.float32), timeout=None)


HOLDER = """
import sys, numpy as np
from shmquant import ShmQuantizer
r = ShmQuantizer(sys.argv[1]).quantize(np.ones((10_000, 4096), "f4"))
print("held", flush=True)
sys.stdin.readline()
"""


def test_waiting_for_memory_that_others_hold_ends_with_the_deadline(serve):
    daemon = serve("--budget", "64MiB")
    command = [sys.executable, "-c", HOLDER, daemon.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        q = ShmQuantizer(daemon.address)
        big = np.ones((10_000, 4096), np.float32)
        with pytest.raises(TimeoutError) as caught:
            q.quantize(big, timeout=0.3)
        assert isinstance(caught.value, DeadlineError)
        holder.stdin.close()
        # With its end the memory comes free while we wait.
        assert q.quantize(big, timeout=60).table.num_rows == 10_000


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_a_calls_own_work_ends_with_the_deadline(q, granularity):
    big = np.ones((50_000, 1024), np.float32)
    with pytest.raises(DeadlineError):
        q.quantize(big, granularity=granularity, timeout=0)
    r = q.quantize(big, granularity=granularity, timeout=60)
    assert r.table.num_rows == 50_000


def test_a_daemon_that_cannot_be_reached_or_started_is_a_connection_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConnectionError) as caught:
        ShmQuantizer(tmp_path / "file" / "x.sock").quantize(X)
    assert isinstance(caught.value, DaemonError)
    assert "x.sock" in str(caught.value)


def test_an_error_of_progress_ends_the_call_and_is_the_one_raised(q):
    def fail(done: int, of: int) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        q.quantize(np.ones((50_000, 256), np.float32), progress=fail)
    assert q.quantize(X).table.num_rows == 4


def test_every_error_of_the_package_is_public_and_doubles_as_a_builtin():
    pairs = {
        "InvalidInputError": ValueError,
        "NoRoomError": MemoryError,
        "DaemonError": ConnectionError,
        "DeadlineError": TimeoutError,
        "NotFoundError": LookupError,
        "NameExistsError": Exception,
        "ResultGoneError": Exception,
    }
    for name, builtin in pairs.items():
        kind = getattr(shmquant, name)
        assert name in shmquant.__all__
        assert issubclass(kind, (ShmQuantError, builtin))
        assert issubclass(kind, ShmQuantError)
        assert issubclass(kind, builtin)


def test_a_result_of_a_daemon_in_another_process_says_so(tmp_path, python):
    r = ShmQuantizer("inproc:").quantize(X)
    assert pickle.loads(pickle.dumps(r)).table.num_rows == 4
    (tmp_path / "pickle").write_bytes(pickle.dumps(r))
    answer = python("import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))", str(tmp_path / "pickle"))
    assert f"DaemonError: the result belongs to a daemon inside process {os.getpid()}" in answer.stderr
