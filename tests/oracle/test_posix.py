"""The file system's calls, case by case, with tmpfs as the oracle.

msharefs is a directory like /dev/shm with regular files at one level and some reserved
names.  So every call by everybody on every kind of name must give what it gives in a
tmpfs of mode 1777 with the same files, owners and modes: the same errno, and the same
attributes afterwards.  What differs is in DIFFERENCES, with the reason; an entry that
is not needed fails the test as well.

One child makes the calls of all users: real and effective ids are the user's, the
saved one is root's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import fnmatch
import mmap
import os
import pickle
import select
import shutil
import socket
import stat
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from conftest import Daemon

from msharefsd.linux import syscalls

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="takes root: calls by many users")

LIBC: Final = ctypes.CDLL(None, use_errno=True)
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
UMASK: Final = 0o027
OWNER, TEAM, SECOND, STRANGE = 61001, 62001, 62002, 62009
"""The region's owner and group; a group that the owner is in; one that nobody is in."""


class User(NamedTuple):
    uid: int
    groups: tuple[int, ...]
    """The first one is the process's."""


USERS: Final = {
    "owner": User(OWNER, (TEAM, SECOND)),
    "outsider": User(OWNER, (SECOND,)),  # the owner, but not in the region's group
    "member": User(61002, (62003, TEAM)),
    "other": User(61003, (62003,)),
    "root": User(0, (0,)),
}

LONG: Final = "x" * 255
TARGETS: Final = (
    "f", "absent", ".new", "mshare_info", ".control", ".metrics", ".status", ".regions",
    ".regions/f",
    ".regions/f/info", ".regions/absent", ".regions/f/absent", "f/x", ".regions/f/info/x",
    "absent/x", LONG, LONG + "x", ".", "",
)  # fmt: skip
FILES: Final = ("f", "mshare_info", ".regions/f/info")


@dataclass(frozen=True)
class Call:
    """A call, for whom and on what, and what root does to `f` before it."""

    do: Callable[[str], object]
    targets: tuple[str, ...] = TARGETS
    users: tuple[str, ...] = ("owner", "member", "other", "root")
    mode: int = 0o640
    also: tuple[str, ...] = ()
    """Names beside the target that it may make or change."""
    times: bool = False
    """Whether to see which times it changes, too."""


def _path(flags: int, mode: int = 0o666) -> Callable[[str], object]:
    def call(path: str) -> None:
        os.close(os.open(path, flags | os.O_CLOEXEC, mode))

    return call


def _on(flags: int, use: Callable[[int], object]) -> Callable[[str], object]:
    """A call on a descriptor."""

    def call(path: str) -> object:
        fd = os.open(path, flags | os.O_CLOEXEC)
        try:
            return use(fd)
        finally:
            os.close(fd)

    return call


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _times(atime: tuple[int, int], mtime: tuple[int, int]) -> Callable[[str], object]:
    words = (ctypes.c_long * 4)(*atime, *mtime)
    at_fdcwd = -100
    return lambda path: _checked(LIBC.utimensat(at_fdcwd, path.encode(), words, 0))


def _bind(path: str) -> None:
    if len(path) > 100:
        raise OSError(errno.ENAMETOOLONG, "not for a socket's address")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def _own_file() -> str:
    """A file of the caller's own."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open("mine", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    return "mine"


def _map(flags: int, prot: int) -> Callable[[int], object]:
    def use(fd: int) -> object:
        address = syscalls.mmap(None, syscalls.PAGE, prot, flags, fd, 0)
        syscalls.munmap(address, syscalls.PAGE)
        return "mapped"

    return use


def _splice(fd: int) -> object:
    read, write = os.pipe()
    try:
        os.splice(fd, write, 16)
    finally:
        os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return len(pipe.read()) > 0


def _into(copy: Callable[[int, int], int]) -> Callable[[int], object]:
    """Copy the file into another one."""

    def use(fd: int) -> object:
        with open("/tmp", "rb", opener=lambda *_: os.memfd_create("copy")) as memory:
            copied = copy(fd, memory.fileno())
            return copied, os.pread(memory.fileno(), 100, 0).hex()

    return use


def _set_and_remove(path: str) -> None:
    os.setxattr(path, "user.x", b"1")
    os.removexattr(path, "user.x")


def _after_unlink(path: str) -> object:
    """What a descriptor is good for when the name has gone."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.unlink(path)
        before = os.fstat(fd).st_nlink, os.read(fd, 16).hex()
        os.fchmod(fd, 0o600)
        # A new file of that name is another one.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644))
        new = os.stat(path)
        same = os.fstat(fd).st_ino == new.st_ino
        return *before, oct(os.fstat(fd).st_mode), oct(new.st_mode), same
    finally:
        os.close(fd)


def _open_again(path: str) -> None:
    """By the descriptor, when the name has gone."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.unlink(path)
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
    finally:
        os.close(fd)


def _real_ids(path: str) -> object:
    """access(2) asks for the real user, faccessat(AT_EACCESS) for the effective one."""
    real, effective, _ = os.getresuid()
    os.setresuid(USERS["other"].uid if real else OWNER, -1, -1)
    try:
        ids = (False, True)
        return [[os.access(path, mode, effective_ids=by) for mode in (4, 2, 1)] for by in ids]
    finally:
        os.setresuid(real, effective, -1)


def _watched(path: str) -> object:
    """What inotify tells of an open, a chmod and the end of a file."""
    watch = LIBC.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    _checked(watch)
    try:
        _checked(LIBC.inotify_add_watch(watch, path.encode(), 0xFFF))
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        os.chmod(path, 0o600)
        os.unlink(path)
        select.select([watch], [], [], 1)
        data = os.read(watch, 4096)
        return [mask for _, mask, _, _ in struct.iter_unpack("iIII", data)]
    finally:
        os.close(watch)


READ, WRITE, BOTH = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
CREATE = os.O_CREAT | os.O_RDWR

OPEN: Final = {
    "open-read": Call(_path(READ)),
    "open-write": Call(_path(WRITE)),
    "open-both": Call(_path(BOTH)),
    "open-create": Call(_path(CREATE)),
    "open-exclusive": Call(_path(CREATE | os.O_EXCL)),
    "open-create-directory": Call(_path(CREATE | os.O_DIRECTORY)),
    "open-truncate": Call(_path(WRITE | os.O_TRUNC)),
    "open-create-truncate": Call(_path(CREATE | os.O_TRUNC)),
    "open-append": Call(_path(WRITE | os.O_APPEND)),
    "open-directory": Call(_path(READ | os.O_DIRECTORY)),
    "open-nofollow": Call(_path(READ | os.O_NOFOLLOW)),
    "open-path": Call(_path(os.O_PATH)),
    "open-temporary": Call(_path(BOTH | os.O_TMPFILE)),
    "open-direct": Call(_path(READ | os.O_DIRECT)),
    "open-noatime": Call(_path(READ | os.O_NOATIME)),
    "open-nonblock": Call(_path(READ | os.O_NONBLOCK)),
    "execute": Call(lambda path: os.execv(path, ["program"])),
    "list": Call(lambda path: sorted(os.listdir(path)) and "listed"),
    "enter": Call(os.chdir),
    "stat": Call(lambda path: os.stat(path).st_uid),
    "access-read": Call(lambda path: os.access(path, os.R_OK)),
    "access-write": Call(lambda path: os.access(path, os.W_OK)),
    "access-execute": Call(lambda path: os.access(path, os.X_OK)),
    "access-effective": Call(lambda path: os.access(path, 7, effective_ids=True)),
    "access-real-ids": Call(_real_ids, users=("owner", "root")),
}

NAMES: Final = {
    "unlink": Call(os.unlink),
    "rmdir": Call(os.rmdir),
    "mkdir": Call(lambda path: os.mkdir(path, 0o777)),
    "mkfifo": Call(lambda path: os.mkfifo(path, 0o666)),
    "mknod-file": Call(lambda path: os.mknod(path, stat.S_IFREG | 0o666)),
    "mknod-socket": Call(lambda path: os.mknod(path, stat.S_IFSOCK | 0o666)),
    "mknod-device": Call(lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))),
    "bind": Call(_bind),
    "symlink": Call(lambda path: os.symlink("f", path)),
    "readlink": Call(os.readlink),
    "link-from": Call(lambda path: os.link(path, "new"), also=("new",)),
    "link-to": Call(lambda path: os.link(_own_file(), path), also=("mine",)),
    "rename-from": Call(lambda path: os.rename(path, "new"), also=("new",)),
    "rename-to": Call(lambda path: os.rename(_own_file(), path), also=("mine",)),
    "rename-same": Call(lambda path: os.rename(path, path)),
    "unlink-open": Call(_after_unlink, targets=("f", "absent")),
    "unlink-open-again": Call(_open_again, targets=("f",)),
    "inotify": Call(_watched, targets=("f", "absent")),
}

ATTRIBUTES: Final = {
    "chmod": Call(lambda path: os.chmod(path, 0o604)),
    "chmod-all": Call(lambda path: os.chmod(path, 0o7777)),
    "fchmod": Call(_on(READ, lambda fd: os.fchmod(fd, 0o604))),
    "chown-nothing": Call(lambda path: os.chown(path, -1, -1)),
    "chown-self": Call(lambda path: os.chown(path, os.geteuid(), -1)),
    "chown-user": Call(lambda path: os.chown(path, USERS["other"].uid, -1)),
    "chown-group-in": Call(lambda path: os.chown(path, -1, SECOND)),
    "chown-group-out": Call(lambda path: os.chown(path, -1, STRANGE)),
    "lchown": Call(lambda path: os.lchown(path, -1, SECOND)),
    "fchown": Call(_on(READ, lambda fd: os.fchown(fd, -1, SECOND))),
    "truncate-0": Call(lambda path: os.truncate(path, 0)),
    "truncate-same": Call(lambda path: os.truncate(path, 16)),
    "truncate-more": Call(lambda path: os.truncate(path, 1 << 20)),
    "truncate-minus": Call(lambda path: os.truncate(path, -1)),
    "ftruncate": Call(_on(BOTH, lambda fd: os.ftruncate(fd, 0))),
    "ftruncate-read": Call(_on(READ, lambda fd: os.ftruncate(fd, 0))),
    "utime-now": Call(_times((0, UTIME_NOW), (0, UTIME_NOW))),
    "utime-omit": Call(_times((0, UTIME_OMIT), (0, UTIME_OMIT))),
    "utime-set": Call(_times((10, 11), (12, 13))),
    "utime-atime-now": Call(_times((0, UTIME_NOW), (0, UTIME_OMIT))),
    "utime-mtime-set": Call(_times((0, UTIME_OMIT), (20, 21))),
    "utime-invalid": Call(_times((0, -5), (0, 0))),
    "getxattr": Call(lambda path: os.getxattr(path, "user.x")),
    "getxattr-trusted": Call(lambda path: os.getxattr(path, "trusted.x")),
    "getxattr-acl": Call(lambda path: os.getxattr(path, "system.posix_acl_access")),
    "listxattr": Call(os.listxattr),
    "setxattr": Call(_set_and_remove),
    "removexattr": Call(lambda path: os.removexattr(path, "user.x")),
}

ALL = ("owner", "outsider", "member", "other", "root")
BITS: Final = {
    **{
        f"chmod-{mode:o}": Call(partial(os.chmod, mode=mode), ("f",), ALL)
        for mode in (0o4755, 0o2755, 0o6755, 0o2745, 0o1644, 0)
    },
    **{
        f"chown-{what}-of-{mode:o}": Call(
            partial(os.chown, uid=ids[0], gid=ids[1]), ("f",), ALL, mode
        )
        for mode in (0o4755, 0o2755, 0o6777, 0o2745, 0o1644)
        for what, ids in {
            "nothing": (-1, -1),
            "same": (OWNER, TEAM),
            "user": (USERS["other"].uid, -1),
            "group": (-1, SECOND),
        }.items()
    },
    **{
        f"create-{mode:o}": Call(_path(CREATE | os.O_EXCL, mode), ("absent",), ALL)
        for mode in (0, 0o777, 0o4777, 0o2777, 0o1777)
    },
    "write-of-6777": Call(_on(WRITE, lambda fd: os.write(fd, b"x")), ("f",), ALL, 0o6777),
    "open-truncate-of-6777": Call(_path(WRITE | os.O_TRUNC), ("f",), ALL, 0o6777),
}

DESCRIPTORS: Final = {
    name: Call(do, FILES, ("owner", "root"))
    for name, do in {
        "read": _on(READ, lambda fd: len(os.read(fd, 8))),
        "read-beyond": _on(READ, lambda fd: os.pread(fd, 8, 1 << 20)),
        "read-minus": _on(READ, lambda fd: os.pread(fd, 8, -1)),
        "read-write-only": _on(WRITE, lambda fd: os.read(fd, 8)),
        "read-no-memory": _on(READ, lambda fd: _checked(LIBC.read(fd, None, 8))),
        "write": _on(WRITE, lambda fd: os.write(fd, b"x")),
        "write-append": _on(WRITE | os.O_APPEND, lambda fd: os.write(fd, b"x")),
        "write-read-only": _on(READ, lambda fd: os.write(fd, b"x")),
        "seek-minus": _on(READ, lambda fd: os.lseek(fd, -1, os.SEEK_SET)),
        "seek-and-tell": _on(READ, lambda fd: (os.lseek(fd, 5, 0), os.lseek(fd, 0, 1))),
        "seek-data-beyond": _on(READ, lambda fd: os.lseek(fd, 1 << 20, os.SEEK_DATA)),
        "map-shared-read": _on(READ, _map(mmap.MAP_SHARED, mmap.PROT_READ)),
        "map-shared-write": _on(BOTH, _map(mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)),
        "map-private-read": _on(READ, _map(mmap.MAP_PRIVATE, mmap.PROT_READ)),
        "sendfile": _on(READ, _into(lambda fd, out: os.sendfile(out, fd, 0, 4))),
        "splice": _on(READ, _splice),
        "copy-file-range": _on(READ, _into(lambda fd, out: os.copy_file_range(fd, out, 4))),
        "fallocate": _on(BOTH, lambda fd: _checked(LIBC.fallocate(fd, 0, 0, 4096))),
        "punch": _on(BOTH, lambda fd: _checked(LIBC.fallocate(fd, 3, 0, 16))),
        "flock": _on(READ, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)),
        "lock-read": _on(READ, lambda fd: fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)),
        "lock-write": _on(READ, lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)),
        "lease": _on(READ, lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)),
        "ioctl": _on(READ, lambda fd: fcntl.ioctl(fd, 0x5401, bytes(64))),
        "get-flags": _on(READ, lambda fd: oct(fcntl.fcntl(fd, fcntl.F_GETFL))),
        "poll": _on(READ, lambda fd: select.select([fd], [fd], [], 0) == ([fd], [fd], [])),
        "sync": _on(READ, os.fsync),
        "sync-data": _on(READ, os.fdatasync),
        "advise": _on(READ, lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)),
        "as-directory": _on(READ, lambda fd: os.stat("x", dir_fd=fd)),
        "list": _on(READ, os.listdir),
        "enter": _on(READ, os.fchdir),
        "path-read": _on(os.O_PATH, lambda fd: os.read(fd, 1)),
        "path-stat": _on(os.O_PATH, lambda fd: oct(os.fstat(fd).st_mode)),
    }.items()
}

TIMES: Final = {
    name: Call(call.do, ("f",), ("owner", "root"), times=True)
    for name, call in {
        "read": Call(_on(READ, lambda fd: len(os.read(fd, 8)))),
        "open": OPEN["open-both"],
        **{
            name: ATTRIBUTES[name]
            for name in (
                "chmod", "chown-nothing", "chown-self", "chown-group-in", "utime-now",
                "utime-omit", "utime-set", "utime-atime-now", "utime-mtime-set",
            )
        },
        "unlink": Call(os.unlink),
    }.items()
}  # fmt: skip

FAMILIES: Final = {
    "open": OPEN,
    "names": NAMES,
    "attributes": ATTRIBUTES,
    "bits": BITS,
    "descriptors": DESCRIPTORS,
    "times": TIMES,
}


class Difference(NamedTuple):
    """Where msharefs is not as tmpfs is: patterns of the case and of what tmpfs says."""

    family: str
    call: str
    target: str
    user: str
    tmpfs: str
    ours: str
    reason: str


_NAMES: Final = "the other names are the daemon's: nobody makes, changes or removes them"
_REGIONS_ONLY: Final = "a name is a region's, and a region has one name for its life"
_SIZE: Final = "a region's size is fixed by mshare(); its file has no other"
_MEMORY: Final = "a region is written in the memory of who has attached it, not by its file"
_NO_SIZE: Final = "a text is written when it is opened, and says that its size is 0, as in /proc"
_TEXTS: Final = "the texts are the daemon's words: not even root writes them"
_KERNEL_SGID: Final = (
    "without execution by the group the kernel's FUSE leaves the set-group-ID bit alone "
    "(fuse_setattr); the file of a region is never executed"
)
_ATTRIBUTES: Final = "no attributes but the owner, the mode and the times"

DIFFERENCES: Final = [
    Difference(*each)
    for each in (
        ("open", "open-create*|open-exclusive", ".new", "*", "ok; .new is *", "EPERM", _NAMES),
        (
            "open",
            "open-create*|open-exclusive",
            ".regions/*absent",
            "root",
            "ok; *",
            "EPERM",
            _NAMES,
        ),
        ("open", "open-*truncate", "f", "*", "ok; f is *, 0)", "EPERM", _SIZE),
        (
            "open",
            "open-write|open-both|open-create*|open-append|open-truncate",
            "mshare_info|.metrics|.status|.regions/f/info",
            "root",
            "ok",
            "EACCES",
            _TEXTS,
        ),
        ("open", "open-temporary", ".|.regions|.regions/f", "*", "ok", "ENOTSUP", _REGIONS_ONLY),
        ("names", "unlink", "[.m]*", "root", "ok; *", "EPERM", _NAMES),
        ("names", "rmdir", ".regions*", "root", "ENOTEMPTY", "EPERM", _NAMES),
        (
            "names",
            "mk*|bind|symlink|link-from|rename-from",
            "*",
            "*",
            "ok; *",
            "EPERM",
            _REGIONS_ONLY,
        ),
        (
            "names",
            "link-to|rename-to",
            "*",
            "*",
            "ok; *",
            "EPERM; mine is * 1, None)",
            _REGIONS_ONLY,
        ),
        (
            "names",
            "unlink-open",
            "f",
            "*",
            "ok *False); f is *, 0)",
            "ok *False)*",
            "a region's file is as long as any other",
        ),
        (
            "names",
            "unlink-open-again",
            "f",
            "*",
            "ok; f is gone",
            "ESTALE; f is gone",
            "a region without a name is opened by nobody",
        ),
        ("attributes", "truncate-*|ftruncate", "f", "*", "ok*", "EPERM", _SIZE),
        (
            "attributes",
            "truncate-*",
            "mshare_info|.metrics|.status|.regions/f/info",
            "root",
            "ok",
            "EPERM",
            _TEXTS,
        ),
        (
            "attributes",
            "ftruncate",
            "mshare_info|.metrics|.status|.regions/f/info",
            "root",
            "ok",
            "EACCES",
            _TEXTS,
        ),
        ("attributes", "setxattr", "*", "*", "ok", "ENOTSUP", _ATTRIBUTES),
        ("attributes", "removexattr", "*", "*", "ENODATA", "ENOTSUP", _ATTRIBUTES),
        (
            "attributes",
            "chmod*|fchmod|lchown|fchown|chown-self|chown-user|chown-group-*",
            "[.m]*",
            "*",
            "ok*",
            "EPERM",
            _NAMES,
        ),
        (
            "attributes",
            "utime-now|utime-set|utime-atime-now|utime-mtime-set",
            "[.m]*",
            "*",
            "ok 0",
            "EPERM",
            _NAMES,
        ),
        ("bits", "write-of-6777", "f", "*", "ok *", "EINVAL", _MEMORY),
        ("bits", "open-truncate-*", "f", "*", "ok*", "EPERM", _SIZE),
        (
            "bits",
            "chown-nothing-of-2745|chown-same-of-2745",
            "f",
            "outsider",
            "ok; f is ('0o100745', *",
            "ok",
            _KERNEL_SGID,
        ),
        (
            "bits",
            "chown-group-of-2745",
            "f",
            "outsider",
            "ok; f is ('0o100745', *",
            "ok; f is ('0o102745', *",
            _KERNEL_SGID,
        ),
        ("bits", "chown-nothing-of-2745", "f", "other", "EPERM", "ok", _KERNEL_SGID),
        ("descriptors", "write|write-append", "f", "*", "ok *", "EINVAL", _MEMORY),
        ("descriptors", "map-shared-*", "f", "*", "ok *", "ENODEV", _MEMORY),
        ("descriptors", "map-shared-read", "*info", "*", "ok *", "ENODEV", _TEXTS),
        ("descriptors", "fallocate|punch", "f", "*", "ok *", "ENOTSUP", _MEMORY),
        ("descriptors", "read-write-only", "*info", "root", "EBADF", "EACCES", _TEXTS),
        (
            "descriptors",
            "write*|map-shared-write|fallocate|punch",
            "*info",
            "root",
            "ok *",
            "EACCES",
            _TEXTS,
        ),
        ("descriptors", "sendfile", "mshare_info", "*", "ok (4, *", "ok (4, *", "another text"),
        ("descriptors", "sendfile", ".regions/f/info", "*", "ok (4, *", "ok (0, '')", _NO_SIZE),
        ("descriptors", "splice", ".regions/f/info", "*", "ok True", "ok False", _NO_SIZE),
    )
]


# -- running --


class Tree:
    """A directory with the same files on either file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fresh(self, mode: int) -> None:
        raise NotImplementedError

    def _make_f(self, mode: int) -> None:
        fd = os.open("f", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        os.fchown(fd, OWNER, TEAM)
        os.fchmod(fd, mode)
        os.close(fd)


class Mshare(Tree):
    def fresh(self, mode: int) -> None:
        os.chdir(self.path)
        for name in os.listdir():
            if not name.startswith(".") and name != "mshare_info":
                os.unlink(name)
        self._make_f(mode)


class Tmpfs(Tree):
    """What msharefs looks like, as plain files."""

    def fresh(self, mode: int) -> None:
        os.chdir("/")
        with contextlib.suppress(OSError):
            syscalls.umount(str(self.path), syscalls.MNT_DETACH)
        noatime = 1024  # msharefs keeps no times of reading, as such a mount
        syscalls.mount("oracle", str(self.path), "tmpfs", noatime, "mode=1777,size=64m")
        os.chdir(self.path)
        self._make_f(mode)
        os.truncate("f", 16)
        readable = mode & 0o444
        for name in ("mshare_info", ".metrics", ".status"):
            Path(name).write_text("0123456789abcdef")
            os.chmod(name, 0o444)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(".control")
        os.chmod(".control", 0o666)
        os.makedirs(".regions/f")
        for name in ("info", "maps", "sharers"):
            text = Path(f".regions/f/{name}")
            text.write_text("0123456789abcdef")
            os.chown(text, OWNER, TEAM)
            os.chmod(text, readable)
        os.chown(".regions/f", OWNER, TEAM)
        os.chmod(".regions/f", readable | readable >> 2)
        os.chmod(".regions", 0o555)


def _state(path: str) -> tuple[object, ...] | None:
    """What others see of a file."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    size = found.st_size if path == "f" else None
    links = None if stat.S_ISDIR(found.st_mode) else found.st_nlink
    return oct(found.st_mode), found.st_uid, found.st_gid, links, size


def _stamps() -> tuple[int, ...]:
    """The times of `f`, of a descriptor of it, so that it may have lost its name."""
    found = os.stat("/proc/self/fd/100")
    return found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns


@contextlib.contextmanager
def _being(user: User) -> Iterator[None]:
    os.setgroups(user.groups)
    os.setresgid(user.groups[0], user.groups[0], 0)
    os.setresuid(user.uid, user.uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups([])


def _outcome(call: Call, target: str, user: User) -> str:
    """What the call gives, and what it leaves behind."""
    watched = sorted({target, "f", *call.also})
    before = {path: _state(path) for path in watched}
    if call.times:
        held = os.open("f", os.O_PATH)
        os.dup2(held, 100)
        if held != 100:
            os.close(held)
        stamps = _stamps()
        time.sleep(0.02)  # longer than a tick of the clock that tmpfs reads
    with _being(user):
        try:
            result = call.do(target)
        except OSError as error:
            result = errno.errorcode.get(error.errno or 0, "no errno")
        else:
            result = "ok" if result is None else f"ok {result}"
    os.chdir("/proc/self/fd/99")
    told = [str(result)]
    for path in watched:
        state = _state(path)
        if state != before[path]:
            told.append(f"{path[:8]} is {state or 'gone'}")
    if call.times:
        changed = zip("amc", stamps, _stamps(), strict=True)
        told.append("times " + "".join(letter for letter, was, now in changed if was != now))
        os.close(100)
    return "; ".join(told)


Case = tuple[str, str, str]


def _run(tree: Tree, family: dict[str, Call]) -> dict[Case, str]:
    os.umask(UMASK)
    outcomes: dict[Case, str] = {}
    fresh = -1
    for name, call in family.items():
        for target in call.targets:
            for who in call.users:
                if fresh != call.mode or call.times:
                    tree.fresh(call.mode)
                    os.dup2(os.open(".", os.O_RDONLY | os.O_CLOEXEC), 99)
                fresh = call.mode
                outcome = _outcome(call, target, USERS[who])
                outcomes[name, target, who] = outcome
                if "; " in outcome or any(map(os.path.lexists, call.also)):
                    fresh = -1  # something is not as it was
    return outcomes


def in_child(tree: Tree, family: dict[str, Call]) -> dict[Case, str]:
    """All the cases of a family on one tree, by a process that can be any user."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            outcome: object = _run(tree, family)
        except BaseException:  # noqa: BLE001 # to be told
            outcome = traceback.format_exc()
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(outcome, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pickle.load(pipe)
    os.waitpid(child, 0)
    assert isinstance(told, dict), told
    return told


def _matches(text: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns.split("|"))


@pytest.fixture
def oracle(directory: Path) -> Iterator[Tmpfs]:
    path = directory / "oracle"
    path.mkdir()
    yield Tmpfs(path)
    with contextlib.suppress(OSError):
        syscalls.umount(str(path), syscalls.MNT_DETACH)
    shutil.rmtree(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_as_on_tmpfs_but_for_what_the_design_says(
    daemon: Daemon, oracle: Tmpfs, family: str
) -> None:
    calls = FAMILIES[family]
    theirs = in_child(oracle, calls)
    ours = in_child(Mshare(daemon.mount), calls)
    assert theirs.keys() == ours.keys()
    wrong = []
    used: set[Difference] = set()
    for case, expected in theirs.items():
        name, target, who = case
        for difference in DIFFERENCES:
            patterns = zip((family, *case, expected), difference[:5], strict=True)
            if all(_matches(text, pattern) for text, pattern in patterns):
                used.add(difference)
                as_it_should = ours[case] != expected and _matches(ours[case], difference.ours)
                break
        else:
            as_it_should = ours[case] == expected
        if not as_it_should:
            wrong.append(
                f"{name} of {target[:20]!r} by {who}: tmpfs {expected!r}, here {ours[case]!r}"
            )
    assert not wrong, f"{len(wrong)} of {len(theirs)}:\n" + "\n".join(wrong)
    unused = [each for each in DIFFERENCES if each.family == family and each not in used]
    assert not unused, unused
