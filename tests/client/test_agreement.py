"""What is told of a region is the same wherever it is told, under load, too; and so says /proc."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from command import Command
from command import mshare_fixture as _mshare  # noqa: F401 - a fixture
from conftest import ALIGNMENT, BASE, PAGE, Client, Daemon, MiB
from test_web import Page
from test_web import page_fixture as _page  # noqa: F401 - a fixture
from test_web import serve_fixture as _serve  # noqa: F401 - a fixture

pytestmark = pytest.mark.shm_only
SIZE: Final = 8 * ALIGNMENT
SHARED, FIXED = 1, 0x10
LOOKS: Final = 6
"""At each place, while sharers go on touching."""
TOLD: Final = ("memory", "faults", "populated")
_METRICS: Final = {
    "memory": "msharefs_region_memory_bytes",
    "faults": "msharefs_region_faults_total",
    "populated": "msharefs_region_populated_bytes_total",
    "sharers": "msharefs_region_sharers",
}

Figures = dict[str, int]


def by_info(daemon: Daemon) -> Figures:
    text = daemon.info("r")
    return {key: int(re.findall(rf"^{key}: +(\d+)$", text, re.MULTILINE)[0]) for key in _METRICS}


def by_metrics(daemon: Daemon) -> Figures:
    text = (daemon.mount / ".metrics").read_text()
    return {
        key: int(float(re.findall(rf'^{name}{{region="r",.*}} (\S+)$', text, re.MULTILINE)[0]))
        for key, name in _METRICS.items()
    }


def one(records: list[dict[str, Any]]) -> Figures:
    (record,) = (each for each in records if each["name"] == "r")
    return {key: record[key] for key in _METRICS if key in record}


def resident(pid: int) -> int:
    """What a process has in memory, counted page by page (proc_pid_smaps(5)), in bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Rss: +(\d+) kB$", text, re.MULTILINE)[0]) << 10


class Load:
    """Sharers that touch one page after the other, each its own."""

    def __init__(self, sharers: list[Client]) -> None:
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._go_on, args=(number, each, len(sharers)))
            for number, each in enumerate(sharers)
        ]

    def _go_on(self, number: int, sharer: Client, of: int) -> None:
        for at in range(number * PAGE, SIZE, of * PAGE):
            if self._over.is_set():
                return
            sharer.ok("store", BASE + at, 1 + number)

    def __enter__(self) -> None:
        for each in self._threads:
            each.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for each in self._threads:
            each.join()


def test_it_is_the_same_everywhere(
    mshare: Command, daemon: Daemon, spawn: Callable[..., Client], page: Page
) -> None:
    sharers = [spawn() for _ in range(3)]
    sharers[0].ok("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_RDWR, 0o600)
    sharers[0].ok("mmap", BASE, SIZE, 3, SHARED | FIXED)
    for each in sharers[1:]:
        each.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    places: dict[str, Callable[[], Figures]] = {
        "metrics": lambda: by_metrics(daemon),
        "info": lambda: one([mshare.json("info", "r")]),
        "ls": lambda: one(mshare.json("ls")),
        "top": lambda: one(json.loads(mshare.ok("top", "--once", "--json"))["regions"]),
        "web": lambda: one(page.last()["regions"]),
    }
    with Load(sharers):
        # While it changes, what is told lies between what was before and what is after that.
        for _ in range(LOOKS):
            for place, look in places.items():
                before = by_info(daemon)
                told = look()
                after = by_info(daemon)
                if place != "web":  # which shows its last look
                    for key in set(TOLD) & set(told):
                        assert before[key] <= told[key] <= after[key], (place, key)
                assert told["sharers"] == 3, place
    right = by_info(daemon)
    assert right["memory"] > 0
    for place, look in places.items():
        told = look()
        while place == "web" and told != {key: right[key] for key in told}:
            told = look()  # of the next look
        assert told == {key: right[key] for key in told}, place
    # And so says the kernel.
    (memory,) = daemon.backings()
    assert memory.stat().st_blocks * 512 == right["memory"]
    assert (daemon.mount / "r").stat().st_blocks * 512 == right["memory"]
    processes = json.loads(mshare.ok("top", "--once", "--json"))["processes"]
    assert sorted(each["pid"] for each in processes) == sorted(each.pid for each in sharers)
    for each in processes:
        # (The kernel's own sum is behind by what its processors have not added up yet.)
        assert abs(each["rss"] - resident(each["pid"])) < MiB
