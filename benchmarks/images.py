"""Images that come from far away, beside plain downloads: a table, and JSON in benchmarks/results.

    .venv/bin/python benchmarks/images.py
    .venv/bin/python benchmarks/images.py --quick

The store is slow_store.py: 30 ms to the first byte, and 100 MiB/s for each connection, as of an
object store in the same region.  Both sides fetch the same parts, 16 at one time, by the same
library.  Processes that touch what is fetched are there before it begins; they look at a byte of
each page, and at whether what they see is right.  Needs obstore.

The row on huge pages reserves as many of them as the image has; if it cannot, it is left out.  So
is `rclone mount` where there is no rclone.
"""

from __future__ import annotations

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
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

# Behind what is installed: libmshare and msharefsd are the wheel's, not the source's.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import results, service, table
from benchmarks.huge_pages import HUGE, NoHugePagesError, free_huge_pages, huge_pages
from benchmarks.options import Options
from msharefsd.mount import mounting

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
OTHERS: Final = 2 << 30
"""Memory that is left alone (bytes)."""
PAGE: Final = 4096
LOOK_SECONDS: Final = 0.001
PATIENCE: Final = 120.0
Put = Callable[[int, memoryview], object]
"""Takes what is fetched, and where it belongs (bytes)."""
COME: Final = ".come"
"""Behind a file's name: a byte for each of its parts that is there."""


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


def _touch(memory: memoryview, barrier: Barrier, come: Callable[[int], None]) -> None:
    """A byte of each page, part by part, when all others have come as far, and `come` returns."""
    import numpy as np  # noqa: PLC0415 - not at the start of every process

    pages: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(memory, np.uint8)
    for number in range(len(memory) // PART):
        come(number)
        barrier.wait(PATIENCE)
        part = pages[number * PART : (number + 1) * PART]
        part[::PAGE].sum()
        if int.from_bytes(part[:8].tobytes(), "little") != number + 1:
            raise BenchmarkError(f"part {number} is wrong")


def _at_once(_number: int) -> None:
    """Who touches it waits for it, or all of it is there."""


def _toucher(orders: Connection, barrier: Barrier, root: str, *, first: bool) -> None:
    """Told a region's name, or a file; when all of it was touched it says at what time.

    A file may come meanwhile: the `first` of them sees what of it is there, in a file beside it.
    """
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
                    _touch(memory, barrier, _at_once)
                end = time.monotonic()
        else:
            with (
                open(what, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            ):
                come = partial(_look, f"{what}{COME}") if kind == "coming" and first else _at_once
                with memoryview(mapped) as memory:
                    _touch(memory, barrier, come)
                end = time.monotonic()
        orders.send(end)  # when it has let go of it


def _look(file: str, number: int) -> None:
    with open(file, "rb") as come:
        while os.pread(come.fileno(), 1, number) != b"x":
            time.sleep(LOOK_SECONDS)


class Touchers:
    """They live as long as the benchmark does."""

    def __init__(self, root: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._barrier = context.Barrier(PROCESSES)
        self._ends: list[Connection] = []
        self._processes = []
        for number in range(PROCESSES):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_toucher,
                args=(theirs, self._barrier, root),
                kwargs={"first": number == 0},
                daemon=True,
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


def _download(url: str, put: Put) -> None:
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
    """Fetched and checked, by a process that has done so before."""
    import obstore  # noqa: PLC0415 - as above

    from libmshare.images.manifest import parse  # noqa: PLC0415 - as above
    from libmshare.images.store import part_key  # noqa: PLC0415 - as above

    store = obstore.store.from_url(url.rpartition("/")[0], client_options={"allow_http": True})
    manifest = parse(bytes(obstore.get(store, url.rpartition("/")[2]).bytes()))
    first = manifest.parts[0].hash
    if hashlib.sha256(obstore.get(store, part_key(first)).bytes()).hexdigest() != first:
        raise BenchmarkError("a part is wrong")


@contextlib.contextmanager
def _file(path: Path, size: int) -> Iterator[Put]:
    """Write to a file; it stays."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def write(offset: int, data: memoryview) -> None:
        while data:
            done = os.pwrite(fd, data, offset)
            data, offset = data[done:], offset + done

    try:
        os.truncate(fd, size)
        yield write
    finally:
        os.close(fd)


@contextlib.contextmanager
def _huge_file(path: Path, size: int) -> Iterator[Put]:
    """Write to a file of huge pages, of which `path` is a link until the end."""
    import numpy as np  # noqa: PLC0415 - not at the start of every process

    fd = os.memfd_create("least", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    path.symlink_to(f"/proc/{os.getpid()}/fd/{fd}")
    try:
        os.truncate(fd, size)
        with mmap.mmap(fd, size) as mapped:
            memory: list[np.ndarray[Any, np.dtype[np.uint8]]] = [np.frombuffer(mapped, np.uint8)]

            def write(offset: int, data: memoryview) -> None:
                # (A slice of the mapping would be written to with the GIL held.)
                np.copyto(memory[0][offset : offset + len(data)], np.frombuffer(data, np.uint8))

            try:
                yield write
            finally:
                memory.clear()
    finally:
        os.close(fd)
        path.unlink()


def _bring(path: Path, write: Put, url: str, begun: Callable[[], object] = lambda: None) -> None:
    """`begun` is called when the file beside `path` is there that says what has come."""
    come = os.open(f"{path}{COME}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        begun()

        def put(offset: int, data: memoryview) -> None:
            write(offset, data)
            os.pwrite(come, b"x", offset // PART)

        _download(url, put)
    finally:
        os.close(come)


# -- another peer: a file system that fetches what is read --


def _rclone() -> str | None:
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.exists() else shutil.which("rclone")


@contextlib.contextmanager
def _mounted(program: str, store: Store, directory: Path) -> Iterator[Path]:
    """The same bytes in one file, which `rclone mount` fetches with as many requests as we do.

    It keeps them in memory: without that, several who read make it begin anew again and again.
    """
    directory.mkdir()
    cache = tempfile.mkdtemp(prefix="mshare-bench-", dir="/dev/shm")
    command = [
        program, "mount", ":http:", str(directory), "--config", "",
        "--http-url", f"http://127.0.0.1:{store.port}/files/", "--read-only",
        "--vfs-read-chunk-size", str(PART), "--vfs-read-chunk-streams", str(IN_FLIGHT),
        "--vfs-cache-mode", "full", "--cache-dir", cache,
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not os.path.ismount(directory):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BenchmarkError("rclone does not mount")
                time.sleep(LOOK_SECONDS)
            yield directory / "whole"
        finally:
            process.terminate()  # it unmounts
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()
            if os.path.ismount(directory):
                mounting.unmount(str(directory))
            shutil.rmtree(cache)
    directory.rmdir()


# -- what is measured --


def _room() -> int:
    """How much may be loaded (bytes): it is there twice, and others have memory left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(
        int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")
    )
    return max(PART, (available - OTHERS) // 2)


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
        parts = min(self._plan.loaded, _room() // PART)
        if parts < self._plan.loaded:
            size = self._plan.loaded * PART // MiB
            print(f"no room for {size} MiB: {parts * PART // MiB} are loaded", file=sys.stderr)
        with _store(parts) as store:
            yield from self._loaded(store, parts)

    def _lockstep(self, store: Store) -> Iterator[table.Row]:
        from libmshare import Region  # noqa: PLC0415 - as above

        size, ours, plain, file, requests = self._plan.parts * PART, [], [], [], []
        least, mounted = [], []
        shared = Path("/dev/shm", f"mshare-bench-{os.getpid()}")
        program = _rclone()
        if program is None:
            print("rclone is not here: left out", file=sys.stderr)
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
                with _file(shared, size) as write:
                    _bring(shared, write, store.url)
                self._touchers.begin("file", str(shared))
                file.append((self._touchers.end() - begun) * 1e3)
                shared.unlink()
                begun = time.monotonic()
                with _file(shared, size) as write:
                    self._bring(shared, write, store)
                least.append((self._touchers.end() - begun) * 1e3)
            finally:
                shared.unlink(missing_ok=True)
                Path(f"{shared}{COME}").unlink(missing_ok=True)
            if program is not None:
                with _mounted(program, store, self._directory / "rclone") as there:
                    begun = time.monotonic()
                    self._touchers.begin("file", str(there))
                    mounted.append((self._touchers.end() - begun) * 1e3)
        what = f"{PROCESSES} processes touch {size // MiB} MiB while it is pulled"
        yield table.Row(what, "ms", ours, plain, "a download, to nowhere", LOCKSTEP)
        yield table.Row(
            "the same, beside a tmpfs file", "ms", ours, file, "a download there, then the touches"
        )
        yield table.Row(
            "the same, beside the least there is",
            "ms",
            ours,
            least,
            "a download to a tmpfs file, touched part by part as it comes",
        )
        yield table.Row("that least itself", "ms", least, plain, "a download, to nowhere")
        if mounted:
            yield table.Row("the same, beside rclone", "ms", ours, mounted, "rclone mount, mapped")
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
            "until the first byte is touched",
            "ms",
            ours,
            plain,
            "manifest and first part fetched, and checked",
        )
        more = [statistics.median(ours) - statistics.median(plain)]
        yield table.Row(
            "which is so much later", "ms", more, [FIRST_BYTE_MS], "the most", limit=FIRST_BYTE_MS
        )

    def _loaded(self, store: Store, parts: int) -> Iterator[table.Row]:
        size = parts * PART
        try:
            with huge_pages(max(0, size // HUGE - free_huge_pages())):
                yield from self._loaded_on(store, size, ["shm", "hugetlb"])
        except NoHugePagesError as error:
            print(f"{error}: left out", file=sys.stderr)
            yield from self._loaded_on(store, size, ["shm"])

    def _loaded_on(self, store: Store, size: int, kinds: list[str]) -> Iterator[table.Row]:
        for kind in kinds:  # the machine has to have touched such memory before
            self._load(store, kind)
        ours: dict[str, list[float]] = {kind: [] for kind in kinds}
        peers, plain, least = [], [], []
        file = self._directory / "downloaded"
        for _ in range(max(1, self._plan.rounds // 2)):
            for kind in kinds:
                ours[kind].append(self._load(store, kind))
            if "hugetlb" in kinds:
                begun = time.monotonic()
                with _huge_file(file, size) as write:
                    self._bring(file, write, store)
                    least.append(self._touchers.end() - begun)
            begun = time.monotonic()
            with _file(file, size) as write:
                _bring(file, write, store.url)
            self._touchers.begin("file", str(file))
            peers.append(self._touchers.end() - begun)
            file.unlink()
            begun = time.monotonic()
            _download(store.url, lambda _offset, _data: None)
            plain.append(time.monotonic() - begun)
        for kind in kinds:
            yield table.Row(
                f"{size // MiB} MiB pulled, and touched by {PROCESSES}, on {kind}",
                "s",
                ours[kind],
                peers,
                "a download to a file, mapped",
                LOADED if kind == "hugetlb" else None,
            )
        if least:
            yield table.Row("the least there is, on hugetlb", "s", least, peers, "the same file")
        yield table.Row(
            f"{size // MiB} MiB downloaded to nowhere", "s", plain, peers, "the same file, mapped"
        )

    def _bring(self, file: Path, write: Put, store: Store) -> None:
        """It is touched part by part as it comes."""
        _bring(file, write, store.url, partial(self._touchers.begin, "coming", str(file)))

    def _load(self, store: Store, kind: str) -> float:
        from libmshare import Region  # noqa: PLC0415 - as above

        begun = time.monotonic()
        with Region.pull(store.url, backing=kind) as region:
            self._touchers.begin("region", "r")
            taken = self._touchers.end() - begun
            region.unlink()
        return taken


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
    options = Options(__doc__, (FULL, QUICK, SMOKE), "fewer rounds, less memory")
    arguments, plan = options.parse()
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
