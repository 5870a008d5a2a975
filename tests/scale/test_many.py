"""Thousands of sharers of one region: they come at once, fork at once, die at once."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import resource
import select
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import BASE, SUPPORT, Daemon, clients, compile_c, eventually

MiB = 1 << 20
SIZE = 256 * MiB
MANY = 2000
CLIENTS = 1500
"""Of the letter."""
PER_SHARER = 32 << 10
"""The most of the daemon's memory that a sharer may cost, bytes."""
SLACK = 8 * MiB
"""How much the daemon's memory may differ from storm to storm: the allocator's doing."""


@pytest.fixture(scope="session")
def crowd_program() -> Iterator[Path]:
    """tests/crowd.c, compiled."""
    with tempfile.TemporaryDirectory(prefix="mshare-test-") as name:
        flags = ("-Wall", "-Wextra", "-Werror")
        yield compile_c(SUPPORT / "crowd.c", Path(name) / "crowd", *flags)


class Crowd:
    """A process with very many children; see crowd.c."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def send(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(str(word) for word in words) + "\n")
        self.process.stdin.flush()

    def answered(self) -> bool:
        """Whether the answer is there."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def do(self, *words: object) -> str:
        self.send(*words)
        return self.answer()


@contextlib.contextmanager
def crowds(program: Path, daemon: Daemon, count: int) -> Iterator[list[Crowd]]:
    """That many crowds of the region "r", all gone at the end."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            process = subprocess.Popen(
                [program, "r", str(BASE), str(SIZE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={"MSHARE_ROOT": str(daemon.mount)},
                cwd="/",
            )
            stack.enter_context(process)
            stack.callback(process.kill)  # its children see the door's end closed, and go
            made.append(Crowd(process))
        yield made


def memory(daemon: Daemon, what: str = "RssAnon") -> int:
    """Memory of the pager by its name in /proc/PID/status, bytes."""
    for line in Path(f"/proc/{daemon.pager()}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(what)


@pytest.fixture
def big(make_daemon: Callable[..., Daemon], client_program: Path) -> Iterator[Daemon]:
    """A daemon that was started with few descriptors, and a region that has one sharer."""
    daemon = make_daemon(f"--alignment={SIZE}")
    limit = (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    daemon.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit))
    with clients(client_program, daemon) as start:
        donor = start()
        donor.ok("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        donor.ok("mmap", BASE, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | 0x10)
        donor.ok("fill", BASE, MiB, 1)
        yield daemon


def test_2000_sharers_attach_fork_and_are_killed_at_once(big: Daemon, crowd_program: Path) -> None:
    with crowds(crowd_program, big, 2) as (strangers, family):
        assert family.do("join") == "1"

        def state() -> tuple[float, ...]:
            return big.sharers("r"), big.metric("tasks"), big.descriptors()

        before = state()
        empty = memory(big)
        full, left = [], []
        for end in ("leave", "kill") * 2:
            for crowd, how in ((strangers, "attach"), (family, "fork")):
                assert crowd.do(how, MANY) == str(MANY)
                assert big.sharers("r") == 2 + MANY
                full.append(memory(big))
                assert crowd.do(end) == str(MANY)
                eventually(
                    # A task that was about to end, then, is no loss.
                    lambda: all(now <= then for now, then in zip(state(), before, strict=True)),
                    "all are gone, with all they had",
                )
                left.append(memory(big))
        first, most = ((bytes_ - empty) / MANY / 1024 for bytes_ in (full[0], max(full)))
        print(f"the daemon's memory for each of {MANY} sharers: {first:.1f} KiB, later {most:.1f}")
        assert max(full) - empty <= MANY * PER_SHARER, full
        # The interpreter keeps memory for those who come next: what the first storm of
        # each kind left is enough for all that follow.  A tenth of what those 8,000
        # sharers cost would be more than the slack.
        assert max(full[4:]) - max(full[:4]) < SLACK, (full, left)
        assert max(left[4:]) - max(left[:4]) < SLACK, (full, left)


def test_1500_sharers_and_cat_and_ls_are_answered_meanwhile(
    big: Daemon, crowd_program: Path
) -> None:
    answers = 0
    with crowds(crowd_program, big, 1) as (crowd,):

        def look() -> None:
            command = "cat .regions/r/info .regions/r/maps mshare_info && ls -a1 . .regions/r"
            shown = subprocess.run(
                command, shell=True, check=True, cwd=big.mount, capture_output=True, text=True
            ).stdout
            assert re.search(rf"^size: +{SIZE}$", shown, re.MULTILINE)
            assert shown.splitlines().count("r") == 1

        while answers < 10:
            crowd.send("attach", CLIENTS)
            while not crowd.answered():
                look()
                answers += not crowd.answered()
            assert crowd.answer() == str(CLIENTS)
            look()
            listed = big.info("r", "sharers").splitlines()
            assert len(listed) == 1 + CLIENTS + 1
            assert sum(line.endswith(" crowd") for line in listed) == CLIENTS
            assert crowd.do("kill") == str(CLIENTS)
            eventually(lambda: big.sharers("r") == 1, "all are gone")
        assert memory(big, "VmHWM") < 100 * MiB
