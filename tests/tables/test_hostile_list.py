"""Who makes work for the watcher makes it slow, and nothing else.

Counted is what the watcher has used of a processor, and for how long it has paused for that: no
load of the machine changes the one without the other.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sharers import Sharer, Sharers, make_sharers  # noqa: F401 - a fixture

from msharefsd.linux import features
from msharetables import collapse, pace, proc, watch
from msharetables.pace import Pace
from msharetables.watch import Limits, Watcher

MiB = 1 << 20
HUGE = 2 * MiB
CHUNKS = 16
SIZE = CHUNKS * HUGE
SHARE = 0.1
LOOKS = 4

pytestmark = [
    pytest.mark.shm_only,
    pytest.mark.skipif(os.geteuid() != 0, reason="takes root"),
    pytest.mark.skipif(
        not features.probe().collapse, reason="this kernel has no MADV_COLLAPSE of shared memory"
    ),
]

THREAD = "import threading\nthreading.Thread(target=storm, daemon=True).start()"
HOSTILE = {
    "five hundred mappings a second": (
        "def storm():\n"
        "    while True:\n"
        "        m = shared(8 * MiB); touch(m, 8 * MiB, HUGE); libc.munmap(m, 8 * MiB)\n"
        f"        time.sleep(0.002)\n{THREAD}"
    ),
    "tens of thousands of mappings": (
        "many = min(int(open('/proc/sys/vm/max_map_count').read()) - 1000, 64000)\n"
        "at = shared(many * 4096)\n"
        "for n in range(0, many, 2):\n"
        "    libc.mprotect(ctypes.c_void_p(at + n * 4096), ctypes.c_size_t(4096), 1)\n"
        "read(at, many * 4096)\nchildren(1, lambda: read(at, many * 4096))"
    ),
    "forks, exits and execs": (
        f"at = shared({SIZE})\ntouch(at, {SIZE})\n"
        "def storm():\n"
        "    while True:\n"
        "        pid = os.fork()\n"
        f"        if pid == 0: read(at, {SIZE}, HUGE); os.execv('/bin/true', ['/bin/true'])\n"
        "        os.waitpid(pid, 0)\n"
        "for _ in range(2):\n"
        "    if os.fork() == 0: storm()"
    ),
    "names with newlines": (
        "libc.prctl(15, ctypes.c_char_p(b'a\\n0-1 rw-s'), 0, 0, 0)\n"
        f"fd = os.memfd_create(b'x\\n0-200000 rw-s 0 0:1 7')\nos.ftruncate(fd, {SIZE})\n"
        f"at = shared({SIZE}, fd=fd)\ntouch(at, {SIZE}, HUGE)\n"
        f"children(1, lambda: read(at, {SIZE}, HUGE))"
    ),
    "stopped": (
        f"at = shared({SIZE})\ntouch(at, {SIZE}, HUGE)\n"
        f"children(1, lambda: read(at, {SIZE}, HUGE))\n"
        "if os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)"
    ),
    "another user namespace": (
        f"libc.unshare(0x10000000)\nat = shared({SIZE})\ntouch(at, {SIZE}, HUGE)\n"
        f"children(1, lambda: read(at, {SIZE}, HUGE))"
    ),
    "very many chunks that are all but empty": (
        "at = shared(1 << 41)\ntouch(at, 1 << 35, HUGE)\n"  # 16,384 of a million
        "children(1, lambda: read(at, 1 << 35, HUGE))"
    ),
}


@pytest.mark.parametrize("code", HOSTILE.values(), ids=HOSTILE)
def test_it_costs_the_watcher_a_bounded_share(
    sharers: Sharers, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    bad = sharers(code)
    good = sharers(f"at = shared({SIZE})\ntouch(at, {SIZE})\nchildren(3, lambda: read(at, {SIZE}))")
    paused = 0.0

    def sleep(seconds: float) -> None:
        nonlocal paused
        paused += seconds

    # The tests' own pauses are none of it.
    clock = SimpleNamespace(**{name: getattr(time, name) for name in dir(time)} | {"sleep": sleep})
    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setattr(collapse, "time", clock)
    # No processor is idle, as far as it can see.
    monkeypatch.setattr(pace, "_STAT", Path(os.devnull))
    watcher = Watcher(
        Limits(smallest=4 * MiB, filled=0.5),
        Pace(SHARE),
        pids=lambda: proc.with_children([bad.pid, good.pid]),
    )
    before, used = tables(good), time.process_time()
    try:
        for _ in range(LOOKS):
            watcher.once(lambda *_: None)
    finally:
        used = time.process_time() - used
        watcher.close()
    assert watcher.totals.looks == LOOKS
    assert watcher.totals.chunks["done"] >= CHUNKS
    assert tables(good) <= before - 4 * CHUNKS * 4096
    # A tenth is what it may have, whatever it was spent on.
    assert used / (used + paused) < 1.5 * SHARE
    # And it has noticed nothing.
    assert bad.do("1 + 1") == "2"


def tables(program: Sharer) -> int:
    """VmPTE of it and its children (bytes)."""
    found = [proc.status(each) for each in proc.with_children([program.pid])]
    return sum(status.tables for status in found if status)
