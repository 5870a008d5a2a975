"""Control groups below our own, where a service manager has left them to us.

systemd marks a group that it delegates with the extended attribute `user.delegate` or
`trusted.delegate` (systemd.resource-control(5), cg_set_access() in its sources).  Where there is
no such mark the groups are somebody else's affair, and everything stays in the one that it was
started in.  Only cgroups(7) version 2 can be left to anybody.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from msharefsd.linux.mounts import mounts

_FSTYPE: Final = "cgroup2"
_MARKS: Final = ("user.delegate", "trusted.delegate")


def delegated() -> Path | None:
    """The group below which we may make some, if there is one: ours, or the one above it.

    The one above (systemd's DelegateSubgroup=) has no process of its own, so those below may
    have controllers: they get what it has.
    """
    own = _own()
    if own is None:
        return None
    if _is_delegated(own):
        return own
    if not _is_delegated(own.parent):
        return None
    for controller in ("cpu", "memory", "pids"):
        with contextlib.suppress(OSError):
            (own.parent / "cgroup.subtree_control").write_text(f"+{controller}")
    return own.parent


def enter(above: Path, name: str) -> None:
    """Move this process, which has one thread, into the group `name`.  Raises OSError."""
    group = above / name
    group.mkdir(exist_ok=True)
    (group / "cgroup.procs").write_text(str(os.getpid()))


def remove(above: Path, name: str) -> None:
    """Remove the group, if nobody is in it any more."""
    with contextlib.suppress(OSError):
        (above / name).rmdir()


def _own() -> Path | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            if number != "0":
                continue
            for mount in mounts():
                group = Path(mount.target) / path.lstrip("/")
                if mount.fstype == _FSTYPE and (group / "cgroup.procs").exists():
                    return group
    return None


def _is_delegated(group: Path) -> bool:
    for mark in _MARKS:
        with contextlib.suppress(OSError):
            if os.getxattr(group, mark) == b"1":
                return True
    return False
