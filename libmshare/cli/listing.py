"""`mshare ls`, `info`, `maps`, `ptes`: what there is."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import grp
import os
import pwd
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from libmshare import texts
from libmshare.cli import output, regions
from libmshare.cli.ask import bounded
from libmshare.cli.errors import CommandError, no_such_region
from libmshare.cli.output import Column, printable, printable_line
from libmshare.cli.views import Order

COLUMNS: Final = (
    Column("NAME"),
    Column("ADDRESS", right=True, rank=4),
    Column("SIZE", right=True, rank=3),
    Column("MEMORY", right=True, rank=1),
    Column("SHARERS", right=True, rank=2),
    Column("BACKING", rank=7),
    Column("OWNER", rank=5),
    Column("MODE", rank=6),
)
SHARER_COLUMNS: Final = (
    Column("PID", right=True),
    Column("USER", rank=2),
    Column("ACCESS", rank=3),
    Column("SINCE", rank=4),
    Column("COMMAND", rank=1),
)
_WILD: Final = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which regions, and in which order."""

    patterns: Sequence[str] = ()
    """Names, with * and ? and [...]; all, if there are none."""
    user: str | None = None
    order: Order = Order.NAME
    reverse: bool = False

    def of(self, found: Iterable[regions.Region]) -> list[regions.Region]:
        """Raises CommandError if a name, or the user, is nobody's."""
        owner = None if self.user is None else _uid(self.user)
        chosen = [
            region for region in found if self._is_named(region) and owner in (None, region.uid)
        ]
        names = {os.fsdecode(region.name) for region in chosen}
        for pattern in self.patterns:
            if pattern not in names and not _WILD & set(pattern):
                raise no_such_region(os.fsencode(pattern))
        return in_order(chosen, self.order, reverse=self.reverse)

    def _is_named(self, region: regions.Region) -> bool:
        name = os.fsdecode(region.name)
        return not self.patterns or any(
            name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns
        )


def in_order(
    found: Iterable[regions.Region],
    order: Order,
    *,
    reverse: bool = False,
    more: Callable[[regions.Region], float] = lambda _: 0,
) -> list[regions.Region]:
    """Figures from the largest down, what is not told last; names and addresses up.

    `more` is what Order.FAULTS goes by.
    """
    keys: dict[Order, Callable[[regions.Region], float]] = {
        Order.NAME: lambda _: 0,
        Order.MEMORY: lambda region: -region.memory,
        Order.SIZE: lambda region: -(region.size or -1),
        Order.SHARERS: lambda region: -(-1 if region.sharers is None else region.sharers),
        Order.ADDRESS: lambda region: float("inf") if region.start is None else region.start,
        Order.SAVED: lambda region: -(region.saved or 0),
        Order.FAULTS: lambda region: -more(region),
    }
    key = keys[order]
    return sorted(
        found, key=lambda region: (key(region), region.name, region.removed), reverse=reverse
    )


def row(region: regions.Region) -> list[str]:
    """A region's line in `ls`."""
    return [
        printable(region.name)
        + (" (removed)" if region.removed else "")
        + (" (not filled)" if region.forsaken else ""),
        output.address(region.start),
        output.size(region.size),
        output.size(region.memory),
        "-" if region.sharers is None else str(region.sharers),
        region.backing or "-",
        user(region.uid),
        f"{region.mode:04o}",
    ]


def sharer_row(sharer: texts.Sharer) -> list[str]:
    """A sharer's line."""
    return [
        str(sharer.pid),
        user(sharer.uid),
        sharer.access,
        sharer.since,
        printable_line(sharer.command),
    ]


def _uid(user: str) -> int:
    """Raises CommandError."""
    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        raise CommandError(f"{printable(user)}: no such user; give a name or a number") from None


@functools.cache
def user(uid: int) -> str:
    """The user's name, or the number of one that has none here."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _group(gid: int) -> str:
    with contextlib.suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)


def ls(timeout: float, choice: Choice, *, json: bool, removed: bool = False) -> None:
    """Regions; with `removed` also those that have lost their names, and who has them."""

    def ask() -> list[tuple[regions.Region, list[texts.Sharer]]]:
        return [
            (region, regions.holders(region) if region.removed else [])
            for region in choice.of(regions.everything(removed=removed))
        ]

    found = bounded(ask, timeout)
    if json:
        output.write_json(
            [
                region.record()
                | ({"processes": [each.record() for each in holders]} if region.removed else {})
                for region, holders in found
            ]
        )
        return
    if not found and output.on_terminal():
        print("no regions", file=sys.stderr)  # noqa: T201 - not a part of the output
        return
    output.write_table(COLUMNS, [row(region) for region, _ in found])
    if held := [(region, each) for region, holders in found for each in holders]:
        output.write("")
        rows = [[printable(region.name), *sharer_row(each)] for region, each in held]
        output.write_table((Column("REMOVED"), *SHARER_COLUMNS), rows)


def info(name: bytes, timeout: float, *, json: bool) -> None:
    """One region, and who has attached it."""

    def ask() -> tuple[regions.Region, list[texts.Sharer]]:
        region = regions.one(name)
        return region, regions.sharers(name) if region.info else []

    region, sharers = bounded(ask, timeout)
    if json:
        processes = [sharer.record() for sharer in sharers]
        output.write_json(region.record() | {"processes": processes})
        return
    # What info tells, in its order; what people read in their units.
    texts = dict(region.info) or {"name": ""}
    texts |= {
        "name": printable(region.name),
        "owner": f"{user(region.uid)}:{_group(region.gid)}",
        "mode": f"{region.mode:04o}",
        "memory": f"{region.memory} ({output.size(region.memory)})",
    }
    if region.size is not None:
        texts["size"] = f"{region.size} ({output.size(region.size)})"
    if region.number("awaited"):
        texts["awaited"] += f" ({output.size(region.number('awaited'))})"
    if region.forsaken:
        texts["bringer"] += "; mshare pull of the same image goes on with it"
    width = max(map(len, texts)) + 2
    for key, value in texts.items():
        output.write(printable_line(f"{key + ':':<{width}}{value}"))
    if sharers:
        output.write("")
        output.write_table(SHARER_COLUMNS, [sharer_row(sharer) for sharer in sharers])


def maps(name: bytes, timeout: float, *, json: bool) -> None:
    """A region's objects."""
    text = bounded(lambda: regions.text(name, "maps"), timeout)
    if json:
        output.write_json(texts.parse_maps(text))
    else:
        _write_text(text)


def ptes(name: bytes, timeout: float) -> None:
    """What page tables a region's sharers have, as the daemon tells it."""
    _write_text(bounded(lambda: regions.text(name, "pagetables"), timeout))


def _write_text(text: str) -> None:
    for line in text.removesuffix("\n").split("\n") if text else []:
        output.write(printable_line(line))
