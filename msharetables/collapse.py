"""Having page tables back: huge pages for shared memory, asked for from outside.

MADV_COLLAPSE makes one huge page of the 512 small ones of a 2 MiB chunk, and the kernel
then removes the page tables of *all* who have it mapped at a congruent address
(retract_page_tables(), mm/khugepaged.c).  Asked for by process_madvise(2) in the name of a
sharer, it charges the huge page where that sharer's memory is charged, and no code of the
sharer runs.  The settings in /sys/kernel/mm/transparent_hugepage do not forbid it, but for
hugepages-2048kB/shmem_enabled, which must be `inherit`.

It costs the more the more sharers have tables there, and who touches the chunk meanwhile
waits.  So chunks are done one by one, with pauses (`Pace`), and best while there are few
sharers.  Being killed in the middle leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Final

from msharetables import calls, fill, proc
from msharetables.calls import HUGE_PAGE
from msharetables.pace import Haste, Pace
from msharetables.pagemap import Pagemap
from msharetables.patience import NoAnswerError, Patience
from msharetables.proc import Vma
from msharetables.survey import Object
from msharetables.tables import Part, is_congruent, whole

SECONDS_A_SHARER: Final = 0.00007
SECONDS_A_CHUNK: Final = 0.0004
"""What a chunk takes: the larger of this and the former for each sharer with tables there;
measured with up to 400 of them."""
MOST_NAMES: Final = 4
"""In so many processes' names a chunk is asked for."""
MOST_PAYERS: Final = 8
"""How many sharers' page tables are looked into for chunks: those with the most tables."""
TRIES: Final = 5
"""How often a chunk is tried that is in use just then."""
AGAIN_SECONDS: Final = 0.2
"""Before it is tried again for the first time, and each time twice as long."""
AT_ONCE_SECONDS: Final = 0.02
"""How long (processor time) one call may take, and how many chunks that may be."""
MOST_AT_ONCE: Final = 32
AT_ONCE_LOOKED: Final = 16384
"""Chunks that are looked at in one go: 0.1 s, if each has a page and a hole."""
HOPELESS: Final = 16
"""After so many chunks in a row for which there is no huge page, there is none for the next."""


class Outcome(StrEnum):
    """What came of a chunk."""

    DONE = "done"
    BUSY = "busy"
    """Its pages are in use just now, or its cgroup is at its limit: later."""
    NO_MEMORY = "no-memory"
    """No huge page is free: later."""
    REFUSED = "refused"
    """It has changed meanwhile, or the kernel makes no huge pages there."""
    GONE = "gone"
    """The process has ended."""


_OUTCOMES: Final = {
    0: Outcome.DONE,
    errno.EAGAIN: Outcome.BUSY,
    errno.EBUSY: Outcome.BUSY,
    errno.ENOMEM: Outcome.NO_MEMORY,
    errno.EINVAL: Outcome.REFUSED,
    errno.EFAULT: Outcome.REFUSED,
    errno.ESRCH: Outcome.GONE,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the kernel said of some chunks, the worst of each."""

    code: int
    """Its errno, or 0."""
    processor: float
    """The processor time that it took (seconds)."""

    @property
    def outcome(self) -> Outcome | None:
        """What that means for them; None: it says nothing of them, see `collapse`."""
        return _OUTCOMES.get(self.code)


def ask(pidfd: int, address: int, length: int = HUGE_PAGE) -> Answer:
    """Collapse some chunks, in the name of a process that has them mapped from `address` on.

    It takes milliseconds, and longer on a busy machine: each call first waits for
    all processors to give back pages that they keep aside (lru_add_drain_all()).
    """
    began = time.thread_time()
    code = 0
    try:
        calls.process_madvise(pidfd, address, length, calls.MADV_COLLAPSE)
    except OSError as error:
        code = error.errno or errno.EIO
    return Answer(code, time.thread_time() - began)


def collapse(pidfd: int, address: int, length: int = HUGE_PAGE) -> tuple[Outcome, float]:
    """The same: what came of them, and the processor time that it took (seconds).

    Raises OSError: EPERM without CAP_SYS_NICE (and CAP_SYS_PTRACE for other users'
    processes), ENOSYS before Linux 5.10.
    """
    answer = ask(pidfd, address, length)
    if answer.outcome is None:
        raise OSError(answer.code, os.strerror(answer.code))
    return answer.outcome, answer.processor


class Batch:
    """How many chunks one call is to be about: as many as it may take time for."""

    def __init__(self, seconds: float = AT_ONCE_SECONDS) -> None:
        """`seconds` of processor time, about."""
        self._seconds = seconds
        self.most = 1

    def took(self, chunks: int, processor: float) -> None:
        """So many have taken so much processor time (seconds)."""
        each = max(processor / chunks, self._seconds / MOST_AT_ONCE)
        self.most = max(int(self._seconds / each), 1)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What can be asked for: 2 MiB of an object, in whose name, and where that has it."""

    offset: int
    pid: int
    address: int
    filled: int
    """How much of it is there (bytes)."""
    others: Sequence[tuple[int, int]] = ()
    """In whose name else, and where: a process may have huge pages forbidden for itself."""

    def elsewhere(self) -> Chunk | None:
        """The same, in another one's name."""
        if not self.others:
            return None
        pid, address = self.others[0]
        return Chunk(self.offset, pid, address, self.filled, self.others[1:])


@dataclass(slots=True)
class Plan:
    """What is to be done about one object."""

    object: Object
    chunks: list[Chunk] = field(default_factory=list)
    """The fullest first."""
    too_empty: int = 0
    """Chunks that are left out: huge pages of them would take more memory than they have."""
    lacking: str = ""
    """Why it is not known what there is to be done."""

    @property
    def growth(self) -> int:
        """How much more memory the object will have (bytes)."""
        return sum(HUGE_PAGE - chunk.filled for chunk in self.chunks)

    @property
    def seconds(self) -> float:
        """How long it will take, without pauses: an estimate."""
        sharers = len(self.object.sharers)
        return len(self.chunks) * max(SECONDS_A_CHUNK, SECONDS_A_SHARER * sharers)


@dataclass(slots=True)
class Result:
    """What came of it."""

    last: dict[int, Outcome] = field(default_factory=dict)
    """By chunk: what came of the last try."""
    seconds: float = 0.0
    """What it took, with pauses."""
    worst: float = 0.0
    """The longest that one call took (seconds)."""
    processor: float = 0.0
    """Processor time (seconds)."""

    @property
    def outcomes(self) -> Counter[Outcome]:
        """How many chunks came to what."""
        return Counter(self.last.values())


def plan(
    of: Object,
    min_filled: float,
    patience: Patience,
    rest: Callable[[], None] | None = None,
    also: Iterable[int] = (),
) -> Plan:
    """Which chunks of an object are worth it.

    `min_filled`: what part of a chunk must be there.  What cannot be looked at any more is
    left out.  `rest` is called between parts of the work.  `also`: offsets of chunks that nobody
    has page tables for just now.
    """
    pause = rest or _go_on
    made = Plan(of)
    # Whoever has most tables knows most; who is oldest will be there a little longer.
    richest = sorted(of.sharers.items(), key=lambda each: -each[1].tables)[:MOST_PAYERS]
    payers = sorted(of.sharers.items())[:MOST_PAYERS] + richest
    offsets = list(also)
    for _, part in richest:
        for vma, start, end in part.small:
            offsets += (at - vma.start + vma.offset for at in _chunks(vma, start, end))
        pause()
    found = {offset: places for offset in offsets if (places := _places(payers, offset))}
    offsets = sorted(found)
    for part_of in range(0, len(offsets), AT_ONCE_LOOKED):
        some = offsets[part_of : part_of + AT_ONCE_LOOKED]
        try:
            filled = patience.call(_fill, payers, richest, some, whose=proc.user(payers[0][0]))
        except OSError as error:
            made.lacking = str(error)
            break
        for offset in some:
            if filled.get(offset, 0) >= max(min_filled * HUGE_PAGE, 1):
                first, *others = found[offset]
                made.chunks.append(Chunk(offset, *first, filled[offset], others))
            else:
                made.too_empty += 1
        pause()
    made.chunks.sort(key=lambda chunk: (-chunk.filled, chunk.offset))
    return made


def _go_on() -> None:
    """No rest."""


def _chunks(vma: Vma, start: int, end: int) -> range:
    if not is_congruent(vma):
        return range(0)
    low, high = whole(vma, start, end)
    return range(low, high, HUGE_PAGE)


def _places(payers: Sequence[tuple[int, Part]], offset: int) -> list[tuple[int, int]]:
    """In whose name a chunk can be asked for, and where those have it."""
    found: dict[int, int] = {}
    for pid, part in payers:
        for vma in part.vmas:
            if is_congruent(vma) and vma.offset <= offset <= vma.offset + vma.size - HUGE_PAGE:
                found[pid] = vma.start + offset - vma.offset
                break
        if len(found) == MOST_NAMES:
            break
    return list(found.items())


def _fill(
    payers: Sequence[tuple[int, Part]],
    richest: Sequence[tuple[int, Part]],
    offsets: Sequence[int],
) -> dict[int, int]:
    """How full these chunks are.  Raises OSError."""
    for pid, part in payers:
        for vma in part.vmas:
            try:
                fd = fill.open_mapped(pid, vma)
            except OSError:
                continue
            try:
                return fill.of_file(fd, offsets)
            finally:
                os.close(fd)
    return _fill_by_tables(richest, offsets)


def _fill_by_tables(payers: Sequence[tuple[int, Part]], offsets: Sequence[int]) -> dict[int, int]:
    with contextlib.ExitStack() as stack:
        opened: list[tuple[Pagemap, Part]] = []
        for pid, part in payers:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                opened.append((stack.enter_context(Pagemap(pid)), part))
        return {
            offset: fill.of_sharers(
                (pagemap, vma.start + offset - vma.offset)
                for pagemap, part in opened
                for vma in part.vmas
                if vma.offset <= offset and offset + HUGE_PAGE <= vma.offset + vma.size
            )
            for offset in offsets
        }


class Processes:
    """Descriptors of processes that chunks are collapsed in the name of."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._fds: dict[int, int | None] = {}

    def close(self) -> None:
        """Give them back."""
        for fd in self._fds.values():
            if fd is not None:
                os.close(fd)
        self._fds.clear()

    def pidfd(self, pid: int, of: Object) -> int | None:
        """None if it is another process by now, or has the object no more.

        Looked at once: what it maps later, the kernel judges.
        """
        if pid not in self._fds:
            self._fds[pid] = None
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(pid)
                try:
                    maps = self._patience.call(lambda: list(proc.maps(pid)), whose=proc.user(pid))
                    vmas = set(maps)
                    if set(of.sharers[pid].vmas) <= vmas:
                        fd, self._fds[pid] = -1, fd
                finally:
                    if fd >= 0:
                        os.close(fd)
        return self._fds[pid]


@dataclass(frozen=True, slots=True)
class Step:
    """What was asked for in one call."""

    chunks: Sequence[Chunk]
    outcome: Outcome
    wall: float
    """Seconds."""
    processor: float
    """Seconds of processor time: what pauses are measured by."""


def steps(made: Plan, patience: Patience, haste: Haste) -> Iterator[Step]:
    """Do it, a few chunks at a time.

    The caller pauses in between.  A chunk that is busy comes again at the end.  Raises
    OSError (EPERM), see `collapse`.
    """
    processes = Processes(patience)
    vmas = sum(len(part.vmas) for part in made.object.sharers.values())

    def ask_for(run: Sequence[Chunk]) -> tuple[Outcome, float]:
        first = run[0]
        pidfd = processes.pidfd(first.pid, made.object)
        if pidfd is None:
            return Outcome.GONE, 0.0
        user, length = proc.user(first.pid), len(run) * HUGE_PAGE
        with contextlib.suppress(NoAnswerError):
            ask = partial(collapse, pidfd, first.address, length)
            answer: tuple[Outcome, float] = patience.call(haste.call, ask, user, vmas, whose=user)
            return answer
        return Outcome.BUSY, 0.0

    hopeless = 0
    batch = Batch()
    try:
        waiting = list(made.chunks)
        for left in range(TRIES - 1, -1, -1):
            again: list[Chunk] = []
            while waiting:
                run = _run(waiting, batch.most)
                del waiting[: len(run)]
                elsewhere: list[Chunk] = []
                for step in _step(run, ask_for):
                    yield step
                    if step.outcome is Outcome.BUSY and left:
                        again += step.chunks
                    elsewhere += _elsewhere(step)
                    hopeless = hopeless + 1 if step.outcome is Outcome.NO_MEMORY else 0
                    if step.outcome is Outcome.DONE:
                        batch.took(len(step.chunks), step.processor)
                    if hopeless == HOPELESS:
                        return
                waiting[:0] = elsewhere
            waiting = again
            if waiting and left:
                time.sleep(AGAIN_SECONDS * 2 ** (TRIES - 1 - left))
    finally:
        processes.close()


def _elsewhere(step: Step) -> Iterator[Chunk]:
    """What is worth asking for in another one's name."""
    if step.outcome in (Outcome.REFUSED, Outcome.GONE):
        yield from filter(None, (chunk.elsewhere() for chunk in step.chunks))


def _run(waiting: Sequence[Chunk], most: int) -> list[Chunk]:
    """The first ones, as far as they lie behind each other in one process."""
    run = [waiting[0]]
    for chunk in itertools.islice(waiting, 1, most):
        if chunk.pid != run[-1].pid or chunk.address != run[-1].address + HUGE_PAGE:
            break
        run.append(chunk)
    return run


def _step(run: Sequence[Chunk], ask_for: Callable[..., tuple[Outcome, float]]) -> Iterator[Step]:
    """One call for all; if something is wrong with one of them, one for each."""
    began = time.monotonic()
    outcome, processor = ask_for(run)
    step = Step(run, outcome, time.monotonic() - began, processor)
    if outcome in (Outcome.DONE, Outcome.GONE) or len(run) == 1:
        yield step
        return
    for chunk in run:
        yield from _step([chunk], ask_for)


def carry_out(
    made: Plan,
    pace: Pace,
    patience: Patience,
    done: Callable[[Step], None] | None = None,
) -> Result:
    """Do it, with pauses.  `done` is told of each step.  Raises OSError (EPERM)."""
    result = Result()
    began = time.monotonic()
    for step in steps(made, patience, pace.haste):
        for chunk in step.chunks:
            result.last[chunk.offset] = step.outcome
        result.worst = max(result.worst, step.wall)
        result.processor += step.processor
        if done is not None:
            done(step)
        time.sleep(pace.pause(step.processor, worth_it=True))
    result.seconds = time.monotonic() - began
    return result
