"""System calls that the standard library does not have, through libc.

Every function raises OSError with the kernel's errno.  Addresses and lengths
are bytes.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import platform
import socket
import struct
from dataclasses import dataclass
from typing import Final

from msharetables import calls

_libc = ctypes.CDLL(None, use_errno=True)

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
MAP_FIXED_NOREPLACE: Final = 0x100000

MADV_DONTFORK: Final = 10
MADV_POPULATE_READ: Final = 22
MADV_COLLAPSE: Final = calls.MADV_COLLAPSE

MS_ASYNC: Final = 1
MS_SYNC: Final = 4

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2

MS_NOSUID: Final = 1 << 1
MS_NODEV: Final = 1 << 2
MS_NOEXEC: Final = 1 << 3
MS_BIND: Final = 1 << 12
MS_REC: Final = 1 << 14
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19

MNT_DETACH: Final = 2

_INT: Final = array.array("i").itemsize

CLONE_FILES: Final = 0x400
CLOSE_RANGE_UNSHARE: Final = 2

AT_EMPTY_PATH: Final = 0x1000
AT_STATX_DONT_SYNC: Final = 0x4000
STATX_TYPE: Final = 0x1
STATX_INO: Final = 0x100
STATX_SIZE: Final = 0x200

PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

PAGE: Final = calls.PAGE
HUGE_PAGE: Final = calls.HUGE_PAGE

_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mount.argtypes = [
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_libc.capget.argtypes = _libc.capset.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
_libc.statx.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_void_p,
]

_libc.syscall.restype = ctypes.c_long
_SYS_USERFAULTFD: Final = {"x86_64": 323, "aarch64": 282}
_SYS_RT_TGSIGQUEUEINFO: Final = {"x86_64": 297, "aarch64": 240}
_SYS_GET_ROBUST_LIST: Final = {"x86_64": 274, "aarch64": 100}
_SYS_PIDFD_GETFD: Final = 438
_SYS_CLOSE_RANGE: Final = 436
# siginfo_t: signo, errno, code, padding, si_addr; 128 bytes in all.
_SIGINFO: Final = struct.Struct("=iii4xQ104x")

# struct __user_cap_header_struct: version, pid.  Two of __user_cap_data_struct, for
# capabilities 0 to 31 and 32 to 63: effective, permitted, inheritable (capget(2)).
_CAP_HEADER: Final = struct.pack("=Ii", 0x20080522, 0)
_CAP_DATA: Final = struct.Struct("=6I")

_MAP_FAILED = ctypes.c_void_p(-1).value


def _check(result: int, what: str | None = None) -> None:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def userfaultfd(flags: int) -> int:
    """userfaultfd(2); returns the descriptor."""
    number = _SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"userfaultfd on {platform.machine()} is not known here")
    fd = int(_libc.syscall(number, flags))
    _check(fd)
    return fd


def robust_list(thread: int) -> int:
    """Where a thread has its list of robust mutexes (get_robust_list(2)); 0 if it has none.

    Or if it is gone, or not ours to ask.
    """
    head, length = ctypes.c_void_p(), ctypes.c_size_t()
    number = _SYS_GET_ROBUST_LIST.get(platform.machine())
    if number is None:
        return 0
    failed = _libc.syscall(number, thread, ctypes.byref(head), ctypes.byref(length))
    return 0 if failed else int(head.value or 0)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """pidfd_getfd(2): a duplicate of another process's descriptor; takes ptrace's right."""
    fd = int(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))
    _check(fd)
    return fd


def receive_fd(sock: socket.socket, flags: int = 0) -> int:
    """The descriptor of a message that has one, and a byte; -1 if there is none.

    socket.recv_fds() takes flags and drops them (CPython up to 3.13 at least), so with it
    MSG_PEEK takes the message out.
    """
    _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_LEN(_INT), flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(payload) >= _INT:
            return array.array("i", payload[:_INT])[0]
    return -1


def close_range(first: int, flags: int = 0) -> None:
    """close_range(2) of `first` and all descriptors above it.

    With CLOSE_RANGE_UNSHARE the calling thread has a table of its own from then on, with
    what is below `first`, and nothing is closed in the one that it had.
    """
    _check(int(_libc.syscall(_SYS_CLOSE_RANGE, first, 0xFFFFFFFF, flags)))


def unshare(flags: int) -> None:
    """unshare(2), of the calling thread."""
    _check(_libc.unshare(flags))


def signal_fault(pid: int, thread: int, number: int, address: int) -> None:
    """Send a thread the signal of a memory access at `address` (rt_tgsigqueueinfo(2)).

    Handlers find the address in si_addr, as with the kernel's own signals.  si_code
    has to be SI_QUEUE: positive codes are the kernel's alone.
    """
    si_queue = -1
    information = _SIGINFO.pack(number, 0, si_queue, address)
    number_of_call = _SYS_RT_TGSIGQUEUEINFO[platform.machine()]
    _check(int(_libc.syscall(number_of_call, pid, thread, number, information)))


def punch(fd: int, offset: int, length: int) -> None:
    """fallocate(2) FALLOC_FL_PUNCH_HOLE: free the pages and unmap them everywhere."""
    _check(_libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length))


def mmap(address: int | None, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    """mmap(2); returns the address."""
    got = _libc.mmap(address, length, prot, flags, fd, offset)
    if got == _MAP_FAILED:
        _check(-1)
    return int(got)


def munmap(address: int, length: int) -> None:
    """munmap(2)."""
    _check(_libc.munmap(address, length))


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2)."""
    _check(_libc.madvise(address, length, advice))


def mincore(address: int, length: int, vector: ctypes.Array[ctypes.c_ubyte]) -> None:
    """mincore(2): a byte for each page of PAGE bytes into `vector`, bit 0 if it is there."""
    _check(_libc.mincore(address, length, vector))


def mount(source: str, target: str, fstype: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    kind = None if fstype is None else fstype.encode()
    _check(
        _libc.mount(os.fsencode(source), os.fsencode(target), kind, flags, data.encode()), target
    )


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def prctl(option: int, second: int = 0, third: int = 0) -> None:
    """prctl(2), for options that return nothing."""
    _check(_libc.prctl(option, second, third, 0, 0))


def capabilities() -> int:
    """The capabilities that this thread may use: bit N for number N."""
    data = ctypes.create_string_buffer(_CAP_DATA.size)
    _check(_libc.capget(_CAP_HEADER, data))
    _, low, _, _, high, _ = _CAP_DATA.unpack(data.raw)
    return int(high << 32 | low)


def set_capabilities(mask: int) -> None:
    """Have these and no others, for good (capset(2)); nothing is inheritable."""
    low, high = mask & 0xFFFFFFFF, mask >> 32
    _check(_libc.capset(_CAP_HEADER, _CAP_DATA.pack(low, low, 0, high, high, 0)))


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Which file a descriptor is open on."""

    major: int
    minor: int
    inode: int
    mode: int
    """0 if its file system does not tell us."""


class _Statx(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("nlink", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("mode", ctypes.c_uint16),
        ("spare0", ctypes.c_uint16),
        ("ino", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("attributes_mask", ctypes.c_uint64),
        ("times", ctypes.c_uint64 * 8),
        ("rdev_major", ctypes.c_uint32),
        ("rdev_minor", ctypes.c_uint32),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("spare", ctypes.c_uint64 * 14),
    )


def known_size(fd: int) -> int:
    """How long the kernel takes a file to be (bytes), as identify(); -1 if it does not know."""
    out = _Statx()
    flags = AT_EMPTY_PATH | AT_STATX_DONT_SYNC
    if _libc.statx(fd, b"", flags, STATX_SIZE, ctypes.byref(out)) or not out.mask & STATX_SIZE:
        return -1
    return int(out.size)


def identify(fd: int) -> FileIdentity:
    """Which file `fd` is open on, without asking its file system.

    AT_STATX_DONT_SYNC makes FUSE and network file systems answer from what the
    kernel has (statx(2)).  fstat(2) would send a request: to our own mount, from
    the thread that has to answer it, that is a deadlock, and to a client's hung
    one a stall.

    A FUSE mount that is private to its user tells others, root too, nothing but its
    device (fuse_getattr(), fs/fuse/dir.c).
    """
    out = _Statx()
    flags = AT_EMPTY_PATH | AT_STATX_DONT_SYNC
    try:
        _check(_libc.statx(fd, b"", flags, STATX_TYPE | STATX_INO, ctypes.byref(out)))
    except OSError:
        out = _Statx()
        _check(_libc.statx(fd, b"", flags, 0, ctypes.byref(out)))
        return FileIdentity(out.dev_major, out.dev_minor, 0, 0)
    return FileIdentity(out.dev_major, out.dev_minor, out.ino, out.mode)
