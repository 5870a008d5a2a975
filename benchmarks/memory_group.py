"""A memory cgroup with a limit, of version 1 or 2, whichever the machine has."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

V1: Final = Path("/sys/fs/cgroup/memory")
V2: Final = Path("/sys/fs/cgroup")
REMOVE_SECONDS: Final = 20.0


class NoMemoryGroupError(Exception):
    """There is none on the machine, or not for us."""


class MemoryGroup:
    """A group; who is added pays for memory there, and for page tables."""

    def __init__(self, path: Path, *, first: bool) -> None:
        """At `path`, which exists; `first`: of version 1."""
        self.path = path
        self._limit = "memory.limit_in_bytes" if first else "memory.max"
        self._peak = "memory.max_usage_in_bytes" if first else "memory.peak"

    def limit(self, size: int) -> None:
        """Have the OOM killer come at `size` bytes."""
        (self.path / self._limit).write_text(str(size))

    def add(self, pid: int) -> None:
        """Move a process there; its children are born there."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def peak(self) -> int | None:
        """The most that it ever had, bytes; None on a kernel that does not tell."""
        with contextlib.suppress(OSError):
            return int((self.path / self._peak).read_text())
        return None


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A new group, removed at the end; its processes must have ended by then.

    Raises NoMemoryGroupError.
    """
    first = (V1 / "memory.limit_in_bytes").exists()
    path = (V1 if first else V2) / f"mshare-bench-{os.getpid()}"
    try:
        if not first:
            (V2 / "cgroup.subtree_control").write_text("+memory")
        path.mkdir()
        try:
            group = MemoryGroup(path, first=first)
            group.limit(limit)
        except OSError:
            path.rmdir()
            raise
    except OSError as error:
        raise NoMemoryGroupError(f"no memory cgroup to be had: {error}") from error
    try:
        yield group
    finally:
        deadline = time.monotonic() + REMOVE_SECONDS
        while path.exists():
            try:
                path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
