"""Page tables: who shares them, what ends that, and what the file says of it.

Counted, never timed: /proc/kpagecount has how many tables map a page, and PageTables
of /proc/meminfo how many there are.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from both import Both
from conftest import BASE, TESTS, Client, Daemon, clients, eventually, huge_pages

# Behind what is installed, as the benchmarks themselves do.
sys.path.append(str(TESTS.parent))

from benchmarks.crowd import Crowd, Touch, compile_crowd, crowd, kib
from msharefsd.errors import Refused
from msharefsd.memory import names
from msharefsd.memory.shmbacking import ShmBacking
from msharefsd.paging import pagetables
from msharefsd.region.region import Region
from msharefsd.threads.disposal import Disposal
from msharetables.pagemap import Category, Pagemap, TableCounts

MiB = 1 << 20
GiB = 1 << 30
HUGE = 2 * MiB
TABLE = 4096
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
READ, BOTH = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
SHARED, FIXED = mmap.MAP_SHARED, 0x10
LARGEST = 8 * GiB
ROOM = 4 * GiB
"""Of memory, for everybody else."""

pytestmark = pytest.mark.shm_only  # each test says what backing it is about

Crowds = Callable[..., Crowd]


@pytest.fixture
def crowds(directory: Path) -> Iterator[Crowds]:
    """Start crowds: of a daemon's region "r", or of plain shared memory."""
    memory = f"mshare-test-{os.getpid()}"
    programs: dict[str, Path] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(_unlink, Path("/dev/shm", memory))

        def start(size: int, of: Daemon | None = None) -> Crowd:
            backend = "shm" if of is None else "mshare"
            if backend not in programs:
                programs[backend] = compile_crowd(backend, directory)
            environment = {} if of is None else {"MSHARE_ROOT": str(of.mount)}
            name = memory if of is None else "r"
            return stack.enter_context(crowd(programs[backend], name, size, environment))

        yield start


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def filled(crowd: Crowd) -> Crowd:
    """Make its memory, all of it there."""
    crowd.do("create")
    crowd.do("fill")
    return crowd


def faults(touches: Sequence[Touch | None]) -> list[int]:
    """The minor faults of each process; none of them was killed."""
    assert None not in touches
    return [touch.faults for touch in touches if touch is not None]


@pytest.fixture
def make(make_daemon: Callable[..., Daemon], directory: Path) -> Callable[..., Daemon]:
    """Start daemons with regions of 1 GiB."""

    def start(backing: str, *arguments: str) -> Daemon:
        (directory / "config").write_text("collapse_seconds = 0.05\n")
        return make_daemon(
            "--alignment=1G",
            f"--config={directory / 'config'}",
            f"--backing={backing}",
            *arguments,
        ).start()

    return start


class Report:
    """What the file says: its figures, and the two tables by their first column."""

    def __init__(self, daemon: Daemon, region: str = "r") -> None:
        time.sleep(pagetables.FRESH_SECONDS)  # what was measured before is not told again
        self.text = daemon.info(region, "pagetables")
        head, *tables = self.text.split("\n\n")
        self.units: dict[str, str] = {}
        self.figures: dict[str, str] = {}
        for line in head.splitlines():
            if not line.startswith("#"):
                match = re.fullmatch(r"([\w-]+): (\S+) ?(\S*)( +# .*)?", line)
                assert match, line
                self.figures[match[1]], self.units[match[1]] = match[2], match[3]
        self.sharers = _rows(tables[-1])
        self.slots = _rows(tables[0]) if len(tables) > 1 else {}

    def __getitem__(self, key: str) -> int:
        return int(self.figures[key])

    def of_slot(self, number: int) -> dict[str, str]:
        for span, row in self.slots.items():
            first, _, last = span.partition("-")
            if int(first) <= number <= int(last or first):
                return row
        raise KeyError(number)

    def shared(self, slot: int) -> tuple[int, int, int, int]:
        """Tables, writers, readers, and how many writers share."""
        row = self.of_slot(slot)
        return tuple(int(row[key]) for key in ("TABLES", "WRITERS", "READERS", "SHARING"))  # type: ignore[return-value] # four


def _rows(table: str) -> dict[str, dict[str, str]]:
    header, *lines = table.splitlines()
    keys = header.split()
    return {line.split()[0]: dict(zip(keys, line.split(), strict=False)) for line in lines}


def mapped_by(pid: int, address: int) -> int:
    """How many page tables have the page that a process has there."""
    with Pagemap(pid) as pagemap, TableCounts() as counts:
        frame = pagemap.frame(address)
        assert frame, "not in its page table"
        return counts.of(frame)


def largest() -> int:
    """The largest region of huge pages that this machine has memory for, up to 8 GiB."""
    available = kib(Path("/proc/meminfo").read_text(), "MemAvailable") - ROOM
    return max(min(LARGEST, available - available % GiB), GiB)


# -- regions of huge pages --


@pytest.mark.timeout(300)
def test_further_sharers_cost_nothing(make: Callable[..., Daemon], crowds: Crowds) -> None:
    size, sharers = largest(), 200
    with huge_pages(size // HUGE):
        daemon = make("hugetlb")
        filled(crowds(size, daemon))
        served = daemon.metric('faults_total{kind="anonymous"}')
        assert served >= size // (16 * MiB)
        many = crowds(size, daemon)
        start = many.tables()
        many.do("idle", sharers)
        idle = many.tables() - start
        assert idle > sharers * TABLE
        many.add(sharers)
        touches = faults(many.touch(sharers, sharers))
        grown = many.tables() - start - idle
        assert len(touches) == sharers
        assert max(touches) <= 16 * (size // GiB)
        assert grown - idle <= sharers * 8 * 1024
        assert daemon.metric('faults_total{kind="anonymous"}') == served
        report = Report(daemon)
        slots = size // GiB
        assert report.shared(0) == (1, sharers + 1, 0, sharers + 1)
        assert report["set"] == report["tables"] == slots * TABLE
        assert report["counted"] == slots * TABLE * (sharers + 1)
        assert report["sharing"] == slots * (sharers + 1)
        assert len(report.sharers) == pagetables.MOST_SHOWN + 1
        assert report.sharers["others"]["ACCESS"] == str(sharers + 1 - pagetables.MOST_SHOWN)
        assert report.sharers["others"]["OWN-kB"] == "0"


@pytest.fixture
def huge(make: Callable[..., Daemon]) -> Iterator[Daemon]:
    """A daemon with huge pages for one region of 2 GiB, and a few more."""
    with huge_pages(2 * GiB // HUGE + 4):
        daemon = make("hugetlb")
        yield daemon
        daemon.stop()


SLOTS = 2
SECOND = BASE + GiB


@pytest.fixture
def spawn(huge: Daemon, client_program: Path) -> Iterator[Callable[..., Client]]:
    with clients(client_program, huge) as start:
        yield start


@pytest.fixture
def pair(spawn: Callable[..., Client]) -> tuple[Client, Client]:
    """Two sharers that have touched all of a region of two slots."""
    donor, other = spawn(), spawn()
    donor.ok("mshare", "r", BASE, SLOTS * GiB, CREATE, 0o600)
    donor.ok("mmap", BASE, SLOTS * GiB, BOTH, SHARED | FIXED)
    donor.ok("fill", BASE, SLOTS * GiB, 1)
    other.ok("mshare", "r", BASE, SLOTS * GiB, os.O_RDWR, 0)
    assert other.do("scan", BASE, SLOTS * GiB) == "1"
    return donor, other


def tables_of_slots(client: Client) -> tuple[int, int]:
    """How many tables there are; by pages that the tests leave alone."""
    return mapped_by(client.pid, BASE + 4 * HUGE), mapped_by(client.pid, SECOND)


def test_sharers_that_come_and_go_do_not_end_sharing(
    huge: Daemon, spawn: Callable[..., Client], pair: tuple[Client, Client]
) -> None:
    donor, other = pair
    size = SLOTS * GiB
    assert other.do("fork", "scan", BASE, size) == "1"
    third = spawn()
    third.ok("mshare", "r", BASE, size, os.O_RDWR, 0)
    third.ok("fill", BASE, size, 1)
    parent = third.pid
    child = int(third.do("branch"))  # which has the commands from here on
    assert third.do("scan", BASE, size) == "1"
    assert tables_of_slots(donor) == (1, 1)
    report = Report(huge)
    assert report.shared(0) == report.shared(1) == (1, 4, 0, 4)
    assert set(report.sharers) == {str(pid) for pid in (donor.pid, other.pid, parent, child)}
    third.ok("detach", "r")
    assert tables_of_slots(donor) == (1, 1)
    assert Report(huge).shared(0) == (1, 3, 0, 3)

    # One that is attached read-only has tables of its own, and only it.
    reader = spawn()
    reader.ok("mshare", "r", BASE, size, os.O_RDONLY, 0)
    assert reader.do("scan", BASE, size) == "1"
    assert tables_of_slots(donor) == (2, 2)
    report = Report(huge)
    assert report.shared(1) == (2, 3, 1, 3)
    assert (report["own-read-only"], report["sharing"]) == (2, 6)
    assert report.sharers[str(reader.pid)]["OWN-kB"] == "8"
    assert report.sharers[str(other.pid)]["OWN-kB"] == "0"
    reader.kill()
    third.kill()
    eventually(lambda: huge.sharers("r") == 2, "they are gone")
    assert tables_of_slots(donor) == (1, 1)


def test_a_daemon_that_is_killed_and_its_successor_do_not_end_sharing(
    huge: Daemon, spawn: Callable[..., Client], pair: tuple[Client, Client]
) -> None:
    donor, other = pair
    size = SLOTS * GiB
    huge.expected.append("taking down the mount")
    huge.kill()
    assert other.do("scan", BASE, size) == "1"
    assert tables_of_slots(donor) == (1, 1)
    huge.start()
    assert tables_of_slots(donor) == (1, 1)
    third = spawn()
    third.ok("mshare", "r", BASE, size, os.O_RDWR, 0)
    before = int(third.do("faults"))
    assert third.do("scan", BASE, size) == "1"
    assert int(third.do("faults")) - before <= 16 * SLOTS
    assert tables_of_slots(donor) == (1, 1)
    assert Report(huge).shared(0) == (1, 3, 0, 3)
    other.ok("munmap", BASE, HUGE)
    donor.ok("mmap", BASE, HUGE, BOTH, SHARED | FIXED)
    third.ok("store", BASE, 7)
    for client in (donor, other, third):
        # Whoever had the table of what was unmapped is linked to it again by a touch.
        assert client.do("load", BASE) == "7"
        assert client.do("load", BASE + 4 * HUGE) == "1"
    assert tables_of_slots(donor) == (1, 1)


def test_objects_that_come_and_go_do_not_end_sharing(
    huge: Daemon, pair: tuple[Client, Client]
) -> None:
    donor, other = pair
    hole = SECOND + 8 * HUGE
    other.ok("munmap", hole, 2 * HUGE)
    # Unmapping takes the slot's table from all but one, and the next touch gives it back.
    for client in pair:
        faults = int(client.do("faults"))
        assert client.do("scan", SECOND, 8 * HUGE) == "1"
        assert int(client.do("faults")) - faults <= 2
    assert tables_of_slots(donor) == (1, 1)
    # Poisoned, and then mapped.
    assert [client.do("load", hole + 5) for client in pair] == ["SIGBUS"] * 2
    donor.ok("mmap", hole, 2 * HUGE, BOTH, SHARED | FIXED)
    assert [client.do("load", hole + 5) for client in pair] == ["0"] * 2
    donor.ok("store", hole + HUGE, 7)
    assert other.do("load", hole + HUGE) == "7"
    # In place of what is there.
    other.ok("mmap", hole, HUGE, BOTH, SHARED | FIXED)
    donor.ok("store", hole, 3)
    assert other.do("load", hole) == "3"
    assert donor.do("load", hole + HUGE) == "7"
    assert tables_of_slots(donor) == (1, 1)
    assert mapped_by(other.pid, hole) == mapped_by(other.pid, hole + HUGE) == 1
    report = Report(huge)
    assert report.shared(0) == report.shared(1) == (1, 2, 0, 2)


def test_write_protection_ends_sharing_in_its_slot_alone(
    huge: Daemon, spawn: Callable[..., Client], pair: tuple[Client, Client]
) -> None:
    donor, _ = pair
    donor.ok("mprotect", BASE, HUGE, READ)
    late = spawn()
    late.ok("mshare", "r", BASE, SLOTS * GiB, os.O_RDWR, 0)
    for client in (*pair, late):
        assert client.do("store", BASE, 1) == "SIGSEGV"
        client.ok("fill", BASE + HUGE, SLOTS * GiB - HUGE, 2)
    assert tables_of_slots(donor) == (4, 1)
    report = Report(huge)
    assert report.of_slot(0)["ENDED-BY"] == "protected"
    assert report.of_slot(1)["ENDED-BY"] == "-"
    assert (report.shared(0)[0], report.shared(1)) == (4, (1, 3, 0, 3))
    assert (report["own-protected"], report["own-otherwise"], report["sharing"]) == (3, 0, 3)
    assert report["tables"] == 5 * TABLE


def test_what_a_sharer_does_to_its_window_by_itself_is_seen(
    huge: Daemon, client_program: Path
) -> None:
    with clients(client_program, huge) as spawn:
        donor, other = spawn(), spawn()
        donor.ok("mshare", "r", BASE, GiB, CREATE, 0o600)
        donor.ok("mmap", BASE, GiB, BOTH, SHARED | FIXED)
        donor.ok("fill", BASE, 4 * HUGE, 1)
        other.ok("mshare", "r", BASE, GiB, os.O_RDWR, 0)
        other.ok("raw_mprotect", BASE, HUGE, READ)
        assert other.do("scan", BASE, 4 * HUGE) == "1"
        assert mapped_by(donor.pid, BASE) == 2
        report = Report(huge)
        assert report.shared(0) == (2, 2, 0, 1)
        assert (report["own-otherwise"], report["own-protected"]) == (1, 0)


def test_a_slot_that_the_region_has_in_part_is_not_shared(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    with huge_pages(8):
        daemon = make_daemon("--alignment=8M", "--backing=hugetlb").start()
        with clients(client_program, daemon) as spawn:
            donor, other = spawn(), spawn()
            donor.ok("mshare", "r", BASE, 4 * HUGE, CREATE, 0o600)
            donor.ok("mmap", BASE, 4 * HUGE, BOTH, SHARED | FIXED)
            donor.ok("fill", BASE, 4 * HUGE, 1)
            other.ok("mshare", "r", BASE, 4 * HUGE, os.O_RDWR, 0)
            assert other.do("scan", BASE, 4 * HUGE) == "1"
            report = Report(daemon)
            assert report.shared(0) == (3, 2, 0, 0)
            assert report.of_slot(0)["ENDED-BY"] == "partial"
            assert report["own-partial"] == 2
        daemon.stop()


@pytest.mark.timeout(300)
def test_1500_sharers(make: Callable[..., Daemon], crowds: Crowds) -> None:
    sharers, batch, size = 1500, 300, 2 * GiB
    with huge_pages(size // HUGE):
        daemon = make("hugetlb")
        filled(crowds(size, daemon))
        served = daemon.metric('faults_total{kind="anonymous"}')
        many = crowds(size, daemon)
        answers: list[str] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                assert "r" in os.listdir(daemon.mount)
                answers.append(daemon.info("r", "pagetables"))

        def answered() -> None:
            before = len(answers)
            eventually(lambda: len(answers) > before, "an answer", 60)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for _ in range(0, sharers, batch):
                many.add(batch)
                answered()
            for first in range(0, sharers, batch):
                assert max(faults(many.touch(first, batch))) <= 16 * (size // GiB)
                answered()
        finally:
            stop.set()
            asking.join()
        assert daemon.metric('faults_total{kind="anonymous"}') == served
        report = Report(daemon)
        assert (report["sharers"], report["tables"]) == (sharers + 1, 2 * TABLE)
        assert report.shared(1) == (1, sharers + 1, 0, sharers + 1)
        assert kib(Path(f"/proc/{daemon.pid}/status").read_text(), "VmRSS") < 100 * MiB


# -- 4 KiB pages --


@pytest.mark.parametrize("ours", [True, False], ids=["a region", "plain shared memory"])
def test_small_pages_cost_each_process_2_mib_a_gib(
    make: Callable[..., Daemon], crowds: Crowds, *, ours: bool
) -> None:
    processes = 10
    daemon = make("shm", "--no-collapse") if ours else None
    filled(crowds(GiB, daemon))
    many = crowds(GiB, daemon)
    start = many.tables()
    many.do("idle", processes)
    idle = many.tables() - start
    many.add(processes)
    many.touch(processes, processes, "read")
    grown = many.tables() - start - idle
    each = (grown - idle) / processes
    assert 1.98 * MiB <= each <= 2.1 * MiB
    if daemon is not None:
        report = Report(daemon)
        assert report["set"] == 2 * MiB
        assert report["unshared"] == (processes + 1) * 2 * MiB
        assert report["collapsed"] == 0
        row = next(iter(report.sharers.values()))
        assert row["TABLES-kB"] == row["OWN-kB"] == "2048"


@pytest.mark.timeout(300)
def test_collapse_leaves_16_kib_of_tables_a_gib(
    make: Callable[..., Daemon], client_program: Path
) -> None:
    daemon = make("shm")
    if "MADV_COLLAPSE" in daemon.log():
        pytest.skip("this kernel has no MADV_COLLAPSE of shared memory")
    with clients(client_program, daemon) as spawn:
        donor, other = spawn(), spawn()

        def tables() -> int:
            status = Path(f"/proc/{other.pid}/status").read_text()
            return kib(status, "VmPTE")

        other.ok("hello")  # it has come to its beginning
        before = tables()
        donor.ok("mshare", "r", BASE, GiB, CREATE, 0o600)
        donor.ok("mmap", BASE, GiB, BOTH, SHARED | FIXED)
        donor.ok("fill", BASE, GiB, 1)
        other.ok("mshare", "r", BASE, GiB, os.O_RDWR, 0)
        assert other.do("scan", BASE, GiB) == "1"
        # From here on it does nothing.
        eventually(lambda: tables() - before <= 16 * 1024, "its page tables are gone", 200)
        eventually(lambda: daemon.metric("collapsed_chunks_total") == GiB // HUGE, "all", 100)
        report = Report(daemon)
        assert report["collapsed"] == GiB // HUGE
        assert report["tables"] == 0
        assert report.sharers[str(other.pid)]["TABLES-kB"] == "0"
        # And mapped anew they are huge pages, which need none.
        assert other.do("scan", BASE, GiB) == "1"
        assert tables() - before <= 16 * 1024
        with Pagemap(other.pid) as pagemap:
            found = list(pagemap.scan(BASE, BASE + GiB))
        assert all(Category.HUGE in categories for _, _, categories in found)
        assert sum(end - start for start, end, _ in found) == GiB


# -- the file, without a mount --


@pytest.fixture
def region() -> Iterator[Region]:
    """A region of 2 MiB with one sharer: this process."""
    disposal = Disposal()
    memory = names.Mark(Path(f"/test-{os.getpid()}-own"), "0", 0).new()
    regions = Both(2 * MiB, lambda _, __, size, ___: ShmBacking(memory, size, disposal))
    region = regions.create(b"r", 0o600, 0, 0)
    regions.make(region, 2 * MiB, 2 * MiB, read_only=False)
    regions.commit(region)
    regions.attach(region, os.getpid(), 0, -1, writable=True)
    yield region
    regions.close()
    disposal.close()


async def test_readers_wait_for_one_measurement_and_not_too_many_do(
    region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, asked = threading.Event(), []
    ask = pagetables._ask_kernel

    def slow(seen: Any) -> None:
        asked.append(seen)
        release.wait()
        ask(seen)

    monkeypatch.setattr(pagetables, "_ask_kernel", slow)
    tables = pagetables.PageTables()
    texts: list[str] = []

    async def read() -> None:
        texts.append(await tables.text(region))

    async with trio.open_nursery() as nursery:
        for _ in range(1 + pagetables.MOST_WAITING):
            nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Refused) as caught:
            await tables.text(region)
        assert caught.value.code == errno.EAGAIN
        release.set()
    assert len(texts) == 1 + pagetables.MOST_WAITING
    assert len(set(texts)) == len(asked) == 1
    assert f"\n{os.getpid()} " in texts[0]


async def test_an_address_space_that_is_locked_does_not_hold_up_the_reader(
    region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(pagetables, "_ask_kernel", lambda _: release.wait())
    monkeypatch.setattr(pagetables, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(pagetables, "FRESH_SECONDS", 0.0)
    tables = pagetables.PageTables()
    # The second one does not even get a thread.
    for _ in range(2):
        text = await tables.text(region)
        assert "\ntook: - s" in text
        assert "\nsharers: 1 processes" in text
    release.set()


async def test_a_sharer_that_ends_meanwhile_is_not_told_of(
    region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sharer,) = region.sharers.values()
    ended = threading.Event()
    sharer.ended = ended.is_set
    monkeypatch.setattr(pagetables, "_ask_kernel", lambda _: ended.set())
    assert "\nsharers: 0 processes" in await pagetables.PageTables().text(region)
