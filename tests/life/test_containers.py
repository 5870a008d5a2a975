"""Where processes see the mount by a bind mount, as in a container."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, BIN, PAGE, Daemon, clients

from msharefsd.linux import syscalls

pytestmark = pytest.mark.shm_only
SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SHARED = mmap.MAP_SHARED | 0x10
MS_SHARED = 1 << 20


@pytest.fixture
def above(directory: Path) -> Iterator[Path]:
    """A directory for the mount whose mounts propagate, as those of /run do under systemd."""
    place = directory / "above"
    for each in (place, directory / "inside"):
        each.mkdir()
    syscalls.mount(str(place), str(place), None, syscalls.MS_BIND)
    syscalls.mount("", str(place), None, MS_SHARED)
    yield place
    syscalls.umount(str(place), syscalls.MNT_DETACH)


def within(bind: str, source: Path, inside: Path) -> list[str]:
    """What a command is run by: with a mount namespace of its own, where that is bound."""
    script = f'mount --{bind} "{source}" "{inside}" && exec "$0" "$@"'
    return ["unshare", "--mount", "--propagation=slave", "sh", "-c", script]


def test_the_directory_above_goes_on_with_the_next_daemon(
    make_daemon: Callable[..., Daemon], above: Path, client_program: Path
) -> None:
    """What docs/containers.md recommends: the daemon's mount comes with propagation (rslave)."""
    inside = above.with_name("inside")
    before = within("rbind", above, inside)
    daemon = make_daemon(f"--alignment={ALIGNMENT}", mountpoint=above / "run" / "fs")
    daemon.start(umask=0o077)  # as in its unit
    assert os.stat(above / "run").st_mode & 0o777 == 0o755
    with clients(client_program, daemon, MSHARE_ROOT=str(inside / "run" / "fs")) as start:
        first, second = start(before=before), start(before=before)
        first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        first.ok("mmap", BASE, PAGE, 3, SHARED)
        daemon.kill()
        daemon.expected.append("taking down the mount")
        daemon.start()
        first.ok("mmap", BASE + PAGE, PAGE, 3, SHARED)
        first.ok("store", BASE + PAGE, 7)
        assert first.do("fork", "load", BASE + PAGE) == "7"
        second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        assert second.do("load", BASE + PAGE) == "7"
        daemon.halt()
        daemon.start()
        assert second.do("fork", "load", BASE + PAGE) == "7"
        assert start(before=before).do("stat", "r") == f"{BASE} {SIZE}"


def test_the_mount_itself_does_not_and_says_what_would(
    make_daemon: Callable[..., Daemon], above: Path, client_program: Path
) -> None:
    """A bind mount is of a file system, and the next daemon's is another one.

    Memory goes on all the same.
    """
    inside = above.with_name("inside")
    daemon = make_daemon(f"--alignment={ALIGNMENT}", mountpoint=above / "fs").start()
    variables = {"MSHARE_ROOT": str(inside), "MSHARE_RECONNECT_SECONDS": "0.2"}
    with clients(client_program, daemon, **variables) as start:
        client = start(before=within("bind", daemon.mount, inside))
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        client.ok("mmap", BASE, PAGE, 3, SHARED)
        daemon.kill()
        daemon.expected.append("taking down the mount")
        daemon.start()
        client.ok("store", BASE, 7)
        assert client.do("mmap", BASE + PAGE, PAGE, 3, SHARED) == "-107"
        assert "bind the directory above the mount, as rslave" in client.do("reason")


def test_a_mount_that_is_read_only_says_so(
    daemon: Daemon, client_program: Path, directory: Path
) -> None:
    """As /sys is in hardened units and in containers."""
    inside = directory / "inside"
    inside.mkdir()
    before = within("bind", daemon.mount, inside)
    before[-1] = before[-1].replace(" &&", f' && mount -o remount,bind,ro "{inside}" &&')
    with clients(client_program, daemon, MSHARE_ROOT=str(inside)) as start:
        client = start(before=before)
        assert client.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == "-30"
        assert "/run/mshare" in client.do("reason")
    done = subprocess.run(
        [*before, BIN / "mshare", "--root", inside, "create", "r", "--size", "2M"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "/run/mshare" in done.stderr
