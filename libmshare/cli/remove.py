"""`mshare rm`: take names away."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final, NamedTuple

from libmshare import core
from libmshare.cli import regions
from libmshare.cli.ask import bounded
from libmshare.cli.errors import CommandError, DaemonGoneError, explain
from libmshare.cli.output import printable, printable_line
from msharefsd.telemetry.figures import amount, plural

_WHOSE: Final = "not permitted; only its owner and root may remove a region"
_ADVICE: Final = {errno.EPERM: _WHOSE, errno.EACCES: _WHOSE}
_MOST_TOLD: Final = 5
"""Of so many processes the name is told."""


class Result(NamedTuple):
    """What became of it."""

    failures: list[CommandError]
    """For each region that could not be removed."""
    notes: list[str]
    """A sentence for each that is held."""
    done: list[str]
    """What was removed, and how much memory it had."""


def remove(names: Sequence[bytes], timeout: float) -> Result:
    """Remove each region's name; its memory goes with its last sharer.

    Raises CommandError if there is no daemon.
    """
    return bounded(lambda: _remove(names), timeout)


def remove_all(timeout: float, *, force: bool) -> Result:
    """Remove every region; those that somebody has attached only with `force`."""
    return bounded(lambda: _remove(regions.names(), spare=not force), timeout)


def _remove(names: Sequence[bytes], *, spare: bool = False) -> Result:
    regions.root()
    result = Result([], [], [])
    for name in names:
        try:
            regions.check_name(name)
            holders, memory = _holders(name)
            if holders and spare:
                raise CommandError(f"{printable(name)}: {holders}; --force removes it all the same")
            try:
                core.mshare_unlink(os.fsdecode(name))
            except OSError as error:
                raise explain(error, name, _advice(name)) from None
            result.done.append(f"{printable(name)}, {memory}")
            if holders:
                result.notes.append(
                    f"{printable(name)}: removed; {holders}: its memory goes with the last of "
                    "them, and until then `mshare ls --all` shows it"
                )
        except DaemonGoneError:
            raise
        except CommandError as failure:
            result.failures.append(failure)
    return result


def _advice(name: bytes) -> dict[int, str]:
    if any(wild in name for wild in (b"*", b"?", b"[")):
        return _ADVICE | {errno.ENOENT: "no such region; rm takes names, and no patterns"}
    return _ADVICE


def _holders(name: bytes) -> tuple[str, str]:
    """Who has the region attached, for people, empty if nobody has; and how much it is."""
    try:
        region = regions.one(name)
    except CommandError:
        return "", "-"  # what it is called decides what is said of it
    memory = "-" if region.memory is None else amount(region.memory)
    if not region.sharers:
        return "", memory
    who = [f"{each.pid} {printable_line(each.command)}" for each in regions.holders(region)]
    more = f", {len(who) - _MOST_TOLD} more" if len(who) > _MOST_TOLD else ""
    verb = "has" if region.sharers == 1 else "have"
    return (
        f"{plural(region.sharers, 'process')} {verb} it ({', '.join(who[:_MOST_TOLD])}{more}), "
        f"{memory}"
    ), memory
