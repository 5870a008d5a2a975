"""msharefs beside its peers: one table, and JSON in benchmarks/results.

    make bench
    .venv/bin/python benchmarks/run.py --quick

Starts a daemon of its own and takes it down again.  Both sides of each measure run
in turns; the numbers are medians, but where p99 is said.  Times depend on what else
the machine does; ratios much less.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Final

# Behind what is installed: libmshare and msharefsd are the wheel's, not the source's.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import measures, results, service, table, worker
from benchmarks.options import Options

WATCHDOG_SECONDS: Final = 600.0


def _check_memory(plan: measures.Plan) -> None:
    """Exit with a sentence unless there is memory for both sides."""
    # One region, one object, and what is freed in the background.
    needed = 2 * plan.touch
    free = os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize
    if min(free, _available()) < needed:
        sys.exit(f"benchmarks: {needed >> 20} MiB of memory and of /dev/shm are needed")


def _available() -> int:
    """MemAvailable (proc_meminfo(5)) in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0


@contextlib.contextmanager
def _temporary_directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mshare-bench-"))
    try:
        yield path
    finally:
        # Never through a mount that could not be taken down.
        if not os.path.ismount(path / "mshare"):
            shutil.rmtree(path)


@contextlib.contextmanager
def _watchdog(running: service.Service, workers: worker.Workers) -> Iterator[None]:
    """End a run that hangs.

    Without its daemon a request in the mount fails; a thread that waits for a page
    goes on waiting, so workers are killed as well.
    """

    def bark() -> None:
        running.process.kill()
        workers.kill()

    timer = threading.Timer(WATCHDOG_SECONDS, bark)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _measure(plan: measures.Plan) -> Iterator[table.Row]:
    with _temporary_directory() as directory, service.running(directory, measures.GiB) as running:
        workers = worker.Workers(worker.compile_workers(directory), running.mountpoint)
        with _watchdog(running, workers):
            measures.warm_up(workers, min(plan.warm, _available() // 2))
            _say("attaching ...")
            yield from measures.attaching(workers, plan)
            _say("touching ...")
            yield from measures.touching(workers, plan)
            _say("faulting ...")
            yield from measures.faulting(workers, plan)
            _say("files ...")
            yield from measures.files(workers, plan)
            _say("changing mappings ...")
            yield from measures.changing(workers, plan)
            _say("collapsing ...")
            yield from measures.collapsing(workers, plan)
            _say("mapped files ...")
            yield from measures.mapped_files(workers, plan, directory)


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def tables(document: results.Document) -> list[table.Table]:
    """What is printed of it."""
    caption = f"msharefs beside its peers. {results.conditions(document)}"
    return [table.of_peers(document["rows"], caption)]


def main() -> None:
    """Run, print, write."""
    options = Options(
        __doc__, (measures.FULL, measures.QUICK, measures.SMOKE), "fewer rounds, less memory"
    )
    arguments, plan = options.parse()
    _check_memory(plan)
    try:
        with results.Run("peers") as run:
            rows = list(_measure(plan))
    except (service.ServiceError, worker.WorkerError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmarks: {error}")
    document = run.document(plan=asdict(plan), rows=[row.as_json() for row in rows])
    print(*tables(document), run.write(document, arguments.results), sep="\n\n")


if __name__ == "__main__":
    main()
