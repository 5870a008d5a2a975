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

_ADVICE: Final = {
    errno.EEXIST: "it exists; choose another name, or `mshare rm` it first",
    errno.EPERM: "not permitted; this process may not have a userfaultfd (see `mshare doctor`), or "
    "no huge pages: those are for root and the group of vm.hugetlb_shm_group",
    errno.EOPNOTSUPP: "this msharefsd cannot have huge pages; its log says why",
    errno.ENOMEM: "no memory, or not enough huge pages, is left for it; see `mshare doctor`",
    errno.ENOSPC: "no memory is left for it; see `mshare doctor`",
}


def create(
    name: bytes,
    start: int | None,
    size: int,
    mode: int,
    backing: str | None,
    timeout: float,
    *,
    anonymous: bool,
) -> None:
    """Create the region; `start` and `size` in bytes.  Raises CommandError.

    Without `start` the daemon chooses it, and the region begins with `size` bytes of zeros.
    """
    bounded(lambda: _create(name, start, size, mode, backing, anonymous=anonymous), timeout)


def _create(
    name: bytes,
    start: int | None,
    size: int,
    mode: int,
    backing: str | None,
    *,
    anonymous: bool,
) -> None:
    """In a process of its own, which is a sharer only for a moment."""
    mount = regions.root()
    regions.check_name(name)
    if start is not None:
        _check_range(mount, start, size)
    elif size == 0:
        raise CommandError("--size must not be 0")
    text = os.fsdecode(name)
    os.umask(0)  # --mode is meant as it is written, as in mkdir(1)
    try:
        core.mshare(text, start or 0, size, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode, backing)
    except OSError as error:
        code = error.errno or errno.EIO
        said = error.strerror not in (None, os.strerror(code))
        if said and code in (errno.ENOMEM, errno.ENOSPC) and backing != "hugetlb":
            # The daemon knows what there is too little of; of huge pages, only the first that
            # is missing.
            raise explain(error, name, {code: str(error.strerror)}) from None
        if start is None:
            raise explain(error, name, _ADVICE) from None
        no_room = (
            f"no room at {start:#x}-{start + size:#x}; that is beyond the addresses of processes, "
            "or something of this process is there: choose another --start"
        )
        if backing == "hugetlb":
            no_room += "; or there are not enough huge pages: see `mshare doctor`"
        room = {errno.EINVAL: no_room, errno.ENOMEM: no_room}
        raise explain(error, name, _ADVICE | room) from None
    try:
        if anonymous and start is not None:
            prot = mmap.PROT_READ | mmap.PROT_WRITE
            flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | core.MAP_FIXED_NOREPLACE
            core.mshare_mmap(start, size, prot, flags)
    except OSError as error:
        core.mshare_unlink(text)
        raise explain(error, name, _ADVICE) from None
    core.mshare_detach(text)


def _check_range(mount: str, start: int, size: int) -> None:
    unit = regions.alignment(mount)
    for option, value in (("--start", start), ("--size", size)):
        if value == 0 or value % unit:
            raise CommandError(
                f"{option} must be a multiple of {output.size(unit)}, and not 0: that is the "
                f"alignment of this msharefs"
            )
