"""Names of memory that nobody can guess, and by which we know our own.

Everybody may make files in /dev/shm, under any name.  So memory has names with 128 random
bits, and the journal has them before the memory is made: what is in the journal is nobody
else's.  Before those bits stands a mark: which run directory (by its path, for people), which
one of those that had this path (by a number that lies in it: containers have run directories
of the same path, and one /dev/shm perhaps), and whose regions.

By the mark we find memory that no journal knows, because that was lost.  It counts only if
it is provably ours: anybody can give a file such a name, but not our user as its owner.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from msharefsd.memory.shm import MARK, SHM_DIRECTORY, unlink_shm

IDENTITY_FILE: Final = "identity"
_IDENTITY_BYTES: Final = 8
_HUGE_NAME: Final = re.compile(r"(\d{1,10})-")


@dataclass(frozen=True, slots=True)
class MemoryNames:
    """What a region's memory is called."""

    backing: str
    stash: str


def prefix(run_directory: Path) -> str:
    """What names of the daemon with that run directory begin with, in /dev/shm."""
    return f"/{MARK}{hashlib.sha256(os.fsencode(run_directory)).hexdigest()[:8]}-"


def identity(run_directory: Path) -> str:
    """The number of a run directory, which it is given once.  Raises OSError."""
    path = run_directory / IDENTITY_FILE
    with contextlib.suppress(FileNotFoundError):
        text = path.read_text(errors="replace")
        if re.fullmatch(rf"[0-9a-f]{{{2 * _IDENTITY_BYTES}}}", text):
            return text
    # Whole or not there: we may be killed.
    made = secrets.token_hex(_IDENTITY_BYTES)
    new = path.with_suffix(".new")
    new.write_text(made)
    new.rename(path)
    return made


@dataclass(frozen=True, slots=True)
class Mark:
    """What the names of the memory of one user's regions begin with."""

    run_directory: Path
    identity: str
    uid: int

    @property
    def start(self) -> str:
        """In /dev/shm."""
        return f"{prefix(self.run_directory)}{self.identity}-{self.uid}-"

    def new(self, huge: Path | None = None) -> MemoryNames:
        """Names for a new region; its backing lies in the hugetlbfs `huge`, if that is given."""
        backing = f"{self.start}{secrets.token_hex(16)}"
        if huge is not None:
            backing = str(huge / f"{self.uid}-{secrets.token_hex(16)}")
        return MemoryNames(backing, f"{self.start}{secrets.token_hex(16)}")

    def found(self, huge: Path) -> list[str]:
        """What is there under such names and is ours, as a journal would have it."""
        here = [
            f"/{name}" for name in os.listdir(SHM_DIRECTORY) if f"/{name}".startswith(self.start)
        ]
        with contextlib.suppress(OSError):  # it may not be mounted
            here += [
                str(huge / name) for name in os.listdir(huge) if name.startswith(f"{self.uid}-")
            ]
        return sorted(name for name in here if _is_ours(path(name)))


# Memory knows which change of its region's objects it has seen: an attribute of its file,
# which nobody else may set (xattr(7)).  A journal that is behind it was put back.

_CHANGES: Final = "trusted.msharefs.changes" if os.geteuid() == 0 else "user.msharefs.changes"


def stamp(fd: int, number: int) -> None:
    """Write down the number of a change.  Where there are no attributes it is not known."""
    with contextlib.suppress(OSError):
        os.setxattr(fd, _CHANGES, b"%d" % number)


def stamped(name: str) -> int:
    """The number of the last change that memory of that name has seen; 0 if it is not known."""
    try:
        return int(os.getxattr(path(name), _CHANGES, follow_symlinks=False))
    except (OSError, ValueError):
        return 0


def path(name: str) -> str:
    """Where memory of that name lies."""
    return SHM_DIRECTORY + name if name.count("/") == 1 else name


def _is_ours(file: str) -> bool:
    """Whether nobody else can have made it.  A second name may be anybody's."""
    try:
        found = os.lstat(file)
    except OSError:
        return False
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_uid == os.geteuid()
        and stat.S_IMODE(found.st_mode) == 0o600
        and found.st_nlink == 1
    )


def users(run_directory: Path, number: str, huge: Path) -> set[int]:
    """Whose regions have memory there that is ours; `number` is the run directory's.

    Anybody may have put any number of files there: one look at each, and for a thread.
    """
    ours = re.compile(rf"{re.escape(prefix(run_directory)[1:])}{number}-(\d{{1,10}})-")
    found: set[int] = set()
    for directory, pattern in ((SHM_DIRECTORY, ours), (str(huge), _HUGE_NAME)):
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                match = pattern.match(entry.name)
                if match is not None and int(match[1]) not in found and _is_ours(entry.path):
                    found.add(int(match[1]))
    return found


def left_behind(run_directory: Path) -> list[str]:
    """What lies in /dev/shm under such names, whosever it is: for tests and for people."""
    start = prefix(run_directory)
    return [f"/{name}" for name in os.listdir(SHM_DIRECTORY) if f"/{name}".startswith(start)]


def remove(names: MemoryNames) -> None:
    """Remove both, as far as they are there.  Raises OSError."""
    for name in (names.backing, names.stash):
        remove_one(name)


def remove_unmade(name: str) -> None:
    """Remove what has no size yet: whoever made it was killed before.  Raises OSError.

    shm_open(3) and ftruncate(2) are two calls.
    """
    with contextlib.suppress(FileNotFoundError):
        if os.lstat(path(name)).st_size == 0:
            remove_one(name)


def remove_one(name: str) -> None:
    """Remove a name, if it is there.  Raises OSError."""
    if os.path.exists(SHM_DIRECTORY + name):
        unlink_shm(name)
    elif name.startswith("/") and name.count("/") > 1 and os.path.exists(name):
        os.unlink(name)
