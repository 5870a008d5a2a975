"""What `mshare top` shows: which lines, of what was seen, on a screen of some size.

Nothing here knows of a terminal: keys come by name and lines go as text.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Final

from libmshare.cli import listing, output
from libmshare.cli.output import Column, printable
from libmshare.cli.regions import Region
from libmshare.cli.views import Order
from libmshare.texts import Sharer
from msharefsd.telemetry.figures import amount, plural

_REGIONS: Final = (
    Column("NAME"),
    Column("MEMORY", right=True, rank=1),
    Column("SHARERS", right=True, rank=2),
    Column("FAULTS/S", right=True, rank=3),
    Column("MB/S", right=True, rank=5),
    Column("SAVED", right=True, rank=4),
    Column("SIZE", right=True, rank=7),
    Column("ADDRESS", right=True, rank=9),
    Column("BACKING", rank=11),
    Column("OWNER", rank=8),
    Column("MODE", rank=10),
)
_SHARERS: Final = (
    Column("REGION", rank=2),
    Column("PID", right=True),
    Column("USER", rank=5),
    Column("ACCESS", rank=6),
    Column("SINCE", rank=7),
    Column("RSS", right=True, rank=3),
    Column("TABLES", right=True, rank=4),
    Column("COMMAND", rank=1),
)
_ORDERS: Final = (
    *(Order.MEMORY, Order.FAULTS, Order.SHARERS, Order.SAVED, Order.SIZE, Order.NAME),
    Order.ADDRESS,
)
"""In the order in which `s` goes through them."""
_LEAST: Final = 16
_PART_OF_A_NAME: Final = 3
"""Names are cut, here and nowhere else, if lines are too long: to so many columns, or to the
third part of the screen."""
_HELP: Final = "q quits  s sort  r reverse  / filter  Tab list  arrows scroll"
_SHORT_HELP: Final = "q quits  s r / Tab arrows"


@dataclass(frozen=True)
class Seen:
    """What there is at one moment."""

    root: str
    time: float
    """By the monotonic clock, seconds."""
    regions: list[Region]
    sharers: list[tuple[Region, Sharer]]
    faults: float
    """Page faults that the daemon has served since it started."""

    def matching(self, pattern: str) -> list[Region]:
        """The regions in whose names the pattern is, with * and ?."""
        wanted = f"*{pattern}*"
        return [
            region
            for region in self.regions
            if pattern in os.fsdecode(region.name)
            or fnmatch.fnmatchcase(os.fsdecode(region.name), wanted)
        ]

    def rate(self, before: Seen | None) -> float | None:
        """Page faults a second since then; None if it cannot be told."""
        return None if before is None else _rate(self, before, self.faults, before.faults)

    def rate_of(self, before: Seen | None, region: Region, key: str) -> float | None:
        """How fast a figure of a region's `info` has grown, a second."""
        if before is None or key not in region.info:
            return None
        other = before._by_directory.get(region.directory)  # noqa: SLF001 - one of ours
        if other is None or other.start != region.start:
            return None
        return _rate(self, before, region.number(key), other.number(key))

    @cached_property
    def _by_directory(self) -> dict[bytes, Region]:
        return {region.directory: region for region in self.regions}


def _rate(now: Seen, before: Seen, count: float, was: float) -> float | None:
    if now.time <= before.time or count < was:  # another daemon has begun to count
        return None
    return (count - was) / (now.time - before.time)


@dataclass(frozen=True, slots=True)
class Part:
    """A table of the page."""

    columns: Sequence[Column]
    lines: Sequence[Callable[[], list[str]]]
    """Each line, made when it is wanted: a thousand processes are not all asked for ten."""

    def rows(self, first: int = 0, count: int | None = None) -> list[list[str]]:
        """Of these lines; of all."""
        last = None if count is None else first + count
        return [line() for line in self.lines[first:last]]


def memory_of(sharer: Sharer) -> tuple[int | None, int | None]:
    """Bytes of memory and of page tables of the whole process; None if it cannot be seen here.

    The daemon's process numbers are those of its pid namespace: the name tells whether
    that process is the one that is meant.
    """
    try:
        with open(f"/proc/{sharer.pid}/status", encoding="utf-8", errors="replace") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    except OSError:
        return None, None
    if status.get("Name", "").strip() != sharer.command.strip():
        return None, None
    rss, tables = (
        int(status[key].split()[0]) * 1024 if key in status else None for key in ("VmRSS", "VmPTE")
    )
    return rss, tables


def heading(now: Seen, before: Seen | None) -> str:
    """One line about everything."""
    memory = sum(region.memory for region in now.regions)
    text = (
        f"{plural(len(now.regions), 'region')}, {plural(len(now.sharers), 'sharer')}, "
        f"{amount(memory)} of memory"
    )
    if removed := [region for region in now.regions if region.removed]:
        text += f" ({amount(sum(each.memory for each in removed))} of it removed)"
    rate = now.rate(before)
    return text if rate is None else f"{text}, {rate:.0f} faults/s"


def page(
    now: Seen, before: Seen | None, order: Order, pattern: str = "", *, reverse: bool = False
) -> tuple[Part, Part]:
    """The regions, and their sharers in the order of these."""
    chosen = listing.in_order(
        now.matching(pattern),
        order,
        reverse=reverse,
        more=lambda region: now.rate_of(before, region, "faults") or 0,
    )
    places = {region.directory: place for place, region in enumerate(chosen)}
    sharers = sorted(
        (each for each in now.sharers if each[0].directory in places),
        key=lambda each: (places[each[0].directory], each[1].pid),
    )
    return (
        Part(_REGIONS, [partial(_row, now, before, region) for region in chosen]),
        Part(_SHARERS, [partial(_sharer_row, *each) for each in sharers]),
    )


def _row(now: Seen, before: Seen | None, region: Region) -> list[str]:
    name, address, size, memory, sharers, *rest = listing.row(region)
    faults, populated = (now.rate_of(before, region, key) for key in ("faults", "populated"))
    return [
        name,
        memory,
        sharers,
        "-" if faults is None else f"{faults:.0f}",
        "-" if populated is None else f"{populated / 1e6:.1f}",
        output.size(region.saved),
        size,
        address,
        *rest,
    ]


def _sharer_row(region: Region, sharer: Sharer) -> list[str]:
    *first, command = listing.sharer_row(sharer)
    return [printable(region.name), *first, *map(output.size, memory_of(sharer)), command]


@dataclass(slots=True)
class Screen:
    """What is looked at, and how."""

    order: Order
    pattern: str = ""
    reverse: bool = False
    typing: bool = False
    """Whether keys go into the pattern."""
    below: bool = False
    """Whether arrows are for the sharers."""
    tops: list[int] = field(default_factory=lambda: [0, 0])
    """Which line of each list comes first."""
    _shown: list[int] = field(default_factory=lambda: [1, 1])
    """How many lines of each are on the screen."""

    def press(self, key: str) -> None:
        """A key: a character, or curses's name of it."""
        if self.typing:
            self._type(key)
            return
        step = max(self._shown[self.below], 1)
        moves = {"KEY_UP": -1, "k": -1, "KEY_DOWN": 1, "j": 1, "KEY_PPAGE": -step}
        moves |= {"KEY_NPAGE": step, " ": step, "KEY_HOME": -1 << 40, "KEY_END": 1 << 40}
        match key:
            case "s":
                self.order = _ORDERS[(_ORDERS.index(self.order) + 1) % len(_ORDERS)]
            case "r":
                self.reverse = not self.reverse
            case "/":
                self.typing = True
            case "\t":
                self.below = not self.below
            case "\x1b":
                self.pattern = ""
            case _:
                self.tops[self.below] = max(0, self.tops[self.below] + moves.get(key, 0))

    def _type(self, key: str) -> None:
        if key in ("\n", "\r", "KEY_ENTER"):
            self.typing = False
        elif key == "\x1b":
            self.typing, self.pattern = False, ""
        elif key in ("KEY_BACKSPACE", "\x7f", "\b"):
            self.pattern = self.pattern[:-1]
        elif len(key) == 1 and key.isprintable():
            self.pattern += key
        self.tops = [0, 0]

    def lines(
        self, now: Seen | None, before: Seen | None, trouble: str, width: int, height: int
    ) -> list[tuple[str, bool]]:
        """The screen's lines, and whether each stands out."""
        if now is None:
            return [(_cut(trouble, width), True), ("", False), ("q quits", False)]
        upper, lower = page(now, before, self.order, self.pattern, reverse=self.reverse)
        space = max(height - 5, 2)  # heading, blank, two titles and the foot
        most = max(space // 2, space - len(upper.lines))
        below = min(len(lower.lines), most)
        above = min(len(upper.lines), space - below)
        self._shown = [above, below]
        found = [(_cut(f"{heading(now, before)}  {printable(now.root)}", width), False)]
        for which, (part, count) in enumerate(((upper, above), (lower, below))):
            top = self.tops[which] = max(0, min(self.tops[which], len(part.lines) - count))
            title, *rows = _table(part.columns, part.rows(top, count), width)
            found.append((_cut(title, width), self.below == bool(which)))
            found += [(_cut(row, width), False) for row in rows]
            if which == 0:
                found.append(("", False))
        del found[max(height - 1, 1) :]
        found.append((self._foot(upper, lower, width), False))
        return found

    def _foot(self, upper: Part, lower: Part, width: int) -> str:
        if self.typing:
            return _cut(f"/{printable(self.pattern) if self.pattern else ''}_", width)
        part = lower if self.below else upper
        first, count = self.tops[self.below], self._shown[self.below]
        of = f"{first + 1}-{first + count} of {len(part.lines)}" if count else "none"
        state = f"{of} by {self.order.value}" + (", reversed" if self.reverse else "")
        if self.pattern:
            state += f", /{printable(self.pattern)}"
        for keys in (_HELP, _SHORT_HELP, "q quits"):
            if len(f"{keys}  {state}") <= width:
                return f"{keys}  {state}"
        return _cut(f"q quits  {state}", width)


def _table(columns: Sequence[Column], rows: list[list[str]], width: int) -> list[str]:
    """Its lines, the titles first, with the columns for which there is room."""
    each = output.widths(columns, rows)
    if sum(each) + output.GAP * (len(each) - 1) > width:
        most = max(width // _PART_OF_A_NAME, _LEAST)
        rows = [[_cut(row[0], most), *row[1:]] for row in rows]
    columns, rows = output.fitted(columns, rows, width)
    return output.plain_table(columns, rows).split("\n")


def _cut(text: str, width: int) -> str:
    """At most so wide, and marked if there was more."""
    if output.columns_of(text) <= width:
        return text
    while text and output.columns_of(text) > width - 1:
        text = text[:-1]
    return f"{text}…"
