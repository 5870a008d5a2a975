"""How the daemon ends: what makes it, what it waits for, and what it says of what stays."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from msharefsd.config import Config
from msharefsd.front.pagers import Pagers
from msharefsd.front.setting_up import End
from msharefsd.life.signals import Signals
from msharefsd.mount.names import Name, Names
from msharefsd.telemetry.figures import amount, plural
from msharefsd.threads import runs

log = logging.getLogger(__name__)

LAST_SECONDS: Final = 45.0
"""How long the end waits for pagers; their files have 30 seconds to answer."""
MOST_TOLD: Final = 8
"""Of so many regions the name is in the last line."""


class Ending:
    """What ends the daemon: the first thing that happens."""

    def __init__(self, signals: Signals, end: End, scope: trio.CancelScope) -> None:
        self._signals = signals
        self._end = end
        self._scope = scope
        self._begun = False
        self._told = 0

    def begin(self, reason: str, *, hand_over: bool = False) -> None:
        """It ends now, and the mount with it, unless it is handed over."""
        if not self._begun:
            self._begun = True
            self._told = len(self._signals.came)
            log.info("%s: stopping", reason)
            self._end.unmount = not hand_over
        runs.over()
        self._scope.cancel()

    def hands_over(self) -> bool:
        """Whether the mount stays: unless something came meanwhile that says otherwise."""
        if self._signals.came and not self._signals.hands_over:
            self._end.unmount = True
        return not self._end.unmount

    async def listen(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Wait for the first signal."""
        task_status.started()
        await _until(self._signals, lambda: bool(self._signals.came))
        self.begin(self._signals.words(), hand_over=self._signals.hands_over)

    def told_again(self) -> bool:
        """Whether a signal has come since, but for the SIGHUP that sudo(8) may send beside."""
        return any(each is not signal.SIGHUP for each in self._signals.came[self._told :])


async def _until(signals: Signals, condition: Callable[[], bool]) -> None:
    """Wait for a condition that a signal makes true."""
    token = trio.lowlevel.current_trio_token()
    while not condition():
        came = trio.Event()

        def wake(event: trio.Event = came) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(event.set)  # which a signal's handler may call

        signals.wake = wake
        if not condition():  # none came between the two
            await came.wait()


async def rest(pagers: Pagers, signals: Signals, ending: Ending) -> None:
    """Have pagers write back and end.  Another signal, and they are not waited for.

    What they have not written then is in memory, and in their journals.
    """
    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hurry, signals, ending, nursery.cancel_scope)
            for pager in await pagers.stop(LAST_SECONDS):
                log.warning(
                    "pager of user %d, process %d, does not end (%s): the next daemon goes on "
                    "without it",
                    pager.uid,
                    pager.pid,
                    pager.where(),
                )
            nursery.cancel_scope.cancel()


async def _hurry(signals: Signals, ending: Ending, scope: trio.CancelScope) -> None:
    await _until(signals, ending.told_again)
    log.info("%s again: files are not waited for", signals.came[-1].name)
    scope.cancel()


# -- what stays --


@dataclass(frozen=True, slots=True)
class Kept:
    """A region that there is, or a name for one."""

    label: str
    memory: int
    """Bytes."""
    sharers: int
    has_range: bool
    linked: bool

    def text(self) -> str:
        """For people: its name, and how much it is."""
        if not self.has_range:
            return f"{self.label} (a name)"
        gone = "" if self.linked else "removed, "
        return f"{self.label} ({gone}{amount(self.memory)}, {plural(self.sharers, 'sharer')})"


def _kept(name: Name) -> Kept:
    return Kept(name.label(), name.allocated(), name.shared(), bool(name.size), name.linked)


def what_is_kept(names: Names) -> list[Kept]:
    """Everything that there is, the largest first."""
    kept = [_kept(name) for name in names.all() if name.linked or name.size]
    return sorted(kept, key=lambda each: (each.memory, each.sharers), reverse=True)


def summary(kept: list[Kept]) -> str:
    """What there is, in half a line."""
    sums = (
        f"{plural(len(kept), 'region')}, {amount(sum(each.memory for each in kept))} of memory, "
        f"{plural(sum(each.sharers for each in kept), 'sharer')}"
    )
    texts = [each.text() for each in kept[:MOST_TOLD]]
    if len(kept) > MOST_TOLD:
        texts.append(f"{len(kept) - MOST_TOLD} more")
    return f"{sums}: {', '.join(texts)}"


def sentence(kept: list[Kept], config: Config, *, handed_over: bool) -> str:
    """What the last line says of what stays, and what to do about it."""
    if handed_over:
        return ", and left everything to the next daemon"
    if not kept:
        return ""
    command = " ".join(["msharefsd", *config.words()])
    return (
        f"; kept for the next daemon are {summary(kept)}.  Sharers go on with the pages that "
        f"are there and wait at others: start {command} again, or remove all of it with "
        f"{command} --purge"
    )
