"""Sharers that do anything to what they were given, and are killed in the middle of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bare import PAGE, Bare
from fuzzing import TIMEOUT, keep_at_it, number
from world import EVIL, SIZE, World, uffd_by_device
from world import world_fixture as _world_fixture  # noqa: F401 - the test asks for `world`

from msharefsd.control.wire import Op
from msharefsd.linux import syscalls, uffd
from msharefsd.linux.uffd import Mode

PAGES = SIZE // PAGE
libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
libc.mremap.restype = ctypes.c_void_p


class Sharer:
    """A process that has attached the region and means no good."""

    def __init__(self, mount: Path, files: list[Path], dice: random.Random) -> None:
        self.dice = dice
        self.files = files
        self.mount = mount
        self.one = Bare(mount, seconds=30)
        oflags = os.O_RDONLY if dice.random() < 0.1 else os.O_RDWR
        assert self.one.attach("evil", oflags=oflags, own=uffd_by_device()).error == 0
        if oflags == os.O_RDWR:
            self.one.map_window(mode=dice.choice((Mode.MISSING, Mode.MISSING | Mode.WP)))

    def range(self) -> tuple[int, int]:
        """Pages of the region: offset, length."""
        first = self.dice.randrange(PAGES)
        count = self.dice.choice((1, 1, 2, 16, 512, PAGES))
        return first * PAGE, min(count, PAGES - first) * PAGE

    def call(self) -> None:
        """One that the library might make."""
        dice = self.dice
        offset, length = self.range()
        op = dice.choice((Op.MMAP, Op.MMAP, Op.MUNMAP, Op.MPROTECT, Op.MSYNC, Op.DISCARD, Op.READY))
        if op is Op.MMAP:
            prot, flags = dice.choice((0, 1, 3, 3)), dice.choice((1, 2))
            if dice.random() < 0.5:
                self.one.mmap(offset, length, prot, flags | mmap.MAP_ANONYMOUS)
                return
            file = os.open(dice.choice(self.files), os.O_RDWR)
            try:
                answer = self.one.mmap(offset, length, prot, flags, file)
            finally:
                os.close(file)
        elif op is Op.READY:
            answer = self.one.call(op)
        else:
            item = (offset, length, 0, dice.choice((0, 1, 3)), 0)
            answer = self.one.call(op, objects=(item,))
        assert answer.error != errno.EIO or op is Op.MSYNC, answer

    def touch(self) -> None:
        offset, length = self.range()
        at = self.one.start + offset
        page = (ctypes.c_char * min(length, 64 * PAGE)).from_address(at)
        with contextlib.suppress(OSError):
            if self.dice.random() < 0.5:
                os.pwrite(NULL, page, 0)
            else:
                os.preadv(ZERO, [page], 0)

    def in_threads(self) -> None:
        for _ in range(self.dice.randrange(1, 6)):
            threading.Thread(target=self.touch, daemon=True).start()

    def window(self) -> None:
        """Its own address space is its own to spoil."""
        dice = self.dice
        offset, length = self.range()
        at, start = self.one.start + offset, self.one.start
        fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | syscalls.MAP_FIXED
        backing = mmap.MAP_SHARED | syscalls.MAP_FIXED
        dice.choice(
            (
                lambda: syscalls.munmap(at, length),
                lambda: syscalls.madvise(at, length, dice.randrange(30)),
                lambda: libc.mprotect(ctypes.c_void_p(at), length, dice.randrange(4)),
                lambda: libc.mremap(at, length, length, 3, at ^ 1 << 36),
                lambda: libc.mremap(start, SIZE, SIZE, 3, start ^ 1 << 36),
                lambda: syscalls.mmap(at, length, 3, fixed, -1, 0),
                lambda: syscalls.mmap(at, length, 3, backing, self.one.backing, offset),
                lambda: syscalls.mmap(start, SIZE, 3, backing, self.one.backing, 0),
                lambda: uffd.register(self.one.uffd, start, SIZE, Mode(dice.randrange(1, 8))),
                lambda: uffd.register(self.one.uffd, at, length, Mode.MISSING),
            )
        )()

    def faults(self) -> None:
        """Its userfaultfd is its own as well: events, registrations, pages."""
        dice, fd = self.dice, self.one.uffd
        offset, length = self.range()
        at = self.one.start + offset
        memory = ctypes.create_string_buffer(4 * PAGE)
        near = ctypes.addressof(memory) + -ctypes.addressof(memory) % PAGE
        dice.choice(
            (
                lambda: os.set_blocking(fd, dice.random() < 0.5),
                lambda: threading.Thread(target=os.read, args=(fd, 32), daemon=True).start(),
                lambda: fcntl.ioctl(fd, uffd.UFFDIO_UNREGISTER, uffd._RANGE.pack(at, length)),
                lambda: uffd.zeropage(fd, at, length),
                lambda: uffd.copy(fd, at, near, PAGE, protect=dice.random() < 0.5),
                lambda: uffd.poison(fd, at, length),
                lambda: uffd.map_present(fd, at, length),
                lambda: uffd.write_protect(fd, at, length),
                lambda: uffd.write_unprotect(fd, at, length),
                lambda: uffd.wake(fd, at, length),
                lambda: uffd.register(fd, near, PAGE, Mode.MISSING),
            )
        )()

    def memory(self) -> None:
        """And it may write the region, in every way that there is."""
        dice, fd = self.dice, self.one.backing
        offset, length = self.range()
        dice.choice(
            (
                lambda: os.ftruncate(fd, dice.choice((0, PAGE, SIZE, SIZE, SIZE, 1 << 45))),
                lambda: os.posix_fallocate(fd, offset, length),
                lambda: syscalls.punch(fd, offset, length),
                lambda: os.pwrite(fd, b"x" * PAGE, offset),
                lambda: os.pread(fd, PAGE, offset),
                lambda: os.lseek(fd, number(dice) >> 1, dice.randrange(5)),
                lambda: fcntl.fcntl(fd, fcntl.F_SETFL, dice.choice((0, os.O_APPEND, os.O_DIRECT))),
                lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 1 << dice.randrange(6)),
                lambda: os.fchmod(fd, 0o777),
                lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
            )
        )()

    def file(self) -> None:
        """The files that are mapped change too."""
        os.truncate(self.dice.choice(self.files), self.dice.choice((0, 100, PAGE, SIZE)))

    def end(self) -> None:
        dice = self.dice
        what = dice.randrange(6)
        if what == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == 1:
            self.one.call(Op.DETACH)
            os._exit(0)
        elif what == 2:
            os.execv("/bin/sleep", ["sleep", "0.1"])
        elif what == 3:
            self.one.sock.shutdown(2)
        elif os.fork() == 0:  # with everything that its parent has
            time.sleep(0.5)
            os._exit(0)

    def run(self) -> None:
        acts: list[Callable[[], None]] = [
            *(self.call, self.call, self.touch, self.in_threads, self.window, self.faults),
            *(self.memory, self.file),
        ]
        while True:
            act = self.end if self.dice.random() < 0.01 else self.dice.choice(acts)
            with contextlib.suppress(OSError, TimeoutError, RuntimeError):
                act()


NULL = os.open("/dev/null", os.O_WRONLY)
ZERO = os.open("/dev/zero", os.O_RDONLY)


@pytest.mark.timeout(TIMEOUT)
def test_anything_a_sharer_can_do(world: World, directory: Path) -> None:
    world.daemon.expected += [
        "cannot (read|write back|fail a system call)",
        "no memory for a fault",
        "(a file|its files) (that )?did not take",
        "userfaultfd failed",
        "touches holes of region",
    ]
    files = [directory / "one", directory / "two"]
    for file in files:
        file.write_bytes(b"\5" * SIZE)
        file.chmod(0o666)

    def share(dice: random.Random) -> None:
        Sharer(world.mount, files, dice).run()

    keep_at_it(world, [(1666, share)] * 4)
    for child in world.children:
        child.kill()
    os.truncate(f"/dev/shm/{backing_of(world)}", SIZE)
    assert world.mallory.do("munmap", EVIL, SIZE) == "0"
    world.mallory.ok("mmap", EVIL, SIZE, 3, mmap.MAP_SHARED | 0x10)
    world.mallory.ok("fill", EVIL + SIZE // 2, PAGE, 6)
    assert world.mallory.do("load", EVIL + SIZE // 2) == "6"
    world.mallory.ok("munmap", EVIL, SIZE)


def backing_of(world: World) -> str:
    return world.daemon.field("evil", "backing").rpartition("/")[2]
