"""Memory that has lost its name under a living daemon, and how it is saved.

A cleaner, logind's RemoveIPC= at a user's last logout, or somebody's rm(1) takes a name out
of /dev/shm.  Sharers notice nothing; but the next pager would find nothing.  The kernel lets
nobody give such a file a name again (linkat(2): ENOENT), so its descriptor goes to the user's
keeper, and the next pager gets it from there.  If the name went while there was no pager,
whoever has the memory attached has it still.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import trio

from msharefsd.life.keeping import Keeper
from msharefsd.memory.names import path
from msharefsd.memory.shm import SHM_DIRECTORY
from msharefsd.memory.sparse import SparseFile
from msharefsd.region.region import Region
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 2.0
_MEMORY: Final = 1 << 63
"""The keys of memory; those of files are smaller."""


def _key(region: Region, *, stash: bool) -> int:
    return _MEMORY | region.id << 1 | stash


class Saver:
    """Looks after names."""

    def __init__(self, keeper: Keeper, kept: dict[int, int]) -> None:
        """`kept`: what the keeper has, of which memory is taken out."""
        self._keeper = keeper
        self._left = {key: kept.pop(key) for key in list(kept) if key & _MEMORY}
        self._saved = set(self._left)
        self._told: set[int] = set()

    def left(self, number: int) -> tuple[int, int]:
        """Descriptors of a region's memory and stash, the caller's then; -1 for none."""
        start = _MEMORY | number << 1
        return self._left.pop(start, -1), self._left.pop(start | 1, -1)

    async def run(self, regions: Callable[[], Iterable[Region]]) -> None:
        """Look every other second, forever."""
        if self._left:
            log.error(
                "%d pieces of memory that lost their names are in no journal: the process that "
                "keeps descriptors has them still",
                len(self._left),
            )
        while True:
            await trio.sleep(LOOK_SECONDS)
            there: set[int] = set(self._left)
            breath = Breath()
            for region in list(regions()):
                there |= await self._look(region)
                await breath.take()
            for key in self._saved - there:
                self._keeper.remove(key)
            self._saved &= there
            self._told &= there

    async def _look(self, region: Region) -> set[int]:
        found: set[int] = set()
        backing = region.backing
        if backing is None:
            return found
        for memory, stash in ((backing, False), (backing.stash, True)):
            key = _key(region, stash=stash)
            found.add(key)
            if memory is not None and memory.nameless and key not in self._saved:
                await self._save(region, memory, key)
        return found

    async def _save(self, region: Region, memory: SparseFile, key: int) -> None:
        name = path(memory.name)
        try:
            await self._keeper.put(key, memory.fd)
        except OSError as error:
            if key not in self._told:
                log.error(
                    "region %s: somebody has removed %s, and nobody can keep it (%s): it is lost "
                    "when msharefsd ends",
                    region.label(),
                    name,
                    error.strerror,
                )
            self._told.add(key)
            return
        self._saved.add(key)
        log.error(
            "region %s: somebody has removed %s (a cleaner, RemoveIPC= of logind.conf(5), rm): "
            "nothing is lost, the process that keeps descriptors has it for the next daemon",
            region.label(),
            name,
        )


def held_by(pids: Iterable[int], name: str) -> int:
    """Memory that has no name any more, as processes have it open or mapped; -1 if none has.

    They decide what their descriptors are, but not who owns a file in /dev/shm.
    """
    gone = f"{path(name)} (deleted)"
    for pid in pids:
        for kind in ("fd", "map_files"):
            for link in _links(f"/proc/{pid}/{kind}"):
                with contextlib.suppress(OSError):
                    if os.readlink(link) == gone and (fd := _opened(link)) >= 0:
                        return fd
    return -1


def _links(directory: str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            yield f"{directory}/{name}"


def _opened(link: str) -> int:
    """A descriptor of ours, if what is there is memory of ours.  Raises OSError."""
    place = os.open(link, os.O_PATH | os.O_CLOEXEC)
    try:
        found = os.fstat(place)
        if (
            stat.S_ISREG(found.st_mode)
            and found.st_uid == os.geteuid()
            and stat.S_IMODE(found.st_mode) == 0o600
            and found.st_nlink == 0
            and found.st_dev == os.stat(SHM_DIRECTORY).st_dev
        ):
            return os.open(f"/proc/self/fd/{place}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(place)
    return -1
