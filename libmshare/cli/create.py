"""`mshare create`: a region that stays under its name."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Final

from libmshare import core
from libmshare.cli import output, regions
from libmshare.cli.ask import bounded
from libmshare.cli.errors import CommandError, explain
from libmshare.cli.output import printable

_ADVICE: Final = {
    errno.EEXIST: "it exists; choose another name, or `mshare rm` it first",
    errno.EPERM: "not permitted; no region can have this name, or this process may not have a "
    "userfaultfd: see `mshare doctor`",
    errno.ENOMEM: "no memory is left for it",
    errno.ENOSPC: "no memory is left for it; see `mshare doctor`",
}


def create(
    name: bytes,
    start: int,
    size: int,
    mode: int,
    backing: str | None,
    timeout: float,
    *,
    anonymous: bool,
) -> None:
    """Create the region; `start` and `size` in bytes.  Raises CommandError."""
    bounded(lambda: _create(name, start, size, mode, backing, anonymous=anonymous), timeout)


def _create(
    name: bytes, start: int, size: int, mode: int, backing: str | None, *, anonymous: bool
) -> None:
    """In a process of its own, which is a sharer only for a moment."""
    mount = regions.root()
    regions.check_name(name)
    _check_range(mount, start, size)
    text = os.fsdecode(name)
    os.umask(0)  # --mode is meant as it is written, as in mkdir(1)
    _want_backing(backing)
    try:
        core.mshare(text, start, size, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        no_room = (
            f"no room at {start:#x}-{start + size:#x}; that is beyond the addresses of processes, "
            "or something of this process is there: choose another --start"
        )
        room = {errno.EINVAL: no_room, errno.ENOMEM: no_room}
        raise explain(error, name, _ADVICE | room) from None
    try:
        if backing is not None:
            _check_backing(name, backing)
        if anonymous:
            prot = mmap.PROT_READ | mmap.PROT_WRITE
            flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | core.MAP_FIXED_NOREPLACE
            core.mshare_mmap(start, size, prot, flags)
    except BaseException as error:
        core.mshare_unlink(text)
        if isinstance(error, OSError):
            raise explain(error, name, _ADVICE) from None
        raise
    core.mshare_detach(text)


def _want_backing(backing: str | None) -> None:
    """For mshare(), which reads it when it creates."""
    if backing is not None:
        os.environ["MSHARE_BACKING"] = backing


def _check_range(mount: str, start: int, size: int) -> None:
    unit = regions.alignment(mount)
    for option, value in (("--start", start), ("--size", size)):
        if value == 0 or value % unit:
            raise CommandError(
                f"{option} must be a multiple of {output.size(unit)}, and not 0: that is the "
                f"alignment of this msharefs"
            )


def _check_backing(name: bytes, backing: str) -> None:
    """An older library or daemon would just not know of backings."""
    got = regions.one(name).backing
    if got != backing:
        raise CommandError(
            f"{printable(name)}: asked for backing {backing}, got {got}; this msharefsd or this "
            f"libmshare cannot make that one"
        )
