"""What the page shows, looked at every interval, and how it was before.

One look is for all pages that are open; it is that of `mshare top`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from libmshare import texts
from libmshare.cli import listing, regions, top
from libmshare.cli.errors import CommandError
from libmshare.cli.output import printable, printable_line
from libmshare.cli.regions import Region
from libmshare.cli.screen import Seen
from libmshare.cli.views import Order
from libmshare.cli.web.asking import Asker
from libmshare.texts import Sharer

POINTS: Final = 900
"""How many looks are remembered: half an hour, at one every two seconds."""
MOST_OBJECTS: Final = 5000
"""Of one region, what the page is sent of its map."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one look has found."""

    seen: Seen
    record: dict[str, Any]
    """For JSON."""


def look(before: Seen | None) -> Look:
    """In the child: ask the daemon, and look at the sharers.  Raises CommandError."""
    now = top.take()
    try:
        daemon = regions.daemon()
    except CommandError:  # an old one tells nothing of itself
        daemon = {}
    return Look(now, record(now, before, daemon))


def record(now: Seen, before: Seen | None, daemon: dict[str, str]) -> dict[str, Any]:
    """A look for JSON: what `mshare top --json` tells, with ids, and names for people."""
    found = [
        {
            "id": region.directory.hex(),
            "label": printable(region.name),
            "owner": listing.user(region.uid),
        }
        | top.region_record(now, before, region)
        for region in listing.in_order(now.regions, Order.NAME)
    ]
    processes = [_sharer(region, sharer) for region, sharer in now.sharers]
    by_pid = {each["pid"]: each["tables"] or 0 for each in processes}
    populated = [each["populated_per_second"] for each in found]
    return {
        "root": printable(now.root),
        "daemon": {key: daemon[key] for key in ("version", "pid", "started") if key in daemon},
        "faults_per_second": now.rate(before),
        "populated_per_second": None if before is None else sum(each or 0 for each in populated),
        "memory": sum(region.memory for region in now.regions),
        "saved": sum(region.saved or 0 for region in now.regions),
        "tables": sum(by_pid.values()),
        "regions": found,
        "processes": processes,
    }


def _sharer(region: Region, sharer: Sharer) -> dict[str, Any]:
    return {
        "id": region.directory.hex(),
        "label": printable_line(sharer.command),
        "user": listing.user(sharer.uid),
    } | top.sharer_record(region, sharer)


def objects(region: Region) -> dict[str, Any]:
    """What is mapped in a region, in the child; `maps` is None if that may not be known."""
    text = regions.told(region, "maps")
    found = None if text is None else texts.parse_maps(text)
    return {
        "count": len(found or ()),
        "maps": found
        and [each | {"label": printable_line(each["name"])} for each in found[:MOST_OBJECTS]],
    }


def page_tables(region: Region) -> dict[str, Any]:
    """What page tables its sharers have, as the daemon measures it, in the child."""
    text = regions.told(region, "pagetables")
    return {"text": text and "\n".join(map(printable_line, text.split("\n")))}


Detail = Callable[[Region], dict[str, Any]]
DETAILS: Final[Mapping[str, Detail]] = {"objects": objects, "pagetables": page_tables}
"""What is asked of one region when somebody wants to know it."""


class Watch:
    """The state of the page."""

    def __init__(self, timeout: float, interval: float) -> None:
        """Seconds: what the daemon has for an answer, and between two looks."""
        self._interval = interval
        self._asker = Asker(timeout)
        # A look does not wait for what somebody wants to know of one region.
        self._details = Asker(timeout)
        self._last: Look | None = None
        self._at = 0.0
        """When that was, by the monotonic clock."""
        self._trouble = ""
        """Why there was no answer to the last look."""
        self._number = 0
        self._points: deque[dict[str, Any]] = deque(maxlen=POINTS)

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            began = time.monotonic()
            await self._look()
            await asyncio.sleep(max(self._interval - (time.monotonic() - began), 0))

    async def _look(self) -> None:
        before = None if self._last is None else self._last.seen
        try:
            now = await self._asker.ask(partial(look, before))
        except (CommandError, OSError) as failure:
            self._trouble = str(failure)
            return
        self._last, self._at, self._trouble = now, time.monotonic(), ""
        self._number += 1
        shown = ("saved", "tables", "memory", "faults_per_second", "populated_per_second")
        self._points.append(
            {"number": self._number, "time": time.time()} | {key: now.record[key] for key in shown}
        )

    def state(self, after: int) -> str:
        """JSON: the last look, how old it is, and the points since the one of that number.

        In ASCII: names with undecodable bytes are lone surrogates, as in Python.
        """
        last = self._last
        return json.dumps(
            {
                "trouble": self._trouble or None,
                "interval": self._interval,
                "age": None if last is None else time.monotonic() - self._at,
                "points": [point for point in self._points if point["number"] > after],
                "last": None if last is None else last.record,
            }
        )

    def region(self, number: str) -> Region | None:
        """The region with that id, as the last look has seen it."""
        found = self._last.seen.regions if self._last is not None else []
        return next((each for each in found if each.directory.hex() == number), None)

    async def detail(self, region: Region, ask: Detail) -> str:
        """JSON.  Raises CommandError, OSError."""
        return json.dumps(await self._details.ask(partial(ask, region)))
