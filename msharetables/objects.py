"""Shared memory: which of it is one object, and what people call it.

The kernel names a shared mapping by its file's device and inode, and gives anonymous
shared memory a file of its own kernel-internal tmpfs.  System V segments are files there,
too, with their ids for inode numbers: so two of them in two IPC namespaces look alike.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from msharetables import proc
from msharetables.calls import HUGE_PAGE
from msharetables.proc import Vma

_DELETED: Final = b" (deleted)"
_SYSV: Final = re.compile(rb"/SYSV([0-9a-f]{8})")
_SHM: Final = "/dev/shm/"  # noqa: S108 - where the C library has POSIX shared memory
_HUGEPAGES: Final = "/sys/kernel/mm/hugepages"
_MFD_HUGE_SHIFT: Final = 26
_SIZES: Final = {"K": 10, "M": 20, "G": 30}


class Kind(StrEnum):
    """What memory it is."""

    ANONYMOUS = "anonymous"
    SYSV = "sysv"
    SHM = "shm"
    """POSIX shared memory: a file in /dev/shm."""
    MEMFD = "memfd"
    TMPFS = "tmpfs"
    """A file of another tmpfs."""
    HUGETLB = "hugetlb"
    FILE = "file"
    """Of a disk, or of a device."""


COLLAPSIBLE: Final = frozenset({Kind.ANONYMOUS, Kind.SYSV, Kind.SHM, Kind.MEMFD, Kind.TMPFS})
"""What MADV_COLLAPSE makes huge pages of, wherever it lies: the kernel's tmpfs."""


class Key(NamedTuple):
    """Which object."""

    device: int
    inode: int
    space: str = ""
    """The IPC namespace, if that matters."""


@dataclass(frozen=True, slots=True)
class Name:
    """What an object is called, by whoever maps it."""

    kind: Kind
    text: str
    """Without what programs it is of."""

    def label(self, program: str) -> str:
        """For people.  `program`: of whom it is, where it has no name of its own."""
        if self.kind is Kind.ANONYMOUS:
            return f"anonymous of {program}"
        if self.kind is Kind.HUGETLB and not self.text:
            return f"huge pages of {program}"
        if self.kind in (Kind.SHM, Kind.MEMFD):
            return f"{self.kind.value} {self.text}"
        return self.text


@dataclass(slots=True)
class Kernel:
    """Which devices hold shared memory: the kernel's own, and what is mounted."""

    shmem: int = -1
    """Of anonymous shared memory, System V segments and memfds."""
    huge: dict[int, int] = field(default_factory=dict)
    """hugetlb: the size of its pages (bytes), by device."""
    mounted: dict[int, str] = field(default_factory=dict)
    """The types of mounted file systems."""
    _seen: set[str] = field(default_factory=set)

    @classmethod
    def learn(cls) -> Kernel:
        """Ask the kernel, by making such memory; nothing of it is populated."""
        kernel = cls()
        with contextlib.suppress(OSError):
            kernel.shmem = _device(os.MFD_CLOEXEC)
        sizes: list[int] = []
        with contextlib.suppress(OSError):
            names = os.listdir(_HUGEPAGES)
            sizes = [int(n[10:-2]) << 10 for n in names if n.startswith("hugepages-")]
        for size in sizes:
            kind = os.MFD_HUGETLB | (size.bit_length() - 1) << _MFD_HUGE_SHIFT
            with contextlib.suppress(OSError):
                kernel.huge[_device(os.MFD_CLOEXEC | kind)] = size
        return kernel

    def see(self, pid: int | str) -> None:
        """Learn what is mounted where a process is, once for each mount namespace."""
        space = proc.namespace(pid, "mnt")
        if space in self._seen:
            return
        self._seen.add(space)
        for device, (kind, options) in proc.file_systems(pid).items():
            self.mounted[device] = kind
            if kind == "hugetlbfs":
                self.huge[device] = _page_size(options)

    def kind(self, vma: Vma) -> Kind:
        """What memory a mapping of a file is of."""
        if vma.device in self.huge:
            return Kind.HUGETLB
        if vma.device == self.shmem:
            if vma.path.startswith(b"/memfd:"):
                return Kind.MEMFD
            return Kind.SYSV if _SYSV.match(vma.path) else Kind.ANONYMOUS
        if self.mounted.get(vma.device) == "tmpfs":
            return Kind.SHM if vma.path.startswith(os.fsencode(_SHM)) else Kind.TMPFS
        return Kind.FILE

    def name(self, vma: Vma) -> Name:
        """What the object of a mapping is called."""
        kind = self.kind(vma)
        path = vma.path.removesuffix(_DELETED)
        text = os.fsdecode(path)
        if (match := _SYSV.match(path)) is not None:
            huge = ", huge pages" if kind is Kind.HUGETLB else ""
            return Name(kind, f"SysV {vma.inode} (key 0x{match[1].decode()}{huge})")
        if kind is Kind.HUGETLB:
            if path == b"/anon_hugepage":
                return Name(kind, "")
            if path.startswith(b"/memfd:"):
                return Name(kind, f"memfd {text.removeprefix('/memfd:')} (huge pages)")
        if kind is Kind.MEMFD:
            text = text.removeprefix("/memfd:")
        if kind is Kind.SHM:
            text = text.removeprefix(_SHM)
        if path != vma.path and kind is not Kind.MEMFD:
            text += " (deleted)"
        return Name(kind, text)


def key(vma: Vma, space: str) -> Key:
    """The object of a mapping; `space` is the IPC namespace of its process."""
    return Key(vma.device, vma.inode, space if _SYSV.match(vma.path) else "")


def _device(flags: int) -> int:
    fd = os.memfd_create("", flags)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def _page_size(options: str) -> int:
    for option in options.split(","):
        name, _, value = option.partition("=")
        if name == "pagesize" and value[-1:] in _SIZES:
            return int(value[:-1]) << _SIZES[value[-1]]
    return HUGE_PAGE
