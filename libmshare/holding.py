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
import weakref

from libmshare import core

Memory = ctypes.Array[ctypes.c_ubyte]


class _Owner:
    """Lives as long as something may touch the memory."""

    __slots__ = ("__weakref__",)


class Hold(weakref.ref[_Owner]):
    """One hold of this process, for as long as its owner lives."""

    __slots__ = ("name", "region")
    name: str
    region: core.OpenRegion

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


_holds: dict[int, Hold] = {}
"""By the hold's id(); one whose owner is dead is to be given back."""


def _give_back(_: object = None) -> None:
    for key, hold in list(_holds.items()):
        if hold() is None:
            # Called twice, it does nothing the second time; and it is unmapped whatever it says.
            with contextlib.suppress(OSError):
                core.mshare_close(hold.region)
            _holds.pop(key, None)


def open_region(request: core.OpenRequest, name: str) -> tuple[Hold, Memory]:
    """Attach or create a region; it is held as long as its memory lives.  Raises OSError."""
    _give_back()
    owner, region = _Owner(), core.OpenRegion()
    hold = Hold(owner, _give_back)
    hold.name, hold.region = name, region
    _holds[id(hold)] = hold
    try:
        core.mshare_open(request, region, name)
        memory = (ctypes.c_ubyte * region.length).from_address(region.start)
        memory.owner = owner  # type: ignore[attr-defined] # every buffer of it keeps it
    except BaseException:
        if region.created:
            with contextlib.suppress(OSError):
                core.mshare_forget_name(region, name)
        raise
    return hold, memory


def holding(low: int, high: int) -> tuple[Hold, _Owner] | None:
    """The hold of the region that has all of [low, high), if there is one, and its owner."""
    for hold in list(_holds.values()):
        owner = hold()
        start = hold.region.start
        if owner and hold.region.held and start <= low and high <= start + hold.region.length:
            return hold, owner
    return None


def held() -> list[str]:
    """The names of the regions that this process holds."""
    _give_back()
    return [hold.name for hold in _holds.values()]
