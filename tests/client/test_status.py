"""`mshare status`, and `.status` in the mount: which daemon, and how."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec
from command import Command, as_nobody, donate
from command import mshare_fixture as _mshare  # noqa: F401 - what tests ask for
from conftest import ALIGNMENT, Client, Daemon

from libmshare.cli import status
from msharefsd.config import Allowance, Config
from msharefsd.linux import features


def test_it_tells_what_is_so(mshare: Command, daemon: Daemon, spawn: Callable[..., Client]) -> None:
    empty = mshare.json("status")
    assert (empty["pid"], empty["uid"], empty["version"]) == (daemon.pid, 0, version("msharefs"))
    assert (empty["regions"], empty["sharers"], empty["memory"]) == (0, 0, 0)
    assert empty["kernel"] == os.uname().release
    assert empty["pagers"] == []
    assert empty["settings"].keys() == set(Config.__struct_fields__) - {"limits"}
    assert empty["settings"]["mountpoint"] == str(daemon.mount)
    assert int(empty["settings"]["alignment"]) == ALIGNMENT
    assert empty["settings"]["collapse"] is True
    assert empty["settings"]["region_memory"] is None
    found = features.probe()
    assert empty["features"] == msgspec.to_builtins(found)
    _donor = donate(spawn, "r")
    told = mshare.json("status")
    assert (told["names"], told["regions"], told["sharers"]) == (1, 1, 1)
    assert told["memory"] == ALIGNMENT
    (pager,) = told["pagers"]
    assert pager == {"uid": 0, "pid": daemon.pager(), "state": "ready", "silent": 0.0}
    text = mshare.ok("status")
    assert f"process {daemon.pid} of root" in text.splitlines()[0]
    assert f"{daemon.mount}: 1 region, 1 sharer, 2M of memory" in text


def test_limits_of_others_are_not_told(make_daemon: Callable[..., Daemon], directory: Path) -> None:
    settings = directory / "settings.toml"
    settings.write_text('[limits]\nregions = 7\n[limits.user.1234]\nmemory = "3G"\n')
    daemon = make_daemon(f"--alignment={ALIGNMENT}", f"--config={settings}").start()
    limits = Command(daemon.mount).json("status")["limits"]
    assert set(Allowance.__struct_fields__) <= limits.keys()
    assert limits["regions"] == 7
    assert limits["user"]["1234"] | {"memory": "3G", "regions": 7} == limits["user"]["1234"]
    assert limits["user"]["0"]["regions"] == "unlimited"
    theirs = as_nobody(daemon.mount, "status").stdout
    assert "1234" not in theirs
    assert "user.65534.regions" in theirs


def test_it_is_told_while_a_pager_hangs(
    mshare: Command, daemon: Daemon, spawn: Callable[..., Client]
) -> None:
    _donor = donate(spawn, "r")
    os.kill(daemon.pager(), signal.SIGSTOP)
    try:
        (pager,) = mshare.json("status")["pagers"]
        assert pager["pid"] == daemon.pager()
    finally:
        os.kill(daemon.pager(), signal.SIGCONT)


def test_a_path_is_on_one_line(make_daemon: Callable[..., Daemon], directory: Path) -> None:
    place = directory / "a b\n\\pid: 1"
    place.mkdir()
    daemon = make_daemon(f"--alignment={ALIGNMENT}", mountpoint=place).start()
    told = Command(place).json("status")
    assert (told["pid"], told["settings"]["mountpoint"]) == (daemon.pid, str(place))


def test_an_older_daemon(directory: Path) -> None:
    told = status.record(
        {"version": "1.10", "pid": "1", "pager.7": "odd", "limit.user.7.objects": "3"}
    )
    assert (told["version"], told["pid"], told["pagers"]) == ("1.10", 1, [])
    assert told["limits"] == {"user": {"7": {"objects": 3}}}


def test_nobody_writes_it(daemon: Daemon) -> None:
    file = daemon.mount / ".status"
    done = subprocess.run(["sh", "-c", f": > {file}"], check=False, capture_output=True)
    assert done.returncode != 0
    assert file.stat().st_mode & 0o777 == 0o444
