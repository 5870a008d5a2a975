"""PostgreSQL, unmodified: its page tables, throughput and connection time, each way.

Each round starts a server in each mode, in another order, with the same data: all of
`pgbench_accounts` is in the shared buffers, and then CONNECTIONS read in each 2 MiB of it and
stay open.  PageTables are the machine's, less VmPTE of everybody else.

    plain       as it is, huge_pages=off
    floor       the same with 16 MB of shared buffers: what there is to be had back
    huge_pages  PostgreSQL's own huge_pages=on, of a pool that is set aside
    within_size the kernel's shmem_enabled=within_size, no tool at all
    always      the same with `always`: what huge=always is for a tmpfs
    watched     `mshare run`: aligned, and watched from the start, until that has it all
    collapsed   aligned, and `mshare collapse` with all connections open

Stalls are transactions that take more than 100 ms: a minute, before it is collapsed and
meanwhile.  With --crashes a backend is killed under load, and the whole server, and what it
has is checked.

    make bench-postgres BENCH="--quick"
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

# The project's own directory, for `benchmarks`; what is installed comes first.
sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.crowd import kib
from benchmarks.huge_pages import HUGE, NoHugePagesError, huge_pages
from benchmarks.options import Options
from benchmarks.postgres import NoPostgresError, Postgres
from msharetables import proc, survey

MSHARE: Final = str(Path(sys.executable).with_name("mshare"))
SETTING: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
MODES: Final = (
    "plain", "floor", "huge_pages", "within_size", "always", "watched", "collapsed",
)  # fmt: skip
CLIENTS: Final = 20
STALL_MILLISECONDS: Final = 100
SLICE_SECONDS: Final = 2
"""How long the load runs at a time while it is collapsed."""
SETTLE_SECONDS: Final = 60.0
STEADY_SECONDS: Final = 3.0
"""More than the watcher takes from one look to the next."""
MiB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """How much."""

    shared_buffers: int
    """In MiB."""
    scale: int
    connections: int
    rounds: int
    seconds: int
    before: int
    """For how long the load goes on before it is collapsed (seconds): a machine that is shared has
    stalls of its own, in some minutes."""


FULL: Final = Plan(2048, 130, 100, 5, 6, 90)
QUICK: Final = Plan(512, 30, 100, 1, 3, 3)
SMOKE: Final = Plan(128, 2, 3, 1, 1, 1)


@dataclass(slots=True)
class Samples:
    """What was measured in one mode."""

    tables: list[int] = field(default_factory=list)
    """PageTables (bytes)."""
    backend: list[int] = field(default_factory=list)
    """VmPTE of a connection's process, the median (bytes)."""
    explained: list[float] = field(default_factory=list)
    """What part of all VmPTE `mshare ptes` explains."""
    tps: list[float] = field(default_factory=list)
    connecting: list[float] = field(default_factory=list)
    """Milliseconds."""
    during: list[float] = field(default_factory=list)
    """Throughput while it is collapsed, over that before."""
    stalls_before: list[float] = field(default_factory=list)
    stalls_during: list[float] = field(default_factory=list)
    """Transactions that took longer than STALL_MILLISECONDS, in a minute."""
    seconds: list[float] = field(default_factory=list)
    """What collapsing took."""


class Bench:
    """One server, in several modes."""

    def __init__(self, server: Postgres, plan: Plan) -> None:
        self.server = server
        self.plan = plan
        self.samples: dict[str, Samples] = {}

    @contextlib.contextmanager
    def running(self, mode: str) -> Iterator[None]:
        """The server in a mode, its table in the shared buffers.  Raises NoHugePagesError."""
        size = 16 if mode == "floor" else self.plan.shared_buffers
        settings = {
            "shared_buffers": f"{size}MB",
            "max_connections": str(self.plan.connections + 4 * CLIENTS),
        }
        wrapper = {
            "watched": [MSHARE, "run", "--min-size=16M", "--"],
            "collapsed": [MSHARE, "run", "--min-size=16M", "--no-watch", "--"],
        }.get(mode, [])
        with contextlib.ExitStack() as stack:
            if mode == "huge_pages":
                settings["huge_pages"] = "on"
                # Its own tables and locks are in the same memory.
                stack.enter_context(huge_pages((size * MiB * 9 // 8) // HUGE + 64))
            if mode in ("within_size", "always"):
                stack.enter_context(_shmem_enabled(mode))
            self.server.start(settings, wrapper)
            stack.callback(self.server.stop)
            self.server.prewarm()
            yield

    def round(self, mode: str) -> None:
        """Measure one mode once."""
        found = self.samples.setdefault(mode, Samples())
        with self.running(mode):
            if mode == "watched":
                found.seconds.append(_until_all_is_huge())
            if mode == "collapsed":
                with self.server.sessions(self.plan.connections):
                    self._collapse(found)
                    self._tables(found)
            elif mode != "floor":
                self._speed(found)
                with self.server.sessions(self.plan.connections):
                    self._tables(found)
                return
            else:
                with self.server.sessions(self.plan.connections):
                    self._tables(found)
                return
            self._speed(found)

    def _speed(self, found: Samples) -> None:
        seconds = f"--time={self.plan.seconds}"
        found.tps.append(_tps(self.server.pgbench(*self._load(seconds))))
        said = self.server.pgbench("--select-only", "--connect", "--no-vacuum", seconds)
        match = re.search(r"average connection time = ([\d.]+) ms", said)
        if match is not None:
            found.connecting.append(float(match[1]))

    def _load(self, *more: str) -> list[str]:
        return ["--select-only", f"--client={CLIENTS}", "--jobs=2", "--no-vacuum", *more]

    def _tables(self, found: Samples) -> None:
        """With all connections open."""
        _settle()
        tree = proc.with_children([self.server.pid])
        taken = survey.take(tree)
        found.tables.append(_page_tables(tree))
        backends = [each.status.tables for each in taken.processes[-self.plan.connections :]]
        found.backend.append(int(statistics.median(backends)))
        actual = sum(each.status.tables for each in taken.processes)
        wrong = sum(abs(each.other) for each in taken.processes)
        found.explained.append(1 - wrong / actual)

    def _collapse(self, found: Samples) -> None:
        """Under load, beside the connections that are open."""
        command = [MSHARE, "collapse", "--min-size=16M", "--pid", str(self.server.pid)]
        slice_of_load = self._load(
            f"--latency-limit={STALL_MILLISECONDS}", f"--time={SLICE_SECONDS}"
        )

        def load() -> str:
            return self.server.pgbench(*slice_of_load)

        before = [load() for _ in range(0, self.plan.before, SLICE_SECONDS)]
        meanwhile = []
        began = time.monotonic()
        with subprocess.Popen(command, stdout=sys.stderr) as process:
            # As long as it takes, which nobody knows before.
            while process.poll() is None:
                meanwhile.append(load())
            found.seconds.append(time.monotonic() - began)
        if rate := statistics.mean(map(_tps, before)):
            found.during.append(statistics.mean(map(_tps, meanwhile)) / rate)
        found.stalls_before.append(_stalls(before))
        found.stalls_during.append(_stalls(meanwhile))

    def crashes(self) -> Iterator[str]:
        """What happens when things die; raises RuntimeError if anything is lost."""
        for mode in ("plain", "watched"):
            with self.running(mode):
                load = subprocess.Popen(
                    [*self.server.command("pgbench"), "--client=8", "--time=5", "--no-vacuum"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                time.sleep(2)
                os.kill(self.server.processes()[-1], signal.SIGKILL)
                load.wait()
                self.server.wait_until_ready()
                self.server.check()
                yield f"{mode}: a backend killed under load: consistent"
                self.server.stop(signal.SIGQUIT)
            with self.running(mode):
                self.server.check()
                yield f"{mode}: stopped at once, started: consistent"
                self.server.stop(signal.SIGKILL)
            with self.running(mode):
                self.server.check()
                yield f"{mode}: the postmaster killed, started: consistent"
            self.server.check_sums()
            yield f"{mode}: stopped: checksums are right"


def _until_all_is_huge() -> float:
    """Until no more huge pages come; for how many seconds they came."""
    began = last = time.monotonic()
    most = -1
    while time.monotonic() - last < STEADY_SECONDS and last - began < SETTLE_SECONDS:
        now = kib(Path("/proc/meminfo").read_text(), "ShmemHugePages")
        if now > most:
            most, last = now, time.monotonic()
        time.sleep(0.1)
    return last - began


def _settle() -> None:
    """Sum up what the processors count each for itself (proc_sys_vm(5))."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/stat_refresh").read_text()


def _page_tables(tree: set[int]) -> int:
    """PageTables of the machine, less those of everybody else (bytes)."""
    machine = proc.page_tables() or 0
    others = 0
    for pid in set(proc.pids()) - tree:
        with contextlib.suppress(OSError):
            status = proc.status(pid)
            others += status.tables if status else 0
    return machine - others


def _tps(said: str) -> float:
    return float(_figure(r"tps = ([\d.]+)", said))


def _stalls(slices: Sequence[str]) -> float:
    stalls = sum(int(_figure(r"above the .* latency limit: (\d+)", said)) for said in slices)
    return stalls * 60 / (len(slices) * SLICE_SECONDS)


def _figure(pattern: str, said: str) -> str:
    """Of pgbench's; 0 if the machine was so busy that there was not one transaction."""
    match = re.search(pattern, said)
    if match is None and "processed: 0\n" not in said:
        raise RuntimeError(f"pgbench: {said}")
    return match[1] if match else "0"


@contextlib.contextmanager
def _shmem_enabled(value: str) -> Iterator[None]:
    before = re.search(r"\[(\w+)\]", SETTING.read_text())
    SETTING.write_text(value)
    try:
        yield
    finally:
        if before is not None:
            SETTING.write_text(before[1])


# -- what comes out --


def render(samples: Mapping[str, Samples], plan: Plan) -> str:
    """A table of plain text: medians, and ratios to plain and to the floor."""
    titles = (
        "mode", "page tables", "of floor", "a backend", "explained", "tps", "of plain",
        "connecting", "of plain", "tps meanwhile", "stalls/min", "meanwhile", "collapsing",
    )  # fmt: skip
    plain, floor = samples.get("plain", Samples()), samples.get("floor", Samples())
    rows = [titles]
    for mode, each in samples.items():
        rows.append(
            (
                mode,
                _median(each.tables, "{:,.1f} MiB", MiB),
                _ratio(each.tables, floor.tables),
                _median(each.backend, "{:,.0f} KiB", 1024),
                _median(each.explained, "{:.2%}"),
                _median(each.tps, "{:,.0f}"),
                _ratio(each.tps, plain.tps),
                _median(each.connecting, "{:.2f} ms"),
                _ratio(each.connecting, plain.connecting),
                _median(each.during, "{:.2f}"),
                _median(each.stalls_before, "{:.1f}"),
                _median(each.stalls_during, "{:.1f}"),
                _median(each.seconds, "{:.1f} s"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return (
        f"{plan.connections} connections that have read in all of {plan.scale * 13} MB of "
        f"{plan.shared_buffers} MB of shared buffers; {plan.rounds} rounds, medians\n"
        + "\n".join(lines)
    )


def _median(values: list[int] | list[float], form: str, unit: int = 1) -> str:
    return form.format(statistics.median(values) / unit) if values else "-"


def _ratio(ours: list[int] | list[float], theirs: list[int] | list[float]) -> str:
    if not ours or not theirs or not statistics.median(theirs):
        return "-"
    return f"{statistics.median(ours) / statistics.median(theirs):.2f}"


def main() -> None:
    """Run, print, write."""
    options = Options(__doc__, (FULL, QUICK, SMOKE), "512 MB, one round")
    options.parser.add_argument("--rounds", type=int, help="instead of the plan's")
    options.parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    options.parser.add_argument("--crashes", action="store_true", help="kill things, and check")
    arguments, plan = options.parse()
    plan = replace(plan, rounds=arguments.rounds or plan.rounds)
    directory = Path(tempfile.mkdtemp(prefix="mshare-bench-"))
    directory.chmod(0o755)
    server: Postgres | None = None
    try:
        server = Postgres(directory / "postgres")
        server.start({"shared_buffers": "64MB"})
        server.load(plan.scale)
        server.stop()
        bench = Bench(server, plan)
        _run(bench, arguments.modes, plan.rounds)
        print(render(bench.samples, plan))
        if arguments.crashes:
            for line in bench.crashes():
                print(line, flush=True)
    except (NoPostgresError, RuntimeError) as error:
        sys.exit(f"bench-postgres: {error}")
    finally:
        if server is not None:
            server.remove()
        shutil.rmtree(directory, ignore_errors=True)
    arguments.results.mkdir(exist_ok=True)
    path = arguments.results / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-postgres.json"
    document = {
        "plan": asdict(plan),
        "samples": {mode: asdict(each) for mode, each in bench.samples.items()},
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(path)


def _run(bench: Bench, modes: list[str], rounds: int) -> None:
    left_out: set[str] = set()
    for number, _ in enumerate(itertools.repeat(None, rounds)):
        order = [*modes[number % len(modes) :], *modes[: number % len(modes)]]
        for mode in order:
            if mode in left_out:
                continue
            print(f"round {number + 1}: {mode} ...", file=sys.stderr, flush=True)
            try:
                bench.round(mode)
            except NoHugePagesError as error:
                print(f"  left out: {error}", file=sys.stderr)
                left_out.add(mode)


if __name__ == "__main__":
    main()
