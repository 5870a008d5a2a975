"""A region that is made without a name, and gets one when it is complete."""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, Client, Daemon, eventually
from inside import root_fixture as _root_fixture  # noqa: F401 - of every test here

from libmshare import NoSuchRegion, Region
from msharefsd.linux import processes

SIZE = 2 * ALIGNMENT
Spawn = Callable[..., Client]
IMAGE = "user.mshare.image"


def by_identity(daemon: Daemon, region: Region) -> Path:
    return daemon.mount / f".identity-{region.identity.id}"


def fails(code: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno tells
        call(*arguments)
    assert caught.value.errno == code


def test_it_is_under_its_name_as_a_whole(daemon: Daemon, spawn: Spawn) -> None:
    with Region.create(size=SIZE, start=BASE, ephemeral=True) as region:
        region[7] = 7
        with pytest.raises(NoSuchRegion):
            Region.attach("r")
        os.rename(by_identity(daemon, region), daemon.mount / "r")
        assert daemon.field("r", "state") == "live"
        assert daemon.field("r", "name") == "r"
        # What is taken is taken, and what has a name keeps it.
        fails(errno.EPERM, os.rename, by_identity(daemon, region), daemon.mount / "s")
        fails(errno.EPERM, os.rename, daemon.mount / "r", daemon.mount / "s")
        with Region.create(size=SIZE, ephemeral=True) as other:
            fails(errno.EEXIST, os.rename, by_identity(daemon, other), daemon.mount / "r")
            fails(errno.EPERM, os.rename, by_identity(daemon, other), daemon.mount / ".hidden")
            fails(errno.EPERM, os.rename, by_identity(daemon, other), daemon.mount / ".regions/x")
    client = spawn()  # it stays, as every region that has a name
    client.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    assert client.do("load", BASE + 7) == "7"
    client.ok("unlink", "r")
    assert not (daemon.mount / "r").exists()


def test_it_is_its_owners_to_name(daemon: Daemon) -> None:
    with Region.create(size=SIZE, ephemeral=True, mode=0o666) as region:
        source, target = by_identity(daemon, region), daemon.mount / "r"
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            try:
                os.rename(source, target)
            except OSError as error:
                os._exit(error.errno or 0)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EPERM
        assert not target.exists()


def test_what_it_came_from_is_remembered(daemon: Daemon) -> None:
    with Region.create("r", SIZE) as region:
        path = daemon.mount / "r"
        assert os.listxattr(path) == []
        fails(errno.ENODATA, os.getxattr, path, IMAGE)
        fails(errno.ERANGE, os.setxattr, path, IMAGE, b"x" * 257)
        fails(errno.EOPNOTSUPP, os.setxattr, path, "user.other", b"x")
        os.setxattr(by_identity(daemon, region), IMAGE, b"sha256:1")
        daemon.expected.append("taking down the mount")
        daemon.kill()
        daemon.start()
        assert os.getxattr(path, IMAGE) == b"sha256:1"
        assert os.listxattr(path) == [IMAGE]
        assert region[0] == 0
        region.unlink()


def test_the_name_is_there_or_not_whoever_dies(daemon: Daemon, spawn: Spawn) -> None:
    """The daemon in the middle of it, and at once with it whoever asked."""
    daemon.expected.append("taking down the mount")
    daemon.kill()
    daemon.variables["MSHAREFSD_PARK"] = "give"
    daemon.start()
    child = os.fork()
    if child == 0:
        region = Region.create(size=SIZE, start=BASE, ephemeral=True)
        region[7] = 7
        os.rename(by_identity(daemon, region), daemon.mount / "r")
        os._exit(0)
    eventually(lambda: processes.state(daemon.pid) == "T", "it is parked")
    os.kill(child, signal.SIGKILL)
    daemon.kill()
    os.waitpid(child, 0)
    del daemon.variables["MSHAREFSD_PARK"]
    daemon.start()
    client = spawn()
    client.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    assert client.do("load", BASE + 7) == "7"
    client.ok("unlink", "r")


def test_a_creator_may_say_how_much_lies_where(daemon: Daemon) -> None:
    """What is not a multiple of the alignment is kept, at an address that is."""
    length = ALIGNMENT + 4096
    with Region.create("other", SIZE, start=BASE) as other:
        fd = os.open(daemon.mount / "r", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        for wanted in (
            (length, BASE + 4096, 0),
            (0, BASE, 0),
            (length, BASE, 1),
            (1 << 63, BASE, 0),
        ):
            fails(errno.EINVAL, os.pwrite, fd, struct.pack("=QQQ", *wanted), 4096)
        os.pwrite(fd, struct.pack("=QQQ", length, BASE, 0), 4096)
        os.close(fd)
        other.unlink()
    with Region.create("r", SIZE, start=BASE, exist_ok=True) as region:
        assert (region.start, region.size) == (BASE, length)
        region.unlink()
