"""The options of `quantize` as one type, for the calls that hand them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

from ._scheme import Granularity, Mapping, Nulls, OnNonFinite

if TYPE_CHECKING:
    from ._options import Overrides
    from ._params import Params
    from ._result import QuantizedTable


class QuantizeOptions(TypedDict, total=False):
    """The keyword options of :meth:`ShmQuantizer.quantize`."""

    columns: Sequence[str] | None
    granularity: Granularity | None
    group_size: int | None
    mapping: Mapping | None
    params: Params | QuantizedTable | None
    overrides: Overrides | None
    on_nonfinite: OnNonFinite
    nulls: Nulls
    continue_on_error: bool
    metrics: bool
    name: str | None
    replace: bool
    keep: Sequence[str] | None
    progress: Callable[[int, int], object] | None
    timeout: float | None
