"""A daemon, alice whom it serves, and attacks beside her: what test_walls.py and others share."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import hostile
import pytest
from conftest import ALIGNMENT, BIN, Daemon, compile_c
from hostile import Attack, Held
from victim import ALICE, HANG_SECONDS, SOURCE, Victim

from libmshare import core
from msharefsd.linux import syscalls

STALE = "taking down the mount"
SETTLE_SECONDS = 30.0
"""What is closed may take its time: a thread of who passed it waits."""


@dataclass(frozen=True)
class Programs:
    """Alice's program and mallory's helpers, where everybody can read them."""

    victim: Path
    helpers: Path


@pytest.fixture(scope="session", name="programs")
def programs_fixture() -> Iterator[Programs]:
    with tempfile.TemporaryDirectory(prefix="mshare-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        library = core.library_directory()
        if library is not None:
            shutil.copy(library / core.LIBRARY, directory)
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-Wl,-rpath,$ORIGIN"]
        program = compile_c(SOURCE, directory / "victim", *flags)
        yield Programs(program, hostile.compile_helpers(directory))


@functools.cache
def userfaultfd_for_all() -> tuple[str, ...]:
    """The setting with which ordinary users get a userfaultfd, if there is one."""
    usage = subprocess.run([BIN / "msharefsd", "--help"], check=True, capture_output=True)
    return ("--userfaultfd=all",) if b"--userfaultfd" in usage.stdout else ()


def processes_of(daemon: Daemon) -> list[int]:
    """The daemon's process, and those that it has started."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(name))
    found, look = [], [daemon.pid]
    while look:
        found.append(look.pop())
        look += children.get(found[-1], [])
    return found


def held_by(daemon: Daemon) -> tuple[int, int]:
    """How many descriptors all of it has open, and what is in /dev/shm."""
    count = 0
    for pid in processes_of(daemon):
        with contextlib.suppress(OSError):
            count += len(os.listdir(f"/proc/{pid}/fd"))
    return count, len(os.listdir("/dev/shm"))


def processor_time(daemon: Daemon) -> float:
    """What the daemon and all that it has started have used (seconds)."""
    ticks = 0
    for pid in processes_of(daemon):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


OF_OTHERS: Final = (
    # That a pager hangs is told, and is somebody else's than alice's.
    rf"user (?!{ALICE}\b)\d+'s regions cannot be served",
    rf"pager of user (?!{ALICE}\b)\d+, process \d+, (does not answer|does not end)",
    # Hers may take its time on a busy machine; that she goes on is looked at.
    r"pager of user \d+, process \d+, is not ready yet",
    r"process \d+ has been killed and does not end: going on without it",
    # On a busy machine a few threads are enough to keep the lock of their address space.
    rf"process \d+ of user (?!{ALICE}\b)\d+ holds up calls on its address space",
    # Whoever fills their own pager with descriptors is turned away by it.
    rf"msharefsd\[(?!{ALICE}\b)\d+\]: ERROR: turning clients away: Too many open files",
)


class Walls:
    """A daemon, and alice, whom it serves."""

    def __init__(
        self,
        daemon: Daemon,
        programs: Programs,
        directory: Path,
        launch: Callable[[Daemon], object] = Daemon.launch,
    ) -> None:
        self.daemon = daemon
        self.launch = launch
        self.programs = programs
        self.directory = directory
        self.victims: list[Victim] = []
        self.attacks: list[Held] = []
        daemon.expected += [STALE, *OF_OTHERS]

    def victim(self, **how: object) -> Victim:
        """One more who wants to go on."""
        program = self.programs.victim
        made = Victim(program, self.daemon.mount, self.directory, **how)  # type: ignore[arg-type] # Victim's
        self.victims.append(made)
        made.goes_on()
        return made

    @contextlib.contextmanager
    def attacked(self, attack: Attack, uid: int = hostile.MALLORY) -> Iterator[Held]:
        """An attack in force, by that user."""
        self.daemon.expected += attack.expected
        with hostile.held(
            attack, self.daemon.mount, self.directory, self.programs.helpers, uid=uid
        ) as held:
            self.attacks.append(held)
            yield held
        held.clear()

    def all_go_on(self) -> None:
        for each in self.victims:
            each.goes_on()

    def killed(self) -> None:
        """SIGKILL, which ends the daemon whatever is going on."""
        process = self.daemon.process
        assert process is not None
        process.kill()
        try:
            process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            pytest.fail(f"the daemon does not end by SIGKILL: {state}")
        self.daemon.process = None

    def started(self) -> None:
        """The next daemon, which is ready before it has done nothing for a long time.

        Beside 150 threads that are busy it gets a seventy-fifth of a processor: a limit in
        time would be one on the machine.
        """
        offset = self.daemon.log().count("ready:")
        self.launch(self.daemon)
        process = self.daemon.process
        assert process is not None
        used, deadline = 0.0, time.monotonic() + HANG_SECONDS
        while self.daemon.log().count("ready:") == offset:
            assert process.poll() is None, self.daemon.log()
            now = processor_time(self.daemon)
            if now > used:
                used, deadline = now, time.monotonic() + HANG_SECONDS
            assert time.monotonic() < deadline, f"hangs after {used:.2f} s: {self.daemon.log()}"
            time.sleep(0.02)

    def settled(self) -> tuple[int, int]:
        """What the daemon holds while nobody does anything."""
        for each in self.victims:
            each.rest()
        before, held = (-1, -1), held_by(self.daemon)
        deadline = time.monotonic() + SETTLE_SECONDS
        while before != held and time.monotonic() < deadline:
            time.sleep(0.1)
            before, held = held, held_by(self.daemon)
        return held

    def go(self) -> None:
        for each in self.victims:
            each.go()

    def nothing_more_than(self, held: tuple[int, int]) -> None:
        """Nothing is left of an attack; those who rested go on."""
        now = self.settled()
        deadline = time.monotonic() + SETTLE_SECONDS
        while (now[0] > held[0] or now[1] > held[1]) and time.monotonic() < deadline:
            time.sleep(0.1)
            now = held_by(self.daemon)
        assert now[0] <= held[0], f"descriptors: {held[0]} and now {now[0]}"
        assert now[1] <= held[1], f"in /dev/shm: {held[1]} and now {os.listdir('/dev/shm')}"
        self.go()

    def end(self) -> None:
        """Whatever happened."""
        for attack in self.attacks:
            attack.end()
        for each in self.victims:
            each.end()


@pytest.fixture(name="own_shm")
def own_shm() -> Iterator[None]:
    """A /dev/shm of the test's own: what is done and left there is nobody else's."""
    syscalls.mount("shm", "/dev/shm", "tmpfs", 0, "mode=1777")
    yield
    syscalls.umount("/dev/shm", syscalls.MNT_DETACH)


Make = Callable[..., Walls]


@pytest.fixture(name="make_walls")
def make_walls_fixture(
    own_shm: None, make_daemon: Callable[..., Daemon], programs: Programs, directory: Path
) -> Iterator[Make]:
    made: list[Walls] = []

    def make(
        *arguments: str, config: str = "", launch: Callable[[Daemon], object] | None = None
    ) -> Walls:
        # What an attack has left goes soon, and is waited for.
        (directory / "config").write_text(f"idle_seconds = 0.5\n{config}")
        words = [f"--alignment={ALIGNMENT}", *userfaultfd_for_all(), *arguments]
        words.append(f"--config={directory / 'config'}")
        daemon = make_daemon(*words)
        made.append(Walls(daemon, programs, directory, launch or Daemon.launch))
        made[-1].started()
        return made[-1]

    try:
        yield make
    finally:
        for each in made:
            each.end()


@pytest.fixture(name="walls")
def walls_fixture(make_walls: Make) -> Walls:
    made = make_walls()
    made.victim()
    return made
