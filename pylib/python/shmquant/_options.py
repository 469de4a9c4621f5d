"""The options of `quantize` and its kin, brought into the one form that the extension takes."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from ._errors import invalid

if TYPE_CHECKING:
    from . import _native
    from ._params import Params
    from ._result import QuantizedTable

#: What differs for some layers or columns: by exact name, ``*`` pattern or ``re:`` expression; None leaves
#: them as they are.
Overrides: TypeAlias = "Dict[str, Dict[str, Any] | None]"

# As the protocol's section 3 has it.
_NAME_BYTES = 1024

_OVERRIDABLE = ("scheme", "mapping", "granularity", "group_size", "on_nonfinite")


class SourceOptions(TypedDict):
    """The keys that ``_native.Source`` reads; every one is present."""

    scheme: str
    columns: list[str] | None
    granularity: str | None
    group_size: int | None
    mapping: str | None
    params: _native.Params | None
    overrides: list[tuple[str, dict[str, Any] | None]]
    on_nonfinite: str
    nulls: str
    continue_on_error: bool
    metrics: bool
    named: bool
    keep: list[str] | None
    layers: bool | None
    part_of_stream: bool


def source_options(
    *,
    scheme: str = "int8",
    columns: Sequence[str] | None = None,
    granularity: str | None = None,
    group_size: int | None = None,
    mapping: str | None = None,
    params: Params | QuantizedTable | None = None,
    overrides: Overrides | None = None,
    on_nonfinite: str = "error",
    nulls: str = "error",
    continue_on_error: bool = False,
    metrics: bool = False,
    name: str | None = None,
    replace: bool = False,
    keep: Sequence[str] | None = None,
    layers: bool | None = None,
    part_of_stream: bool = False,
) -> SourceOptions:
    """Check what needs no look at the data, and give every option its native form."""
    if name is not None:
        dataset_name(name)
    else:
        if replace:
            raise invalid("replace=True was given without a name", 'say which dataset: name="..."')
        if keep is not None:
            raise invalid(
                "keep= was given without a name", "only a published result takes other columns along"
            )
    if not isinstance(scheme, str):
        raise invalid(f"scheme {scheme!r} is a {type(scheme).__name__}, not a word", 'say scheme="int8"')
    if group_size is not None and (isinstance(group_size, bool) or not 0 < group_size < 1 << 31):
        raise invalid(f"group_size {group_size!r} is not between 1 and 2147483647")
    return {
        "scheme": scheme,
        "columns": names("columns", columns),
        "granularity": granularity,
        "group_size": group_size,
        "mapping": mapping,
        "params": _native_params(params, scheme),
        "overrides": [(pattern, _override(pattern, what)) for pattern, what in (overrides or {}).items()],
        "on_nonfinite": on_nonfinite,
        "nulls": nulls,
        "continue_on_error": continue_on_error,
        "metrics": metrics,
        "named": name is not None,
        "keep": names("keep", keep),
        "layers": layers,
        "part_of_stream": part_of_stream,
    }


def dataset_name(name: str) -> str:
    """A name that the protocol can carry: a frame with another would cost the session."""
    if not isinstance(name, str):
        raise invalid(f"name {name!r} is a {type(name).__name__}, not a string")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise invalid(f"name {name!r} cannot be written in UTF-8") from None
    if not 0 < size <= _NAME_BYTES:
        raise invalid(f"name {name[:40]!r} has {size} bytes", f"a name has 1 to {_NAME_BYTES}")
    if "\0" in name:
        raise invalid(f"name {name!r} has a NUL in it")
    return name


def names(option: str, given: Sequence[str] | None) -> list[str] | None:
    """A list of names, and not by mistake the letters of one."""
    if given is None:
        return None
    if isinstance(given, str):
        raise invalid(f"{option}={given!r} is one name, not a sequence of names", f"say {option}=[{given!r}]")
    return list(given)


def timeout_seconds(timeout: float | None) -> float | None:
    """A timeout that the protocol can carry; None waits as long as it takes."""
    if timeout is None or timeout == float("inf"):
        return None
    if not timeout >= 0:
        raise invalid(f"timeout {timeout!r} is not a number of seconds", "None waits as long as it takes")
    return float(timeout)


def _native_params(params: Params | QuantizedTable | None, scheme: str) -> _native.Params | None:
    if params is None:
        return None
    from ._params import Params
    from ._result import QuantizedTable

    if isinstance(params, QuantizedTable):
        params = params.params
    if not isinstance(params, Params):
        raise invalid(
            f"params is a {type(params).__name__}", "it takes what fit() gives, or a result of quantize()"
        )
    if scheme not in ("int8", params.scheme):
        raise invalid(
            f"scheme={scheme!r} contradicts params= of {params.scheme}",
            "leave scheme= out: params bring theirs along",
        )
    return params._native


def _override(pattern: str, what: Dict[str, Any] | None) -> dict[str, Any] | None:
    if what is None:
        return None
    if not isinstance(what, Dict):
        raise invalid(
            f"override {pattern!r} is {what!r}",
            'give {"scheme": "int8"}, or None to leave the layer as it is',
        )
    for option in what:
        if option not in _OVERRIDABLE:
            raise invalid(
                f"override {pattern!r} has no option {option!r}", f"it takes {', '.join(_OVERRIDABLE)}"
            )
    return {option: what.get(option) for option in _OVERRIDABLE}
