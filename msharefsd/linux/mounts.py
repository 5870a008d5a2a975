"""The mount table: /proc/self/mountinfo (proc_pid_mountinfo(5))."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    device: tuple[int, int]
    root: str
    """What of the file system is seen there."""
    target: str
    fstype: str
    source: str


def mounts() -> Iterator[Mount]:
    """Every mount of this namespace, in the order they were made."""
    text = Path("/proc/self/mountinfo").read_bytes()
    for line in text.split(b"\n"):
        fields = line.split(b" ")
        if b"-" not in fields:
            continue
        after = fields.index(b"-") + 1
        major, _, minor = fields[2].partition(b":")
        yield Mount(
            (int(major), int(minor)),
            _unescape(fields[3]),
            _unescape(fields[4]),
            _unescape(fields[after]),
            _unescape(fields[after + 1]),
        )


def _unescape(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), field))


def top_mount(target: str) -> Mount | None:
    """The mount that is seen at `target`, if one is mounted right there."""
    found = None
    for mount in mounts():
        if mount.target == target:
            found = mount
    return found
