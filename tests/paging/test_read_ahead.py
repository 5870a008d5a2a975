"""Mapped files that are read from one end to the other."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import BASE, PAGE, Client, Daemon, MiB, clients, eventually

from msharefsd.memory.buffers import BUFFER
from msharefsd.paging.fills import READ_AHEAD

SIZE = 64 * MiB
FILE = 40 * MiB + PAGE // 2
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
READ, BOTH = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
PRIVATE, SHARED, FIXED = mmap.MAP_PRIVATE, mmap.MAP_SHARED, 0x10
SMALLEST = max(PAGE, 64 << 10)
Pair = tuple[Client, Client]


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    return make_daemon(f"--alignment={SIZE}")


@pytest.fixture
def pair(daemon: Daemon, client_program: Path) -> Iterator[Pair]:
    daemon.start()
    with clients(client_program, daemon) as start:
        first, second = start(), start()
        first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        yield first, second


@pytest.fixture
def file(directory: Path) -> Path:
    """40 MiB and half a page: each MiB is full of its number plus one."""
    path = directory / "long"
    path.write_bytes(b"".join(bytes([n + 1]) * MiB for n in range(41))[:FILE])
    return path


def memory_is(daemon: Daemon, size: int) -> None:
    eventually(partial(_has, daemon, size), f"{size} bytes of memory")


def _has(daemon: Daemon, size: int) -> bool:
    return int(daemon.field("r", "memory")) == size


def go_on(client: Client, end: int) -> int:
    """Touch what is next, and next, as who reads all does; where that has led to."""
    at, length = 0, SMALLEST
    while at < end:
        assert client.do("load", BASE + at) == str(at // MiB + 1)
        at, length = length, 2 * length
    return at


def holds(client: Client, start: int, end: int) -> None:
    for at in range(start, end, MiB):
        client.ok("check", BASE + at, min(MiB, end - at), at // MiB + 1)


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
@pytest.mark.parametrize("prot", [READ, BOTH])
def test_who_goes_on_is_read_ahead_for(
    pair: Pair, daemon: Daemon, file: Path, prot: int, flags: int
) -> None:
    first, second = pair
    first.ok("mmap", BASE, SIZE, prot, flags | FIXED, file, os.O_RDWR, 0)
    assert go_on(first, READ_AHEAD) == READ_AHEAD
    memory_is(daemon, READ_AHEAD)
    faults = daemon.metric('faults_total{kind="file"}')
    for client in pair:
        holds(client, 0, READ_AHEAD)
    assert daemon.metric('faults_total{kind="file"}') == faults
    # To the file's end, and no page further.
    for at in (READ_AHEAD, 2 * READ_AHEAD):
        assert first.do("load", BASE + at) == str(at // MiB + 1)
        memory_is(daemon, min(at + READ_AHEAD, FILE + PAGE // 2))
    holds(second, 0, 40 * MiB)
    assert first.do("load", BASE + FILE) == "0"
    assert first.do("load", BASE + FILE + PAGE) == "SIGBUS"
    assert file.stat().st_size == FILE


def test_a_touch_here_and_there_takes_no_more_than_it_needs(
    pair: Pair, daemon: Daemon, file: Path
) -> None:
    first, second = pair
    first.ok("mmap", BASE, SIZE, READ, PRIVATE | FIXED, file, os.O_RDONLY, 0)
    for count, at in enumerate((30 * MiB, 2 * MiB, 18 * MiB, 10 * MiB), start=1):
        assert second.do("load", BASE + at) == str(at // MiB + 1)
        memory_is(daemon, count * SMALLEST)


def test_it_ends_with_the_object(pair: Pair, daemon: Daemon, file: Path) -> None:
    first, second = pair
    first.ok("mmap", BASE, SIZE, READ, PRIVATE | FIXED, file, os.O_RDONLY, 0)
    second.ok("munmap", BASE + 10 * MiB, 2 * MiB)
    second.ok("mprotect", BASE + 14 * MiB, 2 * MiB, 0)
    go_on(first, READ_AHEAD // 2 + 1)
    memory_is(daemon, 10 * MiB)
    assert first.do("load", BASE + 12 * MiB) == "13"
    assert first.do("load", BASE + 10 * MiB) == "SIGBUS"
    assert first.do("load", BASE + 14 * MiB) == "SIGSEGV"
    second.ok("mprotect", BASE + 14 * MiB, 2 * MiB, READ)
    for client in pair:
        holds(client, 0, 10 * MiB)
        holds(client, 12 * MiB, 40 * MiB)


def test_what_was_written_to_stays_as_it_is(pair: Pair, daemon: Daemon, file: Path) -> None:
    first, second = pair
    first.ok("mmap", BASE, SIZE, BOTH, PRIVATE | FIXED, file, os.O_RDONLY, 0)
    written = (11 * MiB, 13 * MiB, 15 * MiB)
    for at in written:
        second.ok("store", BASE + at, 200)
    go_on(first, READ_AHEAD)
    memory_is(daemon, READ_AHEAD)
    for client in pair:
        for at in written:
            assert client.do("load", BASE + at) == "200"
            assert client.do("load", BASE + at + 1) == str(at // MiB + 1)


def test_limits_hold(
    make_daemon: Callable[..., Daemon], client_program: Path, file: Path, directory: Path
) -> None:
    most = 12 * MiB
    config = directory / "config"
    config.write_text(f"region_memory = {str(most)!r}\n")
    daemon = make_daemon(f"--alignment={SIZE}", f"--config={config}").start()
    daemon.expected.append("no memory for a fault")
    with clients(client_program, daemon) as start:
        client = start()
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        client.ok("mmap", BASE, SIZE, READ, PRIVATE | FIXED, file, os.O_RDONLY, 0)
        go_on(client, READ_AHEAD // 2 + 1)
        memory_is(daemon, most)
        holds(client, 0, most)
        assert client.do("load", BASE + most) == "SIGBUS"
        assert _has(daemon, most)


def test_it_is_no_hindrance_to_who_maps_something_else(pair: Pair, directory: Path) -> None:
    """Nobody ever sees a page of zeros, or one of the other file after mmap() returned."""
    paths = []
    for value in (5, 6):
        path = directory / str(value)
        path.write_bytes(bytes([value]) * READ_AHEAD)
        paths.append(path)
    first, second = pair
    for number in range(12):
        value = 5 + number % 2
        path = paths[number % 2]
        second.ok("mmap", BASE, READ_AHEAD, READ, PRIVATE | FIXED, path, os.O_RDONLY, 0)
        first.send("scan", BASE, READ_AHEAD)
        half = READ_AHEAD // 2
        second.ok("mmap", BASE + half, half, BOTH, PRIVATE | FIXED, path, os.O_RDONLY, 0)
        second.ok("munmap", BASE, BUFFER)
        second.ok("mmap", BASE, BUFFER, READ, PRIVATE | FIXED, path, os.O_RDONLY, 0)
        assert first.result() in (str(value), "SIGBUS")
        for client in pair:
            client.ok("check", BASE, READ_AHEAD, value)


def test_who_is_read_ahead_for_may_die(pair: Pair, daemon: Daemon, file: Path) -> None:
    first, second = pair
    first.ok("mmap", BASE, SIZE, READ, PRIVATE | FIXED, file, os.O_RDONLY, 0)
    first.send("scan", BASE, 40 * MiB)
    first.kill()
    eventually(lambda: daemon.sharers("r") == 1, "it is gone")
    holds(second, 0, 40 * MiB)


def test_a_daemon_that_dies_in_it_loses_nothing(pair: Pair, daemon: Daemon, file: Path) -> None:
    daemon.expected.append("taking down the mount")
    first, second = pair
    first.ok("mmap", BASE, SIZE, BOTH, SHARED | FIXED, file, os.O_RDWR, 0)
    go_on(first, READ_AHEAD // 2)
    second.ok("store", BASE, 77)
    daemon.kill()
    for client in pair:
        client.send("load", BASE + 39 * MiB)
    daemon.start()
    for client in pair:
        assert client.result() == "40"
        assert client.do("load", BASE) == "77"
        holds(client, MiB, 40 * MiB)
