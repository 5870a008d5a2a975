"""The everyday tools on the mount: each does what it should or gives a plain errno.

The daemon lives through all of them: the fixture fails a test whose daemon died or
logged anything suspicious.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ALIGNMENT, BASE, Client, Daemon, eventually

NOBODY = 65534
SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR


@pytest.fixture
def region(spawn: Callable[..., Client]) -> Client:
    """The donor of a region "r" that holds one chunk of memory."""
    donor = spawn()
    donor.ok("map", BASE, SIZE, mmap.MAP_SHARED)
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    donor.ok("store", BASE, 1)
    return donor


def tool(*words: object, user: int | None = None) -> subprocess.CompletedProcess[str]:
    who: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    return subprocess.run(
        [str(word) for word in words],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
        env={"LC_ALL": "C", "PATH": os.defpath},
        **who,
    )


def succeeds(*words: object) -> str:
    done = tool(*words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def fails(code: int, *words: object, user: int | None = None) -> None:
    done = tool(*words, user=user)
    assert done.returncode != 0, done.stdout
    assert os.strerror(code) in done.stderr, done.stderr


def test_reading_tools(region: Client, daemon: Daemon) -> None:
    root = daemon.mount
    assert succeeds("cat", root / "mshare_info") == f"{ALIGNMENT}\n"
    assert succeeds("od", "-A", "n", "-t", "u8", root / "r").split() == [str(BASE), str(SIZE)]
    listing = succeeds("ls", "-l", "--almost-all", root)
    names = [line.split()[-1] for line in listing.splitlines()[1:]]
    assert names == [".control", ".metrics", ".regions", ".status", "mshare_info", "r"]
    assert "srw-rw-rw-" in listing
    assert "-rw-------" in listing
    found = set(succeeds("find", root).split())
    assert {f"{root}/r", f"{root}/.regions/r/info", f"{root}/.regions/r/maps"} <= found
    assert int(succeeds("du", "--block-size=1", root / "r").split()[0]) == 64 << 10
    assert succeeds("ls", "-s", "--block-size=1", root / "r").split()[0] == str(64 << 10)
    assert succeeds("stat", "--format=%s %h %a %U", root / "r") == "16 1 600 root\n"
    assert succeeds("stat", "--format=%a", root) == "1777\n"
    assert succeeds("stat", "--file-system", "--format=%T", root).startswith("fuse")
    for name in ("info", "maps", "sharers"):
        assert succeeds("cat", root / ".regions/r" / name)
    assert "msharefs_sharers 1.0" in succeeds("cat", root / ".metrics")
    assert succeeds("head", "--bytes=8", root / "r").encode("utf-8", "replace")
    assert succeeds("findmnt", "--noheadings", "--output=FSTYPE,SOURCE", root).split() == [
        "fuse.msharefs",
        "msharefs",
    ]
    succeeds("df", root)


def test_cp_of_a_region_file(region: Client, daemon: Daemon, directory: Path) -> None:
    succeeds("cp", daemon.mount / "r", directory / "copy")
    assert struct.unpack("QQ", (directory / "copy").read_bytes()) == (BASE, SIZE)
    fails(errno.EPERM, "cp", directory / "copy", daemon.mount / "r")


def test_touch_chmod_chown(region: Client, daemon: Daemon) -> None:
    file = daemon.mount / "r"
    succeeds("touch", "--date=2001-02-03T04:05:06Z", file)
    assert file.stat().st_mtime == 981173106
    succeeds("chmod", "640", file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    succeeds("chown", f"{NOBODY}:{NOBODY}", file)
    assert file.stat().st_uid == NOBODY
    # The texts about a region are for those who may read its file.
    fails(errno.EACCES, "cat", daemon.mount / ".regions/r/info", user=12345)
    assert tool("cat", daemon.mount / ".regions/r/info", user=NOBODY).returncode == 0
    fails(errno.EPERM, "chmod", "777", file, user=12345)
    succeeds("touch", daemon.mount / "new")
    assert (daemon.mount / "new").read_bytes() == bytes(16)
    succeeds("rm", daemon.mount / "new")


def test_rm(region: Client, daemon: Daemon) -> None:
    fails(errno.EPERM, "rm", "--force", daemon.mount / "r", user=NOBODY)
    succeeds("rm", daemon.mount / "r")
    fails(errno.ENOENT, "rm", daemon.mount / "r")
    for name in (".control", ".metrics", ".status", "mshare_info", ".regions"):
        fails(errno.EPERM, "rm", "--recursive", daemon.mount / name)
    fails(errno.EPERM, "rmdir", daemon.mount / ".regions")


def test_what_there_is_no_such_thing_as(region: Client, daemon: Daemon, directory: Path) -> None:
    root = daemon.mount
    (directory / "file").write_text("x")
    for words in (
        ("mkdir", root / "d"),
        ("mkfifo", root / "p"),
        ("mknod", root / "n", "c", "1", "3"),
        ("ln", root / "r", root / "hard"),
        ("ln", "--symbolic", "r", root / "soft"),
        ("mv", root / "r", root / "q"),
        ("mv", "--force", root / "r", root / "mshare_info"),
        ("touch", root / ".hidden"),
        ("touch", root / ".regions/x"),
        ("truncate", "--size=0", root / "r"),
        ("truncate", "--size=1G", root / "r"),
        ("chmod", "777", root / ".control"),
        ("chmod", "777", root),
        ("chown", "1", root / ".regions/r/info"),
    ):
        fails(errno.EPERM, *words)
    listed = {".control", ".metrics", ".regions", ".status", "mshare_info", "r"}
    assert set(os.listdir(root)) == listed
    with pytest.raises(OSError, match=os.strerror(errno.ENAMETOOLONG)):
        (root / ("x" * 256)).touch()


def test_a_region_file_has_no_other_content(region: Client, daemon: Daemon) -> None:
    fd = os.open(daemon.mount / "r", os.O_RDWR)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            os.write(fd, b"x")
        with pytest.raises(OSError, match=os.strerror(errno.ENODEV)):
            mmap.mmap(fd, 16, mmap.MAP_SHARED)
        with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
            os.getxattr(fd, "user.x")
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            os.setxattr(fd, "user.x", b"")
        assert os.listxattr(fd) == []
        assert os.pread(fd, 100, 8) == struct.pack("Q", SIZE)
        assert os.pread(fd, 100, 16) == b""
        os.fsync(fd)
    finally:
        os.close(fd)
    with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
        os.open(daemon.mount / "r", os.O_RDWR | os.O_TRUNC)
    with pytest.raises(OSError, match=os.strerror(errno.EACCES)):
        os.open(daemon.mount / ".regions/r/info", os.O_RDWR)


def test_a_file_that_is_open_can_be_asked_after_its_name_is_gone(
    region: Client, daemon: Daemon
) -> None:
    fd = os.open(daemon.mount / "r", os.O_RDONLY)
    try:
        region.ok("unlink", "r")
        # The kernel believes what it knows of the file for 10 ms.
        eventually(lambda: os.fstat(fd).st_nlink == 0, "it has no name any more")
        assert os.read(fd, 16) == struct.pack("QQ", BASE, SIZE)
    finally:
        os.close(fd)


def test_a_bind_mount_of_the_directory_is_the_whole_api(
    region: Client, daemon: Daemon, directory: Path, client_program: Path
) -> None:
    from msharefsd.linux import syscalls

    other = directory / "other"
    other.mkdir()
    syscalls.mount(str(daemon.mount), str(other), None, syscalls.MS_BIND)
    try:
        with subprocess.Popen(
            [client_program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"MSHARE_ROOT": str(other)},
        ) as process:
            client = Client(process)
            client.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
            assert client.do("load", BASE) == "1"
            process.kill()
    finally:
        syscalls.umount(str(other), syscalls.MNT_DETACH)


def test_hundreds_of_names_are_listed(daemon: Daemon) -> None:
    names = {f"region-{number:03}" for number in range(300)}
    for name in names:
        (daemon.mount / name).touch()
    listed = os.listdir(daemon.mount)
    assert len(listed) == len(set(listed)) == len(names) + 5
    assert names < set(listed)
    assert set(os.listdir(daemon.mount / ".regions")) == names
    for name in names:
        (daemon.mount / name).unlink()
    assert os.listdir(daemon.mount / ".regions") == []


def test_times_that_no_clock_shows_are_cut(daemon: Daemon) -> None:
    path = daemon.mount / "r"
    path.touch()
    os.utime(path, (1 << 40, -(1 << 40)))
    status = path.stat()
    assert status.st_atime_ns > status.st_ctime_ns > status.st_mtime_ns
