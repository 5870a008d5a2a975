"""`mshare top`: regions and sharers, live."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from libmshare.cli import listing, output, regions
from libmshare.cli.ask import bounded
from libmshare.cli.errors import DaemonGoneError, explain
from libmshare.cli.output import Column, printable
from libmshare.cli.regions import Region
from libmshare.texts import Sharer

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHARER_COLUMNS: Final = (
    Column("REGION"),
    *listing.SHARER_COLUMNS[:-1],
    Column("TABLES", right=True),
    listing.SHARER_COLUMNS[-1],
)
_FAULTS: Final = "msharefs_faults"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What there is at one moment."""

    root: str
    time: float
    """By the monotonic clock, seconds."""
    regions: list[Region]
    sharers: list[tuple[bytes, Sharer]]
    """With the names of their regions."""
    faults: float
    """Page faults that the daemon has served since it started."""


def take() -> Snapshot:
    """Ask the daemon.  Raises CommandError."""
    root = regions.root()
    found = regions.everything(removed=True)
    # The largest first, and a region's sharers together.
    found.sort(key=lambda region: region.memory, reverse=True)
    sharers = []
    for region in found:
        if region.sharers:
            sharers += [(region.name, sharer) for sharer in regions.holders(region)]
    return Snapshot(root, time.monotonic(), found, sharers, _count_faults(root))


def _count_faults(root: str) -> float:
    from prometheus_client.openmetrics.parser import (  # noqa: PLC0415 - only top pays for it
        text_string_to_metric_families,
    )

    try:
        with open(f"{root}/.metrics", encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise explain(error, b".metrics") from None
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call] # theirs
    counts: list[float] = [
        sample.value
        for family in families
        if family.name == _FAULTS
        for sample in family.samples
        if sample.name == f"{_FAULTS}_total"
    ]
    return sum(counts)


def _tables(sharer: Sharer) -> int | None:
    """Bytes of page tables of the whole process (VmPTE); None if it cannot be seen here.

    The daemon's process numbers are those of its pid namespace: the name tells whether
    that process is the one that is meant.
    """
    try:
        with open(f"/proc/{sharer.pid}/status", encoding="utf-8", errors="replace") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    except OSError:
        return None
    if status.get("Name", "").strip() != sharer.command.strip() or "VmPTE" not in status:
        return None
    return int(status["VmPTE"].split()[0]) * 1024


def _heading(now: Snapshot, before: Snapshot | None) -> str:
    memory = sum(region.memory for region in now.regions)
    text = (
        f"{printable(now.root)}: {len(now.regions)} regions, {len(now.sharers)} sharers, "
        f"{output.size(memory)} of memory"
    )
    if removed := [region for region in now.regions if region.removed]:
        text += f" ({output.size(sum(each.memory for each in removed))} of it removed)"
    if before is not None and now.time > before.time and now.faults >= before.faults:
        text += f", {(now.faults - before.faults) / (now.time - before.time):.0f} faults/s"
    return text


def _sharer_row(name: bytes, sharer: Sharer) -> list[str]:
    cells = listing.sharer_row(sharer)
    return [printable(name), *cells[:-1], output.size(_tables(sharer)), cells[-1]]


def once(timeout: float) -> None:
    """Print it once.  Raises CommandError."""
    now = bounded(take, timeout)
    output.write(_heading(now, None))
    if now.regions:
        output.write("")
        output.write_table(listing.COLUMNS, [listing.row(region) for region in now.regions])
    if now.sharers:
        output.write("")
        output.write_table(_SHARER_COLUMNS, [_sharer_row(*each) for each in now.sharers])


def live(timeout: float, interval: float) -> None:
    """Show it until q or Ctrl-C, new every `interval` seconds.

    A daemon that is not there is waited for; raises CommandError for one that does not answer,
    because each try would leave a process behind.
    """
    from rich.console import Console  # noqa: PLC0415 - a pipe does not pay for it
    from rich.live import Live  # noqa: PLC0415

    console = Console(highlight=False)
    before: Snapshot | None = None
    # No thread of rich's: bounded() forks.
    with keys() as pressed_q, Live(console=console, screen=True, auto_refresh=False) as screen:
        while True:
            now: Snapshot | None = None
            try:
                now = bounded(take, timeout)
                shown = _page(now, before, console.height)
            except DaemonGoneError as gone:
                shown = f"{gone}\n\nq quits"
            before = now
            screen.update(shown, refresh=True)
            if pressed_q(interval):
                return


def _page(now: Snapshot, before: Snapshot | None, height: int) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415

    # Half of the screen for each, if both want more.
    space = max(height - 6, 2)
    sharers = now.sharers[: max(space // 2, space - len(now.regions))]
    shown = now.regions[: space - len(sharers)]
    left = len(now.regions) + len(now.sharers) - len(shown) - len(sharers)
    return Group(
        Text(_heading(now, before), overflow="ellipsis", no_wrap=True),
        "",
        output.rich_table(listing.COLUMNS, [listing.row(region) for region in shown]),
        "",
        output.rich_table(_SHARER_COLUMNS, [_sharer_row(*each) for each in sharers]),
        Text(f"{left} more; q quits" if left else "q quits", style="dim"),
    )


_ENDING: Final = frozenset(b"q\x03\x04")
"""What ends it: q, Ctrl-C, Ctrl-D."""


@contextlib.contextmanager
def keys() -> Iterator[Callable[[float], bool]]:
    """Keys without Enter, on a terminal that is put back whatever ends us.

    Gives a function that waits so many seconds and says whether q was pressed.
    """

    def end(number: int, frame: object) -> NoReturn:
        del frame
        sys.exit(128 + number)

    def wait(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([source] if listening else [], [], [], left)[0]:
                break
            typed = os.read(source, 64)
            if not typed or set(typed.lower()) & _ENDING:
                return True
        return False

    source = sys.stdin.fileno()
    listening = os.isatty(source)
    ending = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    old = termios.tcgetattr(source) if listening else None
    try:
        if old is not None:
            tty.setcbreak(source)
            # Ctrl-C is a key as well: as a signal it would interrupt whatever runs just now,
            # the child that asks the daemon too.
            modes = termios.tcgetattr(source)
            modes[6][termios.VINTR] = os.fpathconf(source, "PC_VDISABLE").to_bytes(1, "little")
            termios.tcsetattr(source, termios.TCSADRAIN, modes)
        yield wait
    except KeyboardInterrupt:
        pass
    finally:
        if old is not None:
            termios.tcsetattr(source, termios.TCSADRAIN, old)
        for number, handler in ending.items():
            signal.signal(number, handler)
