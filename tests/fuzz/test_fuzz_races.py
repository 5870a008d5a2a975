"""Everybody touches everything while it changes.

A region is cut into parts, and each of several sharers alone changes what is mapped in
its own, and knows what must be there: the first byte of each page is its own, and the
last that it has written.  Meanwhile a thread of each touches all parts, by code and by
system calls, and writes to each page at a place of its own; so does a guest that comes
and is killed.  At the end of a round everybody must find in all parts what their owners know.
"""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BACKING, BASE, PAGE, Client, Daemon, eventually
from fuzzing import SECONDS, SEED, TIMEOUT

OWNERS = 3
PAGES = {"shm": 160, "hugetlb": 8}[BACKING]
"""In each part."""
PART = PAGES * PAGE
SIZE = ALIGNMENT
ROUND_SECONDS = 1.0
PLACE = 1000
"""Where in each page the first of those writes that only touch it."""
READ, BOTH = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
FIXED, DONTNEED, MS_SYNC = 0x10, 4, 4
BUS, SEGV = "--", "!!"


@dataclass
class Page:
    """What an owner knows of a page."""

    kind: str = "hole"
    """"hole"; memory: "shared", "private"; a file: "file" (MAP_SHARED), "copy"."""
    prot: int = 0
    value: int = 0
    """Of its first byte."""

    def found(self) -> str:
        """As client.c's `look` has it."""
        if self.kind == "hole":
            return BUS
        return f"{self.value:02x}" if self.prot else SEGV


class Part:
    """A part of the region, and its owner."""

    def __init__(self, number: int, directory: Path) -> None:
        self.base = BASE + number * PART
        self.number = number
        self.pages = [Page() for _ in range(PAGES)]
        self.files = {kind: directory / f"{kind}{number}" for kind in ("file", "copy")}
        for path in self.files.values():
            path.write_bytes(b"".join(bytes([n % 250 + 1]) * PAGE for n in range(PAGES)))
        self.client: Client | None = None
        self.done: list[str] = []
        """What has been called in this round."""

    def play(self, dice: random.Random, until: float) -> None:
        """Change things, and look at each at once."""
        acts = (
            *(self.map_file, self.map_file, self.map_memory, self.unmap, self.protect),
            *(self.protect, self.discard, self.sync, self.write, self.write),
        )
        self.done = []
        while time.monotonic() < until:
            first = dice.randrange(PAGES)
            last = min(PAGES, first + dice.choice((1, 2, 16, 32, PAGES)))
            dice.choice(acts)(dice, first, last)
            self.check(first, last)

    def do(self, *words: object) -> str:
        assert self.client is not None
        self.done.append(" ".join(map(str, words)))
        return self.client.do(*words)

    def call(self, name: str, first: int, last: int, *words: object) -> str:
        return self.do(name, self.base + first * PAGE, (last - first) * PAGE, *words)

    def check(self, first: int, last: int, by: Client | None = None) -> None:
        client = by or self.client
        assert client is not None
        found = client.do("look", self.base + first * PAGE, last - first, PAGE)
        for page in range(first, last):
            at = 2 * (page - first)
            seen, known = found[at : at + 2], self.pages[page].found()
            if seen != known == SEGV:
                # It is there for an instant when a system call is refused it.
                seen = client.do("look", self.base + page * PAGE, 1, PAGE)
            assert seen == known, (
                f"part {self.number} page {page}, {self.pages[page]}: {seen} instead of {known}, "
                f"seen by {'its owner' if by in (None, self.client) else 'another'} after\n"
                + "\n".join(self.done[-12:])
            )

    def on_disk(self, kind: str, page: int, place: int = 0) -> int:
        with self.files[kind].open("rb") as file:
            return os.pread(file.fileno(), 1, page * PAGE + place)[0]

    def settle(self) -> None:
        """Nobody writes any more: what everybody has written is in the file after msync()."""
        self.call("msync", 0, PAGES, MS_SYNC)
        self.left(0, PAGES)
        for place in range(PLACE, PLACE + OWNERS + 1):
            found = self.do("look", self.base + place, PAGES, PAGE)
            for number, page in enumerate(self.pages):
                seen = found[2 * number : 2 * number + 2]
                if page.kind == "file" and page.prot:
                    disk = self.on_disk("file", number, place)
                    assert seen == f"{disk:02x}", (self.number, number, place, seen, disk)

    def left(self, first: int, last: int) -> None:
        """What was mapped there is gone: files that were mapped shared have it."""
        for page in range(first, last):
            here = self.pages[page]
            if here.kind == "file":
                assert self.on_disk("file", page) == here.value, (page, here, self.done[-12:])

    def map_file(self, dice: random.Random, first: int, last: int) -> None:
        kind, prot = dice.choice(("file", "copy")), dice.choice((BOTH, BOTH, READ, 0))
        if kind == "file":  # two mappings of it would not be coherent
            self.unmap(dice, 0, PAGES)
        flags = (mmap.MAP_SHARED if kind == "file" else mmap.MAP_PRIVATE) | FIXED
        where = (self.files[kind], os.O_RDWR, first * PAGE)
        assert self.call("mmap", first, last, prot, flags, *where) == "0"
        self.left(first, last)
        for page in range(first, last):
            self.pages[page] = Page(kind, prot, self.on_disk(kind, page))

    def map_memory(self, dice: random.Random, first: int, last: int) -> None:
        kind, prot = dice.choice(("shared", "private")), dice.choice((BOTH, BOTH, READ, 0))
        flags = (mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE) | FIXED
        assert self.call("mmap", first, last, prot, flags) == "0"
        self.left(first, last)
        self.pages[first:last] = [Page(kind, prot) for _ in range(first, last)]

    def unmap(self, dice: random.Random, first: int, last: int) -> None:
        assert self.call("munmap", first, last) == "0"
        self.left(first, last)
        self.pages[first:last] = [Page() for _ in range(first, last)]

    def protect(self, dice: random.Random, first: int, last: int) -> None:
        prot = dice.choice((BOTH, READ, 0))
        holes = any(page.kind == "hole" for page in self.pages[first:last])
        assert self.call("mprotect", first, last, prot) == ("-12" if holes else "0")
        for page in self.pages[first:last]:
            if page.kind == "hole":
                break
            page.prot = prot
        if self.pages[first].kind != "hole" and prot == READ:
            assert self.do("store", self.base + first * PAGE, 7) == "SIGSEGV"

    def discard(self, dice: random.Random, first: int, last: int) -> None:
        """Private memory starts fresh, with what its file has by now."""
        fresh = dice.randrange(1, 256)
        with self.files["copy"].open("r+b") as file:
            for page in range(first, last):
                if self.pages[page].kind == "copy":
                    os.pwrite(file.fileno(), bytes([fresh]), page * PAGE)
        self.call("madvise", first, last, DONTNEED)
        for page in range(first, last):
            here = self.pages[page]
            if here.kind in ("copy", "private"):
                here.value = fresh if here.kind == "copy" else 0

    def sync(self, dice: random.Random, first: int, last: int) -> None:
        self.call("msync", first, last, MS_SYNC)
        self.left(first, last)

    def write(self, dice: random.Random, first: int, last: int) -> None:
        last = next((n for n in range(first, last) if self.pages[n].prot != BOTH), last)
        if first < last:
            value = dice.randrange(1, 256)
            where = (self.base + first * PAGE, last - first, PAGE)
            assert self.do("poke", *where, value) == "0", self.done[-12:]
            for here in self.pages[first:last]:
                here.value = value


class Round:
    """The owners at work, each told by a thread; the first failure is the round's."""

    def __init__(self, parts: list[Part], dice: random.Random) -> None:
        self.failures: list[BaseException] = []
        until = time.monotonic() + ROUND_SECONDS
        self.threads = [
            threading.Thread(target=self.run, args=(part, random.Random(dice.random()), until))
            for part in parts
        ]
        for thread in self.threads:
            thread.start()

    def run(self, part: Part, dice: random.Random, until: float) -> None:
        try:
            part.play(dice, until)
        except BaseException as failure:  # noqa: BLE001 # it is raised by who waits
            self.failures.append(failure)

    def wait(self) -> None:
        for thread in self.threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


@pytest.fixture
def parts(spawn: Callable[..., Client], directory: Path) -> list[Part]:
    found = [Part(number, directory) for number in range(OWNERS)]
    for part in found:
        part.client = join(spawn, creates=part.number == 0)
    return found


def join(spawn: Callable[..., Client], *, creates: bool = False) -> Client:
    client = spawn()
    client.ok("mshare", "r", BASE, SIZE, os.O_RDWR | (os.O_CREAT if creates else 0), 0o600)
    return client


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("dies", [False, True], ids=["lives", "dies"])
def test_changes_under_the_eyes_of_all(
    parts: list[Part], daemon: Daemon, spawn: Callable[..., Client], *, dies: bool
) -> None:
    print(f"MSHARE_FUZZ_SEED={SEED}")
    daemon.expected.append("taking down the mount")
    dice = random.Random(SEED)
    everybody = [part.client for part in parts if part.client is not None]
    until = time.monotonic() + SECONDS / 2
    while time.monotonic() < until:
        for number, client in enumerate(everybody):
            seed, own = dice.getrandbits(31), (number * PAGES, PAGES)
            client.ok("disturb", BASE, OWNERS * PAGES, PAGE, PLACE + number, seed, *own)
        work = Round(parts, dice)
        guest = join(spawn)
        guest.ok("disturb", BASE, OWNERS * PAGES, PAGE, PLACE + OWNERS, 1, 0, 0)
        time.sleep(dice.random() * ROUND_SECONDS / 2)
        guest.kill()
        if dies:
            time.sleep(dice.random() * ROUND_SECONDS / 2)
            daemon.kill()
            daemon.start()
        work.wait()
        for client in everybody:
            client.ok("calm")
        time.sleep(0.02)  # for this long a page may be out of reach: violation.py
        for part in parts:
            part.settle()
            for client in everybody:
                part.check(0, PAGES, client)
    everybody[0].ok("munmap", BASE, SIZE)
    for part in parts:
        part.left(0, PAGES)
    eventually(lambda: int(daemon.field("r", "memory")) == 0, "all memory is free")
