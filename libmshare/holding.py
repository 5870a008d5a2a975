"""What this process holds, and when it is given back.

A hold is a struct that the C library fills in the call that makes it, and clears in the call
that ends it.  An `_Owner` stands for it: everything that shows the memory keeps the owner, and
when the last such thing has died the hold is ended.

Signals may raise an exception between any two instructions.  So everything that is needed to
give a hold back is noted before the call that makes it; and what was to be given back when an
exception came in between is, with the next call of this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Final

from libmshare import core, waiting

Memory = ctypes.Array[ctypes.c_ubyte]


class _Owner:
    """Lives as long as something may touch the memory."""

    __slots__ = ("__weakref__",)


class Hold(weakref.ref[_Owner]):
    """One hold of this process, for as long as its owner lives."""

    __slots__ = ("name", "process", "region")
    name: str
    process: int
    """In which one it is known to be attached: not, perhaps, in a child of that one."""
    region: core.OpenRegion

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


_holds: dict[int, Hold] = {}
"""By the hold's id(); one whose owner is dead is to be given back."""


_LETTING_GO: Final = 10.0
"""How long who lets go of a region waits for a daemon that does not answer (seconds)."""


def _close(key: int, hold: Hold) -> None:
    # Called twice, it does nothing the second time; and it is unmapped whatever it says.
    waiting.apart(core.closing(hold.region), _nothing, hold, _LETTING_GO)
    _holds.pop(key, None)


def _nothing() -> None:
    """What is done is done."""


def _give_back(*, wait: bool = True) -> None:
    for key in list(_holds):  # (of items() it would make tuples, and collect garbage meanwhile)
        hold = _holds.get(key)
        if hold is None or hold() is not None:
            continue
        if not hold.region.held:  # what was asked for was never had
            _holds.pop(key, None)
        elif wait:
            _close(key, hold)
        else:
            waiting.aside(partial(_close, key, hold))


class _Here(threading.local):
    leaves_it = False


_here = _Here()


def _dropped(_: object) -> None:
    """The last one that showed the memory has died.

    A destructor is no place to wait in: nobody sees what a signal handler raises there, and
    Ctrl-C would be lost.
    """
    if not _here.leaves_it and not sys.is_finalizing():  # (the end of a process detaches)
        _give_back(wait=False)


@contextlib.contextmanager
def letting_go() -> Iterator[None]:
    """What is dropped in the block is given back behind it, and waited for."""
    _here.leaves_it = True
    try:
        yield
    finally:
        _here.leaves_it = False
    _give_back()


def _unmake(region: core.OpenRegion, name: str) -> None:
    if region.created:
        with contextlib.suppress(OSError):
            core.mshare_forget_name(region, name)


def forget_name(hold: Hold, name: str) -> None:
    """The region loses its name, `name` to people.  Raises OSError (ESTALE, EACCES, EPERM).

    A signal handler may end the wait for that, and it goes all the same.
    """
    call = core.forgetting_name(hold.region)
    waiting.apart(call, _nothing, hold)
    call.check(name)


def open_region(request: core.OpenRequest, name: str) -> tuple[Hold, Memory]:
    """Attach or create a region; it is held as long as its memory lives.  Raises OSError.

    A signal handler may end it: then it is undone, if need be when the daemon answers.
    """
    _give_back()
    owner, region = _Owner(), core.OpenRegion()
    hold = Hold(owner, _dropped)
    hold.name, hold.process, hold.region = name, os.getpid(), region
    _holds[id(hold)] = hold
    try:
        call = core.opening(request, region)
        waiting.apart(call, partial(_unmake, region, name), (owner, hold))
        call.check(name)
        memory: Memory = (ctypes.c_ubyte * region.length).from_address(region.start)
        memory.owner = owner  # type: ignore[attr-defined] # every buffer of it keeps it
    except BaseException:
        _unmake(region, name)
        raise
    finally:
        del owner  # the memory has it
    return hold, memory


def check_after_fork(hold: Hold) -> None:
    """Raises Stale in a child that could not attach the region again: a touch would kill it."""
    request = core.OpenRequest(
        identity=bytes(hold.region.identity),
        oflags=os.O_RDWR if hold.region.writable else os.O_RDONLY,
    )
    region = core.OpenRegion()
    call = core.opening(request, region)
    try:
        call.make()  # of what a process has nobody is asked
        call.check(hold.name)
    finally:
        core.closing(region).make()
    hold.process = os.getpid()


def holding(low: int, high: int) -> tuple[Hold, _Owner] | None:
    """The hold of the region that has all of [low, high), if there is one, and its owner."""
    for key in list(_holds):
        hold = _holds.get(key)
        owner = hold() if hold is not None else None
        if owner is None or hold is None:
            continue
        start = hold.region.start
        if hold.region.held and start <= low and high <= start + hold.region.length:
            return hold, owner
    return None


def held() -> list[str]:
    """The names of the regions that this process holds."""
    _give_back()
    return [hold.name for hold in _holds.values()]
