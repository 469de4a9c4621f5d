"""The words of the options, for type checkers and for the messages of those who mistype them."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeAlias, TypeVar

from . import _native

P = ParamSpec("P")
R = TypeVar("R")

#: A number format, by one word; :func:`schemes` says what each is.
Scheme: TypeAlias = Literal["int8", "uint8", "int4", "uint4", "int2", "uint2"]
#: Over what a range is taken: the tensor, a row, a vector component over all rows, or a group within a row.
Granularity: TypeAlias = Literal["tensor", "row", "dimension", "group"]
#: Where the codes lie around zero.
Mapping: TypeAlias = Literal["symmetric", "asymmetric"]
#: What NaN and infinities do: raise, turn the row into a null, or clip.
OnNonFinite: TypeAlias = Literal["error", "null", "saturate"]
#: What a null element inside a vector or layer does: raise, or count as 0.
Nulls: TypeAlias = Literal["error", "zero"]
#: Type that values are decoded to.
FloatType: TypeAlias = Literal["float32", "float16"]

_OTHER_SPELLINGS = {
    "bits": 'scheme="uint4" (the scheme\'s word says the bits)',
    "bit_width": 'scheme="uint4" (bit_width is an option of quantize_arrow)',
    "nbits": 'scheme="uint4" (the scheme\'s word says the bits)',
    "dtype": 'scheme="int8"',
    "type": 'scheme="int8"',
    "format": 'scheme="int8"',
    "qtype": 'scheme="int8"',
    "group": "group_size=128",
    "groupsize": "group_size=128",
    "block_size": "group_size=128",
    "blocksize": "group_size=128",
    "symmetric": 'mapping="symmetric" or mapping="asymmetric"',
    "sym": 'mapping="symmetric" or mapping="asymmetric"',
    "per_channel": 'granularity="row"',
    "axis": 'granularity="row" or granularity="dimension"',
    "column": 'columns=["emb"]',
    "cols": 'columns=["emb"]',
    "nan": 'on_nonfinite="saturate"',
    "overwrite": "replace=True",
    "deadline": "timeout=30.0",
}


def schemes() -> dict[str, str]:
    """List the schemes of this release.

    Returns
    -------
    dict of str to str
        The word that ``scheme=`` takes, and one line on what it is.

    Examples
    --------
    >>> import shmquant
    >>> list(shmquant.schemes())
    ['int8', 'uint8', 'int4', 'uint4', 'int2', 'uint2']
    """
    return _native.schemes()


def spelled(function: Callable[P, R]) -> Callable[P, R]:
    """Make `function` name the right word when it is called with a wrong one."""
    parameters = inspect.signature(function).parameters.values()
    own = [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]
    passes_on = len(own) < len([p for p in parameters if p.name != "self"])

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for word in kwargs:
            if word not in own:
                known = [*own, *_quantize_options()] if passes_on else own
                if word not in known:
                    raise TypeError(_misspelt(function.__name__, word, known))
        return function(*args, **kwargs)

    return checked


def _quantize_options() -> list[str]:
    from ._calls import QuantizeOptions

    return list(QuantizeOptions.__annotations__)


def _misspelt(function: str, word: str, known: list[str]) -> str:
    call = "ShmQuantizer" if function == "__init__" else function
    text = f"{call}() has no option {word!r}"
    right = _OTHER_SPELLINGS.get(word)
    if right is not None and right.split("=")[0] in known:
        return f"{text}\nhint: say {right}"
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"{text}\nhint: did you mean {near[0]!r}?"
    return f"{text}\nhint: its options are {', '.join(known)}"
