"""The story of the letter: page tables of many processes that share memory.

    make bench
    .venv/bin/python benchmarks/story.py --quick
    .venv/bin/python benchmarks/story.py --quick --processes 10 20 50

More and more processes touch all of the same memory, of each kind in turn; after each
batch the growth of PageTables (/proc/meminfo) is read.  Then the crash: in a memory
cgroup, to which page tables are charged, processes touch it until the OOM killer comes.
Prints two tables, writes JSON.  Huge pages and cgroups take root; without, what needs them
is left out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

# Behind what is installed: libmshare and msharefsd are the wheel's, not the source's.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import results, service
from benchmarks.crowd import Crowd, CrowdError, compile_crowd, crowd, end, kib
from benchmarks.huge_pages import HUGE, NoHugePagesError, huge_pages
from benchmarks.memory_group import NoMemoryGroupError, memory_group
from benchmarks.options import Options
from benchmarks.table import Table
from benchmarks.worker import WorkerError
from msharefsd.linux import syscalls

MiB: Final = 1 << 20
GiB: Final = 1 << 30
ROOM: Final = 2 * GiB
"""Of memory, for everybody else."""
LONGEST: Final = 1800
"""Seconds until a run that hangs is ended."""
COLLAPSE_SECONDS: Final = 240.0
LEAST_LIMIT: Final = 64 * MiB
"""What a crowd itself takes is less."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure; sizes in bytes."""

    size: int
    """Of the shared memory: a power of two; at 1 GiB page tables begin to be shared."""
    counts: tuple[int, ...]
    """Of processes."""
    crash_processes: int

    @property
    def crash_limit(self) -> int:
        """Half of what plain page tables of 4 KiB pages take."""
        return max(LEAST_LIMIT, self.crash_processes * self.size // 512 // 2)


FULL: Final = Plan(2 * GiB, (50, 100, 200, 500, 1000, 1500), 200)
QUICK: Final = Plan(GiB, (20, 50, 100), 100)
SMOKE: Final = Plan(64 * MiB, (2, 4), 4)
"""Enough to see that everything runs."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of shared memory."""

    name: str
    backend: str
    daemon: tuple[str, ...] | None = None
    """Arguments of the daemon, if it takes one."""
    huge: bool = False
    """Of huge pages that are reserved."""
    tmpfs: bool = False
    """A file of a tmpfs that makes huge pages by itself."""
    collapse: bool = False
    most: int = sys.maxsize
    """Not more processes than that."""


PLAIN: Final = Kind("plain shared memory, 4 KiB pages", "shm")
# As plain shared memory, which takes a minute to be measured in full.
SMALL: Final = Kind("region, 4 KiB pages, --no-collapse", "mshare", ("--no-collapse",), most=200)
COLLAPSED: Final = Kind("region, 4 KiB pages, collapsed", "mshare", (), collapse=True)
HUGETLB: Final = Kind("region, hugetlb", "mshare", ("--backing=hugetlb",), huge=True)
PLAIN_HUGETLB: Final = Kind("plain hugetlbfs file", "hugetlb", huge=True)
PLAIN_HUGE: Final = Kind("plain tmpfs file, huge=always", "hugetlb", tmpfs=True)
KINDS: Final = (PLAIN, SMALL, COLLAPSED, HUGETLB, PLAIN_HUGETLB, PLAIN_HUGE)
CRASHING: Final = (PLAIN, COLLAPSED, HUGETLB)
IDLE: Final = "processes that share nothing"


@dataclass(frozen=True, slots=True)
class Point:
    """So many processes of a kind that have touched all."""

    kind: str
    processes: int
    tables: int
    """What PageTables grew by since there was none of them (bytes)."""
    faults: float
    """Minor faults of a process that touched all, median of those that came last."""
    milliseconds: float
    """And the time that it took."""


@dataclass(frozen=True, slots=True)
class Crash:
    """What a memory limit did to the processes of a kind."""

    kind: str
    processes: int
    killed: int
    limit: int
    peak: int | None


class Stage:
    """Where the kinds are measured."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        """`directory` is for our own files."""
        self._directory = directory
        self._plan = plan
        self._programs: dict[str, Path] = {}

    @contextlib.contextmanager
    def memory(self, kind: Kind) -> Iterator[tuple[Callable[[], Crowd], Path | None]]:
        """Memory of that kind, all of it there, by a process that is in no cgroup.

        Gives what starts a crowd for it, and the daemon's mount.
        """
        with self.empty(kind) as (first, start, mount):
            first.do("fill")
            yield start, mount

    @contextlib.contextmanager
    def empty(self, kind: Kind) -> Iterator[tuple[Crowd, Callable[[], Crowd], Path | None]]:
        """Memory of that kind, of which nothing is there.

        Gives whose it is, what starts another crowd for it, and the daemon's mount.
        """
        directory = Path(tempfile.mkdtemp(dir=self._directory))
        name = f"benchmark-{os.getpid()}"
        environment: dict[str, str] = {}
        mount = None
        with contextlib.ExitStack() as stack:
            if kind.huge:
                stack.enter_context(huge_pages(self._plan.size // HUGE))
            if kind.daemon is not None:
                running = service.running(directory, self._plan.size, *kind.daemon)
                mount = stack.enter_context(running).mountpoint
                environment["MSHARE_ROOT"] = str(mount)
            elif kind.huge:
                mounting = _mounted(directory / "huge", "hugetlbfs", "pagesize=2M,mode=0700")
                name = str(stack.enter_context(mounting) / name)
            elif kind.tmpfs:
                mounting = _mounted(directory / "huge", "tmpfs", "huge=always,mode=0700")
                name = str(stack.enter_context(mounting) / name)
            else:
                stack.callback(_unlink, f"/dev/shm/{name}")
            program = self._program(kind.backend)

            def start() -> Crowd:
                return stack.enter_context(crowd(program, name, self._plan.size, environment))

            first = start()
            first.do("create")
            yield first, start, mount

    def _program(self, backend: str) -> Path:
        if backend not in self._programs:
            self._programs[backend] = compile_crowd(backend, self._directory)
        return self._programs[backend]


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def _mounted(directory: Path, kind: str, options: str) -> Iterator[Path]:
    directory.mkdir()
    syscalls.mount("benchmark", str(directory), kind, 0, options)
    try:
        yield directory
    finally:
        syscalls.umount(str(directory), syscalls.MNT_DETACH)


def growth(stage: Stage, kind: Kind, plan: Plan) -> Iterator[Point]:
    """Batch after batch of processes that touch all."""
    with stage.memory(kind) as (start, mount):
        many = start()
        base = many.tables()
        there = 0
        for count in (count for count in plan.counts if count <= kind.most):
            if _available() < ROOM + (count - there) * plan.size // 512 and not kind.huge:
                _say(f"  no memory for the page tables of {count} processes: left out")
                return
            many.add(count - there)
            touched = many.touch(there, count - there, "read")
            if kind.collapse and mount is not None and there == 0:
                wait_until_collapsed(mount, plan.size // HUGE)
                # Their page tables are gone: have them map it anew.
                touched = many.touch(there, count - there, "read")
            there = count
            alive = [touch for touch in touched if touch is not None]
            if len(alive) < len(touched):
                raise CrowdError("processes were killed: is there memory enough?")
            yield Point(
                kind.name,
                count,
                many.tables() - base,
                statistics.median(touch.faults for touch in alive),
                statistics.median(touch.nanoseconds for touch in alive) / 1e6,
            )


def idle(stage: Stage, plan: Plan) -> Iterator[Point]:
    """What processes of the same program cost that share nothing."""
    with stage.memory(SMALL) as (start, _):
        many = start()
        base = many.tables()
        there = 0
        for count in plan.counts:
            many.do("idle", count - there)
            there = count
            yield Point(IDLE, count, many.tables() - base, 0, 0)


def crash(stage: Stage, kind: Kind, plan: Plan) -> Crash:
    """Processes under a limit; the memory itself, and the daemon, are outside of it."""
    with stage.memory(kind) as (start, mount), contextlib.ExitStack() as stack:
        if kind.collapse and mount is not None:
            # Collapsing takes two sharers.
            start().add(1)
            wait_until_collapsed(mount, plan.size // HUGE)
        group = stack.enter_context(memory_group(plan.crash_limit))
        many = start()
        group.add(many.process.pid)
        try:
            many.add(plan.crash_processes)
            many.touch(0, plan.crash_processes, "read")
            # Who was killed later than it touched is told now.
            alive = many.touch(0, plan.crash_processes, "none")
        finally:
            end(many.process)
        killed = sum(touch is None for touch in alive)
        return Crash(kind.name, plan.crash_processes, killed, plan.crash_limit, group.peak())


def wait_until_collapsed(mount: Path, chunks: int) -> None:
    """Until so many chunks of the only region are huge pages; says what it is if they do not."""
    deadline = time.monotonic() + COLLAPSE_SECONDS
    while (found := _collapsed(mount)) < chunks:
        if time.monotonic() > deadline:
            _say(f"  {found} of {chunks} chunks were collapsed")
            return
        time.sleep(0.02)


def _collapsed(mount: Path) -> int:
    (region,) = (mount / ".regions").iterdir()
    for line in (region / "pagetables").read_text().splitlines():
        if line.startswith("collapsed: "):
            return int(line.split()[1])
    return 0


def _available() -> int:
    return kib(Path("/proc/meminfo").read_text(), "MemAvailable")


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


# -- what comes out --


def tables(document: results.Document) -> list[Table]:
    """What is printed of it: two tables, or one if there were no cgroups.

    Counts: the times are of kinds that were not measured in turns, and stay in the JSON.
    """
    points, plan = document["points"], document["plan"]
    caption = f"{plan['size'] / GiB:g} GiB, up to {plan['counts'][-1]:,} processes"
    if (plan["size"], plan["counts"][-1]) != (FULL.size, FULL.counts[-1]):
        caption += f" (in full: {FULL.size / GiB:g} GiB, {FULL.counts[-1]:,})"
    caption += f". {results.conditions(document)}"
    most = {point["kind"]: point["processes"] for point in points}
    caption += "".join(
        f"\n({kind}: up to {count} processes)"
        for kind, count in most.items()
        if count < plan["counts"][-1]
    )
    growth = Table(
        caption,
        ("memory", "processes", "page tables", "each", "minor faults"),
        [
            (
                point["kind"],
                str(point["processes"]),
                f"{point['tables'] / MiB:,.1f} MiB",
                f"{point['tables'] / point['processes'] / 1024:,.0f} KiB",
                f"{point['faults']:,.0f}",
            )
            for point in points
        ],
    )
    if not document["crashes"]:
        return [growth]
    crashes = Table(
        "The same in a memory cgroup, with the memory itself outside",
        ("memory", "processes", "killed", "limit", "at most"),
        [
            (
                each["kind"],
                str(each["processes"]),
                str(each["killed"]),
                f"{each['limit'] / MiB:,.0f} MiB",
                "-" if each["peak"] is None else f"{each['peak'] / MiB:,.0f} MiB",
            )
            for each in document["crashes"]
        ],
    )
    return [growth, crashes]


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """For what a benchmark needs."""
    path = Path(tempfile.mkdtemp(prefix="mshare-bench-"))
    try:
        yield path
    finally:
        # Never through a mount that could not be taken down.
        if str(path) not in Path("/proc/self/mountinfo").read_text():
            shutil.rmtree(path)


def _measure(plan: Plan) -> tuple[list[Point], list[Crash]]:
    points: list[Point] = []
    crashes: list[Crash] = []
    with temporary_directory() as directory:
        stage = Stage(directory, plan)
        _say(f"{IDLE} ...")
        points += idle(stage, plan)
        for kind in KINDS:
            _say(f"{kind.name} ...")
            with contextlib.suppress(NoHugePagesError), _told(NoHugePagesError):
                points += growth(stage, kind, plan)
        for kind in CRASHING:
            _say(f"crash: {kind.name} ...")
            left_out = (NoHugePagesError, NoMemoryGroupError)
            with contextlib.suppress(*left_out), _told(*left_out):
                crashes.append(crash(stage, kind, plan))
    return points, crashes


@contextlib.contextmanager
def _told(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        _say(f"  left out: {error}")
        raise


def main() -> None:
    """Run, print, write."""
    options = Options(__doc__, (FULL, QUICK, SMOKE), "less memory, fewer processes")
    options.parser.add_argument(
        "--processes", type=int, nargs="+", help="so many, one after the other"
    )
    arguments, plan = options.parse(LONGEST)
    if arguments.processes is not None:
        counts = tuple(sorted(arguments.processes))
        plan = replace(plan, counts=counts, crash_processes=min(counts[-1], plan.crash_processes))
    try:
        with results.Run("story") as run:
            points, crashes = _measure(plan)
    except (service.ServiceError, WorkerError, subprocess.CalledProcessError) as error:
        sys.exit(f"story: {error}")
    document = run.document(
        plan=asdict(plan),
        points=[asdict(point) for point in points],
        crashes=[asdict(each) for each in crashes],
    )
    print(*tables(document), run.write(document, arguments.results), sep="\n\n")


if __name__ == "__main__":
    main()
