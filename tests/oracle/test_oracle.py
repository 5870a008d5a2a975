"""The kernel is the oracle: what is mapped in a region behaves as in one process.

Random programs of mmap, munmap, mprotect, msync, madvise, reads and writes run twice:
by several sharers of a region, and by that many threads of one plain process.  What
each step gives must be equal, and what the files hold at the end.

MSHARE_ORACLE_PROGRAMS says how many programs (`make oracle PROGRAMS=1000000`).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
from conftest import ALIGNMENT, BACKING, BASE, PAGE, Client, Daemon, clients
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

PROGRAMS = int(os.environ.get("MSHARE_ORACLE_PROGRAMS", "800" if BACKING == "shm" else "100"))
"""Programs on huge pages move five hundred times as much."""
STEPS = 40
SHARERS = 3
PAGES = 8
SIZE = ALIGNMENT
FILE_PAGES = 4
FILES = 3
READ, WRITE = mmap.PROT_READ, mmap.PROT_WRITE
SHARED, PRIVATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE
FIXED, NOREPLACE = 0x10, 0x100000
EFAULT = str(-errno.EFAULT)

# What the design wants to be different: (what is there, the kernel's answer) -> ours.
DIFFERENCES = {
    # The letter: a touch of a part of the region where nothing is mapped is SIGBUS.
    ("hole", "SIGSEGV"): "SIGBUS",
    # A system call was refused this page beyond the file's end, for good: that takes
    # precedence over the protection until something else is mapped there.
    ("refused", "SIGSEGV"): "SIGBUS",
}

protections = st.sampled_from([READ | WRITE, READ | WRITE, READ, 0, WRITE])
sharers = st.integers(0, SHARERS - 1)
pages = st.integers(0, PAGES - 1)
lengths = st.integers(1, 5)
offsets = st.sampled_from([0, 1, PAGE - 1])


class World(NamedTuple):
    """What all programs run in."""

    sharers: list[Client]
    plain: Client
    directory: Path

    def file(self, side: str, kind: str, number: int) -> Path:
        return self.directory / f"{side}-{kind}{number}"

    def write_files(self) -> None:
        for side in ("region", "plain"):
            for kind in ("private", "shared"):
                for number in range(FILES):
                    content = (bytes([16 * number + n + 1]) * PAGE for n in range(FILE_PAGES))
                    self.file(side, kind, number).write_bytes(b"".join(content))


class Programs(RuleBasedStateMachine):
    """One program; each rule is a step, done on both sides and compared."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.world.write_files()
        self.map: list[str | None] = [None] * PAGES
        """What is mapped at each page: enough to know what a program may do next."""
        self.refused: set[tuple[int, int]] = set()
        """Sharer and page."""
        self.done: list[str] = []
        """What was done so far: where it cannot be done again, that is all there is to go by."""

    def teardown(self) -> None:
        """Unmap everything: what was written is in the files then."""
        assert self.both(0, "munmap", BASE, SIZE) == "0"
        for number in range(FILES):
            ours, theirs = (
                self.world.file(side, "shared", number).read_bytes() for side in ("region", "plain")
            )
            assert ours == theirs, f"shared{number}: {first_difference(ours, theirs)}"
            private = self.world.file("region", "private", number).read_bytes()
            assert private == self.world.file("plain", "private", number).read_bytes()

    def both(self, who: int, *words: object) -> str:
        """Do it on both sides; the answers must be equal."""
        theirs = self.plain(who, *words)
        ours = self.world.sharers[who].do(*words)
        self.note(who, *words, ours)
        assert ours == theirs, "\n".join(self.done)
        return ours

    def note(self, who: int, *words: object) -> None:
        told = (hex(each) if isinstance(each, int) and each >= BASE else each for each in words)
        self.done.append(" ".join(map(str, (who, *told))))

    def plain(self, who: int, *words: object) -> str:
        return self.world.plain.do(*(("thread",) if who else ()), *words)

    def changed(self, page: int, length: int, what: str | None) -> None:
        for at in range(page, min(page + length, PAGES)):
            self.map[at] = what
            self.refused -= {(who, at) for who in range(SHARERS)}

    def place(self, page: int, length: int) -> tuple[int, int]:
        return BASE + page * PAGE, min(length, PAGES - page) * PAGE

    @rule(
        who=sharers, page=pages, length=lengths, prot=protections,
        flags=st.sampled_from([SHARED, PRIVATE]), fixed=st.sampled_from([FIXED, FIXED, NOREPLACE]),
    )  # fmt: skip
    def map_anonymous(
        self, who: int, page: int, length: int, prot: int, flags: int, fixed: int
    ) -> None:
        if self.both(who, "mmap", *self.place(page, length), prot, flags | fixed) == "0":
            self.changed(page, length, "anonymous")

    @rule(
        who=sharers, page=pages, length=lengths, prot=protections,
        number=st.integers(0, FILES - 1), first=st.integers(0, FILE_PAGES - 1),
        shared=st.booleans(), writable=st.booleans(),
    )  # fmt: skip
    def map_file(
        self, who: int, page: int, length: int, prot: int, number: int, first: int,
        shared: bool, writable: bool,
    ) -> None:  # fmt: skip
        kind = "shared" if shared else "private"
        if shared and f"shared{number}" in self.map:
            return  # two mappings of a file are coherent in the kernel, and not here
        mode = os.O_RDWR if writable else os.O_RDONLY
        where = self.place(page, length)
        flags = (SHARED if shared else PRIVATE) | FIXED
        answers = [
            do("mmap", *where, prot, flags, self.world.file(side, kind, number), mode, first * PAGE)
            for side, do in (
                ("region", self.world.sharers[who].do),
                ("plain", lambda *words: self.plain(who, *words)),
            )
        ]
        assert answers[0] == answers[1]
        if answers[0] == "0":
            self.changed(page, length, f"{kind}{number}")

    @rule(who=sharers, page=pages, length=lengths)
    def unmap(self, who: int, page: int, length: int) -> None:
        self.both(who, "munmap", *self.place(page, length))
        self.changed(page, length, None)

    @rule(who=sharers, page=pages, length=lengths, prot=protections)
    def protect(self, who: int, page: int, length: int, prot: int) -> None:
        self.both(who, "mprotect", *self.place(page, length), prot)

    @rule(who=sharers, flags=st.sampled_from([SHARED, PRIVATE]), value=st.integers(1, 255))
    def fill_everything(self, who: int, flags: int, value: int) -> None:
        where = (BASE, PAGES * PAGE)
        assert self.both(who, "mmap", *where, READ | WRITE, flags | FIXED) == "0"
        self.changed(0, PAGES, "anonymous")
        assert self.both(who, "fill", *where, value) == "0"

    @rule(who=sharers, prot=protections)
    def protect_everything(self, who: int, prot: int) -> None:
        self.both(who, "mprotect", BASE, PAGES * PAGE, prot)

    @rule(who=sharers, page=pages, length=lengths, flags=st.sampled_from([1, 4]))
    def sync(self, who: int, page: int, length: int, flags: int) -> None:
        words = ("msync", *self.place(page, length), flags)
        if flags == 1:  # MS_ASYNC does not look at the range here
            assert self.world.sharers[who].do(*words) == "0"
        else:
            self.both(who, *words)

    @rule(who=sharers, page=pages, length=lengths)
    def discard(self, who: int, page: int, length: int) -> None:
        self.both(who, "madvise", *self.place(page, length), 4)

    @rule(who=sharers)
    def look_at_everything(self, who: int) -> None:
        for page in range(PAGES):
            self.access(who, page, "load", BASE + page * PAGE)

    @rule(who=sharers, value=st.integers(0, 255))
    def write_everywhere(self, who: int, value: int) -> None:
        for page in range(PAGES):
            self.access(who, page, "store", BASE + page * PAGE + 1, value)

    @rule(who=sharers, page=pages, offset=offsets)
    def load(self, who: int, page: int, offset: int) -> None:
        self.access(who, page, "load", BASE + page * PAGE + offset)

    @rule(who=sharers, page=pages, offset=offsets, value=st.integers(0, 255))
    def store(self, who: int, page: int, offset: int, value: int) -> None:
        self.access(who, page, "store", BASE + page * PAGE + offset, value)

    @rule(who=sharers, page=pages, offset=offsets)
    def system_call_reads(self, who: int, page: int, offset: int) -> None:
        self.system_call(who, page, "from_memory", BASE + page * PAGE + offset, 1)

    @rule(who=sharers, page=pages, offset=offsets)
    def system_call_writes(self, who: int, page: int, offset: int) -> None:
        self.system_call(who, page, "to_memory", BASE + page * PAGE + offset, 1)

    def access(self, who: int, page: int, *words: object) -> None:
        theirs = self.plain(who, *words)
        ours = self.world.sharers[who].do(*words)
        here = "hole" if self.map[page] is None else "object"
        if (who, page) in self.refused and ours != theirs:
            here = "refused"
        self.note(who, *words, ours, here)
        assert ours == DIFFERENCES.get((here, theirs), theirs), "\n".join(self.done)

    def system_call(self, who: int, page: int, *words: object) -> None:
        answer = self.both(who, *words)
        if answer == EFAULT and self.map[page] is not None:
            self.refused.add((who, page))
            # Until the refusal is over the page may be out of reach, or where nobody may touch
            # anything within it for a moment: violation.py, poison.py.  Calls wait for that.
            assert self.world.sharers[who].do("munmap", BASE + PAGES * PAGE, PAGE) == "0"


def first_difference(ours: bytes, theirs: bytes) -> str:
    for at, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            return f"at {at:#x}: {one}, the kernel says {other}"
    return "none"


@contextlib.contextmanager
def plain_client(program: Path) -> Iterator[Client]:
    """The same program, attached to nothing."""
    with subprocess.Popen(
        [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={}
    ) as process:
        try:
            yield Client(process)
        finally:
            process.kill()


@pytest.mark.timeout(60 + PROGRAMS)
def test_random_programs_do_what_the_kernel_does(
    client_program: Path, daemon: Daemon, directory: Path
) -> None:
    with clients(client_program, daemon) as spawn, plain_client(client_program) as plain:
        sharers = [spawn() for _ in range(SHARERS)]
        sharers[0].ok("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_RDWR, 0o600)
        for other in sharers[1:]:
            other.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        Programs.world = World(sharers, plain, directory)
        run_state_machine_as_test(
            Programs,
            settings=settings(
                max_examples=PROGRAMS,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        assert daemon.info("r", "maps") == ""
        assert int(daemon.field("r", "memory")) == 0
