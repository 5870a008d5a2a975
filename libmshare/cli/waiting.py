"""`mshare wait`: until a region is as it is wanted."""

from __future__ import annotations

import time
from typing import Final

from libmshare.cli import regions
from libmshare.cli.ask import bounded
from libmshare.cli.errors import CommandError, DaemonGoneError
from libmshare.cli.exits import Exit
from libmshare.cli.output import printable
from libmshare.cli.regions import HUGE_PAGE, Region
from libmshare.cli.views import For

PAUSE_SECONDS: Final = 0.2


def wait(name: bytes, what: For, timeout: float, patience: float | None) -> None:
    """Return when it is so.  A daemon that is not there is waited for, too.

    `timeout` is for each of the daemon's answers, `patience` for all of it (seconds).
    Raises CommandError when that is over, or when the daemon does not answer.
    """
    regions.check_name(name)
    deadline = None if patience is None else time.monotonic() + patience
    while True:
        why = "there is no daemon"
        try:
            found = bounded(lambda: _named(name), timeout)
            missing = _missing(found, what)
            if missing is None:
                return
            why = missing
        except DaemonGoneError:
            pass
        if deadline is not None and time.monotonic() + PAUSE_SECONDS > deadline:
            raise CommandError(
                f"{printable(name)}: not {what.value} within {patience:g} s: {why}",
                Exit.TIME_IS_OVER,
            )
        time.sleep(PAUSE_SECONDS)


def _named(name: bytes) -> list[Region]:
    """All that are, or were, called so and have memory; the one that has the name comes first."""
    found = [region for region in regions.everything(removed=True) if region.name == name]
    return sorted(found, key=lambda region: region.removed)


def _missing(found: list[Region], what: For) -> str | None:
    """Why it is not so; None if it is."""
    if what is For.GONE:
        return _still_there(found[0]) if found else None
    if not found or found[0].removed:
        return "no such region"
    region = found[0]
    if not region.info:
        return "its mode does not let you see that"
    if region.state != "live":
        return f"its state is {region.state}"
    huge = region.number("huge")
    wrong = {
        For.USED: (not region.sharers, "nobody has it attached"),
        For.UNUSED: (region.sharers, f"{region.sharers} have it attached"),
        For.COLLAPSED: (
            not region.memory or region.memory - huge >= HUGE_PAGE,
            f"{huge} of {region.memory} bytes are in huge pages",
        ),
    }
    is_wrong, why = wrong.get(what, (False, ""))
    return why if is_wrong else None


def _still_there(region: Region) -> str:
    if not region.removed:
        return "it has its name"
    return "removed, and there still" + (f": {region.sharers} have it" if region.sharers else "")
