"""State is never guessed: memory that no journal knows is kept, named, and waited for.

And memory that loses its name under a living daemon is saved.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bare import in_child
from conftest import ALIGNMENT, BASE, BIN, Client, Daemon, clients, eventually
from test_restart import ANONYMOUS, FIXED, SHARED, Stage
from test_restart import stage_fixture as _stage_fixture  # noqa: F401 - what the tests ask for

from msharefsd.memory import names

pytestmark = pytest.mark.shm_only
SHM = Path("/dev/shm")
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SIZE = 2 * ALIGNMENT
MALLORY = 1666
STALE = "taking down the mount"


def journals(daemon: Daemon) -> Path:
    return daemon.run / "users" / str(os.getuid())


def checkpoint(daemon: Daemon) -> None:
    """Have all of a dead pager's journal in one file."""
    with contextlib.closing(sqlite3.connect(journals(daemon) / "journal.sqlite")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _removed(daemon: Daemon) -> None:
    for file in journals(daemon).glob("journal.sqlite*"):
        file.unlink()


def _emptied(daemon: Daemon) -> None:
    _removed(daemon)
    (journals(daemon) / "journal.sqlite").touch(0o600)


def _without_directory(daemon: Daemon) -> None:
    shutil.rmtree(journals(daemon))


def _without_anything(daemon: Daemon) -> None:
    shutil.rmtree(daemon.run / "users")
    for file in daemon.run.glob("names.sqlite*"):
        file.unlink()


def refuses(daemon: Daemon, complaint: str) -> str:
    daemon.launch()
    assert daemon.process is not None
    assert daemon.process.wait(30) == 3
    daemon.process = None
    daemon.expected.append(complaint)
    (line,) = [line for line in daemon.log().splitlines() if complaint in line]
    daemon.log_file.write_text("")
    return line


@pytest.mark.parametrize("ended", ["killed", "stopped"])
@pytest.mark.parametrize(
    "damage",
    [_removed, _emptied, _without_directory, _without_anything],
    ids=lambda each: each.__name__,
)
def test_a_journal_that_is_missing_stops_the_start(
    stage: Stage, damage: Callable[[Daemon], None], ended: str
) -> None:
    daemon = stage.daemon
    if ended == "killed":
        daemon.kill()
        checkpoint(daemon)
    else:
        daemon.halt()
    daemon.expected.append(STALE)
    kept = daemon.directory / "kept"
    shutil.copytree(daemon.run, kept, ignore=lambda _, files: [f for f in files if f == "keeper"])
    damage(daemon)
    before = sorted(daemon.shm_objects())
    for _ in range(2):
        line = refuses(daemon, "does not know of memory of user 0's regions")
        assert f"{journals(daemon)}/journal.sqlite" in line
        for name in before:
            assert f"/dev/shm/{name} (" in line
        assert "put the right one in its place" in line
        assert "--purge --force" in line
    assert sorted(daemon.shm_objects()) == before
    assert "does not know of" in daemon.purge().stderr
    # The right one, in its place.
    shutil.copytree(kept, daemon.run, dirs_exist_ok=True)
    if damage in (_removed, _emptied):
        daemon.start()
        stage.check()
        stage.leave()
        return
    # With the directory went the process that keeps descriptors: it was nobody's any more.
    daemon.expected += ["was lost", "cannot read", "cannot write back", "did not take"]
    daemon.start()
    for client in (stage.first, stage.second):
        assert client.do("scan", stage.at(Stage.MEMORY), 16 * 4096) == "7"
        assert client.do("load", stage.at(Stage.HIDDEN)) == "SIGSEGV"
    assert daemon.sharers("r") == 2


def test_an_older_journal_that_lacks_a_region_stops_the_start(stage: Stage) -> None:
    daemon = stage.daemon
    daemon.kill()
    checkpoint(daemon)
    daemon.expected.append(STALE)
    older = (journals(daemon) / "journal.sqlite").read_bytes()
    daemon.start()
    third = stage.start()
    third.ok("mshare", "newer", BASE + 16 * SIZE, SIZE, CREATE, 0o600)
    third.ok("mmap", BASE + 16 * SIZE, SIZE, 3, SHARED | FIXED)
    third.ok("store", BASE + 16 * SIZE, 5)
    daemon.kill()
    checkpoint(daemon)
    path = journals(daemon) / "journal.sqlite"
    right = path.read_bytes()
    path.write_bytes(older)
    refuses(daemon, "does not know of memory")
    path.write_bytes(right)
    daemon.start()
    assert third.do("load", BASE + 16 * SIZE) == "5"
    third.ok("store", BASE + 16 * SIZE + SIZE // 2, 6)
    stage.check()


def test_what_nobody_understands_is_purged_by_force(stage: Stage) -> None:
    daemon = stage.daemon
    daemon.halt()
    daemon.expected.append("no journal knows|cannot be used")
    assert [file.name for file in journals(daemon).glob("journal*")] == ["journal.sqlite"]
    for file in (journals(daemon) / "journal.sqlite", daemon.run / "names.sqlite"):
        file.write_bytes(b"no database" * 1000)
    assert daemon.purge().returncode == 3
    held = daemon.shm_objects()
    done = daemon.purge("--force")
    assert done.returncode == 0, done.stderr
    for name in held:
        assert f"removed /dev/shm/{name} (" in done.stderr
    assert daemon.shm_objects() == []
    assert not daemon.run.exists()
    for client in (stage.first, stage.second):
        assert client.do("load", BASE) == "SIGBUS", "nobody reads what is no region"
    daemon.start()


# -- whose it is --


def region(client: Client, value: int, name: str = "r") -> None:
    client.ok("mshare", name, BASE, SIZE, CREATE, 0o600)
    client.ok("mmap", BASE, SIZE, 3, SHARED | FIXED)
    client.ok("store", BASE, value)


def test_what_others_call_like_ours_keeps_nobody_from_starting(
    daemon: Daemon, spawn: Callable[..., Client]
) -> None:
    client = spawn()
    region(client, 7)
    mark = names.Mark(daemon.run, names.identity(daemon.run), 0)
    made = [SHM / (mark.new().backing[1:]) for _ in range(3)]

    def squat() -> None:
        made[0].write_bytes(b"mallory")
        made[0].chmod(0o600)
        made[1].mkdir()
        made[2].symlink_to(made[0])

    assert in_child(squat, uid=MALLORY).wait() == 0
    second_name = SHM / (mark.new().backing[1:])
    os.link(next(_of_root(daemon)), second_name)
    try:
        daemon.halt()
        daemon.start()
        assert client.do("load", BASE) == "7"
        client.ok("store", BASE + SIZE // 2, 8)
        daemon.halt()
        client.kill()
        done = daemon.purge("--force")
        assert done.returncode == 0, done.stderr
        assert made[0].read_bytes() == b"mallory"
    finally:
        made[0].unlink()
        made[1].rmdir()
        made[2].unlink()
        second_name.unlink()
    daemon.start()


def _of_root(daemon: Daemon) -> Iterator[Path]:
    """The memory of regions."""
    for name in daemon.shm_objects():
        status = os.lstat(SHM / name)
        if status.st_uid == 0 and status.st_blocks:
            yield SHM / name


def test_two_daemons_with_one_path_have_nothing_to_do_with_each_other(
    daemon: Daemon, client_program: Path, spawn: Callable[..., Client]
) -> None:
    """Containers have run directories of the same path, and one /dev/shm."""
    client = spawn()
    region(client, 7)
    daemon.halt()
    aside = daemon.directory / "aside"
    daemon.run.rename(aside)
    daemon.start()  # another container's
    with clients(client_program, daemon) as start:
        region(start(), 9)
        daemon.halt()
    done = daemon.purge("--force")
    assert done.returncode == 0, done.stderr
    aside.rename(daemon.run)
    daemon.start()
    assert client.do("load", BASE) == "7"
    client.ok("store", BASE + SIZE // 2, 8)


# -- names that are removed --


def test_memory_that_loses_its_name_is_saved(stage: Stage) -> None:
    """As RemoveIPC= does it, or a cleaner."""
    daemon = stage.daemon
    daemon.expected += [STALE, "somebody has removed"]
    there = daemon.shm_objects()
    assert len(there) == 2, "memory, and what is hidden"
    for name in there:
        (SHM / name).unlink()
    eventually(lambda: daemon.log().count("somebody has removed") == 2, "that it is noticed")
    for name in there:
        assert f"region r: somebody has removed /dev/shm/{name} (" in daemon.log()
    for _ in range(2):
        daemon.kill()
        daemon.start()
        assert daemon.log().count("somebody has removed") == 2, "once is enough"
    late = stage.start()
    late.ok("mshare", "r", BASE, 4 * ALIGNMENT, os.O_RDWR, 0)
    assert late.do("load", BASE) == "7"
    late.ok("unlink", "r")
    daemon.halt()
    daemon.start()
    stage.check()
    stage.leave()


def test_a_run_directory_that_is_removed_is_noticed(stage: Stage) -> None:
    """As long as everything can be saved: that goes on."""
    daemon = stage.daemon
    daemon.expected.append("somebody has removed")
    state = [
        *(daemon.run / name for name in ("identity", "lock", "names.sqlite")),
        *(journals(daemon) / name for name in ("journal.sqlite", "keeper", "lock")),
    ]
    assert all(path.exists() for path in state)
    assert daemon.metric("lost_files_total") == 0
    assert "run directory were removed" not in doctor(daemon)
    subprocess.run(["rm", "-rf", daemon.run], check=False)  # a mount in it stays
    assert not any(path.exists() for path in state)
    eventually(
        lambda: all(f"{path}" in daemon.log() for path in state), "that each of them is missed"
    )
    told = daemon.log().count("somebody has removed")
    assert "save what they hold" in daemon.log()
    assert daemon.metric("lost_files_total") >= len(state)
    assert "run directory were removed" in doctor(daemon)
    stage.check()
    stage.leave()
    assert daemon.log().count("somebody has removed") == told, "once is enough"


def doctor(daemon: Daemon) -> str:
    """What it says of this daemon."""
    done = subprocess.run(
        [BIN / "mshare", "doctor"],
        env={**os.environ, "MSHARE_ROOT": str(daemon.mount)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


def test_memory_that_lost_its_name_without_a_daemon_is_had_from_who_has_it(
    daemon: Daemon, spawn: Callable[..., Client]
) -> None:
    writer = spawn(user=MALLORY, group=MALLORY, extra_groups=[])
    region(writer, 7)
    daemon.halt()
    for name in daemon.shm_objects():
        (SHM / name).unlink()
    daemon.expected += ["somebody has removed"]
    daemon.start()
    assert writer.do("load", BASE) == "7"
    writer.ok("store", BASE + SIZE // 2, 8)
    late = spawn()
    late.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    assert late.do("load", BASE) == "7"
    assert late.do("load", BASE + SIZE // 2) == "8"
    eventually(lambda: "somebody has removed" in daemon.log(), "that it is said")


def test_a_stash_that_is_lost_is_no_zeros(stage: Stage) -> None:
    """Whoever opens what was hidden has SIGBUS."""
    daemon = stage.daemon
    memory = Path(daemon.field("r", "backing").split()[1]).name
    daemon.kill()
    (stash,) = set(daemon.shm_objects()) - {memory}
    (SHM / stash).unlink()
    daemon.expected += [STALE, "somebody has removed the memory that its hidden pages were in"]
    daemon.start()
    place = stage.at(Stage.HIDDEN)
    for client in (stage.first, stage.second):
        assert client.do("load", place) == "SIGBUS"
    assert stage.first.do("mprotect", place, 4096, 3) == "-12", "there is nothing (mprotect(2))"
    stage.first.ok("mmap", place, 16 * 4096, 3, SHARED | FIXED | ANONYMOUS)
    assert stage.second.do("load", place) == "0"
    daemon.kill()
    daemon.start()
    assert stage.second.do("load", place) == "0"
    stage.leave()


def test_a_removed_run_directory_costs_no_memory(
    daemon: Daemon, spawn: Callable[..., Client]
) -> None:
    client = spawn()
    region(client, 7)
    daemon.halt()
    before = daemon.shm_objects()
    shutil.rmtree(daemon.run)
    daemon.expected.append(STALE)
    daemon.start()
    assert daemon.shm_objects() == before, "whose it is nobody knows any more"
    assert client.do("load", BASE) == "7"
    client.kill()
    daemon.halt()
    for name in before:
        (SHM / name).unlink()
    daemon.start()
