"""A call that waits for the daemon keeps nobody else in its process from anything."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, PAGE, Client, Daemon

SIZE = 2 * ALIGNMENT
ALICE = 65531
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
FIXED_SHARED, FIXED_PRIVATE = mmap.MAP_SHARED | 0x10, mmap.MAP_PRIVATE | 0x10
ALICES, BETWEEN, OWN = BASE, BASE + 2 * SIZE, BASE + 4 * SIZE
Spawn = Callable[..., Client]

pytestmark = pytest.mark.shm_only


@pytest.fixture
def caller(daemon: Daemon, spawn: Spawn) -> Iterator[Client]:
    """A process with a call under way that gets no answer, and a region of its own."""
    alice = spawn(user=ALICE, group=ALICE, extra_groups=[])
    alice.ok("mshare", "alices", ALICES, SIZE, CREATE, 0o600)
    client = spawn()
    client.ok("mshare", "alices", ALICES, SIZE, os.O_RDWR, 0)
    client.ok("mshare", "own", OWN, SIZE, CREATE, 0o600)
    pager = daemon.pager(ALICE)
    os.kill(pager, signal.SIGSTOP)
    try:
        client.send("background", "mmap", ALICES, PAGE, 3, FIXED_SHARED)
        yield client
    finally:
        os.kill(pager, signal.SIGCONT)
    assert client.result() == "0", "and in the end it has its answer"
    client.ok("store", ALICES, 1)


def test_calls_on_other_regions_go_on(caller: Client) -> None:
    caller.ok("mmap", OWN, PAGE, 3, FIXED_SHARED)
    caller.ok("store", OWN, 1)
    caller.ok("mprotect", OWN, PAGE, 1)
    caller.ok("msync", OWN, PAGE, 4)
    caller.ok("munmap", OWN, PAGE)


def test_what_is_mapped_beside_regions_goes_on(caller: Client) -> None:
    """As malloc() does it; between two regions the library has to look."""
    caller.ok("map", BETWEEN, SIZE, FIXED_PRIVATE)
    caller.ok("store", BETWEEN, 1)
    caller.ok("mprotect", BETWEEN, PAGE, 1)
    caller.ok("munmap", BETWEEN, SIZE)


def test_regions_are_made_attached_and_left(caller: Client, spawn: Spawn) -> None:
    caller.ok("mshare", "another", BETWEEN, SIZE, CREATE, 0o600)
    assert caller.do("stat", "another") == f"{BETWEEN} {SIZE}"
    caller.ok("unlink", "another")
    other = spawn()
    other.ok("mshare", "others", BETWEEN, SIZE, CREATE, 0o600)
    caller.ok("mshare", "others", BETWEEN, SIZE, os.O_RDWR, 0)
    caller.ok("detach", "others")


def test_fork_goes_on(caller: Client) -> None:
    """The child attaches what its parent has, and so it waits; its parent does not."""
    caller.ok("bare_fork")


def test_one_region_is_attached_once(spawn: Spawn) -> None:
    """Threads of one process that attach the same region at the same time."""
    client = spawn()
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    client.ok("detach", "r")
    for _ in range(10):
        for _ in range(4):
            client.send("background", "mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        assert sorted(client.result() for _ in range(4)) == ["-22", "-22", "-22", "0"]
        client.ok("detach", "r")


def test_a_call_and_an_end_at_the_same_time(spawn: Spawn, directory: Path) -> None:
    """Whoever calls while another thread detaches is told so, or is done before."""
    client, holder = spawn(), spawn()
    holder.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    for _ in range(30):
        client.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        for number in range(4):
            client.send("background", "mmap", BASE + number * PAGE, PAGE, 3, FIXED_SHARED)
        client.send("background", "detach", "r")
        results = [client.result() for _ in range(5)]
        # What comes after the end maps memory of its own there, or finds nothing.
        assert set(results) <= {"0", "-2"}, results
        client.do("munmap", BASE, 4 * PAGE)
