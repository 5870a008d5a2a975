"""`mshare ls`, `info`, `maps`, `ptes`: what there is."""

from __future__ import annotations

import contextlib
import functools
import grp
import pwd
import sys
from typing import Final

from libmshare import texts
from libmshare.cli import output, regions
from libmshare.cli.ask import bounded
from libmshare.cli.output import Column, printable, printable_line

COLUMNS: Final = (
    Column("NAME"),
    Column("ADDRESS", right=True),
    Column("SIZE", right=True),
    Column("MEMORY", right=True),
    Column("SHARERS", right=True),
    Column("BACKING"),
    Column("OWNER"),
    Column("MODE"),
)
SHARER_COLUMNS: Final = (
    Column("PID", right=True),
    Column("USER"),
    Column("ACCESS"),
    Column("SINCE"),
    Column("COMMAND"),
)


def row(region: regions.Region) -> list[str]:
    """A region's line in `ls`."""
    return [
        printable(region.name) + (" (removed)" if region.removed else ""),
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


def ls(timeout: float, *, json: bool, removed: bool = False) -> None:
    """All regions; with `removed` also those that have lost their names, and who has them."""

    def ask() -> list[tuple[regions.Region, list[texts.Sharer]]]:
        return [
            (region, regions.holders(region) if region.removed else [])
            for region in regions.everything(removed=removed)
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
