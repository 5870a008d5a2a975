"""Where a machine's page tables go: all processes that may be looked at, and what they share."""

from __future__ import annotations

import contextlib
import errno
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from msharetables import proc
from msharetables.calls import TABLE
from msharetables.objects import COLLAPSIBLE, Kernel, Key, Kind, Name
from msharetables.pagemap import Pagemap, TableCounts
from msharetables.patience import Patience
from msharetables.proc import Status
from msharetables.tables import Part, Tables, count

PATIENCE_SECONDS: Final = 5.0
"""How long one process may take: 65,000 mappings, each with a table, take a second."""
_MELTDOWN: Final = Path("/sys/devices/system/cpu/vulnerabilities/meltdown")
_CONTAINER: Final = re.compile(r"(?:([a-z-]+?)-)?([0-9a-f]{64})(?:\.scope)?")


@dataclass(frozen=True, slots=True)
class Process:
    """One process, or why it could not be looked at."""

    pid: int
    status: Status
    cgroup: str
    tables: Tables | None
    lacking: str = ""
    """What kept it from being looked at."""

    @property
    def other(self) -> int:
        """What of VmPTE is not explained: tables without a page in them (bytes)."""
        return self.status.tables - (self.tables.bytes if self.tables else 0)

    @property
    def unit(self) -> str:
        """The unit or container that it is in."""
        return unit(self.cgroup)


@dataclass(slots=True)
class Object:
    """Shared memory, and who has it mapped."""

    key: Key
    name: Name
    label: str = ""
    sharers: dict[int, Part] = field(default_factory=dict)
    """By pid."""
    counted_twice: int = 0
    """hugetlb: tables that several have between them, beyond the first."""

    @property
    def size(self) -> int:
        """Of the largest mapping of it that a sharer has (bytes)."""
        return max(part.size for part in self.sharers.values())

    @property
    def tables(self) -> int:
        """What its page tables take: of small pages; for hugetlb those a level above (bytes)."""
        if self.name.kind is Kind.HUGETLB:
            return (sum(len(p.middle) for p in self.sharers.values()) - self.counted_twice) * TABLE
        return sum(part.tables for part in self.sharers.values()) * TABLE

    @property
    def reclaimable(self) -> int:
        """What of that would go if it were collapsed now (bytes)."""
        if self.name.kind not in COLLAPSIBLE:
            return 0
        return sum(part.reclaimable() for part in self.sharers.values()) * TABLE

    @property
    def congruent(self) -> int:
        """How many sharers can have huge pages of it."""
        return sum(part.congruent for part in self.sharers.values())


@dataclass(slots=True)
class Survey:
    """What was found."""

    processes: list[Process] = field(default_factory=list)
    objects: list[Object] = field(default_factory=list)
    """Those with the largest tables first."""
    machine: int | None = None
    """PageTables of /proc/meminfo (bytes)."""
    seconds: float = 0.0
    """What it took."""

    @property
    def small(self) -> int:
        """Tables of small pages (bytes)."""
        return sum(p.tables.small for p in self.processes if p.tables) * TABLE

    @property
    def shared(self) -> int:
        """Those of them that are for shared memory."""
        return sum(p.tables.shared for p in self.processes if p.tables) * TABLE

    @property
    def above(self) -> int:
        """The two levels above (bytes)."""
        seen = [process.tables for process in self.processes if process.tables]
        return sum(t.middle + t.upper for t in seen) * TABLE - self.counted_twice

    @property
    def counted_twice(self) -> int:
        """What hugetlb's sharers have between them, beyond the first (bytes)."""
        return sum(each.counted_twice for each in self.objects) * TABLE

    @property
    def top(self) -> int:
        """The highest level, which VmPTE does not have (bytes)."""
        return sum(p.tables is not None for p in self.processes) * top_level()

    @property
    def explained(self) -> int:
        """All of that (bytes)."""
        return self.small + self.above + self.top

    @property
    def unseen(self) -> int:
        """VmPTE of the processes that could not be looked at (bytes)."""
        return sum(p.status.tables for p in self.processes if p.tables is None)


def take(pids: Iterable[int] | None = None, patience: Patience | None = None) -> Survey:
    """Look at these processes, or all; what has ended meanwhile is left out.

    Raises OSError (ENOTTY) on a kernel that has no PAGEMAP_SCAN.
    """
    began = time.monotonic()
    survey = Survey()
    kernel = Kernel.learn()
    patience = patience or Patience(PATIENCE_SECONDS)
    try:
        for pid in sorted(proc.pids() if pids is None else pids):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                process = look(pid, kernel, patience)
                if process is not None:
                    survey.processes.append(process)
        survey.machine = proc.page_tables()
        survey.objects = objects(survey.processes, kernel)
    finally:
        patience.close()
    survey.seconds = time.monotonic() - began
    return survey


def look(pid: int, kernel: Kernel, patience: Patience) -> Process | None:
    """One process; None if it has no memory.  Raises OSError: it is gone, or ENOTTY."""
    status = proc.status(pid)
    if status is None:
        return None
    group = proc.cgroup(pid)
    try:
        tables = patience.call(count, pid, kernel, whose=status.uid)
    except (FileNotFoundError, ProcessLookupError):
        raise
    except PermissionError:
        return Process(pid, status, group, None, "permission denied")
    except OSError as error:
        if error.errno == errno.ENOTTY:
            raise
        return Process(pid, status, group, None, str(error))
    # What it has now, if it went on meanwhile.
    status = proc.status(pid) or status
    tables.fit(status.tables)
    return Process(pid, status, group, tables)


def objects(processes: Sequence[Process], kernel: Kernel) -> list[Object]:
    """What these have mapped between them: those with the largest tables first."""
    found: dict[Key, Object] = {}
    programs: dict[Key, Counter[str]] = {}
    for process in processes:
        if process.tables is None:
            continue
        for key, part in process.tables.parts.items():
            if key not in found:
                found[key] = Object(key, kernel.name(process.tables.names[key]))
                programs[key] = Counter()
            found[key].sharers[process.pid] = part
            programs[key][process.status.name] += 1
    for key, each in found.items():
        each.label = each.name.label(min(programs[key].most_common(), key=_commonest)[0])
        if each.name.kind is Kind.HUGETLB:
            with contextlib.suppress(OSError):
                each.counted_twice = _counted_twice(each)
    return sorted(found.values(), key=lambda each: (-each.tables, -each.size, each.label))


def _commonest(program: tuple[str, int]) -> tuple[int, str]:
    return -program[1], program[0]


def _counted_twice(huge: Object) -> int:
    """Tables of a hugetlb object that are one and counted in each who has it.

    Sharers of a table have the same first page in it, and /proc/kpagecount tells how many
    tables have that page.  Raises OSError: page frames are told to CAP_SYS_ADMIN alone.
    """
    alike: Counter[int] = Counter()
    for pid, part in huge.sharers.items():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), Pagemap(pid) as pagemap:
            alike.update(filter(None, map(pagemap.frame, part.middle.values())))
    with TableCounts() as counts:
        return sum(max(having - counts.of(frame), 0) for frame, having in alike.items())


def top_level() -> int:
    """What the highest table of a process takes: two pages with page-table isolation (bytes)."""
    try:
        isolated = b"PTI" in _MELTDOWN.read_bytes()
    except OSError:
        isolated = False
    return TABLE * (2 if isolated else 1)


def unit(cgroup: str) -> str:
    """What people call a cgroup: a unit, a container; its last part; "-" for the root."""
    parts = [part for part in cgroup.split("/") if part]
    for part in reversed(parts):
        if (match := _CONTAINER.fullmatch(part)) is not None:
            return f"{match[1] or 'container'} {match[2][:12]}"
        if part.endswith((".service", ".scope", ".slice", ".socket", ".mount")):
            return part
    return parts[-1] if parts else "-"
