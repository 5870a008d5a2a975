"""The `hugetlb` backing: huge pages, and page tables that are really shared.

Linux gives hugetlb mappings of a file one page table between them: the table of a
1 GiB slot (a page of PMD entries) is shared by all mappings that have the slot as a
whole, MAP_SHARED and with equal VMA flags (want_pmd_share(), page_table_shareable(),
mm/hugetlb.c).  The windows of sharers that write are such mappings, and so is the
host mapping, which has the same flags: MADV_DONTFORK, MAP_NORESERVE, registered with
a userfaultfd in MISSING mode.  It keeps the tables alive with nobody attached.

So every page is populated through the host mapping, and then it is in every writer's
page table at once.  UFFDIO_COPY does that for contents of any kind, zeros too: whole
or not at all, in place of a poison marker, and as fast as fallocate(2) and a touch.
Who pays is not a question here: the pages come from a pool that the administrator
has set aside (vm.nr_hugepages), and memory cgroups do not count them.

What ends sharing, for the 1 GiB slots that it touches and no others:
  - write protection (PROT_READ, PROT_NONE, writable MAP_SHARED files): the windows
    are registered for it there, and WP-registered VMAs never share;
  - a window that does not have the slot as a whole: a region of less than 1 GiB;
and for one sharer: a window that is read-only (MAP_PRIVATE).

hugetlbfs has no SEEK_DATA.  Whether a page is there is asked of the host mapping's
page table, by mincore(2) for ranges and by MADV_POPULATE_READ for one page, which
fails where a page is absent instead of making one, because of the userfaultfd.

mremap(2) must never be used on such windows: moving a populated one deadlocks in the
kernel, which then holds a lock that everybody needs who uses the file
(move_hugetlb_page_tables() has i_mmap_rwsem for writing when huge_pmd_share() wants
it for reading; seen on Linux 6.18).  The library refuses to move windows, but a
program can make the system call by itself, and would take the region, and the thread
that serves it, with it.  That is one of the reasons why not everybody may have
regions of this kind: see `may_use`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import trio

from msharefsd.errors import Refused
from msharefsd.linux import hugepages, mounts, syscalls
from msharefsd.linux.uffd import Feature
from msharefsd.memory.backing import NOT_LEFT, Backing, Left
from msharefsd.memory.host import HostMapping
from msharefsd.memory.names import MemoryNames
from msharefsd.memory.sparse import check_left, open_left
from msharefsd.threads.disposal import Disposal

log = logging.getLogger(__name__)

MiB: Final = 1 << 20
SLOT: Final = 1 << 30
"""What one page of PMD entries maps, with 4 KiB base pages."""
LARGEST_CHUNK: Final = 4 * MiB
"""Making more of it at one time is milliseconds in which nobody else is served."""
_SCANNED: Final = 1 << 30
_TRIES: Final = 8
_SHM_GROUP: Final = Path("/proc/sys/vm/hugetlb_shm_group")


class Pool:
    """Huge pages of one size, and the private hugetlbfs that backings have their names in."""

    def __init__(self, directory: Path, page: int) -> None:
        """`directory` is mounted on when `mount` is called; `page` is in bytes."""
        self.directory = directory
        self.page = page
        self._files = hugepages.SYSFS / f"hugepages-{page >> 10}kB"
        self._shares: bool | None = None

    def mount(self) -> None:
        """Mount hugetlbfs, if it is not mounted already by a daemon before.

        Raises OSError: EBUSY when that has left memory in pages of another size.
        """
        target = str(self.directory)
        self.directory.mkdir(mode=0o700, exist_ok=True)
        mounted = mounts.top_mount(target)
        here = mounted is not None and mounted.fstype == "hugetlbfs"
        if here and os.statvfs(target).f_bsize != self.page:
            if os.listdir(target):
                raise OSError(errno.EBUSY, "there are regions with huge pages of another size")
            syscalls.umount(target, syscalls.MNT_DETACH)
            here = False
        if not here:
            flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
            options = f"pagesize={self.page >> 10}K,mode=0700"
            syscalls.mount("msharefs", target, "hugetlbfs", flags, options)

    def empty(self) -> bool:
        """Whether no region has its memory there."""
        with contextlib.suppress(OSError):
            return not os.listdir(self.directory)
        return True

    def unmount(self) -> None:
        """Take it down; who has memory of it mapped keeps that.  Never raises."""
        with contextlib.suppress(OSError):
            syscalls.umount(str(self.directory), syscalls.MNT_DETACH)
            self.directory.rmdir()

    def _read(self, name: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int((self._files / name).read_text())
        return 0

    def total(self) -> int:
        """How many pages there are or may be, taken or not."""
        most = self._read("nr_overcommit_hugepages") - self._read("surplus_hugepages")
        return self._read("nr_hugepages") + max(most, 0)

    def free(self) -> int:
        """How many pages can be had."""
        taken = self._read("nr_hugepages") - self._read("free_hugepages")
        return self.total() - taken - self._read("resv_hugepages")

    def command(self, more: int = 1) -> str:
        """What an administrator types to have `more` pages beside those that are taken."""
        wanted = self._read("nr_hugepages") + max(more - self.free(), 0)
        if self.page == 2 * MiB:
            return f"sysctl vm.nr_hugepages={wanted}"
        return f"echo {wanted} > {self._files}/nr_hugepages"

    def check(self, size: int) -> None:
        """Raise Refused(ENOMEM) unless there are free pages for `size` bytes."""
        needed = -(-size // self.page)
        if needed > self.free():
            raise Refused(
                errno.ENOMEM,
                f"{needed} huge pages of {self.page >> 10} kB are needed, {self.free()} are free: "
                f"{self.command(needed)}",
            )

    def shares(self) -> bool:
        """Whether this kernel shares page tables of such pages; tried, not derived.

        Not known, and so taken for false, as long as no two pages are free.
        """
        if self._shares is None and self.page < SLOT and self.free() >= 2:
            with contextlib.suppress(OSError):
                self._shares = self._try_sharing()
                log.info("page tables of huge pages are %sshared", "" if self._shares else "not ")
        return bool(self._shares)

    def _try_sharing(self) -> bool:
        path = self.directory / "probe"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.unlink(path)
            os.ftruncate(fd, SLOT)
            with contextlib.ExitStack() as stack:
                places = [stack.enter_context(_mapped_slot(fd)) for _ in range(2)]
                # The second is linked to the first's table by its first touch; what
                # comes into that afterwards it has without one.
                for place in places:
                    syscalls.madvise(place, self.page, syscalls.MADV_POPULATE_READ)
                syscalls.madvise(places[0] + self.page, self.page, syscalls.MADV_POPULATE_READ)
                vector = (ctypes.c_ubyte * (self.page // syscalls.PAGE))()
                syscalls.mincore(places[1] + self.page, self.page, vector)
                return bool(vector[0] & 1)
        finally:
            os.close(fd)


def may_use(uid: int, groups: Collection[int]) -> None:
    """Raise Refused(EPERM) for who may not have huge pages.

    The kernel's own rule for SysV shared memory (proc_sys_vm(5)): root, and the
    group that vm.hugetlb_shm_group names.  The pool is limited, and see above.
    """
    if uid in (0, os.geteuid()):
        return
    with contextlib.suppress(OSError, ValueError):
        if int(_SHM_GROUP.read_text()) in groups:
            return
    raise Refused(errno.EPERM, "huge pages are for root and the group of vm.hugetlb_shm_group")


@contextlib.contextmanager
def _mapped_slot(fd: int) -> Iterator[int]:
    address = aligned_hole(SLOT, SLOT)
    prot = syscalls.PROT_READ | syscalls.PROT_WRITE
    flags = syscalls.MAP_SHARED | syscalls.MAP_NORESERVE | syscalls.MAP_FIXED_NOREPLACE
    syscalls.mmap(address, SLOT, prot, flags, fd, 0)
    try:
        yield address
    finally:
        syscalls.munmap(address, SLOT)


def aligned_hole(size: int, alignment: int) -> int:
    """Where `size` bytes of this address space are free, at a multiple of `alignment`.

    Raises OSError (ENOMEM).
    """
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE
    hole = syscalls.mmap(None, size + alignment, syscalls.PROT_NONE, flags, -1, 0)
    syscalls.munmap(hole, size + alignment)
    return hole + -hole % alignment


class HugetlbBacking(Backing):
    """Huge pages of a pool."""

    kind = "hugetlb"
    charges_sharer = False

    def __init__(
        self,
        pool: Pool,
        names: MemoryNames,
        start: int,
        size: int,
        disposal: Disposal,
        *,
        adopt: bool = False,
        left: Left = NOT_LEFT,
    ) -> None:
        """Create it, without a page, for a region at `start`; or adopt it.

        Its name lies in the pool's directory.

        Raises Refused: EINVAL for a size that is not whole pages; ENOMEM when the
        pool has no page to give, or for want of address space; EMFILE and the like.
        """
        if size % pool.page:
            raise Refused(errno.EINVAL, f"not a multiple of the huge page, {pool.page} bytes")
        if not adopt:
            pool.check(pool.page)
        self.page = pool.page
        self.smallest_chunk = pool.page
        self.largest_chunk = max(LARGEST_CHUNK, pool.page)
        self.pool = pool
        self._start = start
        self._vector = (ctypes.c_ubyte * (_SCANNED // syscalls.PAGE))()
        path = names.backing
        if adopt:
            fd = open_left(path, size) if left[0] < 0 else check_left(left[0], path, size)
            super().__init__(names, size, fd, disposal, adopt=True, left=left[1])
            self._map_all()
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
            try:
                os.ftruncate(fd, size)
                super().__init__(names, size, fd, disposal)
                _ = self.host
            except BaseException:
                os.close(fd)
                os.unlink(path)
                raise
        except OSError as error:
            raise Refused(
                error.errno or errno.ENOMEM, f"cannot create {path}: {error.strerror}"
            ) from error

    def _open(self, access: int) -> int:
        return self.reopen(self.name, access)

    def _unlink(self) -> None:
        os.unlink(self.name)

    def _map_host(self) -> HostMapping:
        # At the windows' place within a slot, or nothing is shared.
        place = self._start % SLOT
        for _ in range(_TRIES):
            hole = aligned_hole(place + self.size, max(SLOT, self.page))
            # Another thread may have been faster.
            with contextlib.suppress(FileExistsError):
                return HostMapping(self, Feature.MISSING_HUGETLBFS, hole + place)
        raise OSError(errno.ENOMEM, "no room for a host mapping")

    def shared_slot(self, offset: int) -> tuple[int, int] | None:
        """The range around `offset` that has one page table in all writers and the host."""
        slot = offset - (self._start + offset) % SLOT
        whole = slot >= 0 and slot + SLOT <= self.size
        return (slot, slot + SLOT) if self.page < SLOT and whole and self.pool.shares() else None

    def believes_present(self, offset: int) -> bool:
        """Whether EEXIST for the page at `offset` means that it is there.

        UFFDIO_COPY says the same when the pool is empty (hugetlb_mfill_atomic_pte(),
        mm/hugetlb.c).
        """
        return self.is_present(offset)

    def check_room(self, size: int) -> None:
        """Raise Refused(ENOMEM) if it is known that `size` bytes more cannot be had."""
        self.pool.check(size)

    def _map_all(self) -> None:
        """Have every page that is there in the new host mapping: see `is_present`."""
        left = os.fstat(self.fd).st_blocks * 512
        for offset in range(0, self.size, self.page):
            if left <= 0:
                break
            if self.is_present(offset):
                left -= self.page

    # -- which pages are there --

    def is_present(self, offset: int) -> bool:
        """Whether the page at `offset` is there; it is in the host mapping then."""
        offset -= offset % self.page
        try:
            syscalls.madvise(self.host.start + offset, self.page, syscalls.MADV_POPULATE_READ)
        except OSError:
            return False
        return True

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The runs of pages in the range that are there: (start, end), bytes."""
        end, run = offset + length, -1
        offset -= offset % self.page
        step = self.page // syscalls.PAGE
        while offset < end:
            part = min(_SCANNED, end + -end % self.page - offset)
            syscalls.mincore(self.host.start + offset, part, self._vector)
            found = bytes(self._vector)[: part // syscalls.PAGE : step]
            for place, byte in enumerate(found):
                at = offset + place * self.page
                if byte & 1 and run < 0:
                    run = at
                elif not byte & 1 and run >= 0:
                    yield run, at
                    run = -1
            offset += part
        if run >= 0:
            yield run, offset

    def next_data(self, offset: int) -> int:
        """The first byte at or after `offset` whose page is there, or `size`."""
        if self.is_present(offset):
            return offset
        for start, _ in self.data(offset, self.size - offset):
            return max(start, offset)
        return self.size

    def next_absent(self, offset: int) -> int:
        """The first byte at or after `offset` whose page is absent."""
        while offset < self.size and self.is_present(offset):
            offset += self.page - offset % self.page
        return offset

    def look(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As `data`, and finds also what is not in the host mapping yet."""
        for at in range(start, end, self.page):
            if self.is_present(at):
                yield at, at + self.page

    def overwrite(self, offset: int, content: bytes) -> bool:  # noqa: ARG002 - hugetlbfs has no write(2)
        """Not here."""
        return False

    async def runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """As `data`, and other things go on meanwhile."""
        found: list[tuple[int, int]] = []
        for at in range(start, end, _SCANNED):
            if self._host is None:
                break  # the region is gone
            found += self.data(at, min(_SCANNED, end - at))
            await trio.lowlevel.checkpoint()
        return self._in_pieces(found)
