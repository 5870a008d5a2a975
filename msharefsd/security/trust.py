"""Whether a directory is one that nobody else can change under our hands.

The daemon keeps its state there and acts on what it finds.  Everybody who may write a
directory on the way there could put another in its place.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


class UntrustedError(Exception):
    """The directory is not ours alone; the text says what is wrong and what to do."""


def make_directory(directory: Path) -> None:
    """Make it, if it is not there, and see that only we and root can change what is in it.

    Whatever is on the way may be root's or ours, and writable by others only if it is
    sticky; the directory itself is ours, and writable by nobody else.  Symbolic links
    are followed where we or root made them.  Raises UntrustedError, OSError.
    """
    _check_way(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_way(directory)
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise UntrustedError(f"{directory} is no directory: choose another --run-directory")
    if found.st_uid != os.geteuid():
        raise UntrustedError(
            f"{directory} belongs to user {found.st_uid}: remove it, or choose another "
            "--run-directory"
        )
    if found.st_mode & 0o022:
        raise UntrustedError(f"others may write {directory}: chmod go-w, or remove it")


def _check_way(path: Path) -> None:
    """As far as it exists."""
    for each in [*reversed(path.parents), path]:
        try:
            found = os.lstat(each)
        except FileNotFoundError:
            return
        if found.st_uid not in (0, os.geteuid()):
            raise UntrustedError(
                f"{each} belongs to user {found.st_uid}, who could put anything there: choose "
                "another --run-directory"
            )
        if stat.S_ISLNK(found.st_mode):
            _check_way(Path(os.path.realpath(each)))
        elif found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            raise UntrustedError(
                f"others may write {each} and put anything there: chmod go-w, or choose another "
                "--run-directory"
            )
