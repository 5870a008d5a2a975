"""What goes wrong: OSErrors with a name, an errno, and what to do.

The daemon's own reason is the text, if it gave one.  The command `mshare` says the same.
"""

from __future__ import annotations

import errno
import os
from typing import Final


class MshareError(OSError):
    """Whatever this package raises of its own; `errno` is that of mshare(3)."""


class NotMounted(MshareError, FileNotFoundError):
    """No msharefs is where it was looked for."""


class NoSuchRegion(MshareError, FileNotFoundError):
    """No region has that name."""


class RegionExists(MshareError, FileExistsError):
    """A region of that name exists, or something is mapped there already."""


class AccessDenied(MshareError, PermissionError):
    """The region's mode, or how it was created or attached, forbids it."""


class DaemonGone(MshareError, ConnectionError):
    """The daemon has died, and no other has come in the time that was left for it."""


class Stale(MshareError):
    """The region that was meant is gone; one of the same name would be another one."""


class AddressTaken(MshareError):
    """Something of this process is where the region lies, or is to lie."""


class Busy(MshareError):
    """It is in use, and cannot be had or changed meanwhile."""


class NoMemory(MshareError, MemoryError):
    """There is no memory for it, or it is more than this user may have."""


class OwnerDied(MshareError):
    """Who had the lock died with it: what it guards may be half done."""


class Corrupt(MshareError):
    """The state of a heap or a lock in the region has been overwritten."""


class Mismatch(MshareError):
    """The region exists, and is not what was asked for."""


class ImageError(MshareError):
    """An image, or the store that it is in, is not to be had, or not what it should be."""


GONE: Final = frozenset(
    {errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ECONNRESET}
)
"""What calls fail with once the daemon has died."""

_CLASSES: Final[dict[int, type[MshareError]]] = {
    errno.ENOENT: NoSuchRegion,
    errno.EEXIST: RegionExists,
    errno.EACCES: AccessDenied,
    errno.EPERM: AccessDenied,
    errno.ESTALE: Stale,
    errno.EADDRINUSE: AddressTaken,
    errno.EBUSY: Busy,
    errno.ETIMEDOUT: Busy,
    errno.EOWNERDEAD: OwnerDied,
    errno.EUCLEAN: Corrupt,
    errno.EAGAIN: Busy,
    errno.ENOMEM: NoMemory,
    errno.ENOSPC: NoMemory,
    errno.EDQUOT: NoMemory,
} | dict.fromkeys(GONE, DaemonGone)

DAEMON_GONE: Final = (
    "the daemon of msharefs has died; start msharefsd again (in a container: bind the directory "
    "above its mount, as rslave)"
)

ADVICE: Final = {
    errno.ENOENT: "no such region; `mshare ls` lists them",
    errno.ESTALE: "the region was removed",
    errno.EACCES: "permission denied; its mode says who may, `mshare ls` shows it",
    errno.EROFS: (
        "read-only here, as /sys is in hardened units and containers; have msharefs on /run/mshare "
        "(msharefsd --mountpoint), or say ReadWritePaths=/sys/fs/mshare"
    ),
    errno.ETIMEDOUT: "others have it all the time; one of them may be stopped",
    errno.EDEADLK: "this thread has the lock already",
    errno.EMFILE: "out of descriptors, here or in the daemon; see `mshare doctor`",
    errno.ENFILE: "the system is out of descriptors",
    errno.EPROTO: "library and daemon are of different versions; install the same for both",
    errno.ENAMETOOLONG: "a region's name has at most 255 bytes",
} | dict.fromkeys(GONE, DAEMON_GONE)


def of(code: int, reason: str, name: str | None) -> MshareError:
    """The error for an errno, with the best reason there is."""
    text = (code in GONE and DAEMON_GONE) or reason or ADVICE.get(code) or os.strerror(code)
    kind = _CLASSES.get(code, MshareError)
    return kind(code, text, name) if name else kind(code, text)


def not_mounted(wanted: str | None) -> str:
    """The text for when no msharefs is found, which was looked for at `wanted`."""
    if wanted:
        return (
            f"no msharefs is mounted on {wanted}; start msharefsd --mountpoint={wanted}, or unset "
            "MSHARE_ROOT"
        )
    return "msharefs is not mounted; start msharefsd, or say where it is with MSHARE_ROOT"
