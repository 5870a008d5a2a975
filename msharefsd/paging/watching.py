"""Regions of which somebody untrusted can read are watched: see watch.py for what that is.

Untrusted is who may only read and is neither root nor the region's owner.  Before the
first such sharer has a descriptor of the memory the region is watched, and from then on
as long as it lives: the descriptor may be anywhere.

What a reader makes counts for the owner until it is taken out.  So when a user has more
memory than there may be, what does not belong there is looked for, and taken out.  In
plain memory it cannot be told from what a writer has touched.
"""

from __future__ import annotations

import errno
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.linux.features import Capabilities
from msharefsd.linux.uffd import Mode
from msharefsd.memory.sparse import AT_ONCE
from msharefsd.paging import protection
from msharefsd.paging.background import Background
from msharefsd.paging.pages import Pages, pages_of
from msharefsd.paging.watch import Watch, is_plain
from msharefsd.paging.window import Window, window_of
from msharefsd.region.limits import Account
from msharefsd.region.ranges import Ranges
from msharefsd.region.region import Region, Sharer
from msharefsd.telemetry.metrics import Metrics
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath
from msharefsd.threads.pool import Threads

log = logging.getLogger(__name__)

PIECE: Final = 2 << 20
"""How much is looked through without a pause (bytes)."""
INTERVAL: Final = 1.0
"""How often it is seen whether anybody has too much, when nothing happens."""
SHORTEST: Final = 0.05
"""And how often at the most, when there are faults."""
SHARE_OF_LOOKING: Final = 0.05
PAUSE: Final = 0.2
"""How long nothing is looked for after nothing was found."""
LATE_PAUSE: Final = 0.01
PATIENCE: Final = 5.0
"""How long a reader's window may take to be registered, until it is left as it is."""


def is_untrusted(region: Region, uid: int, *, writable: bool) -> bool:
    """Whether who attaches so may read, and is not to change what others see."""
    return not writable and uid not in (0, region.uid)


@dataclass(eq=False, slots=True)
class _Sweep:
    """What does not belong in a user's regions is being taken out."""

    waiting: list[tuple[Window, int]] = field(default_factory=list)


class Watching:
    """Watches regions."""

    def __init__(
        self,
        capabilities: Capabilities,
        journal: Journal,
        metrics: Metrics,
        threads: Threads,
        background: Background,
        region_memory: int | None,
    ) -> None:
        """`region_memory`: the most bytes a region may hold, or None."""
        self._capabilities = capabilities
        self._journal = journal
        self._metrics = metrics
        self._threads = threads
        self._background = background
        self._region_memory = region_memory
        self._watched: set[Region] = set()
        self._sweeps: dict[int, _Sweep] = {}
        self._quiet: dict[int, float] = {}
        self._seldom = Seldom()

    # -- beginning --

    async def begin(self, region: Region) -> None:
        """Somebody untrusted is about to have the descriptor.

        Until this returns nobody has it: what is there now belongs there.

        Raises Refused(ENOMEM) if a writer has no room for another VMA; ENOSPC.
        """
        # Without both it cannot be told apart: docs/security.md.
        able = self._capabilities.map_present and self._capabilities.write_protect
        if not able or pages_of(region).watch is not None:
            return
        async with region.change:
            pages = pages_of(region)
            if pages.watch is not None or region.backing is None:
                return
            pages.modes = Mode.MISSING | Mode.MINOR | Mode.WP
            await _arm_all(pages)
            await protection.settled(pages)
            if region.backing is None:
                return
            watch = pages.watch = self._new(region)
            try:
                await _take_down(pages, watch)
                await self._register_readers(region)
                if region.backing is None:
                    raise Refused(errno.ENOENT, "the region is gone")
                # Nothing awaits between the two.
                self._journal.watch(region.id, watch.put)
                watch.judging = True
            except BaseException:
                pages.watch = None
                raise
            self._watched.add(region)

    def _new(self, region: Region) -> Watch:
        return Watch(region, self._journal, partial(self._count, region))

    def _count(self, region: Region, pages: int) -> None:
        self._metrics.intruded.inc(pages)
        if self._seldom.now(region.id):
            log.warning(
                "region %s: somebody who may only read it makes pages in its memory, of zeros, "
                "where none belong; they are taken out (intruded_pages in .metrics)",
                region.label(),
            )

    async def _register_readers(self, region: Region) -> None:
        for sharer in list(region.sharers.values()):
            if not sharer.writable:
                window = window_of(sharer)
                protection.tell(window)
                await self._register(window)

    async def admit(self, sharer: Sharer) -> None:
        """A reader's window is mapped and not open yet."""
        window = window_of(sharer)
        if not window.ready:
            window.ready = True
            if pages_of(sharer.region).looked_at:
                await self._register(window)
                with trio.move_on_after(PATIENCE):
                    while window.is_late:  # nobody else has to wait for that
                        await trio.sleep(LATE_PAUSE)

    async def _register(self, window: Window) -> None:
        """Have everything looked at that comes into a reader's window.

        The whole, so it is done once.  That takes its time, so it is done in a thread.
        """
        if window.attached and window.far is not None:
            with suppress(OSError):
                window.register(0, window.size, Mode.MISSING | Mode.MINOR)
        elif window.attached:
            start = partial(window.register, 0, window.size, Mode.MISSING | Mode.MINOR)
            with trio.move_on_after(PATIENCE), suppress(OSError):
                await self._threads.run(window.sharer.uid, start)

    # -- the next pager --

    def adopt(self, region: Region) -> None:
        """Another pager watched it: decide which pages are right."""
        pages = pages_of(region)
        pages.modes = Mode.MISSING | Mode.MINOR | Mode.WP
        pages.watch = self._new(region)
        pages.watch.recover()
        self._watched.add(region)

    async def put_right(self, region: Region, failed: Ranges) -> None:
        """The sharers of such a region are there, and what is to be hidden is hidden.

        But for what `failed`: its pages are where they were, and belong there.
        """
        pages = pages_of(region)
        if pages.watch is not None:
            await _arm_all(pages)
            await self._register_readers(region)
            pages.watch.hiding = failed

    # -- limits --

    async def run(self) -> None:
        """Look once in a while whether anybody has too much; forever."""
        while True:
            await trio.sleep(INTERVAL)
            for region in list(self._watched):
                if region.backing is None:
                    self._watched.discard(region)
                else:
                    self.notice(region)

    def notice(self, region: Region) -> None:
        """Somebody touches something there: see whether there is too much."""
        watch = pages_of(region).watch
        since = time.monotonic()
        if watch is None or since < watch.look_again:
            return
        over = region.account.is_over() or (
            self._region_memory is not None and region.allocated() > self._region_memory
        )
        now = time.monotonic()
        watch.look_again = now + max(SHORTEST, (now - since) / SHARE_OF_LOOKING)
        if over:
            self._sweep(region.account)

    def relieve(self, window: Window, offset: int) -> bool:
        """There is no memory for a page: whether there may be some in a moment.

        If so whoever waits for the page is woken then.
        """
        account = window.region.account
        if pages_of(window.region).watch is None:
            return False
        sweep = self._sweep(account)
        if sweep is None:
            return False
        sweep.waiting.append((window, offset))
        return True

    def _sweep(self, account: Account) -> _Sweep | None:
        """Have everything taken out that does not belong in the user's regions.

        None if nothing was found a moment ago.
        """
        sweep = self._sweeps.get(account.uid)
        if sweep is None and time.monotonic() >= self._quiet.get(account.uid, 0.0):
            sweep = self._sweeps[account.uid] = _Sweep()
            self._background.start(self._run_sweep, account, sweep)
        return sweep

    async def _run_sweep(self, account: Account, sweep: _Sweep) -> None:
        found = False
        since = time.monotonic()
        try:
            for region in list(self._watched):
                if region.account is account:
                    found = await _look_through(region) or found
        finally:
            took = time.monotonic() - since
            del self._sweeps[account.uid]
            # Who makes pages all the time has it done all the time, but for the pauses.
            self._quiet[account.uid] = time.monotonic() + max(PAUSE, 2 * took) * (not found)
            account.freed()
            for window, offset in sweep.waiting:
                if window.attached:
                    protection.attempt(window.wake, offset, offset + window.region.page)


async def _arm_all(pages: Pages) -> None:
    """Register everything that is not plain memory, or was not, for `modes`."""
    region, breath = pages.region, Breath()
    ranges, at = Ranges(), 0
    for start, end in pages.armed:
        ranges.add(start, end)
    # What was hidden and may be touched again comes back from the stash one by one.
    stash = region.backing.stash if region.backing is not None else None
    for start, end in list(stash.data(0, region.size)) if stash is not None else ():
        ranges.add(start, end)
        await breath.take()
    while (item := region.objects.first(at, region.size)) is not None:
        ranges.add(at, item.offset)
        if not is_plain(item):
            ranges.add(item.offset, item.end)
        at = item.end
        await breath.take()
    ranges.add(at, region.size)
    for start, end in list(ranges):
        protection.arm(pages, start, end, anew=True)
        await breath.take()


async def _take_down(pages: Pages, watch: Watch) -> None:
    """What is there now, in objects of files, has been put."""
    region, breath, at = pages.region, Breath(), 0
    while (item := region.objects.first(at, region.size)) is not None:
        at = item.end
        if item.file is not None:
            for start, end in await protection.present(region, item.offset, item.end):
                watch.add(start, end)
                await breath.take()
        await breath.take()
    backing = region.backing
    stash = backing.stash if backing is not None else None
    # A move that had failed in the middle may have left copies there.
    for start, end in list(stash.data(0, region.size)) if stash is not None else ():
        for first, last in list(backing.data(start, end - start)) if backing is not None else ():
            if stash is not None:
                stash.punch(first, last - first)
        await breath.take()


async def _look_through(region: Region) -> bool:
    """Take out of a region what does not belong there; whether there was anything."""
    backing, breath, found = region.backing, Breath(), False
    if backing is None:
        return False
    runs = (
        await backing.runs(0, region.size)
        if backing.charges_sharer
        else [(at, min(at + AT_ONCE, region.size)) for at in range(0, region.size, AT_ONCE)]
    )
    for start, end in runs:
        for at in range(start, end, PIECE):
            async with region.change:
                if region.backing is None:
                    return found
                watch = pages_of(region).watch
                if watch is not None:
                    found = watch.clean(at, min(at + PIECE, end)) or found
            await breath.take()
    return found
