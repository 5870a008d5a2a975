"""Death: of sharers at every point, and of the daemon.

The rule above all others: the daemon's death loses nothing, corrupts nothing, and
stops nobody who touches memory that is there.  And nobody ever reads zeros from a
page that was never filled.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from baseline import Baseline
from conftest import ALIGNMENT, BASE, SUPPORT, Client, Daemon, clients, eventually

SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
Spawn = Callable[..., Client]


def donate(client: Client, name: str = "r") -> None:
    client.ok("map", BASE, SIZE, mmap.MAP_SHARED)
    client.ok("mshare", name, BASE, SIZE, CREATE, 0o600)


CHURN_SECONDS = int(os.environ.get("MSHARE_CHURN_SECONDS", "10"))


# -- sharers --

STEPS = (
    "connected",
    "opened",
    "sent",
    "attached",
    "mapped",
    "faulted",
    "detaching",
    "detached",
)
DONOR_STEPS = ("created", "donating", "committed")


@pytest.mark.parametrize("step", STEPS + DONOR_STEPS)
def test_a_sharer_that_is_killed_leaves_no_reference(
    spawn: Spawn, daemon: Daemon, step: str
) -> None:
    """tests/parked.py makes the calls of an attach one by one and stops at `step`."""
    if step in STEPS:
        donor = spawn()
        donate(donor)
        donor.kill()
        eventually(lambda: daemon.sharers("r") == 0, "the donor is gone")
    baseline = Baseline(daemon)
    stopped = step in ("faulted", "detaching")
    with subprocess.Popen(
        [sys.executable, SUPPORT / "parked.py", daemon.mount, str(BASE), str(SIZE), step],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        if stopped:  # so that the daemon cannot answer what comes now
            daemon.freeze()
        process.stdin.write("go\n")
        process.stdin.flush()
        if stopped:
            time.sleep(0.1)
        else:
            assert process.stdout.readline() == f"{step}\n"
        process.kill()
        process.wait()
        if stopped:
            daemon.thaw()
    if step == "created":
        # As after open(O_CREAT) by anybody: a name without a range, and no memory.
        assert (daemon.mount / "new").read_bytes() == bytes(16)
        (daemon.mount / "new").unlink()
    if step == "committed":
        (daemon.mount / "new").unlink()
    baseline.check()


def test_sharers_killed_at_random_leave_no_reference(spawn: Spawn, daemon: Daemon) -> None:
    donor = spawn()
    donate(donor)
    donor.ok("store", BASE, 1)
    baseline = Baseline(daemon)
    dice = random.Random(1)
    for _ in range(60):
        victims = [spawn() for _ in range(2)]
        for victim in victims:
            victim.send("cycle", "r", BASE, SIZE)
        time.sleep(dice.random() * 0.05)
        for victim in victims:
            assert victim.process.poll() is None, "the cycle itself failed"
            victim.kill()
    baseline.check()
    assert donor.do("load", BASE) == "1"


@pytest.mark.timeout(60 + CHURN_SECONDS)
def test_sharers_that_change_everything_and_are_killed(
    spawn: Spawn, daemon: Daemon, directory: Path
) -> None:
    """What is mapped changes under everybody's hands, and some die in the middle of it."""
    path = directory / "file"
    path.write_bytes(b"\1" * 128 * 4096)
    donor = spawn()
    donor.ok("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_RDWR, 0o600)
    donor.ok("mmap", BASE, 4096, 3, 0x11)
    donor.ok("store", BASE, 1)
    donor.ok("mprotect", BASE, 4096, 0)  # the stash stays, once there is one
    donor.ok("munmap", BASE, 4096)
    baseline = Baseline(daemon)
    dice = random.Random(2)
    until = time.monotonic() + CHURN_SECONDS
    sharers: list[Client] = []
    while time.monotonic() < until:
        while len(sharers) < 5:
            sharers.append(spawn())
            sharers[-1].ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
            sharers[-1].send("churn", BASE, SIZE, path, dice.randrange(1 << 30))
        time.sleep(dice.random() * 0.2)
        victim = sharers.pop(dice.randrange(len(sharers)))
        if dice.random() < 0.3:
            os.kill(victim.pid, signal.SIGSTOP)
        assert victim.process.poll() is None, "it ended by itself"
        victim.kill()
    for sharer in sharers:
        sharer.kill()
    donor.ok("munmap", BASE, SIZE)
    assert daemon.info("r", "maps") == ""
    eventually(lambda: int(daemon.field("r", "memory")) == 0, "all memory is free")
    assert donor.do("load", BASE) == "SIGBUS"
    donor.ok("mmap", BASE, SIZE, 3, 0x11)
    donor.ok("fill", BASE, SIZE, 2)
    donor.ok("munmap", BASE, SIZE)
    baseline.check()


def test_a_donor_killed_while_it_donates_frees_the_name(spawn: Spawn, daemon: Daemon) -> None:
    """Those who wait for the region to be made get on."""
    baseline = Baseline(daemon)
    with subprocess.Popen(
        [sys.executable, SUPPORT / "parked.py", daemon.mount, str(BASE), str(SIZE), "donating"],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline() == "donating\n"
        waiting = spawn()
        waiting.send("mshare", "new", BASE, SIZE, os.O_RDWR, 0)
        assert waiting.process.stdout is not None
        assert not select.select([waiting.process.stdout], [], [], 0.3)[0], "it must wait"
        process.kill()
        process.wait()
    assert waiting.result() == "-2"
    waiting.kill()
    baseline.check()


def test_a_sharer_that_is_stopped_delays_nobody(spawn: Spawn) -> None:
    donor, stopped, third = spawn(), spawn(), spawn()
    donate(donor)
    stopped.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    os.kill(stopped.pid, signal.SIGSTOP)
    third.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    third.ok("fill", BASE, SIZE, 5)
    third.ok("detach", "r")
    assert donor.do("load", BASE) == "5"
    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.do("load", BASE + SIZE - 4096) == "5"


# -- the daemon --


@pytest.fixture
def orphans(daemon: Daemon, client_program: Path) -> Iterator[list[Client]]:
    """A donor and a second sharer of a region with one page, whose daemon was killed."""
    with clients(client_program, daemon, MSHARE_RECONNECT_SECONDS="0") as start:
        donor, second = start(), start()
        donate(donor)
        donor.ok("store", BASE, 42)
        second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        daemon.kill()
        yield [donor, second]


def waits(client: Client) -> bool:
    """Whether the client gives no result now nor soon."""
    assert client.process.stdout is not None
    return not select.select([client.process.stdout], [], [], 0.5)[0]


def test_memory_that_is_there_is_not_touched_by_the_daemons_death(orphans: list[Client]) -> None:
    donor, second = orphans
    assert second.do("load", BASE) == "42"
    donor.ok("store", BASE + 1, 43)
    assert second.do("load", BASE + 1) == "43"
    assert second.do("from_memory", BASE, 4096) == "4096"


@pytest.mark.parametrize("access", ["load", "store", "from_memory"])
def test_who_touches_an_absent_page_waits_and_can_be_killed(
    orphans: list[Client], access: str
) -> None:
    donor, second = orphans
    second.send(access, BASE + ALIGNMENT, 1)
    assert waits(second), "it must neither read zeros nor fail"
    second.kill()
    assert donor.do("load", BASE) == "42"


def test_a_child_of_an_orphan_reads_no_zeros(orphans: list[Client]) -> None:
    donor, _ = orphans
    for command in ("fork", "clone"):
        for offset in (0, ALIGNMENT):
            assert donor.do(command, "load", BASE + offset) == "SIGSEGV"


def test_calls_without_a_daemon_fail_with_a_plain_errno(orphans: list[Client]) -> None:
    donor, second = orphans
    assert donor.do("mshare", "q", BASE + SIZE, SIZE, CREATE, 0o600) == "-107"  # ENOTCONN
    assert donor.do("stat", "r") == "-107"
    assert second.do("unlink", "r") == "-107"
    assert second.do("vma", BASE) == "none", "the window is gone all the same"


def test_a_reader_whose_daemon_died_reads_no_zeros(daemon: Daemon, client_program: Path) -> None:
    with clients(client_program, daemon) as start:
        donor, reader = start(), start()
        donate(donor)
        donor.ok("store", BASE, 42)
        reader.ok("mshare", "r", BASE, SIZE, os.O_RDONLY, 0)
        daemon.kill()
        assert reader.do("load", BASE) == "42"
        reader.send("load", BASE + ALIGNMENT)
        assert waits(reader)


def test_the_next_daemon_goes_on(daemon: Daemon, orphans: list[Client]) -> None:
    """What becomes of everything in it is test_restart.py's subject."""
    donor, second = orphans
    second.send("load", BASE + ALIGNMENT)
    daemon.expected += ["taking down the mount"]
    daemon.start()
    assert second.result() == "0"
    assert donor.do("load", BASE) == "42"
    assert daemon.sharers("r") == 2
    donor.ok("unlink", "r")
    second.ok("unlink", "r")
    assert not (daemon.mount / "r").exists()


# -- what a page that was never filled must never do --


def test_no_backing_page_appears_that_the_daemon_did_not_fill(spawn: Spawn, daemon: Daemon) -> None:
    """A window that were unguarded for one instant would show up here as memory."""
    donor = spawn()
    donate(donor)
    daemon.freeze()
    try:
        (name,) = daemon.shm_objects()
        for command in (
            ("clone", "load", BASE),
            ("clone", "store", BASE, 1),
            ("clone", "from_memory", BASE, 1),
        ):
            donor.do(*command)
        assert os.stat(f"/dev/shm/{name}").st_blocks == 0
        donor.send("load", BASE + 4096)
        assert waits(donor)
        assert os.stat(f"/dev/shm/{name}").st_blocks == 0
    finally:
        daemon.thaw()
    assert donor.result() == "0"


def test_a_daemon_that_is_stopped_is_not_noticed_on_present_pages(
    spawn: Spawn, daemon: Daemon
) -> None:
    donor = spawn()
    donate(donor)
    donor.ok("fill", BASE, ALIGNMENT, 1)
    daemon.freeze()
    try:
        donor.ok("fill", BASE, ALIGNMENT, 2)
        assert donor.do("scan", BASE, ALIGNMENT) == "2"
    finally:
        daemon.thaw()
