"""Images that come from far away, beside plain downloads: a table, and JSON in benchmarks/results.

    .venv/bin/python benchmarks/images.py
    .venv/bin/python benchmarks/images.py --quick

The store is slow_store.py: 30 ms to the first byte, and 100 MiB/s for each connection, as of an
object store in the same region.  Both sides fetch the same parts, 16 at one time, by the same
library.  Processes that touch what is fetched are there before it begins; they look at a byte of
each page, and at whether what they see is right.  Needs obstore.

The row on huge pages takes as many of them free as the image has; without, it is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import mmap
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

# Behind what is installed: libmshare and msharefsd are the wheel's, not the source's.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import results, service, table

if TYPE_CHECKING:
    import numpy as np

STORE: Final = Path(__file__).with_name("slow_store.py")
ALIGNMENT: Final = 2 << 20
MiB: Final = 1 << 20
PART: Final = 8 * MiB
LATENCY: Final = 0.03
"""Seconds to the first byte."""
WIDTH: Final = 100 * MiB
"""Bytes a second, of one connection."""
PROCESSES: Final = 8
IN_FLIGHT: Final = 16
LOCKSTEP: Final = 1.3
MORE_REQUESTS: Final = 16
FIRST_BYTE_MS: Final = 50.0
LOADED: Final = 0.4
HUGE: Final = 2 * MiB
PAGE: Final = 4096
LOOK_SECONDS: Final = 0.001
PATIENCE: Final = 120.0
FREE_HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    rounds: int
    parts: int
    """Of the image that is used while it comes."""
    loaded: int
    """Parts of the one that is loaded first."""


FULL: Final = Plan(rounds=5, parts=64, loaded=512)
QUICK: Final = Plan(rounds=3, parts=32, loaded=64)
SMOKE: Final = Plan(rounds=1, parts=4, loaded=4)


class BenchmarkError(Exception):
    """What is measured did not do what it should."""


# -- the store --


@dataclass(frozen=True, slots=True)
class Store:
    """A running one."""

    port: int

    @property
    def url(self) -> str:
        """Of the image."""
        return f"http://127.0.0.1:{self.port}/r.img"

    def asked(self) -> int:
        """How many requests there were."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/asked") as answer:
            return int(answer.read())


@contextlib.contextmanager
def _store(parts: int) -> Iterator[Store]:
    command = [sys.executable, str(STORE), str(parts), str(PART), str(LATENCY), str(WIDTH)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Store(int(process.stdout.readline()))
        finally:
            process.kill()


# -- the processes that touch --


def _touch(memory: memoryview, barrier: Barrier) -> None:
    """A byte of each page, part by part, when all others have come as far."""
    import numpy as np  # noqa: PLC0415 - not at the start of every process

    pages: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(memory, np.uint8)
    for number in range(len(memory) // PART):
        barrier.wait(PATIENCE)
        part = pages[number * PART : (number + 1) * PART]
        part[::PAGE].sum()
        if int.from_bytes(part[:8].tobytes(), "little") != number + 1:
            raise BenchmarkError(f"part {number} is wrong")


def _toucher(orders: Connection, barrier: Barrier, root: str) -> None:
    """Told a region's name, or a file; when all of it was touched it says at what time."""
    os.environ["MSHARE_ROOT"] = root
    import numpy  # noqa: F401, ICN001, PLC0415 - before it is timed

    from libmshare import Region  # noqa: PLC0415 - as above

    orders.send(0.0)
    while True:
        kind, what = orders.recv()
        if kind == "region":
            while not os.path.exists(f"{root}/{what}"):
                time.sleep(LOOK_SECONDS)
            with Region.attach(what) as region:
                with memoryview(region.buf) as memory:
                    _touch(memory, barrier)
                orders.send(time.monotonic())
        else:
            with open(what, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
                with memoryview(mapped) as memory:
                    _touch(memory, barrier)
                orders.send(time.monotonic())


class Touchers:
    """They live as long as the benchmark does."""

    def __init__(self, root: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._barrier = context.Barrier(PROCESSES)
        self._ends: list[Connection] = []
        self._processes = []
        for _ in range(PROCESSES):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_toucher, args=(theirs, self._barrier, root), daemon=True
            )
            process.start()
            theirs.close()
            self._ends.append(mine)
            self._processes.append(process)
        self.end()  # they have imported what they need

    def begin(self, kind: str, what: str) -> None:
        """All of them touch it as soon as it is there."""
        for each in self._ends:
            each.send((kind, what))

    def end(self) -> float:
        """When the last one had touched all of it."""
        return max(float(each.recv()) for each in self._ends)

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.join()


# -- the peer: a download by the same library --


def _download(url: str, put: Callable[[int, memoryview], object]) -> None:
    """The parts of an image, as many at one time as we fetch; checked by their hash, as ours."""
    import obstore  # noqa: PLC0415 - an extra

    from libmshare.images import crew  # noqa: PLC0415 - as above
    from libmshare.images.manifest import Part, parse  # noqa: PLC0415 - as above
    from libmshare.images.store import part_key  # noqa: PLC0415 - as above

    store = obstore.store.from_url(
        url.rpartition("/")[0], client_options={"allow_http": True, "timeout": "120s"}
    )
    manifest = parse(bytes(obstore.get(store, url.rpartition("/")[2]).bytes()))

    def fetch(part: Part) -> None:
        data = memoryview(obstore.get(store, part_key(part.hash)).bytes())
        if hashlib.sha256(data).hexdigest() != part.hash:
            raise BenchmarkError("a part is wrong")
        put(part.offset, data)

    crew.each(manifest.parts, fetch, width=IN_FLIGHT)


def _first_part(url: str) -> None:
    import obstore  # noqa: PLC0415 - as above

    from libmshare.images.manifest import parse  # noqa: PLC0415 - as above
    from libmshare.images.store import part_key  # noqa: PLC0415 - as above

    store = obstore.store.from_url(url.rpartition("/")[0], client_options={"allow_http": True})
    manifest = parse(bytes(obstore.get(store, url.rpartition("/")[2]).bytes()))
    obstore.get(store, part_key(manifest.parts[0].hash)).bytes()


def _into(file: Path, size: int, url: str) -> None:
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.truncate(fd, size)

        def put(offset: int, data: memoryview) -> None:
            while data:
                done = os.pwrite(fd, data, offset)
                data, offset = data[done:], offset + done

        _download(url, put)
    finally:
        os.close(fd)


# -- what is measured --


class Bench:
    """Everything, with one daemon and one set of processes."""

    def __init__(self, plan: Plan, touchers: Touchers, directory: Path) -> None:
        self._plan = plan
        self._touchers = touchers
        self._directory = directory

    def rows(self) -> Iterator[table.Row]:
        """One after the other."""
        with _store(1) as store:  # what is imported, and started, is so before it is timed
            self._load(store, "shm")
            _download(store.url, lambda _offset, _data: None)
        with _store(self._plan.parts) as store:
            yield from self._lockstep(store)
            yield from self._first_byte(store)
        with _store(self._plan.loaded) as store:
            yield from self._loaded(store)

    def _lockstep(self, store: Store) -> Iterator[table.Row]:
        from libmshare import Region  # noqa: PLC0415 - as above

        size, ours, plain, file, requests = self._plan.parts * PART, [], [], [], []
        shared = Path("/dev/shm", f"mshare-bench-{os.getpid()}")
        for _ in range(self._plan.rounds):
            asked, begun = store.asked(), time.monotonic()
            self._touchers.begin("region", "r")
            with Region.pull(store.url) as region:
                ours.append((self._touchers.end() - begun) * 1e3)
                region.unlink()
            requests.append(float(store.asked() - asked))
            begun = time.monotonic()
            _download(store.url, lambda _offset, _data: None)
            plain.append((time.monotonic() - begun) * 1e3)
            try:
                begun = time.monotonic()
                _into(shared, size, store.url)
                self._touchers.begin("file", str(shared))
                file.append((self._touchers.end() - begun) * 1e3)
            finally:
                shared.unlink(missing_ok=True)
        what = f"{PROCESSES} processes touch {size // MiB} MiB while it is pulled"
        yield table.Row(what, "ms", ours, plain, "a download, to nowhere", LOCKSTEP)
        yield table.Row(
            "the same", "ms", ours, file, "a download to a tmpfs file, then the touches"
        )
        most = self._plan.parts + MORE_REQUESTS
        fewest = [float(self._plan.parts + 1)]
        yield table.Row(
            "requests for that", "", requests, fewest, "its parts and manifest", limit=most
        )

    def _first_byte(self, store: Store) -> Iterator[table.Row]:
        """Of a region that is pulled, by a process that is there."""
        from libmshare.images.pull import pull  # noqa: PLC0415 - as above

        ours, plain = [], []
        for _ in range(2 * self._plan.rounds):
            told: list[float] = []
            with _first_touch("r") as first:
                begun = time.monotonic()
                region = pull(store.url, "r", None, None, None, 0o600)
                told.append(first())
                region.unlink()
                region.close()
            ours.append((told[0] - begun) * 1e3)
            begun = time.monotonic()
            _first_part(store.url)
            plain.append((time.monotonic() - begun) * 1e3)
        yield table.Row(
            "until the first byte is touched", "ms", ours, plain, "manifest and first part fetched"
        )
        more = [statistics.median(ours) - statistics.median(plain)]
        yield table.Row(
            "which is so much later", "ms", more, [FIRST_BYTE_MS], "the most", limit=FIRST_BYTE_MS
        )

    def _loaded(self, store: Store) -> Iterator[table.Row]:
        size = self._plan.loaded * PART
        kinds = ["shm"]
        if _free_huge_pages() >= size // HUGE:
            kinds.append("hugetlb")
        else:
            print(f"{size // HUGE} huge pages are not free: left out", file=sys.stderr)
        ours: dict[str, list[float]] = {kind: [] for kind in kinds}
        peers = []
        for _ in range(max(1, self._plan.rounds // 2)):
            for kind in kinds:
                ours[kind].append(self._load(store, kind))
            file = self._directory / "downloaded"
            begun = time.monotonic()
            _into(file, size, store.url)
            self._touchers.begin("file", str(file))
            peers.append(self._touchers.end() - begun)
            file.unlink()
        for kind in kinds:
            yield table.Row(
                f"{size // MiB} MiB pulled, and touched by {PROCESSES}, on {kind}",
                "s",
                ours[kind],
                peers,
                "a download to a file, mapped",
                LOADED if kind == "hugetlb" else None,
            )

    def _load(self, store: Store, kind: str) -> float:
        from libmshare import Region  # noqa: PLC0415 - as above

        begun = time.monotonic()
        with Region.pull(store.url, backing=kind) as region:
            self._touchers.begin("region", "r")
            taken = self._touchers.end() - begun
            region.unlink()
        return taken


def _free_huge_pages() -> int:
    with contextlib.suppress(OSError):
        return int(FREE_HUGE_PAGES.read_text())
    return 0


@contextlib.contextmanager
def _first_touch(name: str) -> Iterator[Callable[[], float]]:
    """A child that touches a region's first byte as soon as there is one, and says when it had."""
    reader, writer = os.pipe()
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            from libmshare import Region  # noqa: PLC0415 - as above

            root = os.environ["MSHARE_ROOT"]
            os.write(go, b"x")
            while not os.path.exists(f"{root}/{name}"):
                time.sleep(LOOK_SECONDS)
            with Region.attach(name) as region:
                right = region[0] == 1
                now = time.monotonic()
            os.write(writer, repr(now if right else -1.0).encode())
        os._exit(0)
    os.close(writer)
    os.read(ready, 1)

    def first() -> float:
        said = float(os.read(reader, 100) or b"-1")
        if said < 0:
            raise BenchmarkError("the first byte is wrong")
        return said

    try:
        yield first
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for fd in (reader, ready, go):
            os.close(fd)


def tables(document: results.Document) -> list[table.Table]:
    """What is printed of it."""
    store = f"{LATENCY * 1e3:.0f} ms to the first byte, {WIDTH // MiB} MiB/s a connection"
    caption = f"Images from a store: {store}. {results.conditions(document)}"
    return [table.of_peers(document["rows"], caption)]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer rounds, less memory")
    size.add_argument("--smoke", action="store_true", help="to see that everything runs")
    parser.add_argument(
        "--results", type=Path, default=results.RESULTS, help="directory for the JSON"
    )
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else SMOKE if arguments.smoke else FULL
    # As an exception, so that everything is taken down.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    directory = Path(tempfile.mkdtemp(prefix="mshare-images-"))
    rows = []
    try:
        with results.Run("images") as run, service.running(directory, ALIGNMENT) as running:
            os.environ["MSHARE_ROOT"] = str(running.mountpoint)
            touchers = Touchers(str(running.mountpoint))
            try:
                for row in Bench(plan, touchers, directory).rows():
                    rows.append(row)
                    print(f"{row.measure}: {row.our_value:,.1f}", file=sys.stderr, flush=True)
            finally:
                touchers.close()
    except (service.ServiceError, BenchmarkError) as error:
        sys.exit(f"images: {error}")
    finally:
        # Never through a mount that could not be taken down.
        if not os.path.ismount(directory / "mshare"):
            shutil.rmtree(directory)
    document = run.document(plan=asdict(plan), rows=[row.as_json() for row in rows])
    print(*tables(document), run.write(document, arguments.results), sep="\n\n")


if __name__ == "__main__":
    main()
