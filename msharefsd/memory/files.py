"""Files that are mapped in regions.

The daemon reads and writes a client's file only through the descriptor that the
client passed, so never with more rights than the client had.  A file may hang (a
dead network server, a FUSE daemon that does not answer): whatever touches its data
runs in a thread, and a user has so many threads and no more, so a file that hangs
stalls its own user's files only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import trio

from msharefsd.errors import Refused
from msharefsd.linux import syscalls
from msharefsd.memory.shm import MARK, SHM_DIRECTORY
from msharefsd.telemetry.labels import label
from msharefsd.threads.pool import Threads

T = TypeVar("T")

_OTHERWISE: Final = os.O_APPEND | os.O_DIRECT
"""Flags with which pwrite(2) and pread(2) do something else than a mapping does."""
_F_SEAL_FUTURE_WRITE: Final = 0x10


_GONE: Final = frozenset({errno.ENOTCONN, errno.ESTALE, errno.ENODEV})
"""What a file says whose file system has ended: a FUSE server, an NFS server's export, a
disk.  A mount of the same name later is another one."""


class MappedFile:
    """A file of a client's, as one mmap() call mapped it.

    Objects that were one mapping share it.  The descriptor is closed when the last
    user lets go.
    """

    takes_writes = True
    """Whether what is written to a shared mapping goes to it."""

    def __init__(
        self,
        fd: int,
        uid: int,
        *,
        may_write: bool,
        close: Callable[[int], None],
        key: int = 0,
        identity: syscalls.FileIdentity | None = None,
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
        self._gone = False
        """Its file system was."""
        self._opening = threading.Lock()
        self.flushing = trio.Lock()
        """Held while dirty pages go to the file."""
        self.identity = identity or syscalls.identify(fd)
        self.size = syscalls.known_size(fd) if fd >= 0 else -1
        """How long it was when it came (bytes); -1 if that is not known."""
        self.path = path or b"?"  # longer than any link can say
        if not path:
            with contextlib.suppress(OSError):
                # readlink asks the dentry cache, not the file system.
                self.path = os.fsencode(os.readlink(f"/proc/self/fd/{fd}"))

    def label(self) -> str:
        """Its path for logs: a file's name may hold anything."""
        return label(self.path)

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

    @property
    def lost(self) -> bool:
        """Whether nobody will ever write to it by this any more."""
        return self.fd < 0 or self._gone

    def _descriptor(self, otherwise: int = _OTHERWISE) -> int:
        """One to read and write with at any offset, without those flags.

        pwrite(2) to an O_APPEND descriptor appends, and O_DIRECT wants everything
        aligned.  The client may set either at any time (F_SETFL), and they are not
        ours to change.  The same file is opened anew then, with the same access: no
        right that the client's descriptor does not have.  May block.  Raises OSError.
        """
        if self.fd < 0:
            raise OSError(errno.EIO, "its descriptor was lost when a daemon died")
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        if not flags & otherwise:
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
        # (O_APPEND keeps nobody from reading, and of some files it cannot be left out.)
        return read(self._descriptor(os.O_DIRECT), buffer, offset, page)

    def write(self, content: bytes, offset: int) -> None:
        """Write back, but nothing beyond the file's end: a mapping never extends it.

        May block.  Raises OSError.
        """
        fd = self._descriptor()
        try:
            left = memoryview(content)
            # Looked at before each write, and nothing in between: there is none that leaves
            # the size as it is, and a file that is truncated in this moment is long again.
            while left := left[: max(0, os.fstat(fd).st_size - offset)]:
                done = os.pwrite(fd, left, offset)
                left, offset = left[done:], offset + done
        except OSError as error:
            self._gone = error.errno in _GONE
            raise

    def sync(self) -> None:
        """fdatasync(2), as msync(2) does.  May block.  Raises OSError."""
        os.fdatasync(self._descriptor())


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
    if _is_memory_of_ours(fd):
        raise Refused(errno.ENODEV, "a region's own memory cannot be mapped in a region")
    mode = syscalls.identify(fd).mode
    if mode == 0:
        raise Refused(errno.EACCES, "the daemon may not see it: mount that FUSE with allow_other")
    if not stat.S_ISREG(mode):
        raise Refused(errno.ENODEV, "only regular files can be mapped in a region")
    if shared and may_write and _is_sealed(fd):
        if write:
            raise Refused(errno.EPERM, "the memfd is sealed against writing")
        may_write = False
    return may_write


def check_memory(fd: int) -> None:
    """Raise Refused(EINVAL) unless it is a memfd, or a file of tmpfs or hugetlbfs.

    Only those have seals (memfd_get_seals(), mm/memfd.c).  To read one asks no server.
    """
    check_mappable(fd, shared=False, write=False)
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise Refused(errno.EINVAL, "what is brought comes in a memfd") from error


def _is_sealed(fd: int) -> bool:
    """Whether a file is a memfd that nobody may write any more."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return bool(seals & (fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE))


def _is_memory_of_ours(fd: int) -> bool:
    """Whether a file has a name that memory of a region has, of any user's or daemon's."""
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")  # asks the dentry cache
    except OSError:
        return False
    return path.startswith(f"{SHM_DIRECTORY}/{MARK}")


def read(fd: int, buffer: memoryview, offset: int, page: int) -> int:
    """As MappedFile.read, from a descriptor at any offset."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            break
        done += got
    usable = min(done + -done % page, len(buffer))
    buffer[done:usable] = bytes(usable - done)
    return usable


async def apart(
    threads: Threads, uid: int, fd: int, function: Callable[[int], T], close: Callable[[int], None]
) -> T:
    """Call `function` with a duplicate of `fd`, in a thread of the user's.  `close` may hang.

    Who waits for it may be gone before it is done: it needs a descriptor of its own.
    """
    own = os.dup(fd)
    # Whoever takes this closes it: the thread, or who waits if that has not begun.
    closes = threading.Lock()

    def call() -> T:
        if not closes.acquire(blocking=False):
            raise OSError(errno.ECANCELED, "nobody waits for it")
        try:
            return function(own)
        finally:
            os.close(own)

    try:
        return await threads.run(uid, call)
    except BaseException:
        if closes.acquire(blocking=False):
            close(own)
        raise


async def check_mapping(
    threads: Threads, uid: int, fd: int, close: Callable[[int], None], *, written: bool
) -> None:
    """Raise Refused for a file that mmap(2) would not map, or we could not write back.

    `written`: what is written to the mapping is for the file.  `close` may hang.  ENODEV, and
    EACCES for a file that can only be appended to.

    Files of /proc, /sys and the like are regular files, and some of them judge who
    reads or writes them at that moment: it would be us, not the client that opened
    them.  They cannot be mapped, so it is tried, in a thread of the user's.
    """
    await apart(threads, uid, fd, partial(_check_mapping, written=written), close)


def _check_mapping(fd: int, *, written: bool) -> None:
    try:
        is_huge = _try_to_map(fd, syscalls.MAP_PRIVATE)
    except OSError as error:
        raise Refused(errno.ENODEV, f"the file cannot be mapped: {error.strerror}") from error
    if not written:
        return
    if is_huge:  # it has no write(2); to try that might ask a file's server
        raise Refused(
            errno.ENODEV, "the file cannot be written to but by mapping it: map it MAP_PRIVATE"
        )
    try:
        _try_to_map(fd, syscalls.MAP_SHARED)
    except OSError as error:
        if error.errno == errno.EACCES:  # IS_APPEND in do_mmap(), mm/mmap.c
            raise Refused(
                error.errno, "the file can only be appended to: map it MAP_PRIVATE"
            ) from error


def _try_to_map(fd: int, how: int) -> bool:
    """Whether it is of hugetlbfs.  Raises OSError."""
    flags = how | syscalls.MAP_NORESERVE
    at = syscalls.mmap(None, syscalls.PAGE, syscalls.PROT_NONE, flags, fd, 0)
    try:
        syscalls.munmap(at, syscalls.PAGE)
    except OSError:  # whole huge pages (mmap(2))
        syscalls.munmap(at, os.fstat(fd).st_blksize)
        return True
    return False
