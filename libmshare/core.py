"""The C core, called as it is.

There is one client implementation, libmshare.so.  This module declares its
functions; ctypes releases the interpreter lock around each call.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import mmap
import os
from pathlib import Path
from typing import Final, NamedTuple

from libmshare import errors

PACKAGE: Final = Path(__file__).resolve().parent
LIBRARY: Final = "libmshare.so.0"


def library_directory() -> Path | None:
    """Where the wheel has its libraries; None if the system has them."""
    directory = PACKAGE / "lib"
    return directory if (directory / LIBRARY).exists() else None


def _load() -> ctypes.CDLL:
    directory = library_directory()
    path = LIBRARY if directory is None else str(directory / LIBRARY)
    try:
        return ctypes.CDLL(path, use_errno=True)
    except OSError:
        # To take the installed library from here would mix two versions.
        if directory is not None or not (PACKAGE / "meson.build").exists():
            raise
        raise ImportError(
            f"{PACKAGE} is source code and hides the installed package: `make setup` installs it, "
            "and PYTHONSAFEPATH=1, python -P or another working directory finds it"
        ) from None


class _Info(ctypes.Structure):
    _fields_ = (("start", ctypes.c_ulong), ("size", ctypes.c_ulong))


IDENTITY_BYTES: Final = 16
EMPTY: Final = 1
DONATE: Final = 2
EPHEMERAL: Final = 4
_PATH_MAX: Final = 4096


class OpenRequest(ctypes.Structure):
    """struct mshare_request of mshare.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("identity", ctypes.c_char_p),
        ("root", ctypes.c_char_p),
        ("addr", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("oflags", ctypes.c_int),
        ("mode", ctypes.c_uint),
        ("backing", ctypes.c_char_p),
        ("flags", ctypes.c_uint),
    )


class OpenRegion(ctypes.Structure):
    """struct mshare_region of mshare.h."""

    _fields_ = (
        ("start", ctypes.c_ulong),
        ("size", ctypes.c_ulong),
        ("length", ctypes.c_ulong),
        ("identity", ctypes.c_ubyte * IDENTITY_BYTES),
        ("held", ctypes.c_ubyte),
        ("writable", ctypes.c_ubyte),
        ("created", ctypes.c_ubyte),
        ("root", ctypes.c_char * _PATH_MAX),
    )
    start: int
    size: int
    length: int
    held: int
    writable: int
    created: int
    root: bytes


_OPEN, _CLOSE, _FORGET_NAME = range(3)
"""The calls of struct mshare_apart."""


class Apart(ctypes.Structure):
    """struct mshare_apart of core/internal.h: a call that another thread makes.

    It must stay as long as that thread needs it, and what it is about, too.
    """

    _fields_ = (
        ("request", ctypes.c_void_p),  # not typed: interpreters of one process share such types
        ("region", ctypes.c_void_p),
        ("call", ctypes.c_int),
        ("state", ctypes.c_int),
        ("result", ctypes.c_int),
        ("error", ctypes.c_int),
        ("reason", ctypes.c_char * 96),
        ("rest", ctypes.c_ulonglong * 48),  # more than the library's own takes anywhere
    )
    state: int
    result: int
    error: int
    reason: bytes
    about: tuple[OpenRequest | None, OpenRegion]
    """What must stay as long as this does."""

    @property
    def has_begun(self) -> bool:
        """Whether it runs, or did."""
        return self.state != 0

    def make(self) -> None:
        """Make it here; `check()` says what came of it."""
        _library.mshare_apart_make(ctypes.byref(self))

    def begin(self) -> bool:
        """Whether there is a thread that makes it."""
        return bool(_library.mshare_apart_begin(ctypes.byref(self)) == 0)

    def wait(self, milliseconds: int) -> bool:
        """Whether it is over; after so long, and when a signal has come, it may not be."""
        return bool(_library.mshare_apart_wait(ctypes.byref(self), milliseconds) == 0)

    def check(self, name: str) -> None:
        """Raise what it has failed with, if it is over and has."""
        if self.result != 0:
            raise _error(self.error, os.fsdecode(self.reason), name)


class _HeapInfo(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
        ("pieces", ctypes.c_ulonglong),
        ("largest", ctypes.c_ulonglong),
    )


_library = _load()
_library.mshare.argtypes = [
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_uint,
]
_library.mshare_backed.argtypes = [*_library.mshare.argtypes, ctypes.c_char_p]
_library.mshare_attach.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(_Info)]
_library.mshare_unlink.argtypes = [ctypes.c_char_p]
_library.mshare_detach.argtypes = [ctypes.c_char_p]
_library.mshare_stat.argtypes = [ctypes.c_char_p, ctypes.POINTER(_Info)]
_library.mshare_root.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
_library.mshare_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_library.mshare_mmap.restype = ctypes.c_void_p
_library.mshare_populate.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_library.mshare_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_library.mshare_open.argtypes = [ctypes.POINTER(OpenRequest), ctypes.POINTER(OpenRegion)]
_library.mshare_close.argtypes = [ctypes.POINTER(OpenRegion)]
_library.mshare_forget_name.argtypes = [ctypes.POINTER(OpenRegion)]
_library.mshare_apart_begin.argtypes = [ctypes.POINTER(Apart)]
_library.mshare_apart_make.argtypes = [ctypes.POINTER(Apart)]
_library.mshare_apart_make.restype = None
_library.mshare_apart_wait.argtypes = [ctypes.POINTER(Apart), ctypes.c_int]
_library.mshare_await.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
_library.mshare_fill.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_uint64),
]
_library.mshare_heap.argtypes = [ctypes.POINTER(OpenRegion)]
_library.mshare_alloc.argtypes = [
    ctypes.POINTER(OpenRegion),
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
]
_library.mshare_alloc.restype = ctypes.c_void_p
_library.mshare_free.argtypes = [ctypes.POINTER(OpenRegion), ctypes.c_void_p, ctypes.c_int]
_library.mshare_heap_check.argtypes = [
    ctypes.POINTER(OpenRegion),
    ctypes.POINTER(_HeapInfo),
    ctypes.c_int,
]
_library.mshare_named.argtypes = [
    ctypes.POINTER(OpenRegion),
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_longlong,
    ctypes.c_int,
]
_library.mshare_named.restype = ctypes.c_void_p
_library.mshare_lock.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_ubyte)]
_library.mshare_unlock.argtypes = [ctypes.c_void_p]
_library.mshare_repaired.argtypes = [ctypes.c_void_p]
_library.mshare_repaired.restype = None
_library.mshare_semaphore_wait.argtypes = [ctypes.c_void_p, ctypes.c_int]
_library.mshare_semaphore_post.argtypes = [ctypes.c_void_p, ctypes.c_int]
_library.mshare_atomic.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_ulonglong,
    ctypes.c_ulonglong,
    ctypes.POINTER(ctypes.c_ulonglong),
]
_library.mshare_reason.argtypes = []
_library.mshare_reason.restype = ctypes.c_char_p
_library.mshare_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_library.mshare_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_library.mshare_msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

# mmap(2) on the machines that the core knows; Python's mmap module has the others.
MAP_FIXED: Final = 0x10
MAP_FIXED_NOREPLACE: Final = 0x100000
_MAP_NORESERVE: Final = 0x4000
_MS_SYNC: Final = 4
_NOWHERE: Final = (1 << 64) - 1
_MADV_POPULATE_READ: Final = 22


class RegionInfo(NamedTuple):
    """Where a region lies, in bytes."""

    start: int
    size: int


class HeapInfo(NamedTuple):
    """What is in use of a heap, in bytes but for `pieces`."""

    size: int
    """What can be given out."""
    used: int
    pieces: int
    """How many are in use."""
    largest: int
    """The largest piece that could be had now."""


class Kind(enum.IntEnum):
    """enum mshare_kind."""

    LOCK = 1
    SEMAPHORE = 2
    INTEGER = 3


class Operation(enum.IntEnum):
    """enum mshare_atomic_op."""

    LOAD = 0
    EXCHANGE = 1
    ADD = 2
    AND = 3
    OR = 4
    XOR = 5
    COMPARE_EXCHANGE = 6


def encode(name: str) -> bytes:
    """A name or a path as the C library takes it.  Raises ValueError for a null byte, TypeError."""
    if not isinstance(name, str):  # bytes and paths would be other names to whoever compares them
        raise TypeError(f"a name or a path is a str, not {type(name).__name__}")
    data = os.fsencode(name)
    if b"\0" in data:
        raise ValueError("embedded null byte in a region's name")
    return data


def _check(result: int, name: str) -> None:
    if result != 0:
        raise _failure(name)


def _failure(name: str | None) -> OSError:
    """What the last call's errno stands for."""
    return _error(ctypes.get_errno(), os.fsdecode(_library.mshare_reason()), name)


def _error(code: int, reason: str, name: str | None) -> OSError:
    if code == errno.ENOENT and not _is_mounted():
        return errors.NotMounted(code, errors.not_mounted(os.environ.get("MSHARE_ROOT")), name)
    return errors.of(code, reason, name)


def _is_mounted() -> bool:
    try:
        mshare_root()
    except OSError as error:
        return error.errno != errno.ENOENT
    return True


def opening(request: OpenRequest, region: OpenRegion) -> Apart:
    """mshare_open(): attach or create, and hold; *region* says that before it is over."""
    return _apart(_OPEN, request, region)


def closing(region: OpenRegion) -> Apart:
    """mshare_close(): hold it no longer; what is not held does no harm."""
    return _apart(_CLOSE, None, region)


def forgetting_name(region: OpenRegion) -> Apart:
    """mshare_forget_name(): remove the region's name, and no other region's."""
    return _apart(_FORGET_NAME, None, region)


def _apart(what: int, request: OpenRequest | None, region: OpenRegion) -> Apart:
    address = None if request is None else ctypes.addressof(request)
    call = Apart(address, ctypes.addressof(region), what)
    call.about = request, region
    return call


def mshare_forget_name(region: OpenRegion, name: str) -> None:
    """Remove the region's name, and no other region's.  Raises OSError (ESTALE, EACCES, EPERM)."""
    _check(_library.mshare_forget_name(ctypes.byref(region)), name)


def mshare_heap(region: OpenRegion, name: str) -> None:
    """Make a heap of a region of zeros, or find that it is one.  Raises OSError."""
    _check(_library.mshare_heap(ctypes.byref(region)), name)


def mshare_alloc(region: OpenRegion, size: int, alignment: int, wait: int, name: str) -> int:
    """The address of a piece of a heap.  `wait` is in milliseconds.

    Raises OSError: ENOMEM, ETIMEDOUT, EUCLEAN, EINVAL.
    """
    got = _library.mshare_alloc(ctypes.byref(region), size, alignment, wait)
    _check(0 if got else -1, name)
    return int(got)


def mshare_free(region: OpenRegion, addr: int, wait: int, name: str) -> None:
    """Give a piece back.  Raises OSError: EINVAL, ETIMEDOUT, EUCLEAN."""
    _check(_library.mshare_free(ctypes.byref(region), addr, wait), name)


def mshare_heap_check(region: OpenRegion, wait: int, name: str) -> HeapInfo:
    """Look at all of a heap's state.  Raises OSError: EUCLEAN, EINVAL, ETIMEDOUT."""
    info = _HeapInfo()
    _check(_library.mshare_heap_check(ctypes.byref(region), ctypes.byref(info), wait), name)
    return HeapInfo(info.size, info.used, info.pieces, info.largest)


def mshare_named(region: OpenRegion, called: str, kind: Kind, value: int, wait: int) -> int:
    """The address of a named object of a heap.  Raises OSError: ENOSPC, EEXIST, and as above."""
    got = _library.mshare_named(ctypes.byref(region), encode(called), kind, value, wait)
    _check(0 if got else -1, called)
    return int(got)


def mshare_lock(lock: int, wait: int, held: ctypes.c_ubyte, name: str) -> None:
    """Take a lock; `held` says that it is had, whatever this raises.

    Raises OSError: EOWNERDEAD with the lock held, ETIMEDOUT, EDEADLK, EUCLEAN.
    """
    _check(_library.mshare_lock(lock, wait, ctypes.byref(held)), name)


def mshare_unlock(lock: int, name: str) -> None:
    """Leave a lock.  Raises OSError: EPERM, EUCLEAN."""
    _check(_library.mshare_unlock(lock), name)


def mshare_repaired(lock: int) -> None:
    """What the lock guards is whole again."""
    _library.mshare_repaired(lock)


def mshare_semaphore_wait(semaphore: int, wait: int, name: str) -> None:
    """Take one.  Raises OSError: ETIMEDOUT, EINTR."""
    _check(_library.mshare_semaphore_wait(semaphore, wait), name)


def mshare_semaphore_post(semaphore: int, count: int, name: str) -> None:
    """Give some.  Raises OSError: EOVERFLOW."""
    _check(_library.mshare_semaphore_post(semaphore, count), name)


def mshare_atomic(
    operation: Operation, addr: int, width: int, value: int = 0, expected: int = 0
) -> int:
    """An atomic operation on an integer of `width` bytes; what it was before, unsigned."""
    before = ctypes.c_ulonglong()
    code = _library.mshare_atomic(operation, addr, width, value, expected, ctypes.byref(before))
    _check_range(code, addr, width)
    return before.value


def mshare_madvise(addr: int, length: int, advice: int) -> None:
    """madvise(2), in a region for every sharer.  Raises OSError."""
    _check_range(_library.mshare_madvise(addr, length, advice), addr, length)


def mshare_await(addr: int, length: int, prot: int, flags: int) -> None:
    """Map memory of a region whose contents mshare_fill() will bring; bytes, in whole pages.

    `flags` is mmap.MAP_SHARED or MAP_PRIVATE.  Raises OSError.
    """
    _check_range(_library.mshare_await(addr, length, prot, flags), addr, length)


def mshare_fill(addr: int, length: int, memory: int) -> int | None:
    """Bring the contents that the memfd has, from its first byte on; bytes, in whole pages.

    Of length 0 and memory -1 it only says that more will come: who says nothing for long is
    taken for gone.  The offset in the region at which somebody waits for other contents, or
    None.  Raises OSError: ENOMEM, EDQUOT.
    """
    wanted = ctypes.c_uint64()
    code = _library.mshare_fill(addr, length, memory, ctypes.byref(wanted))
    _check_range(code, addr, length)
    return None if wanted.value == _NOWHERE else wanted.value


def mshare_populate(addr: int, length: int) -> int:
    """Have a region's pages there; holds no lock while it waits.  Returns an errno, or 0."""
    done = _library.mshare_populate(addr, length, _MADV_POPULATE_READ)
    return ctypes.get_errno() if done else 0


def alignment(root: str | None = None) -> int:
    """What addresses and sizes of regions are multiples of, in bytes.  Raises OSError."""
    with open(f"{mshare_root() if root is None else root}/mshare_info", "rb") as file:
        return int(file.read())


def mshare(
    name: str,
    addr: int,
    length: int,
    oflags: int,
    mode: int = 0o600,
    backing: str | None = None,
) -> None:
    """Create or attach the region `name` at [addr, addr + length), in bytes.

    `oflags` is os.O_RDONLY or os.O_RDWR, with os.O_CREAT and os.O_EXCL.  `backing` is
    what holds a new region's pages, "shm" or "hugetlb"; None leaves it to
    $MSHARE_BACKING and the daemon.  Raises OSError with the errno that mshare(3) lists.
    """
    kind = None if backing is None else encode(backing)
    _check(_library.mshare_backed(encode(name), addr, length, oflags, mode, kind), name)


def mshare_attach(name: str, oflags: int) -> RegionInfo:
    """Attach the region `name` where it lies.

    `oflags` is os.O_RDONLY or os.O_RDWR.  Raises OSError with the errno that
    mshare(3) lists.
    """
    info = _Info()
    _check(_library.mshare_attach(encode(name), oflags, ctypes.byref(info)), name)
    return RegionInfo(info.start, info.size)


def mshare_unlink(name: str) -> None:
    """End this process's use of a region; by the last sharer, remove its name too.

    In a process that has not attached it: remove the name, as os.unlink() does.
    Raises OSError (ENOENT, EACCES, EPERM).
    """
    _check(_library.mshare_unlink(encode(name)), name)


def mshare_detach(name: str) -> None:
    """End this process's use of a region and leave its name.  Raises OSError (ENOENT)."""
    _check(_library.mshare_detach(encode(name)), name)


def mshare_stat(name: str) -> RegionInfo:
    """Where the region lies.  Raises OSError: ENOENT, EACCES."""
    info = _Info()
    _check(_library.mshare_stat(encode(name), ctypes.byref(info)), name)
    return RegionInfo(info.start, info.size)


def mshare_root() -> str:
    """Where msharefs is mounted; the daemon is not asked.

    Raises OSError: ENOENT, ENOTCONN if its daemon is known to have died.
    """
    path = ctypes.create_string_buffer(_PATH_MAX)
    if _library.mshare_root(path, len(path)) != 0:
        code = ctypes.get_errno()
        if code == errno.ENOENT:
            raise errors.NotMounted(code, errors.not_mounted(os.environ.get("MSHARE_ROOT")))
        raise errors.of(code, "", None)
    return os.fsdecode(path.value)


def _check_range(result: int, addr: int, length: int) -> None:
    if result != 0:
        raise _failure(f"{length} bytes at {addr:#x}")


def mshare_mmap(
    addr: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0
) -> int:
    """mmap(2), in a region for every sharer; returns the address.  Raises OSError."""
    got = _library.mshare_mmap(addr, length, prot, flags, fd, offset)
    _check_range(-1 if got == _MAP_FAILED else 0, addr, length)
    return int(got or 0)


def mshare_munmap(addr: int, length: int) -> None:
    """munmap(2), in a region for every sharer.  Raises OSError."""
    _check_range(_library.mshare_munmap(addr, length), addr, length)


def mshare_mprotect(addr: int, length: int, prot: int) -> None:
    """mprotect(2), in a region for every sharer.  Raises OSError."""
    _check_range(_library.mshare_mprotect(addr, length, prot), addr, length)


def mshare_msync(addr: int, length: int) -> None:
    """msync(2) with MS_SYNC: written data of files is in the files.  Raises OSError."""
    _check_range(_library.mshare_msync(addr, length, _MS_SYNC), addr, length)


def map_anonymous(addr: int, length: int) -> None:
    """Map memory for mshare(O_CREAT) to donate: private, without reservation.

    Raises OSError: EEXIST if something is mapped there.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | MAP_FIXED_NOREPLACE
    mshare_mmap(addr, length, mmap.PROT_READ | mmap.PROT_WRITE, flags)
