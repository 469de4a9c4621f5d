"""What `pip install` leaves behind: one typed package with one extension, one command and one requirement."""

import importlib.metadata
import re
from pathlib import Path

from shmquant import _native

DISTRIBUTION = importlib.metadata.distribution("shmquant")


def test_extension_and_distribution_are_of_one_version():
    assert _native.__version__ == DISTRIBUTION.version


def test_the_installed_package_is_under_test_and_not_the_source_tree():
    source = Path(__file__).resolve().parents[1] / "pylib"
    assert not Path(_native.__file__).resolve().is_relative_to(source)


def test_extension_is_for_every_later_cpython():
    assert _native.__file__.endswith(".abi3.so")
    assert "cp311-abi3" in DISTRIBUTION.read_text("WHEEL")


def test_package_is_typed_and_licensed():
    names = {str(path) for path in DISTRIBUTION.files}
    assert {"shmquant/py.typed", "shmquant/_native.pyi"} <= names
    for licence in ("LICENSE-MIT", "LICENSE-APACHE"):
        assert any(name.endswith(f"licenses/{licence}") for name in names)


def test_pyarrow_is_the_one_requirement():
    required = [line for line in DISTRIBUTION.requires if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line).group() for line in required] == ["pyarrow"]


def test_the_command_can_be_loaded():
    (command,) = DISTRIBUTION.entry_points.select(group="console_scripts", name="shmquant")
    assert callable(command.load())
