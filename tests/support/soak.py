"""A long mixed load on one daemon, with a model of what must be where.

Sharers come, go, fork, exec, are stopped and killed, and change what is mapped in two
regions: one that lives as long as the load, one that is made and removed in each
epoch.  A region is cut into slots.  In a round each slot has one command under way at
the most (or several readers), while the other slots have theirs, so the model knows
what each must give: its result, and every word of the memory and of the files.

A slot whose client was killed in the middle of a command is what it was before or what
it was to become: the region's `maps` says which, and each word must be of one of the
two patterns.

After each epoch nobody but the keeper is left.  Then the daemon must hold what it held
at the beginning: exactly as many descriptors, tasks and shared memory objects, and,
compared over the whole run, as much memory.

Everything random follows from one seed.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import select
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from conftest import ALIGNMENT, BASE, Client, Daemon, eventually

SLOT: Final = 64 << 10
SIZE: Final = 2 * ALIGNMENT
SLOTS: Final = SIZE // SLOT
QUIET: Final = ALIGNMENT // SLOT
"""The slots before this one are written and read, and not changed much: huge pages."""
CLIENTS: Final = 6
READERS: Final = 2
ROUNDS: Final = 60
"""In an epoch."""
KEEPER: Final = "keeper"
HANG_SECONDS: Final = 60.0
MEMORY_ALLOWANCE: Final = 3 << 20
"""By how much the median of the daemon's memory in the last third of the run may exceed
that in the first third, bytes.  It is what the allocator moves by itself; in an hour of
some thousand epochs a leak of 2 KiB for each would show."""
RW: Final = mmap.PROT_READ | mmap.PROT_WRITE
R: Final = mmap.PROT_READ
FIXED: Final = 0x10
MS_SYNC: Final = 4
EVERYBODY: Final = 0o666


class SoakError(AssertionError):
    """Something was not as it must be; the text is a whole report."""


def pattern(key: int) -> bytes:
    """A slot's bytes; as word_of() in client.c."""
    if key == 0:
        return bytes(SLOT)
    with np.errstate(over="ignore"):
        words = np.uint64(key) + np.arange(SLOT // 8, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words ^= words >> np.uint64(27)
    return words.tobytes()


@dataclass(frozen=True)
class Slot:
    """What is mapped in 64 KiB of a region, and what it holds."""

    kind: str = "hole"
    """"hole"; memory: "shared", "private"; a file: "file" (MAP_SHARED), "copy"."""
    prot: int = RW
    keys: tuple[int, ...] = (0,)
    """Each word is of one of these patterns."""
    file_keys: tuple[int, ...] = (0,)
    """The same of the slot's file."""

    @property
    def has_file(self) -> bool:
        return self.kind in ("file", "copy")

    def touched(self, *, write: bool, reader: bool) -> str:
        """What a touch gives."""
        if write and reader:
            return "SIGSEGV"  # its window is read-only, whatever is in it
        if self.kind == "hole":
            return "SIGBUS"
        if not self.prot & mmap.PROT_READ or (write and self.prot != RW):
            return "SIGSEGV"
        return "0"

    def unmapped(self) -> Slot:
        """A file that was mapped shared has what the memory had."""
        return Slot(file_keys=self.keys if self.kind == "file" else self.file_keys)


@dataclass(eq=False)
class Territory:
    """A region and the model of it."""

    name: str
    base: int
    directory: Path
    slots: list[Slot] = field(default_factory=lambda: [Slot() for _ in range(SLOTS)])

    def file(self, number: int) -> Path:
        return self.directory / f"{self.name}-{number}"

    def address(self, number: int) -> int:
        return self.base + number * SLOT


@dataclass(eq=False)
class Member:
    """A client and what it has attached."""

    name: str
    client: Client
    reader: bool
    attached: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Command:
    """A command on a slot: what to say, what must come back, and what follows from it."""

    words: tuple[object, ...]
    expected: str
    after: Slot | None = None
    """None for what changes nothing."""
    file: bool = False
    """Whether the slot's file must have what `after` says of it."""


@dataclass(frozen=True)
class Order:
    """A command, who has it, and where."""

    member: Member
    territory: Territory
    number: int
    command: Command


class Soak:
    """The load.  `run` is all there is to call."""

    def __init__(
        self,
        daemon: Daemon,
        spawn: Callable[..., Client],
        directory: Path,
        seed: int,
        *,
        restarts: bool,
    ) -> None:
        """`restarts`: kill the daemon now and then and start another, which must adopt."""
        self.daemon = daemon
        self.spawn = spawn
        self.directory = directory
        self.seed = seed
        self.restarts = restarts
        self.dice = random.Random(seed)
        self.log: deque[str] = deque(maxlen=60)
        self.samples: list[int] = []
        self.members: list[Member] = []
        self.counted = 0
        self.commands = 0
        self.kills = 0
        self.starts = 0
        self.next_key = 0
        self.old = Territory("old", BASE, directory)
        self.young = Territory("young", BASE + 2 * SIZE, directory)

    # -- reports --

    def fail(self, what: str) -> SoakError:
        """Everything that is needed to find out."""
        waiting = []
        for member in [self.keeper, *self.members]:
            with contextlib.suppress(OSError):
                channel = Path(f"/proc/{member.client.pid}/wchan").read_text()
                waiting.append(f"{member.name}: process {member.client.pid} in {channel}")
        parts = [
            f"{what}\n",
            f"seed {self.seed}, epoch {len(self.samples)}, after {self.commands} commands",
            f"to see it again: make soak SEED={self.seed}",
            *waiting,
            "the last commands:",
            *self.log,
            "the end of the daemon's log:",
            *self.daemon.log().splitlines()[-40:],
        ]
        return SoakError("\n".join(parts))

    def check(self, condition: object, what: str) -> None:
        if not condition:
            raise self.fail(what)

    def soon(self, condition: Callable[[], bool], what: str) -> None:
        try:
            eventually(condition, what)
        except AssertionError as error:
            raise self.fail(str(error)) from None

    # -- the daemon's clients --

    def enter(self, name: str, *, reader: bool = False) -> Member:
        member = Member(name, self.spawn(), reader)
        self.log.append(f"{name} is process {member.client.pid}, a {_kind(reader)}")
        return member

    def send(self, member: Member, *words: object) -> None:
        self.commands += 1
        self.log.append(f"{member.name} < {' '.join(str(word) for word in words)}")
        member.client.send(*words)

    def result(self, member: Member) -> str:
        output = member.client.process.stdout
        assert output is not None
        if not select.select([output], [], [], HANG_SECONDS)[0]:
            raise self.fail(f"{member.name} has no answer")
        line = output.readline().rstrip("\n")
        self.log.append(f"{member.name} > {line or 'ended'}")
        return line

    def do(self, member: Member, expected: str, *words: object) -> None:
        self.send(member, *words)
        got = self.result(member)
        self.check(got == expected, f"{member.name}: {words} gave {got!r}, not {expected!r}")

    def attach(self, member: Member, territory: Territory) -> None:
        access = os.O_RDONLY if member.reader else os.O_RDWR
        self.do(member, "0", "mshare", territory.name, territory.base, SIZE, access, 0)
        member.attached.add(territory.name)

    def bury(self, member: Member) -> None:
        """Its process is dead, or soon will be: the daemon notices that."""
        member.client.kill()
        self.log.append(f"{member.name} is dead")
        for pipe in (member.client.process.stdin, member.client.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        member.attached.clear()
        self.members.remove(member)
        self.kills += 1

    def expect_sharers(self) -> None:
        """Wait until the daemon has noticed who is gone."""
        for territory in (self.old, self.young):
            there = sum(territory.name in each.attached for each in [self.keeper, *self.members])
            if (self.daemon.mount / territory.name).exists():
                self.soon(partial(self.has_sharers, territory.name, there), f"{there} sharers")

    def has_sharers(self, name: str, count: int) -> bool:
        return self.daemon.sharers(name) == count

    # -- the life of it --

    def run(self, seconds: float) -> str:
        """Go on for that long; returns what is to be told of it.  Raises SoakError."""
        self.keeper = self.enter(KEEPER)
        old = self.old
        self.do(self.keeper, "0", "mshare", old.name, old.base, SIZE, 0o102, EVERYBODY)
        self.keeper.attached.add(old.name)
        # The stash stays, once there is one.
        for words in (("mmap", old.base, SLOT, 3, 0x11), ("stamp", old.base, SLOT, 1)):
            self.do(self.keeper, "0", *words)
        self.do(self.keeper, "0", "mprotect", old.base, SLOT, 0)
        self.do(self.keeper, "0", "munmap", old.base, SLOT)
        # A first epoch, and what is held after it is what is held at rest.
        self.epoch()
        self.at_rest = self.settle()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.epoch()
            self.rest()
        return self.judge()

    def epoch(self) -> None:
        """The younger region's life."""
        self.make_young()
        for _ in range(ROUNDS):
            while len(self.members) < CLIENTS:
                self.counted += 1
                readers = sum(member.reader for member in self.members)
                name = f"client {self.counted}"
                self.members.append(self.enter(name, reader=readers < READERS))
            self.round()
            if self.restarts and self.dice.random() < 0.02:
                self.restart()
        self.remove_young()

    def make_young(self) -> None:
        """The keeper donates: half of the memory that it has there, and files."""
        young, keeper = self.young, self.keeper
        for number in range(0, SLOTS, 2):
            key = self.key()
            self.do(keeper, "0", "map", young.address(number), SLOT, mmap.MAP_SHARED)
            self.do(keeper, "0", "stamp", young.address(number), SLOT, key)
            young.slots[number] = replace(young.slots[number], kind="shared", prot=RW, keys=(key,))
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        self.do(keeper, "0", "mshare", young.name, young.base, SIZE, flags, EVERYBODY)
        keeper.attached.add(young.name)

    def remove_young(self) -> None:
        young = self.young
        for member in list(self.members):
            if self.dice.random() < 0.5:
                for name in sorted(member.attached):
                    self.do(member, "0", "detach", name)
            self.bury(member)
        self.expect_sharers()
        if self.dice.random() < 0.5:
            self.do(self.keeper, "0", "munmap", young.base, SIZE)
            self.soon(
                lambda: self.daemon.field(young.name, "memory") == "0",
                f"all memory of {young.name} is free",
            )
        if self.dice.random() < 0.5:
            (self.daemon.mount / young.name).unlink()
        self.do(self.keeper, "0", "unlink", young.name)
        self.keeper.attached.discard(young.name)
        self.check(not (self.daemon.mount / young.name).exists(), "its name is gone")
        young.slots = [slot.unmapped() for slot in young.slots]
        self.soon(lambda: len(self.memories()) == 2, "its memory is gone")
        for number, slot in enumerate(young.slots):
            self.check_file(young, number, slot.file_keys)

    # -- rounds --

    def key(self) -> int:
        self.next_key += 1
        return self.dice.getrandbits(32) << 24 | self.next_key & 0xFFFFFF

    def round(self) -> None:
        """A command for some of the clients, all under way at once."""
        running, stopped = self.prepare()
        victims: list[Member] = []
        # All that each of them needs was made ready before the first one starts.
        for order in running:
            self.send(order.member, *order.command.words)
            if self.dice.random() < 0.03:
                victims.append(order.member)
        if victims:
            time.sleep(self.dice.random() * 0.002)
            for member in victims:
                self.bury(member)
            self.expect_sharers()
        for order in running:
            self.finish(order, killed=order.member in victims)
        for member in stopped:
            os.kill(member.client.pid, signal.SIGCONT)

    def prepare(self) -> tuple[list[Order], list[Member]]:
        """Who is to do what, and who is stopped meanwhile.  Some leave in their own ways."""
        taken: set[tuple[str, int]] = set()
        running: list[Order] = []
        stopped: list[Member] = []
        for member in list(self.members):
            chance = self.dice.random()
            if chance < 0.03:
                self.bury(member)
                continue
            if chance < 0.06:
                self.leave(member)
                continue
            if chance < 0.1:
                os.kill(member.client.pid, signal.SIGSTOP)
                stopped.append(member)
                continue
            territory = self.dice.choice((self.old, self.young))
            if territory.name not in member.attached:
                self.attach(member, territory)
            number = self.dice.randrange(SLOTS)
            if (territory.name, number) not in taken:
                taken.add((territory.name, number))
                command = self.choose(member, territory, number)
                running.append(Order(member, territory, number, command))
        return running, stopped

    def finish(self, order: Order, *, killed: bool) -> None:
        """See what came of a command, and what follows from it."""
        territory, number, command = order.territory, order.number, order.command
        before, after = territory.slots[number], command.after
        if killed:
            if after is not None:
                territory.slots[number] = self.either(territory, number, before, after)
            return
        got = self.result(order.member)
        self.check(
            got == command.expected,
            f"{order.member.name}: {command.words} gave {got!r}, not {command.expected!r}; "
            f"slot {number} of {territory.name} was {before}",
        )
        if after is not None:
            territory.slots[number] = after
            if command.file:
                self.check_file(territory, number, after.file_keys)

    def leave(self, member: Member) -> None:
        """Detach, exec, or a call that is refused."""
        if member.attached and self.dice.random() < 0.5:
            name = self.dice.choice(sorted(member.attached))
            self.do(member, "0", "detach", name)
            member.attached.discard(name)
        elif self.dice.random() < 0.5:
            self.send(member, "exec")
            self.do(member, "0", "hello")
            member.attached.clear()
            self.expect_sharers()
        else:
            self.do(member, "0", "fork", "true")

    def choose(self, member: Member, territory: Territory, number: int) -> Command:
        """What this member does to that slot now."""
        slot = territory.slots[number]
        at = (territory.address(number), SLOT)
        quiet = number < QUIET and slot.kind != "hole" and self.dice.random() < 0.98
        if quiet or self.dice.random() < 0.5:
            return self.touch(slot, at, reader=member.reader)
        if member.reader:
            denied = str(-errno.EACCES)
            return Command(("mmap", *at, RW, mmap.MAP_SHARED | FIXED), denied)
        if self.dice.random() < 0.5:
            return self.map(territory, number, slot, at)
        return self.change(slot, at)

    def change(self, slot: Slot, at: tuple[int, int]) -> Command:
        """A call on what is there."""
        call = self.dice.choice(("munmap", "mprotect", "msync", "madvise"))
        if call == "munmap":
            return Command((call, *at), "0", slot.unmapped(), file=slot.kind == "file")
        argument = {"mprotect": self.dice.choice((RW, RW, R, 0)), "msync": MS_SYNC}
        words = (call, *at, argument.get(call, mmap.MADV_DONTNEED))
        if slot.kind == "hole":
            return Command(words, str(-errno.ENOMEM))
        if call == "mprotect":
            return Command(words, "0", replace(slot, prot=argument[call]))
        if call == "madvise":
            fresh = {"private": (0,), "copy": slot.file_keys}.get(slot.kind, slot.keys)
            return Command(words, "0", replace(slot, keys=fresh))
        written = slot.kind == "file"
        after = replace(slot, file_keys=slot.keys) if written else slot
        return Command(words, "0", after, file=written)

    def touch(self, slot: Slot, at: tuple[int, int], *, reader: bool) -> Command:
        """Read or write it all: by code, by a thread, by a child, or by the kernel."""
        how = self.dice.choice(((), (), (), ("thread",), ("fork",)))
        if self.dice.random() < 0.05:
            return Command(("clone", "verify", *at, 0), "SIGSEGV")
        if self.dice.random() < 0.5:
            key = self.key()
            expected = slot.touched(write=True, reader=reader)
            after = None
            if expected == "0":
                # Until msync() any part of it may be in the file.
                files = slot.file_keys
                if slot.kind == "file":
                    files = (*files[-2:], *slot.keys[-2:])
                after = replace(slot, keys=(key,), file_keys=files)
            return Command((*how, "stamp", *at, key), expected, after)
        expected = slot.touched(write=False, reader=reader)
        if expected == "0" and self.dice.random() < 0.1:
            return Command((*how, "from_memory", *at), str(SLOT))
        return Command((*how, "verify", *at, *slot.keys), expected)

    def map(self, territory: Territory, number: int, slot: Slot, at: tuple[int, int]) -> Command:
        """Something new in the slot's place."""
        kind = self.dice.choice(("shared", "private", "file", "copy"))
        prot = self.dice.choice((RW, RW, R))
        after = slot.unmapped()
        shared = mmap.MAP_SHARED if kind in ("shared", "file") else mmap.MAP_PRIVATE
        if kind in ("shared", "private"):
            words: tuple[object, ...] = ("mmap", *at, prot, shared | FIXED)
            after = replace(after, kind=kind, prot=prot, keys=(0,))
            return Command(words, "0", after, file=slot.kind == "file")
        path = territory.file(number)
        if not slot.has_file:
            key = self.key()
            path.write_bytes(pattern(key))
            after = replace(after, file_keys=(key,))
        elif len(after.file_keys) > 1 or slot.kind == "file":
            # The file is being written back while it is mapped anew: one after the other.
            return Command(("munmap", *at), "0", after, file=slot.kind == "file")
        words = ("mmap", *at, prot, shared | FIXED, path, os.O_RDWR, 0)
        return Command(words, "0", replace(after, kind=kind, prot=prot, keys=after.file_keys))

    def either(self, territory: Territory, number: int, before: Slot, after: Slot) -> Slot:
        """What the slot is, after a command that may have been carried out or not."""
        address = territory.address(number)
        found = ""
        for line in self.daemon.info(territory.name, "maps").splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start < address + SLOT and end > address:
                self.check(
                    start <= address and end >= address + SLOT,
                    f"slot {number} of {territory.name} is mapped in part: {line}",
                )
                found = line
        kind, prot = "hole", RW
        if found:
            letters = found.split()[1]
            prot = (R if letters[0] == "r" else 0) | (2 if letters[1] == "w" else 0)
            kinds = ("file", "copy") if "[anon" not in found else ("shared", "private")
            kind = kinds[letters[3] == "p"]
        candidates = [each for each in (before, after) if (each.kind, each.prot) == (kind, prot)]
        if kind == "hole":
            candidates = [each for each in (before, after) if each.kind == "hole"]
        self.log.append(f"slot {number} of {territory.name} is now: {found or 'a hole'}")
        self.check(candidates, f"slot {number} of {territory.name} is neither {before} nor {after}")
        keys = _union(*(each.keys for each in candidates))
        files = _union(before.file_keys, after.file_keys)
        if "file" in (before.kind, after.kind):
            files = _union(files, before.keys, after.keys)
        return Slot(kind, prot, keys, files)

    def check_file(self, territory: Territory, number: int, keys: tuple[int, ...]) -> None:
        """The slot's file has these patterns and nothing else, word by word."""
        try:
            content = territory.file(number).read_bytes()
        except FileNotFoundError:
            return
        words = np.frombuffer(content, np.uint64)
        good = np.zeros(len(words), bool)
        for key in keys:
            good |= words == np.frombuffer(pattern(key), np.uint64)
        self.check(
            len(content) == SLOT and good.all(),
            f"{territory.file(number)}: {np.count_nonzero(~good)} of its words are not of {keys}; "
            f"the first is number {int(np.argmin(good))}",
        )

    # -- the daemon --

    def restart(self) -> None:
        """The daemon dies and another one takes over; nobody else notices."""
        self.log.append("the daemon is killed")
        self.daemon.kill()
        self.daemon.start()
        self.starts += 1
        self.log.append("the daemon has started again")

    def memories(self) -> list[str]:
        return self.daemon.shm_objects()

    def held(self) -> tuple[float, ...]:
        """What the daemon holds but for the files that are mapped in the old region."""
        daemon = self.daemon
        files = sum(slot.has_file for slot in self.old.slots)
        return daemon.metric("tasks"), daemon.descriptors() - files, len(self.memories())

    def settle(self) -> tuple[float, ...]:
        """What it holds when it has come to rest: what is foreign is closed by a thread."""
        held = self.held()
        for _ in range(100):
            time.sleep(0.05)
            before, held = held, self.held()
            if before == held:
                break
        return held

    def rest(self) -> None:
        """Between two epochs: all is as it was, or less.

        A sharer that has made no call since its daemon died has no connection.  A region's own
        mapping has a userfaultfd from the first fault on whose sharer died of it (host.py).
        """
        tasks, descriptors, memories = self.at_rest
        most = tasks, descriptors + 1, memories
        self.soon(
            lambda: all(now <= then for now, then in zip(self.held(), most, strict=True)),
            f"back to {most} (tasks, descriptors, memories), now {self.held()}",
        )
        for line in Path(f"/proc/{self.daemon.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                self.samples.append(int(line.split()[1]) * 1024)

    def judge(self) -> str:
        """Whether memory is flat: medians, so that no single epoch decides."""
        warm = self.samples[len(self.samples) // 10 :]
        third = len(warm) // 3
        self.check(third > 0, f"only {len(self.samples)} epochs: give it more time")
        first = statistics.median(warm[:third])
        last = statistics.median(warm[-third:])
        told = (
            f"seed {self.seed}: {len(self.samples)} epochs, {self.commands} commands, "
            f"{self.kills} clients killed, {self.starts} daemons restarted; the daemon's memory: "
            f"{first / 1024:.0f} KiB in the first third, {last / 1024:.0f} KiB in the last; tasks, "
            f"descriptors, memories at rest: {tuple(int(each) for each in self.at_rest)} always"
        )
        self.check(last - first <= MEMORY_ALLOWANCE, f"memory grows: {told}")
        return told


def _kind(reader: bool) -> str:
    return "reader" if reader else "writer"


def _union(*keys: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(key for each in keys for key in each))
