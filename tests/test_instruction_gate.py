"""The hot kernels take no more instructions than they did; see benches/gate/gate.py."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from watchdog import patience

PROGRAM = Path(__file__).parents[1] / "benches" / "gate" / "gate.py"


# As if it were run: beside it lies what it imports.
sys.path.insert(0, str(PROGRAM.parent))


def load():
    spec = importlib.util.spec_from_file_location("instruction_gate", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gate = load()


@pytest.mark.slow
def test_kernels_take_no_more_instructions():
    # The kernels are built first.
    patience(900)
    try:
        counted = gate.measure()
        wrong, notes = gate.compare(json.loads(gate.FIGURES.read_text()), counted)
    except gate.Unable as reason:
        pytest.skip(f"instructions are not compared: {reason}")
    print("\n".join(notes))
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_a_small_request_takes_no_more_instructions():
    patience(900)
    figures = json.loads(gate.FIGURES.read_text())
    try:
        gate.check_tools()
        gate.check_compiler(figures, gate.compiler())
        gate.check_requests(figures)
    except gate.Unable as reason:
        pytest.skip(f"instructions are not compared: {reason}")
    wrong, notes = gate.compare_requests(figures, gate.request.measure())
    print("\n".join(notes))
    assert not wrong, "\n".join(wrong)


def test_more_instructions_of_a_request_are_told():
    kept = {"instructions_per_request": {"daemon": 1000, "client": 2000}}
    assert gate.compare_requests(kept, {"daemon": 1049, "client": 1901}) == ([], [])
    wrong, notes = gate.compare_requests(kept, {"daemon": 1051, "client": 1899})
    assert [text.split(":")[0] for text in wrong + notes] == ["daemon", "client"]
    assert len(wrong) == 1


def test_more_instructions_are_told():
    figures = json.loads(gate.FIGURES.read_text())
    kept = figures["instructions_per_value"]

    def compared(factor: float):
        paths = {path: {case: n * factor for case, n in cases.items()} for path, cases in kept.items()}
        return gate.compare(figures, gate.Counted(figures["compiler"], paths, []))

    cases = sum(len(cases) for cases in kept.values())
    assert cases > 20
    assert compared(1.01) == ([], [])
    assert len(compared(1.03)[0]) == cases
    assert len(compared(0.9)[1]) == cases
    missing = gate.Counted(figures["compiler"], {"portable": {}, "avx1024": {"case": 1.0}}, [])
    wrong, notes = gate.compare(figures, missing)
    assert len(wrong) == len(kept["portable"])
    assert any("avx1024" in note for note in notes)
    other = gate.Counted("rustc 1.0.0 of another machine", kept, [])
    with pytest.raises(gate.Unable, match="another machine"):
        gate.compare(figures, other)
