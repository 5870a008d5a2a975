"""What is mapped inside a region: plain calls of one process hold for all of them."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import (
    ALIGNMENT,
    BASE,
    CONNECTIONS,
    PAGE,
    SUPPORT,
    Client,
    Daemon,
    clients,
    eventually,
)

from msharefsd.linux import processes, syscalls
from msharefsd.memory.sparse import AT_ONCE
from msharefsd.mount import mounting

SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
READ, WRITE, NONE = mmap.PROT_READ, mmap.PROT_WRITE, 0
BOTH = READ | WRITE
SHARED, PRIVATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE
FIXED, NOREPLACE = 0x10, 0x100000
MS_SYNC, MS_ASYNC = 4, 1
DONTNEED, DOFORK = 4, 11
Spawn = Callable[..., Client]
Pair = tuple[Client, Client]


def minus(code: int) -> str:
    return str(-code)


def loads(client: Client, address: int, value: str) -> bool:
    return client.do("load", address) == value


@pytest.fixture
def pair(spawn: Spawn) -> Pair:
    """Two sharers of an empty region."""
    first, second = spawn(), spawn()
    first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    return first, second


@pytest.fixture
def file(directory: Path) -> Path:
    """Eight pages: each begins with its number plus one; the last one is half a page."""
    path = directory / "file"
    path.write_bytes(b"".join(bytes([n + 1]) * PAGE for n in range(8))[: -PAGE // 2])
    return path


def test_a_mapping_of_one_is_a_mapping_of_all(pair: Pair, daemon: Daemon) -> None:
    first, second = pair
    first.ok("mmap", BASE + PAGE, 4 * PAGE, BOTH, SHARED | FIXED)
    second.ok("store", BASE + PAGE, 7)
    assert first.do("load", BASE + PAGE) == "7"
    assert first.do("load", BASE) == "SIGBUS"
    assert second.do("load", BASE + 5 * PAGE) == "SIGBUS"
    line = daemon.info("r", "maps")
    assert line.startswith(f"{BASE + PAGE:x}-{BASE + 5 * PAGE:x} rw-s ")


def test_unmapping_takes_effect_everywhere_and_frees_the_memory(pair: Pair, daemon: Daemon) -> None:
    first, second = pair
    first.ok("mmap", BASE, SIZE, BOTH, SHARED | FIXED)
    first.ok("fill", BASE, SIZE, 1)
    second.ok("fill", BASE, SIZE, 2)
    assert int(daemon.field("r", "memory")) == SIZE
    second.ok("munmap", BASE, ALIGNMENT)
    assert int(daemon.field("r", "memory")) == SIZE - ALIGNMENT
    for client in pair:
        assert client.do("load", BASE) == "SIGBUS"
        assert client.do("from_memory", BASE + PAGE, 1) == minus(errno.EFAULT)
        assert client.do("load", BASE + ALIGNMENT) == "2"


def test_a_new_mapping_starts_fresh_also_where_there_was_a_sigbus(pair: Pair, spawn: Spawn) -> None:
    reader = spawn()
    reader.ok("mshare", "r", BASE, SIZE, os.O_RDONLY, 0)
    sharers = (*pair, reader)
    for _ in range(3):
        for client in sharers:
            assert client.do("load", BASE + 3 * PAGE) == "SIGBUS"
            assert client.do("from_memory", BASE + 5 * PAGE, 1) == minus(errno.EFAULT)
        pair[1].ok("mmap", BASE, 16 * PAGE, BOTH, PRIVATE | FIXED)
        for client in sharers:
            assert client.do("load", BASE + 3 * PAGE) == "0"
            assert client.do("from_memory", BASE + 5 * PAGE, 1) == "1"
        pair[0].ok("store", BASE + 3 * PAGE, 9)
        assert reader.do("load", BASE + 3 * PAGE) == "9"
        pair[0].ok("munmap", BASE, 16 * PAGE)


def test_fixed_replaces_and_noreplace_refuses(pair: Pair) -> None:
    first, second = pair
    first.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED | FIXED)
    first.ok("fill", BASE, 8 * PAGE, 5)
    again = ("mmap", BASE + 2 * PAGE, 2 * PAGE, BOTH, PRIVATE)
    assert second.do(*again[:-1], PRIVATE | NOREPLACE) == minus(errno.EEXIST)
    assert first.do("check", BASE, 8 * PAGE, 5).startswith("byte 1 is 0")
    second.ok(*again[:-1], PRIVATE | FIXED)
    assert [first.do("load", BASE + n * PAGE) for n in range(8)] == list("55005555")


def test_an_address_that_is_no_more_than_a_wish(pair: Pair) -> None:
    first, _ = pair
    assert first.do("mmap", BASE, PAGE, BOTH, SHARED) == "0"
    assert first.do("mmap", BASE, PAGE, BOTH, SHARED) == "elsewhere"
    assert first.do("mmap", BASE + SIZE - PAGE, 2 * PAGE, BOTH, SHARED) == "elsewhere"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("mmap", BASE - PAGE, 2 * PAGE, BOTH, SHARED | FIXED), errno.EINVAL),
        (("mmap", BASE + SIZE - PAGE, 2 * PAGE, BOTH, SHARED | FIXED), errno.EINVAL),
        (("mmap", BASE, 0, BOTH, SHARED | FIXED), errno.EINVAL),
        (("mmap", BASE + 1, PAGE, BOTH, SHARED | FIXED), errno.EINVAL),
        (("mmap", BASE, PAGE, BOTH, FIXED), errno.EINVAL),
        (("mmap", BASE, PAGE, BOTH, SHARED | FIXED | 0x40000), errno.EINVAL),
        (("mmap", BASE, PAGE, BOTH | mmap.PROT_EXEC, SHARED | FIXED), errno.EPERM),
        (("munmap", BASE + 1, PAGE), errno.EINVAL),
        (("munmap", BASE, 0), errno.EINVAL),
        (("mprotect", BASE, PAGE, READ), errno.ENOMEM),
        (("mprotect", BASE, PAGE, 64), errno.EINVAL),
        (("msync", BASE, PAGE, MS_SYNC), errno.ENOMEM),
        (("msync", BASE, PAGE, MS_SYNC | MS_ASYNC), errno.EINVAL),
        (("madvise", BASE, PAGE, DOFORK), errno.EINVAL),
        (("madvise", BASE, PAGE, DONTNEED), errno.ENOMEM),
        (("mremap", BASE, PAGE, 2 * PAGE, 1), errno.ENOMEM),
        (("mremap", BASE, PAGE, PAGE, 3, BASE + PAGE), errno.EINVAL),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(
    pair: Pair, daemon: Daemon, words: tuple[object, ...], code: int
) -> None:
    assert pair[0].do(*words) == minus(code)
    assert daemon.info("r", "maps") == ""


def test_a_call_that_sticks_out_of_the_region_is_split(pair: Pair) -> None:
    first, second = pair
    for start in (BASE - 4 * PAGE, BASE + SIZE):
        first.ok("mmap", start, 4 * PAGE, BOTH, PRIVATE | FIXED)
        first.ok("fill", start, 4 * PAGE, 3)
    first.ok("mmap", BASE, SIZE, BOTH, SHARED | FIXED)
    first.ok("fill", BASE, SIZE, 4)
    first.ok("mprotect", BASE - 2 * PAGE, 4 * PAGE, READ)
    for address in (BASE - 2 * PAGE, BASE, BASE + PAGE):
        assert first.do("store", address, 1) == "SIGSEGV"
    assert second.do("store", BASE, 1) == "SIGSEGV"
    first.ok("store", BASE - 3 * PAGE, 1)
    first.ok("munmap", BASE - 4 * PAGE, SIZE + 8 * PAGE)
    assert first.do("load", BASE - PAGE) == "SIGSEGV"
    assert first.do("load", BASE + SIZE) == "SIGSEGV"
    for client in pair:
        assert client.do("load", BASE) == "SIGBUS"


@pytest.mark.parametrize("call", [("mprotect", READ), ("madvise", DONTNEED), ("msync", MS_SYNC)])
def test_a_call_that_sticks_out_to_where_nothing_is_does_nothing(
    pair: Pair, call: tuple[str, int]
) -> None:
    first, _ = pair
    first.ok("mmap", BASE, SIZE, BOTH, PRIVATE | FIXED)
    first.ok("fill", BASE, SIZE, 4)
    for start in (BASE - PAGE, BASE + SIZE - PAGE):
        assert first.do(call[0], start, 2 * PAGE, call[1]) == minus(errno.ENOMEM)
    for client in pair:
        for page in (BASE, BASE + SIZE - PAGE):
            assert client.do("load", page) == "4"
            client.ok("store", page, 4)


def test_protection_holds_for_everybody_and_can_be_lifted(pair: Pair, spawn: Spawn) -> None:
    first, second = pair
    first.ok("mmap", BASE, 64 * PAGE, BOTH, SHARED | FIXED)
    first.ok("fill", BASE, 32 * PAGE, 6)
    second.ok("store", BASE, 6)
    second.ok("mprotect", BASE, 64 * PAGE, READ)
    later = spawn()
    later.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    for client in (*pair, later):
        assert client.do("load", BASE) == "6"
        for page in (0, 5, 40):  # mapped here; mapped by another; absent
            assert client.do("store", BASE + page * PAGE, 1) == "SIGSEGV"
            assert client.do("guilty", BASE + page * PAGE + 9) == str(BASE + page * PAGE + 9)
            assert client.do("to_memory", BASE + page * PAGE, 8) == minus(errno.EFAULT)
        # The page is out of reach for an instant more: see violation.py.
        eventually(partial(loads, client, BASE + 40 * PAGE, "0"), "back again")
        eventually(partial(loads, client, BASE + 5 * PAGE, "6"), "back again")
        assert client.do("store", BASE + 40 * PAGE, 1) == "SIGSEGV"
    first.ok("mprotect", BASE, 64 * PAGE, BOTH)
    for number, client in enumerate((*pair, later)):
        client.ok("fill", BASE, 64 * PAGE, number + 10)
    assert first.do("load", BASE + 40 * PAGE) == "12"


def test_memory_that_nobody_may_touch_keeps_its_contents(pair: Pair, spawn: Spawn) -> None:
    first, second = pair
    reader = spawn()
    reader.ok("mshare", "r", BASE, SIZE, os.O_RDONLY, 0)
    first.ok("mmap", BASE, 64 * PAGE, BOTH, SHARED | FIXED)
    first.ok("fill", BASE, 32 * PAGE, 8)
    first.ok("mprotect", BASE, 64 * PAGE, NONE)
    later = spawn()
    later.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    everybody = (first, second, reader, later)
    for client in everybody:
        for page in (0, 31, 40):
            assert client.do("load", BASE + page * PAGE) == "SIGSEGV"
            assert client.do("from_memory", BASE + page * PAGE, 8) == minus(errno.EFAULT)
    second.ok("mprotect", BASE, 64 * PAGE, READ)
    for client in everybody:
        assert client.do("load", BASE) == "8"
        assert client.do("load", BASE + 31 * PAGE) == "8"
        assert client.do("load", BASE + 40 * PAGE) == "0"
        assert client.do("store", BASE + 31 * PAGE, 1) == "SIGSEGV"
    second.ok("mprotect", BASE, 64 * PAGE, BOTH)
    later.ok("store", BASE + 31 * PAGE, 3)
    assert reader.do("load", BASE + 31 * PAGE) == "3"


def test_what_comes_back_brings_no_zeros_for_pages_of_a_file_beside_it(
    pair: Pair, directory: Path
) -> None:
    first, second = pair
    path = directory / "letters"
    path.write_bytes(b"F" * 16 * PAGE)
    length = 16 * PAGE
    first.ok("mmap", BASE, length, BOTH, PRIVATE | FIXED, path, os.O_RDONLY, 0)
    assert first.do("scan", BASE, length) == str(ord("F"))
    first.ok("mprotect", BASE, length, NONE)
    first.ok("mprotect", BASE, length, BOTH)
    first.ok("madvise", BASE, length // 2, DONTNEED)
    assert second.do("load", BASE + length // 2) == str(ord("F"))
    assert second.do("load", BASE) == str(ord("F"))


def test_protection_up_to_a_hole(pair: Pair) -> None:
    first, second = pair
    first.ok("mmap", BASE, 2 * PAGE, BOTH, SHARED | FIXED)
    first.ok("mmap", BASE + 3 * PAGE, PAGE, BOTH, SHARED | FIXED)
    assert first.do("mprotect", BASE, 4 * PAGE, READ) == minus(errno.ENOMEM)
    assert second.do("store", BASE + PAGE, 1) == "SIGSEGV"
    second.ok("store", BASE + 3 * PAGE, 1)


def test_a_private_file_mapping_is_shared_and_never_reaches_the_file(
    pair: Pair, file: Path, daemon: Daemon
) -> None:
    first, second = pair
    before = file.read_bytes()
    first.ok("mmap", BASE, 9 * PAGE, BOTH, PRIVATE | FIXED, file, os.O_RDONLY, 0)
    assert [second.do("load", BASE + n * PAGE) for n in range(8)] == list("12345678")
    assert second.do("load", BASE + 8 * PAGE - 1) == "0"
    for client in pair:
        assert client.do("load", BASE + 8 * PAGE) == "SIGBUS"
        assert client.do("from_memory", BASE + 8 * PAGE, 1) == minus(errno.EFAULT)
    second.ok("store", BASE + PAGE, 77)
    assert first.do("load", BASE + PAGE) == "77"
    first.ok("msync", BASE, 8 * PAGE, MS_SYNC)
    first.ok("madvise", BASE + PAGE, PAGE, DONTNEED)
    assert second.do("load", BASE + PAGE) == "2"
    assert daemon.info("r", "maps").split()[-2:] == [str(file.stat().st_ino), str(file)]
    second.ok("munmap", BASE, 9 * PAGE)
    assert file.read_bytes() == before


def test_what_is_written_to_a_shared_file_mapping_is_in_the_file(pair: Pair, file: Path) -> None:
    first, second = pair
    first.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED | FIXED, file, os.O_RDWR, 0)
    first.ok("store", BASE + 5, 101)
    second.ok("store", BASE + 5 * PAGE, 102)
    second.ok("store", BASE + 8 * PAGE - 1, 103)  # beyond the end: it stays in memory
    first.ok("msync", BASE, 8 * PAGE, MS_SYNC)
    content = file.read_bytes()
    assert (content[5], content[5 * PAGE], content[0]) == (101, 102, 1)
    assert len(content) == 8 * PAGE - PAGE // 2
    # What is not dirty is not written.
    file.write_bytes(b"\xee" * len(content))
    second.ok("store", BASE, 104)
    first.ok("msync", BASE, 8 * PAGE, MS_SYNC)
    content = file.read_bytes()
    assert (content[0], content[5], content[PAGE]) == (104, 101, 0xEE)
    second.ok("store", BASE + 2 * PAGE, 105)
    first.ok("munmap", BASE + 2 * PAGE, PAGE)
    assert file.read_bytes()[2 * PAGE] == 105
    second.ok("store", BASE + 3 * PAGE, 106)
    first.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED | FIXED)
    assert file.read_bytes()[3 * PAGE] == 106
    assert second.do("load", BASE + 3 * PAGE) == "0"


@pytest.mark.parametrize("flag", [os.O_APPEND, os.O_DIRECT, os.O_SYNC])
def test_how_the_file_was_opened_changes_nothing(
    pair: Pair, file: Path, daemon: Daemon, flag: int
) -> None:
    first, second = pair
    content = bytearray(file.read_bytes())
    first.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED | FIXED, file, os.O_RDWR | flag, 0)
    for page in (3, 7):
        assert second.do("load", BASE + page * PAGE) == str(page + 1)
        second.ok("store", BASE + page * PAGE, 98)
        content[page * PAGE] = 98
    second.ok("msync", BASE, 8 * PAGE, MS_SYNC)
    assert file.read_bytes() == content
    assert daemon.has_open(file)
    second.ok("munmap", BASE, 8 * PAGE)
    eventually(lambda: not daemon.has_open(file), "the file is closed")


def test_dirty_pages_reach_the_file_by_themselves(pair: Pair, file: Path) -> None:
    first, _ = pair
    first.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED | FIXED, file, os.O_RDWR, 0)
    first.ok("store", BASE, 201)
    eventually(lambda: file.read_bytes()[0] == 201, "written back")


@pytest.mark.parametrize("how", ["unlink", "kill", "stop"])
def test_dirty_pages_outlive_the_region(pair: Pair, file: Path, daemon: Daemon, how: str) -> None:
    first, second = pair
    first.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED | FIXED, file, os.O_RDWR, 0)
    second.ok("store", BASE, 202)
    if how == "unlink":
        first.ok("unlink", "r")
        second.ok("unlink", "r")
    elif how == "kill":
        (daemon.mount / "r").unlink()
        first.kill()
        second.kill()
    else:
        daemon.stop()
    eventually(lambda: file.read_bytes()[0] == 202, "written back")
    eventually(lambda: daemon.backings() == [], "the memory is free")


def test_the_files_own_rules_hold(pair: Pair, file: Path, directory: Path) -> None:
    first, _ = pair

    def attempt(prot: int, flags: int, path: Path, mode: int) -> str:
        return first.do("mmap", BASE, PAGE, prot, flags | FIXED, path, mode, 0)

    assert attempt(BOTH, SHARED, file, os.O_RDONLY) == minus(errno.EACCES)
    assert attempt(READ, PRIVATE, file, os.O_WRONLY) == minus(errno.EACCES)
    assert attempt(READ, PRIVATE, directory, os.O_RDONLY) == minus(errno.ENODEV)
    assert attempt(READ, PRIVATE, Path("/dev/null"), os.O_RDONLY) == minus(errno.ENODEV)
    assert attempt(READ, PRIVATE, file, os.O_PATH) == minus(errno.EBADF)
    assert attempt(READ, SHARED, file, os.O_RDONLY) == "0"
    assert first.do("mprotect", BASE, PAGE, BOTH) == minus(errno.EACCES)
    assert attempt(READ, SHARED, file, os.O_RDWR) == "0"
    first.ok("mprotect", BASE, PAGE, BOTH)
    assert attempt(READ, PRIVATE, file, os.O_RDONLY) == "0"
    first.ok("mprotect", BASE, PAGE, BOTH)


def test_a_file_that_cannot_be_written_back_is_not_mapped_to_be(pair: Pair, file: Path) -> None:
    """What can only be appended to, and hugetlbfs, which has no write(2); both can be read."""
    first, _ = pair

    def attempt(flags: int, path: object, mode: int) -> str:
        return first.do("mmap", BASE, PAGE, READ, flags | FIXED, path, mode, 0)

    huge = os.memfd_create("huge", os.MFD_HUGETLB)
    try:
        os.ftruncate(huge, 2 << 20)
        path = f"/proc/{os.getpid()}/fd/{huge}"
        assert attempt(SHARED, path, os.O_RDWR) == minus(errno.ENODEV)
        assert attempt(PRIVATE, path, os.O_RDWR) == "0"
    finally:
        os.close(huge)
    if subprocess.run(["chattr", "+a", file], check=False, capture_output=True).returncode != 0:
        pytest.skip("no append-only files in this file system")
    try:
        appends = os.O_RDWR | os.O_APPEND
        assert attempt(SHARED, file, appends) == minus(errno.EACCES)
        assert attempt(PRIVATE, file, appends) == "0"
        assert first.do("load", BASE) == str(file.read_bytes()[0])
    finally:
        subprocess.run(["chattr", "-a", file], check=True)


def test_a_read_only_file_mapping_cannot_be_written(pair: Pair, file: Path) -> None:
    first, second = pair
    first.ok("mmap", BASE, 8 * PAGE, READ, SHARED | FIXED, file, os.O_RDWR, 0)
    for client in pair:
        assert client.do("store", BASE, 1) == "SIGSEGV"
        assert client.do("load", BASE + PAGE) == "2"
        assert client.do("store", BASE + PAGE, 1) == "SIGSEGV"
    second.ok("mprotect", BASE, 8 * PAGE, BOTH)
    first.ok("store", BASE + PAGE, 50)
    second.ok("msync", BASE, 8 * PAGE, MS_SYNC)
    assert file.read_bytes()[PAGE] == 50


def test_a_reader_shares_the_pages_of_files_and_changes_nothing(
    pair: Pair, spawn: Spawn, file: Path
) -> None:
    first, _ = pair
    reader = spawn()
    reader.ok("mshare", "r", BASE, SIZE, os.O_RDONLY, 0)
    first.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED | FIXED, file, os.O_RDWR, 0)
    assert [reader.do("load", BASE + n * PAGE) for n in range(8)] == list("12345678")
    first.ok("store", BASE + PAGE, 60)
    assert reader.do("load", BASE + PAGE) == "60"
    assert reader.do("mmap", BASE, PAGE, READ, SHARED | FIXED) == minus(errno.EACCES)
    assert reader.do("munmap", BASE, PAGE) == minus(errno.EACCES)
    first.ok("msync", BASE, PAGE * 2, MS_SYNC)
    assert file.read_bytes()[PAGE] == 60


def test_a_reader_beyond_a_files_end_has_sigbus(pair: Pair, spawn: Spawn, file: Path) -> None:
    reader = spawn()
    reader.ok("mshare", "r", BASE, SIZE, os.O_RDONLY, 0)
    pair[0].ok("mmap", BASE, 9 * PAGE, READ, PRIVATE | FIXED, file, os.O_RDONLY, 0)
    assert reader.do("load", BASE + 8 * PAGE) == "SIGBUS"
    assert reader.do("from_memory", BASE + 8 * PAGE, 1) == minus(errno.EFAULT)
    assert reader.do("load", BASE + 7 * PAGE) == "8"


def test_dontneed_is_for_private_memory(pair: Pair) -> None:
    first, second = pair
    first.ok("mmap", BASE, PAGE, BOTH, PRIVATE | FIXED)
    first.ok("mmap", BASE + PAGE, PAGE, BOTH, SHARED | FIXED)
    second.ok("fill", BASE, 2 * PAGE, 9)
    first.ok("madvise", BASE, 2 * PAGE, DONTNEED)
    assert second.do("load", BASE) == "0"
    assert second.do("load", BASE + PAGE) == "9"


def test_mremap_shrinks(pair: Pair) -> None:
    first, second = pair
    first.ok("mmap", BASE, 4 * PAGE, BOTH, SHARED | FIXED)
    first.ok("mremap", BASE, 4 * PAGE, 2 * PAGE, 0)
    second.ok("store", BASE + PAGE, 1)
    assert second.do("load", BASE + 2 * PAGE) == "SIGBUS"


def test_a_stopped_sharer_delays_nobody(pair: Pair, file: Path) -> None:
    first, second = pair
    first.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED | FIXED, file, os.O_RDWR, 0)
    second.ok("fill", BASE, 8 * PAGE, 1)
    os.kill(second.pid, signal.SIGSTOP)
    first.ok("mprotect", BASE, 8 * PAGE, READ)
    first.ok("mprotect", BASE, 8 * PAGE, NONE)
    first.ok("mprotect", BASE, 8 * PAGE, BOTH)
    first.ok("msync", BASE, 8 * PAGE, MS_SYNC)
    first.ok("munmap", BASE, 4 * PAGE)
    first.ok("mmap", BASE, 8 * PAGE, READ, PRIVATE | FIXED)
    os.kill(second.pid, signal.SIGCONT)
    assert second.do("store", BASE + PAGE, 1) == "SIGSEGV"
    assert file.read_bytes()[7 * PAGE] == 1


def test_a_child_has_the_protection_too(pair: Pair) -> None:
    first, _ = pair
    first.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED | FIXED)
    first.ok("fill", BASE, 8 * PAGE, 5)
    first.ok("mprotect", BASE, 8 * PAGE, READ)
    assert first.do("fork", "load", BASE) == "5"
    assert first.do("fork", "store", BASE, 1) == "SIGSEGV"
    assert first.do("fork", "mprotect", BASE, PAGE, BOTH) == "0"
    first.ok("store", BASE, 1)


@pytest.mark.parametrize("prot", [READ, NONE, BOTH])
@pytest.mark.parametrize("flags", [SHARED, PRIVATE])
def test_donated_protections(spawn: Spawn, prot: int, flags: int) -> None:
    donor, consumer = spawn(), spawn()
    donor.ok("map", BASE, SIZE, flags)
    donor.ok("fill", BASE, 8 * PAGE, 4)
    donor.ok("mprotect", BASE, 4 * PAGE, prot)
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    consumer.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    for client in (consumer, donor):
        assert client.do("load", BASE + 4 * PAGE) == "4"
        assert client.do("load", BASE + PAGE) == ("4" if prot & READ else "SIGSEGV")
        assert client.do("store", BASE + PAGE, 4) == ("0" if prot & WRITE else "SIGSEGV")
    consumer.ok("mprotect", BASE, 4 * PAGE, BOTH)
    assert donor.do("load", BASE + PAGE) == "4"


def test_donated_files(spawn: Spawn, file: Path, directory: Path) -> None:
    other = directory / "other"
    other.write_bytes(b"\x22" * 8 * PAGE)
    donor, consumer = spawn(), spawn()
    donor.ok("mmap", BASE, 8 * PAGE, BOTH, PRIVATE | FIXED, file, os.O_RDONLY, 0)
    donor.ok("mmap", BASE + 8 * PAGE, 4 * PAGE, BOTH, SHARED | FIXED, other, os.O_RDWR, 4 * PAGE)
    donor.ok("store", BASE + PAGE, 99)
    donor.ok("store", BASE + 8 * PAGE, 98)
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    consumer.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    for client in (consumer, donor):
        found = [client.do("load", BASE + n * PAGE) for n in (0, 1, 2, 8, 9, 12)]
        assert found == ["1", "99", "3", "98", "34", "SIGBUS"]
    consumer.ok("store", BASE + 9 * PAGE, 97)
    donor.ok("store", BASE + 10 * PAGE, 96)
    donor.ok("msync", BASE, 12 * PAGE, MS_SYNC)
    content = other.read_bytes()
    assert (content[4 * PAGE], content[5 * PAGE], content[6 * PAGE]) == (98, 97, 96)
    assert file.read_bytes()[PAGE] == 2


@pytest.fixture
def large(make_daemon: Callable[..., Daemon], client_program: Path) -> Iterator[Pair]:
    """Two sharers of a region that is worked on in parts, with 128 MiB of memory."""
    daemon = make_daemon("--alignment=256M").start()
    with clients(client_program, daemon) as spawn:
        first, second = spawn(), spawn()
        first.ok("mshare", "r", BASE, 2 * LARGE, CREATE, 0o600)
        second.ok("mshare", "r", BASE, 2 * LARGE, os.O_RDWR, 0)
        first.ok("mmap", BASE, LARGE, BOTH, SHARED | FIXED)
        first.ok("fill", BASE, LARGE, 5)
        yield first, second


LARGE = 2 * AT_ONCE


def test_changes_of_large_ranges(large: Pair) -> None:
    first, second = large
    second.ok("mprotect", BASE, LARGE, READ)
    for client in large:
        for place in (0, LARGE // 2, LARGE - PAGE):
            assert client.do("store", BASE + place, 1) == "SIGSEGV"
    second.ok("mprotect", BASE, LARGE, NONE)
    assert first.do("load", BASE + LARGE - PAGE) == "SIGSEGV"
    first.ok("mprotect", BASE, LARGE, BOTH)
    for client in large:
        assert client.do("scan", BASE, LARGE) == "5"
        client.ok("fill", BASE, LARGE, 5)
    second.ok("munmap", BASE, LARGE)
    for client in large:
        for place in (0, LARGE // 2, LARGE - PAGE):
            assert client.do("load", BASE + place) == "SIGBUS"


def test_nobody_sees_the_moment_in_which_a_mapping_is_replaced(large: Pair) -> None:
    first, second = large
    for _ in range(8):
        second.send("scan", BASE, LARGE)
        first.ok("mmap", BASE, LARGE, BOTH, SHARED | FIXED)
        first.ok("fill", BASE, LARGE, 5)
        assert second.result() in ("0", "5")


def test_maps_can_be_read_by_who_reads_proc_maps(pair: Pair, file: Path, daemon: Daemon) -> None:
    first, _ = pair
    first.ok("mmap", BASE, 2 * PAGE, READ, SHARED | FIXED, file, os.O_RDWR, PAGE)
    first.ok("mmap", BASE + 4 * PAGE, PAGE, NONE, PRIVATE | FIXED)
    status = file.stat()
    rows = [line.split() for line in daemon.info("r", "maps").splitlines()]
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    assert rows[0] == [
        f"{BASE:x}-{BASE + 2 * PAGE:x}",
        "r--s",
        f"{PAGE:08x}",
        device,
        str(status.st_ino),
        str(file),
    ]
    assert rows[1][1:] == ["---p", "00000000", "00:00", "0", "[anon:r]"]


def test_pages_of_a_file_are_never_seen_empty(pair: Pair, directory: Path) -> None:
    path = directory / "full"
    path.write_bytes(b"\xff" * 32 * PAGE)
    # As many times as there is patience for the bytes to be read.
    times = min(3000, (2 << 30) // (32 * PAGE))
    assert pair[0].do("race", BASE, 32 * PAGE, path, times) == "0"


def test_what_was_synced_is_in_the_file_whatever_happens_then(
    pair: Pair, file: Path, daemon: Daemon
) -> None:
    first, second = pair
    first.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED | FIXED, file, os.O_RDWR, 0)
    for page in range(7):
        (first, second)[page % 2].ok("store", BASE + page * PAGE, 200 + page)
    second.ok("msync", BASE, 8 * PAGE, MS_SYNC)
    daemon.kill()
    first.kill()
    second.kill()
    assert [file.read_bytes()[page * PAGE] for page in range(7)] == list(range(200, 207))


@pytest.fixture
def small_shm() -> Iterator[Path]:
    """A /dev/shm of the test's own, which is soon full."""
    syscalls.mount("shm", "/dev/shm", "tmpfs", 0, "mode=1777,size=1m")
    yield Path("/dev/shm/filler")
    syscalls.umount("/dev/shm", syscalls.MNT_DETACH)


@pytest.mark.shm_only
def test_a_system_call_that_is_to_fail_does_when_there_is_room_again(
    small_shm: Path, make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    """To fail it takes a page that anybody who fills /dev/shm can keep from being had."""
    daemon = make_daemon(f"--alignment={ALIGNMENT}").start()
    daemon.expected.append("cannot fail a system call")
    with clients(client_program, daemon) as start:
        client, other = start(), start()
        client.ok("mshare", "r", BASE, ALIGNMENT, os.O_CREAT | os.O_RDWR, 0o600)
        other.ok("mshare", "r", BASE, ALIGNMENT, os.O_RDWR, 0)
        client.ok("mmap", BASE, PAGE, BOTH, SHARED | FIXED)
        client.ok("store", BASE, 7)
        client.ok("mprotect", BASE, PAGE, READ)
        with small_shm.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(PAGE)):
                pass
        client.send("to_memory", BASE, 1)
        eventually(lambda: "cannot fail" in daemon.log(), "that there is no room")
        assert other.do("load", BASE) == "7"
        small_shm.unlink()
        assert client.result() == minus(errno.EFAULT)
        assert other.do("load", BASE) == "7"


@pytest.fixture
def strange(directory: Path) -> Iterator[Path]:
    """A file system whose files hang and fail."""
    path = directory / "strange"
    path.mkdir()
    with subprocess.Popen(
        [sys.executable, SUPPORT / "strange.py", path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield path
        finally:
            process.kill()
            process.wait()
            mounting.unmount(str(path))


def test_a_file_that_hangs_stalls_its_own_range_only(
    pair: Pair, strange: Path, file: Path, spawn: Spawn, daemon: Daemon
) -> None:
    first, second = pair
    daemon.expected.append("cannot read")
    first.ok("mmap", BASE, 8 * PAGE, BOTH, PRIVATE | FIXED, strange / "hangs", os.O_RDONLY, 0)
    stuck = [spawn() for _ in range(12)]  # more than a user has threads
    for number, client in enumerate(stuck):
        client.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        client.ok("mmap", BASE + (16 + number) * PAGE, PAGE, BOTH, PRIVATE | FIXED,
                  strange / "hangs", os.O_RDONLY, 0)  # fmt: skip
        client.send("load", BASE + (16 + number) * PAGE)
    first.ok("mmap", BASE + ALIGNMENT, 8 * PAGE, BOTH, SHARED | FIXED)
    second.ok("store", BASE + ALIGNMENT, 1)
    assert daemon.sharers("r") == 14
    # Another user's files have threads of their own.
    other = spawn(user=65534, group=65534, extra_groups=[])
    other.ok("mshare", "q", BASE, SIZE, CREATE, 0o600)
    other.ok("mmap", BASE, 8 * PAGE, READ, PRIVATE | FIXED, file, os.O_RDONLY, 0)
    assert other.do("load", BASE + PAGE) == "2"
    # Unmapping does not wait for it, and frees who waits.
    second.ok("munmap", BASE, ALIGNMENT)
    stuck[0].kill()
    assert second.do("load", BASE) == "SIGBUS"
    assert second.do("load", BASE + ALIGNMENT) == "1"


@pytest.mark.shm_only  # freeing huge pages takes markers away: who touches it waits
@pytest.mark.parametrize("killed", [False, True])
def test_a_file_that_hangs_is_mapped_where_a_hole_was_touched(
    pair: Pair, strange: Path, daemon: Daemon, *, killed: bool
) -> None:
    """SIGBUS stays there until that is read, and who maps it waits for it; nobody else does.

    Also when the daemon dies after it has written down that it is mapped.
    """
    daemon.expected += ["cannot read", "taking down the mount"]
    for client in pair:
        assert client.do("load", BASE) == "SIGBUS"
    if killed:
        daemon.kill()
        daemon.launch(env={**os.environ, "MSHAREFSD_PARK": "mmap"})
    pair[1].send("mmap", BASE, PAGE, READ, PRIVATE | FIXED, strange / "hangs", os.O_RDONLY, 0)
    if killed:
        states = partial(map, processes.state)
        eventually(lambda: "T" in states(daemon.processes()), "it has written that down")
        daemon.kill()
        daemon.start()
    else:
        eventually(lambda: "hangs" in daemon.info("r", "maps"), "it is mapped")
        pair[0].ok("mmap", BASE + PAGE, PAGE, BOTH, SHARED | FIXED)
        assert pair[0].do("load", BASE + PAGE) == "0"
        assert pair[0].do("load", BASE) == "SIGBUS"
        assert not pair[1].has_result()
        (CONNECTIONS / str(os.minor(os.stat(strange).st_dev)) / "abort").write_text("1")
    assert pair[1].result() == "0"
    for client in pair:
        assert client.do("load", BASE) == "SIGBUS"


def test_a_file_that_answers_too_late_changes_nothing(
    pair: Pair, strange: Path, daemon: Daemon
) -> None:
    """Who waited for it has met a hole meanwhile; what is mapped there then is there."""
    daemon.expected.append("cannot read")
    first, second = pair
    second.ok("mmap", BASE, PAGE, READ, PRIVATE | FIXED, strange / "hangs", os.O_RDONLY, 0)
    first.send("load", BASE)
    eventually(lambda: daemon.metric('faults_total{kind="file"}') == 1, "it is read")
    second.ok("munmap", BASE, PAGE)
    assert first.result() == "SIGBUS"
    (CONNECTIONS / str(os.minor(os.stat(strange).st_dev)) / "abort").write_text("1")
    eventually(lambda: "cannot read" in daemon.log(), "the read has ended")
    second.ok("mmap", BASE, PAGE, BOTH, SHARED | FIXED)
    for client in pair:
        assert client.do("load", BASE) == "0"


def test_a_file_that_hangs_when_it_is_written_holds_up_no_other(
    pair: Pair, strange: Path, file: Path, spawn: Spawn, daemon: Daemon
) -> None:
    daemon.expected.append("cannot write back|did not take")
    first, second = pair
    first.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED | FIXED, strange / "full", os.O_RDWR, 0)
    first.ok("mmap", BASE + 8 * PAGE, 8 * PAGE, BOTH, SHARED | FIXED, file, os.O_RDWR, 0)
    first.ok("store", BASE, 7)
    stuck = [spawn() for _ in range(2)]
    for client, call in zip(stuck, ("munmap", "msync"), strict=True):
        client.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        client.send(call, BASE, PAGE, MS_SYNC)
    second.ok("store", BASE + 8 * PAGE, 9)
    second.ok("msync", BASE + 8 * PAGE, PAGE, MS_SYNC)
    assert file.read_bytes()[0] == 9
    second.ok("mmap", BASE + 16 * PAGE, PAGE, BOTH, SHARED | FIXED)
    second.ok("munmap", BASE + 8 * PAGE, 8 * PAGE)
    assert first.do("load", BASE) == "7"


def test_nobody_writes_unnoticed_while_another_page_is_written(
    pair: Pair, strange: Path, spawn: Spawn
) -> None:
    first, second = pair
    third = spawn()
    third.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    first.ok("mmap", BASE, 4 * PAGE, BOTH, SHARED | FIXED, strange / "slow", os.O_RDWR, 0)
    last = BASE + 3 * PAGE
    for address in (BASE, last):
        first.ok("store", address, 1)
    second.send("msync", BASE, 4 * PAGE, MS_SYNC)
    time.sleep(0.3)  # the first page is being written; if not, this proves nothing
    third.ok("store", last, 2)
    assert second.result() == "0"
    third.ok("store", last, 3)
    third.ok("msync", BASE, 4 * PAGE, MS_SYNC)
    with (strange / "slow").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 1, 3 * PAGE) == b"\3"


def test_a_file_that_cannot_be_read_is_sigbus(pair: Pair, strange: Path, daemon: Daemon) -> None:
    first, second = pair
    daemon.expected.append("cannot read")
    first.ok("mmap", BASE, 8 * PAGE, BOTH, PRIVATE | FIXED, strange / "fails", os.O_RDONLY, 0)
    for client in pair:
        assert client.do("load", BASE + PAGE) == "SIGBUS"
        assert client.do("from_memory", BASE + 3 * PAGE, 1) == minus(errno.EFAULT)
    assert second.do("load", BASE + 9 * PAGE) == "SIGBUS"


@pytest.mark.shm_only  # on huge pages it is a part of one
def test_a_page_that_cannot_be_read_is_no_other_page_s_fault(
    pair: Pair, strange: Path, daemon: Daemon
) -> None:
    """It is read with those around it, which a worn disk has all the same."""
    first, second = pair
    daemon.expected.append("cannot read")
    where = (BASE, 64 * PAGE, READ, PRIVATE | FIXED, strange / "worn", os.O_RDONLY, 0)
    assert second.do("from_memory", BASE + 20 * PAGE, 1) == minus(errno.EFAULT)  # a hole yet
    first.ok("mmap", *where)
    assert first.do("load", BASE + 3 * PAGE) == "SIGBUS"
    for page in (4, 0, 2, 31, 63, 20):
        assert first.do("load", BASE + page * PAGE) == "1"
        assert second.do("load", BASE + page * PAGE) == "1"
    assert second.do("load", BASE + 3 * PAGE) == "SIGBUS"


def test_a_file_that_shrinks_is_sigbus_beyond_its_end_and_may_grow_again(
    pair: Pair, file: Path
) -> None:
    first, second = pair
    first.ok("mmap", BASE, 8 * PAGE, BOTH, PRIVATE | FIXED, file, os.O_RDONLY, 0)
    os.truncate(file, PAGE)
    assert first.do("load", BASE) == "1"
    assert first.do("load", BASE + PAGE) == "SIGBUS"
    assert second.do("load", BASE + 2 * PAGE) == "SIGBUS"
    with file.open("ab") as grown:
        grown.write(b"\x55" * 2 * PAGE)
    assert first.do("load", BASE + PAGE) == str(0x55)
    assert second.do("load", BASE + 2 * PAGE) == str(0x55)


@pytest.mark.shm_only  # on huge pages all have one page table, and its poison
def test_what_one_sharer_writes_where_another_had_a_sigbus_is_kept(pair: Pair, file: Path) -> None:
    """Who had it before the file grew has it still, while another uses the page."""
    first, second = pair
    first.ok("mmap", BASE, 9 * PAGE, BOTH, PRIVATE | FIXED, file, os.O_RDONLY, 0)
    assert first.do("from_memory", BASE + 8 * PAGE, 1) == minus(errno.EFAULT)
    os.truncate(file, 9 * PAGE)
    second.ok("store", BASE + 8 * PAGE, 200)
    second.ok("mprotect", BASE, 9 * PAGE, NONE)
    assert first.do("load", BASE + 8 * PAGE) == "SIGSEGV"
    second.ok("mprotect", BASE, 9 * PAGE, BOTH)
    for client in pair:
        assert client.do("load", BASE + 8 * PAGE) == "200"


def test_a_killed_daemon_stops_nobody_on_protected_memory_that_is_there(
    pair: Pair, file: Path, daemon: Daemon
) -> None:
    first, second = pair
    first.ok("mmap", BASE, 8 * PAGE, READ, PRIVATE | FIXED, file, os.O_RDONLY, 0)
    first.ok("mmap", BASE + 8 * PAGE, 8 * PAGE, BOTH, SHARED | FIXED)
    first.ok("fill", BASE + 8 * PAGE, 8 * PAGE, 3)
    first.ok("mprotect", BASE + 8 * PAGE, 8 * PAGE, READ)
    first.ok("mprotect", BASE + 8 * PAGE, 8 * PAGE, BOTH)
    assert first.do("scan", BASE, 7 * PAGE) == "7"
    assert first.do("load", BASE + 7 * PAGE) == "8"
    daemon.kill()
    assert second.do("load", BASE) == "1"
    assert second.do("load", BASE + 15 * PAGE) == "3"
    second.ok("store", BASE + 9 * PAGE, 1)


def test_a_hole_that_one_was_refused_who_is_gone_can_be_mapped(pair: Pair, daemon: Daemon) -> None:
    """His poison may be in a page table that others have, too."""
    first, second = pair
    second.ok("mmap", BASE + 8 * PAGE, PAGE, BOTH, SHARED | FIXED)
    for client in pair:
        client.ok("store", BASE + 8 * PAGE, 1)
    assert first.do("load", BASE + PAGE) == "SIGBUS"
    first.kill()
    eventually(lambda: daemon.sharers("r") == 1, "it is gone")
    second.ok("mmap", BASE, 4 * PAGE, BOTH, SHARED | FIXED)
    assert second.do("load", BASE + PAGE) == "0"
    second.ok("store", BASE + PAGE, 5)


def test_a_robust_mutex_tells_of_its_owners_death_after_write_back(
    spawn: Spawn, file: Path
) -> None:
    """The kernel writes for a thread that ends, and cannot wait for us then."""
    first, second = spawn(), spawn()
    first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    first.ok("mmap", BASE, 2 * PAGE, BOTH, SHARED | FIXED, file, os.O_RDWR, 0)
    second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    first.ok("make_mutex", BASE)
    first.ok("make_mutex", BASE + PAGE)
    first.ok("lock", BASE)
    second.ok("msync", BASE, 2 * PAGE, 4)
    first.ok("lock", BASE + PAGE)  # clean, and protected, until then
    second.ok("msync", BASE, 2 * PAGE, 4)
    second.ok("msync", BASE, 2 * PAGE, 4)
    first.kill()
    for page in (0, 1):
        assert second.do("lock", BASE + page * PAGE) == str(errno.EOWNERDEAD)
