r"""What /proc says of processes.

A process may end at any time, and become another program at any time: every function
that raises OSError may do so for that (ENOENT, ESRCH).  Names come from processes, so
they may hold anything; the kernel writes a newline in them as \012 (status: \n).

`maps`, `cmdline`, `pagemap` and what is in `map_files` wait for the lock of the process's
address space, which it may hold for as long as it likes: see `patience`.  `status`,
`stat`, `cgroup` and `ns` do not.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

_MAP: Final = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)\n"
)
_PART: Final = 1 << 17
MOST_MAPS: Final = 32 << 20
"""How much of one `maps` is read (bytes): vm.max_map_count lines of the usual length are 6 MiB."""


class Vma(NamedTuple):
    """A line of /proc/PID/maps (proc_pid_maps(5)); offset in bytes."""

    start: int
    end: int
    shared: bool
    permissions: str
    offset: int
    device: int
    """As os.makedev() has it."""
    inode: int
    path: bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Status:
    """Of /proc/PID/status, what is about memory and whose it is; sizes in bytes."""

    name: str
    uid: int
    """The effective user: whose rights it has."""
    parent: int
    threads: int
    tables: int
    """VmPTE: page tables of all levels but the top one."""
    size: int
    """VmSize."""
    shared: int
    """RssShmem: what of shared memory is in its page tables."""


def read(pid: int | str, name: str, most: int = 1 << 16) -> bytes:
    """A file of /proc/PID, not more than `most` bytes of it.  Raises OSError."""
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while most > 0 and (part := os.read(fd, min(most, _PART))):
            parts.append(part)
            most -= len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def pids() -> list[int]:
    """All processes that this pid namespace has."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot.  Raises OSError.

    With the pid it names one process for good: field 22 of /proc/PID/stat, counted from
    behind the name (proc_pid_stat(5)).
    """
    return int(read(pid, "stat").rpartition(b")")[2].split()[19])


def has_ended(pid: int) -> bool:
    """Whether a process does nothing any more, though its parent may not know yet.

    Raises OSError if it is gone altogether.
    """
    return read(pid, "stat").rpartition(b")")[2].split()[0] in (b"Z", b"X")


def status(pid: int) -> Status | None:
    """None for kernel threads and zombies: they have no memory.  Raises OSError."""
    fields: dict[bytes, bytes] = {}
    for line in read(pid, "status").split(b"\n"):
        key, _, value = line.partition(b":")
        fields[key] = value
    if b"VmPTE" not in fields:
        return None
    return Status(
        name=os.fsdecode(fields[b"Name"].strip(b"\t")),
        uid=int(fields[b"Uid"].split()[1]),
        parent=int(fields[b"PPid"]),
        threads=int(fields[b"Threads"]),
        tables=_kib(fields[b"VmPTE"]),
        size=_kib(fields[b"VmSize"]),
        shared=_kib(fields.get(b"RssShmem", b"0 kB")),
    )


def user(pid: int) -> int | None:
    """Whose rights a process has; None if it is gone."""
    with contextlib.suppress(OSError):
        for line in read(pid, "status").split(b"\n"):
            if line.startswith(b"Uid:"):
                return int(line.split()[2])
    return None


def _kib(value: bytes) -> int:
    return int(value.split()[0]) << 10


def page_tables() -> int | None:
    """PageTables of /proc/meminfo, in bytes: all that this machine has."""
    with contextlib.suppress(OSError), open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"PageTables:"):
                return _kib(line.partition(b":")[2])
    return None


def maps(pid: int | str) -> Iterator[Vma]:
    """The mappings of a process, by address.  Raises OSError.

    [vsyscall] is left out: it is the kernel's own.  The file is no snapshot: lines may
    overlap if the process maps while it is read.
    """
    for match in _MAP.finditer(read(pid, "maps", MOST_MAPS)):
        start, end, permissions, offset, major, minor, inode, path = match.groups()
        if path == b"[vsyscall]":
            continue
        yield Vma(
            int(start, 16),
            int(end, 16),
            permissions[3:] == b"s",
            permissions.decode(),
            int(offset, 16),
            os.makedev(int(major, 16), int(minor, 16)),
            int(inode),
            path,
        )


def namespace(pid: int | str, kind: str) -> str:
    """Which namespace of a kind a process is in; "" if it may not be known."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def cgroup(pid: int) -> str:
    """The path of a process's cgroup: of version 2, else of systemd's own hierarchy, else any.

    "" if it is gone.
    """
    try:
        text = os.fsdecode(read(pid, "cgroup"))
    except OSError:
        return ""
    found = ""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if path != "/" and (not found or controllers in ("", "name=systemd")):
            found = path
    return found


def file_systems(pid: int | str) -> dict[int, tuple[str, str]]:
    """What is mounted where the process is: device → (type, options).

    Empty if that may not be known.
    """
    found: dict[int, tuple[str, str]] = {}
    try:
        lines = read(pid, "mountinfo", 4 << 20).split(b"\n")
    except OSError:
        return found
    for line in lines:
        fields = line.split(b" ")
        if b"-" not in fields[6:]:
            continue
        major, _, minor = fields[2].partition(b":")
        behind = fields[fields.index(b"-", 6) + 1 :]
        if len(behind) >= 3:
            device = os.makedev(int(major), int(minor))
            found[device] = (os.fsdecode(behind[0]), os.fsdecode(behind[2]))
    return found


def parent(pid: int) -> int:
    """Of whom a process is a child.  Raises OSError."""
    return int(read(pid, "stat").rpartition(b")")[2].split()[1])


def with_children(roots: Iterable[int]) -> set[int]:
    """These processes, their children, and the children of those; what has ended is left out."""
    children: dict[int, list[int]] = {}
    for pid in pids():
        with contextlib.suppress(OSError):
            children.setdefault(parent(pid), []).append(pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return found
