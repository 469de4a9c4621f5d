"""Every way to call: files, streams, async, threads, params, and the earlier system's calls."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

import shmquant
from daemons import eventually
from shmquant import InvalidInputError, Params, ShmQuantizer

RNG = np.random.default_rng(3)
X = RNG.standard_normal((100, 32), dtype=np.float32)
STATE = {
    "encoder.q": RNG.standard_normal((16, 64), dtype=np.float32),
    "encoder.k": RNG.standard_normal((16, 64), dtype=np.float32).astype(ml_dtypes.bfloat16),
    "encoder.bias": np.zeros(16, np.float16),
}


def table(x: np.ndarray = X) -> pa.Table:
    return pa.table(
        {"id": range(len(x)), "emb": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])}
    )


def same(a: pa.Table, b: pa.Table) -> bool:
    return a.equals(b) and a.schema.equals(b.schema, check_metadata=True)


def test_safetensors_files_give_what_the_state_dict_gives(q, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({**STATE, "position_ids": np.arange(4)}, path)
    for scheme in ("int8", "uint4"):
        r = q.quantize_file(path, scheme)
        names = r.table.column("layer_name").to_pylist()
        assert sorted(names) == sorted(STATE)
        assert same(r.table, q.quantize({name: STATE[name] for name in names}, scheme).table)
    assert q.quantize_file(str(path), overrides={"re:.*bias": None}).layer("encoder.bias").bit_width == 16


@pytest.mark.parametrize("kind", ["file", "stream", "parquet"])
def test_arrow_and_parquet_files_give_what_the_table_gives(q, tmp_path, kind):
    path, data = tmp_path / "table", table()
    if kind == "parquet":
        pq.write_table(data, path)
    else:
        writer = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with writer(path, data.schema) as sink:
            sink.write_table(data, max_chunksize=30)
    assert q.quantize_file(path, "uint8").table.equals(q.quantize(data, "uint8").table)


def test_files_that_are_none(q, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a model, but longer than any magic number")
    with pytest.raises(InvalidInputError, match="is no safetensors, Arrow IPC or Parquet file"):
        q.quantize_file(path)
    safetensors.numpy.save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InvalidInputError, match="hint: the file is damaged or incomplete"):
        q.quantize_file(path)


@pytest.mark.weights
def test_real_weights_come_through_every_scheme(q):
    named = os.environ.get("SHMQUANT_WEIGHTS")
    if not named:
        pytest.skip("SHMQUANT_WEIGHTS names no file")
    state = {k: v for k, v in safetensors.numpy.load_file(named).items() if v.dtype == np.float32}
    for scheme, least in (("int8", 30.0), ("uint8", 30.0), ("uint4", 12.0), ("int4", 12.0)):
        r = q.quantize_file(named, scheme, granularity="group", group_size=128, metrics=True)
        assert sorted(r.table.column("layer_name").to_pylist()) == sorted(state)
        for name in ("embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"):
            layer = r.layer(name)
            error = (layer.dequantize() - state[name]).astype(np.float64)
            sqnr = 10 * np.log10((state[name].astype(np.float64) ** 2).sum() / (error**2).sum())
            assert sqnr == pytest.approx(layer.metrics["sqnr_db"], rel=1e-9)
            assert sqnr > least
            assert np.abs(error).max() <= layer.scales.max() * 0.5001


def test_streams_are_quantized_batch_by_batch(q):
    whole = q.quantize(table(), "uint8").table
    reader = q.quantize_stream(table().to_reader(max_chunksize=33), "uint8")
    assert isinstance(reader, pa.RecordBatchReader)
    batches = list(reader)
    assert [b.num_rows for b in batches] == [33, 33, 33, 1]
    assert pa.Table.from_batches(batches).equals(whole)
    assert reader.schema.equals(whole.schema, check_metadata=True)


def test_streams_give_memory_back_as_they_go(q):
    before = len(q.results())
    most = 0
    for batch in q.quantize_stream(table().to_reader(max_chunksize=5), "uint8"):
        most = max(most, len(q.results()) - before)
        del batch
    assert most <= 3
    assert len(q.results()) == before


def test_streams_with_params_agree_in_every_batch(q):
    params = q.fit(table(), "uint8", columns=["emb"])
    batches = list(q.quantize_stream(table().to_reader(max_chunksize=40), params=params))
    joined = pa.Table.from_batches(batches)
    assert same(joined.combine_chunks(), q.quantize(table(), params=params).table.combine_chunks())
    assert len(set(joined.column("emb_params_id").to_pylist())) == 1


def test_streams_without_rows_keep_their_schema(q):
    empty = q.quantize_stream(table().slice(0, 0).to_reader(), "uint8").read_all()
    assert empty.schema.equals(q.quantize(table(), "uint8").schema, check_metadata=True)
    layers = pa.table({"layer_name": ["a", "b"], "weights": [[1.0, 2.0], [3.0]]})
    assert q.quantize_stream(layers.to_batches(max_chunksize=1)).read_all().num_rows == 2


def test_async_calls_run_side_by_side_and_leave_the_loop_free(q):
    async def work() -> tuple[list[int], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        results = await asyncio.gather(*(q.quantize_async(X + i, "uint8") for i in range(8)))
        ticker.cancel()
        return [r.table.num_rows for r in results], ticks

    rows, ticks = asyncio.run(work())
    assert rows == [100] * 8
    assert ticks > 1


def test_cancelling_the_task_cancels_the_work(serve):
    """Cancelled while values cross: nothing stays behind."""
    q = ShmQuantizer(serve("--budget", "128MiB").address)
    big = np.ones((20_000, 1024), np.float32)
    started = threading.Event()

    async def work() -> None:
        task = asyncio.create_task(q.quantize_async(big, progress=lambda done, of: started.set()))
        await asyncio.to_thread(started.wait, 30)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(work())
    eventually(lambda: q.results() == [])
    assert q.quantize(X).table.num_rows == 100


def test_threads_share_a_session_and_its_lanes(address):
    q = ShmQuantizer(address, lanes=3)
    expected = [int(q.quantize(X * i).codes("vector").astype(int).sum()) for i in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda i: int(q.quantize(X * i).codes("vector").astype(int).sum()), range(1, 9))
        assert list(made) == expected


def test_an_interrupt_ends_a_waiting_call(serve, python):
    """Ctrl-C while a call streams: KeyboardInterrupt, and the daemon goes on."""
    daemon = serve()
    script = (
        "import os, signal, sys, numpy as np\n"
        "from shmquant import ShmQuantizer\n"
        "q = ShmQuantizer(sys.argv[1], window=4 << 20)\n"
        "x = np.ones((60_000, 1024), 'f4')\n"
        "sent = []\n"
        "def interrupt(done, of):\n"
        "    if not sent:\n"
        "        sent.append(1); os.kill(os.getpid(), signal.SIGINT)\n"
        "try:\n"
        "    q.quantize(x, progress=interrupt)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', len(q.results()), q.quantize(x[:10]).table.num_rows)\n"
    )
    answer = python(script, daemon.address)
    assert (answer.stdout, answer.stderr) == ("interrupted 0 10\n", "")


def test_an_interrupt_ends_a_wait_for_memory(serve):
    """The other kind of waiting: nothing moves, and only the signal can end it."""
    daemon = serve("--budget", "64MiB")
    q = ShmQuantizer(daemon.address)
    held = q.quantize(np.ones((10_000, 4096), np.float32))
    script = (
        "import sys, numpy as np\n"
        "from shmquant import ShmQuantizer\n"
        "try:\n"
        "    ShmQuantizer(sys.argv[1]).quantize(np.ones((10_000, 4096), 'f4'), timeout=None)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    command = [sys.executable, "-c", script, daemon.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as waiter:
        eventually(lambda: json.loads(q._client.stat())["waiting"] == 1)
        waiter.send_signal(signal.SIGINT)
        assert waiter.communicate(timeout=60)[0] == "interrupted\n"
    assert held.table.num_rows == 10_000
    eventually(lambda: json.loads(q._client.stat())["waiting"] == 0)


def test_handles_of_one_process_share_its_session(serve):
    address = serve().address
    handles = [ShmQuantizer(address) for _ in range(5)]
    results = [q.quantize(X) for q in handles]
    assert len({r.codes("vector").ctypes.data for r in results}) == 5
    assert json.loads(handles[0]._client.stat())["sessions"] == 1


def test_results_made_and_dropped_by_many_threads(serve):
    """Views are dropped on other threads than those that made them, while all keep asking."""
    address = serve("--budget", "256MiB").address
    q = ShmQuantizer(address)
    expected = q.quantize(X).codes("vector").copy()

    def work(seed: int) -> list[np.ndarray]:
        views = []
        for i in range(30):
            r = q.quantize(X, "int8")
            views.append(r.codes("vector")[i % 50 :])
            if i % 7 == seed % 7:
                views = views[-2:]
        return views

    with ThreadPoolExecutor(6) as pool:
        for views in pool.map(work, range(12)):
            assert all(np.array_equal(v, expected[-len(v) :]) for v in views)
    del views
    eventually(lambda: json.loads(q._client.stat())["leases"] == 0)


def test_fit_finds_the_ranges_of_all_batches(q):
    whole = q.fit(table(), "uint8", columns=["emb"])
    parts = [q.fit(table(X[i : i + 30]), "uint8") for i in range(0, 100, 30)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    assert merged == whole
    assert q.fit((table(X[i : i + 30]) for i in range(0, 100, 30)), "uint8") == whole
    low = np.minimum(X.min(axis=0), 0)
    high = np.maximum(X.max(axis=0), 0)
    assert whole.scales("emb") == ((high - low) / np.float32(255)).tolist()
    assert whole.granularity == "dimension"


def test_params_travel_and_bring_their_scheme(q, tmp_path):
    params = q.fit(X, "uint8")
    params.save(tmp_path / "params.json")
    loaded = Params.load(tmp_path / "params.json")
    assert loaded == params
    direct = q.quantize(X, "uint8", granularity="dimension")
    for given in (params, loaded, direct):
        r = q.quantize(table(X[:7]), params=given)
        assert np.array_equal(r.codes("emb"), direct.codes("vector")[:7])
        assert r.params == r.params
    assert direct.params.scales("vector") == params.scales("vector")
    clipped = q.quantize(X * 3, params=params)
    assert clipped.stats["vector"].n_clipped > 0


def test_params_of_layers(q):
    r = q.quantize(STATE, "int8", granularity="tensor")
    again = q.quantize(STATE, params=r)
    assert same(r.table, again.table)
    fitted = q.fit(STATE, "int8", granularity="tensor")
    assert same(r.table, q.quantize(STATE, params=fitted).table)


LAYERS = pa.table(
    {
        "layer_name": ["x", "y"],
        "weights": [np.linspace(-1, 1, 300, dtype="f4").tolist(), [1.0, -2.0, 3.0]],
        "shape": [[2, 150], [3]],
    }
)


@pytest.mark.parametrize(("bit_width", "scheme"), [(8, "uint8"), (4, "uint4"), (2, "uint2")])
def test_the_earlier_systems_calls(q, bit_width, scheme):
    t = q.quantize_arrow(LAYERS, bit_width=bit_width)
    assert isinstance(t, pa.Table)
    first = ["layer_name", "quantized_data", "scales", "zero_points", "shape", "bit_width"]
    assert t.column_names[:6] == first
    assert t.column("bit_width").to_pylist() == [bit_width] * 2
    assert t.column("scheme").to_pylist() == [scheme] * 2
    assert t.column("group_size").to_pylist() == [128, 128]
    # Two groups a row of 150.
    assert [len(s) for s in t.column("scales").to_pylist()] == [4, 1]
    assert [len(z) for z in t.column("zero_points").to_pylist()] == [4, 1]
    assert t.column("shape").to_pylist() == [[2, 150], [3]]
    decoded = shmquant.dequantize(t)
    step = max(max(s) for s in t.column("scales").to_pylist())
    assert np.abs(np.array(decoded["weights"][0].as_py()) - np.linspace(-1, 1, 300)).max() <= step / 2 + 1e-6
    batch = q.quantize_arrow_batch(LAYERS.to_batches()[0], bit_width=bit_width)
    assert isinstance(batch, pa.RecordBatch)
    assert pa.Table.from_batches([batch]).equals(t.combine_chunks())


def test_the_earlier_systems_texts(q):
    nan = [0.0] * 7 + [float("nan")]
    cases = {
        "Invalid bit_width: 3": lambda: q.quantize_arrow(LAYERS, bit_width=3),
        "Missing required column 'layer_name'": lambda: q.quantize_arrow(LAYERS.drop_columns(["layer_name"])),
        "Missing required column 'weights'": lambda: q.quantize_arrow(LAYERS.drop_columns(["weights"])),
        "Layer 'x' contains NaN or Inf at index 7": lambda: q.quantize_arrow_batch(
            pa.record_batch({"layer_name": ["x"], "weights": [nan]})
        ),
    }
    for text, call in cases.items():
        with pytest.raises(ValueError, match=text):
            call()


def test_a_call_that_finds_no_daemon_starts_one(tmp_path, python):
    """Through the extension alone: what serves has never loaded pyarrow or numpy."""
    address = tmp_path / "deep" / "auto.sock"
    script = (
        "import json, sys, numpy as np\n"
        "from shmquant import ShmQuantizer\n"
        "q = ShmQuantizer(sys.argv[1])\n"
        "q.quantize(np.ones((2, 2), 'f4'), name='auto')\n"
        "print(json.loads(q._client.stat())['pid'])\n"
    )
    first = python(script, str(address))
    assert first.stderr == ""
    pid = int(first.stdout)
    try:
        assert python(script, str(address)).stdout == first.stdout
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "_native" in maps
        assert "numpy" not in maps
        assert "arrow.so" not in maps
        assert os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert ShmQuantizer(address).open("auto").table.num_rows == 2
    finally:
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_many_processes_that_find_no_daemon_start_one(tmp_path, python):
    address = str(tmp_path / "race.sock")
    script = (
        "import json, sys, numpy as np\n"
        "from shmquant import ShmQuantizer\n"
        "q = ShmQuantizer(sys.argv[1])\n"
        "print(q.quantize(np.ones((2, 2), 'f4')).table.num_rows, json.loads(q._client.stat())['pid'])\n"
    )
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(python, script, address) for _ in range(6)]
        said = {a.result().stdout for a in answers}
    assert len(said) == 1
    rows, pid = said.pop().split()
    assert rows == "2"
    os.kill(int(pid), signal.SIGTERM)


def test_an_interrupted_serve_command_ends_cleanly(serve):
    assert serve().stop(signal.SIGINT) == 0
    assert serve().stop(signal.SIGTERM) == 0


def test_the_environment_names_the_daemon(monkeypatch, address):
    monkeypatch.setenv("SHMQUANT_ADDRESS", address)
    assert ShmQuantizer().address == address
    assert ShmQuantizer().quantize(X).table.num_rows == 100
    monkeypatch.setenv("SHMQUANT_ADDRESS", "inproc:")
    assert ShmQuantizer().quantize(X).table.num_rows == 100
