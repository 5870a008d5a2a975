"""What it takes to attach, fork, create and fault: a table, and JSON in benchmarks/results.

    .venv/bin/python benchmarks/paths.py
    .venv/bin/python benchmarks/paths.py --against /other/checkout/.venv

As root.  Each measure runs in many short rounds: ours, SharedMemory, and ours of another
version if there is one, in turns; the numbers are medians.  So what else the machine does
falls on all of them, and the ratios tell more than the times.  It does not fall on all
alike: who waits for nobody waits for no processor either.  So beside the ratio of the
medians is that of the fastest tenths.

What a page costs is also measured of plain shared memory whose page faults go to the least
server there can be (least.c), a page or 64 KiB at a time: no daemon and no policy has them for
less.  And so is what attaching and creating cost: of the least daemon (least_daemon.py) whose
names are files and whose sharers show them, asked by a program in C (least_client.c).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

# Behind what is installed: libmshare and msharefsd are the wheel's, not the source's.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import results, service
from benchmarks.options import Options
from benchmarks.plot import PEER
from benchmarks.table import Table
from benchmarks.worker import compile_program
from msharefsd.linux import mounts
from msharefsd.mount import mounting

WORKER: Final = Path(__file__).with_name("paths_worker.py")
LEAST_SCRIPT: Final = Path(__file__).with_name("least_daemon.py")
ALIGNMENT: Final = 2 << 20
MiB: Final = 1 << 20
USERS: Final = (64101, 64102)
"""Who are no users of any machine."""
BEFORE: Final = "before"
LEAST: Final = {"least, 4 KiB": 4 << 10, "least, 64 KiB": 64 << 10}
"""What the least server populates for a fault, in bytes."""
LEAST_DAEMON: Final = {"least": 0.0, "least, names cached": 3600.0}
"""How long the kernel believes what the least daemon has told it of a name, in seconds: not at
all, as names of regions come and go by messages that the kernel does not see; or for ever."""
CALLS: Final = ("attach", "create, unlink, close")
"""What that is measured of."""
NAME: Final = f"paths-{os.getpid()}"
"""Of memory; SharedMemory's names are everybody's."""
END_SECONDS: Final = 10.0
WATCHDOG_SECONDS: Final = 1800.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    rounds: int
    count: int
    """Of what is timed in a round."""
    touched: int
    """Bytes."""


FULL: Final = Plan(rounds=40, count=20, touched=64 * MiB)
QUICK: Final = Plan(rounds=10, count=10, touched=32 * MiB)
SMOKE: Final = Plan(rounds=2, count=2, touched=4 * MiB)


class Process:
    """A worker; see paths_worker.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, *words: object) -> None:
        """Give a command."""
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)

    def answer(self) -> list[int]:
        """What came of the last one, in nanoseconds."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise service.ServiceError(f"a worker ended ({self._process.wait()})")
        found: list[int] = json.loads(line)
        return found

    def do(self, *words: object) -> list[int]:
        """Both."""
        self.ask(*words)
        return self.answer()


@dataclass
class Side:
    """One of those that are compared."""

    name: str
    command: Sequence[str | Path]
    """Its worker."""
    stack: contextlib.ExitStack
    mountpoint: Path | None = None
    """Of msharefs."""

    def start(self, uid: int = 0) -> Process:
        """A worker of a user's, which lives as long as the side does."""
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        environment.pop("MSHARE_ROOT", None)
        if self.mountpoint is not None:
            environment["MSHARE_ROOT"] = str(self.mountpoint)
        process = subprocess.Popen(
            [*self.command, *([f"--uid={uid}"] if uid else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd="/",
        )
        self.stack.callback(_end, process)
        return Process(process)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


@dataclass(slots=True)
class Row:
    """One measure; samples in microseconds."""

    measure: str
    most_of_peer: float | None = None
    """How many times the peer's it may take."""
    most_of_before: float | None = None
    """How many times it may take what it took before."""
    samples: dict[str, list[float]] = field(default_factory=dict)

    def median(self, side: str) -> float:
        """What stands for a side."""
        return statistics.median(self.samples[side])

    def fastest(self, side: str) -> float:
        """What the fastest tenth takes at most: those that did not wait for a processor."""
        return statistics.quantiles(self.samples[side], n=10)[0]

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "measure": self.measure,
            "unit": "us",
            "medians": {side: self.median(side) for side in self.samples},
            "fastest_tenths": {side: self.fastest(side) for side in self.samples},
            "counts": {side: len(samples) for side, samples in self.samples.items()},
            "most_of_peer": self.most_of_peer,
            "most_of_before": self.most_of_before,
        }


def tables(document: results.Document) -> list[Table]:
    """What is printed of it; ratios of the fastest tenths are in parentheses."""
    head = ["measure", "ours us"]
    sides = [(PEER, "most_of_peer"), (BEFORE, "most_of_before")]
    # There may be no other version of ours.
    sides = [side for side in sides if any(side[0] in row["medians"] for row in document["rows"])]
    for side, _ in sides:
        head += [side, "ratio", "(fastest)", "target"]
    rows = []
    for row in document["rows"]:
        medians, fastest = row["medians"], row["fastest_tenths"]
        cells = [row["measure"], f"{medians['ours']:,.1f}"]
        for side, target in sides:
            if side not in medians:
                cells += [""] * 4
                continue
            ratio, most = medians["ours"] / medians[side], row[target]
            verdict = "met" if most is None or ratio <= most else "MISSED"
            cells += [
                f"{medians[side]:,.1f}",
                f"{ratio:.2f}",
                f"({fastest['ours'] / fastest[side]:.2f})",
                "" if most is None else f"<= {most:g} {verdict}",
            ]
        rows.append(cells)
    caption = f"What a process waits for. {results.conditions(document)}"
    return [
        Table(caption, head, rows, words={0, 5, 9}),
        _calls_table(document),
        _faults_table(document),
    ]


def _calls_table(document: results.Document) -> Table:
    """What a call costs that a daemon has to be asked for."""
    caption = (
        "What attaching and creating cost.  Least is a daemon of pyfuse3 and trio in one process,\n"
        "which does nothing else, and a program in C (benchmarks/least_daemon.py, least_client.c)."
    )
    return _beside_peer(document, caption, CALLS, ["ours", *LEAST_DAEMON])


def _faults_table(document: results.Document) -> Table:
    """What a page costs by each way of having it."""
    caption = (
        f"What a first touch costs. {PEER} has the kernel's own page faults; least is shared\n"
        "memory whose page faults another process answers with so much memory, doing nothing else\n"
        "(benchmarks/least.c)."
    )
    measures = [row["measure"] for row in document["rows"] if LEAST.keys() <= row["medians"].keys()]
    return _beside_peer(document, caption, measures, ["ours", *LEAST])


def _beside_peer(
    document: results.Document, caption: str, measures: Collection[str], sides: Sequence[str]
) -> Table:
    """The medians of those sides, and how many times the peer's they are."""
    head = ["measure", f"{PEER} us"]
    for side in sides:
        head += [f"{side} us", "ratio"]
    rows = []
    for row in document["rows"]:
        if row["measure"] not in measures:
            continue
        medians = row["medians"]
        cells = [row["measure"], f"{medians[PEER]:,.1f}"]
        for side in sides:
            took = medians.get(side)
            cells += ["-", "-"] if took is None else [f"{took:,.1f}", f"{took / medians[PEER]:.1f}"]
        rows.append(cells)
    return Table(caption, head, rows, words={0})


class Bench:
    """The sides, and what is measured of them."""

    def __init__(self, sides: list[Side], plan: Plan) -> None:
        self._sides = [side for side in sides if side.name not in {*LEAST, *LEAST_DAEMON}]
        self._servers = [side for side in sides if side.name in LEAST]
        self._daemons = [side for side in sides if side.name in LEAST_DAEMON]
        self._ours = [side for side in self._sides if side.name != PEER]
        self._plan = plan

    def _in_turns(
        self, row: Row, sides: list[Side], do: Callable[[Side, int], list[int]], per: float = 1e3
    ) -> Row:
        for number in range(1 + self._plan.rounds):
            for side in sides if number % 2 else reversed(sides):
                times = [each / per for each in do(side, number)]
                if number:  # the first round imports, starts, fills caches
                    row.samples.setdefault(side.name, []).extend(times)
        return row

    def rows(self) -> Iterator[Row]:
        """Everything."""
        count = self._plan.count
        workers = {side.name: side.start() for side in self._sides}
        makers = {side.name: side.start() for side in self._sides}
        for maker in makers.values():
            maker.do("make", NAME, 64 * MiB, "666")
        workers |= {side.name: side.start() for side in self._daemons}
        for side in self._daemons:
            workers[side.name].do("make", NAME, 64 * MiB)
        attaching, creating = CALLS
        yield self._in_turns(
            Row(attaching, 20.0, 1.2),
            self._sides + self._daemons,
            lambda side, _: workers[side.name].do("attach", NAME, count),
        )
        yield self._in_turns(
            Row(creating, 40.0, None),
            self._sides + self._daemons,
            lambda side, _: workers[side.name].do("create", MiB, count),
        )
        for side in self._sides:
            workers[side.name].do("hold", NAME)
        yield self._in_turns(
            Row("fork with one attached, and exit", None, 1.0),
            self._sides,
            lambda side, _: workers[side.name].do("fork", count),
        )
        for side in self._sides:
            workers[side.name].do("drop", NAME)
        workers |= {side.name: side.start() for side in self._servers}
        yield self._in_turns(
            Row("first touch at a random place", 8.0, 1.0),
            self._sides + self._servers,
            lambda side, number: self._faults(workers[side.name], workers[side.name], number),
        )
        yield self._in_turns(
            Row("first touch of all in random order, a page", None, 1.0),
            self._sides + self._servers,
            lambda side, number: self._shuffled(workers[side.name], number),
            per=1e3 * self._plan.touched / 4096,
        )
        strangers = {side.name: side.start(USERS[0]) for side in self._ours}
        yield self._in_turns(
            Row("the same, of another user's region", None, 1.0),
            self._ours,
            lambda side, number: self._faults(makers[side.name], strangers[side.name], number),
        )
        yield self._in_turns(
            Row("attach another user's region", None, 1.2),
            self._ours,
            lambda side, _: strangers[side.name].do("attach", NAME, count),
        )
        pairs = {side.name: [side.start(uid) for uid in USERS] for side in self._ours}
        yield self._in_turns(
            Row("two users touch all at once, a page", None, 1 / 1.6),
            self._ours,
            lambda side, number: self._storm(pairs[side.name], number),
            per=1e3 * self._plan.touched / 4096,
        )

    def _faults(self, maker: Process, toucher: Process, number: int) -> list[int]:
        name, size = f"{NAME}-faults-{number}", 64 * MiB
        maker.do("make", name, size, "666")
        if toucher is not maker:
            toucher.do("hold", name)
        times = toucher.do("faults", name, size, min(self._plan.count * 10, 500), number)
        if toucher is not maker:
            toucher.do("drop", name)
        maker.do("remove", name)
        return times

    def _shuffled(self, worker: Process, number: int) -> list[int]:
        name, size = f"{NAME}-shuffled-{number}", self._plan.touched
        worker.do("make", name, size, "600")
        times = worker.do("shuffle", name, size, number)
        worker.do("remove", name)
        return times

    def _storm(self, pair: list[Process], number: int) -> list[int]:
        name, size = f"{NAME}-storm-{number}", self._plan.touched
        for which, process in enumerate(pair):
            process.do("make", f"{name}-{which}", size, "600")
        since = time.perf_counter_ns()
        for which, process in enumerate(pair):
            process.ask("touch", f"{name}-{which}", size)
        for process in pair:
            process.answer()
        taken = time.perf_counter_ns() - since
        for which, process in enumerate(pair):
            process.do("remove", f"{name}-{which}")
        return [taken // len(pair)]


@contextlib.contextmanager
def _least_daemon(python: str, directory: Path, lifetime: float) -> Iterator[tuple[Path, Path]]:
    """Where it is mounted, and its socket."""
    directory.mkdir()
    mountpoint, socket = directory / "mshare", directory / "socket"
    mountpoint.mkdir()
    daemon = subprocess.Popen(
        [python, str(LEAST_SCRIPT), str(mountpoint), str(socket), str(lifetime)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        text=True,
    )
    try:
        assert daemon.stdout is not None
        if daemon.stdout.readline() != "ready\n":
            raise service.ServiceError("the least daemon did not start")
        yield mountpoint, socket
    finally:
        _end(daemon)
        mount = mounts.top_mount(str(mountpoint))
        if mount is not None:  # it had to be killed
            mounting.unmount(str(mountpoint))


@contextlib.contextmanager
def _sides(directory: Path, against: Path | None) -> Iterator[list[Side]]:
    with contextlib.ExitStack() as stack:
        own = Path(sys.executable).parent.parent
        sides = [Side(PEER, (sys.executable, WORKER, "--peer"), stack)]
        for name, environment in (("ours", own), (BEFORE, against)):
            if environment is None:
                continue
            place = directory / name
            place.mkdir()
            daemon = environment / "bin" / "msharefsd"
            usage = subprocess.run([daemon, "--help"], check=True, capture_output=True)
            words = ("--userfaultfd=all",) if b"--userfaultfd" in usage.stdout else ()
            running = stack.enter_context(
                service.running(place, ALIGNMENT, *words, daemon=str(daemon))
            )
            workers = stack.enter_context(contextlib.ExitStack())
            python = environment / "bin" / "python"
            sides.append(Side(name, (python, WORKER), workers, running.mountpoint))
        least = compile_program("least.c", directory / "least")
        for name, chunk in LEAST.items():
            worker = (sys.executable, WORKER, f"--least={least}", f"--chunk={chunk}")
            sides.append(Side(name, worker, stack))
        client = compile_program("least_client.c", directory / "least_client")
        for number, (name, lifetime) in enumerate(LEAST_DAEMON.items()):
            place = directory / f"least-{number}"
            where = stack.enter_context(_least_daemon(sys.executable, place, lifetime))
            workers = stack.enter_context(contextlib.ExitStack())
            sides.append(Side(name, (client, *where), workers))
        timer = threading.Timer(WATCHDOG_SECONDS, lambda: os.kill(os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
        stack.callback(timer.cancel)
        yield sides


def main() -> None:
    """Run, print, write."""
    options = Options(__doc__, (FULL, QUICK, SMOKE), "fewer rounds")
    options.parser.add_argument(
        "--against", type=Path, metavar="VENV", help="the virtual environment of another version"
    )
    arguments, plan = options.parse()
    directory = Path(tempfile.mkdtemp(prefix="mshare-paths-"))
    directory.chmod(0o755)
    rows = []
    try:
        with results.Run("paths") as run, _sides(directory, arguments.against) as sides:
            for row in Bench(sides, plan).rows():
                rows.append(row)
                print(f"{row.measure}: {row.median('ours'):,.1f} us", file=sys.stderr, flush=True)
    except service.ServiceError as error:
        sys.exit(f"paths: {error}")
    finally:
        # Never through a mount that could not be taken down.
        if not any(os.path.ismount(path / "mshare") for path in directory.iterdir()):
            shutil.rmtree(directory)
    document = run.document(plan=asdict(plan), rows=[row.as_json() for row in rows])
    print(*tables(document), run.write(document, arguments.results), sep="\n\n")


if __name__ == "__main__":
    main()
