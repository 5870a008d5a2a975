"""Having page tables back as soon as there are some: while a program starts, few share yet.

A look costs little where nothing has changed: `status` says how large a process's page
tables are, and only who has more of them than last time is looked into.  Whatever is looked
at or done, pauses keep it to a share of one processor, so a process that makes much work
makes the watcher slow, and nothing else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from msharetables import collapse, fill, proc, survey
from msharetables.collapse import Outcome, Plan, Result, Step
from msharetables.objects import Kernel, Key
from msharetables.pace import Pace
from msharetables.patience import NoAnswerError, NotAskedError, Patience
from msharetables.proc import Status
from msharetables.survey import Object, Process
from msharetables.tables import Tables, count_shared, is_congruent

PATIENCE_SECONDS: Final = 2.0
LONGEST_REST: Final = 64.0
"""How long an object is left alone at most of which nothing could be had back (seconds)."""
SCARED: Final = 3
"""A process that has not answered so often is not asked again."""
MOST_UNPAUSED: Final = 0.05
"""So much processor time is spent on looking at processes between two pauses (seconds)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is worth it."""

    smallest: int
    """Objects of fewer bytes are left alone."""
    filled: float
    """What part of a chunk has to be there."""
    sharers: int = 2
    """So many processes have to have it mapped."""


@dataclass(slots=True)
class Totals:
    """What has come of it since the start."""

    looks: int = 0
    objects: int = 0
    """With something to be had back, at the last look."""
    processes: int = 0
    """Looked at, at the last look."""
    chunks: dict[str, int] = field(default_factory=dict)
    """How many tries came to what."""
    back: int = 0
    """Page tables that went (bytes)."""
    processor: float = 0.0
    """Processor time of this process (seconds)."""
    silent: int = 0
    """Processes that did not answer."""


@dataclass(slots=True)
class _Known:
    started: int
    tables: int
    size: int
    process: Process
    scares: int = 0


@dataclass(slots=True)
class _Memory:
    """What is known of an object's memory, if it may be known."""

    blocks: int = -1
    done: set[int] = field(default_factory=set)
    """Offsets of chunks that have been made huge pages."""


@dataclass(slots=True)
class _Rest:
    """An object that is left alone for a while."""

    until: float
    length: float


class Watcher:
    """Looks, has back what is worth it, pauses.

    Synchronization: for one thread.
    """

    def __init__(
        self,
        limits: Limits,
        pace: Pace,
        *,
        pids: Callable[[], Iterable[int]] = proc.pids,
        wanted: Callable[[Status, str], bool] | None = None,
        chosen: Callable[[Object], bool] | None = None,
    ) -> None:
        """`pids`: which processes; `wanted`: of whom, by status and cgroup; `chosen`: what."""
        self._limits = limits
        self._pace = pace
        self._pids = pids
        self._wanted = wanted
        self._chosen = chosen
        self._patience = Patience(PATIENCE_SECONDS)
        self._kernel = Kernel.learn()
        self._known: dict[int, _Known] = {}
        self._rests: dict[Key, _Rest] = {}
        self._memory: dict[Key, _Memory] = {}
        self._paused_for = time.process_time()
        self.totals = Totals()

    def close(self) -> None:
        """Give back what it has."""
        self._patience.close()

    def once(
        self, done: Callable[[Plan, Result], None], step: Callable[[Step], None] | None = None
    ) -> list[Object]:
        """One look, and what comes of it; `done` is told of each object that was changed.

        Returns the objects that are large enough.  Raises OSError: EPERM, see `collapse`.
        """
        objects = self._look()
        for each in objects:
            self._pause()
            if self._rested(each):
                also = self._filled(each)
                if also or each.reclaimable:
                    self._have_back(each, also, done, step)
        self._pause()
        self.totals.processor = time.process_time()
        return objects

    def _unpaused(self) -> float:
        """Processor time that no pause has been made for yet, whatever it was spent on."""
        return time.process_time() - self._paused_for

    def _pause(self) -> None:
        taken = self._unpaused()
        self._paused_for += taken
        time.sleep(self._pace.pause(taken))

    def _look(self) -> list[Object]:
        self.totals.looks += 1
        known: dict[int, _Known] = {}
        for pid in self._pids():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if (found := self._process(pid)) is not None:
                    known[pid] = found
            if self._unpaused() > MOST_UNPAUSED:
                self._pause()
        self._known = known
        self.totals.processes = len(known)
        self.totals.silent = sum(each.scares > 0 for each in known.values())
        processes = [each.process for each in known.values() if each.process.tables]
        objects = [
            each
            for each in survey.objects(processes, self._kernel)
            if len(each.sharers) >= self._limits.sharers
            and (self._chosen is None or self._chosen(each))
        ]
        self.totals.objects = sum(each.reclaimable > 0 for each in objects)
        keys = {each.key for each in objects}
        self._rests = {key: rest for key, rest in self._rests.items() if key in keys}
        self._memory = {key: memory for key, memory in self._memory.items() if key in keys}
        return objects

    def _process(self, pid: int) -> _Known | None:
        status = proc.status(pid)
        if status is None:
            return None
        before = self._known.get(pid)
        started = proc.started(pid)
        if before is not None and before.started != started:
            before = None
        if before is not None and (
            (before.tables, before.size) == (status.tables, status.size) or before.scares == SCARED
        ):
            return before
        group = proc.cgroup(pid)
        tables: Tables | None = None
        scares = before.scares if before else 0
        if self._wanted is None or self._wanted(status, group):
            try:
                tables = self._patience.call(
                    count_shared, pid, self._kernel, self._limits.smallest, whose=status.uid
                )
            except NotAskedError:
                return before
            except NoAnswerError:
                scares += 1
        process = Process(pid, status, group, tables)
        return _Known(started, status.tables, status.size, process, scares)

    def _rested(self, each: Object) -> bool:
        rest = self._rests.get(each.key)
        return rest is None or time.monotonic() >= rest.until

    def _filled(self, each: Object) -> list[int]:
        """The chunks that are new since the last look, whoever has filled them.

        Who has done that may be gone by now, and nobody else have touched them yet: huge pages
        are never cheaper.  Empty if that may not be known (see `fill`).
        """
        memory = self._memory.setdefault(each.key, _Memory())
        for pid, part in sorted(each.sharers.items()):
            if part.congruent:
                vma = next(filter(is_congruent, part.vmas))
                try:
                    memory.blocks, found = self._patience.call(
                        fill.look, pid, vma, memory.blocks, whose=proc.user(pid)
                    )
                except OSError:
                    return []
                return [offset for offset in found if offset not in memory.done]
        return []

    def _have_back(
        self,
        each: Object,
        also: Iterable[int],
        done: Callable[[Plan, Result], None],
        step: Callable[[Step], None] | None,
    ) -> None:
        made = collapse.plan(each, self._limits.filled, self._patience, self._pause, also)
        result = Result()
        if made.chunks:
            before = tables_of(each)
            result = collapse.carry_out(made, self._pace, self._patience, step)
            self._paused_for += result.processor
            self.totals.back += max(before - tables_of(each), 0)
            done_now = [at for at, what in result.last.items() if what is Outcome.DONE]
            self._memory[each.key].done.update(done_now)
            if len(done_now) < len(made.chunks):
                self._memory[each.key].blocks = -1  # again, at the next look
            for outcome, count in result.outcomes.items():
                self.totals.chunks[outcome] = self.totals.chunks.get(outcome, 0) + count
            done(made, result)
        for pid in each.sharers:  # theirs are others now
            self._known.pop(pid, None)
        if result.outcomes[Outcome.DONE]:
            self._rests.pop(each.key, None)
            return
        rest = self._rests.get(each.key)
        length = min(rest.length * 2 if rest else 1.0, LONGEST_REST)
        self._rests[each.key] = _Rest(time.monotonic() + length, length)


def tables_of(each: Object) -> int:
    """VmPTE of all sharers now (bytes)."""
    total = 0
    for pid in each.sharers:
        with contextlib.suppress(OSError):
            status = proc.status(pid)
            total += status.tables if status else 0
    return total
