"""Donors whose memory is not all theirs to give: allocators and sanitizers have been there."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, PAGE, SUPPORT, Client, Daemon, clients, eventually

SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
RESERVED = mmap.MAP_PRIVATE | 0x10 | 0x4000  # MAP_FIXED, MAP_NORESERVE
Spawn = Callable[..., Client]

pytestmark = pytest.mark.shm_only


def test_what_is_only_reserved_is_never_donated(spawn: Spawn, daemon: Daemon) -> None:
    """A gap of AddressSanitizer's, an arena: PROT_NONE, and no page is there."""
    client = spawn()
    client.ok("map", BASE, ALIGNMENT, mmap.MAP_PRIVATE)
    client.ok("store", BASE, 3)
    client.ok("mmap", BASE + ALIGNMENT, ALIGNMENT, 0, RESERVED)
    assert client.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == str(-errno.EEXIST)
    assert client.do("load", BASE + ALIGNMENT) == "SIGSEGV"
    assert client.do("load", BASE) == "3"
    eventually(lambda: not (daemon.mount / "r").exists(), "the name is gone")
    client.ok("munmap", BASE + ALIGNMENT, ALIGNMENT)
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    assert client.do("load", BASE) == "3"


def test_a_guard_page_of_ones_own_is_donated(spawn: Spawn, daemon: Daemon) -> None:
    client = spawn()
    client.ok("map", BASE, SIZE, mmap.MAP_PRIVATE)
    client.ok("store", BASE + PAGE, 4)
    client.ok("mprotect", BASE, PAGE, 0)
    client.ok("mmap", BASE + ALIGNMENT, ALIGNMENT, 3, RESERVED)
    client.ok("store", BASE + ALIGNMENT, 5)
    client.ok("mprotect", BASE + ALIGNMENT, PAGE, 0)  # it has a page
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    assert daemon.info("r", "maps").startswith(f"{BASE:x}-{BASE + PAGE:x} ---p ")
    assert client.do("load", BASE) == "SIGSEGV"
    assert client.do("load", BASE + PAGE) == "4"
    client.ok("mprotect", BASE + ALIGNMENT, PAGE, 1)
    assert client.do("load", BASE + ALIGNMENT) == "5"


def test_a_donor_whose_heap_is_in_the_range_does_not_wait_for_itself(
    client_program: Path, daemon: Daemon, directory: Path
) -> None:
    heap = directory / "heap.so"
    subprocess.run(
        ["cc", "-std=gnu11", "-shared", "-fPIC", "-fno-builtin", "-o", heap, SUPPORT / "heap.c"],
        check=True,
    )
    variables = {"LD_PRELOAD": str(heap), "HEAP_AT": hex(BASE + ALIGNMENT)}
    with clients(client_program, daemon, **variables) as start:
        client = start()
        client.ok("map", BASE, PAGE, mmap.MAP_PRIVATE)
        client.ok("store", BASE, 6)
        client.ok("mmap", BASE + PAGE, PAGE, 3, mmap.MAP_SHARED | 0x10)
        client.ok("store", BASE + PAGE, 7)
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        assert client.do("load", BASE) == "6"
        client.ok("background", "store", BASE, 8)  # a thread takes memory of the heap
        assert client.do("load", BASE) == "8"
        plain = start()
        plain.ok("hello")  # it has a heap from now on
        assert plain.do("mshare", "r", BASE, SIZE, os.O_RDWR, 0) == str(-errno.EINVAL)
