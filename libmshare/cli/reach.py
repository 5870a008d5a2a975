"""Whether a preload library reaches a program, and if not, why: ld.so(8), elf(5)."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

_MACHINES: Final = {"x86_64": 62, "aarch64": 183}
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE = 1, 2, 3, 4
_DT_NEEDED, _DT_STRTAB = 1, 5
_HEADER: Final = struct.Struct("<16sHHIQQQIHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_DYNAMIC: Final = struct.Struct("<qQ")
_LARGEST: Final = 1 << 16
"""Of a part of a program that is read (bytes)."""


class _Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    size: int


class Reach(NamedTuple):
    """What is known of a program before it runs."""

    obstacle: str = ""
    """Why the preload library does not reach it."""
    sanitizer: str = ""
    """What has to be loaded before every other library."""


def reach(command: str) -> Reach:
    """Look at the program that execvp(3) would run; what cannot be read has no obstacle."""
    path = shutil.which(command)
    if path is None:
        return Reach()
    for _ in range(3):  # a script of a script
        try:
            with open(path, "rb") as file:
                if (obstacle := _gains_privileges(file)) is not None:
                    return Reach(obstacle)
                head = file.read(256)
                if head.startswith(b"#!"):
                    path = _interpreter(head)
                    if path is None:
                        return Reach()
                    continue
                return _elf(file) if head.startswith(b"\x7fELF") else Reach()
        except (OSError, struct.error, ValueError):
            return Reach()
    return Reach()


def _interpreter(head: bytes) -> str | None:
    words = head[2:].split(b"\n", 1)[0].split()
    if words[:1] == [b"/usr/bin/env"]:
        words = [word for word in words[1:] if not word.startswith(b"-")]
    return shutil.which(os.fsdecode(words[0])) if words else None


def _gains_privileges(file: BinaryIO) -> str | None:
    about = os.fstat(file.fileno())
    gains = (about.st_mode & stat.S_ISUID and about.st_uid != os.geteuid()) or (
        about.st_mode & stat.S_ISGID and about.st_mode & stat.S_IXGRP
        and about.st_gid != os.getegid()
    )  # fmt: skip
    if os.geteuid() != 0:
        with contextlib.suppress(OSError):
            gains = gains or bool(os.getxattr(file.fileno(), "security.capability"))
    return "it gains privileges when it is executed, so LD_PRELOAD is ignored" if gains else None


def _elf(file: BinaryIO) -> Reach:
    """Raises OSError, struct.error, ValueError for what is none."""
    file.seek(0)
    identity, _, machine, _, _, offset, _, _, _, size, count = _HEADER.unpack(
        file.read(_HEADER.size)
    )
    if identity[4] != 2 or machine != _MACHINES.get(platform.machine(), machine):
        return Reach("it is a program of another architecture, which this library is not for")
    segments = []
    for number in range(min(count, 64)):
        file.seek(offset + number * size)
        kind, _, at, address, _, length, _, _ = _SEGMENT.unpack(file.read(_SEGMENT.size))
        segments.append(_Segment(kind, at, address, length))
    go = any(name == b"Go" for name in _notes(file, segments))
    if not any(each.kind == _PT_INTERP for each in segments):
        what = "a Go program" if go else "a program"
        return Reach(f"it is {what} that is statically linked, so nothing is preloaded")
    if go:
        return Reach("it is a Go program, which makes its system calls itself")
    names = [name for name in _needed(file, segments) if re.match(rb"lib[a-z]+san\.so", name)]
    return Reach(sanitizer=os.fsdecode(names[0]) if names else "")


def _notes(file: BinaryIO, segments: list[_Segment]) -> Iterator[bytes]:
    for each in segments:
        if each.kind != _PT_NOTE:
            continue
        file.seek(each.offset)
        data = file.read(min(each.size, _LARGEST))
        at = 0
        while at + 12 <= len(data):
            name, description, _ = struct.unpack_from("<III", data, at)
            yield data[at + 12 : at + 12 + name].rstrip(b"\0")
            at += 12 + name + -name % 4 + description + -description % 4


def _needed(file: BinaryIO, segments: list[_Segment]) -> Iterator[bytes]:
    for dynamic in segments:
        if dynamic.kind != _PT_DYNAMIC:
            continue
        file.seek(dynamic.offset)
        data = file.read(min(dynamic.size, _LARGEST) // _DYNAMIC.size * _DYNAMIC.size)
        entries = list(_DYNAMIC.iter_unpack(data))
        strings = next((value for tag, value in entries if tag == _DT_STRTAB), 0)
        load = next(
            (s for s in segments if s.kind == _PT_LOAD and 0 <= strings - s.address < s.size), None
        )
        if load is None:
            return
        for tag, value in entries:
            if tag == _DT_NEEDED:
                file.seek(load.offset + strings - load.address + value)
                yield file.read(256).split(b"\0", 1)[0]


def closed_to_others(library: Path) -> Path | None:
    """What keeps other users from reading a library; None: nothing."""
    for each in (library, *library.parents):
        mode = each.stat().st_mode
        if not mode & (stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH):
            return each
    return None
