"""Memory whose contents are brought, where windows, limits and callers are not as usual."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bare import in_child
from conftest import ALIGNMENT, BASE, PAGE, Daemon, MiB, eventually
from stops import arm, may_stop, reached
from test_awaited import (
    BOTH,
    LENGTH,
    PRIVATE,
    READ,
    SHARED,
    SIZE,
    START,
    bring,
    content,
    looks,
    waits,
)
from test_awaited import _attach_and_bring as attach_and_bring
from test_awaited import _reader as a_reader
from test_awaited import region_fixture as _region  # noqa: F401 - a fixture

from libmshare import NoMemory, Region, core
from msharefsd.linux import syscalls

pytestmark = pytest.mark.shm_only


def test_the_window_is_several_mappings(region: Region) -> None:
    """What was protected once splits it, and so does what its process asks of the kernel."""
    region.mmap(0, START, flags=SHARED | core.MAP_FIXED)
    region.protect(PAGE, PAGE, READ)
    region.protect(START - PAGE, PAGE, READ)
    core.mshare_await(BASE, START + LENGTH, BOTH, SHARED)
    bring(0, START + LENGTH)
    assert region.filled
    assert region[: START + LENGTH] == content(0, START + LENGTH)


def test_who_has_no_window_holds_nobody_up(region: Region) -> None:
    """It is tried again and again to put what it brings, and others' calls come between."""

    def brings() -> None:
        with Region.attach("r"):
            syscalls.munmap(BASE + START, LENGTH)
            os.write(begun, b"x")
            with contextlib.suppress(OSError):
                bring(START, LENGTH)
            os.write(begun, b"y")

    begins, begun = os.pipe()
    child = in_child(brings)
    assert os.read(begins, 1) == b"x"
    time.sleep(0.3)
    region.mmap(0, PAGE, flags=SHARED | core.MAP_FIXED)
    assert select.select([begins], [], [], 0)[0] == []
    child.kill()
    os.close(begins)
    os.close(begun)
    bring(START, LENGTH)
    assert region[START : START + LENGTH] == content(START, LENGTH)


@pytest.mark.parametrize("shared", [True, False])
def test_who_touched_a_hole_has_what_comes_there(region: Region, shared: bool) -> None:
    """SIGBUS was right before, and is there until that has come: it never reads zeros."""
    at = START + LENGTH

    def touches() -> None:
        with Region.attach("r") as own:
            for goes_on, _ in steps:
                for page in range(at, at + MiB, 2 * PAGE):
                    with pytest.raises(OSError, match="Memory page has hardware error"):
                        syscalls.madvise(BASE + page, PAGE, syscalls.MADV_POPULATE_READ)
                os.write(touched, b"x")
                os.read(goes_on, 1)
            assert own[at : at + MiB] == content(at, MiB)

    touching, touched = os.pipe()
    steps = [os.pipe() for _ in range(2)]
    children = [in_child(touches) for _ in range(2)]
    for _ in children:
        os.read(touching, 1)
    core.mshare_await(BASE + at, MiB, BOTH, SHARED if shared else PRIVATE)
    os.write(steps[0][1], b"xx")
    for _ in children:
        os.read(touching, 1)
    other = looks(at)
    waits(other)
    bring(at, MiB)
    assert other.wait() == 0
    os.write(steps[1][1], b"xx")
    assert [child.wait() for child in children] == [0, 0]
    for fd in (touching, touched, *steps[0], *steps[1]):
        os.close(fd)


def test_what_is_brought_counts_for_the_limit_on_objects(
    make_daemon: Callable[..., Daemon], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To bring every other page makes no more of them than there may be."""
    (directory / "config").write_text("[limits.user.root]\nobjects = 4\n")
    daemon = make_daemon(f"--alignment={ALIGNMENT}", f"--config={directory / 'config'}")
    daemon.expected.append("user 0 may have 4 objects")
    daemon.start()
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    with Region.create("r", SIZE, start=BASE, empty=True) as region:
        core.mshare_await(BASE + START, LENGTH, BOTH, SHARED)
        bring(START, PAGE)
        bring(START + PAGE, PAGE)
        bring(START + 3 * PAGE, PAGE)
        with pytest.raises(NoMemory):
            bring(START + 5 * PAGE, PAGE)
        assert daemon.field("r", "objects") == "4"
        bring(START + 4 * PAGE, PAGE)
        bring(START, LENGTH)
        assert region[START : START + LENGTH] == content(START, LENGTH)
        region.unlink()


@pytest.fixture
def tight(make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch) -> Daemon:
    """A daemon where a region has no more memory than what is brought."""
    daemon = make_daemon(
        f"--alignment={ALIGNMENT}", "--userfaultfd=all", f"--region-memory={LENGTH}"
    )
    daemon.expected.append("taking down the mount")
    may_stop(daemon)
    daemon.start()
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    return daemon


def test_what_is_there_needs_no_room(tight: Daemon) -> None:
    """The daemon dies when it has put what fills the region up: it is not counted twice."""
    with Region.create("r", SIZE, start=BASE, empty=True) as region:
        core.mshare_await(BASE + START, LENGTH, BOTH, SHARED)
        bring(START + 2 * MiB, 2 * MiB)
        arm(tight, "bring.put")
        brings = in_child(attach_and_bring)
        reached(tight)
        tight.kill()
        tight.start()
        assert brings.wait() == 0
        assert region[START : START + LENGTH] == content(START, LENGTH)
        region.unlink()


def test_what_a_reader_makes_leaves_room(tight: Daemon) -> None:
    """Zeros that do not belong there are taken out for what does."""
    tight.expected.append("no memory for")
    with Region.create("r", SIZE, start=BASE, mode=0o604, empty=True) as region:
        core.mshare_await(BASE + START, LENGTH, BOTH, SHARED)
        reader = a_reader(tight)
        eventually(
            lambda: any(Path("/dev/shm", name).stat().st_blocks for name in tight.shm_objects()),
            "there are zeros",
        )
        reader.kill()
        bring(START, LENGTH)
        assert region[START : START + LENGTH] == content(START, LENGTH)
        region.unlink()


def test_to_say_it_again_after_a_daemon_died_changes_nothing(
    make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer was lost; until the call is made again somebody else has brought it."""
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    daemon.expected.append("taking down the mount")
    may_stop(daemon)
    daemon.start()
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))

    def awaits() -> None:
        with Region.attach("r"):
            core.mshare_await(BASE + START, LENGTH, BOTH, SHARED)

    with Region.create("r", SIZE, start=BASE, empty=True) as region:
        arm(daemon, "reply.AWAIT")
        child = in_child(awaits)
        reached(daemon)
        os.kill(child.pid, signal.SIGSTOP)
        daemon.kill()
        daemon.start()
        bring(START, LENGTH)
        region[START] = 77
        os.kill(child.pid, signal.SIGCONT)
        assert child.wait() == 0
        assert region.filled
        assert region[START] == 77
        region.unlink()
