"""Memory whose contents are brought: who touches it waits, and nobody sees zeros there."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare import Bare, Child, in_child
from conftest import ALIGNMENT, BASE, PAGE, Daemon, MiB, eventually
from hostile import userfaultfd
from stops import arm, may_stop, reached

from libmshare import Busy, Region, core
from msharefsd.control.wire import Op
from msharefsd.linux import syscalls

pytestmark = pytest.mark.shm_only
SIZE = 8 * ALIGNMENT
START, LENGTH = ALIGNMENT, 4 * MiB
MALLORY = 65531
SHARED, PRIVATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE
READ, BOTH = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE


def content(at: int, length: int) -> bytes:
    """What belongs there: each page has its own, and none is zeros."""
    pages = range(at // PAGE, (at + length) // PAGE)
    return b"".join((page + 1).to_bytes(8, "little") * (PAGE // 8) for page in pages)


def bring(at: int, length: int, data: bytes | None = None) -> int | None:
    memory = os.memfd_create("part")
    try:
        os.pwrite(memory, content(at, length) if data is None else data, 0)
        return core.mshare_fill(BASE + at, length, memory)
    finally:
        os.close(memory)


@pytest.fixture(name="region")
def region_fixture(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Region]:
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    with Region.create("r", SIZE, start=BASE, empty=True) as made:
        core.mshare_await(BASE + START, LENGTH, BOTH, SHARED)
        yield made
        made.unlink()


def looks(at: int) -> Child:
    """A process that has the region, and looks whether the page there is right."""

    def look() -> None:
        faulthandler.disable()
        with Region.attach("r") as own:
            assert own[at : at + PAGE] == content(at, PAGE)

    return in_child(look)


def waits(child: Child) -> None:
    """It is in a page fault."""
    eventually(
        lambda: "handle_userfault" in Path(f"/proc/{child.pid}/wchan").read_text(),
        "it waits in the fault",
    )
    assert child.poll() is None


def test_who_touches_it_waits_for_it(daemon: Daemon, region: Region) -> None:
    assert not region.filled
    assert daemon.field("r", "awaited") == str(LENGTH)
    assert f"[awaited:{region.name}]" in daemon.info("r", "maps")
    late, early = looks(START + LENGTH - PAGE), looks(START)
    waits(late)
    waits(early)
    bring(START, MiB)
    assert early.wait() == 0
    waits(late)
    with pytest.raises(TimeoutError):
        region.wait_filled(0.1)
    bring(START + MiB, LENGTH - MiB)
    assert late.wait() == 0
    region.wait_filled(10)
    assert region.filled and daemon.field("r", "awaited") == "0"
    assert daemon.info("r", "maps").count("\n") == 1  # and it is one object, as any other
    assert region[START : START + LENGTH] == content(START, LENGTH)


def test_it_is_told_where_somebody_waits(region: Region) -> None:
    """Once, and the one who has waited longest first."""
    others = [looks(at) for at in (START + 3 * MiB, START + 2 * MiB)]
    for each in others:
        waits(each)
    told = {bring(START, PAGE), bring(START + PAGE, PAGE)}
    # (They lie in one piece of what an image's parts have; who is woken there may ask again.)
    assert told - {None} and told <= {START + 3 * MiB, START + 2 * MiB, None}
    bring(START, LENGTH)
    assert [each.wait() for each in others] == [0, 0]


def test_what_is_there_is_not_brought_again(region: Region) -> None:
    bring(START, MiB)
    region[START] = 77
    assert bring(START, LENGTH) is None
    assert region[START] == 77
    assert region[START + 1 : START + LENGTH] == content(START, LENGTH)[1:]
    bring(0, PAGE)  # a hole
    assert region.filled


@pytest.mark.parametrize("private", [False, True])
def test_protections_are_as_they_were_said(region: Region, private: bool) -> None:
    """Read-only memory is brought, too; and what is private can start fresh when it is there."""
    kind = PRIVATE if private else SHARED
    core.mshare_await(BASE + START, MiB, READ, kind)
    core.mshare_await(BASE + START + MiB, MiB, BOTH, kind)
    with pytest.raises(Busy):
        region.protect(START, PAGE, 0)
    if private:
        with pytest.raises(Busy):
            core.mshare_madvise(BASE + START, PAGE, mmap.MADV_DONTNEED)
    bring(START, LENGTH)
    assert region[START : START + LENGTH] == content(START, LENGTH)

    def write() -> None:
        faulthandler.disable()
        with Region.attach("r") as own:
            own[START] = 1

    assert in_child(write).wait() == -signal.SIGSEGV
    region[START + MiB] = 5
    core.mshare_madvise(BASE + START + MiB, PAGE, mmap.MADV_DONTNEED)
    assert region[START + MiB] == (0 if private else 5)


def test_what_is_unmapped_is_awaited_no_more(region: Region) -> None:
    """Who waits there gets SIGBUS, or what is mapped instead."""
    gone, instead = looks(START), looks(START + MiB)
    waits(gone)
    waits(instead)
    region.munmap(START, MiB)
    region.mmap(START + MiB, MiB, flags=SHARED | core.MAP_FIXED)
    assert gone.wait() == -signal.SIGBUS
    assert instead.wait() == 1  # zeros, as they belong there now
    bring(START, LENGTH)
    assert region[START + MiB] == 0
    assert region.filled


def test_what_makes_no_sense_is_refused(daemon: Daemon, region: Region) -> None:
    """The errno says what it is, and nothing has changed."""
    one = Bare(daemon.mount)
    assert one.attach("r").error == 0
    memory = os.memfd_create("part")
    os.ftruncate(memory, MiB - 1)
    reader, writer = os.pipe()
    device, own = os.open("/dev/zero", os.O_RDONLY), os.open(daemon.mount / "r", os.O_RDONLY)
    path, program = os.open("/proc/self/exe", os.O_PATH), os.open("/proc/self/exe", os.O_RDONLY)
    both = 3

    def said(op: Op, *fds: int, item: tuple[int, int, int, int, int]) -> str:
        return errno.errorcode.get(one.call(op, *fds, objects=(item,)).error, "")

    try:
        for flags in (0, SHARED | PRIVATE, SHARED | mmap.MAP_ANONYMOUS):
            assert said(Op.AWAIT, item=(0, PAGE, 0, both, flags)) == "EINVAL"
        for prot in (0, mmap.PROT_WRITE, 7):
            assert said(Op.AWAIT, item=(0, PAGE, 0, prot, SHARED)) == "EINVAL"
        for offset, length in ((SIZE, PAGE), (1, PAGE), (0, 1), (0, 0), (PAGE, 1 << 63)):
            assert said(Op.AWAIT, item=(offset, length, 0, both, SHARED)) == "EINVAL"
            assert said(Op.FILL, memory, item=(offset, length, 0, 0, 0)) == "EINVAL"
        assert said(Op.FILL, item=(START, PAGE, 0, 0, 0)) == "EBADF"
        assert said(Op.FILL, memory, memory, item=(START, PAGE, 0, 0, 0)) == "EBADF"
        assert said(Op.FILL, memory, item=(START, 2 * MiB, 0, 0, 0)) == "EINVAL"
        assert said(Op.FILL, program, item=(START, PAGE, 0, 0, 0)) == "EINVAL"
        assert said(Op.FILL, path, item=(START, PAGE, 0, 0, 0)) == "EBADF"
        for fd in (reader, device):
            assert said(Op.FILL, fd, item=(START, PAGE, 0, 0, 0)) == "ENODEV"
        assert said(Op.FILL, own, item=(START, PAGE, 0, 0, 0)) == "EINVAL"
        assert said(Op.FILL, one.backing, item=(START, PAGE, 0, 0, 0)) == "ENODEV"
        other = Bare(daemon.mount)
        assert other.attach("r", oflags=os.O_RDONLY).error == 0
        item = (START, PAGE, 0, 0, 0)
        assert other.call(Op.FILL, memory, objects=(item,)).error == errno.EACCES
        other.close()
    finally:
        for fd in (memory, reader, writer, device, own, path, program):
            os.close(fd)
        one.close()
    assert daemon.field("r", "awaited") == str(LENGTH)


BARRIERS = ("bring.read", "bring.put", "bring.done", "reply.FILL")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("watched", [False, True])
def test_the_daemon_dies_while_it_is_brought(
    make_daemon: Callable[..., Daemon],
    monkeypatch: pytest.MonkeyPatch,
    watched: bool,
) -> None:
    """At each step: what was written meanwhile stays, and nothing is zeros."""
    daemon = make_daemon(f"--alignment={ALIGNMENT}", "--userfaultfd=all")
    daemon.expected.append("taking down the mount")
    may_stop(daemon)
    daemon.start()
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    for barrier in BARRIERS:
        with Region.create("r", SIZE, start=BASE, mode=0o604) as region:
            core.mshare_await(BASE + START, LENGTH, BOTH, SHARED)
            reader = _reader(daemon) if watched else None
            child = looks(START)
            waits(child)
            arm(daemon, barrier)
            brings = in_child(_attach_and_bring)
            reached(daemon)
            daemon.kill()
            daemon.start()
            assert brings.wait() == 0
            assert child.wait() == 0
            assert region[START : START + LENGTH] == content(START, LENGTH)
            assert region.filled
            if reader is not None:
                reader.kill()
            region.unlink()


def _attach_and_bring() -> None:
    with Region.attach("r"):
        bring(START, LENGTH)


def _reader(daemon: Daemon) -> Child:
    """Another user, who makes zeros wherever nothing is yet, again and again."""
    begun, ready = os.pipe()

    def touch() -> None:
        one = Bare(daemon.mount)
        proof = os.open(daemon.mount / "r", os.O_RDONLY)
        answer = one.attach("r", oflags=os.O_RDONLY, own=userfaultfd(daemon.mount, proof))
        assert answer.error == 0, answer
        at = syscalls.mmap(None, SIZE, READ, SHARED, one.backing, 0)
        os.write(ready, b"x")
        while True:
            for page in range(START, START + LENGTH, 64 * PAGE):
                with contextlib.suppress(OSError):
                    syscalls.madvise(at + page, PAGE, syscalls.MADV_POPULATE_READ)

    child = in_child(touch, uid=MALLORY)
    os.close(ready)
    assert os.read(begun, 1) == b"x"
    os.close(begun)
    daemon.expected.append("where none belong")
    return child


def test_a_reader_makes_no_zeros_of_it(
    make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whom the owner lets read it, and who touches a mapping of their own."""
    daemon = make_daemon(f"--alignment={ALIGNMENT}", "--userfaultfd=all").start()
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    with Region.create("r", SIZE, start=BASE, mode=0o604) as region:
        core.mshare_await(BASE + START, LENGTH, BOTH, SHARED)
        reader = _reader(daemon)
        eventually(
            lambda: any(Path("/dev/shm", name).stat().st_blocks for name in daemon.shm_objects()),
            "there are zeros",
        )
        others = [looks(START), looks(START + LENGTH - PAGE)]
        for each in others:
            waits(each)
        for at in range(START, START + LENGTH, MiB):
            bring(at, MiB)
        assert [each.wait() for each in others] == [0, 0]
        assert region[START : START + LENGTH] == content(START, LENGTH)
        reader.kill()
        region.unlink()
