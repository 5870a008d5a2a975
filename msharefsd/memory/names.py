"""Names of memory that nobody can guess.

Everybody may make files in /dev/shm, under any name.  So memory has names with 128 random
bits, and the journal has them before the memory is made: what is not in the journal is
never taken for ours, and what is in it is nobody else's, another daemon's in a container
with the same run directory neither.  The prefix is for people: it tells which daemon's.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from msharefsd.memory.shm import MARK, SHM_DIRECTORY, unlink_shm


@dataclass(frozen=True, slots=True)
class MemoryNames:
    """What a region's memory is called."""

    backing: str
    stash: str


def prefix(run_directory: Path) -> str:
    """What names of the daemon with that run directory begin with, in /dev/shm."""
    return f"/{MARK}{hashlib.sha256(os.fsencode(run_directory)).hexdigest()[:8]}-"


def new(run_directory: Path, huge: Path | None = None) -> MemoryNames:
    """Names for a new region; its backing lies in the hugetlbfs `huge`, if that is given."""
    start = prefix(run_directory)
    backing = f"{start}{secrets.token_hex(16)}"
    if huge is not None:
        backing = str(huge / secrets.token_hex(16))
    return MemoryNames(backing, f"{start}{secrets.token_hex(16)}")


def left_behind(run_directory: Path) -> list[str]:
    """What lies in /dev/shm under such names, whosever it is: for tests and for people."""
    start = prefix(run_directory)
    return [f"/{name}" for name in os.listdir(SHM_DIRECTORY) if f"/{name}".startswith(start)]


def remove(names: MemoryNames) -> None:
    """Remove both, as far as they are there.  Raises OSError."""
    for name in (names.backing, names.stash):
        if os.path.exists(SHM_DIRECTORY + name):
            unlink_shm(name)
        elif name.startswith("/") and name.count("/") > 1 and os.path.exists(name):
            os.unlink(name)
