"""Regions come and go in many threads and processes, with signals; `make stress` for long."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ALIGNMENT, SUPPORT, Daemon, eventually

from libmshare import NoSuchRegion, Region

ROUNDS = int(os.environ.get("MSHARE_STRESS_ROUNDS", "400"))
PROCESSES = 4


class Process:
    """One of storm.py, and the rounds that it has told of."""

    def __init__(self, daemon: Daemon, number: int, directory: Path) -> None:
        self.rounds = 0
        self.killed = False
        self.errors = directory / f"errors{number}"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(SUPPORT / "storm.py"), str(number), str(number)],
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "MSHARE_ROOT": str(daemon.mount)},
            )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def look(self) -> int:
        """How many rounds there are more."""
        assert self.process.stdout is not None
        more = len(self.process.stdout.read() or b"")
        self.rounds += more
        return more

    def signal(self, number: int) -> None:
        """Send one, but not before it can take it; and never again after SIGKILL."""
        if self.rounds:
            self.process.send_signal(number)
            self.killed |= number == signal.SIGKILL

    def stop(self) -> None:
        """Have it end, as soon as it can take that."""
        if not self.killed:
            eventually(lambda: self.look() > 0 or self.rounds > 0, "its first round", 60)
            self.process.terminate()

    def end(self) -> None:
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), True)
        self.process.communicate(timeout=100)
        told = self.errors.read_text()
        assert told == ""
        assert self.process.returncode == (-signal.SIGKILL if self.killed else 0)


@pytest.mark.timeout(120 + ROUNDS)
def test_regions_come_and_go_in_a_storm_of_signals(
    make_daemon: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}").start()
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    with Region.create(size="64K", ephemeral=True) as region:
        region.buf[0] = 1
    eventually(lambda: daemon.shm_objects() == [], "nothing is there")
    descriptors = daemon.descriptors()
    dice = random.Random(7)
    done, started = 0, 0
    running: list[Process] = []
    try:
        while done < ROUNDS:
            while len(running) < PROCESSES:
                running.append(Process(daemon, started, tmp_path))
                started += 1
            time.sleep(dice.uniform(0.001, 0.02))
            done += sum(each.look() for each in running)
            one = dice.choice(running)
            if dice.random() < 0.01:
                one.signal(signal.SIGKILL)
            else:
                one.signal(dice.choice((signal.SIGINT, signal.SIGALRM)))
            if one.killed or one.process.poll() is not None:
                running.remove(one)
                one.end()
        for each in running:
            each.stop()
        while running:
            running.pop().end()
    finally:
        for each in running:
            each.process.kill()
            each.process.communicate()
    # What the killed have left has a name, and is whole; or it is a name that was made just
    # before, and had no memory yet.
    for name in daemon.mount.iterdir():
        if name.name.startswith(("storm", "shared", "py-")):
            try:
                with Region.attach(name.name) as region:
                    region.unlink()
            except NoSuchRegion:
                name.unlink()
    eventually(lambda: daemon.shm_objects() == [], "all memory is gone")
    eventually(lambda: daemon.descriptors() <= descriptors, "all descriptors are closed")
    left = [each.name for each in daemon.mount.iterdir()]
    assert [name for name in left if name.startswith(("storm", "shared", "py-"))] == []
