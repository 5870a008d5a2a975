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

A writer of another user whose address space is locked is *behind* (lanes.py): what would
have to be protected there does not become visible meanwhile, and `settled` waits for it.
So is a process that forks with a window that children inherit: the kernel protects nothing
in it (EAGAIN) before its event has been read and the child is on its way (mmap_changing,
fs/userfaultfd.c).  And so is that child, until it has what its parent was given meanwhile.

A sharer that is attaching has been told what the region is, but has no window yet:
an ioctl may come too early for it.  So it is sent a note first.  It looks for notes
after its window is registered and before it opens it, and if there is one, or the
reply to its ATTACH said so, it asks for everything (READY).  Whichever comes first,
the window or the ioctl, nothing is missed, and in the usual case nobody waits.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, TypeVar

import trio

from msharefsd.errors import Refused
from msharefsd.memory.sparse import AT_ONCE
from msharefsd.paging.lanes import PATIENCE
from msharefsd.paging.pages import Pages
from msharefsd.paging.watch import is_plain
from msharefsd.paging.window import Window, window_of
from msharefsd.region.objects import Object
from msharefsd.region.region import Region, Sharer
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.02
"""How often one looks whether a fork has come to its end (seconds)."""

# ENOENT: no window there (yet, or any more).  ESRCH: no process.  EINVAL, EBUSY, EPERM: it
# has mapped something else there, or registered it elsewhere.  EAGAIN: it moves its window
# about, or forks; what is left protected costs a fault (and what is to be: Window.protect()).
# All its own affair.
_HARMLESS: Final = frozenset(
    {errno.ENOENT, errno.ESRCH, errno.EINVAL, errno.EBUSY, errno.EPERM, errno.EAGAIN}
)


def attempt(call: Callable[[int, int], T], start: int, end: int) -> T | None:
    """Make an ioctl on a sharer's range; what is wrong with it there is its own affair."""
    try:
        return call(start, end)
    except OSError as error:
        if error.errno not in _HARMLESS:
            raise
    return None


def _is_behind(pages: Pages, window: Window) -> None:
    """What others rely on is on its way to that window."""
    if window in pages.behind:
        return
    pages.behind.add(window)
    if window.far is not None:
        window.far.then(partial(_is_level, pages, window))
    else:
        window.caught_up = trio.Event()
        trio.lowlevel.spawn_system_task(_catch_up, pages, window)


async def _catch_up(pages: Pages, window: Window) -> None:
    """Protect in a process that forks what was to be, when its event has been read."""
    until, pause = trio.current_time() + PATIENCE, _FIRST_PAUSE
    try:
        while (window.missed or window.coming) and window.attached:
            if not _is_awaited(window):
                until = trio.current_time() + PATIENCE
            elif trio.current_time() > until:
                log.warning(
                    "region %s: process %d does nothing but fork: it may write to what is "
                    "read-only",
                    pages.region.label(),
                    window.sharer.pid,
                )
                return
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            missed, window.missed = window.missed, []
            for start, end in missed:
                attempt(window.protect, start, end)
    except OSError as error:
        log.error("region %s: process %d: %s", pages.region.label(), window.sharer.pid, error)
    finally:
        window.missed = []
        window.caught_up.set()
        _is_level(pages, window)


def is_coming(pages: Pages, window: Window) -> None:
    """A child has a window as its parent's was, and is not admitted yet."""
    if pages.armed and window.writable:
        window.coming = True
        _is_behind(pages, window)


def _is_level(pages: Pages, window: Window) -> None:
    pages.behind.discard(window)
    if pages.held_behind and not pages.behind:
        pages.held_behind = False
        wake(pages.region, 0, pages.region.size)


def _is_awaited(window: Window) -> bool:
    """Whether it can catch up: in recovery nobody reads yet that a process has forked."""
    return window.far is not None or window.served or window.coming


async def settled(pages: Pages) -> None:
    """Wait until every window is protected and registered as it is to be.

    Not for ever: a process that holds that up is given up.
    """
    while window := next(filter(_is_awaited, pages.behind), None):
        if window.far is not None:
            await window.far.level()
        else:
            await window.caught_up.wait()


def tell(window: Window) -> None:
    """Have a sharer that may not have its window yet ask when it has."""
    if not window.ready:
        window.sharer.note()


def arm(pages: Pages, start: int, end: int, *, anew: bool = False) -> None:
    """Make it possible to protect [start, end); offsets in the region.

    In a region that is watched also to look at what is there before it comes into a
    window.  `anew`: that it is, is new.

    Raises Refused(ENOMEM) when a sharer has no room for another VMA.
    """
    if pages.armed.covers(start, end) and not anew:
        return
    for window in pages.writers():
        tell(window)
        _arm(pages, window, start, end)
    pages.armed.add(start, end)


def arm_for(pages: Pages, new: Object) -> None:
    """Arm what an object that is about to be there, or to be changed to that, needs."""
    if (new.guarded and new.accessible) or (pages.looked_at and not is_plain(new)):
        arm(pages, new.offset, new.end)


def _arm(pages: Pages, window: Window, start: int, end: int) -> None:
    def register(first: int, last: int) -> bool:
        return window.register(first, last, pages.modes)

    try:
        if attempt(register, start, end) is False:
            _is_behind(pages, window)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        if not window.is_gone():
            raise Refused(
                errno.ENOMEM,
                f"process {window.sharer.pid} has no room for a VMA: see vm.max_map_count",
            ) from error


async def disarm(pages: Pages, start: int, end: int) -> None:
    """In a region that is watched: [start, end) is plain memory now, and none is stashed.

    Otherwise each sharer would go on to ask for every chunk of it that others have, and
    have no huge pages there.  The kernel takes no mode away but by taking all, so for an
    instant nothing is registered; zeros are right there, whoever makes them.  Who does not
    have it done in time goes on to ask.
    """
    breath = Breath()
    for low, high in list(pages.armed.within(start, end)):
        for window in list(pages.writers()):
            if window.sharer.number in pages.region.sharers:
                # ENOMEM, too, which says here that the process has ended or that it has no
                # room for another VMA: nothing depends on it.
                with contextlib.suppress(OSError):
                    window.register_plain(low, high)
            await breath.take()
        pages.armed.remove(low, high)


def protect(pages: Pages, start: int, end: int, windows: Iterable[Window] | None = None) -> None:
    """Have writes to pages in [start, end) reported, whoever makes them.

    The range must be armed.  `windows` says where, if not everywhere.
    """
    for window in pages.writers() if windows is None else windows:
        # One that has been detached has no userfaultfd any more.
        if window.sharer.number in pages.region.sharers:
            tell(window)
            if attempt(window.protect, start, end) is False:
                _is_behind(pages, window)


async def present(region: Region, start: int, end: int) -> list[tuple[int, int]]:
    """The runs of pages in [start, end) that are there, in pieces to be worked on at once."""
    return await region.backing.runs(start, end) if region.backing else []


async def protect_present(pages: Pages, start: int, end: int) -> None:
    """Protect the pages in [start, end) that are there; the others follow when they come.

    Their object must say already that they are to be protected, because pages come
    and sharers attach meanwhile.
    """
    breath = Breath()
    for first, last in await present(pages.region, start, end):
        for window in list(pages.writers()):
            protect(pages, first, last, [window])
            await breath.take()
        await settled(pages)


async def unprotect(pages: Pages, start: int, end: int) -> None:
    """Let writes through in every sharer, and wake who waits to write."""
    breath = Breath()
    for low, high in list(pages.armed.within(start, end)):
        step = max(AT_ONCE, pages.region.page)
        for first in range(low, high, step):
            last = min(first + step, high)
            for window in list(pages.writers()):
                if window.sharer.number in pages.region.sharers:
                    attempt(window.unprotect, first, last)
                await breath.take()


async def admit(pages: Pages, sharer: Sharer) -> None:
    """A sharer's window is mapped and not open yet: protect in it what is protected.

    Once: who is ready takes part in whatever comes, and asks for nothing new.

    This pauses, and others go on meanwhile.  Nothing is missed nevertheless:
    - Its threads touch nothing before they have the answer.
    - From `ready` on, arm() and protect() come to this window as to all; the windows
      are gone through without a pause.  So what is armed after the list is made is
      armed here too, by who does that.
    - What was armed before is armed here by the first loop.  An ioctl of others' that
      comes before that finds no registration, and does nothing here.
    - The pages that this one should have protected are there by then, and an object
      says that they are to be: the second loop, which begins later, comes to them.
    - An object that comes or changes behind that loop is protected by whoever
      changes it, as are pages that come, and everything is armed here by then.
    What is protected although it need not be any more goes away at the first write.
    """
    window = window_of(sharer)
    if window.ready:
        return
    window.ready = True
    try:
        if sharer.writable:
            await _admit(pages, window)
    finally:
        window.coming = False


async def _admit(pages: Pages, window: Window) -> None:
    region = pages.region
    breath = Breath()
    for start, end in list(pages.armed):
        if not window.attached:
            return
        _arm(pages, window, start, end)
        await breath.take()
        await window.level()
    at = 0
    while window.attached and (item := region.objects.first(at, region.size)) is not None:
        at = item.end
        await breath.take()
        if not item.guarded:  # also what is being hidden just now
            continue
        for first, last in await present(region, item.offset, item.end):
            protect(pages, first, last, [window])
            await breath.take()
            await window.level()


def wake(region: Region, start: int, end: int) -> None:
    """Let every sharer's threads that wait in [start, end) look again."""
    for sharer in region.sharers.values():
        attempt(window_of(sharer).wake, start, end)


def wake_sharer(sharer: Sharer) -> None:
    """Let all threads of a sharer that wait in the region look again."""
    attempt(window_of(sharer).wake, 0, sharer.region.size)
