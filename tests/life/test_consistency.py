"""Whatever ends a daemon at whatever step, and whatever becomes of its journal then.

No region is lost that a person would say need not be: either the next daemon has all of it,
or it says in a sentence what is missing, changes nothing, and has all of it when that is back
in its place.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, PAGE, Daemon, clients, eventually, watched
from stops import arm, reached
from test_lost_state import checkpoint, journals
from test_restart import (
    LACKS,
    MATRIX,
    STALE,
    Series,
    Stage,
    dies_at,
    series_for,
    small_file_system,
    touch_everything,
)
from test_restart import series_fixture as _series_fixture  # noqa: F401 - what the tests ask for
from test_restart import step_fixture as _step_fixture  # noqa: F401 - the same

pytestmark = pytest.mark.shm_only


@pytest.fixture(scope="module", name="cramped_series")
def cramped_series_fixture(client_program: Path) -> Iterator[Series]:
    yield from series_for(client_program, cramped=True)


@pytest.fixture
def cramped(cramped_series: Series) -> Iterator[Stage]:
    made = cramped_series.step()
    with watched([made.daemon]):
        yield made


@pytest.mark.parametrize("barrier", MATRIX)
def test_it_is_stopped_at(step: Stage, barrier: str) -> None:
    """SIGTERM comes in the middle of it."""

    def stop(daemon: Daemon) -> None:
        reached(daemon)
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.thaw()
        daemon.halt()

    dies_at(step, barrier, MATRIX[barrier], stop, arm)


def _starts(daemon: Daemon) -> bool:
    """Whether a daemon starts now; if not, it says what is missing."""
    before, said = sorted(daemon.shm_objects()), daemon.log().count(LACKS)
    if daemon.begins():
        return True
    assert daemon.log().count(LACKS) > said, daemon.log()
    assert sorted(daemon.shm_objects()) == before, "nothing was changed"
    return False


def _journal_now(daemon: Daemon) -> bytes:
    """What a pager's journal would be if it died now; it has nothing to do."""
    with tempfile.TemporaryDirectory() as name:
        for file in journals(daemon).glob("journal.sqlite*"):
            if not file.name.endswith("-shm"):
                shutil.copy(file, name)
        copy = Path(name, "journal.sqlite")
        with contextlib.closing(sqlite3.connect(copy)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return copy.read_bytes()


@pytest.mark.parametrize("barrier", MATRIX)
def test_its_journal_is_lost_at(step: Stage, barrier: str) -> None:
    """It is killed; the journal is removed, and put back as it was before the call."""
    daemon = step.daemon
    older = _journal_now(daemon)

    def lose(daemon: Daemon) -> None:
        reached(daemon)
        daemon.kill()
        checkpoint(daemon)
        journal = journals(daemon) / "journal.sqlite"
        right = journal.read_bytes()
        journal.unlink()
        assert not _starts(daemon)
        # Of poison that was put since nobody would know: a page that is SIGBUS, and not lost.
        if not barrier.startswith("violation"):
            journal.write_bytes(older)
            if _starts(daemon):
                return  # nothing of the call was written yet: it is as good
        journal.write_bytes(right)

    dies_at(step, barrier, MATRIX[barrier], lose, arm)


# -- no room --


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return filler


@pytest.mark.parametrize("barrier", MATRIX)
def test_there_is_no_room_for_its_journal_at(
    cramped: Stage, cramped_series: Series, barrier: str
) -> None:
    """It goes on without room, as far as an answer or for a moment, and is killed."""

    def go_on(daemon: Daemon) -> None:
        reached(daemon)
        filler = fill(cramped_series.disk)
        daemon.thaw()
        pipes = [each.process.stdout for each in (cramped.first, cramped.second)]
        select.select([each.fileno() for each in pipes if each is not None], [], [], 0.1)
        daemon.kill()
        filler.unlink()

    dies_at(cramped, barrier, MATRIX[barrier], go_on, arm, may_refuse="-28")


@pytest.mark.parametrize(
    ("barrier", "next_one"),
    [
        ("mmap", "recovery.sharers"),  # what was to be cleared is
        ("backing.stashed", "recovery.regions"),  # what was being moved is where it was
    ],
)
def test_there_is_no_room_when_the_next_one_takes_over(
    cramped: Stage, cramped_series: Series, barrier: str, next_one: str
) -> None:
    """It waits for some, and does not fail."""
    daemon = cramped.daemon
    if barrier == "backing.stashed":  # written down where somebody untrusted reads
        daemon.expected.append("where none belong")
        end = touch_everything(daemon)

    def go_on(daemon: Daemon) -> None:
        reached(daemon)
        daemon.kill()
        checkpoint(daemon)  # a log of some length has room
        arm(daemon, next_one)
        daemon.launch()
        reached(daemon)
        said = daemon.log().count("cannot be written")
        filler = fill(cramped_series.disk)
        daemon.thaw()
        eventually(lambda: daemon.log().count("cannot be written") > said, "there is no room")
        filler.unlink()

    try:
        dies_at(cramped, barrier, MATRIX[barrier], go_on, arm)
    finally:
        if barrier == "backing.stashed":
            end()
    assert "the pager has failed" not in daemon.log()


def test_a_write_that_goes_to_a_file_waits_for_room(
    make_daemon: Callable[..., Daemon], client_program: Path, directory: Path
) -> None:
    """The next daemon knows of it: it is in the file, whoever died."""
    file, length = directory / "file", 64 * PAGE
    file.write_bytes(b"f" * length)
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    daemon.expected += [STALE, "cannot be written"]
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_file_system(directory / "disk", "8m"))
        daemon.run = disk / "run"
        daemon.start()
        stack.callback(daemon.halt)
        start = stack.enter_context(clients(client_program, daemon))
        client = start()
        client.ok("mshare", "r", BASE, ALIGNMENT, os.O_CREAT | os.O_RDWR, 0o600)
        client.ok("mmap", BASE, length, 3, mmap.MAP_SHARED | 0x10, file, os.O_RDWR, 0)
        assert client.do("load", BASE) == str(ord("f"))
        filler = fill(disk)
        client.send("fill", BASE, length, 2)
        eventually(lambda: "cannot be written" in daemon.log(), "there is no room")
        assert not client.has_result()
        daemon.kill()
        filler.unlink()
        daemon.start()
        assert client.result() == "0"
        daemon.kill()
        daemon.start()
        client.ok("msync", BASE, length, 4)
        assert file.read_bytes()[::PAGE] == b"\2" * 64
        client.ok("unlink", "r")


def test_a_start_without_room_says_so_and_changes_nothing(
    cramped: Stage, cramped_series: Series
) -> None:
    daemon = cramped.daemon
    daemon.halt()
    filler = fill(cramped_series.disk)
    if daemon.begins():
        daemon.kill()
    assert "Traceback" not in daemon.log()
    filler.unlink()
    daemon.start()
    cramped.check()
    cramped.leave()
