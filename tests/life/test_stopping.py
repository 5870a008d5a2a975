"""However the daemon is stopped, regions stay; removing them is a deliberate act."""

from __future__ import annotations

import fcntl
import mmap
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, BIN, SUPPORT, Client, Daemon, alive, clients, eventually

from msharefsd.linux import mounts, processes, syscalls
from msharefsd.mount import mounting

pytestmark = pytest.mark.shm_only
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SIZE = 4 * ALIGNMENT
SHARED_FIXED = mmap.MAP_SHARED | 0x10
READ, WRITE = 1, 2
PAGE = 4096
FILE = BASE + SIZE // 2
Spawn = Callable[..., Client]


@pytest.fixture
def pair(daemon: Daemon, spawn: Spawn, directory: Path) -> Iterator[tuple[Client, Client]]:
    """Two sharers of a region with memory, a file with an unwritten page, and absent pages."""
    first, second = spawn(), spawn()
    first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    first.ok("mmap", BASE, SIZE // 2, READ | WRITE, SHARED_FIXED)
    first.ok("fill", BASE, PAGE, 7)
    file = directory / "file"
    file.write_bytes(b"f" * 4 * PAGE)
    first.ok("mmap", FILE, 4 * PAGE, READ | WRITE, SHARED_FIXED, file, os.O_RDWR, 0)
    first.ok("store", FILE, 9)
    yield first, second
    daemon.expected.append("taking down the mount")


def goes_on(daemon: Daemon, pair: tuple[Client, Client]) -> None:
    """A next daemon has all of it."""
    first, second = pair
    assert second.do("load", BASE) == "7", "what is there needs nobody"
    second.send("store", BASE + 200 * PAGE, 8)  # waits
    daemon.start()
    assert second.result() == "0"
    assert first.do("load", BASE + 200 * PAGE) == "8"
    assert second.do("load", FILE + PAGE + 1) == str(ord("f"))
    first.ok("mmap", BASE + SIZE - PAGE, PAGE, READ | WRITE, SHARED_FIXED)
    assert daemon.sharers("r") == 2


def told(daemon: Daemon) -> str:
    """The last line about what stays."""
    lines = [line for line in daemon.log().splitlines() if "stopped; kept" in line]
    return lines[-1]


# -- stopping keeps --


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_there_is_and_says_so(
    daemon: Daemon, pair: tuple[Client, Client], number: int
) -> None:
    (daemon.mount / "bare").touch()
    daemon.halt(number)
    line = told(daemon)
    memory = sum(os.stat(f"/dev/shm/{name}").st_blocks * 512 for name in daemon.shm_objects())
    assert memory == 80 << 10, "a chunk of memory, and the file"
    assert "kept for the next daemon are 2 regions, 80K of memory, 2 sharers: " in line
    assert "r (80K, 2 sharers), bare (a name)." in line
    assert f"start msharefsd --mountpoint={daemon.mount} " in line
    assert line.endswith("--purge")
    goes_on(daemon, pair)
    assert (daemon.mount / "bare").exists()


def test_what_was_written_is_in_the_file_when_it_has_stopped(
    daemon: Daemon, pair: tuple[Client, Client], directory: Path
) -> None:
    daemon.halt()
    assert (directory / "file").read_bytes() == b"\11" + b"f" * (4 * PAGE - 1)
    goes_on(daemon, pair)


def unmount(daemon: Daemon) -> None:
    mounting.unmount(str(daemon.mount))


def cut(daemon: Daemon) -> None:
    daemon.abort()


@pytest.mark.parametrize(
    ("how", "says"), [(unmount, "unmounted by somebody else"), (cut, "connection was cut")]
)
def test_so_does_who_unmounts_it(
    daemon: Daemon, pair: tuple[Client, Client], how: Callable[[Daemon], None], says: str
) -> None:
    how(daemon)
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0
    daemon.halt()
    assert says in daemon.log()
    assert "r (80K, 2 sharers)" in told(daemon)
    goes_on(daemon, pair)


def test_a_terminal_that_is_closed_is_no_upgrade(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    master, slave = pty.openpty()
    daemon.start(preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0))
    os.close(slave)
    with clients(client_program, daemon) as start:
        client = start()
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        os.close(master)
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        daemon.halt()
        assert "SIGHUP (the terminal is gone): stopping" in daemon.log()
        assert "r (0 bytes, 1 sharer)" in told(daemon)
        daemon.start()
        client.ok("mmap", BASE, PAGE, READ | WRITE, SHARED_FIXED)


def test_nohup_means_what_it_says(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    nohup = 'trap "" HUP; exec "$0" "$@"'
    daemon.start(["sh", "-c", nohup, str(BIN / "msharefsd")])
    os.kill(daemon.pid, signal.SIGHUP)
    (daemon.mount / "name").touch()
    assert "stopping" not in daemon.log()


def test_without_regions_nothing_stays(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}").start()
    daemon.halt()
    assert not daemon.run.exists()
    assert daemon.log().splitlines()[-1].endswith("stopped")


# -- signals at any time --


def launch_parked(daemon: Daemon, barrier: str) -> None:
    daemon.launch(env={**os.environ, "MSHAREFSD_PARK": barrier})
    eventually(lambda: processes.state(daemon.pid) == "T", "the barrier")


@pytest.mark.parametrize("barrier", ["start", "start.mounted"])
@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM, signal.SIGHUP]],
)
def test_a_signal_in_the_start_is_a_clean_end(
    make_daemon: Callable[..., Daemon], barrier: str, numbers: list[signal.Signals]
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    launch_parked(daemon, barrier)
    for number in numbers:
        os.kill(daemon.pid, number)
    os.kill(daemon.pid, signal.SIGCONT)
    daemon.halt()
    assert not daemon.run.exists()
    assert "Traceback" not in daemon.log()


TWO = [
    (signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGTERM, signal.SIGHUP),
    (signal.SIGINT, signal.SIGTERM),
]


@pytest.mark.parametrize("numbers", TWO)
def test_two_signals_lose_nothing(
    daemon: Daemon, pair: tuple[Client, Client], directory: Path, numbers: tuple[int, int]
) -> None:
    """Ctrl-C twice, with pages that their files do not have yet."""
    first, _ = pair
    for page in range(4):
        first.ok("store", FILE + page * PAGE, 5)
    assert daemon.process is not None
    for number in numbers:
        daemon.process.send_signal(number)
    daemon.halt(0)
    assert "Traceback" not in daemon.log()
    goes_on(daemon, pair)
    first.ok("msync", FILE, 4 * PAGE, 4)
    written = (directory / "file").read_bytes()
    assert written == (b"\5" + b"f" * (PAGE - 1)) * 4


def test_what_a_slow_file_has_not_taken_is_not_thrown_away(
    daemon: Daemon, spawn: Spawn, directory: Path
) -> None:
    """A second signal does not wait for it, and the next daemon writes it back again."""
    place = directory / "slow"
    place.mkdir()
    server = subprocess.Popen(
        [sys.executable, SUPPORT / "hung.py", place], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        client = spawn()
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        flags = READ | WRITE, SHARED_FIXED
        client.ok("mmap", BASE, 4 * PAGE, *flags, place / "slow", os.O_RDWR, 0)
        client.ok("store", BASE, 9)
        pager = daemon.pager()
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping" in daemon.log(), "that it stops")
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(20) == 0
        daemon.process = None
        assert "files are not waited for" in daemon.log()
        server.send_signal(signal.SIGUSR1)  # who is in the kernel for it ends
        eventually(lambda: not alive(pager), "the end of the pager")
        client.send("store", BASE + 1, 8)  # it waits: the page was being written back
        daemon.expected.append("does not end")
        daemon.start()
        assert client.result() == "0"
        client.ok("msync", BASE, PAGE, 4)
        with (place / "slow").open("rb", buffering=0) as file:
            assert file.read(3) == b"\x09\x08\x01"
        client.ok("munmap", BASE, 4 * PAGE)
    finally:
        server.kill()
        server.wait()
        syscalls.umount(str(place), syscalls.MNT_DETACH)
        if server.stdout is not None:
            server.stdout.close()


# -- purging --


def test_a_purge_says_what_it_removes(daemon: Daemon, spawn: Spawn) -> None:
    client = spawn()
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    client.ok("mmap", BASE, SIZE, READ | WRITE, SHARED_FIXED)
    client.ok("store", BASE, 1)
    (daemon.mount / "bare").touch()
    client.kill()
    alive_yet = daemon.purge()
    assert alive_yet.returncode == 1
    assert "stop that one first" in alive_yet.stderr
    eventually(lambda: daemon.sharers("r") == 0, "nobody has it")
    daemon.halt()
    done = daemon.purge()
    assert done.returncode == 0, done.stderr
    removing = "removing 2 regions, 64K of memory, 0 sharers: r (64K, 0 sharers), bare (a name)"
    assert removing in done.stderr
    assert daemon.shm_objects() == []
    assert not daemon.run.exists()
    again = daemon.purge()
    assert (again.returncode, "nothing to remove" in again.stderr) == (0, True)


def test_what_is_in_use_is_not_purged_without_force(
    daemon: Daemon, pair: tuple[Client, Client]
) -> None:
    daemon.halt()
    done = daemon.purge()
    assert done.returncode == 1
    assert "in use: 1 region, 80K of memory, 2 sharers: r (80K, 2 sharers)" in done.stderr
    goes_on(daemon, pair)


def test_after_a_purge_nobody_waits(daemon: Daemon, pair: tuple[Client, Client]) -> None:
    _, second = pair
    daemon.halt()
    second.send("store", BASE + 200 * PAGE, 8)  # an absent page
    time.sleep(0.05)
    done = daemon.purge("--force")
    assert done.returncode == 0, done.stderr
    assert second.result() in ("SIGBUS", "0"), "before the purge had the memory, or after"
    for client in pair:
        for page in (BASE, BASE + 100 * PAGE, FILE, FILE + PAGE):
            assert client.do("load", page) == "SIGBUS"
            assert client.do("from_memory", page, 1) == "-14"
    assert daemon.shm_objects() == []
    assert not daemon.run.exists()
    for client in pair:
        assert client.do("munmap", BASE, PAGE) == "-116", "and no daemon is waited for"
    daemon.start()
    for client in pair:
        assert client.do("mmap", BASE, PAGE, READ | WRITE, SHARED_FIXED) == "-116"
    assert not (daemon.mount / "r").exists()


def test_a_purge_comes_after_a_kill_as_well(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    """It takes down the dead mount and the graft, too."""
    before = sorted(os.listdir("/sys/fs"))
    daemon = make_daemon(f"--alignment={ALIGNMENT}", mountpoint=Path("/sys/fs/mshare")).start()
    with clients(client_program, daemon) as start:
        start().ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    daemon.kill()
    done = daemon.purge("--force")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir("/sys/fs")) == before
    assert mounts.top_mount("/sys/fs/mshare") is None
    assert daemon.shm_objects() == []


@pytest.fixture
def small_disk(directory: Path) -> Iterator[Path]:
    place = directory / "disk"
    place.mkdir()
    syscalls.mount("small", str(place), "tmpfs", 0, "size=64k")
    yield place
    syscalls.umount(str(place), syscalls.MNT_DETACH)


def test_what_a_full_disk_has_not_taken_is_not_thrown_away(
    daemon: Daemon, spawn: Spawn, small_disk: Path
) -> None:
    """By a stop, by a purge with force, by the last sharer's end."""
    daemon.expected += ["cannot write back", "did not take", "not removed"]
    file = small_disk / "file"
    with file.open("wb") as sparse:
        sparse.truncate(16 * PAGE)  # no block of it is there
    client = spawn()
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    client.ok("mmap", BASE, 16 * PAGE, READ | WRITE, SHARED_FIXED, file, os.O_RDWR, 0)
    (small_disk / "filler").write_bytes(bytes(16 * PAGE))
    client.ok("store", BASE, 9)
    daemon.halt()
    done = daemon.purge("--force")
    assert done.returncode == 1
    assert f"region r is kept: its files did not take {PAGE} bytes" in done.stderr
    daemon.start()
    client.ok("unlink", "r")  # the last sharer: name and memory are to go
    assert not (daemon.mount / "r").exists()
    eventually(lambda: "that its files did not take yet" in daemon.log(), "the complaint")
    assert daemon.shm_objects() != []
    (small_disk / "filler").unlink()
    eventually(lambda: daemon.shm_objects() == [], "the memory is free", 60)
    assert file.read_bytes()[0] == 9


# -- starting --


@pytest.mark.parametrize(
    "place",
    ["/", "/dev/shm", "/dev", "/proc", "/sys", "/sys/fs", "{run}", "{run}/..", "{link}"],
)
def test_a_mountpoint_that_would_hide_what_is_needed(directory: Path, place: str) -> None:
    run = directory / "run"
    (directory / "link").symlink_to("/dev/shm")
    mountpoint = place.format(run=run, link=directory / "link")
    before = sorted(directory.iterdir())
    done = subprocess.run(
        [BIN / "msharefsd", f"--mountpoint={mountpoint}", f"--run-directory={run}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "would hide" in done.stderr
    assert sorted(directory.iterdir()) == before


def test_a_mountpoint_behind_a_link_is_where_the_link_leads(
    make_daemon: Callable[..., Daemon], directory: Path, client_program: Path
) -> None:
    (directory / "real").mkdir()
    (directory / "link").symlink_to("real")
    (directory / "other").symlink_to("real/m")
    for place in (directory / "link" / "m", directory / "other"):
        daemon = make_daemon(f"--alignment={ALIGNMENT}", mountpoint=directory / "real" / "m")
        daemon.arguments = (*daemon.arguments, f"--mountpoint={place}")
        daemon.start()
        assert mounts.top_mount(str(directory / "real" / "m")) is not None
        with clients(client_program, daemon) as start:
            start().ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        daemon.stop()


def test_a_start_that_fails_leaves_nothing(directory: Path) -> None:
    """Not even the directories that it made."""
    before = sorted(directory.rglob("*"))
    done = subprocess.run(
        [
            BIN / "msharefsd",
            f"--mountpoint={directory}/m/n/o",
            f"--run-directory={directory}/a/b/run",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"MSHAREFSD_FAIL": "start.mounted"},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert sorted(directory.rglob("*")) == before
    assert not [each for each in mounts.mounts() if each.target.startswith(str(directory))]


def test_a_start_that_fails_keeps_what_was_there(
    daemon: Daemon, pair: tuple[Client, Client]
) -> None:
    daemon.halt()
    daemon.launch(env=os.environ | {"MSHAREFSD_FAIL": "start.mounted"})
    assert daemon.process is not None
    assert daemon.process.wait(20) == 1
    daemon.expected.append("it was to fail here")
    assert mounts.top_mount(str(daemon.mount)) is None
    assert not any(map(alive, daemon.pagers().values()))
    goes_on(daemon, pair)
