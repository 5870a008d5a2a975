"""The hostile tests' world: Alice, who must not notice; Mallory; what can be passed."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import select
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare import PAGE, Bare, Child, in_child
from baseline import Baseline
from conftest import ALIGNMENT, BASE, Client, Daemon

from msharefsd.linux import syscalls, uffd
from msharefsd.linux.uffd import Mode

SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
ALICE, MALLORY, NOBODY = 1000, 1666, 65534
Spawn = Callable[..., Client]
EVIL = BASE + (1 << 40)
"""Where the hostile user's region is."""


@functools.cache
def device() -> int:
    return os.open(uffd.DEVICE, os.O_RDWR | os.O_CLOEXEC)


def uffd_by_device() -> int:
    """A userfaultfd, also for a process that could not open the device any more."""
    return fcntl.ioctl(device(), uffd.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)


def attached(mount: Path, name: str = "evil") -> Bare:
    one = Bare(mount)
    assert one.attach(name, own=uffd_by_device()).error == 0
    one.map_window()
    return one


class World:
    """Alice, who only wants her memory; and a region of Mallory's."""

    def __init__(self, daemon: Daemon, spawn: Spawn) -> None:
        device()  # before anybody becomes somebody else
        self.daemon = daemon
        self.mount = daemon.mount
        self.alice = spawn(user=ALICE, group=ALICE, extra_groups=[])
        self.mallory = spawn(user=MALLORY, group=MALLORY, extra_groups=[])
        self.value = 0
        self.alice.ok("mshare", "good", BASE, SIZE, CREATE, 0o600)
        self.alice.ok("mmap", BASE, SIZE, 3, mmap.MAP_SHARED | 0x10)
        self.mallory.ok("mshare", "evil", EVIL, SIZE, CREATE, 0o600)
        self.mallory.ok("mmap", EVIL, ALIGNMENT, 3, mmap.MAP_SHARED | 0x10)
        # So that what a region gets when it is first needed is no leak: a stash, and the
        # host mapping for readers.
        self.mallory.ok("store", EVIL, 1)
        self.mallory.ok("mprotect", EVIL, PAGE, 0)
        self.mallory.ok("mprotect", EVIL, PAGE, 3)
        self.mallory.ok("fork", "reader", "evil", EVIL + ALIGNMENT - PAGE)
        self.alice_is_well()
        self.children: list[Child] = []
        self.baseline = Baseline(daemon, MALLORY, ALICE, NOBODY)
        self.held = self.descriptors()

    def alice_is_well(self) -> None:
        """She makes a page, changes its protection, has it back, and it is hers."""
        self.value = (self.value + 1) % 200
        page = BASE + self.value * PAGE
        self.alice.ok("mmap", page, PAGE, 3, mmap.MAP_SHARED | 0x10)
        self.alice.ok("fill", page, PAGE, self.value)
        self.alice.ok("mprotect", page, PAGE, 0)
        self.alice.ok("mprotect", page, PAGE, 1)
        assert self.alice.do("load", page) == str(self.value)
        self.alice.ok("munmap", page, PAGE)

    def mallory_does(self, function: Callable[[], object], **how: int) -> Child:
        """In a process of Mallory's."""
        child = in_child(function, **{"uid": MALLORY, **how})
        self.children.append(child)
        return child

    def clean(self) -> None:
        """Nothing is left of what Mallory did."""
        for child in self.children:
            child.kill()
        self.alice_is_well()
        try:
            self.baseline.check()
        except AssertionError:
            before, now = Counter(self.held), Counter(self.descriptors())
            print("descriptors more:", now - before, "less:", before - now)
            raise

    def descriptors(self) -> list[str]:
        """What the descriptors of its processes are open on, for people."""
        return [
            f"{pid}: {os.readlink(f'/proc/{pid}/fd/{name}')}"
            for pid in self.daemon.processes()
            for name in os.listdir(f"/proc/{pid}/fd")
        ]


@pytest.fixture(name="world")
def world_fixture(daemon: Daemon, spawn: Spawn) -> Iterator[World]:
    made = World(daemon, spawn)
    try:
        yield made
        made.clean()
    finally:
        for child in made.children:
            child.kill()


def _pipe(end: int) -> int:
    return os.pipe()[end]


def _sealed() -> int:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _huge() -> int:
    fd = os.memfd_create("huge", os.MFD_HUGETLB)
    os.ftruncate(fd, 2 << 20)
    return fd


def _secret() -> int:
    fd = int(ctypes.CDLL(None).syscall(447, 0))  # memfd_secret(2)
    return fd if fd >= 0 else os.memfd_create("no memfd_secret here")


def _userfaultfd(*, blocking: bool = False, used: bool = False, registered: bool = False) -> int:
    fd = uffd.open_new()
    if used or registered:
        uffd.handshake(fd, uffd.Feature.MISSING_SHMEM)
    if registered:
        at = syscalls.mmap(None, PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        uffd.register(fd, at, PAGE, Mode.MISSING)
    os.set_blocking(fd, not blocking)
    return fd


def _of_another_process() -> int:
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        socket.send_fds(there, [b"x"], [uffd.open_new()])
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # connections it has by inheritance
        time.sleep(60)
        os._exit(0)
    fd = socket.recv_fds(here, 1, 1)[1][0]
    here.close()
    there.close()
    return fd


def _stale() -> int:
    """A userfaultfd whose process has ended."""
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        socket.send_fds(there, [b"x"], [uffd.open_new()])
        os._exit(0)
    fd = socket.recv_fds(here, 1, 1)[1][0]
    os.waitpid(child, 0)
    here.close()
    there.close()
    return fd


def _far_away() -> int:
    """A file whose path is longer than a link can say (PATH_MAX)."""
    with tempfile.TemporaryDirectory() as top:
        at = os.open(top, os.O_RDONLY)
        for _ in range(20):
            os.mkdir("d" * 250, dir_fd=at)
            deeper = os.open("d" * 250, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = deeper
        return os.open("file", os.O_RDWR | os.O_CREAT, dir_fd=at)


def _listening() -> int:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")
    sock.listen()
    return sock.detach()


def _epoll() -> int:
    poll = select.epoll()
    poll.register(os.pipe()[0])
    return os.dup(poll.fileno())


def _terminal() -> int:
    return os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)


def _backing(mount: Path, oflags: int) -> int:
    bare = Bare(mount)
    answer = bare.attach("evil", oflags=oflags)
    fd = os.dup(answer.fd)
    bare.close()
    return fd


def _connected(mount: Path) -> int:
    return Bare(mount).sock.detach()


KINDS: dict[str, Callable[[Path], int]] = {
    "pipe, reading": lambda _: _pipe(0),
    "pipe, writing": lambda _: _pipe(1),
    "directory": lambda _: os.open("/", os.O_RDONLY),
    "socket": lambda _: socket.socketpair()[0].detach(),
    "listening socket": lambda _: _listening(),
    "O_PATH": lambda _: os.open("/etc/passwd", os.O_PATH),
    "O_PATH of the region": lambda mount: os.open(mount / "evil", os.O_PATH),
    "O_PATH of another's region": lambda mount: os.open(mount / "good", os.O_PATH),
    "/proc/self/mem": lambda _: os.open("/proc/self/mem", os.O_RDWR),
    "/proc/self/stat": lambda _: os.open("/proc/self/stat", os.O_RDONLY),
    "/proc/1/stat": lambda _: os.open("/proc/1/stat", os.O_RDONLY),
    "/proc/self/oom_score_adj": lambda _: os.open("/proc/self/oom_score_adj", os.O_RDWR),
    "/proc/self/pagemap": lambda _: os.open("/proc/self/pagemap", os.O_RDONLY),
    "/proc/kmsg's like": lambda _: os.open("/dev/kmsg", os.O_RDONLY),
    "/sys file": lambda _: os.open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY),
    "namespace": lambda _: os.open("/proc/self/ns/mnt", os.O_RDONLY),
    "/dev/zero": lambda _: os.open("/dev/zero", os.O_RDWR),
    "/dev/full": lambda _: os.open("/dev/full", os.O_RDWR),
    "/dev/fuse": lambda _: os.open("/dev/fuse", os.O_RDWR),
    "/dev/userfaultfd": lambda _: os.open("/dev/userfaultfd", os.O_RDWR),
    "terminal": lambda _: _terminal(),
    "memfd": lambda _: os.memfd_create("plain"),
    "sealed memfd": lambda _: _sealed(),
    "hugetlb memfd": lambda _: _huge(),
    "secret memfd": lambda _: _secret(),
    "write-only file": lambda _: os.open("/dev/shm", os.O_WRONLY | os.O_TMPFILE),
    "file far away": lambda _: _far_away(),
    "epoll": lambda _: _epoll(),
    "eventfd": lambda _: os.eventfd(0),
    "pidfd": lambda _: os.pidfd_open(os.getpid()),
    "userfaultfd": lambda _: _userfaultfd(),
    "blocking userfaultfd": lambda _: _userfaultfd(blocking=True),
    "used userfaultfd": lambda _: _userfaultfd(used=True),
    "registered userfaultfd": lambda _: _userfaultfd(registered=True),
    "user-mode userfaultfd": lambda _: uffd.open_by_system_call(uffd.USER_MODE_ONLY),
    "userfaultfd of another process": lambda _: _of_another_process(),
    "userfaultfd of no process": lambda _: _stale(),
    "region": lambda mount: os.open(mount / "evil", os.O_RDWR),
    "region, reading": lambda mount: os.open(mount / "evil", os.O_RDONLY),
    "backing": lambda mount: _backing(mount, os.O_RDWR),
    "backing, reading": lambda mount: _backing(mount, os.O_RDONLY),
    "mount's directory": lambda mount: os.open(mount, os.O_RDONLY),
    "mount's text": lambda mount: os.open(mount / ".regions/evil/maps", os.O_RDONLY),
    "mount's number": lambda mount: os.open(mount / "mshare_info", os.O_RDONLY),
    ".control": lambda mount: os.open(mount / ".control", os.O_PATH),
    "connection": _connected,
}
