"""Files that are mapped in regions.

The daemon reads and writes a client's file only through the descriptor that the
client passed, so never with more rights than the client had.  A file may hang (a
dead network server, a FUSE daemon that does not answer): whatever touches its data
runs in a thread, and a user has so many threads and no more, so a file that hangs
stalls its own user's files only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import logging
import mmap
import os
import stat
import threading
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import trio

from msharefsd import kernel
from msharefsd.disposal import Disposal
from msharefsd.errors import Refused
from msharefsd.fdstore import FdStore
from msharefsd.limits import Limits
from msharefsd.state import SavedFile, State

log = logging.getLogger(__name__)

BUFFER: Final = 2 << 20
_OTHERWISE: Final = os.O_APPEND | os.O_DIRECT
"""Flags with which pwrite(2) and pread(2) do something else than a mapping does."""
_NOBODY: Final = -1
MOST_BUFFERS: Final = 16

T = TypeVar("T")


class Threads:
    """Runs what may block on a file, with a limit for each user."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._limiters: dict[int, trio.CapacityLimiter] = {}

    async def run(self, uid: int, function: Callable[[], T]) -> T:
        """Run `function` in a thread of that user's."""
        limiter = self._limiters.get(uid)
        if limiter is None:
            idle = [each for each, of in self._limiters.items() if of.borrowed_tokens == 0]
            for each in idle:
                del self._limiters[each]
            limiter = self._limiters[uid] = trio.CapacityLimiter(self._limits.threads(uid))
        return await trio.to_thread.run_sync(function, limiter=limiter, abandon_on_cancel=True)


class Zeros:
    """Zeros to copy from: memory that is never written, and so takes none."""

    def __init__(self) -> None:
        self._length = 0
        self._start = 0

    def address(self, length: int) -> int:
        """Where `length` bytes of zeros are.  Raises OSError (ENOMEM)."""
        if length > self._length:
            flags = kernel.MAP_PRIVATE | kernel.MAP_ANONYMOUS | kernel.MAP_NORESERVE
            start = kernel.mmap(None, length, kernel.PROT_READ, flags, -1, 0)
            # UFFDIO_COPY from pages that are absent takes a second huge page for a moment
            # (hugetlb_mfill_atomic_pte(), mm/hugetlb.c), and there may be one only.
            with contextlib.suppress(OSError):
                kernel.madvise(start, length, kernel.MADV_POPULATE_READ)
            if self._length:
                kernel.munmap(self._start, self._length)
            self._start, self._length = start, length
        return self._start


class Buffer:
    """Memory of the daemon that file contents pass through on their way to UFFDIO_COPY."""

    def __init__(self, size: int) -> None:
        """`size` in bytes."""
        self._memory = mmap.mmap(-1, size)
        self.view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


class Buffers:
    """Buffers in stock, so that a fill needs no new memory."""

    def __init__(self) -> None:
        self._idle: list[Buffer] = []

    def take(self, size: int) -> Buffer:
        """A buffer of at least `size` bytes, with anything in it."""
        if size > BUFFER:
            return Buffer(size)
        return self._idle.pop() if self._idle else Buffer(BUFFER)

    def give_back(self, buffer: Buffer) -> None:
        """Nobody reads it any more."""
        if len(buffer.view) == BUFFER and len(self._idle) < MOST_BUFFERS:
            self._idle.append(buffer)


class MappedFile:
    """A file of a client's, as one mmap() call mapped it.

    Objects that were one mapping share it.  The descriptor is closed when the last
    user lets go.
    """

    def __init__(
        self,
        fd: int,
        uid: int,
        *,
        may_write: bool,
        close: Callable[[int], None],
        key: int = 0,
        identity: kernel.FileIdentity | None = None,
        path: bytes = b"",
    ) -> None:
        """`fd` is taken over; `close` is how to close it (it may hang in close(2)).

        `key` is the file's number, which no other ever has.  `identity` and `path` are
        for a file whose descriptor is lost (`fd` is -1).
        """
        self.key = key
        self.fd = fd
        self.uid = uid
        self.may_write = may_write
        self._close = close
        self._users = 1
        self._plain: int | None = None
        self._opening = threading.Lock()
        self.flushing = trio.Lock()
        """Held while dirty pages go to the file."""
        self.identity = identity or kernel.identify(fd)
        self.path = path or b"?"  # longer than any link can say
        if not path:
            with contextlib.suppress(OSError):
                # readlink asks the dentry cache, not the file system.
                self.path = os.fsencode(os.readlink(f"/proc/self/fd/{fd}"))

    @property
    def in_use(self) -> bool:
        """Whether it has a user; without one it is closed, and nobody may hold it any more."""
        return self._users > 0

    def hold(self) -> None:
        """One more user."""
        self._users += 1

    def let_go(self) -> None:
        """One user less."""
        self._users -= 1
        if self._users == 0:
            self._close(self.fd)
            self.fd = -1
            if self._plain is not None:
                self._close(self._plain)

    def _descriptor(self) -> int:
        """One to read and write with at any offset.

        pwrite(2) to an O_APPEND descriptor appends, and O_DIRECT wants everything
        aligned.  The client may set either at any time (F_SETFL), and they are not
        ours to change.  The same file is opened anew then, with the same access: no
        right that the client's descriptor does not have.  May block.  Raises OSError.
        """
        if self.fd < 0:
            raise OSError(errno.EIO, "its descriptor was lost when a daemon died")
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        if not flags & _OTHERWISE:
            return self.fd
        with self._opening:
            if self._plain is None:
                access = flags & os.O_ACCMODE | os.O_CLOEXEC
                self._plain = os.open(f"/proc/self/fd/{self.fd}", access)
            return self._plain

    def read(self, buffer: memoryview, offset: int, page: int) -> int:
        """Fill `buffer` from the file; what lies beyond its end is zeros.

        Returns how many bytes are before the end, rounded up to pages of `page` bytes:
        the rest has no memory (SIGBUS, mmap(2)).  May block.  Raises OSError.
        """
        done, fd = 0, self._descriptor()
        while done < len(buffer):
            got = os.preadv(fd, [buffer[done:]], offset + done)
            if got == 0:
                break
            done += got
        usable = min(done + -done % page, len(buffer))
        buffer[done:usable] = bytes(usable - done)
        return usable

    def write(self, content: bytes, offset: int) -> None:
        """Write back, but nothing beyond the file's end: a mapping never extends it.

        May block.  Raises OSError.
        """
        fd = self._descriptor()
        left = memoryview(content)[: max(0, os.fstat(fd).st_size - offset)]
        while left:
            done = os.pwrite(fd, left, offset)
            left, offset = left[done:], offset + done

    def sync(self) -> None:
        """fdatasync(2), as msync(2) does.  May block.  Raises OSError."""
        os.fdatasync(self._descriptor())


class Files:
    """Makes mapped files, and closes each everywhere it is kept."""

    def __init__(self, state: State, store: FdStore, disposal: Disposal) -> None:
        self._state = state
        self._store = store
        self._disposal = disposal
        self._keys = itertools.count(state.next_file())

    async def new(self, fd: int, uid: int, *, may_write: bool) -> MappedFile:
        """A file that would survive us.  `fd` is taken over.  Raises Refused."""
        key = next(self._keys)
        file = MappedFile(
            fd, uid, may_write=may_write, close=partial(self._close, key, uid), key=key
        )
        try:
            await self._store.put(key, fd)
        except OSError as error:
            file.let_go()
            raise Refused(
                error.errno or errno.EIO, f"nobody to keep the file: {error.strerror}"
            ) from error
        except BaseException:
            file.let_go()
            raise
        return file

    def restore(self, saved: SavedFile, fd: int) -> MappedFile:
        """A file that another daemon had; `fd` is -1 if its descriptor was lost."""
        path = os.fsdecode(saved.path)
        if fd >= 0:
            found = kernel.identify(fd)
            if (found.major, found.minor, found.inode) != (saved.major, saved.minor, saved.inode):
                log.error("what was kept of %s is another file: not used", path)
                self._disposal.close_fd(fd, saved.uid)
                fd = -1
        else:
            log.error(
                "the descriptor of %s was lost: what is in memory stays, the rest is SIGBUS, and "
                "nothing is written back; map it again",
                path,
            )
        return MappedFile(
            fd,
            saved.uid,
            may_write=bool(saved.may_write),
            close=partial(self._close, saved.key, saved.uid),
            key=saved.key,
            identity=kernel.FileIdentity(saved.major, saved.minor, saved.inode, stat.S_IFREG),
            path=saved.path,
        )

    def drop(self, key: int, fd: int) -> None:
        """A descriptor of no file that is mapped, of nobody knows whom."""
        self._close(key, _NOBODY, fd)

    def _close(self, key: int, uid: int, fd: int) -> None:
        self._state.forget_file(key)
        self._store.remove(key)
        if fd >= 0:
            self._disposal.close_fd(fd, uid)


def check_mappable(fd: int, *, shared: bool, write: bool) -> bool:
    """Raise Refused as mmap(2) would for this descriptor; returns whether it may be written.

    EBADF, EACCES, EPERM as there; ENODEV for anything but a regular file.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise Refused(errno.EBADF, "the descriptor is O_PATH: open the file for reading")
    if flags & os.O_ACCMODE == os.O_WRONLY:
        raise Refused(errno.EACCES, "the file is not open for reading")
    may_write = flags & os.O_ACCMODE == os.O_RDWR
    if shared and write and not may_write:
        raise Refused(errno.EACCES, "a shared writable mapping needs a file opened O_RDWR")
    mode = kernel.identify(fd).mode
    if mode == 0:
        raise Refused(errno.EACCES, "the daemon may not see it: mount that FUSE with allow_other")
    if not stat.S_ISREG(mode):
        raise Refused(errno.ENODEV, "only regular files can be mapped in a region")
    if shared and may_write:
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            seals = 0
        if seals & (fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE):
            if write:
                raise Refused(errno.EPERM, "the memfd is sealed against writing")
            may_write = False
    return may_write


async def check_mapping(threads: Threads, uid: int, fd: int) -> None:
    """Raise Refused(ENODEV) for a file that mmap(2) would not map.

    Files of /proc, /sys and the like are regular files, and some of them judge who
    reads or writes them at that moment: it would be us, not the client that opened
    them.  They cannot be mapped, so it is tried, in a thread of the user's.
    """
    # Who waits for it may be gone before it is done: it needs a descriptor of its own.
    own = os.dup(fd)
    # Whoever takes this closes it: the thread, or who waits if that has not begun.
    closes = threading.Lock()

    def look() -> None:
        if closes.acquire(blocking=False):
            try:
                _try_to_map(own)
            finally:
                os.close(own)

    try:
        await threads.run(uid, look)
    except BaseException:
        if closes.acquire(blocking=False):
            os.close(own)
        raise


def _try_to_map(fd: int) -> None:
    try:
        flags = kernel.MAP_PRIVATE | kernel.MAP_NORESERVE
        at = kernel.mmap(None, kernel.PAGE, kernel.PROT_NONE, flags, fd, 0)
    except OSError as error:
        raise Refused(errno.ENODEV, f"the file cannot be mapped: {error.strerror}") from error
    try:
        kernel.munmap(at, kernel.PAGE)
    except OSError:  # of hugetlbfs: whole huge pages (mmap(2))
        kernel.munmap(at, os.fstat(fd).st_blksize)


_F_SEAL_FUTURE_WRITE: Final = 0x10
