"""Whatever ends a daemon at whatever step, and whatever becomes of its journal then.

No region is lost that a person would say need not be: either the next daemon has all of it,
or it says in a sentence what is missing, changes nothing, and has all of it when that is back
in its place.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ALIGNMENT, Daemon, clients, eventually, taken_down, temporary, watched
from test_lost_state import checkpoint, journals
from test_restart import MATRIX, STALE, Stage, dies_at, stopped

from msharefsd.linux import syscalls

pytestmark = pytest.mark.shm_only
LACKS = "does not know of memory of user 0's regions"


class Series:
    """A daemon and two clients for many steps, one after the other: each begins with new memory.

    What a step leaves behind when it fails is thrown away with them.
    """

    def __init__(self, program: Path, *, cramped: bool) -> None:
        """`cramped`: the run directory is on a small file system."""
        self._program = program
        self._cramped = cramped
        self._stack = contextlib.ExitStack()
        self._stage: Stage | None = None
        self.disk = Path()

    def step(self) -> Stage:
        """The stage, set up."""
        if self._stage is None or not self._stage.left:
            self.close()
            self._stage = self._begin()
        self._stage.set_up()
        return self._stage

    def _begin(self) -> Stage:
        enter = self._stack.enter_context
        directory = enter(temporary())
        daemon = Daemon(directory, f"--alignment={ALIGNMENT}")
        daemon.expected += [STALE, LACKS, "cannot be used", "No space left", "make room"]
        daemon.expected += ["cannot be written", "cannot write"]
        daemon.variables = {"MSHAREFSD_PARK": f"@{directory / 'barrier'}"}
        if self._cramped:
            self.disk = enter(_small_file_system(directory / "disk"))
            daemon.run = self.disk / "run"
        enter(taken_down([daemon]))
        with watched([daemon]):
            daemon.start()
        start = enter(clients(self._program, daemon))
        return Stage(daemon, start(), start(), directory, start)

    def close(self) -> None:
        """Everything goes."""
        stage, self._stage = self._stage, None
        failed = stage is not None and not stage.left
        with contextlib.suppress(BaseException) if failed else contextlib.nullcontext():
            self._stack.close()
        self._stack = contextlib.ExitStack()


@contextlib.contextmanager
def _small_file_system(place: Path) -> Iterator[Path]:
    place.mkdir()
    syscalls.mount("small", str(place), "tmpfs", 0, "size=4m,mode=755")
    try:
        yield place
    finally:
        syscalls.umount(str(place), syscalls.MNT_DETACH)


def _series(cramped: bool, program: Path) -> Iterator[Series]:
    made = Series(program, cramped=cramped)
    yield made
    made.close()


@pytest.fixture(scope="module", name="series")
def series_fixture(client_program: Path) -> Iterator[Series]:
    yield from _series(False, client_program)


@pytest.fixture(scope="module", name="cramped_series")
def cramped_series_fixture(client_program: Path) -> Iterator[Series]:
    yield from _series(True, client_program)


@pytest.fixture
def stage(series: Series) -> Iterator[Stage]:
    made = series.step()
    with watched([made.daemon]):
        yield made


@pytest.fixture
def cramped(cramped_series: Series) -> Iterator[Stage]:
    made = cramped_series.step()
    with watched([made.daemon]):
        yield made


def arm(daemon: Daemon, barrier: str) -> None:
    """It runs, and will stop there."""
    file = daemon.directory / "barrier"
    file.with_suffix(".new").write_text(barrier)
    file.with_suffix(".new").rename(file)


def reached(daemon: Daemon) -> None:
    """Wait until it is there; it would not stop there again."""
    eventually(lambda: any(map(stopped, daemon.processes())), "the barrier")
    (daemon.directory / "barrier").unlink()


@pytest.mark.parametrize("barrier", MATRIX)
def test_it_is_stopped_at(stage: Stage, barrier: str) -> None:
    """SIGTERM comes in the middle of it."""

    def stop(daemon: Daemon) -> None:
        reached(daemon)
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.thaw()
        daemon.halt()

    dies_at(stage, barrier, MATRIX[barrier], stop, arm)


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
def test_its_journal_is_lost_at(stage: Stage, barrier: str) -> None:
    """It is killed; the journal is removed, and put back as it was before the call."""
    daemon = stage.daemon
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

    dies_at(stage, barrier, MATRIX[barrier], lose, arm)


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
