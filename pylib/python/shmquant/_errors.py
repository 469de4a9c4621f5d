"""What goes wrong, as types: each is a :class:`ShmQuantError` and the built-in exception that fits.

The text says what happened, with which value, and after ``hint:`` what to do. The same facts are attributes,
so that a program need not read the text.
"""

from __future__ import annotations


class ShmQuantError(Exception):
    """Anything this package raises on purpose.

    Attributes
    ----------
    hint : str
        What to do about it; empty where there is nothing to do.
    column : str or None
        The column or layer at fault.
    row, index : int or None
        The first row, and the first element in that row (columns) or in the layer, at fault.
    count : int or None
        How many values are at fault.
    value : float or None
        The first of them.
    """

    hint: str = ""
    column: str | None = None
    row: int | None = None
    index: int | None = None
    count: int | None = None
    value: float | None = None


class InvalidInputError(ShmQuantError, ValueError):
    """The data or an option: a NaN, a missing column, a scheme that does not exist."""


class NoRoomError(ShmQuantError, MemoryError):
    """The daemon's budget, the host's memory or a limit is exhausted; the text has the numbers."""


class DaemonError(ShmQuantError, ConnectionError):
    """The daemon could not be started or reached, went away, or had a fault of its own."""


class DeadlineError(ShmQuantError, TimeoutError):
    """The call's time ran out."""


class NotFoundError(ShmQuantError, LookupError):
    """No dataset, ticket, column or layer of that name."""


class NameExistsError(ShmQuantError):
    """The name belongs to a dataset made from another spec or other values."""


class ResultGoneError(ShmQuantError):
    """The result was given back, or its daemon has ended."""


def invalid(what: str, hint: str = "") -> InvalidInputError:
    """An :class:`InvalidInputError` in the package's form of text."""
    error = InvalidInputError(f"{what}\nhint: {hint}" if hint else what)
    error.hint = hint
    return error


def not_found(what: str, hint: str = "") -> NotFoundError:
    """A :class:`NotFoundError` in the package's form of text."""
    error = NotFoundError(f"{what}\nhint: {hint}" if hint else what)
    error.hint = hint
    return error
