"""Memory whose contents are brought, and nobody brings them any more: who waits has SIGBUS.

Never zeros, and never for good: when somebody brings them after all, they are right.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare import in_child
from conftest import ALIGNMENT, BASE, PAGE, Daemon, MiB, eventually
from test_awaited import BOTH, LENGTH, MALLORY, SHARED, SIZE, START, bring, content, looks, waits

from libmshare import ImageError, Region, core
from msharefsd.paging import awaiting
from msharefsd.paging.awaiting import PIECE, Awaiting
from msharefsd.paging.window import Window

pytestmark = pytest.mark.shm_only
NOBODY_BRINGS = "no process that brings them was heard of"


class Watched:
    """A daemon that gives up soon, with a region whose contents nobody brings."""

    def __init__(self, daemon: Daemon, region: Region) -> None:
        self.daemon = daemon
        self.region = region

    def is_given_up(self) -> None:
        eventually(lambda: self.daemon.field("r", "bringer") == "given up", "it is given up")

    def logged(self) -> int:
        """How often it was said."""
        return len(re.findall(NOBODY_BRINGS, self.daemon.log()))


@pytest.fixture(name="watched")
def watched_fixture(
    make_daemon: Callable[..., Daemon],
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Watched]:
    """A parameter is one option more."""
    config = directory / "soon.toml"
    config.write_text("fill_seconds = 3\n")
    options = [f"--config={config}", f"--alignment={ALIGNMENT}", "--userfaultfd=all"]
    daemon = make_daemon(*options, *getattr(request, "param", ()))
    daemon.expected += [NOBODY_BRINGS, "taking down the mount"]
    daemon.start()
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    with Region.create("r", SIZE, start=BASE, mode=0o604, empty=True) as made:
        core.mshare_await(BASE + START, LENGTH, BOTH, SHARED)
        yield Watched(daemon, made)
        made.unlink()


class Writer:
    """A process that hands memory of the region to write(2), again and again."""

    def __init__(self, at: int, uid: int = 0) -> None:
        self.told, write = os.pipe()
        reader, self.order = os.pipe()

        def run() -> None:
            with Region.attach("r", readonly=bool(uid)) as own:
                for _ in iter(lambda: os.read(reader, 1), b"."):
                    into = os.memfd_create("copy")
                    with memoryview(own.buf)[at : at + PAGE] as page:
                        try:
                            os.write(into, page)
                        except OSError as error:
                            os.write(write, f"{error.errno}\n".encode())
                            continue
                    right = os.pread(into, PAGE, 0) == content(at, PAGE)
                    os.write(write, b"right\n" if right else b"wrong\n")

        self.child = in_child(run, uid=uid)
        os.close(write)
        os.close(reader)

    def ask(self) -> None:
        os.write(self.order, b"x")

    def answer(self) -> str:
        return os.read(self.told, 100).decode().strip()

    def end(self) -> int:
        os.write(self.order, b".")
        os.close(self.order)
        os.close(self.told)
        return self.child.wait()


def test_who_waits_has_sigbus_when_nobody_brings_it(watched: Watched) -> None:
    """Code has SIGBUS, a system call EFAULT; the log says it once, and what to do."""
    code, call = looks(START), Writer(START + MiB)
    waits(code)
    call.ask()
    assert code.wait() == -signal.SIGBUS
    assert call.answer() == str(errno.EFAULT)
    watched.is_given_up()
    assert watched.daemon.field("r", "awaited") == str(LENGTH)
    text = watched.daemon.log()
    assert re.search(rf"region r: {LENGTH} bytes .*{NOBODY_BRINGS}.*`mshare pull`", text)
    again = looks(START)  # a process that comes now
    assert again.wait() == -signal.SIGBUS
    assert watched.logged() == 1
    with pytest.raises(ImageError) as caught:
        watched.region.wait_filled()
    assert caught.value.errno == errno.EIO and "user 0" in str(caught.value)
    with pytest.raises(ImageError, match="pull it again"):
        watched.region.populate(START + 2 * MiB, PAGE)
    # And then somebody brings it: who had EFAULT has what belongs there.
    bring(START, LENGTH)
    call.ask()
    assert call.answer() == "right"
    assert call.end() == 0
    assert watched.region.filled and watched.daemon.field("r", "bringer") == "-"
    assert watched.region[START : START + LENGTH] == content(START, LENGTH)


def test_who_brings_again_is_waited_for_again(watched: Watched) -> None:
    """As soon as it says so; what has come of it is right, and the rest waits."""
    call = Writer(START)
    call.ask()
    assert call.answer() == str(errno.EFAULT)
    assert core.mshare_fill(BASE, 0, -1) == START  # where somebody has waited
    assert watched.daemon.field("r", "bringer") == str(os.getpid())
    late = looks(START + MiB)
    waits(late)
    bring(START + MiB, MiB)
    assert late.wait() == 0
    bring(START, PAGE)
    call.ask()
    assert call.answer() == "right"
    assert call.end() == 0


@pytest.mark.parametrize("before", [False, True])
def test_the_next_daemon_gives_up_as_well(watched: Watched, before: bool) -> None:
    """Whoever waits; and it knows who had EFAULT before."""
    calls = [Writer(START), Writer(START, MALLORY)] if before else []
    for each in calls:
        each.ask()
        assert each.answer() == str(errno.EFAULT)
    child = looks(START + 2 * MiB)
    waits(child)
    watched.daemon.kill()
    watched.daemon.start()
    assert child.wait() == -signal.SIGBUS
    watched.is_given_up()
    bring(START, LENGTH)
    for each in calls:
        each.ask()
        assert each.answer() == "right"
        assert each.end() == 0
    child = looks(START + 2 * MiB)
    assert child.wait() == 0


@pytest.mark.parametrize("watched", [("--without=poison",)], indirect=True)
def test_on_a_kernel_without_poison(watched: Watched) -> None:
    """It is a signal, and the next process that touches it when it is there has it."""
    watched.daemon.expected.append("UFFDIO_POISON")
    assert looks(START).wait() == -signal.SIGBUS
    bring(START, LENGTH)
    assert looks(START).wait() == 0


def test_another_user_does_not_wait_for_ever(watched: Watched) -> None:
    """Who may only read it, and has it by a lane."""
    call = Writer(START, MALLORY)

    def look() -> None:
        faulthandler.disable()
        with Region.attach("r", readonly=True) as own:
            assert own[START : START + PAGE] == content(START, PAGE)

    def told() -> None:
        with Region.attach("r", readonly=True) as own, contextlib.suppress(ImageError):
            own.wait_filled(30)
            os._exit(2)

    call.ask()
    assert call.answer() == str(errno.EFAULT)
    assert in_child(look, uid=MALLORY).wait() == -signal.SIGBUS
    assert in_child(told, uid=MALLORY).wait() == 0
    bring(START, LENGTH)
    call.ask()
    assert call.answer() == "right"
    assert call.end() == 0
    assert in_child(look, uid=MALLORY).wait() == 0


def test_what_nobody_touches_is_given_up_as_well(watched: Watched) -> None:
    """That is said; whoever brings it takes it back."""
    watched.is_given_up()
    assert watched.logged() == 1
    assert core.mshare_fill(BASE, 0, -1) is None
    assert watched.daemon.field("r", "bringer") != "given up"
    bring(START, LENGTH)
    assert watched.region[START : START + LENGTH] == content(START, LENGTH)


# -- who is refused, and when --


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(name="clock")
def clock_fixture(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(awaiting, "time", clock)
    return clock


class OneWindow:
    size = 4 * PIECE - PAGE


def window() -> Window:
    return OneWindow()  # type: ignore[return-value] # all that is asked of one


def test_each_waits_from_when_it_came(clock: Clock) -> None:
    """Whoever has waited for less goes on; and who was refused is so until somebody brings."""
    waiting, one, other = Awaiting(), window(), window()
    assert waiting.add(one, PAGE) and waiting.add(one, 3 * PIECE)
    clock.now += 10
    assert waiting.add(one, 2 * PAGE) and waiting.add(other, PAGE)  # (the first piece once more)
    assert list(waiting.refuse(clock.now - 5)) == [
        (one, 0, PIECE),
        (one, 3 * PIECE, OneWindow.size),
    ]
    assert waiting and not waiting.add(one, PIECE - PAGE) and waiting.add(one, PIECE)
    assert waiting.add(other, 2 * PAGE)
    assert not list(waiting.refuse(clock.now - 5))
    waiting.brings(anew=False)
    assert waiting.heard == clock.now
    assert waiting.add(one, PAGE)
    waiting.forget(one)
    waiting.forget(other)
    assert not waiting


def test_who_brings_anew_is_told_of_all_who_wait(clock: Clock) -> None:
    """The one before had been told, and has died with it."""
    waiting, one, other = Awaiting(), window(), window()
    for number, each in enumerate((2 * PIECE, PAGE, 3 * PIECE)):
        clock.now += 1
        waiting.add(other if number == 1 else one, each)
    assert waiting.wanted() == 2 * PIECE and waiting.wanted() == PAGE
    waiting.brings(anew=False)
    assert [waiting.wanted(), waiting.wanted()] == [3 * PIECE, None]
    waiting.brings(anew=True)
    assert [waiting.wanted() for _ in range(4)] == [2 * PIECE, PAGE, 3 * PIECE, None]


def test_what_has_come_is_not_refused(clock: Clock) -> None:
    waiting, one = Awaiting(), window()
    waiting.add(one, PAGE)
    assert waiting.wanted() == PAGE and waiting.wanted() is None
    assert list(waiting.brought(0, PIECE)) == [(one, 0, PIECE)]
    clock.now += 10
    assert not list(waiting.refuse(clock.now))
