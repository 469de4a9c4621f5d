"""Packages that only some calls need, loaded when such a call is made."""

from __future__ import annotations

import importlib
from typing import Any


def need(package: str, what: str) -> Any:
    """Import `package`, or say which of our extras brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {package}\nhint: pip install 'shmquant[{package}]'", name=package
        ) from error
