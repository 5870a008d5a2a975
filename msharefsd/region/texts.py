"""The text files under .regions/NAME: the same region, for people.

What may be long comes line by line, so that whoever writes it down can let others go
first; it is taken from the region as that is when it is asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Final

from msharefsd.link.messages import NameRecord
from msharefsd.linux import processes, syscalls
from msharefsd.region.region import Region, State

_SHARERS_HEAD: Final = "PID      UID      ACCESS     SINCE                COMMAND\n"


def without_range(name: NameRecord, kind: str) -> str:
    """The texts of a name that has no range, which no pager knows."""
    if kind == "info":
        return info(Region(name.id, name.name, name.mode, name.uid, name.gid))
    if kind == "pagetables":
        return "# The region has no memory yet.\n"
    return _SHARERS_HEAD if kind == "sharers" else ""


def info(region: Region) -> str:
    """`info`: one `key: value` a line; sizes and addresses in bytes."""
    rows: list[tuple[str, object]] = [
        ("name", region.label()),
        ("state", _state(region)),
        ("start", f"{region.start:#x}"),
        ("size", region.size),
        ("access", "read-only" if region.read_only else "read-write"),
        ("mode", f"{region.mode:04o}"),
        ("owner", f"{region.uid}:{region.gid}"),
        ("memory", region.allocated()),
        ("awaited", region.objects.awaited()),
        ("bringer", _bringer(region)),
        ("objects", len(region.objects)),
        ("sharers", len(region.sharers)),
        ("faults", region.counts.faults),
        ("populated", region.counts.populated),
        ("huge", region.counts.huge),
    ]
    if region.backing is not None:
        rows.insert(7, ("backing", f"{region.backing.kind} {region.backing.name}"))
        rows.insert(8, ("page", region.page))
    return "".join(f"{key + ':':<10} {value}\n" for key, value in rows)


def _bringer(region: Region) -> str:
    """Which process brings what is awaited; "none" there may be again at any time."""
    if not region.objects.awaited():
        return "-"
    if region.given_up:
        return "given up"
    sharer = region.sharers.get(region.bringer)
    return "none" if sharer is None else str(sharer.pid)


def _state(region: Region) -> str:
    if not region.linked and region.state is not State.BUILDING:
        return "removed"
    return region.state.value


def maps(region: Region) -> Iterator[str]:
    """`maps`: the objects in the format of /proc/PID/maps (proc_pid_maps(5))."""
    for item in list(region.objects):
        start = region.start + item.offset
        prot = "".join(
            letter if item.prot & bit else "-"
            for letter, bit in (
                ("r", syscalls.PROT_READ),
                ("w", syscalls.PROT_WRITE),
                ("x", syscalls.PROT_EXEC),
            )
        )
        if item.awaited:
            file, name = "00000000 00:00 0", f"[awaited:{region.label()}]"
        elif item.file is None:
            file = "00000000 00:00 0"
            name = f"[{'anon' if item.private else 'anon_shmem'}:{region.label()}]"
        else:
            of = item.file.identity
            file = f"{item.file_offset:08x} {of.major:02x}:{of.minor:02x} {of.inode}"
            # As the kernel does: only a newline would break the format.
            name = os.fsdecode(item.file.path).replace("\n", "\\012")
        fixed = f"{start:x}-{start + item.length:x} {prot}{'p' if item.private else 's'} {file}"
        # The kernel pads to column 73 before the name.
        yield f"{fixed:<72} {name}\n"


def sharers(region: Region) -> Iterator[str]:
    """`sharers`: one process a line."""
    yield _SHARERS_HEAD
    for sharer in list(region.sharers.values()):
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(sharer.since))
        access = "read-write" if sharer.writable else "read-only"
        # A process names itself, with newlines if it likes.
        command = processes.read_proc(sharer.pid, "comm").rstrip("\n").replace("\n", "\\012")
        yield f"{sharer.pid:<8} {sharer.uid:<8} {access:<10} {since} {command}\n"
