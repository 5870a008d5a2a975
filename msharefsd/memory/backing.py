"""What holds a region's pages.

A backing has a name, so it outlives the daemon, and mode 0600, so nobody gets a
descriptor of it but through the control socket.  Its descriptor is the capability
to attach: a child after fork shows it to prove that its parent was a sharer.

Here is what all backings have in common; shm.py and hugetlb.py have one each.
"""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Final

import trio

from msharefsd.barriers import barrier
from msharefsd.linux import syscalls
from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.memory.host import HostMapping
from msharefsd.memory.names import MemoryNames, remove_unmade
from msharefsd.memory.shm import ShmObject
from msharefsd.memory.sparse import AT_ONCE, SparseFile, data_of, punch_fd
from msharefsd.threads.disposal import Disposal

Left = tuple[int, int]
"""Descriptors of memory and stash that have lost their names; -1 for those that have not."""
NOT_LEFT: Final[Left] = (-1, -1)
LOOKED_AT: Final = 8 << 20
"""In how much memory every second page may be there, and it is looked at at once (bytes)."""


class Backing(SparseFile):
    """A region's memory: what sharers map, the host mapping, the stash."""

    kind: ClassVar[str]
    """Its name in settings and texts."""
    charges_sharer: ClassVar[bool]
    """Whether memory is charged to the process that a page is populated through."""
    largest_chunk: int = HUGE_PAGE
    """How much is populated for one fault at the most (bytes)."""
    smallest_chunk: int = 64 << 10
    """And for a fault at a random place."""

    def __init__(
        self,
        names: MemoryNames,
        size: int,
        fd: int,
        disposal: Disposal,
        *,
        adopt: bool = False,
        left: int = -1,
    ) -> None:
        """`fd` is taken over; `disposal` is who closes what takes its time to close.

        With `adopt` the backing is another daemon's, and may have a stash; `left` is that
        one's descriptor, if it has lost its name.
        """
        super().__init__(names.backing, size, fd)
        self._stash_name = names.stash
        self._disposal = disposal
        self.growth: Callable[[int], None] = lambda _: None
        """Told how many bytes have been populated."""
        self.stashing: Callable[[], None] = lambda: None
        """Called before anything is in the stash, so that it is known to be missed."""
        self._host: HostMapping | None = None
        self._stash: ShmObject | None = None
        self.identity = syscalls.identify(fd)
        # Descriptions of their own for the sharers: they may seek and set flags.
        self._writable = self._open(os.O_RDWR)
        self._readable = self._open(os.O_RDONLY)
        if adopt:
            remove_unmade(self._stash_name)
            with contextlib.suppress(FileNotFoundError):
                self._stash = ShmObject(self._stash_name, size, adopt=True, left=left)

    @abc.abstractmethod
    def _open(self, access: int) -> int:
        """A new open file description by its name."""

    @abc.abstractmethod
    def _map_host(self) -> HostMapping:
        """Map all of it.  Raises OSError."""

    def shared_slot(self, offset: int) -> tuple[int, int] | None:  # noqa: ARG002 - not here
        """The range around `offset` that has one page table in all writers and the host.

        None if there is none.  Where something is armed the writers have left it.
        """
        return None

    def believes_present(self, offset: int) -> bool:  # noqa: ARG002 - EEXIST is plain here
        """Whether EEXIST for the page at `offset` means that it is there."""
        return True

    def check_room(self, size: int) -> None:  # noqa: ARG002 - nobody knows
        """Raise Refused(ENOMEM) if it is known that `size` bytes more cannot be had."""
        return

    def descriptor(self, *, writable: bool) -> int:
        """The descriptor to send to a sharer; it stays the backing's."""
        return self._writable if writable else self._readable

    def allocated(self) -> int:
        """Bytes of memory that the region holds."""
        return super().allocated() + (self._stash.allocated() if self._stash else 0)

    @property
    def host(self) -> HostMapping:
        """Made when it is first needed: 512 GiB are one 256th of the address space.

        Raises OSError (ENOMEM).
        """
        if self._host is None:
            self._host = self._map_host()
        return self._host

    @property
    def mapped_at(self) -> int | None:
        """Where the host mapping is, if it has been made."""
        return self._host.start if self._host else None

    @property
    def stash(self) -> ShmObject | None:
        """Where pages are that must exist and that nobody may touch, if there are any.

        It has a name as the backing has, because the daemon's death must not lose
        them.
        """
        return self._stash

    def is_stashed(self, page: int) -> bool:
        """Whether the page at offset `page` is in the stash."""
        return self._stash is not None and self._stash.next_data(page) == page

    def holds(self, page: int) -> bool:
        """Whether there is a page at offset `page`, here or in the stash."""
        return self.next_data(page) == page or self.is_stashed(page)

    def read(self, offset: int, length: int) -> bytes:
        """The contents of whole pages, wherever each is; what is in the stash is right.

        Raises OSError.
        """
        content = os.pread(self.fd, length, offset)
        if self._stash is None or self._stash.next_data(offset) >= offset + length:
            return content
        pages = bytearray(content)
        for at in range(offset, offset + len(content), self.page):
            if self.is_stashed(at):
                there = slice(at - offset, at - offset + self.page)
                pages[there] = os.pread(self._stash.fd, self.page, at)
        return bytes(pages)

    def stash_pages(self, offset: int, length: int) -> None:
        """Move the pages of a range that are there to the stash.

        They must not be written meanwhile.  Copied first, then punched: at every
        moment each page is in one place or in both.

        Raises OSError: ENOSPC, ENOMEM.
        """
        self.copy_to_stash(self.data(offset, length))
        self.punch(offset, length)

    def copy_to_stash(self, runs: Iterable[tuple[int, int]]) -> None:
        """Have pages in the stash as well.  Raises as stash_pages()."""
        if self._stash is None:
            stash = ShmObject(self._stash_name, self.size)
            try:
                self.stashing()
            except BaseException:
                stash.close(self._disposal)
                raise
            self._stash = stash
        for start, end in runs:
            at = start
            while at < end:
                content = os.pread(self.fd, min(end - at, HUGE_PAGE), at)
                if not content:
                    break  # truncated by a sharer
                at += os.pwrite(self._stash.fd, content, at)
        barrier("backing.stashed")

    def look(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As `data`, and finds also what came without our doing."""
        return self.data(start, end - start)

    def overwrite(self, offset: int, content: bytes) -> bool:
        """Give pages that are there other contents in place; False where that cannot be.

        Raises OSError.
        """
        return os.pwrite(self.fd, content, offset) == len(content)

    async def runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """As `data`, and other things go on meanwhile; in pieces of at most AT_ONCE."""
        if end - start <= LOOKED_AT:
            return list(self.data(start, end - start))
        # Looking for the end of gigabytes of pages takes a while.
        fd = os.dup(self.fd)
        try:
            return await trio.to_thread.run_sync(lambda: self._in_pieces(data_of(fd, start, end)))
        finally:
            os.close(fd)

    def _in_pieces(self, runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        step = max(AT_ONCE, self.page)
        return [
            (at, min(at + step, last)) for first, last in runs for at in range(first, last, step)
        ]

    async def discard(self, offset: int, length: int) -> None:
        """The contents of the range are gone, wherever they were.

        Freeing gigabytes takes a while: that is done in a thread.
        """
        memories = [self.fd] + ([self._stash.fd] if self._stash else [])
        if length <= AT_ONCE:
            for fd in memories:
                punch_fd(fd, offset, length)
            return
        mine = [os.dup(fd) for fd in memories]  # the region may go meanwhile
        try:
            for fd in mine:
                await trio.to_thread.run_sync(punch_fd, fd, offset, length)
        finally:
            for fd in mine:
                self._disposal.close_fd(fd)

    def release(self) -> None:
        """Remove the names now, and free the memory soon."""
        if self._host is not None:
            self._disposal.run(self._host.close)
            self._host = None
        if self._stash is not None:
            self._stash.close(self._disposal)
            self._stash = None
        for fd in (self._writable, self._readable):
            os.close(fd)
        self.close(self._disposal)
