"""Quantization of Arrow data as a shared service of one host.

>>> import numpy as np
>>> from shmquant import ShmQuantizer
>>> q = ShmQuantizer(address="inproc:")
>>> r = q.quantize({"encoder.0.q": np.ones((4, 384), "f4")}, scheme="uint4")
>>> r.table.num_rows
1
>>> r.layer("encoder.0.q").dequantize().shape
(4, 384)

:class:`ShmQuantizer` is the way in, :class:`QuantizedTable` what comes back. :func:`open` finds what another
process published; it is not in ``__all__``, so that ``from shmquant import *`` leaves the built-in alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._native import __version__ as __version__

if TYPE_CHECKING:
    from ._decode import dequantize as dequantize
    from ._errors import DaemonError as DaemonError
    from ._errors import DeadlineError as DeadlineError
    from ._errors import InvalidInputError as InvalidInputError
    from ._errors import NameExistsError as NameExistsError
    from ._errors import NoRoomError as NoRoomError
    from ._errors import NotFoundError as NotFoundError
    from ._errors import ResultGoneError as ResultGoneError
    from ._errors import ShmQuantError as ShmQuantError
    from ._layer import Layer as Layer
    from ._memory import InputTable as InputTable
    from ._params import Params as Params
    from ._quantizer import ShmQuantizer as ShmQuantizer
    from ._quantizer import open as open
    from ._result import ItemStats as ItemStats
    from ._result import QuantizedTable as QuantizedTable
    from ._scheme import Scheme as Scheme
    from ._scheme import schemes as schemes
    from ._validate import Validation as Validation
    from ._validate import validate as validate

__all__ = [
    "DaemonError",
    "DeadlineError",
    "InputTable",
    "InvalidInputError",
    "ItemStats",
    "Layer",
    "NameExistsError",
    "NoRoomError",
    "NotFoundError",
    "Params",
    "QuantizedTable",
    "ResultGoneError",
    "Scheme",
    "ShmQuantError",
    "ShmQuantizer",
    "Validation",
    "__version__",
    "dequantize",
    "schemes",
    "validate",
]

# Names are loaded on first use: the command `shmquant` and the daemon it runs then never load pyarrow.
_HOMES = {
    "_errors": (
        "DaemonError",
        "DeadlineError",
        "InvalidInputError",
        "NameExistsError",
        "NoRoomError",
        "NotFoundError",
        "ResultGoneError",
        "ShmQuantError",
    ),
    "_decode": ("dequantize",),
    "_layer": ("Layer",),
    "_memory": ("InputTable",),
    "_params": ("Params",),
    "_quantizer": ("ShmQuantizer", "open"),
    "_result": ("ItemStats", "QuantizedTable"),
    "_scheme": ("Scheme", "schemes"),
    "_validate": ("Validation", "validate"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
