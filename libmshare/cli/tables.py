"""`mshare ptes` without a name: where page tables go, on the whole machine; no daemon needed."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from libmshare.cli import listing, output, regions
from libmshare.cli.ask import bounded
from libmshare.cli.errors import CommandError
from libmshare.cli.output import Column, printable_line
from libmshare.cli.views import Sort, View
from msharetables import proc, survey
from msharetables.calls import TABLE
from msharetables.objects import COLLAPSIBLE, Kind
from msharetables.survey import Object, Process, Survey

if TYPE_CHECKING:
    from rich.console import RenderableType

WORTH_ADVICE: Final = 4 << 20
"""How much of page tables is worth a line of advice (bytes)."""
REGIONS_SECONDS: Final = 2.0
"""How long the daemon has to tell the names of its regions."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for."""

    pids: tuple[int, ...]
    """With all that they started; none: everybody."""
    by: View
    sort: Sort
    top: int
    """How many lines; 0: all."""


_Row = tuple[dict[Sort, Any], list[str]]


def take(wanted: Wanted) -> Survey:
    """Look, and call regions by their names.  Raises CommandError."""
    chosen = None
    if wanted.pids:
        for pid in wanted.pids:
            if not os.path.exists(f"/proc/{pid}"):
                raise CommandError(f"{pid}: no such process")
        chosen = proc.with_children(wanted.pids)
    found = look(chosen)
    if wanted.pids and not found.processes:
        raise CommandError("none of these processes has memory: kernel threads, or ended")
    return found


def look(chosen: Iterable[int] | None = None) -> Survey:
    """Take a survey, and call regions by their names.  Raises CommandError."""
    try:
        found = survey.take(chosen)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            raise CommandError(
                "this kernel cannot tell page tables (PAGEMAP_SCAN, Linux 6.7); `grep PageTables "
                "/proc/meminfo` and VmPTE in /proc/PID/status are what it has"
            ) from None
        raise CommandError(f"/proc: {error.strerror}") from None
    _name_regions(found.objects)
    return found


def _name_regions(objects: Sequence[Object]) -> None:
    """If msharefs is mounted, and its daemon tells."""
    if not any(each.name.kind in (Kind.SHM, Kind.HUGETLB) for each in objects):
        return
    try:
        known = bounded(regions.everything, REGIONS_SECONDS)
    except CommandError:
        return
    names = {
        region.info["backing"].partition(" ")[2].lstrip("/"): region.name
        for region in known
        if "backing" in region.info
    }
    for each in objects:
        name = names.get(each.name.text.lstrip("/"))
        if name is not None:
            each.label = f"region {os.fsdecode(name)}"


def ptes(wanted: Wanted, *, json: bool) -> None:
    """Print it once.  Raises CommandError."""
    found = take(wanted)
    if json:
        output.write_json(record(found))
        return
    for line in heading(found, everybody=not wanted.pids):
        output.write(line)
    output.write("")
    columns, rows = table(found, wanted)
    output.write_table(columns, rows)
    for line in advice(found):
        output.write(line)


def live(wanted: Wanted, interval: float) -> None:
    """Show it until q or Ctrl-C, new every `interval` seconds.  Raises CommandError."""
    from rich.console import Console  # noqa: PLC0415 - a pipe does not pay for it
    from rich.live import Live  # noqa: PLC0415

    from libmshare.cli.keys import keys  # noqa: PLC0415

    console = Console(highlight=False)
    with keys() as pressed_q, Live(console=console, screen=True, auto_refresh=False) as screen:
        while True:
            screen.update(_page(take(wanted), wanted, console.height), refresh=True)
            if pressed_q(interval):
                return


def _page(found: Survey, wanted: Wanted, height: int) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415

    lines = heading(found, everybody=not wanted.pids)
    columns, rows = table(found, wanted)
    return Group(
        *(Text(line, overflow="ellipsis", no_wrap=True) for line in lines),
        "",
        output.rich_table(columns, rows[: max(height - len(lines) - 4, 1)]),
        Text("q quits", style="dim"),
    )


def heading(found: Survey, *, everybody: bool) -> list[str]:
    """What it comes to, and how much of the machine's page tables that is."""
    seen = sum(process.tables is not None for process in found.processes)
    total = (
        f"{output.size(found.explained)} of page tables in {seen} process"
        f"{'' if seen == 1 else 'es'}, looked at in "
        f"{found.seconds:.2f} s: {output.size(found.shared)} for shared memory, "
        f"{output.size(found.small - found.shared)} for private, "
        f"{output.size(found.above + found.top)} in the levels above"
    )
    lines = [total]
    if found.machine:
        part = 100 * found.explained / found.machine
        text = f"{part:.1f}% of the machine's PageTables ({found.machine >> 10} kB)"
        if everybody:
            rest = max(found.machine - found.explained, 0)
            text += f"; the rest, {rest >> 10} kB, is the kernel's own"
            if _partial(found):
                text += " and of others that were not looked at"
        lines.append(text)
    return [*lines, *unseen(found)]


def unseen(found: Survey) -> list[str]:
    """A line about those that could not be looked at, if there are any."""
    count = sum(process.tables is None for process in found.processes)
    if not count:
        return []
    return [
        f"{count} process{'' if count == 1 else 'es'} could not be looked at, "
        f"{output.size(found.unseen)}: "
        + ", ".join(sorted({p.lacking for p in found.processes if p.lacking}))
        + ("" if os.geteuid() == 0 else "; other users' processes take root")
    ]


def _partial(found: Survey) -> bool:
    return any(process.tables is None for process in found.processes) or os.geteuid() != 0


def table(found: Survey, wanted: Wanted) -> tuple[Sequence[Column], list[list[str]]]:
    """The lines that were asked for, the first ones of them."""
    columns, rows = _VIEWS[wanted.by](found)
    rows.sort(key=lambda row: _order(row[0], wanted.sort))
    shown = rows[: wanted.top] if wanted.top else rows
    return columns, [cells for _, cells in shown]


def _order(keys: dict[Sort, Any], sort: Sort) -> tuple[Any, ...]:
    name = keys[Sort.NAME]
    return (name,) if sort is Sort.NAME else (-keys.get(sort, keys[Sort.TABLES]), name)


def _objects(found: Survey) -> tuple[Sequence[Column], list[_Row]]:
    columns = (
        Column("TABLES", right=True),
        Column("IF-COLLAPSED", right=True),
        Column("SIZE", right=True),
        Column("SHARERS", right=True),
        Column("CONGRUENT", right=True),
        Column("OBJECT"),
    )
    rows: list[_Row] = []
    for each in found.objects:
        many = len(each.sharers)
        if not each.tables and not any(part.huge for part in each.sharers.values()):
            continue
        collapsible = each.name.kind in COLLAPSIBLE
        keys = {
            Sort.TABLES: each.tables,
            Sort.RECLAIMABLE: each.reclaimable,
            Sort.SIZE: each.size,
            Sort.SHARERS: many,
            Sort.NAME: each.label,
        }
        cells = [
            output.size(each.tables),
            output.size(each.tables - each.reclaimable) if collapsible else "-",
            output.size(each.size),
            str(many),
            f"{each.congruent} of {many}" if collapsible else "-",
            printable_line(each.label),
        ]
        rows.append((keys, cells))
    return columns, rows


def _processes(found: Survey) -> tuple[Sequence[Column], list[_Row]]:
    columns = (
        Column("PID", right=True),
        Column("USER"),
        Column("TABLES", right=True),
        Column("SHARED", right=True),
        Column("PRIVATE", right=True),
        Column("ABOVE", right=True),
        Column("EMPTY", right=True),
        Column("UNIT"),
        Column("PROGRAM"),
    )
    rows: list[_Row] = []
    for each in found.processes:
        seen = each.tables
        parts = (
            [
                seen.shared * TABLE,
                (seen.small - seen.shared) * TABLE,
                (seen.middle + seen.upper) * TABLE,
                max(each.other, 0),
            ]
            if seen
            else [None] * 4
        )
        keys = {
            Sort.TABLES: each.status.tables,
            Sort.RECLAIMABLE: _reclaimable(each),
            Sort.SIZE: each.status.size,
            Sort.NAME: each.status.name,
        }
        cells = [
            str(each.pid),
            listing.user(each.status.uid),
            output.size(each.status.tables),
            *map(output.size, parts),
            printable_line(each.unit),
            printable_line(each.status.name),
        ]
        rows.append((keys, cells))
    return columns, rows


def _reclaimable(process: Process) -> int:
    if process.tables is None:
        return 0
    return sum(part.reclaimable() for part in process.tables.parts.values()) * TABLE


def _users(found: Survey) -> tuple[Sequence[Column], list[_Row]]:
    return _groups(found, "USER", lambda process: listing.user(process.status.uid))


def _units(found: Survey) -> tuple[Sequence[Column], list[_Row]]:
    return _groups(found, "UNIT", lambda process: process.unit)


def _groups(
    found: Survey, title: str, of: Callable[[Process], str]
) -> tuple[Sequence[Column], list[_Row]]:
    columns = (
        Column("TABLES", right=True),
        Column("RECLAIMABLE", right=True),
        Column("PROCESSES", right=True),
        Column(title),
    )
    groups: dict[str, list[Process]] = defaultdict(list)
    for process in found.processes:
        groups[of(process)].append(process)
    rows: list[_Row] = []
    for name, members in groups.items():
        tables = sum(process.status.tables for process in members)
        back = sum(map(_reclaimable, members))
        keys = {
            Sort.TABLES: tables,
            Sort.RECLAIMABLE: back,
            Sort.SHARERS: len(members),
            Sort.NAME: name,
        }
        cells = [output.size(tables), output.size(back), str(len(members)), printable_line(name)]
        rows.append((keys, cells))
    return columns, rows


_VIEWS: Final[dict[View, Callable[[Survey], tuple[Sequence[Column], list[_Row]]]]] = {
    View.OBJECT: _objects,
    View.PROCESS: _processes,
    View.USER: _users,
    View.UNIT: _units,
}


def advice(found: Survey) -> list[str]:
    """What to do, for objects where it is worth it."""
    lines = []
    for each in found.objects:
        if each.name.kind not in COLLAPSIBLE or each.tables < WORTH_ADVICE:
            continue
        label = printable_line(each.label)
        if each.reclaimable >= WORTH_ADVICE:
            lines.append(
                f"{label}: {output.size(each.reclaimable)} can be freed now: mshare collapse "
                f"--pid {min(each.sharers)}"
            )
        elif each.congruent < len(each.sharers):
            lines.append(f"{label}: {not_congruent(each)}")
    return ["", *lines] if lines else []


def not_congruent(each: Object) -> str:
    """Why an object's tables cannot be had back, and what to do before its next start."""
    how = (
        "mount -o remount,huge=advise its tmpfs"
        if each.name.kind in (Kind.SHM, Kind.TMPFS)
        else "echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    )
    return (
        f"its address fits huge pages in {each.congruent} of {len(each.sharers)} sharers; before "
        f"its next start: {how}, or start it with `mshare run`"
    )


def record(found: Survey) -> dict[str, Any]:
    """For JSON; sizes in bytes."""
    return {
        "machine": found.machine,
        "explained": found.explained,
        "shared": found.shared,
        "private": found.small - found.shared,
        "above": found.above,
        "top": found.top,
        "not_looked_at": found.unseen,
        "seconds": round(found.seconds, 3),
        "objects": [object_record(each) for each in found.objects],
        "processes": [_process_record(each) for each in found.processes],
    }


def object_record(each: Object) -> dict[str, Any]:
    """One object, for JSON."""
    return {
        "name": each.label,
        "kind": each.name.kind.value,
        "device": f"{os.major(each.key.device)}:{os.minor(each.key.device)}",
        "inode": each.key.inode,
        "size": each.size,
        "sharers": sorted(each.sharers),
        "congruent": each.congruent,
        "tables": each.tables,
        "reclaimable": each.reclaimable,
    }


def _process_record(each: Process) -> dict[str, Any]:
    seen = each.tables
    return {
        "pid": each.pid,
        "name": each.status.name,
        "uid": each.status.uid,
        "cgroup": each.cgroup,
        "unit": each.unit,
        "vmpte": each.status.tables,
        "explained": seen.bytes if seen else None,
        "shared": seen.shared * TABLE if seen else None,
        "private": (seen.small - seen.shared) * TABLE if seen else None,
        "above": (seen.middle + seen.upper) * TABLE if seen else None,
        "reclaimable": _reclaimable(each),
        "lacking": each.lacking or None,
    }
