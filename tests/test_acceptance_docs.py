"""The pages for newcomers, executed as a newcomer would: no daemon is running, nothing is set up."""

from __future__ import annotations

import builtins
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import shmquant
from shmquant import ShmQuantizer

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "docs/getting-started.md"]
EVERY_PAGE = sorted(
    str(page.relative_to(ROOT))
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "protocol/PROTOCOL.md"]
)

# Executes the blocks of a page in order, in one namespace. Where an expression is followed by a comment that
# is a literal, or that says "numpy (shape)", the two are compared.
RUNNER = """
import ast, re, sys

def run(block):
    lines = block.splitlines()
    for node in ast.parse(block).body:
        if not isinstance(node, ast.Expr):
            exec(compile(ast.Module([node], []), "page", "exec"), space)
            continue
        value = eval(compile(ast.Expression(node.value), "page", "eval"), space)
        comment = lines[node.end_lineno - 1][node.end_col_offset:].strip().lstrip("# ")
        shape = re.match(r"numpy (?:array )?(\\(.*?\\))", comment)
        if shape:
            assert value.shape == ast.literal_eval(shape[1]), (lines[node.lineno - 1], value.shape)
            print("compared")
        elif comment and comment[0] in "[({'\\"":
            assert value == ast.literal_eval(comment), (lines[node.lineno - 1], value)
            print("compared")

space = {}
for block in re.findall(r"^```python\\n(.*?)^```", open(sys.argv[1]).read(), re.DOTALL | re.MULTILINE):
    run(block)
    print("block")
"""


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def home(tmp_path):
    """A user's environment with nothing in it, in a folder with a model; the daemon that comes is stopped."""
    # A socket's path has an end at 107 bytes, and the folders of tests are long.
    runtime = tempfile.mkdtemp(prefix="shmquant-")
    weights = np.random.default_rng(2).standard_normal((256, 384), dtype=np.float32)
    save_file({"encoder.q": weights, "encoder.bias": weights[0]}, tmp_path / "model.safetensors")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"XDG_RUNTIME_DIR": runtime, "HOME": str(tmp_path), "PATH": path}
    del env["SHMQUANT_ADDRESS"]
    yield {"cwd": tmp_path, "env": env}
    subprocess.run(["shmquant", "stop", "--force"], cwd=tmp_path, env=env, check=False, capture_output=True)
    shutil.rmtree(runtime)


@pytest.mark.parametrize("page", PAGES)
def test_what_the_page_shows_works_as_it_stands(home, page):
    command = [sys.executable, "-c", RUNNER, str(ROOT / page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **home)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("block") == len(blocks(page, "python")) >= 1
    assert done.stdout.count("compared") >= 1


def test_the_commands_of_the_page_work_as_they_stand(home):
    *_, last = blocks("docs/getting-started.md", "sh")
    assert last.count("shmquant ") >= 4
    done = subprocess.run(["bash", "-ec", last], capture_output=True, text=True, check=False, **home)
    assert done.returncode == 0, done.stderr
    assert (home["cwd"] / "out.arrow").exists()
    # The page says that the daemon leaves when nobody needs it; a user may also end it.
    stop = subprocess.run(["shmquant", "stop"], capture_output=True, text=True, check=False, **home)
    assert stop.returncode == 0, stop.stderr


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    section = (ROOT / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def words(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_the_reference_names_what_there_is():
    schemes = {word for row in rows("docs/reference.md", "Schemes") for word in words(row[0])}
    assert schemes == set(shmquant.schemes())

    options = [word for row in rows("docs/reference.md", "Options of `quantize`") for word in words(row[0])]
    signature = inspect.signature(ShmQuantizer.quantize).parameters
    assert sorted(options) == sorted(set(signature) - {"self", "data"})
    for row in rows("docs/reference.md", "Options of `quantize`"):
        if default := re.fullmatch(r'`"(\w+)"`|`(False)`|(\d+) s', row[1]):
            (word,) = filter(None, default.groups())
            assert str(signature[words(row[0])[0]].default).removesuffix(".0") == word

    errors = rows("docs/reference.md", "Errors")
    public = {name for name in shmquant.__all__ if name.endswith("Error")}
    assert {words(row[0])[0] for row in errors} | {"ShmQuantError"} == public
    for name, also, _ in errors:
        error = getattr(shmquant, words(name)[0])
        assert issubclass(error, shmquant.ShmQuantError)
        for base in words(also):
            assert issubclass(error, getattr(builtins, base))


def test_the_reference_names_every_command(home):
    line = (ROOT / "docs/reference.md").read_text().partition("## Command line\n\n`shmquant ")[2]
    named = {part.split()[0] for part in line.partition("`")[0].split("|")}
    usage = subprocess.run(["shmquant", "--help"], capture_output=True, text=True, check=True, **home).stdout
    commands = set(re.findall(r"^  (\w+) +[A-Z]", usage.partition("Options:")[0], re.MULTILINE))
    assert named == commands - {"help"}


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target
