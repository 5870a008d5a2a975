"""The FUSE handlers without a mount."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import stat
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio
import trio.testing
from pyfuse3 import FUSEError, RequestContext

from msharefsd.mount.asking import Asking
from msharefsd.mount.controls import Controls
from msharefsd.mount.filesystem import FIXED, FileSystem, region_inode
from msharefsd.mount.names import Names
from msharefsd.threads.fairness import Turns

ROOT = int(pyfuse3.ROOT_INODE)
CONTEXT: Any = SimpleNamespace(pid=1, uid=1000, gid=1000, umask=0)


@pytest.fixture
def regions() -> Names:
    names = Names(1 << 21)
    # As when no pager has memory for them.
    names.changed = lambda name: None if name.linked else names.gone(name.id)
    return names


@pytest.fixture
def files(regions: Names) -> Any:
    """Any: the tests pass plain numbers where pyfuse3 has types of its own."""
    return FileSystem(regions, Asking(NoPagers()), Turns(), Controls())


class NoPagers:
    """Nobody to ask."""

    async def text(self, home: int, kind: str, number: int, seconds: float) -> bytes | int | None:
        return None

    async def metrics(self, uid: int) -> bytes:
        return b""

    def status(self, uid: int) -> bytes:
        return b"uid: %d\n" % uid


LISTED = set(FIXED) - {b".control", b".controls"}
"""What is there before the daemon has bound its socket."""


async def fails(code: int, handler: Any) -> None:
    with pytest.raises(FUSEError) as caught:
        await handler
    assert caught.value.errno == code


HANDLERS = sorted(
    name
    for name, handler in vars(FileSystem).items()
    if inspect.iscoroutinefunction(handler) and hasattr(pyfuse3.Operations, name)
)


@pytest.mark.parametrize("name", HANDLERS)
async def test_an_unexpected_exception_is_eio_and_a_traceback(
    files: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    assert inspect.unwrap(getattr(FileSystem, name)) is not getattr(FileSystem, name)

    async def trip(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a defect")

    # As a class is made that has such a handler.
    broken: Any = type("Broken", (FileSystem,), {name: trip})
    with caplog.at_level(logging.ERROR):
        await fails(errno.EIO, getattr(broken, name)(files))
    assert "a defect" in caplog.text
    assert "Traceback" in caplog.text


async def test_a_refusal_is_its_errno_and_no_traceback(
    files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await fails(errno.EPERM, files.create(ROOT, b".hidden", 0o600, 0, CONTEXT))
    await fails(errno.ENAMETOOLONG, files.create(ROOT, b"x" * 256, 0o600, 0, CONTEXT))
    assert caplog.text == ""


async def test_a_region_file_from_creation_to_removal(files: Any, regions: Names) -> None:
    handle, entry = await files.create(ROOT, b"r", stat.S_IFREG | 0o640, os.O_RDWR, CONTEXT)
    assert (entry.st_mode, entry.st_uid, entry.st_size) == (stat.S_IFREG | 0o640, 1000, 16)
    assert await files.read(handle.fh, 0, 100) == bytes(16)
    assert await files.read(handle.fh, 10, 100) == bytes(6)
    await fails(errno.EEXIST, files.create(ROOT, b"r", 0o600, 0, CONTEXT))
    assert (await files.lookup(ROOT, b"r", CONTEXT)).st_ino == entry.st_ino
    await files.unlink(ROOT, b"r", CONTEXT)
    await fails(errno.ENOENT, files.lookup(ROOT, b"r", CONTEXT))
    await fails(errno.ESTALE, files.open(entry.st_ino, os.O_RDONLY, CONTEXT))
    assert (await files.getattr(entry.st_ino, CONTEXT)).st_nlink == 0
    await files.release(handle.fh)
    await files.forget([(entry.st_ino, 2)])
    await fails(errno.ESTALE, files.getattr(entry.st_ino, CONTEXT))
    await files.create(ROOT, b"r", 0o600, os.O_RDWR, CONTEXT)
    assert (await files.lookup(ROOT, b"r", CONTEXT)).st_ino != entry.st_ino


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mkdir", (ROOT, b"d", 0o700)),
        ("rmdir", (ROOT, b".regions")),
        ("symlink", (ROOT, b"s", b"r")),
        ("link", (2, ROOT, b"l")),
        ("rename", (ROOT, b"r", ROOT, b"q", 0)),
        ("mknod", (ROOT, b"n", stat.S_IFIFO | 0o600, 0)),
        ("mknod", (ROOT, b".control", stat.S_IFSOCK | 0o600, 0)),
        ("unlink", (ROOT, b"mshare_info")),
        ("create", (FIXED[b".regions"], b"x", 0o600, 0)),
    ],
)
async def test_what_is_not_allowed_is_eperm(
    files: Any, name: str, arguments: tuple[Any, ...]
) -> None:
    await fails(errno.EPERM, getattr(files, name)(*arguments, CONTEXT))


async def test_a_listing_is_of_one_moment(
    files: Any, regions: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        regions.create(b"r%d" % number, 0o600, 0, 0)
    handle = await files.opendir(ROOT, CONTEXT)
    gone = regions.find(b"r1")
    assert gone is not None
    regions.unlink(gone)
    regions.create(b"new", 0o600, 0, 0)
    listed: list[bytes] = []

    def reply(token: object, name: bytes, attributes: object, place: int) -> bool:
        if len(listed) % 3 == 2:  # the kernel's buffer is full, now and then
            listed.append(b"")
            return False
        listed.append(name)
        places.append(place)
        return True

    places: list[int] = [0]
    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    before = -1
    while len(places) != before:
        before = len(places)
        await files.readdir(handle, places[-1], None)
    names = [name for name in listed if name]
    assert sorted(names) == sorted([*LISTED, b"r0", b"r2", b"r3", b"r4"])
    assert files._lookups.keys() == {FIXED[name] for name in LISTED} | {
        region_inode(region) for region in regions if region.name != b"new"
    }


async def test_attributes_that_cannot_be_set(files: Any, regions: Names) -> None:
    region = regions.create(b"r", 0o600, 0, 0)
    fields = SimpleNamespace(
        update_size=True, update_mode=False, update_uid=False, update_gid=False,
        update_atime=False, update_mtime=False,
    )  # fmt: skip
    await fails(errno.EPERM, files.setattr(region_inode(region), None, fields, None, CONTEXT))
    await fails(errno.EPERM, files.setattr(ROOT, None, fields, None, CONTEXT))


async def test_who_changes_attributes_all_the_time_waits_for_a_turn(regions: Names) -> None:
    """Each change is written down, which takes longer than most requests."""
    turns = Turns()
    files: Any = FileSystem(regions, Asking(NoPagers()), turns, Controls())
    region = regions.create(b"r", 0o600, 0, 0)
    fields = SimpleNamespace(
        update_size=False, update_mode=True, update_uid=False, update_gid=False,
        update_atime=False, update_mtime=False,
    )  # fmt: skip
    wanted = SimpleNamespace(st_mode=0o644)
    await files.setattr(region_inode(region), wanted, fields, None, CONTEXT)
    turns.spent(CONTEXT.uid, 1.0)
    wanted.st_mode = 0o600
    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.setattr, region_inode(region), wanted, fields, None, CONTEXT)
        await trio.testing.wait_all_tasks_blocked()
        assert region.mode == 0o644
        nursery.start_soon(turns.run)
        await trio.testing.wait_all_tasks_blocked()
        assert region.mode == 0o600
        nursery.cancel_scope.cancel()


def test_the_context_of_a_request_is_what_the_tests_think() -> None:
    assert {"pid", "uid", "gid", "umask"} <= set(dir(RequestContext))
