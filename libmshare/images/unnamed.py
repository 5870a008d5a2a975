"""A region that nobody sees until it may be used.

It has no name from its first moment on, so it ends with this process, whatever ends that; it
gets its name, its mode and what it came from when nobody can see it half made any more: all is in
it (load.py), or what is not is waited for (pull.py).  The daemon may be killed and started again
meanwhile, as in every call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
import struct
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from libmshare import core
from libmshare.errors import AccessDenied, ImageError, NoMemory, RegionExists, Stale
from libmshare.images.patience import AGAIN, mounted, patiently

if TYPE_CHECKING:
    from libmshare.region import Region

IMAGE: Final = "user.mshare.image"
_DETAILS: Final = 4096
_EXACT: Final = struct.Struct("=QQQ")
_IDENTITY: Final = 16
_NAME_MAX: Final = 255
_PULLING: Final = ".pulling"


def check_name(name: str) -> None:
    """Raises ValueError for what no region is called."""
    encoded = core.encode(name)
    if not encoded or b"/" in encoded or encoded.startswith(b".") or len(encoded) > _NAME_MAX:
        raise ValueError("a region's name has up to 255 bytes, no slash, and no dot at its begin")


class Unnamed:
    """One, while it is made."""

    def __init__(self, region: Region) -> None:
        self.region = region
        identity = region.identity
        self._path = f"{identity.root}/.identity-{identity.id}"

    def give(self, name: str, mode: int, image: str = "") -> None:
        """It may be used by others from now on.  Raises RegionExists, OSError."""
        root = self.region.identity.root
        if image:  # before the mode, which may say that its owner does not write it
            patiently(lambda: os.setxattr(self._path, IMAGE, image.encode()))
        patiently(lambda: os.chmod(self._path, mode))
        try:
            patiently(lambda: os.rename(self._path, f"{root}/{name}"))
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.EPERM):
                raise
            # If the daemon was killed when it had done so, this was the second time.
            if not self._is_called(f"{root}/{name}"):
                raise RegionExists(
                    errno.EEXIST, "another region has been given that name meanwhile", name
                ) from error
        self.region._name = name  # noqa: SLF001 - it has none of its own

    def _is_called(self, path: str) -> bool:
        with contextlib.suppress(OSError):
            fd = patiently(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            try:
                found = os.pread(fd, _IDENTITY, _DETAILS)
            finally:
                os.close(fd)
            return found.hex() == self.region.identity.id
        return False


def make(start: int, size: int, end: int, backing: str | None) -> Region:
    """A region without a name and without memory, of `size` bytes at `start`.

    `end`: how much of it is wanted for what will be mapped, in bytes.
    Raises AddressTaken, NoMemory, ImageError (EINVAL), OSError.
    """
    from libmshare.region import Region as Made  # noqa: PLC0415 - it imports us

    root = mounted()
    alignment = patiently(lambda: core.alignment(root))
    if start % alignment:
        raise ImageError(
            errno.EINVAL, f"here regions lie at multiples of {alignment:#x}, and not at {start:#x}"
        )
    whole = -(-max(size, end) // alignment) * alignment
    name = f"pull-{secrets.token_hex(16)}"
    path = f"{root}/{name}"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, _EXACT.pack(size, start, 0), _DETAILS)
        os.close(fd)
        request = core.OpenRequest(
            name=core.encode(name),
            addr=start,
            size=whole,
            oflags=os.O_RDWR | os.O_CREAT,
            mode=0o600,
            backing=None if backing is None else core.encode(backing),
            flags=core.EMPTY | core.EPHEMERAL,
        )
        return Made._open(request, name, readonly=False)  # noqa: SLF001 - no name is kept
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def check_room(root: str, wanted: int, backing: str) -> None:
    """Raises NoMemory (ENOSPC) if so many bytes are not left, as far as that can be told."""
    if backing == "shm":
        found = os.statvfs(root)
        room = found.f_bavail * found.f_frsize
        if wanted > room:
            raise NoMemory(
                errno.ENOSPC, f"it takes {wanted} bytes of shared memory, and {room} are left"
            )


@contextlib.contextmanager
def alone(name: str, is_stuck: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Nobody else of this user, on this mount, is in here for that name.

    What says so is a lock on a name without a range, so it holds across containers that share
    the mount; whoever is killed has it no more.  Another user's does not count.

    `is_stuck` is asked again and again while somebody else is in here: whether to go on all the
    same, which costs requests, and nothing else.
    """
    encoded = core.encode(name)
    if len(encoded) + len(_PULLING) > _NAME_MAX:
        name = hashlib.sha256(encoded).hexdigest()
    path = f"{mounted()}/{name}{_PULLING}"
    fd = _locked(path, is_stuck)
    try:
        yield
    finally:
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(path)
            with contextlib.suppress(OSError):
                os.close(fd)


def _locked(path: str, is_stuck: Callable[[], bool]) -> int:
    while True:
        try:
            fd = patiently(lambda: os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        except PermissionError:
            return -1
        try:
            if os.fstat(fd).st_uid != os.geteuid():  # whoever may write it could hold it for ever
                os.close(fd)
                return -1
            while _is(path, fd):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is(path, fd):
                        return fd
                if is_stuck():
                    os.close(fd)
                    return -1
                time.sleep(AGAIN)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is(path: str, fd: int) -> bool:
    """Whether the file still has that name: who had the lock before has taken it away."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        return False


def attach_image(name: str, image: str) -> Region | None:
    """The region of that name, if it is of that image; None if there is none.

    Only root's and this user's own regions are believed.  Raises RegionExists if it is another
    one; OSError.
    """
    from libmshare.region import Region as Made  # noqa: PLC0415 - it imports us

    root = mounted()
    try:
        status = patiently(lambda: os.stat(f"{root}/{name}"))
        _check_image(f"{root}/{name}", name, image, status.st_uid)
        writes = os.access(f"{root}/{name}", os.W_OK)
        region = Made.attach(name, readonly=not writes)
    except FileNotFoundError:
        return None
    except AccessDenied as error:
        if error.errno != errno.EPERM:  # it may be written by nobody
            raise
        region = Made.attach(name, readonly=True)
    try:  # under that name may be another one by now
        path = f"{root}/.identity-{region.identity.id}"
        _check_image(path, name, image, patiently(lambda: os.stat(path)).st_uid)
    except BaseException:
        region.close()
        raise
    return region


def to_be_filled(region: Region, name: str, image: str) -> Region:
    """The same for writing, if it is this user's, although its mode does not say so.

    Nobody else fills it then.  Takes `region` over.  Raises as attach_image(), and Stale.
    """
    path = f"{region.identity.root}/.identity-{region.identity.id}"
    with region:
        status = patiently(lambda: os.stat(path))
    if status.st_uid == os.geteuid():
        mode = stat.S_IMODE(status.st_mode)
        patiently(lambda: os.chmod(path, mode | stat.S_IWUSR))
        try:
            found = attach_image(name, image)
        finally:
            with contextlib.suppress(FileNotFoundError):
                patiently(lambda: os.chmod(path, mode))
    else:
        found = attach_image(name, image)
    if found is None:
        raise Stale(errno.ESTALE, "the region is gone", name)
    return found


def _check_image(path: str, name: str, image: str, owner: int) -> None:
    try:
        found = patiently(lambda: os.getxattr(path, IMAGE))
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.EACCES):
            raise
        found = b""
    if owner not in (0, os.geteuid()):
        raise RegionExists(errno.EEXIST, "another user has a region of that name", name)
    if found != image.encode():
        what = "is of another image" if found else "is of no image"
        raise RegionExists(errno.EEXIST, f"a region of that name exists, and {what}", name)
