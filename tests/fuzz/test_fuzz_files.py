"""Random file operations on every node of the tree, by several users at once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import select
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from bare import become
from fuzzing import TIMEOUT, keep_at_it, number
from world import ALICE, MALLORY, NOBODY, World
from world import world_fixture as _world_fixture  # noqa: F401 - the test asks for `world`

NAMES = (
    *(b"evil", b"good", b"fuzz", b"fuzz2", b".control", b".regions", b".metrics", b"mshare_info"),
    *(
        b".status",
        b".regions/evil",
        b".regions/good/info",
        b".regions/evil/maps",
        b".regions/evil/sharers",
    ),
    *(b".regions/none", b".regions/evil/none", b".regions/.regions", b".regions/mshare_info"),
    *(b"", b".", b"..", b"../mshare", b"evil/x", b"\xff\xfe", b"new\nline", b" ", b"%s%n"),
    *(b"a" * 255, b"a" * 256, b"\xc3\xa9" * 120, b".hidden", b".regions/" + b"b" * 255),
)
FLAGS = (
    *(os.O_RDONLY, os.O_WRONLY, os.O_RDWR, 3, os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND),
    *(os.O_DIRECT, os.O_DIRECTORY, os.O_NOFOLLOW, os.O_PATH, os.O_SYNC, os.O_NOATIME),
    *(os.O_TMPFILE, os.O_NONBLOCK, os.O_ASYNC, 1 << 30),
)
libc = ctypes.CDLL(None, use_errno=True)


class Toucher:
    """A process that does anything with files of the mount."""

    def __init__(self, mount: Path, dice: random.Random, *, reads_only: bool) -> None:
        self.mount = os.fsencode(mount)
        self.dice = dice
        self.fds: list[int] = []
        self.operations: list[Callable[[], object]] = [
            *(self.open, self.open, self.read, self.write, self.map, self.seek, self.stat),
            *(self.list, self.attribute, self.special, self.ioctl, self.copy, self.handle),
        ]
        if not reads_only:
            self.operations += [self.change, self.make, self.remove, self.rename, self.create]

    def path(self) -> bytes:
        return os.path.join(self.mount, self.dice.choice(NAMES))

    def fd(self) -> int:
        return self.dice.choice(self.fds) if self.fds else -1

    def offset(self) -> int:
        signed = number(self.dice)
        return signed - (1 << 64) if signed >> 63 else signed

    def open(self) -> None:
        flags = 0
        for _ in range(self.dice.randrange(4)):
            flags |= self.dice.choice(FLAGS)
        if self.operations[-1] != self.create:
            flags &= ~(os.O_CREAT | os.O_TRUNC)
        self.fds.append(os.open(self.path(), flags | os.O_CLOEXEC, self.dice.getrandbits(12)))
        if len(self.fds) > 60:
            os.close(self.fds.pop(self.dice.randrange(60)))

    def create(self) -> None:
        name = b"fuzz%d" % self.dice.randrange(10)
        mode = self.dice.getrandbits(12)
        self.fds.append(os.open(os.path.join(self.mount, name), os.O_CREAT | os.O_RDWR, mode))

    def read(self) -> None:
        size = self.dice.choice((0, 1, 16, 17, 4096, 1 << 20))
        os.pread(self.fd(), size, max(0, self.offset()))
        os.read(self.fd(), size)

    def write(self) -> None:
        data = self.dice.randbytes(self.dice.choice((0, 1, 16, 5000)))
        self.dice.choice((lambda fd: os.write(fd, data), lambda fd: os.pwrite(fd, data, 2**62)))(
            self.fd()
        )

    def map(self) -> None:
        prot, flags = self.dice.choice((1, 3, 7)), self.dice.choice((1, 2))
        with mmap.mmap(self.fd(), 4096, flags, prot, offset=self.dice.choice((0, 1 << 40))):
            pass

    def seek(self) -> None:
        os.lseek(self.fd(), self.offset(), self.dice.randrange(6))

    def stat(self) -> None:
        self.dice.choice((os.stat, os.lstat, os.statvfs, os.readlink))(self.path())
        os.access(self.path(), self.dice.randrange(8))
        os.fstat(self.fd())

    def list(self) -> None:
        with os.scandir(self.path()) as entries:
            for _, entry in zip(range(self.dice.randrange(30)), entries, strict=False):
                entry.stat()

    def attribute(self) -> None:
        name = self.dice.choice(
            (b"user.x", b"security.capability", b"trusted.y", b"system.posix_acl_access", b"z")
        )
        what = self.dice.randrange(4)
        if what == 0:
            os.getxattr(self.path(), name)
        elif what == 1:
            os.setxattr(self.path(), name, self.dice.randbytes(self.dice.choice((0, 4, 60000))))
        elif what == 2:
            os.listxattr(self.path())
        else:
            os.removexattr(self.path(), name)

    def change(self) -> None:
        path, dice = self.path(), self.dice
        what = dice.randrange(6)
        if what == 0:
            os.chmod(path, dice.getrandbits(16))
        elif what == 1:
            os.chown(path, dice.choice((-1, 0, MALLORY, 2**32 - 2)), dice.choice((-1, 0, MALLORY)))
        elif what == 2:
            os.utime(path, ns=(abs(self.offset()), dice.choice((0, 2**62))))
        elif what == 3:
            os.truncate(path, abs(self.offset()) % 2**63)
        elif what == 4:
            os.posix_fallocate(self.fd(), 0, 1 + abs(self.offset()) % 2**62)
        else:
            os.ftruncate(self.fd(), self.dice.choice((0, 16, 2**62)))

    def make(self) -> None:
        path, what = self.path(), self.dice.randrange(5)
        if what == 0:
            os.mkdir(path)
        elif what == 1:
            os.mknod(path, self.dice.choice((0o010600, 0o100600, 0o140600, 0o060600)), 0x801)
        elif what == 2:
            os.symlink(self.path(), path)
        elif what == 3:
            os.link(self.path(), path)
        else:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(path)

    def remove(self) -> None:
        self.dice.choice((os.unlink, os.rmdir))(self.path())

    def rename(self) -> None:
        flags = self.dice.randrange(8)
        if libc.renameat2(-100, self.path(), -100, self.path(), flags) < 0:
            raise OSError(ctypes.get_errno(), "renameat2")

    def special(self) -> None:
        fd = self.fd()
        what = self.dice.randrange(6)
        if what == 0:
            fcntl.flock(fd, self.dice.choice((fcntl.LOCK_SH, fcntl.LOCK_EX)) | fcntl.LOCK_NB)
        elif what == 1:
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 0)
        elif what == 2:
            poll = select.poll()
            poll.register(fd)
            poll.poll(0)
        elif what == 3:
            self.dice.choice((os.fsync, os.fdatasync))(fd)
        elif what == 4:
            fcntl.fcntl(fd, fcntl.F_SETFL, self.dice.choice(FLAGS))
        else:
            os.fchdir(fd)
            os.chdir("/")

    def ioctl(self) -> None:
        fcntl.ioctl(self.fd(), self.dice.getrandbits(32), self.dice.randbytes(256))

    def copy(self) -> None:
        dice = self.dice
        if dice.random() < 0.5:
            os.copy_file_range(self.fd(), self.fd(), 100)
        else:
            os.sendfile(self.fd(), self.fd(), 0, 100)

    def handle(self) -> None:
        """A file handle that nobody gave us: made up of numbers."""
        buffer = bytearray(8 + 128)
        struct.pack_into("=IiQQ", buffer, 0, 24, self.dice.choice((0x81, 1)), number(self.dice), 0)
        fd = libc.open_by_handle_at(self.fd(), bytes(buffer), os.O_RDONLY)
        if fd >= 0:
            self.fds.append(fd)


@pytest.mark.timeout(TIMEOUT)
def test_anything_with_the_files(world: World) -> None:
    world.daemon.expected.append(r"may have \d+ \w+: see")

    def touch(dice: random.Random, *, uid: int = MALLORY) -> None:
        if uid:
            become(uid)
        toucher = Toucher(world.mount, dice, reads_only=not uid)
        while True:
            try:
                with contextlib.suppress(ValueError, OverflowError):
                    dice.choice(toucher.operations)()
            except OSError as error:
                assert error.errno != errno.EIO, error  # noqa: PT017 - any other is right

    users = (MALLORY, NOBODY, 0)
    jobs = [(0, lambda dice, uid=uid: touch(dice, uid=uid)) for uid in users]
    keep_at_it(world, jobs)
    good = os.stat(world.mount / "good")
    assert (good.st_uid, good.st_mode) == (ALICE, stat.S_IFREG | 0o600)
    world.baseline.regions.discard("evil")  # Mallory may have removed it, and nobody else
    for name in set(os.listdir(world.mount)) - world.baseline.regions:
        (world.mount / name).unlink()
