"""The texts in .regions/NAME: the only place that parses them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

_SHARER: Final = re.compile(r"(\d+) +(\d+) +(\S+) +(\S+) (.*)")
_MAP: Final = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+) +(.*)"
)


@dataclass(frozen=True, slots=True)
class Sharer:
    """A process that has attached a region, as `sharers` tells it."""

    pid: int
    uid: int
    access: str
    since: str
    command: str

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "pid": self.pid,
            "uid": self.uid,
            "access": self.access,
            "since": self.since,
            "command": self.command,
        }


def parse_info(content: str) -> dict[str, str]:
    """`info`: one `key: value` a line."""
    # Lines end with newlines and nothing else: a name may have other separators in it.
    pairs = (line.partition(":") for line in content.split("\n"))
    return {key: value.strip() for key, colon, value in pairs if colon}


def parse_sharers(content: str) -> list[Sharer]:
    """`sharers`: a heading, then one process a line."""
    found = []
    for line in content.split("\n"):
        match = _SHARER.fullmatch(line)
        if match:
            pid, uid, access, since, command = match.groups()
            found.append(Sharer(int(pid), int(uid), access, since, command))
    return found


def is_awaited(line: dict[str, Any]) -> bool:
    """Whether the contents of what a line of `maps` tells are still to be brought."""
    return bool(line["name"].startswith("[awaited:"))


def parse_maps(content: str) -> list[dict[str, Any]]:
    """`maps`: the format of /proc/PID/maps (proc_pid_maps(5))."""
    found = []
    for line in content.split("\n"):
        match = _MAP.fullmatch(line)
        if match:
            start, end, permissions, offset, device, inode, name = match.groups()
            found.append(
                {
                    "start": int(start, 16),
                    "end": int(end, 16),
                    "permissions": permissions,
                    "offset": int(offset, 16),
                    "device": device,
                    "inode": int(inode),
                    "name": name,
                }
            )
    return found
