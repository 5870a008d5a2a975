"""Robust mutexes that a process holds, as the kernel will find them when its threads end.

Each thread has told the kernel where its list is (set_robust_list(2)).  The list is the
process's memory, so it may say anything, and change while it is read: what is told here
is a hint.  Documentation/locking/robust-futexes.rst, kernel/futex/core.c.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from typing import Final

from msharefsd.linux import syscalls

MOST_THREADS: Final = 512
MOST_LOCKS: Final = 256
"""How many of a process's threads are looked at, and how much of a thread's list; the
kernel follows that up to 2048 (ROBUST_LIST_LIMIT)."""

_HEAD: Final = struct.Struct("=QqQ")  # list.next, futex_offset, list_op_pending
_NEXT: Final = struct.Struct("=Q")
_PRIORITY_INHERITANCE: Final = 1
"""A bit of a pointer, no part of the address."""
_TASK_SIZE: Final = 1 << 56


class _Part(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


def held(pid: int) -> Iterator[int]:
    """The addresses of the mutexes that a process's threads hold, or are about to take.

    It may wait for the process's address space.
    """
    try:
        threads = os.listdir(f"/proc/{pid}/task")[:MOST_THREADS]
    except OSError:
        return
    for thread in threads:
        yield from _of_thread(pid, int(thread))


def _of_thread(pid: int, thread: int) -> Iterator[int]:
    address = syscalls.robust_list(thread)
    head = _read(pid, address, _HEAD.size) if address else None
    if head is None:
        return
    entry, offset, pending = _HEAD.unpack(head)
    if pending:
        yield _futex(pending, offset)
    for _ in range(MOST_LOCKS):
        entry &= ~_PRIORITY_INHERITANCE
        if entry == address:
            return
        yield _futex(entry, offset)
        data = _read(pid, entry, _NEXT.size)
        if data is None:
            return
        (entry,) = _NEXT.unpack(data)


def _futex(entry: int, offset: int) -> int:
    return (entry & ~_PRIORITY_INHERITANCE) + offset


def _read(pid: int, address: int, length: int) -> bytes | None:
    """Some memory of a process; None if it has none there, or not to be read."""
    if not 0 < address < _TASK_SIZE:
        return None
    data = ctypes.create_string_buffer(length)
    here = _Part(ctypes.addressof(data), length)
    there = _Part(address, length)
    got = _libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return data.raw if got == length else None
