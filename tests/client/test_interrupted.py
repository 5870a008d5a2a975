"""Calls that wait for a daemon: signal handlers run, and may end them."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator

import pytest
from conftest import ALIGNMENT, Daemon, eventually

from libmshare import Region, holding

PAGE = 4096


class AlarmError(OSError):
    """As the TimeoutError that many a program raises."""


def nothing_is_held() -> bool:
    gc.collect()  # what an exception's frames keep
    return holding.held() == []


@pytest.fixture(autouse=True)
def root(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a client, too; it must have detached when a test is over."""
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    yield
    eventually(nothing_is_held, "nothing is held")


@contextlib.contextmanager
def alarms(handler: Callable[[], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def frozen(daemon: Daemon) -> Iterator[None]:
    daemon.freeze()
    try:
        yield
    finally:
        daemon.thaw()


def ring() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    raise AlarmError


def is_ended(call: Callable[[], object]) -> bool:
    """Whether the alarm's error comes from it."""
    with alarms(ring):
        try:
            call()
        except AlarmError:
            return True
    return False


def test_a_handlers_error_ends_every_call(daemon: Daemon) -> None:
    region = Region.create("r", "1M")
    calls: list[Callable[[], object]] = [
        lambda: Region.create("new", "1M"),
        lambda: Region.create("r", "1M", exist_ok=True),
        lambda: Region.attach("r"),
        lambda: Region.attach(region.identity).close(),
        lambda: region.munmap(0, PAGE),
        lambda: region.mmap(0, PAGE),
        lambda: region.protect(PAGE, PAGE, 1),
        region.flush,
        lambda: region.populate(8 * PAGE, PAGE),
        region.unlink,
    ]
    # (An identity that this process has is attached without a question.)
    at_once = {3}
    with frozen(daemon):
        for number, call in enumerate(calls):
            assert is_ended(call) == (number not in at_once), number
    region.close()
    calls.clear()
    # What a call had not done when it was ended is undone when the daemon answers.
    eventually(lambda: not (daemon.mount / "new").exists(), "no name is left")
    eventually(lambda: not (daemon.mount / "r").exists(), "it has no name any more")


def test_a_handlers_error_ends_the_calls_of_a_heap(daemon: Daemon) -> None:
    """And a TimeoutError of its own is not taken for one of ours."""

    def late() -> None:
        ring_once()
        raise TimeoutError

    def ring_once() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    with Region.create(size="64M", heap=True, ephemeral=True) as region:
        used = region.full(8 << 20, 1, "u1")
        before = region.check_heap().pieces
        with frozen(daemon):
            with alarms(late), pytest.raises(TimeoutError):
                region.zeros(8 << 20, "u1")
            assert is_ended(lambda: region.zeros(8 << 20, "u1"))
            assert is_ended(lambda: region.free(used))
        eventually(lambda: region.check_heap().pieces == before - 1, "nothing is half done")
        assert not region.zeros(8 << 20, "u1").any()


def test_a_handler_that_only_runs_changes_nothing(daemon: Daemon) -> None:
    calls: list[Callable[[], Region]] = [
        lambda: Region.create("r", "1M"),
        lambda: Region.attach("r"),
        lambda: Region.attach("r"),
    ]
    for number, call in enumerate(calls):
        rung: list[int] = []

        def thaw(rung: list[int] = rung) -> None:
            rung.append(1)
            if len(rung) == 3:
                daemon.thaw()

        with frozen(daemon), alarms(thaw):
            region = call()
        assert len(rung) >= 3
        region.buf[number] += 1
        assert bytes(region.buf[: number + 1]) == b"\1" * (number + 1)
        region.close()
    with Region.attach("r") as region:
        region.unlink()


def test_the_wait_for_the_next_daemon_is_interruptible(daemon: Daemon) -> None:
    with Region.create("r", ALIGNMENT) as region:
        daemon.kill()
        daemon.expected.append("taking down the mount")
        for call in (lambda: Region.attach("r"), lambda: region.munmap(0, PAGE), region.unlink):
            assert is_ended(call)
        daemon.start()
        # They go on by themselves.
        eventually(lambda: not (daemon.mount / "r").exists(), "it has no name any more")


def test_a_thread_that_waits_holds_up_no_fork(daemon: Daemon) -> None:
    entered = threading.Event()
    found: list[Region] = []

    def create() -> None:
        entered.set()
        found.append(Region.create("s", "1M"))

    with frozen(daemon):
        thread = threading.Thread(target=create)
        thread.start()
        entered.wait()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    thread.join()
    with found.pop() as region:
        region.unlink()


def test_the_end_of_the_interpreter_waits_for_nobody(daemon: Daemon) -> None:
    """What is alive then is detached by the end of the process."""
    program = """
        import os, signal
        from libmshare import Region
        regions = [Region.create(size="64K", ephemeral=True) for _ in range(5)]
        arrays = [region.buf for region in regions]
        closed = regions.pop()
        for region in regions[:2]:
            region.close()
        for pid in map(int, os.environ["PIDS"].split()):
            os.kill(pid, signal.SIGSTOP)
    """
    pids = " ".join(map(str, daemon.processes()))
    try:
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            check=True,
            timeout=60,
            env={**os.environ, "PIDS": pids},
        )
    finally:
        daemon.thaw()


def test_letting_go_waits_for_nobody_for_long(daemon: Daemon) -> None:
    region = Region.create("a", "64K")
    with frozen(daemon):
        region.close()
    eventually(lambda: daemon.sharers("a") == 0, "it is let go")
