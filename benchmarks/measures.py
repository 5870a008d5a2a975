"""What is measured: each function runs both sides in turn and returns rows.

Which side goes first changes from round to round, so that a drift of the machine
falls on both.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.huge_pages import HUGE, NoHugePagesError, free_huge_pages, huge_pages
from benchmarks.table import Row
from benchmarks.worker import SHM_DIRECTORY, Side, Worker, WorkerError, Workers
from msharefsd.linux import syscalls, uffd
from msharefsd.memory.buffers import BUFFER, Buffer

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
START: Final = 0x2000_0000_0000
"""Where both sides map: away from what a process has by itself."""
CHUNK: Final = 64 * KiB
"""What a fault at a random place populates; faults are timed in distinct ones."""
SHM: Final = "POSIX shared memory, 4 KiB pages"
MAPPED: Final = "mmap() of the same file"
TMPFS: Final = "a file in /dev/shm"
SETTLE_SECONDS: Final = 5.0
COLLAPSE_SECONDS: Final = 120.0
SETTLED: Final = 16 * MiB
"""Others use /dev/shm too."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure.  `touch`, `warm` and `collapsed` are bytes."""

    touch: int
    warm: int
    touch_rounds: int
    attach_rounds: int
    attaches: int
    fault_rounds: int
    faults: int
    file_rounds: int
    files: int
    sharers: int
    change_rounds: int
    mapped_rounds: int
    collapsed: int
    collapse_rounds: int


FULL: Final = Plan(
    touch=GiB,
    warm=6 * GiB,
    touch_rounds=7,
    attach_rounds=20,
    attaches=25,
    fault_rounds=6,
    faults=1000,
    file_rounds=20,
    files=100,
    sharers=200,
    change_rounds=30,
    mapped_rounds=5,
    collapsed=256 * MiB,
    collapse_rounds=3,
)
QUICK: Final = Plan(
    touch=256 * MiB,
    warm=GiB,
    touch_rounds=3,
    attach_rounds=4,
    attaches=25,
    fault_rounds=2,
    faults=500,
    file_rounds=4,
    files=100,
    sharers=20,
    change_rounds=5,
    mapped_rounds=2,
    collapsed=64 * MiB,
    collapse_rounds=1,
)

SMOKE: Final = Plan(
    touch=16 * MiB,
    warm=16 * MiB,
    touch_rounds=1,
    attach_rounds=1,
    attaches=2,
    fault_rounds=1,
    faults=20,
    file_rounds=1,
    files=2,
    sharers=3,
    change_rounds=2,
    mapped_rounds=1,
    collapsed=4 * MiB,
    collapse_rounds=1,
)
"""Enough to see that everything runs."""

_names = (f"benchmark-{os.getpid()}-{number}" for number in itertools.count(1))


def _sides(rounds: int) -> Iterator[Side]:
    """Both sides a round, and which is first changes."""
    for number in range(rounds):
        yield from ("ours", "peer") if number % 2 == 0 else ("peer", "ours")


@contextlib.contextmanager
def _created(workers: Workers, side: Side) -> Iterator[tuple[Worker, str]]:
    """A worker that has created fresh memory of GiB bytes, and the memory's name.

    At the end the name goes, then the worker, and then the memory has been freed.
    """
    name = next(_names)
    free = _free_memory()
    with workers.start(side) as worker:
        worker.do("create", name, START, GiB)
        try:
            yield worker, name
        finally:
            # By rm: it takes the name away however many have it attached.
            with contextlib.suppress(OSError):
                os.unlink(workers.directory(side) / name)
    # Not in the next measure's time: freeing takes a processor, and the daemon its own.
    deadline = time.monotonic() + SETTLE_SECONDS
    while _free_memory() < free - SETTLED and time.monotonic() < deadline:
        time.sleep(0.01)


def _free_memory() -> int:
    """What is free in /dev/shm and of huge pages, in bytes: memory comes from there."""
    status = os.statvfs(SHM_DIRECTORY)
    return status.f_bfree * status.f_frsize + free_huge_pages() * HUGE


def warm_up(workers: Workers, size: int) -> None:
    """Touch `size` bytes of memory, and free them.

    The first touch of memory that a virtual machine has never touched costs a
    multiple of the next one, and would fall on whoever comes first.
    """
    with workers.start("peer") as worker:
        worker.do("warm", size)


def attaching(workers: Workers, plan: Plan) -> list[Row]:
    """Attach and detach what another process has created."""
    in_c: dict[Side, list[int]] = {"ours": [], "peer": []}
    with contextlib.ExitStack() as stack:
        names: dict[Side, str] = {}
        cyclers: dict[Side, Worker] = {}
        for side in _sides(1):
            _, names[side] = stack.enter_context(_created(workers, side))
            cyclers[side] = stack.enter_context(workers.start(side))
            cyclers[side].do("cycle", names[side], START, GiB, 5)
        for side in _sides(plan.attach_rounds):
            in_c[side] += cyclers[side].do("cycle", names[side], START, GiB, plan.attaches)
        output = workers.run_python(
            Path(__file__).with_name("attach_worker.py"),
            names["ours"],
            f"--rounds={plan.attach_rounds}",
            f"--count={plan.attaches}",
        )
    cycles: dict[str, list[tuple[int, int]]] = json.loads(output)
    cycles |= {
        side: list(zip(times[::2], times[1::2], strict=True)) for side, times in in_c.items()
    }
    attach = {way: [first / 1e3 for first, _ in pairs] for way, pairs in cycles.items()}
    both = {way: [sum(pair) / 1e3 for pair in pairs] for way, pairs in cycles.items()}
    rows = []
    for ours, call, peer, what, target in (
        ("core", "mshare(), Python", "multiprocessing", "multiprocessing.shared_memory", 30.0),
        ("core", "mshare(), Python", "posix_ipc", "posix_ipc and mmap", None),
        (
            "Region",
            "Region.attach(), Python",
            "multiprocessing",
            "multiprocessing.shared_memory",
            20.0,
        ),
        ("ours", "mshare(), C", "peer", "shm_open() and mmap()", None),
    ):
        rows.append(Row(f"attach: {call}", "us", attach[ours], attach[peer], what, target))
        rows.append(Row(f"attach + detach: {call}", "us", both[ours], both[peer], what))
    ours, peer = "create Region", "create multiprocessing"
    what = "multiprocessing.shared_memory"
    rows.append(Row("Region.create(), Python", "us", attach[ours], attach[peer], what))
    rows.append(Row("Region.create() + unlink(), Python", "us", both[ours], both[peer], what, 40.0))
    return rows


def touching(workers: Workers, plan: Plan) -> list[Row]:
    """Touch all pages: the first process, a second that writes, a third that reads."""
    size = f"{plan.touch // MiB} MiB"
    times: dict[str, dict[Side, list[float]]] = defaultdict(lambda: {"ours": [], "peer": []})
    for number, side in enumerate(_sides(1 + plan.touch_rounds)):
        sample: dict[str, float] = {}
        with _created(workers, side) as (first, name):
            sample["first"] = first.one("write", START, plan.touch) / 1e6
            with workers.start(side) as second, workers.start(side) as third:
                before = second.page_tables()
                second.do("attach", name, START, GiB)
                sample["second"] = second.one("write", START, plan.touch) / 1e6
                sample["tables"] = (second.page_tables() - before) / KiB
                third.do("attach", name, START, GiB)
                sample["third"] = third.one("read", START, plan.touch) / 1e6
        if number >= 2:  # the first round of each is to warm up
            for what, value in sample.items():
                times[what][side].append(value)
    return [
        Row(f"{measure} {size}", unit, times[what]["ours"], times[what]["peer"], SHM, target)
        for what, measure, unit, target in (
            ("first", "first touch (write) of", "ms", 1.2),
            ("second", "second sharer's touch (write) of", "ms", 1.0),
            ("third", "third sharer's touch (read) of", "ms", None),
            ("tables", "page tables (VmPTE) of a sharer of", "kB", None),
        )
    ]


def faulting(workers: Workers, plan: Plan) -> list[Row]:
    """Write to one absent page at a time, anywhere."""
    times: dict[Side, list[float]] = {"ours": [], "peer": []}
    for number, side in enumerate(_sides(1 + plan.fault_rounds)):
        with _created(workers, side) as (worker, _):
            # A pair of rounds takes the same pages.
            seed = 0x9E3779B97F4A7C15 + number // 2
            faults = worker.do("faults", START, GiB, CHUNK, plan.faults, seed)
        if number >= 2:
            times[side] += [each / 1e3 for each in faults]
    what = "POSIX shared memory (populates 4 KiB, ours 64 KiB)"
    return [
        Row("fault at a random place, median", "us", times["ours"], times["peer"], what),
        Row(
            "fault at a random place, p99", "us", times["ours"], times["peer"], what, percentile=99
        ),
    ]


def files(workers: Workers, plan: Plan) -> list[Row]:
    """What a region's file costs: the same calls on a file of 16 bytes in tmpfs."""
    commands = {"stat()": "stat", "open(), read(), close()": "file"}
    times: dict[str, dict[Side, list[float]]] = {
        command: {"ours": [], "peer": []} for command in commands.values()
    }
    with (
        _created(workers, "ours") as (_, name),
        tempfile.NamedTemporaryFile(dir=workers.directory("peer")) as plain,
        workers.start("peer") as worker,  # one process for both, as the calls are the same
    ):
        plain.write(bytes(16))
        plain.flush()
        paths: dict[Side, str] = {"ours": str(workers.directory("ours") / name), "peer": plain.name}
        for command, side in itertools.product(commands.values(), _sides(1)):
            worker.do(command, paths[side], 5)
        for command in commands.values():
            for side in _sides(plan.file_rounds):
                taken = worker.do(command, paths[side], plan.files)
                times[command][side] += [each / 1e3 for each in taken]
    return [
        Row(f"region's file: {what}", "us", times[command]["ours"], times[command]["peer"], TMPFS)
        for what, command in commands.items()
    ]


def changing(workers: Workers, plan: Plan) -> list[Row]:
    """mmap(), mprotect(), munmap() of 2 MiB in a region.

    What a further sharer costs depends on how much of it the sharer has mapped: each
    page is an entry to be changed in its page table.  So both ends are measured:
    nothing, and everything.
    """
    few = _changes(workers, plan.change_rounds, 1, all_touch=False)
    attached = _changes(workers, plan.change_rounds, plan.sharers, all_touch=False)
    touched = _changes(workers, plan.change_rounds, plan.sharers, all_touch=True)
    plain = _plain_changes(workers, plan.change_rounds)
    own = "that call in one process, which each has to make"
    measure = f"mmap() of 2 MiB, {plan.sharers} sharers"
    rows = [Row(measure, "us", attached["map"], few["map"], "with one sharer", 1.5)]
    for what, name in (("protect", "mprotect()"), ("unmap", "munmap()")):
        rows.append(Row(f"{name} of 2 MiB, one sharer", "us", few[what], plain[what], own))
        base = statistics.median(few[what])
        for many, who, limit in ((attached, "attached", 30.0), (touched, "touched it all", None)):
            further = [(time - base) / (plan.sharers - 1) for time in many[what]]
            measure = f"{name} of 2 MiB, each of {plan.sharers} that {who}"
            rows.append(Row(measure, "us", further, plain[what], own, limit=limit))
    return rows


_CHANGED: Final = 2 * MiB
_READ, _BOTH = 1, 3


def _changes(
    workers: Workers, rounds: int, sharers: int, *, all_touch: bool
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = defaultdict(list)
    with _created(workers, "ours") as (first, name), contextlib.ExitStack() as stack:
        others = [stack.enter_context(workers.start("ours")) for _ in range(sharers - 1)]
        for other in others:
            other.do("attach", name, START, GiB)
        first.do("unmap", START, GiB)
        for number in range(1 + rounds):
            sample = {"map": first.one("map", START, _CHANGED) / 1e3}
            first.do("write", START, _CHANGED)
            for other in others:
                other.do("write", START, _CHANGED if all_touch else 0)
            sample["protect"] = first.one("protect", START, _CHANGED, _READ) / 1e3
            first.do("protect", START, _CHANGED, _BOTH)
            sample["unmap"] = first.one("unmap", START, _CHANGED) / 1e3
            if number:  # the first round has the range made ready for protection
                for what, value in sample.items():
                    times[what].append(value)
    return times


def _plain_changes(workers: Workers, rounds: int) -> dict[str, list[float]]:
    """What a process does for itself with plain shared memory."""
    times: dict[str, list[float]] = defaultdict(list)
    with workers.start("peer") as worker:
        for _ in range(rounds):
            worker.do("map", START, _CHANGED)
            worker.do("write", START, _CHANGED)
            times["protect"].append(worker.one("protect", START, _CHANGED, _READ) / 1e3)
            worker.do("protect", START, _CHANGED, _BOTH)
            times["unmap"].append(worker.one("unmap", START, _CHANGED) / 1e3)
    return times


def mapped_files(workers: Workers, plan: Plan, directory: Path) -> Iterator[Row]:
    """Read all of a file that is mapped MAP_PRIVATE, from a warm page cache.

    In regions of either backing.  Beside them what the kernel itself takes to put the
    file's pages there: with small ones that is most of the time.
    """
    path = directory / "mapped"
    with path.open("wb") as file:
        for _ in range(plan.touch // MiB):
            file.write(os.urandom(MiB))
    yield from _mapped_file(workers, plan, path, "shm")
    try:
        # Those of before need not all be free again (see _created()).
        with huge_pages((plan.touch + SETTLED) // HUGE):
            yield from _mapped_file(workers, plan, path, "hugetlb")
    except NoHugePagesError as error:
        print(f"left out: {error}", file=sys.stderr)
    path.unlink()


def _mapped_file(workers: Workers, plan: Plan, path: Path, backing: str) -> Iterator[Row]:
    file = f"a mapped file of {plan.touch // MiB} MiB, {backing}"
    with workers.backed_by(backing):
        for prot, name in ((_BOTH, "PROT_READ|PROT_WRITE"), (_READ, "PROT_READ")):
            times = _read_file(workers, plan, path, prot)
            for what, measure, target in (
                ("first", "first reader", 2.0),
                ("second", "second sharer", 1.0 if prot == _BOTH else None),
            ):
                yield Row(f"{measure} of {file}, {name}", "ms", times[what]["ours"],
                          times[what]["peer"], MAPPED, target)  # fmt: skip
            if prot == _BOTH:
                copied = [_copy_file(path, backing) for _ in range(1 + plan.mapped_rounds)][1:]
                yield Row(f"UFFDIO_COPY alone of {file}", "ms", copied, times["first"]["peer"],
                          MAPPED)  # fmt: skip


def _copy_file(path: Path, backing: str) -> float:
    """How long it takes to put a file's pages in memory that nobody has mapped yet (ms)."""
    size = path.stat().st_size
    flags = os.MFD_HUGETLB if backing == "hugetlb" else 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb", buffering=0))
        memory = os.memfd_create("benchmark", os.MFD_CLOEXEC | flags)
        stack.callback(os.close, memory)
        os.ftruncate(memory, size)
        fd = uffd.open_own()
        stack.callback(os.close, fd)
        uffd.handshake(fd, uffd.Feature(0))
        both, shared = syscalls.PROT_READ | syscalls.PROT_WRITE, syscalls.MAP_SHARED
        start = syscalls.mmap(None, size, both, shared | syscalls.MAP_NORESERVE, memory, 0)
        stack.callback(syscalls.munmap, start, size)
        uffd.register(fd, start, size, uffd.Mode.MISSING)
        buffer = Buffer(BUFFER)
        since = time.monotonic()
        for at in range(0, size, BUFFER):
            file.readinto(buffer.view)
            done = 0
            while done < BUFFER:
                more, outcome = uffd.copy(fd, start + at + done, buffer.address + done,
                                          BUFFER - done, protect=False)  # fmt: skip
                done += more
                if more == 0 and outcome is not uffd.Outcome.RETRY:
                    raise WorkerError(f"UFFDIO_COPY failed: {outcome}")
        return (time.monotonic() - since) * 1e3


def _read_file(
    workers: Workers, plan: Plan, path: Path, prot: int
) -> dict[str, dict[Side, list[float]]]:
    times: dict[str, dict[Side, list[float]]] = defaultdict(lambda: {"ours": [], "peer": []})
    mapped = ("mapfile", START, plan.touch, prot, path)
    for number, side in enumerate(_sides(1 + plan.mapped_rounds)):
        sample = {}
        with contextlib.ExitStack() as stack:
            if side == "ours":
                first, name = stack.enter_context(_created(workers, side))
                second = stack.enter_context(workers.start(side))
                second.do("attach", name, START, GiB)
                first.do(*mapped)
            else:
                first, second = (stack.enter_context(workers.start(side)) for _ in range(2))
                for worker in (first, second):
                    worker.do(*mapped)
            sample["first"] = first.one("sum", START, plan.touch) / 1e6
            sample["second"] = second.one("sum", START, plan.touch) / 1e6
        if number >= 2:
            for what, value in sample.items():
                times[what][side].append(value)
    return times


def collapsing(workers: Workers, plan: Plan) -> list[Row]:
    """What a sharer has when the daemon has made huge pages of what several share."""
    size = plan.collapsed
    times: dict[str, dict[Side, list[float]]] = defaultdict(lambda: {"ours": [], "peer": []})
    for side in _sides(plan.collapse_rounds):
        with _created(workers, side) as (first, name), contextlib.ExitStack() as stack:
            second, third = (stack.enter_context(workers.start(side)) for _ in range(2))
            before = second.page_tables()
            second.do("attach", name, START, GiB)
            collapsed = _collapsed(workers)
            for worker in (first, second):
                worker.do("write", START, size)
            if side == "ours":
                _wait_until_collapsed(workers, collapsed + size // _CHANGED)
            third.do("attach", name, START, GiB)
            times["touch"][side].append(third.one("write", START, size) / 1e6)
            second.do("write", START, size)
            times["tables"][side].append((second.page_tables() - before) / KiB)
    what = f"{size // MiB} MiB, collapsed"
    return [
        Row(f"{measure} {what}", unit, times[of]["ours"], times[of]["peer"], SHM, target)
        for of, measure, unit, target in (
            ("touch", "a further sharer's touch (write) of", "ms", 1.0),
            ("tables", "page tables (VmPTE) of a sharer of", "kB", None),
        )
    ]


def _collapsed(workers: Workers) -> int:
    """How many chunks the daemon has collapsed so far."""
    for line in (workers.directory("ours") / ".metrics").read_text().splitlines():
        key, _, value = line.rpartition(" ")
        if key == "msharefs_collapsed_chunks_total":
            return int(float(value))
    return 0


def _wait_until_collapsed(workers: Workers, chunks: int) -> None:
    deadline = time.monotonic() + COLLAPSE_SECONDS
    while _collapsed(workers) < chunks:
        if time.monotonic() > deadline:
            raise WorkerError("the daemon did not collapse the region: see its log")
        time.sleep(0.1)
