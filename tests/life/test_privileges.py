"""What the daemon may do once it serves, and where it is set up."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, BIN, Client, Daemon

from msharefsd.linux import syscalls
from msharefsd.memory import names
from msharefsd.security import privileges

SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
Spawn = Callable[..., Client]


def status(pid: int, thread: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_the_daemon_keeps_the_rights_that_it_names_and_no_others(
    daemon: Daemon, spawn: Spawn, directory: Path
) -> None:
    # Have it start threads: they must not have more than the first.
    (directory / "file").write_bytes(b"x")
    client = spawn()
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    client.ok("mmap", BASE, 4096, 3, mmap.MAP_PRIVATE | 0x10, directory / "file", os.O_RDONLY, 0)
    assert client.do("load", BASE) == str(ord("x"))
    had = syscalls.capabilities()
    threads = os.listdir(f"/proc/{daemon.pager()}/task")
    assert len(threads) > 1
    for thread in threads:
        of = status(daemon.pager(), int(thread))
        for kind in ("CapPrm", "CapEff", "CapBnd"):
            assert int(of[kind], 16) == privileges.mask(privileges.PAGER) & had, kind
        for kind in ("CapInh", "CapAmb"):
            assert int(of[kind], 16) == 0, kind
        assert of["NoNewPrivs"] == "1"


def test_capabilities_are_those_of_the_header() -> None:
    header = Path("/usr/include/linux/capability.h").read_text()
    for name, number in privileges._NUMBERS.items():
        assert re.search(rf"#define {name}\s+{number}\n", header), name


def test_rights_are_dropped_only_where_no_thread_keeps_them() -> None:
    program = (
        "import threading\nfrom msharefsd.security import privileges\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "privileges.drop(privileges.FRONT)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: 2 threads" in done.stderr


def test_no_file_of_a_client_is_opened_by_path(
    daemon: Daemon, spawn: Spawn, directory: Path
) -> None:
    """Where the client has one file the daemon sees another."""
    path = directory / "inner" / "file"
    path.parent.mkdir()
    path.write_bytes(b"b" * 4096)
    script = f'mount -t tmpfs inner {path.parent} && printf %04096d 0 > {path} && exec "$0"'
    client = spawn(before=["unshare", "--mount", "sh", "-c", script])
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    client.ok("mmap", BASE, 4096, 3, mmap.MAP_SHARED | 0x10, path, os.O_RDWR, 0)
    client.ok("mmap", BASE + 4096, 4096, 3, mmap.MAP_PRIVATE | 0x10, path, os.O_RDONLY, 0)
    assert client.do("load", BASE) == client.do("load", BASE + 4096) == str(ord("0"))
    client.ok("store", BASE, ord("1"))
    client.ok("msync", BASE, 4096, 4)
    inside = f"/proc/{client.pid}/root{path}"
    assert Path(inside).read_bytes() == b"1" + b"0" * 4095
    assert path.read_bytes() == b"b" * 4096
    client.ok("munmap", BASE, 8192)
    client.kill()


# -- the run directory --

MALLORY = 1666


def _belongs_to_mallory(run: Path) -> None:
    run.mkdir()
    os.chown(run, MALLORY, MALLORY)


def _is_open_to_all(run: Path) -> None:
    run.mkdir()
    run.chmod(0o777)


def _is_sticky(run: Path) -> None:
    run.mkdir()
    run.chmod(0o1777)


def _lies_in_mallorys(run: Path) -> None:
    run.parent.mkdir()
    os.chown(run.parent, MALLORY, MALLORY)
    run.mkdir()


def _lies_where_all_may_write(run: Path) -> None:
    run.parent.mkdir()
    run.parent.chmod(0o777)


def _is_a_link_of_mallorys(run: Path) -> None:
    run.parent.mkdir()
    run.parent.chmod(0o1777)
    target = run.parent.parent / "target"
    target.mkdir(mode=0o700)
    run.symlink_to(target)
    os.lchown(run, MALLORY, MALLORY)


def _is_a_link(run: Path) -> None:
    target = run.parent / "target"
    target.mkdir(mode=0o700)
    run.symlink_to(target)


def _lies_behind_mallorys_link(run: Path) -> None:
    run.parent.symlink_to("/etc")
    os.lchown(run.parent, MALLORY, MALLORY)


def _is_a_file(run: Path) -> None:
    run.touch()


def _has_a_link_for_a_lock(run: Path) -> None:
    run.mkdir(mode=0o700)
    (run / "lock").symlink_to("/etc/passwd")


GAMES = {
    "run": {
        _belongs_to_mallory: "belongs to user 1666",
        _is_open_to_all: "others may write .*/run and put anything there",
        _is_sticky: "others may write .*/run: chmod go-w",
        _is_a_link: "is no directory",
        _is_a_file: "cannot use the run directory .*File exists",
        _has_a_link_for_a_lock: "cannot use the run directory .*symbolic links",
    },
    "tmp/run": {
        _lies_in_mallorys: "tmp belongs to user 1666",
        _lies_where_all_may_write: "others may write .*/tmp and put anything there",
        _is_a_link_of_mallorys: "tmp/run belongs to user 1666",
        _lies_behind_mallorys_link: "tmp belongs to user 1666",
    },
}


@pytest.mark.parametrize(
    ("name", "game", "says"),
    [(name, game, says) for name, games in GAMES.items() for game, says in games.items()],
)
def test_games_with_the_run_directory(
    directory: Path, name: str, game: Callable[[Path], None], says: str
) -> None:
    run = directory / name
    game(run)
    before = sorted(directory.rglob("*"))
    arguments = [f"--mountpoint={directory / 'mnt'}", f"--run-directory={run}"]
    command = [str(BIN / "msharefsd"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert re.search(says, done.stderr), done.stderr
    assert sorted(directory.rglob("*")) == before
    assert not (Path("/etc") / "run").exists()


def test_a_run_directory_behind_roots_own_link_is_as_good(
    make_daemon: Callable[..., Daemon], directory: Path
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    (directory / "real").mkdir(mode=0o700)
    (directory / "link").symlink_to(directory / "real")
    daemon.run = directory / "link" / "run"
    daemon.start()
    assert (directory / "real" / "run" / "lock").exists()
    daemon.stop()


def test_what_others_make_beside_our_memory_is_theirs_and_in_nobodys_way(
    daemon: Daemon, spawn: Spawn
) -> None:
    client = spawn()
    client.ok("mshare", "a", BASE, SIZE, CREATE, 0o600)
    (name,) = daemon.shm_objects()
    squatters = [Path("/dev/shm", f"{name}-stash"), Path("/dev/shm", f"{name[:-1]}x")]
    try:
        for squatter in squatters:
            squatter.write_bytes(b"boo")
            os.chown(squatter, MALLORY, MALLORY)
        client.ok("mmap", BASE, 4096, 3, mmap.MAP_SHARED | 0x10)
        client.ok("store", BASE, 1)
        client.ok("mprotect", BASE, 4096, 0)
        client.ok("mprotect", BASE, 4096, 3)
        assert client.do("load", BASE) == "1"
        client.ok("mshare", "b", BASE + SIZE, SIZE, CREATE, 0o600)
        daemon.kill()
        daemon.expected.append("taking down the mount")
        daemon.start()
        assert client.do("load", BASE) == "1"
        assert [squatter.read_bytes() for squatter in squatters] == [b"boo", b"boo"]
        assert [squatter.stat().st_uid for squatter in squatters] == [MALLORY, MALLORY]
    finally:
        for squatter in squatters:
            squatter.unlink(missing_ok=True)


def test_names_of_memory_cannot_be_guessed() -> None:
    mark = names.Mark(Path("/run/msharefs/x"), "0123456789abcdef", 1000)
    made = {mark.new() for _ in range(100)}
    assert len({each for pair in made for each in (pair.backing, pair.stash)}) == 200
    for each in made:
        assert len(each.backing.removeprefix(mark.start)) == 32, "128 bits"
        assert each.stash.startswith(mark.start)
        assert each.backing[:-20] != each.stash[:-20]
