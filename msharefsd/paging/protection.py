"""Write protection of a region's pages, in every sharer at once.

userfaultfd's write protection acts on a sharer's page table from outside: two
ioctls a sharer, no code of the sharer's runs, a stopped one delays nobody.  It is
used where a write must not happen (PROT_READ) and where it must be noticed (a
MAP_SHARED file that is written back), and nowhere else: a window that is registered
for it loses fault-around there, and each protected page costs an entry in the page
table of each sharer.

So it is applied lazily.  A page that is absent needs no protection: it can only
come by the page server, which protects it in every sharer before it makes it
visible.  `protect` leaves an entry ("marker") where a sharer has not mapped the
page yet, which the kernel honours when it does.

Readers need none of this: their windows are read-only mappings.

A sharer that is attaching has been told what the region is, but has no window yet:
an ioctl may come too early for it.  So it is sent a note first.  It looks for notes
after its window is registered and before it opens it, and if there is one, or the
reply to its ATTACH said so, it asks for everything (READY).  Whichever comes first,
the window or the ioctl, nothing is missed, and in the usual case nobody waits.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from msharefsd.errors import Refused
from msharefsd.linux import uffd
from msharefsd.linux.uffd import Mode
from msharefsd.memory.sparse import AT_ONCE
from msharefsd.region.region import Region, Sharer
from msharefsd.threads.breath import Breath


def _writers(region: Region) -> Iterator[Sharer]:
    return (sharer for sharer in region.sharers.values() if sharer.writable)


# ENOENT: no window there (yet, or any more).  ESRCH: no process.  EINVAL, EBUSY, EPERM: it
# has mapped something else there, or registered it elsewhere.  EAGAIN: it moves its
# window about just now (a donor does that before READY).  All its own affair.
_HARMLESS: Final = frozenset(
    {errno.ENOENT, errno.ESRCH, errno.EINVAL, errno.EBUSY, errno.EPERM, errno.EAGAIN}
)


def _try(call: Callable[[int, int, int], None], sharer: Sharer, start: int, end: int) -> None:
    try:
        call(sharer.uffd, sharer.region.start + start, end - start)
    except OSError as error:
        if error.errno not in _HARMLESS:
            raise


def _tell(sharer: Sharer) -> None:
    if not sharer.ready:
        sharer.note()


def arm(region: Region, start: int, end: int) -> None:
    """Make it possible to protect [start, end); offsets in the region.

    Raises Refused(ENOMEM) when a sharer has no room for another VMA.
    """
    if any(low <= start and end <= high for low, high in region.armed):
        return
    for sharer in _writers(region):
        _tell(sharer)
        _arm(sharer, start, end)
    region.armed.add(start, end)


def _arm(sharer: Sharer, start: int, end: int) -> None:
    try:
        _try(_register, sharer, start, end)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        if not uffd.is_gone(sharer.uffd):
            raise Refused(
                errno.ENOMEM, f"process {sharer.pid} has no room for a VMA: see vm.max_map_count"
            ) from error


def _register(fd: int, start: int, length: int) -> None:
    uffd.register(fd, start, length, Mode.MISSING | Mode.WP)


def protect(region: Region, start: int, end: int, sharers: Iterable[Sharer] | None = None) -> None:
    """Have writes to pages in [start, end) reported, whoever makes them.

    The range must be armed.  `sharers` says where, if not everywhere.
    """
    for sharer in _writers(region) if sharers is None else sharers:
        # One that has been detached has no userfaultfd any more.
        if sharer.number in region.sharers:
            _tell(sharer)
            _try(uffd.write_protect, sharer, start, end)


async def present(region: Region, start: int, end: int) -> list[tuple[int, int]]:
    """The runs of pages in [start, end) that are there, in pieces to be worked on at once."""
    return await region.backing.runs(start, end) if region.backing else []


async def protect_present(region: Region, start: int, end: int) -> None:
    """Protect the pages in [start, end) that are there; the others follow when they come.

    Their object must say already that they are to be protected, because pages come
    and sharers attach meanwhile.
    """
    breath = Breath()
    for first, last in await present(region, start, end):
        for sharer in list(_writers(region)):
            protect(region, first, last, [sharer])
            await breath.take()


async def unprotect(region: Region, start: int, end: int) -> None:
    """Let writes through in every sharer, and wake who waits to write."""
    breath = Breath()
    for low, high in list(region.armed.within(start, end)):
        step = max(AT_ONCE, region.page)
        for first in range(low, high, step):
            last = min(first + step, high)
            for sharer in list(_writers(region)):
                if sharer.number in region.sharers:
                    _try(uffd.write_unprotect, sharer, first, last)
                await breath.take()


def admit(sharer: Sharer) -> None:
    """A sharer's window is mapped and not open yet: protect in it what is protected."""
    region = sharer.region
    sharer.ready = True
    if not sharer.writable or region.backing is None:
        return
    for start, end in region.armed:
        _arm(sharer, start, end)
    for item in region.objects:
        if item.guarded:  # also what is being hidden just now
            for first, last in region.backing.data(item.offset, item.length):
                protect(region, first, last, [sharer])


def wake(region: Region, start: int, end: int) -> None:
    """Let every sharer's threads that wait in [start, end) look again."""
    for sharer in region.sharers.values():
        _try(uffd.wake, sharer, start, end)


def wake_sharer(sharer: Sharer) -> None:
    """Let all threads of a sharer that wait in the region look again."""
    _try(uffd.wake, sharer, 0, sharer.region.size)
