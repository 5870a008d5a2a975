"""A new daemon adopts what one that died has left.

Everything is in the state (state.py), in memory that has names, and in the sharers.  In
two steps: regions with their memory, before anything is mounted; then the sharers, when
faults can be served.  Sharers run all the time: they read and write what is there, and
wait where something is missing.

What is finished here that the dead daemon had begun:

- What is in no object has no memory, and what was to be cleared is.
- A page may be in the backing and in the stash, because it is copied before it is
  punched, either way.  The backing's is the one that counts: going in, both are the
  same, or the stash's is not whole; coming out, the backing's may have been written
  to since.  Where somebody untrusted can read the region the backing's may be a page of
  zeros that this one has made, and other rules hold, by which the stash's counts but for
  what was being copied to it: paging/watch.py has them, and why nothing is lost.
- Objects that must be protected are, once more, in every sharer.  A protection too many
  goes away by itself, at the first write.
- A page that was poisoned for a moment, to fail a system call, comes back.  Poison in
  holes stays, and stays known.
- A fault that was read and not answered is lost with its reader: everybody who waits
  is woken, and faults again.
- A region that was being built is built on, if its donor is there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final

import trio

from msharefsd.barriers import barrier
from msharefsd.control.guards import Guards
from msharefsd.control.orphans import Orphans, is_gone, is_registered, still_there
from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.journal.rows import SavedRegion, SavedSharer
from msharefsd.link.messages import NameRecord
from msharefsd.linux import processes, syscalls, uffd
from msharefsd.memory import names as memory_names
from msharefsd.memory.backing import Backing
from msharefsd.memory.files import MappedFile
from msharefsd.memory.kept import Files
from msharefsd.memory.names import MemoryNames
from msharefsd.paging import protection
from msharefsd.paging.addressspace import AddressSpaces
from msharefsd.paging.background import AGAIN_SECONDS
from msharefsd.paging.lanes import Lanes, Waits
from msharefsd.paging.pages import pages_of
from msharefsd.paging.server import PageServer
from msharefsd.paging.window import window_of
from msharefsd.region.objects import Object
from msharefsd.region.ranges import Ranges
from msharefsd.region.record import region_row, save_objects
from msharefsd.region.region import Region, Sharer, State
from msharefsd.region.registry import Regions
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

OpenBacking = Callable[[int, MemoryNames, int, int, str], Backing]
"""(region's number, names, start, size in bytes, kind): its backing; raises OSError."""

_GONE: Final = frozenset({errno.ESRCH, errno.EBADF, errno.ENOENT})
_FILE_SECONDS: Final = 1.0
"""How long a file may hold up what follows the death of a pager within mmap()."""


# -- regions --


def adopt_regions(
    journal: Journal,
    regions: Regions,
    files: Files,
    kept: dict[int, int],
    names: Iterable[NameRecord],
    open_backing: OpenBacking,
) -> None:
    """Everything but the sharers.

    `kept`: descriptors of files by their keys; `names`: what the front knows of names, and
    is right about.
    """
    known = {record.id: record for record in names}
    by_key = {row.key: files.restore(row, kept.pop(row.key, -1)) for row in journal.files()}
    for key, fd in kept.items():
        files.drop(key, fd)  # its mmap() was not done
    unused = dict(by_key)
    for row in journal.regions():
        region = _adopt_region(journal, row, open_backing)
        if region is None:
            continue
        if region.backing is not None:
            for item in _objects(journal, region, by_key):
                region.objects.insert(item)
                unused.pop(item.file.key if item.file else 0, None)
            region.objects.changed.clear()
            _finish_memory(journal, region)
            if region.stashed and region.backing.stash is None:
                _lose_hidden(journal, region, region.backing)
        regions.adopt(region)
        if row.id in known:
            regions.learn(known[row.id], has_name=known[row.id].linked)
    for file in unused.values():
        file.let_go()
    barrier("recovery.regions")


def _adopt_region(journal: Journal, row: SavedRegion, open_backing: OpenBacking) -> Region | None:
    """A region with its memory; None if it has none any more, or none that can be had now.

    What cannot be opened is left as it is: it may be had another time.
    """
    region = Region(
        row.id,
        row.name,
        row.mode,
        row.uid,
        row.gid,
        linked=bool(row.linked),
        state=State[row.state],
        start=row.start,
        size=row.size,
        read_only=bool(row.read_only),
        creator=row.creator,
        made_file=bool(row.made_file),
        kind=row.kind,
        stashed=bool(row.stashed),
        changes=row.changes,
    )
    if region.state is not State.BUILDING:
        region.settled.set()
    if row.backing_name is None or row.stash_name is None:
        return None
    region.memory = MemoryNames(row.backing_name, row.stash_name)
    try:
        if region.state is State.BUILDING:
            memory_names.remove_unmade(region.memory.backing)
        region.backing = open_backing(row.id, region.memory, row.start, row.size, row.kind)
    except FileNotFoundError as error:
        # A region that was being freed has none, nor one that was not made yet.
        if region.linked and region.state is State.LIVE:
            log.error(
                "region %s: its memory %s is gone (%s): only its name is left",
                region.label(),
                row.backing_name,
                error.strerror,
            )
        memory_names.remove(region.memory)
        journal.forget_region(row.id)
        return None
    except OSError as error:
        log.error(
            "region %s: its memory %s cannot be had (%s): it is left as it is, for a pager to come",
            region.label(),
            row.backing_name,
            error.strerror,
        )
        return None
    return region


def _objects(journal: Journal, region: Region, files: dict[int, MappedFile]) -> Iterable[Object]:
    for row in journal.objects(region.id):
        if row.file is not None and row.file not in files:
            continue  # the region was being freed: its files went first
        yield Object(
            row.offset,
            row.length,
            row.prot,
            bool(row.private),
            None if row.file is None else files[row.file],
            row.file_offset,
        )


def _lose_hidden(journal: Journal, region: Region, memory: Backing) -> None:
    """The stash was removed: whatever it may have had is a hole now, and never zeros.

    Which pages were hidden is not known, but only where nobody may touch anything.
    """
    lost = 0
    for item in [each for each in region.objects if not each.accessible]:
        at = item.offset
        for start, end in [*memory.data(item.offset, item.length), (item.end, item.end)]:
            if start > at:
                region.objects.remove(at, start - at)
                lost += start - at
            at = end
    region.stashed = False
    with contextlib.suppress(Refused):  # on a full disk the next pager finds it out anew
        save_objects(journal, region)
        journal.save_region(region_row(region))
    log.error(
        "region %s: somebody has removed the memory that its hidden pages were in: %d bytes that "
        "are PROT_NONE are a hole now",
        region.label(),
        lost,
    )


def _finish_memory(journal: Journal, region: Region) -> None:
    """Free what is not to be there, as the dead daemon would have."""
    memory = region.backing
    assert memory is not None
    stash = memory.stash
    watched = journal.watched(region.id)
    if stash is not None and not watched:
        for start, end in list(stash.data(0, region.size)):
            for first, last in list(memory.data(start, end - start)):
                stash.punch(first, last - first)
    empty = journal.clearing(region.id)
    if region.state is State.LIVE:  # a donor's copies are in no object yet
        at = 0
        for item in region.objects:
            empty.append((at, item.offset - at))
            at = item.end
        empty.append((at, region.size - at))
    for each in (memory, stash):
        for offset, length in empty:
            for start, end in [] if each is None else list(each.data(offset, length)):
                each.punch(start, end - start)  # type: ignore[union-attr] # not None here


# -- sharers --


async def _adopt_guarded(
    journal: Journal, regions: Regions, guards: Guards, guarded: dict[int, int], lanes: Lanes
) -> list[tuple[Sharer, int | None]]:
    """As _reach_all(); all of them are kept, and what is not theirs is not kept any more."""
    kept = set(guarded)
    adopted = await _reach_all(journal, regions, guards, guarded, lanes)
    for number, fd in guarded.items():
        os.close(fd)
        guards.drop(number)
    for sharer, _ in adopted:
        try:
            if sharer.number not in kept:
                await guards.keep(sharer)
        except Refused as refused:
            log.error("process %d: %s", sharer.pid, refused.message)
    return adopted


class _LostError(Exception):
    """A sharer cannot be reached; the text says why."""


async def adopt_sharers(
    journal: Journal,
    regions: Regions,
    pages: PageServer,
    spaces: AddressSpaces,
    orphans: Orphans,
    guards: Guards,
    guarded: dict[int, int],
) -> None:
    """Take the sharers that live, and put right in them what was left half done.

    `guarded`: what was kept of their userfaultfds, by their numbers.
    """
    for region in regions.alive():
        if region.backing is not None and journal.watched(region.id):
            await _written(partial(pages.watching.adopt, region))
    adopted = await _adopt_guarded(journal, regions, guards, guarded, pages.lanes)
    for sharer, _ in adopted:
        regions.adopt_sharer(sharer)
        pages.poison.marks.restore(window_of(sharer), journal.poisoned(sharer.number))
    barrier("recovery.sharers")
    waits = Waits()
    for region in list(regions.alive()):
        await _put_right(journal, region, pages, spaces, waits)
    barrier("recovery.protected")
    for sharer, pidfd in adopted:
        orphans.add(sharer, pidfd)
        protection.wake_sharer(sharer)
    for region in list(regions.all()):
        if region.state is State.BUILDING and not region.sharers:
            log.info("region %s: its donor is gone", region.label())
            regions.abandon(region)
        else:
            regions.reap(region)
    count = sum(1 for _ in regions.all())
    if count:
        log.info("adopted %d regions and %d sharers", count, len(adopted))


async def _reach_all(
    journal: Journal, regions: Regions, guards: Guards, guarded: dict[int, int], lanes: Lanes
) -> list[tuple[Sharer, int | None]]:
    """The sharers that live, oldest first, and a pidfd of each whose process does.

    Takes out of `guarded` what it has a use for.
    """
    adopted: list[tuple[Sharer, int | None]] = []
    seen: set[tuple[int, int]] = set()
    # The newest first: a number in a process is the last one's that had it.
    for row in reversed(journal.sharers()):
        region = regions.with_id(row.region)
        if region is None:
            guarded.pop(row.number, None)  # nor can it be served, but it stays guarded
            continue  # its memory cannot be had now
        sharer = _sharer(row, region)
        try:
            if region.backing is None:
                raise _LostError("its region has no memory")
            anew = (row.pid, row.userfaultfd) in seen
            pidfd: int | None
            if lanes.needs_one(row.uid):
                waiting = guarded.pop(row.number, -1)
                if waiting >= 0:
                    guards.handed_on(row.number)
                pidfd = await _reach_far(sharer, lanes, waiting, anew=anew)
            else:
                sharer.uffd = guarded.pop(row.number, -1)
                pidfd = _reach(sharer, anew=anew)
        except _LostError as lost:
            log.info("process %d is no sharer of %s any more: %s", row.pid, region.label(), lost)
            journal.forget_sharer(sharer.number)
            if sharer.uffd >= 0:
                guarded[row.number] = sharer.uffd
            else:
                guards.drop(row.number)
            continue
        seen.add((row.pid, row.userfaultfd))
        adopted.append((sharer, pidfd))
    return adopted[::-1]


def _sharer(row: SavedSharer, region: Region) -> Sharer:
    return Sharer(
        row.number,
        region,
        row.pid,
        row.uid,
        bool(row.writable),
        -1,
        since=row.since,
        uffd_number=row.userfaultfd,
        started=row.started,
        done=row.done,
    )


def _reach(sharer: Sharer, *, anew: bool) -> int | None:
    """A pidfd of a sharer's process, if that lives; sees to it that we have its userfaultfd.

    Its address space is what counts: others may have that when the process has ended.
    `anew`: the process has attached again since, and its userfaultfd's number is another's.
    """
    pidfd = _process(sharer)
    try:
        if sharer.uffd < 0 and not anew:
            if pidfd is None:
                raise _LostError("it has ended")
            with _lost(sharer):
                sharer.uffd = _fetch(pidfd, sharer)
        if sharer.uffd < 0 or (anew and not is_registered(sharer)):
            raise _LostError("it has attached anew")
        if is_gone(sharer):
            raise _LostError("it has ended" if pidfd is None else "it executes another program")
        if not still_there(sharer):
            raise _LostError("it has given the region up")
        os.set_blocking(sharer.uffd, False)
    except BaseException:
        if pidfd is not None:
            os.close(pidfd)
        raise
    return pidfd


async def _reach_far(sharer: Sharer, lanes: Lanes, waiting: int, *, anew: bool) -> int | None:
    """The same of a process of another user, whose lane gets its userfaultfd.

    If that is late, it is late.  `waiting`: a socket in which it lies, or -1; taken over.
    Whether its address space is there is found out later (orphans.py).
    """
    pidfd = _process(sharer)
    try:
        if waiting < 0 and (anew or pidfd is None):
            raise _LostError("it has ended" if pidfd is None else "it has attached anew")
        with _lost(sharer):
            far = await lanes.fetch(sharer, partial(_fetch_far, sharer), waiting)
    except BaseException:
        if pidfd is not None:
            os.close(pidfd)
        raise
    window_of(sharer).far, far.sharer = far, sharer
    return pidfd


@contextlib.contextmanager
def _lost(sharer: Sharer) -> Iterator[None]:
    """Its userfaultfd is fetched here."""
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            log.warning(
                "process %d cannot be reached (%s): it waits for ever where it touches what "
                "is not there; pidfd_getfd(2) needs the right to ptrace(2)",
                sharer.pid,
                error.strerror,
            )
        raise _LostError(f"its userfaultfd is not to be had: {error.strerror}") from error


def _process(sharer: Sharer) -> int | None:
    """A pidfd of the process that attached; None if it has ended, or is not to be seen."""
    if sharer.pid == 0 or sharer.started == 0:
        return None
    try:
        pidfd = os.pidfd_open(sharer.pid)
    except OSError:
        return None
    if processes.started(sharer.pid) == sharer.started:
        return pidfd
    os.close(pidfd)  # its number is another's
    return None


def _fetch(pidfd: int, sharer: Sharer) -> int:
    """A sharer's userfaultfd that nobody has kept, from its process.

    The number that the process once told may be anything's by now.  That it is a
    userfaultfd is checked; if it is another one than before, of other memory even, the
    process has got at it by itself and could do with it all that we do.
    """
    fd = syscalls.pidfd_getfd(pidfd, sharer.uffd_number)
    try:
        if not uffd.is_one(fd) or uffd.is_gone(fd):
            raise ProcessLookupError(errno.ESRCH, "it executes another program")
        os.set_blocking(fd, False)
    except OSError:
        os.close(fd)
        raise
    return fd


def _fetch_far(sharer: Sharer) -> int:
    """In a lane, which has its own descriptors."""
    pidfd = os.pidfd_open(sharer.pid)
    try:
        if processes.started(sharer.pid) != sharer.started:
            raise ProcessLookupError(errno.ESRCH, "it has ended")
        return _fetch(pidfd, sharer)
    finally:
        os.close(pidfd)


async def _put_right(
    journal: Journal, region: Region, server: PageServer, spaces: AddressSpaces, waits: Waits
) -> None:
    pages, breath = pages_of(region), Breath()
    # Before anything comes there, and before who has called mmap() learns that it is done.
    mapping = journal.clearing(region.id, mapping=True)
    for offset, length in mapping:
        await server.poison.clear(pages, offset, length, empty=True, waits=waits)
    await _written(partial(journal.cleared, region.id))
    failed = await _protect(region, spaces)
    await protection.settled(pages)
    await server.watching.put_right(region, failed)
    await protection.settled(pages)
    for page in journal.dirty(region.id):
        found = region.objects.find(page)
        if found is not None and found.file is not None and found.written_back:
            pages.dirty.add(page, found.file)
        await breath.take()
    await server.poison.clear(pages, 0, region.size, waits=waits)
    with trio.move_on_after(_FILE_SECONDS):  # who has called mmap() may touch what it mapped
        for offset, length in mapping:
            await server.fills.finished(pages, offset, offset + length)
    for window in list(pages.refused):
        for start, end in list(window.poisoned):
            server.starve(window, start, end)


async def _written(write: Callable[[], object]) -> None:
    """Nothing goes on before that is written down: nobody may write before, nor be served.

    Where there is no room for it (a full disk) it waits for some, as a call does.
    """
    while True:
        try:
            write()
        except Refused as refused:
            if refused.errno != errno.ENOSPC:
                raise
            await trio.sleep(AGAIN_SECONDS)
        else:
            return


async def _protect(region: Region, spaces: AddressSpaces) -> Ranges:
    """What nobody may touch, or write to unnoticed, is so; returns where that cannot be."""
    pages, breath, failed = pages_of(region), Breath(), Ranges()
    for item in list(region.objects):
        try:
            if not item.accessible:
                await spaces.hide(region, item)
            elif item.guarded:
                protection.arm(pages, item.offset, item.end)
                await protection.protect_present(pages, item.offset, item.end)
        except Refused as refused:
            failed.add(item.offset, item.end)
            log.error(
                "region %s: cannot protect %d bytes at %#x: %s",
                region.label(),
                item.length,
                region.start + item.offset,
                refused.message,
            )
        await breath.take()
    return failed
