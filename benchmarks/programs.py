"""Programs that nobody changed, and that share memory: their page tables, before and after.

    make bench-programs
    .venv/bin/python benchmarks/programs.py --quick --torch /path/to/venv/bin/python

Each is started as it is, with workers that read all of what they share, and then
`mshare collapse` has the page tables back; those that a preload library reaches are started by
`mshare run`, so that huge pages fit.  What is printed is VmPTE of all their processes: of workers
that have read nothing, of those that have, and when it has been had back.

    php-fpm          100 workers, APCu of 512 MiB, of which each reads 420 MiB
    multiprocessing  50 workers, shared_memory of 1 GiB, forked and spawned
    torch            a DataLoader with 8 workers, a shared tensor of 1 GiB; if it is installed
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Behind what is installed: msharetables is the wheel's, not the source's.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.fastcgi import request
from msharetables import proc

MSHARE: Final = str(Path(sys.executable).with_name("mshare"))
RUN: Final = (MSHARE, "run", "--min-size=16M", "--no-watch", "--")
START_SECONDS: Final = 60.0
MiB: Final = 1 << 20


class LeftOutError(Exception):
    """It cannot be measured here."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much."""

    php_workers: int
    php_entries: int
    """Of 1 MiB."""
    workers: int
    torch_workers: int
    size: int
    """In MiB."""


FULL: Final = Plan(100, 420, 50, 8, 1024)
QUICK: Final = Plan(8, 40, 8, 2, 64)


@dataclass(frozen=True, slots=True)
class Row:
    """VmPTE of all processes of a program (bytes)."""

    name: str
    idle: int
    before: int
    after: int


def tables(pid: int) -> int:
    """VmPTE of a process and all that it started (bytes)."""
    total = 0
    for each in proc.with_children([pid]):
        with contextlib.suppress(OSError):
            status = proc.status(each)
            total += status.tables if status else 0
    return total


def have_back(pid: int) -> None:
    """What the product does."""
    command = [MSHARE, "collapse", "--min-size=16M", "--budget=100%", "--pid", str(pid)]
    subprocess.run(command, check=False, stdout=sys.stderr)


@contextlib.contextmanager
def running(command: Sequence[object]) -> Iterator[subprocess.Popen[str]]:
    """A program with its children, all of which end with this."""
    process = subprocess.Popen(
        [str(each) for each in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


# -- Python's --

MULTIPROCESSING: Final = """
import multiprocessing, sys, time
from multiprocessing import shared_memory

def work(name, how, ready):
    memory = shared_memory.SharedMemory(name=name)
    if how == "read":
        sum(memory.buf[at] for at in range(0, memory.size, 4096))
    ready.release()
    time.sleep(86400)

if __name__ == "__main__":
    kind, how, workers, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    context = multiprocessing.get_context(kind)
    memory = shared_memory.SharedMemory(create=True, size=size << 20)
    try:
        for at in range(0, memory.size, 1 << 20):
            memory.buf[at:at + (1 << 20)] = bytes([1]) * (1 << 20)
        ready = context.Semaphore(0)
        arguments = memory.name, how, ready
        children = [
            context.Process(target=work, args=arguments, daemon=True) for _ in range(workers)
        ]
        for each in children: each.start()
        for _ in children: ready.acquire()
        print("ready", flush=True)
        sys.stdin.read()
        for each in children: each.kill()
        for each in children: each.join()
    finally:
        memory.close()
        memory.unlink()
"""

TORCH: Final = """
import sys, torch, torch.utils.data

how, workers, size = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
memory = torch.ones(size << 18).share_memory_()

class Everything(torch.utils.data.Dataset):
    def __len__(self): return 2 * workers
    def __getitem__(self, index): return memory.sum() if how == "read" else torch.ones(1)

loader = torch.utils.data.DataLoader(
    Everything(), batch_size=1, num_workers=workers, persistent_workers=True
)
for _ in loader: pass
print("ready", flush=True)
sys.stdin.read()
"""


def python(interpreter: str, file: Path, kind: str, workers: int, size: int) -> Row:
    """A program of Python's, aligned by `mshare run`.  Raises LeftOutError."""
    found: list[int] = []
    for how in ("idle", "read"):
        command = [*RUN, interpreter, file, kind, how, workers, size]
        with running(command) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise LeftOutError("it does not start")
            found.append(tables(process.pid))
            if how == "read":
                have_back(process.pid)
                found.append(tables(process.pid))
            process.stdin.close()
            process.wait(START_SECONDS)
    return Row(f"{file.stem}, {kind}, {workers} workers, {size} MiB", *found)


# -- PHP --

SCRIPT: Final = """<?php
$entries = (int)$_GET['entries'];
if ($_GET['do'] == 'fill')
    for ($i = 0; $i < $entries; $i++) apcu_store("k$i", str_repeat(chr(65 + $i % 26), 1 << 20));
if ($_GET['do'] == 'read')
    for ($i = 0; $i < $entries; $i++) { $value = apcu_fetch("k$i"); $value[1 << 19]; }
usleep(20000);
echo getmypid();
"""
SETTINGS: Final = """
[global]
error_log = {directory}/log
[pool]
listen = {directory}/socket
user = nobody
group = nogroup
pm = static
pm.max_children = {workers}
"""


def php(directory: Path, plan: Plan) -> Row:
    """APCu under php-fpm, as it is: a preload library does not reach it."""
    found = [each for each in sorted(Path("/usr/sbin").glob("php-fpm*")) if each.is_file()]
    if not found:
        raise LeftOutError("php-fpm is not installed: scripts/system-packages does that")
    script, config = directory / "script.php", directory / "fpm.conf"
    script.write_text(SCRIPT)
    config.write_text(SETTINGS.format(directory=directory, workers=plan.php_workers))
    command = [
        *(found[-1], "--nodaemonize", "--allow-to-run-as-root", "--fpm-config", config),
        *("-d", "apc.enabled=1", "-d", f"apc.shm_size={_room(plan.php_entries)}M"),
        *("-d", "memory_limit=512M"),
    ]
    results = []
    for how in ("idle", "read"):
        with running(command) as server:
            _wait_for(directory / "socket")
            query = f"do={{}}&entries={plan.php_entries}"
            request(directory / "socket", script, query.format("fill"))
            _all_workers(directory / "socket", script, query.format(how), plan.php_workers)
            results.append(tables(server.pid))
            if how == "read":
                have_back(server.pid)
                results.append(tables(server.pid))
        (directory / "socket").unlink(missing_ok=True)
    return Row(f"php-fpm, {plan.php_workers} workers, {plan.php_entries} MiB", *results)


def _room(entries: int) -> int:
    """MiB for so many entries of 1 MiB; a multiple of a huge page, as such settings are."""
    return -(-entries * 6 // 5 // 64) * 64


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise LeftOutError("php-fpm does not start")
        time.sleep(0.05)


def _all_workers(socket: Path, script: Path, query: str, workers: int) -> None:
    """Ask until each worker has answered: whoever is free takes the next."""
    pids: set[str] = set()
    deadline = time.monotonic() + 10 * START_SECONDS

    def ask() -> None:
        while len(pids) < workers and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                pids.add(request(socket, script, query).split()[-1])

    threads = [threading.Thread(target=ask) for _ in range(workers)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if len(pids) < workers:
        raise LeftOutError(f"only {len(pids)} workers have answered")


def render(rows: Sequence[Row]) -> str:
    """A table of plain text."""
    lines = [f"{'program':<46} {'idle':>10} {'reading':>10} {'had back':>10}  of reading"]
    for row in rows:
        cells = " ".join(f"{each >> 10:>8,} k" for each in (row.idle, row.before, row.after))
        lines.append(f"{row.name:<46} {cells}  {row.after / row.before:.2f}")
    return "\n".join(lines)


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few workers, little memory")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has torch")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    for number in (signal.SIGTERM, signal.SIGALRM):  # as exceptions: everything is taken down
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    directory = Path(tempfile.mkdtemp(prefix="mshare-bench-"))
    directory.chmod(0o755)
    multiprocessing, torch = directory / "multiprocessing.d", directory / "torch.d"
    rows: list[Row] = []
    try:
        for each, text in ((multiprocessing, MULTIPROCESSING), (torch, TORCH)):
            each.write_text(text)
        have_torch = [arguments.torch, "-c", "import torch"]
        with _told("php-fpm"):
            rows.append(php(directory, plan))
        for kind in ("fork", "spawn"):
            with _told(f"multiprocessing, {kind}"):
                rows.append(python(sys.executable, multiprocessing, kind, plan.workers, plan.size))
        with _told("torch"):
            if subprocess.run(have_torch, check=False, capture_output=True).returncode:
                raise LeftOutError(f"{arguments.torch} has no torch: see --torch")
            rows.append(python(arguments.torch, torch, "fork", plan.torch_workers, plan.size))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(render(rows))


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        yield
    except LeftOutError as error:
        print(f"{name}: left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
