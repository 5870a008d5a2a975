"""Clients that mean harm.

Whatever one user's processes send, pass or do to what they were given, the daemon
lives, keeps nothing of theirs, and answers another user's client with what that wrote.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare import PAGE, Answer, Bare, become
from baseline import Baseline
from conftest import ALIGNMENT, BASE, SUPPORT, Daemon, clients, eventually
from world import CREATE, EVIL, KINDS, MALLORY, SIZE, World, attached, uffd_by_device
from world import world_fixture as _world_fixture  # noqa: F401 - the tests ask for `world`

from msharefsd.control import wire
from msharefsd.control.wire import Op
from msharefsd.linux import syscalls, uffd
from msharefsd.linux.uffd import Mode
from msharefsd.mount import mounting

PRIVATE, SHARED, ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_SHARED, mmap.MAP_ANONYMOUS


@contextlib.contextmanager
def strange(directory: Path, *user: int) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A FUSE mount and its server."""
    path = directory / f"strange{len(user)}"
    path.mkdir()
    with subprocess.Popen(
        [sys.executable, SUPPORT / "strange.py", path, *map(str, user)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield path, process
        finally:
            process.kill()
            process.wait()
            mounting.unmount(str(path))


# -- every kind of descriptor in every place --


def check(*answers: Answer) -> None:
    for answer in answers:
        assert answer.error != errno.EIO, answer


def as_everything(mount: Path, fd: int, *, touch: bool = True) -> None:
    """Send `fd` wherever a descriptor can be sent.  As an ordinary user."""
    for oflags in (os.O_RDONLY, os.O_RDWR):
        for flags in wire.RequestFlag.AS_IT_LIES, wire.RequestFlag.MADE_FILE:
            for fds in ((fd,), (fd, fd), (fd, uffd_by_device())):
                one = Bare(mount)
                check(one.call(Op.ATTACH, *fds, oflags=oflags, flags=flags))
                one.close()
    one = Bare(mount)
    check(one.attach("evil", own=fd))
    one.uffd = -1  # it is the caller's
    one.close()
    for op in Op:
        one = Bare(mount)
        item = ((0, PAGE, 0, 3, SHARED),) * (op in wire._ONE_OBJECT)
        check(one.call(op, fd, fd, objects=item))
        one.close()
    one = attached(mount)
    zero = os.open("/dev/zero", os.O_RDONLY)
    for prot, how in ((3, PRIVATE), (1, SHARED), (3, SHARED), (0, PRIVATE)):
        answer = one.mmap(PAGE, 2 * PAGE, prot, how, fd)
        check(answer, one.mmap(PAGE, PAGE, prot, how, fd, fd))
        if answer.error == 0 and touch:
            one.byte(PAGE)
            with contextlib.suppress(OSError):
                os.preadv(zero, [(ctypes.c_char * PAGE).from_address(one.start + PAGE)], 0)
            check(one.call(Op.MSYNC, objects=((PAGE, 2 * PAGE, 0, 0, 0),)))
    assert one.call(Op.MUNMAP, objects=((PAGE, 2 * PAGE, 0, 0, 0),)).error == 0
    os.close(zero)
    one.close()


def test_whatever_a_descriptor_is_it_is_used_for_nothing_else(world: World) -> None:
    world.daemon.expected.append("cannot read")

    for kind, make in KINDS.items():

        def send(make: Callable[[Path], int] = make) -> None:
            fd = make(world.mount)
            become(MALLORY)
            as_everything(world.mount, fd)

        assert world.mallory_does(send, uid=0).wait() == 0, kind
        world.alice_is_well()
        eventually(world.baseline.back, f"nothing left of {kind}")


@pytest.mark.parametrize("private", [False, True])
def test_files_of_a_file_system_that_answers_nothing(
    world: World, directory: Path, private: bool
) -> None:
    """Whatever is done with them waits: an ioctl, a read, even close(2)."""
    world.daemon.expected.append("cannot read")
    with strange(directory, *([MALLORY] if private else [])) as (path, server):
        ready, go = os.pipe(), os.pipe()

        def send() -> None:
            if private:
                become(MALLORY)
            fds = [os.open(path / "full", os.O_RDWR) for _ in range(100)]
            if not private:
                become(MALLORY)
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            # The server is stopped now.  More than may wait to be closed:
            for fd in fds:
                with contextlib.suppress(TimeoutError):
                    as_everything(world.mount, fd, touch=False)

        child = world.mallory_does(send, uid=0, seconds=5)
        os.read(ready[0], 1)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            os.write(go[1], b"x")
            for _ in range(20):
                world.alice_is_well()
                time.sleep(0.1)
            # Her own files are closed by somebody else.
            world.alice.ok("mmap", BASE, PAGE, 3, PRIVATE | 0x10, "/etc/passwd", os.O_RDONLY, 0)
            world.alice.ok("munmap", BASE, PAGE)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        child.kill()
        world.mallory.ok("munmap", EVIL + PAGE, 2 * PAGE)
        for end in (*ready, *go):
            os.close(end)
        if private:
            # As her own file system shows itself to nobody else, it cannot be mapped.
            one = Bare(world.mount)
            assert one.attach("evil").error == 0

            def map_private() -> None:
                answer = one.mmap(PAGE, PAGE, 3, PRIVATE, os.open(path / "full", os.O_RDWR))
                assert answer.error == errno.EACCES
                assert "allow_other" in answer.message

            assert world.mallory_does(map_private).wait() == 0
            one.close()
        world.clean()


# -- sharers --


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_a_sharer_that_reads_its_own_events_and_takes_away_o_nonblock(world: World) -> None:
    def steal() -> None:
        one = attached(world.mount)

        def read() -> None:
            while True:
                os.set_blocking(one.uffd, True)
                os.read(one.uffd, 32)

        for _ in range(4):
            in_thread(read)
        for at in range(0, ALIGNMENT, PAGE):
            in_thread(lambda at=at: one.byte(at))  # type: ignore[misc] # a default
        time.sleep(2)

    child = world.mallory_does(steal)
    for _ in range(20):
        world.alice_is_well()
        time.sleep(0.1)
    assert child.wait() == 0


def test_the_same_with_a_kernel_that_lets_a_read_wait(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}", "--without=nowait").start()
    with clients(client_program, daemon) as start:
        world = World(daemon, start)
        test_a_sharer_that_reads_its_own_events_and_takes_away_o_nonblock(world)
        world.clean()


def test_a_sharer_whose_window_is_not_protected(world: World, directory: Path) -> None:
    """It registers its window anew, without write protection; the file is for all others."""
    path = directory / "file"
    path.write_bytes(b"\7" * 8 * PAGE)
    path.chmod(0o666)

    def misregister() -> None:
        one = attached(world.mount)
        file = os.open(path, os.O_RDWR)
        assert one.mmap(0, 8 * PAGE, 1, SHARED, file).error == 0
        uffd.register(one.uffd, one.start, one.size, Mode.MISSING)
        unregister = uffd.UFFDIO_UNREGISTER
        fcntl.ioctl(one.uffd, unregister, uffd._RANGE.pack(one.start, one.size))
        uffd.register(one.uffd, one.start, one.size, Mode.MISSING)
        one.byte(0)
        in_thread(lambda: one.byte(PAGE))
        time.sleep(0.2)

    assert world.mallory_does(misregister).wait() in (0, -signal.SIGBUS)
    assert world.mallory.do("load", EVIL + 2 * PAGE) == "7"
    world.mallory.ok("munmap", EVIL, 8 * PAGE)


def test_a_sharer_that_moves_its_window_about(world: World) -> None:
    """mremap() holds up every ioctl on that userfaultfd until we have read of it."""

    def move() -> None:
        one = attached(world.mount)
        libc = ctypes.CDLL(None)
        libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
        libc.mremap.restype = ctypes.c_void_p
        at, maymove = one.start, 1
        in_thread(lambda: [one.byte(page) for page in range(0, one.size, PAGE)])
        while True:
            at = libc.mremap(at, one.size, one.size, maymove | 2, at ^ 1 << 30)

    world.mallory_does(move)
    for _ in range(100):
        world.mallory.ok("mprotect", EVIL, ALIGNMENT, 1)
        world.mallory.ok("mprotect", EVIL, ALIGNMENT, 3)
        world.mallory.ok("store", EVIL, 3)
    world.alice_is_well()


def test_a_sharer_that_changes_the_backing_itself(world: World) -> None:
    """Who may write a region can spoil it: for its sharers, and for nobody else."""
    world.daemon.expected.append("no memory for a fault")

    def spoil() -> None:
        one = attached(world.mount)
        fd, size = one.backing, one.size
        for round_ in range(20):
            os.ftruncate(fd, 0)
            one.byte(0)
            os.ftruncate(fd, 1 << 50)
            syscalls.punch(fd, 0, 1 << 50)
            os.posix_fallocate(fd, 0, size)
            one.byte(PAGE * round_)
            os.pwrite(fd, b"x" * PAGE, 1 << 49)
            with contextlib.suppress(OSError):
                os.write(fd, b"x" * PAGE)
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK | 0o40000)
            for seal in (fcntl.F_SEAL_WRITE, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
            with contextlib.suppress(OSError):
                os.fchmod(fd, 0o777)
            with contextlib.suppress(OSError):
                os.fchown(fd, MALLORY, MALLORY)
            with contextlib.suppress(OSError):
                os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            fcntl.flock(fd, fcntl.LOCK_EX)
            one.call(Op.MPROTECT, objects=((0, size, 0, 0, 0),))
            one.call(Op.MPROTECT, objects=((0, size, 0, 3, 0),))
            one.call(Op.MUNMAP, objects=((0, size, 0, 0, 0),))
            one.mmap(0, size, 3, SHARED | ANONYMOUS)
        os.ftruncate(fd, 0)
        one.call(Op.MPROTECT, objects=((0, size, 0, 1, 0),))
        os.ftruncate(fd, size)

    assert world.mallory_does(spoil).wait() == 0
    for name in world.daemon.shm_objects():
        found = os.stat(f"/dev/shm/{name}")
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o600)
    world.mallory.ok("mmap", EVIL, ALIGNMENT, 3, SHARED | 0x10)
    world.mallory.ok("store", EVIL, 9)


def test_a_reader_gets_no_way_to_write(world: World) -> None:
    world.alice.ok("store", BASE, 5)
    os.chmod(world.mount / "good", 0o644)

    def try_to_write() -> None:
        one = Bare(world.mount)
        assert one.attach("good", oflags=os.O_RDONLY, own=uffd_by_device()).error == 0
        fd = one.backing
        attempts: list[Callable[[], object]] = [
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 0),
            lambda: syscalls.punch(fd, 0, PAGE),
            lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
            lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDONLY),
            lambda: syscalls.mmap(None, PAGE, 3, SHARED, fd, 0),
            lambda: os.utime(fd),
            lambda: os.open(world.mount / "good", os.O_RDWR),
        ]
        for number, attempt in enumerate(attempts):
            print("attempt", number)
            with pytest.raises(OSError, match=r"denied|permitted|Bad file|Invalid"):
                attempt()
        for op in (Op.MUNMAP, Op.MPROTECT, Op.MSYNC, Op.DISCARD, Op.MMAP):
            item = (0, PAGE, 0, 0, SHARED | ANONYMOUS | syscalls.MAP_FIXED if op is Op.MMAP else 0)
            assert one.call(op, objects=(item,)).error == errno.EACCES
        # A descriptor of the backing proves no more than it is opened for.
        other = Bare(world.mount)
        flags = wire.RequestFlag.AS_IT_LIES
        own = uffd_by_device()
        answer = other.call(Op.ATTACH, fd, own, oflags=os.O_RDWR, flags=flags)
        assert answer.error == errno.EACCES

    assert world.mallory_does(try_to_write).wait() == 0
    assert world.alice.do("load", BASE) == "5"


def test_a_flood_of_faults_on_holes(world: World) -> None:
    def flood() -> None:
        one = attached(world.mount)

        def touch(start: int) -> None:
            while True:
                for at in range(start, one.size, 16 * PAGE):
                    one.byte(at)
                # Holes again, all of them.
                syscalls.mmap(one.start, one.size, 3, SHARED | syscalls.MAP_FIXED, one.backing, 0)
                with contextlib.suppress(OSError):
                    uffd.register(one.uffd, one.start, one.size, Mode.MISSING)

        for number in range(16):
            in_thread(lambda number=number: touch(number * PAGE))  # type: ignore[misc] # a default
        time.sleep(3)

    children = [world.mallory_does(flood) for _ in range(3)]
    for _ in range(10):
        world.alice_is_well()
    for child in children:
        child.kill()


def test_a_storm_of_sharers_that_stop_and_do_not_read(world: World) -> None:
    """Everything that is protected is announced to each (a NOTE): they do not listen."""

    def stop() -> None:
        os.setpgid(0, 0)
        for _ in range(10):
            if os.fork() == 0:
                break
        held = [attached(world.mount) for _ in range(7)]
        os.kill(os.getpid(), signal.SIGSTOP)
        assert held

    child = world.mallory_does(stop)
    eventually(lambda: world.daemon.sharers("evil") >= 70, "they have attached")
    for _ in range(20):
        world.mallory.ok("mprotect", EVIL, ALIGNMENT, 1)
        world.mallory.ok("mprotect", EVIL, ALIGNMENT, 3)
        world.alice_is_well()
    os.killpg(child.pid, signal.SIGKILL)


def test_connections_that_ask_and_never_read(world: World) -> None:
    def ask() -> None:
        held = []
        for _ in range(200):
            one = Bare(world.mount)
            one.sock.setblocking(False)
            held.append(one)
            with contextlib.suppress(BlockingIOError):
                while True:
                    one.send(b"?" * 100)
        time.sleep(50)

    child = world.mallory_does(ask)
    for _ in range(10):
        world.alice_is_well()
        time.sleep(0.1)
    child.kill()
    # Whatever was refused how often: the log does not grow with it.
    assert world.daemon.log().count("EPROTO") <= 2


def test_whoever_is_killed_while_it_waits_leaves_no_descriptor(world: World) -> None:
    """In the middle of a call, with descriptors on the way: a region that is being made."""
    donor = Bare(world.mount)
    made = os.open(world.mount / "made", CREATE, 0o666)
    os.chmod(world.mount / "made", 0o666)
    flags = wire.RequestFlag.HAS_MAPPINGS
    answer = donor.call(
        Op.ATTACH,
        made,
        uffd_by_device(),
        start=EVIL + (1 << 40),
        size=ALIGNMENT,
        oflags=os.O_RDWR | os.O_CREAT,
        flags=flags,
    )
    assert answer.error == 0
    before = Baseline(world.daemon, MALLORY)

    def wait() -> None:
        for _ in range(10):
            one = Bare(world.mount)
            one.send(request(Op.ATTACH), os.open(world.mount / "made", os.O_RDWR), uffd_by_device())
            waiting.append(one)
        time.sleep(50)

    waiting: list[Bare] = []
    child = world.mallory_does(wait)
    each = 4  # connection, pidfd, and the two that are on the way
    wanted = before.held[2] + 10 * each
    eventually(lambda: world.daemon.descriptors() >= wanted, "they wait")
    child.kill()
    eventually(before.back, "nothing of theirs is left")
    donor.close()
    os.close(made)
    (world.mount / "made").unlink()


def request(op: Op) -> bytes:
    flags = wire.RequestFlag.AS_IT_LIES
    return wire.REQUEST.pack(wire.MAGIC, wire.VERSION, op, 0, 0, os.O_RDWR, flags, 0, 0, 0, 0)


def test_open_files_of_the_mount_take_only_so_much_of_the_daemon(world: World) -> None:
    """What an open file reads is made when it is opened, and kept: a long text, each time."""
    prots = (1, 3)
    for page in range(1000):
        world.mallory.ok("mmap", EVIL + page * PAGE, PAGE, prots[page % 2], SHARED | 0x10)

    def open_many() -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        with pytest.raises(OSError, match="Too many open files"):  # noqa: PT012 - one of many
            for _ in range(900):
                os.open(world.mount / ".regions/evil/maps", os.O_RDONLY)
        os.dup(0)  # it is not our own limit

    child = world.mallory_does(open_many)
    assert child.wait() == 0
    assert (world.mount / ".regions/evil/maps").read_bytes().count(b"\n") == 1000
    world.mallory.ok("munmap", EVIL, SIZE)
