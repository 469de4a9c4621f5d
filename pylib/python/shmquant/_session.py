"""The sessions of this process: one for each daemon, shared by every handle; and how a daemon is started."""

from __future__ import annotations

import operator
import os
import sys
import weakref
from dataclasses import dataclass

from . import _native
from ._errors import invalid

#: Address of a daemon that runs inside this process.
IN_PROCESS = "inproc:"

# Loads the extension from its file and nothing else: no site-packages, no pyarrow. What follows are its path
# and the command's arguments.
_LOADER = (
    "import importlib.util as u, signal, sys; "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "s = u.spec_from_file_location('shmquant._native', sys.argv[1]); "
    "m = u.module_from_spec(s); s.loader.exec_module(m); "
    "sys.exit(m.cli(['shmquant', *sys.argv[2:]], []))"
)


@dataclass(frozen=True)
class Settings:
    """What tells one session of a process from another."""

    address: str
    lanes: int | None = None
    window: int | None = None
    poll: bool | None = None


# The process id is part of the key: a forked child gets a session of its own and never waits for a lock that
# a thread of its parent held.
_clients: dict[tuple[int, Settings], _native.Client] = {}
# What this process holds, oldest first, each with its daemon's address.
_leases: weakref.WeakKeyDictionary[_native.Lease, str] = weakref.WeakKeyDictionary()


def settings(
    address: str | os.PathLike[str] | None, lanes: int | None, window: int | None, poll: bool | None
) -> Settings:
    """Bring the options of a handle into the form that sessions are looked up by."""
    chosen = _native.default_address() if address is None else os.fspath(address)
    if chosen != IN_PROCESS:
        chosen = os.path.abspath(chosen)
    lanes = _count("lanes", lanes, (1 << 32) - 1, "how many requests may run at once")
    window = _count("window", window, (1 << 64) - 1, "bytes, such as 16 << 20")
    if poll is not None and not isinstance(poll, bool):
        raise invalid(f"poll {poll!r} is a {type(poll).__name__}", "say poll=True or poll=False")
    return Settings(chosen, lanes, window, poll)


def _count(option: str, given: int | None, most: int, meaning: str) -> int | None:
    if given is None:
        return None
    hint = f"{option}= takes {meaning}; leave it out for what the daemon proposes"
    try:
        number = operator.index(given)
    except TypeError:
        raise invalid(f"{option} {given!r} is a {type(given).__name__}, not a whole number", hint) from None
    if isinstance(given, bool) or not 0 < number <= most:
        raise invalid(f"{option} {given!r} is not between 1 and {most}", hint)
    return number


def client(wanted: Settings) -> _native.Client:
    """The session of this process for these settings; connects when it is first used."""
    key = (os.getpid(), wanted)
    found = _clients.get(key)
    if found is None:
        # setdefault is atomic: of two threads that get here, one wins and the other's idle client goes.
        found = _clients.setdefault(
            key,
            _native.Client(
                wanted.address,
                start=None if wanted.address == IN_PROCESS else start_prefix() or None,
                lanes=wanted.lanes,
                window=wanted.window,
                poll=wanted.poll,
            ),
        )
    return found


def start_prefix() -> list[str]:
    """Begin a command line that runs the command from the extension alone; empty without an interpreter."""
    if not sys.executable:
        return []
    return [sys.executable, "-I", "-S", "-c", _LOADER, os.path.abspath(_native.__file__)]


def remember(lease: _native.Lease, address: str) -> None:
    """Count `lease` among those that this process holds, for as long as it or a view of it lives."""
    _leases[lease] = address


def held(address: str) -> list[_native.Lease]:
    """The leases of this process at one daemon that have not been given back, oldest first."""
    return [lease for lease, where in list(_leases.items()) if where == address and not lease.released]
