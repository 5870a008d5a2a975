"""POSIX shared memory objects, which have names in /dev/shm."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from typing import Final

import posix_ipc

from msharefsd.errors import Refused
from msharefsd.memory.sparse import SparseFile, check_left, open_left

log = logging.getLogger(__name__)

MARK: Final = "msharefs-"
"""What names of ours begin with, in /dev/shm."""
SHM_DIRECTORY: Final = "/dev/shm"  # noqa: S108 - where shm_open(3) has its objects


def pool_bytes() -> int:
    """How much memory there is for all regions: the size of /dev/shm."""
    memory = os.statvfs(SHM_DIRECTORY)
    return memory.f_blocks * memory.f_frsize


def free_bytes() -> int:
    """How much of that nobody has."""
    memory = os.statvfs(SHM_DIRECTORY)
    return memory.f_bavail * memory.f_frsize


def _create_shm(name: str, size: int) -> int:
    try:
        memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=size)
    except (OSError, posix_ipc.Error, ValueError) as error:
        code = error.errno if isinstance(error, OSError) and error.errno else errno.ENOSPC
        raise Refused(code, f"cannot create shared memory {name}: {error}") from error
    return int(memory.fd)


def open_or_create(name: str, size: int, *, adopt: bool, left: int = -1) -> int:
    """A descriptor of the object `name`: a new one, or with `adopt` what is there.

    `left`: its descriptor, if it has lost its name.  Raises OSError, and for a new one
    Refused.
    """
    if left >= 0:
        return check_left(left, name, size)
    return open_left(SHM_DIRECTORY + name, size) if adopt else _create_shm(name, size)


def unlink_shm(name: str) -> None:
    """Remove the name, if it is there."""
    # Somebody with the right to it (root) may have been faster.
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(name)


class ShmObject(SparseFile):
    """A sparse POSIX shared memory object."""

    def __init__(self, name: str, size: int, *, adopt: bool = False, left: int = -1) -> None:
        """Create the object `name` of `size` bytes, all of them absent.

        Raises Refused (EMFILE, ENFILE, ENOSPC, ENOMEM as the kernel says).  With
        `adopt` it is there already: see open_left(), and `left` in open_or_create().
        """
        super().__init__(name, size, open_or_create(name, size, adopt=adopt, left=left))

    def _unlink(self) -> None:
        unlink_shm(self.name)
