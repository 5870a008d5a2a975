"""A front's names and a pager's regions, put together without a process between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from msharefsd.link.messages import Emptied, Gone, Unlink
from msharefsd.memory.names import MemoryNames
from msharefsd.mount.names import Name, Names
from msharefsd.region.limits import Limits
from msharefsd.region.region import Region, Sharer
from msharefsd.region.registry import Regions, is_last


class Both(Regions):
    """Regions whose names are at hand."""

    def __init__(
        self,
        alignment: int,
        make_backing: Callable[[int, int, int, str], Any],
        release: Callable[[Region], None] = Region.close_memory,
        limits: Limits | None = None,
        names_limits: Limits | None = None,
    ) -> None:
        """`make_backing(region id, start, size, kind)` as in the tests' own words."""
        self.names = Names(alignment, names_limits)
        self._established = 0

        def name_memory(_: str) -> MemoryNames:
            return MemoryNames(f"/test-{self._established}", f"/test-{self._established}-stash")

        def make(_: MemoryNames, start: int, size: int, kind: str) -> Any:
            return make_backing(self._established, start, size, kind)

        super().__init__(alignment, name_memory, make, release, limits, tell=self._hear)
        self.names.changed = lambda name: self.changed(name.record())

    def _hear(self, message: Emptied | Gone | Unlink) -> None:
        match message:
            case Emptied():
                self.names.emptied(message.id)
            case Gone():
                self.names.gone(message.id)
            case Unlink():
                name = self.names.with_id(message.id)
                if name is not None:
                    self.names.unlink(name)

    def close(self) -> None:
        """Remove everything, as a purge does."""
        for region in list(self.all()):
            self.remove(region)

    def __iter__(self) -> Iterator[Name]:
        return iter(self.names)

    def create(self, name: bytes, mode: int, uid: int, gid: int, *, creator: int = 0) -> Region:
        """open(O_CREAT), and a first connection."""
        return self.learn(self.names.create(name, mode, uid, gid, creator=creator).record())

    def find(self, name: bytes) -> Region | None:
        found = self.names.find(name)
        return None if found is None else self.with_id(found.id)

    def give(self, region: Region, uid: int) -> None:
        """chown(2)."""
        name = self.names.with_id(region.id)
        if name is None:  # nothing is left of it
            region.uid = uid
        else:
            self.names.change(name, uid=uid)

    def unlink(self, region: Region) -> None:
        """unlink(2)."""
        name = self.names.with_id(region.id)
        assert name is not None
        self.names.unlink(name)

    def make(
        self,
        region: Region,
        start: int,
        size: int,
        *,
        kind: str = "shm",
        read_only: bool = False,
        made_file: bool = False,
    ) -> None:
        """Give it a range and memory, and tell the front."""
        self._established = region.id
        self.establish(region, start, size, kind=kind, read_only=read_only, made_file=made_file)
        name = self.names.with_id(region.id)
        if name is not None:  # as Names.established() does
            name.start, name.size = start, size

    def detach_and_unlink(self, sharer: Sharer) -> None:
        """What a connection does (control/sharing.py)."""
        region = sharer.region
        if region.linked and sharer.uid in (0, region.uid) and is_last(sharer):
            self.unlink(region)
            self.unlinked(region)
        self.detach(sharer)
