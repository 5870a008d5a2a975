"""System calls on other processes, through libc.

Every function raises OSError with the kernel's errno.  Addresses and lengths are bytes.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
HUGE_PAGE: Final = 2 << 20
"""What one entry of a page of PMD entries maps, with base pages of 4 KiB (bytes)."""
TABLE: Final = 4096
"""The size of a page table, whatever its level."""
MADV_COLLAPSE: Final = 25

_SYS_PROCESS_MADVISE: Final = 440
_IOVEC: Final = struct.Struct("=QQ")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def process_madvise(pidfd: int, address: int, length: int, advice: int) -> None:
    """process_madvise(2) on one range of another process; takes CAP_SYS_NICE."""
    vector = _IOVEC.pack(address, length)
    if _libc.syscall(_SYS_PROCESS_MADVISE, pidfd, vector, 1, advice, 0) == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
