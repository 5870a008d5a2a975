"""Whatever ends a daemon at whatever step, and whatever becomes of its journal then.

No region is lost that a person would say need not be: either the next daemon has all of it,
or it says in a sentence what is missing, changes nothing, and has all of it when that is back
in its place.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ALIGNMENT, Daemon, clients, eventually
from test_lost_state import checkpoint, journals
from test_restart import MATRIX, STALE, Stage, dies_at, parked, stopped
from test_restart import stage_fixture as _stage_fixture  # noqa: F401 - what the tests ask for

from msharefsd.linux import syscalls

pytestmark = pytest.mark.shm_only
LACKS = "does not know of memory of user 0's regions"


@pytest.mark.parametrize("barrier", MATRIX)
def test_it_is_stopped_at(stage: Stage, barrier: str) -> None:
    """SIGTERM comes in the middle of it."""

    def stop(daemon: Daemon) -> None:
        eventually(lambda: any(map(stopped, daemon.processes())), "the barrier")
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.thaw()
        daemon.halt()

    dies_at(stage, barrier, MATRIX[barrier], stop)


def _starts(daemon: Daemon) -> bool:
    """Whether a daemon starts now; if not, it says what is missing."""
    before = sorted(daemon.shm_objects())
    if daemon.begins():
        return True
    assert LACKS in daemon.log(), daemon.log()
    assert sorted(daemon.shm_objects()) == before, "nothing was changed"
    return False


@pytest.mark.parametrize("barrier", MATRIX)
def test_its_journal_is_lost_at(stage: Stage, barrier: str) -> None:
    """It is killed; the journal is removed, and put back as it was before the call."""
    daemon = stage.daemon
    daemon.expected += [LACKS, "cannot be used"]
    older: list[bytes] = []

    def remember() -> None:
        checkpoint(daemon)
        older.append((journals(daemon) / "journal.sqlite").read_bytes())

    def lose(daemon: Daemon) -> None:
        parked(daemon)
        checkpoint(daemon)
        journal = journals(daemon) / "journal.sqlite"
        right = journal.read_bytes()
        journal.unlink()
        assert not _starts(daemon)
        # Of poison that was put since nobody would know: a page that is SIGBUS, and not lost.
        if not barrier.startswith("violation"):
            journal.write_bytes(older[0])
            if _starts(daemon):
                return  # nothing of the call was written yet: it is as good
        journal.write_bytes(right)

    dies_at(stage, barrier, MATRIX[barrier], lose, remember)


# -- no room --


@pytest.fixture
def disk(directory: Path) -> Iterator[Path]:
    """A small file system for a run directory."""
    place = directory / "disk"
    place.mkdir()
    syscalls.mount("small", str(place), "tmpfs", 0, "size=4m,mode=755")
    yield place
    syscalls.umount(str(place), syscalls.MNT_DETACH)


@pytest.fixture
def cramped(
    disk: Path, make_daemon: Callable[..., Daemon], client_program: Path, directory: Path
) -> Iterator[Stage]:
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    daemon.run = disk / "run"
    daemon.start()
    daemon.expected += [STALE, "cannot be written", "cannot write"]
    with clients(client_program, daemon) as start:
        made = Stage(daemon, start(), start(), directory, start)
        made.set_up()
        yield made


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
def test_there_is_no_room_for_its_journal_at(cramped: Stage, disk: Path, barrier: str) -> None:
    """It goes on without room, and is killed."""
    daemon = cramped.daemon

    def go_on(daemon: Daemon) -> None:
        eventually(lambda: any(map(stopped, daemon.processes())), "the barrier")
        filler = fill(disk)
        daemon.thaw()
        time.sleep(0.1)
        daemon.kill()
        filler.unlink()

    dies_at(cramped, barrier, MATRIX[barrier], go_on, may_refuse="-28")
    assert daemon.process is not None


def test_a_start_without_room_says_so_and_changes_nothing(cramped: Stage, disk: Path) -> None:
    daemon = cramped.daemon
    daemon.halt()
    filler = fill(disk)
    daemon.expected += ["No space left", "make room"]
    if daemon.begins():
        daemon.kill()
    assert "Traceback" not in daemon.log()
    filler.unlink()
    daemon.start()
    cramped.check()
    cramped.leave()
