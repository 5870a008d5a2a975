"""`mshare top`: regions and sharers, live.

On a terminal by curses, which knows every terminal and starts at once; on one that cannot move
its cursor, TERM=dumb for instance, page after page.
"""

from __future__ import annotations

import contextlib
import curses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from libmshare.cli import listing, output, regions
from libmshare.cli.ask import bounded
from libmshare.cli.errors import DaemonGoneError, explain
from libmshare.cli.exits import Exit
from libmshare.cli.keys import keys
from libmshare.cli.output import Column, printable
from libmshare.cli.screen import Screen, Seen, heading, memory_of, page
from libmshare.cli.views import Order
from libmshare.texts import Sharer

_FAULTS: Final = "msharefs_faults_total"
_ENDING: Final = frozenset({"q", "Q", "\x03", "\x04"})
"""What ends it: q, Ctrl-C, Ctrl-D."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be shown."""

    order: Order
    pattern: str
    interval: float
    """Seconds between two looks."""


def take() -> Seen:
    """Ask the daemon.  Raises CommandError."""
    root = regions.root()
    found = regions.everything(removed=True)
    sharers = [
        (region, sharer) for region in found if region.sharers for sharer in regions.holders(region)
    ]
    return Seen(root, time.monotonic(), found, sharers, _count_faults(root))


def _count_faults(root: str) -> float:
    try:
        with open(f"{root}/.metrics", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith(_FAULTS)]
    except OSError as error:
        raise explain(error, b".metrics") from None
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def once(timeout: float, wanted: Wanted) -> None:
    """Print it once.  Raises CommandError."""
    _print(bounded(take, timeout), None, wanted, output.write_table)


def _print(
    now: Seen,
    before: Seen | None,
    wanted: Wanted,
    write_table: Callable[[Sequence[Column], Sequence[Sequence[str]]], None],
) -> None:
    output.write(f"{printable(now.root)}: {heading(now, before)}")
    for table in page(now, before, wanted.order, wanted.pattern):
        if table.lines:
            output.write("")
            write_table(table.columns, table.rows())


def _write_plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    output.write(output.plain_table(columns, rows))


def stream(timeout: float, wanted: Wanted, *, forever: bool) -> None:
    """JSON, an object a line; once, or every interval until a signal.  Raises CommandError."""
    import json  # noqa: PLC0415 - who looks does not pay for it

    before: Seen | None = None
    while True:
        now = bounded(take, timeout)
        output.write(json.dumps(record(now, before, wanted)))
        sys.stdout.flush()
        if not forever:
            return
        before = now
        try:
            time.sleep(wanted.interval)
        except KeyboardInterrupt:
            sys.exit(Exit.SIGNAL + signal.SIGINT)


def record(now: Seen, before: Seen | None, wanted: Wanted) -> dict[str, Any]:
    """For JSON."""
    shown = now.matching(wanted.pattern)
    names = {region.directory for region in shown}
    return {
        "root": now.root,
        "faults_per_second": now.rate(before),
        "regions": [
            region_record(now, before, region)
            for region in listing.in_order(
                shown, wanted.order, more=lambda each: now.rate_of(before, each, "faults") or 0
            )
        ],
        "processes": [
            sharer_record(region, sharer)
            for region, sharer in now.sharers
            if region.directory in names
        ],
    }


def region_record(now: Seen, before: Seen | None, region: regions.Region) -> dict[str, Any]:
    """A region's part of that; figures a second are None while they cannot be told."""
    return region.record() | {
        "saved": region.saved,
        "faults_per_second": now.rate_of(before, region, "faults"),
        "populated_per_second": now.rate_of(before, region, "populated"),
    }


def sharer_record(region: regions.Region, sharer: Sharer) -> dict[str, Any]:
    """A sharer's, with memory and page tables of the whole process (bytes)."""
    rss, tables = memory_of(sharer)
    return sharer.record() | {"region": os.fsdecode(region.name), "rss": rss, "tables": tables}


def live(timeout: float, wanted: Wanted) -> None:
    """Show it until q or Ctrl-C, new every interval.

    A daemon that is not there is waited for; raises CommandError for one that does not answer,
    because each try would leave a process behind.
    """
    if not _can_move_its_cursor():
        _pages(timeout, wanted)
        return
    with _signals():
        # Escape is a key of its own here, and not to be waited for.
        os.environ.setdefault("ESCDELAY", "25")
        curses.wrapper(_run, timeout, wanted)


def _can_move_its_cursor() -> bool:
    try:
        curses.setupterm()
        return bool(curses.tigetstr("cup"))
    except curses.error:  # no TERM, or one that nobody knows
        return False


def _pages(timeout: float, wanted: Wanted) -> None:
    before: Seen | None = None
    with keys() as pressed_q:
        while True:
            now: Seen | None = None
            try:
                now = bounded(take, timeout)
                _print(now, before, wanted, _write_plain)
            except DaemonGoneError as gone:
                output.write(str(gone))
            output.write("")
            sys.stdout.flush()
            before = now
            if pressed_q(wanted.interval):
                return


def _run(window: curses.window, timeout: float, wanted: Wanted) -> None:
    curses.raw()  # Ctrl-C is a key: as a signal it would end the child that asks, too
    with contextlib.suppress(curses.error):
        curses.curs_set(0)
    screen = Screen(wanted.order, wanted.pattern)
    before: Seen | None = None
    while True:
        now: Seen | None = None
        trouble = ""
        try:
            now = bounded(take, timeout)
        except DaemonGoneError as gone:
            trouble = str(gone)
        deadline = time.monotonic() + wanted.interval
        while True:
            _draw(window, screen.lines(now, before, trouble, *reversed(window.getmaxyx())))
            left = deadline - time.monotonic()
            if left <= 0:
                break
            window.timeout(max(int(left * 1000), 1))
            key = _key(window)
            if key in _ENDING and not (screen.typing and key in ("q", "Q")):
                return
            if key is not None:
                screen.press(key)
        before = now


def _key(window: curses.window) -> str | None:
    """A character, or the name of a key (KEY_UP, ...); None if there was none."""
    try:
        key = window.get_wch()
    except curses.error:
        return None
    if isinstance(key, str):
        return key
    return curses.keyname(key).decode()


def _draw(window: curses.window, lines: list[tuple[str, bool]]) -> None:
    height, width = window.getmaxyx()
    window.erase()
    for at, (text, strong) in enumerate(lines[:height]):
        # The last cell of all cannot be written to without scrolling.
        with contextlib.suppress(curses.error):
            window.addnstr(at, 0, text, width, curses.A_BOLD if strong else curses.A_NORMAL)
    window.refresh()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end it, and the terminal is put back."""

    def end(number: int, frame: object) -> NoReturn:
        del frame
        sys.exit(Exit.SIGNAL + number)

    old = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
