"""userfaultfd(2): the ioctls a page server needs, and the one errno policy for them.

Nothing in the standard library or on the package index wraps userfaultfd, so
this module does: plain ``fcntl.ioctl`` on packed structs.  Numbers and layouts
are those of ``include/uapi/linux/userfaultfd.h``; the header installed on a
build machine may be older than the running kernel, so they are written down
here instead of being generated from it.

A userfaultfd always acts on the address space of the process that *made* it,
whoever holds the descriptor.  So the daemon can resolve faults in a sharer
through the descriptor that the sharer sent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntFlag
from typing import Final, NamedTuple

from msharefsd.linux import syscalls

API: Final = 0xAA

# _IOWR(0xAA, nr, size); UNREGISTER and WAKE are _IOR by historical accident.
UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_UNREGISTER: Final = 0x8010AA01
UFFDIO_WAKE: Final = 0x8010AA02
UFFDIO_COPY: Final = 0xC028AA03
UFFDIO_ZEROPAGE: Final = 0xC020AA04
UFFDIO_WRITEPROTECT: Final = 0xC018AA06
UFFDIO_CONTINUE: Final = 0xC020AA07
UFFDIO_POISON: Final = 0xC020AA08
USERFAULTFD_IOC_NEW: Final = 0xAA00

DEVICE: Final = "/dev/userfaultfd"
LINK: Final = "anon_inode:[userfaultfd]"
"""What /proc/PID/fd shows for one."""
USER_MODE_ONLY: Final = 1


class Feature(IntFlag):
    """Feature bits of UFFDIO_API."""

    WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14


class Mode(IntFlag):
    """Registration modes of UFFDIO_REGISTER."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


_EVENT_PAGEFAULT: Final = 0x12
_EVENT_FORK: Final = 0x13
_FAULT_WRITE: Final = 1 << 0
_FAULT_WP: Final = 1 << 1
_FAULT_MINOR: Final = 1 << 2

# struct uffd_msg: event, 7 reserved bytes, then for a page fault flags,
# address and the thread id (valid with Feature.THREAD_ID), 4 bytes of padding.
_MESSAGE: Final = struct.Struct("=B7xQQI4x")
MESSAGE_BYTES: Final = _MESSAGE.size

_API: Final = struct.Struct("=QQQ")
_RANGE: Final = struct.Struct("=QQ")
_REGISTER: Final = struct.Struct("=QQQQ")
_ZEROPAGE: Final = struct.Struct("=QQQq")
_COPY: Final = struct.Struct("=QQQQq")
_PROTECT: Final = struct.Struct("=QQQ")
_PROTECT_ON: Final = 1
_PROTECT_DONTWAKE: Final = 2
_COPY_WP: Final = 2
_CONTINUE_WP: Final = 2


class Fault(NamedTuple):
    """One page fault that waits for the page server."""

    address: int
    """The faulting address in the sharer; its page's, on kernels that tell no more."""
    write: bool
    protected: bool
    """A write to a page that is write-protected (Mode.WP)."""
    minor: bool
    """The page is present; it only has to be mapped (Mode.MINOR)."""
    thread: int
    """The faulting thread's id in its own pid namespace, for SIGBUS by tgkill."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """A child has what its parent has registered, and the parent's fork() waited for us."""

    uffd: int
    """The child's userfaultfd, a new descriptor of ours."""


class Outcome(Enum):
    """What an operation on a sharer's memory came to."""

    DONE = "done"
    PRESENT = "present"
    """A page is there already: wake the faulting thread, it will find it."""
    RETRY = "retry"
    """The address space was changing under us, or the range is no window any
    more: wake the thread, it faults again if it still has reason to."""
    GONE = "gone"
    """The sharer's address space no longer exists."""
    NO_MEMORY = "no memory"
    """tmpfs is full, or a memory limit was hit."""
    LATE = "late"
    """The sharer's address space is locked: it may come to an end, or was not begun."""
    STRANGE = "strange"
    """Nothing that a window of ours gives: its process has made something else of it."""


# One place decides what an errno of a fill means.  ENOENT: no registered VMA
# covers the range (unmapped meanwhile, or about to be registered).  EAGAIN: an
# mmap change in progress.  ESRCH: the mm is gone.  shmem reports a full tmpfs as
# ENOMEM, hugetlb an empty pool as ENOMEM, a size limit as ENOSPC; EFAULT is what a
# failed memory-cgroup charge becomes on some paths.  Without descriptors there is no
# host mapping.
_OUTCOMES: Final = {
    errno.EEXIST: Outcome.PRESENT,
    errno.ENOENT: Outcome.RETRY,
    errno.EAGAIN: Outcome.RETRY,
    errno.ESRCH: Outcome.GONE,
    errno.ENOMEM: Outcome.NO_MEMORY,
    errno.ENOSPC: Outcome.NO_MEMORY,
    errno.EFAULT: Outcome.NO_MEMORY,
    errno.EMFILE: Outcome.NO_MEMORY,
    errno.ENFILE: Outcome.NO_MEMORY,
}


def outcome_of(error: OSError) -> Outcome:
    """The meaning of a failed fill."""
    return _OUTCOMES.get(error.errno or 0, Outcome.STRANGE)


def check_kind(fd: int) -> None:
    """Raise OSError(ENOTTY) unless `fd` is a userfaultfd.

    To be asked before any ioctl on a client's descriptor: an ioctl is a request to
    whatever device or FUSE server is behind it, which may never answer.  The name of an
    anonymous inode is the kernel's own: no file can have it, theirs begin with a slash.
    """
    if os.readlink(f"/proc/thread-self/fd/{fd}") != LINK:
        raise OSError(errno.ENOTTY, "not a userfaultfd")


def handshake(fd: int, features: Feature) -> Feature:
    """UFFDIO_API on a fresh userfaultfd; returns the features of the kernel.

    It can be done once per descriptor.  Raises OSError: EINVAL when the
    features are not all there or the handshake was made before, ENOTTY when the
    descriptor is no userfaultfd.
    """
    answer = fcntl.ioctl(fd, UFFDIO_API, _API.pack(API, int(features), 0))
    return Feature(_API.unpack(answer)[1])


def open_new() -> int:
    """A userfaultfd for this process that takes kernel-mode faults too.

    Raises OSError (EPERM, EACCES, ENOENT) when this process may not have one.
    """
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(device)


def open_by_system_call(flags: int) -> int:
    """userfaultfd(2) with `flags` (0 or USER_MODE_ONLY) for this process.

    Raises OSError: EPERM without the right (vm.unprivileged_userfaultfd), ENOSYS.
    """
    return syscalls.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | flags)


def open_own() -> int:
    """A userfaultfd for this process, whatever kind it may have.

    Raises OSError (EPERM, ENOSYS).
    """
    try:
        return open_new()
    except OSError:
        return open_by_system_call(USER_MODE_ONLY)


def register(fd: int, start: int, length: int, mode: Mode) -> None:
    """UFFDIO_REGISTER of `length` bytes at `start`."""
    fcntl.ioctl(fd, UFFDIO_REGISTER, _REGISTER.pack(start, length, int(mode), 0))


def unregister(fd: int, start: int, length: int) -> None:
    """UFFDIO_UNREGISTER of `length` bytes at `start`."""
    fcntl.ioctl(fd, UFFDIO_UNREGISTER, _RANGE.pack(start, length))


PATIENCE_SECONDS: Final = 0.02


class Reader:
    """Reads userfaultfds that others have too, and never waits.

    O_NONBLOCK does not see to that: it belongs to the open file, so the process that
    made the userfaultfd can take it away, and can read the event for which we were
    told to come.  RWF_NOWAIT is the single call's (preadv2(2); userfaultfd knows it
    since Linux 6.10, but not of one that came with a child).  Without it a timer's signal
    gets us out of a read that waits.
    """

    _reading = -1

    def __init__(self, *, nowait: bool, may_wait: bool = False) -> None:
        """`nowait`: whether this kernel has RWF_NOWAIT.  In the main thread.

        `may_wait`: it is for a thread that may wait.
        """
        self.nowait = nowait
        """Whether reading costs one system call, and no timer."""
        self._may_wait = may_wait
        if not may_wait:
            signal.signal(signal.SIGALRM, self._too_long)

    def _too_long(self, *_: object) -> None:
        # The read is made again when the handler is left (PEP 475).
        if self._reading >= 0:
            os.set_blocking(self._reading, False)

    def _read(self, fd: int, size: int) -> bytes:
        if self.nowait:
            data = bytearray(size)
            try:
                return bytes(data[: os.preadv(fd, [data], -1, os.RWF_NOWAIT)])
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
        if self._may_wait:
            os.set_blocking(fd, False)
            return os.read(fd, size)
        self._reading = fd
        os.set_blocking(fd, False)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS, PATIENCE_SECONDS)
        try:
            return os.read(fd, size)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._reading = -1

    def faults(self, fd: int, most: int = 16) -> list[Fault | Inherited]:
        """The faults that wait now, and children that were made; none when there is none.

        Raises OSError if the descriptor cannot be read (no handshake, say).
        """
        try:
            return list(_faults(self._read(fd, most * MESSAGE_BYTES)))
        except BlockingIOError:
            return []


def can_read_without_waiting(fd: int) -> bool:
    """Whether RWF_NOWAIT works on a userfaultfd that has no events."""
    try:
        os.preadv(fd, [bytearray(MESSAGE_BYTES)], -1, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return True


def _faults(data: bytes) -> Iterator[Fault | Inherited]:
    for event, flags, address, thread in _MESSAGE.iter_unpack(data):
        if event == _EVENT_PAGEFAULT:
            yield Fault(
                address,
                bool(flags & _FAULT_WRITE),
                bool(flags & _FAULT_WP),
                bool(flags & _FAULT_MINOR),
                thread,
            )
        elif event == _EVENT_FORK:
            # The descriptor that comes with it has the place of the flags.
            yield Inherited(flags & 0xFFFFFFFF)


def wake(fd: int, start: int, length: int) -> None:
    """Let every thread that waits for a page in the range look again."""
    # ESRCH: the address space is gone, and with it whoever waited.
    with contextlib.suppress(ProcessLookupError):
        fcntl.ioctl(fd, UFFDIO_WAKE, _RANGE.pack(start, length))


def zeropage(fd: int, start: int, length: int) -> tuple[int, Outcome]:
    """Populate absent pages of a writable window with zeros, and map them there.

    Stops at the first page that cannot be populated.  Returns the bytes done
    and the outcome of the first page that was not (DONE when all were).  Threads
    waiting in the part that was done are woken by the kernel.
    """
    request = bytearray(_ZEROPAGE.pack(start, length, 0, 0))
    return _fill(fd, UFFDIO_ZEROPAGE, request, _ZEROPAGE.size - 8, length)


def poison(fd: int, start: int, length: int) -> tuple[int, Outcome]:
    """Make absent pages raise SIGBUS (EFAULT in a system call); Linux 6.6 and later."""
    request = bytearray(_ZEROPAGE.pack(start, length, 0, 0))
    return _fill(fd, UFFDIO_POISON, request, _ZEROPAGE.size - 8, length)


def copy(
    fd: int, start: int, source: int, length: int, *, protect: bool = False
) -> tuple[int, Outcome]:
    """Populate absent pages with the bytes at address `source` of this process.

    A page becomes visible to anybody only when it is filled; with `protect` it is
    mapped write-protected.  Returns as `zeropage` does.
    """
    request = bytearray(_COPY.pack(start, source, length, _COPY_WP if protect else 0, 0))
    return _fill(fd, UFFDIO_COPY, request, _COPY.size - 8, length)


def map_present(fd: int, start: int, length: int, *, protect: bool = False) -> tuple[int, Outcome]:
    """UFFDIO_CONTINUE: map pages that the backing already has (Mode.MINOR)."""
    request = bytearray(_ZEROPAGE.pack(start, length, _CONTINUE_WP if protect else 0, 0))
    return _fill(fd, UFFDIO_CONTINUE, request, _ZEROPAGE.size - 8, length)


def write_protect(fd: int, start: int, length: int) -> None:
    """Have writes to the range reported (Mode.WP), to pages yet to come as well.

    Raises OSError: ENOENT where the window is not registered for it.
    """
    fcntl.ioctl(fd, UFFDIO_WRITEPROTECT, _PROTECT.pack(start, length, _PROTECT_ON))


def write_unprotect(fd: int, start: int, length: int, *, wake: bool = True) -> None:
    """Let writes through again, and by default wake who waits to write."""
    mode = 0 if wake else _PROTECT_DONTWAKE
    fcntl.ioctl(fd, UFFDIO_WRITEPROTECT, _PROTECT.pack(start, length, mode))


def is_one(fd: int) -> bool:
    """Whether a descriptor is a userfaultfd."""
    return os.readlink(f"/proc/thread-self/fd/{fd}") == LINK


def is_gone(fd: int) -> bool:
    """Whether the address space behind a userfaultfd no longer exists.

    UFFDIO_REGISTER says ENOMEM for that, as for other things; filling says ESRCH.
    """
    nowhere = (1 << 47) - 16 * syscalls.PAGE  # never registered
    return zeropage(fd, nowhere, syscalls.PAGE)[1] is Outcome.GONE


class Guard(Enum):
    """What a userfaultfd's address space has at some address."""

    GONE = "there is no such address space any more"
    NOTHING = "no window that is registered"
    WINDOW = "a window that is registered"


def guard_at(fd: int, address: int, page: int) -> Guard:
    """Whether there is a registered window at `address`, of pages of that size (bytes).

    Nothing comes of the question: a page is to be copied from where nothing can be
    (vm.mmap_min_addr), and mfill_atomic() looks at the window first.
    """
    try:
        fcntl.ioctl(fd, UFFDIO_COPY, _COPY.pack(address, page, page, 0, 0))
    except ProcessLookupError:
        return Guard.GONE
    except FileNotFoundError:
        return Guard.NOTHING
    except OSError:
        pass
    return Guard.WINDOW


def _fill(
    fd: int, number: int, request: bytearray, result_at: int, length: int
) -> tuple[int, Outcome]:
    # The last field of each of these requests is the result: the bytes done, or
    # a negative errno that the ioctl has returned as well.  After a partial fill
    # the ioctl says EAGAIN and the field has what was done.
    try:
        fcntl.ioctl(fd, number, request)
    except OSError as error:
        (done,) = struct.unpack_from("=q", request, result_at)
        if done > 0:
            return done, Outcome.RETRY
        return 0, outcome_of(error)
    return length, Outcome.DONE
