"""The text file `pagetables`: what the page tables of a region's sharers cost.

Everything is asked of the kernel when the file is opened, by a thread, so that page
faults are served meanwhile.  The work is bounded whoever reads: one region is measured
at a time and at most once a second, a sharer costs two small files of /proc, and of
large regions with many sharers a sample is taken.  A process whose mmap_lock is held
stops the thread, and not the daemon: then the file says what was had until then.

How a table that is shared is told from one that is not (hugetlb): a page in a slot's
shared table has one mapcount for all who share it.  So where M tables have a page
(/proc/kpagecount), and the host mapping, W writers and R readers have it in their
pagemap, M - 1 - R of the writers have a table of their own.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from msharefsd.errors import Refused
from msharefsd.linux import processes
from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.memory.hugetlb import SLOT, HugetlbBacking
from msharefsd.paging.pages import Pages, pages_of
from msharefsd.region.region import Region, Sharer
from msharefsd.threads.breath import Breath
from msharetables.pagemap import Category, Pagemap, TableCounts

TABLE: Final = 4096
"""The size of a page table; with 4 KiB pages one of PMD entries maps a SLOT."""
FRESH_SECONDS: Final = 1.0
PATIENCE_SECONDS: Final = 5.0
MOST_WAITING: Final = 16
"""Of pyfuse3's workers, which are 99."""
MOST_LOOKS: Final = 20_000
"""How many slots of sharers are looked at, at two microseconds each."""
SCAN_SECONDS: Final = 0.3
"""How long sharers are searched for tables of 4 KiB pages: 7 ms for a GiB of them."""
SCANNED_AT_ONCE: Final = 256 << 20
"""For how much of it a sharer's mmap_lock is held, for reading (bytes)."""
MOST_SHOWN: Final = 50


@dataclass(slots=True)
class _Slot:
    """1 GiB of a hugetlb region, which has one page of PMD entries."""

    start: int
    """Offset in the region; a slot at the region's ends may lie in it in part."""
    end: int
    whole: bool
    protected: bool
    in_host: bool = False
    """Whether the host mapping has a table."""
    page: int | None = None
    """Offset of its first page that the host mapping has."""
    pages: int = 0
    mapped_by: int | None = None
    """How many tables have that page."""
    looked: bool = False
    """Whether the sharers were looked at here."""
    writers: int = 0
    readers: int = 0
    """Sharers that have a table here."""
    strangers: int = 0
    """Those of them whose table has not the page, and so is another one."""
    reading: int = 0
    """Readers that have the page."""

    @property
    def tables(self) -> int | None:
        """How many tables there are."""
        return None if self.mapped_by is None else self.mapped_by + self.strangers

    @property
    def own(self) -> int:
        """How many writers have a table of their own; 0 if that is not known."""
        return self.writers - (self.writers if self.sharing is None else self.sharing)

    @property
    def cause(self) -> str:
        """What ends sharing in the whole slot."""
        return "protected" if self.protected else "-" if self.whole else "partial"

    @property
    def sharing(self) -> int | None:
        """How many writers use the host mapping's table."""
        if not self.looked or self.mapped_by is None:
            return None
        having = self.writers + self.readers - self.strangers - self.reading
        own = max(self.mapped_by - 1 - self.reading, 0)
        return max(having - own, 0)


@dataclass(slots=True)
class _Process:
    """A sharer, as the thread sees it."""

    sharer: Sharer
    name: str = ""
    vmpte: int | None = None
    """VmPTE in bytes."""
    slots: list[_Slot] | None = None
    """Where it has a table, of the slots that were looked at."""
    small: int | None = None
    """Tables of 4 KiB pages in the region."""
    huge: int = 0
    """Huge pages that are mapped as such."""


@dataclass(slots=True)
class _Measurement:
    """One look at one region; the thread fills it in as it goes on."""

    region: Region
    page: int
    present: int
    hugetlb: bool
    slots: list[_Slot]
    processes: list[_Process]
    host: int | None
    collapsed: int
    collapse_calls: dict[str, int]
    protected: int
    began: float = field(default_factory=time.monotonic)
    took: float | None = None
    machine: int | None = None
    """PageTables of /proc/meminfo in bytes."""
    lacking: dict[str, str] = field(default_factory=dict)
    """What could not be measured, and why."""

    def lacks(self, what: str, error: OSError) -> None:
        if error.errno not in (errno.ESRCH, errno.ENOENT):  # it has ended
            self.lacking.setdefault(what, error.strerror or str(error))


class PageTables:
    """Makes the file's text, for one reader at a time."""

    def __init__(self) -> None:
        self._turn = trio.Lock()
        self._thread = trio.CapacityLimiter(1)
        self._texts: dict[int, tuple[float, str]] = {}
        """By region id: when it was measured, and what the file says."""

    async def text(self, region: Region) -> str:
        """What the file says now; measured within the last second.

        Raises Refused(EAGAIN) when too many wait for that already.
        """
        if self._turn.statistics().tasks_waiting >= MOST_WAITING:
            raise Refused(errno.EAGAIN, "too many readers: try again")
        async with self._turn:
            now = time.monotonic()
            self._texts = {
                number: (at, text)
                for number, (at, text) in self._texts.items()
                if now - at < FRESH_SECONDS
            }
            if region.id not in self._texts:
                text = await self._measure(region)
                self._texts[region.id] = (time.monotonic(), text)
            return self._texts[region.id][1]

    async def _measure(self, region: Region) -> str:
        if region.backing is None:
            return "# The region has no memory yet.\n"
        seen = _look_at(region)
        with trio.move_on_after(PATIENCE_SECONDS):
            await trio.to_thread.run_sync(
                _ask_kernel, seen, limiter=self._thread, abandon_on_cancel=True
            )
        # A number that was used again while we looked is no sharer's.
        here, breath = [], Breath()
        for process in seen.processes:
            if process.sharer.number in region.sharers and not process.sharer.ended():
                here.append(process)
            await breath.take()
        seen.processes = here
        return await trio.to_thread.run_sync(render, seen)


def _look_at(region: Region) -> _Measurement:
    """What the daemon itself knows; a moment's work."""
    backing = region.backing
    assert backing is not None
    is_hugetlb = isinstance(backing, HugetlbBacking)
    pages = pages_of(region)
    return _Measurement(
        region=region,
        page=backing.page,
        present=backing.allocated(),
        hugetlb=is_hugetlb,
        slots=_slots(region, pages) if is_hugetlb and backing.page < SLOT else [],
        processes=[_Process(sharer) for sharer in region.sharers.values()],
        host=backing.mapped_at,
        collapsed=len(pages.collapsed),
        collapse_calls=dict(pages.collapse_calls),
        protected=pages.armed.length,
    )


def _slots(region: Region, pages: Pages) -> list[_Slot]:
    slots = []
    for start in range(-(region.start % SLOT), region.size, SLOT):
        low, high = max(start, 0), min(start + SLOT, region.size)
        protected = any(True for _ in pages.armed.within(low, high))
        slots.append(_Slot(low, high, high - low == SLOT, protected))
    return slots


# -- in the thread --


def _ask_kernel(seen: _Measurement) -> None:
    with contextlib.suppress(OSError, ValueError):
        seen.machine = _kib_field(_read("/proc/meminfo"), "PageTables")
    if seen.host is not None and seen.slots:
        _host_tables(seen)
    looked = _choose(seen)
    deadline = time.monotonic() + SCAN_SECONDS
    for process in seen.processes:
        if process.sharer.pid <= 0:
            seen.lacking.setdefault("sharers", "processes that this pid namespace does not see")
            continue
        status = processes.read_proc(process.sharer.pid, "status")
        process.name = _field(status, "Name").strip()
        with contextlib.suppress(ValueError):
            process.vmpte = _kib_field(status, "VmPTE")
        try:
            with Pagemap(process.sharer.pid) as pagemap:
                if seen.hugetlb:
                    process.slots = _tables_of(process.sharer, pagemap, looked)
                elif time.monotonic() < deadline:
                    _small_tables(process, pagemap)
        except OSError as error:
            seen.lacks("pagemap of sharers", error)
    seen.took = time.monotonic() - seen.began


def _host_tables(seen: _Measurement) -> None:
    """Where the host mapping has tables, and how many tables there are beside it."""
    assert seen.host is not None
    try:
        with Pagemap("self") as pagemap:
            for slot in seen.slots:
                bounds = seen.host + slot.start, seen.host + slot.end
                for start, end, categories in pagemap.scan(*bounds):
                    slot.in_host = True
                    if Category.PRESENT in categories:
                        slot.pages += (end - start) // seen.page
                        slot.page = start - seen.host if slot.page is None else slot.page
            with TableCounts() as counts:
                for slot in seen.slots:
                    if slot.page is None:
                        continue
                    frame = pagemap.frame(seen.host + slot.page)
                    if frame == 0:
                        raise PermissionError(errno.EPERM, "page frames take CAP_SYS_ADMIN")
                    slot.mapped_by = counts.of(frame)
    except OSError as error:
        seen.lacks("tables", error)


def _choose(seen: _Measurement) -> list[_Slot]:
    """The slots in which sharers are looked at: what is not shared comes first."""
    slots = [slot for slot in seen.slots if slot.page is not None]
    most = max(MOST_LOOKS // max(len(seen.processes), 1), 1)
    chosen = sorted(slots, key=lambda slot: slot.mapped_by == 1)[:most]
    for slot in chosen:
        slot.looked = True
    return sorted(chosen, key=lambda slot: slot.start)


def _tables_of(sharer: Sharer, pagemap: Pagemap, slots: Iterable[_Slot]) -> list[_Slot]:
    """Where a sharer has a table."""
    base = sharer.region.start
    having = []
    for slot in slots:
        assert slot.page is not None
        if pagemap.has(base + slot.page):
            slot.reading += not sharer.writable
        elif any(pagemap.scan(base + slot.start, base + slot.end, TABLE)):
            slot.strangers += 1
        else:
            continue
        having.append(slot)
        slot.writers += sharer.writable
        slot.readers += not sharer.writable
    return having


def _small_tables(process: _Process, pagemap: Pagemap) -> None:
    """Count the tables of 4 KiB pages that a sharer has."""
    region = process.sharer.region
    tables = huge = 0
    last = -1
    end = region.start + region.size
    for at in range(region.start, end, SCANNED_AT_ONCE):
        for low, high, categories in pagemap.scan(at, min(at + SCANNED_AT_ONCE, end)):
            if Category.HUGE in categories:
                huge += (high - low) // HUGE_PAGE
                continue
            first = max(low // HUGE_PAGE, last + 1)
            last = max((high - 1) // HUGE_PAGE, last)
            tables += last + 1 - first
    process.small, process.huge = tables, huge


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def _field(text: str, key: str) -> str:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return value
    return ""


def _kib_field(text: str, key: str) -> int:
    """A field in kB, in bytes.  Raises ValueError if there is none."""
    return int(_field(text, key).removesuffix("kB")) << 10


# -- the text --

_HEAD: Final = (
    "# Page tables of the region: `key: value unit`, then tables.  What a figure is, and where\n"
    "# it comes from, stands behind it.  `-`: not to be had.  Measured at most once a second.\n"
)


@dataclass(frozen=True, slots=True)
class _Line:
    key: str
    value: int | float | str | None
    unit: str
    text: str = ""

    def __str__(self) -> str:
        value = "-" if self.value is None else self.value
        fixed = f"{self.key}: {value} {self.unit}".rstrip()
        return f"{fixed:<40} # {self.text}\n" if self.text else f"{fixed}\n"


def render(seen: _Measurement) -> str:
    """The file's text."""
    taken = None if seen.took is None else round(seen.took, 3)
    lines = [
        _Line("measured", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), ""),
        _Line(
            "took",
            taken,
            "s",
            "" if seen.took is not None else "not finished: a sharer's address space is locked",
        ),
        _Line("backing", seen.region.backing.kind if seen.region.backing else None, ""),
        _Line("page", seen.page, "bytes"),
        _Line("present", seen.present, "bytes", "memory that the region holds (st_blocks)"),
        _Line("sharers", len(seen.processes), "processes"),
        *(_hugetlb_lines(seen) if seen.slots else _other_lines(seen)),
        *_process_lines(seen),
    ]
    text = _HEAD + "".join(map(str, lines))
    for what, why in dict(seen.lacking).items():
        text += f"# not to be had: {what}: {why}\n"
    if seen.slots:
        text += "\n" + "".join(_slot_table(seen.slots))
    return text + "\n" + "".join(_sharer_table(seen.processes))


def _hugetlb_lines(seen: _Measurement) -> Iterator[_Line]:
    slots = [slot for slot in seen.slots if slot.in_host]
    looked = [slot for slot in slots if slot.looked]
    known = [slot.tables for slot in slots if slot.tables is not None]
    of = "" if len(looked) == len(slots) else f", in {len(looked)} of {len(slots)} slots"
    yield _Line(
        "set", len(slots) * TABLE, "bytes",
        f"one set of tables, the host mapping's: {len(slots)}, one a slot of 1 GiB (PAGEMAP_SCAN)",
    )  # fmt: skip
    tables = sum(known) if len(known) == len(slots) else None
    yield _Line(
        "tables", None if tables is None else tables * TABLE, "bytes",
        "what there really is: how many tables have the first page of each slot "
        "(/proc/kpagecount)",
    )  # fmt: skip
    counted = sum(slot.writers + slot.readers for slot in looked)
    yield _Line(
        "counted", counted * TABLE, "bytes",
        f"{counted} tables, each once in every sharer that has it (/proc/PID/pagemap{of})",
    )  # fmt: skip
    yield _Line(
        "unshared", (counted + len(slots)) * TABLE, "bytes",
        "what they would cost if none were shared: set and counted",
    )  # fmt: skip
    yield _Line(
        "unshared-4k", (len(seen.processes) * seen.present) >> 9, "bytes",
        "and with 4 KiB pages, touched by every sharer: calculated, 8 bytes a page",
    )  # fmt: skip
    sharing = [slot.sharing for slot in looked]
    yield _Line(
        "sharing", None if None in sharing else sum(n for n in sharing if n), "tables",
        f"that sharers use together with the host mapping{of}",
    )  # fmt: skip
    yield from _ended(seen.slots, looked)


def _ended(slots: Sequence[_Slot], looked: Sequence[_Slot]) -> Iterator[_Line]:
    """What ended sharing: how many tables of their own sharers have for which cause."""
    protected = sum(slot.own for slot in looked if slot.protected)
    partial = sum(slot.own for slot in looked if not slot.protected and not slot.whole)
    other = sum(slot.own for slot in looked if not slot.protected and slot.whole)
    places = sum(slot.protected for slot in slots)
    yield _Line(
        "own-protected", protected, "tables",
        f"of writers, in {places} slots with write protection: objects that are not writable, "
        "writable MAP_SHARED files",
    )  # fmt: skip
    yield _Line(
        "own-read-only", sum(slot.readers for slot in looked), "tables",
        "of sharers that are attached read-only",
    )  # fmt: skip
    places = sum(not slot.whole for slot in slots)
    yield _Line(
        "own-partial", partial, "tables",
        f"of writers, in {places} slots that the region does not have as a whole",
    )  # fmt: skip
    yield _Line(
        "own-otherwise",
        other,
        "tables",
        "of writers: they changed their window themselves (mlock), or this kernel shares none",
    )


def _other_lines(seen: _Measurement) -> Iterator[_Line]:
    if seen.hugetlb:
        yield _Line(
            "set", 0, "bytes", "a page of 1 GiB needs no table of its own: nothing to share"
        )
        return
    one = -(-seen.present // HUGE_PAGE) * TABLE
    yield _Line(
        "set", one, "bytes",
        "what one process needs that touches all, before huge pages: calculated, a table of 4096 "
        "bytes for 2 MiB",
    )  # fmt: skip
    looked = [process.small for process in seen.processes if process.small is not None]
    yield _Line(
        "tables", sum(looked) * TABLE, "bytes",
        f"{sum(looked)} tables of 4 KiB pages in {len(looked)} of {len(seen.processes)} sharers "
        "(PAGEMAP_SCAN); the kernel shares none of them",
    )  # fmt: skip
    yield _Line(
        "unshared", one * len(seen.processes), "bytes",
        "what they would cost if every sharer had touched all, and no huge pages: calculated",
    )  # fmt: skip
    yield _Line(
        "collapsed", seen.collapsed, "chunks",
        "of 2 MiB that the daemon has made huge pages of: no sharer needs a table for them",
    )  # fmt: skip
    said = ", ".join(f"{what} {count}" for what, count in sorted(seen.collapse_calls.items()))
    yield _Line(
        "attempts", sum(seen.collapse_calls.values()), "calls",
        f"of MADV_COLLAPSE for that, and what the kernel said: {said or '-'}",
    )  # fmt: skip
    yield _Line(
        "protected", seen.protected, "bytes",
        "in ranges with write protection, which are never made huge pages",
    )  # fmt: skip


def _process_lines(seen: _Measurement) -> Iterator[_Line]:
    known = [process.vmpte for process in seen.processes if process.vmpte is not None]
    yield _Line(
        "vmpte", sum(known), "bytes",
        "all page tables of the sharers, those of their programs too, and shared ones once in "
        "each (VmPTE, /proc/PID/status)",
    )  # fmt: skip
    yield _Line(
        "machine", seen.machine, "bytes",
        "all page tables of this machine, shared ones once (PageTables, /proc/meminfo)",
    )  # fmt: skip


def _slot_table(slots: Iterable[_Slot]) -> Iterator[str]:
    """Which slots are shared by how many; neighbours that are alike in one line."""
    yield "SLOTS          PAGES   TABLES  WRITERS READERS SHARING ENDED-BY\n"
    having = (slot for slot in slots if slot.in_host or slot.protected)
    place = {id(slot): number for number, slot in enumerate(slots)}
    for row, group in itertools.groupby(having, key=_slot_row):
        members = [place[id(slot)] for slot in group]
        yield f"{_span(members):<14} {row}\n"


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _slot_row(slot: _Slot) -> str:
    looked = (slot.writers, slot.readers) if slot.looked else (None, None)
    cells = [slot.pages, slot.tables, *looked, slot.sharing]
    return " ".join(f"{'-' if cell is None else cell:<7}" for cell in cells) + f" {slot.cause}"


def _sharer_table(processes: Sequence[_Process]) -> Iterator[str]:
    """The first sharers, and the sum of the rest."""
    yield "PID      ACCESS     VMPTE-kB TABLES-kB OWN-kB   NAME\n"
    for process in processes[:MOST_SHOWN]:
        access = "read-write" if process.sharer.writable else "read-only"
        yield _sharer_row(str(process.sharer.pid), access, [process], process.name)
    rest = processes[MOST_SHOWN:]
    if rest:
        yield _sharer_row("others", f"{len(rest)}", rest, "")


def _sharer_row(pid: str, access: str, processes: Sequence[_Process], name: str) -> str:
    cells = [
        _sum_kib([process.vmpte for process in processes]),
        _sum_kib([_table_bytes(process) for process in processes]),
        _sum_kib([_own_bytes(process) for process in processes]),
    ]
    vmpte, tables, own = ("-" if cell is None else cell for cell in cells)
    return f"{pid:<8} {access:<10} {vmpte:<8} {tables:<9} {own:<8} {name}".rstrip() + "\n"


def _sum_kib(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) >> 10 if known else None


def _table_bytes(process: _Process) -> int | None:
    """What of a sharer's VmPTE is the region's, the part that was looked at."""
    if process.slots is not None:
        return len(process.slots) * TABLE
    return None if process.small is None else process.small * TABLE


def _own_bytes(process: _Process) -> int | None:
    """What nobody else uses.

    Where some writers share a slot's table and some do not, nobody knows which: there
    each is said to have its own.
    """
    if process.slots is None:
        return _table_bytes(process)
    own = [slot for slot in process.slots if not process.sharer.writable or slot.own]
    return len(own) * TABLE
