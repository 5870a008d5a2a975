"""`mshare collapse`: page tables back, from programs that run."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

from libmshare.cli import output, tables
from libmshare.cli.collapsing import Settings, write_metrics
from libmshare.cli.errors import CommandError
from libmshare.cli.output import Column, printable_line
from msharetables import collapse as engine
from msharetables import proc, survey
from msharetables.collapse import Outcome, Plan, Result, Step
from msharetables.objects import COLLAPSIBLE
from msharetables.pace import Pace, hurry
from msharetables.patience import Patience
from msharetables.survey import Object
from msharetables.watch import Watcher, tables_of

_WORTH: Final = 1 << 20
"""Page tables of fewer bytes are not worth an error."""
_WHY: Final = {
    Outcome.BUSY: "in use just now, or at its cgroup's limit: try again",
    Outcome.NO_MEMORY: "no free huge page: memory is full or fragmented, try again later",
    Outcome.REFUSED: "refused: changed meanwhile, or hugepages-2048kB/shmem_enabled is not "
    "`inherit` (mshare doctor)",
    Outcome.GONE: "its process has ended",
}
_COLUMNS: Final = (
    Column("BACK", right=True),
    Column("CHUNKS", right=True),
    Column("LEFT-OUT", right=True),
    Column("GROWTH", right=True),
    Column("SHARERS", right=True),
    Column("SECONDS", right=True),
    Column("OBJECT"),
)


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asks for."""

    pids: tuple[int, ...]
    settings: Settings
    dry_run: bool
    json: bool


def collapse(order: Order) -> bool:
    """Do it once; returns whether all that was tried is done.  Raises CommandError."""
    chosen = None
    if order.pids:
        for pid in order.pids:
            if not os.path.exists(f"/proc/{pid}"):
                raise CommandError(f"{pid}: no such process")
        chosen = proc.with_children(order.pids)
    limits, pace = order.settings.limits(), Pace(order.settings.share())
    patience = Patience(survey.PATIENCE_SECONDS)
    found = tables.look(_wanted(order.settings, chosen))
    objects = [
        each
        for each in found.objects
        if each.name.kind in COLLAPSIBLE
        and each.size >= limits.smallest
        and order.settings.means(each)
    ]
    plans = [engine.plan(each, limits.filled, patience) for each in objects if each.reclaimable]
    plans = [plan for plan in plans if plan.chunks or plan.too_empty or plan.lacking]
    if not order.json and os.geteuid() != 0:  # root sees what there is to be seen
        for line in tables.unseen(found):
            output.write(line)
    if order.dry_run:
        _tell_plans(plans, objects, pace, json=order.json)
        return True
    if not order.json:
        _tell_hopeless(objects)
        _tell_estimate(plans, pace)
    results = _carry_out(plans, pace, patience, json=order.json)
    if order.json:
        output.write_json([_record(*each) for each in results])
    elif not any(plan.chunks for plan in plans):
        output.write(_nothing(plans))
    return all(not _failed(result) for _, result, _, _ in results)


def _nothing(plans: Sequence[Plan]) -> str:
    text = "nothing to free"
    if empty := sum(plan.too_empty for plan in plans):
        text += f"; {empty} chunks of 2 MiB are too empty (--min-filled)"
    for plan in plans:
        if plan.lacking:
            text += f"; {printable_line(plan.object.label)}: {plan.lacking}"
    return text


def _wanted(settings: Settings, chosen: Iterable[int] | None) -> Iterable[int] | None:
    if not settings.users and not settings.units:
        return chosen
    wanted = []
    for pid in proc.pids() if chosen is None else chosen:
        with contextlib.suppress(OSError):
            status = proc.status(pid)
            if status is not None and settings.of(status, proc.cgroup(pid)):
                wanted.append(pid)
    return wanted


def _seconds(plan: Plan, pace: Pace) -> float:
    return plan.seconds / pace.share


def _tell_plans(
    plans: Sequence[Plan], objects: Sequence[Object], pace: Pace, *, json: bool
) -> None:
    if json:
        output.write_json([_plan_record(plan, pace) for plan in plans])
        return
    rows = [
        [
            output.size(plan.object.reclaimable),
            str(len(plan.chunks)),
            str(plan.too_empty),
            output.size(plan.growth),
            str(len(plan.object.sharers)),
            f"{_seconds(plan, pace):.1f}",
            printable_line(plan.object.label),
        ]
        for plan in plans
    ]
    output.write_table(_COLUMNS, rows)
    _tell_hopeless(objects)


def _tell_hopeless(objects: Sequence[Object]) -> None:
    for each in objects:
        if each.tables >= _WORTH and not each.congruent:
            output.write(f"{printable_line(each.label)}: {tables.not_congruent(each)}")


def _tell_estimate(plans: Sequence[Plan], pace: Pace) -> None:
    chunks = sum(len(plan.chunks) for plan in plans)
    if chunks:
        back = sum(plan.object.reclaimable for plan in plans)
        seconds = sum(_seconds(plan, pace) for plan in plans)
        output.write(
            f"{chunks} chunks of 2 MiB for up to {output.size(back)} of page tables: about "
            f"{seconds:.0f} s, with pauses"
        )


_Done = tuple[Plan, Result, int, int]
"""With the page tables of all sharers before and after (bytes)."""


def _carry_out(plans: Sequence[Plan], pace: Pace, patience: Patience, *, json: bool) -> list[_Done]:
    results: list[_Done] = []
    total = sum(len(plan.chunks) for plan in plans)
    hurry()
    with _progress(total, wanted=not json) as advance:
        for plan in plans:
            before = tables_of(plan.object)
            with _permission():
                result = engine.carry_out(plan, pace, patience, advance)
            results.append((plan, result, before, tables_of(plan.object)))
    if not json:
        for each in results:
            if each[0].chunks:
                output.write(_line(*each))
    return results


@contextlib.contextmanager
def _progress(total: int, *, wanted: bool) -> Iterator[Callable[[Step], None] | None]:
    if not wanted or not total or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 - a pipe does not pay for it
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("collapsing", total=total)

        def advance(step: Step) -> None:
            if step.outcome is not Outcome.BUSY:
                progress.advance(task, len(step.chunks))

        yield advance


@contextlib.contextmanager
def _permission() -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise CommandError(
            "process_madvise(2) is not permitted: it takes CAP_SYS_NICE, and CAP_SYS_PTRACE for "
            "other users' processes; run it as root, or let mshare-collapse.service do it"
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise CommandError("this kernel has no process_madvise(2): Linux 6.1 does it") from None
        raise


def _line(plan: Plan, result: Result, before: int, after: int) -> str:
    """What was achieved, in one line."""
    outcomes = result.outcomes
    text = (
        f"{printable_line(plan.object.label)}: page tables of {len(plan.object.sharers)} sharers "
        f"{output.size(before)} -> {output.size(after)}, {outcomes[Outcome.DONE]} of "
        f"{len(plan.chunks)} chunks in {result.seconds:.1f} s"
    )
    if plan.too_empty:
        text += f"; {plan.too_empty} left out, too empty"
    for outcome, why in _WHY.items():
        if outcomes[outcome]:
            text += f"; {outcomes[outcome]} {why}"
    return text


def _failed(result: Result) -> bool:
    return any(outcome is not Outcome.DONE for outcome in result.outcomes)


def _plan_record(plan: Plan, pace: Pace) -> dict[str, Any]:
    return tables.object_record(plan.object) | {
        "chunks": len(plan.chunks),
        "too_empty": plan.too_empty,
        "growth": plan.growth,
        "estimated_seconds": round(_seconds(plan, pace), 3),
    }


def _record(plan: Plan, result: Result, before: int, after: int) -> dict[str, Any]:
    return tables.object_record(plan.object) | {
        "chunks": len(plan.chunks),
        "too_empty": plan.too_empty,
        "growth": plan.growth,
        "outcomes": {outcome.value: count for outcome, count in result.outcomes.items()},
        "vmpte_before": before,
        "vmpte_after": after,
        "seconds": round(result.seconds, 3),
        "processor_seconds": round(result.processor, 3),
    }


# -- watching --


def watch(
    order: Order,
    pids: Callable[[], Iterable[int]] | None = None,
    notice: Callable[[Sequence[Object]], bool] | None = None,
) -> None:
    """Do it as soon as there is something, until a signal.  Raises CommandError.

    `pids`: which processes, instead of the order's.  `notice` is told of the objects that are
    large enough after each look; the watch ends when it says False.
    """
    settings = order.settings
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    watcher = Watcher(
        settings.limits(),
        Pace(settings.share()),
        pids=pids or _roots(order.pids),
        wanted=settings.of,
        chosen=settings.means,
    )
    hurry()
    report = _Report(watcher, order)
    try:
        while not ended.is_set():
            with _permission():
                objects = watcher.once(report.done)
            report.look()
            if notice is not None and not notice(objects):
                return
            ended.wait(settings.interval)
    finally:
        watcher.close()
        _notify("STOPPING=1")


def _roots(pids: Sequence[int]) -> Callable[[], Iterable[int]]:
    return (lambda: proc.with_children(pids)) if pids else proc.pids


class _Report:
    """What the watch tells: lines, metrics, the service manager."""

    def __init__(self, watcher: Watcher, order: Order) -> None:
        self._totals = watcher.totals
        self._json = order.json
        self._metrics = order.settings.metrics
        self._told: tuple[Any, ...] = ()
        self._before = time.monotonic() - 60

    def done(self, plan: Plan, result: Result) -> None:
        """An object was changed, or should have been."""
        outcomes = Counter(result.outcomes)
        if self._json:
            output.write_json(
                tables.object_record(plan.object)
                | {"outcomes": {each.value: count for each, count in outcomes.items()}}
            )
        elif outcomes[Outcome.DONE] or (plan.object.key, *outcomes.items()) != self._told:
            text = (
                f"{printable_line(plan.object.label)}: {outcomes[Outcome.DONE]} of "
                f"{len(plan.chunks)} chunks in {result.seconds:.2f} s, "
                f"{len(plan.object.sharers)} sharers"
            )
            for outcome, why in _WHY.items():
                if outcomes[outcome]:
                    text += f"; {outcomes[outcome]} {why}"
            self._told = (plan.object.key, *outcomes.items())
            output.write(text)
        sys.stdout.flush()

    def look(self) -> None:
        """It has looked."""
        totals = self._totals
        if totals.looks == 1:
            _notify("READY=1")
        text = f"{output.size(totals.back)} of page tables back, {totals.processes} processes"
        _notify(f"STATUS={text}\nWATCHDOG=1")
        if self._metrics and time.monotonic() - self._before >= 5:
            self._before = time.monotonic()
            figures = {
                "looks_total": ("Looks at all processes", "counter", float(totals.looks)),
                "processes": ("Processes that are looked at", "gauge", float(totals.processes)),
                "silent_processes": (
                    "Processes that hold their address space",
                    "gauge",
                    float(totals.silent),
                ),
                "reclaimable_objects": (
                    "Shared memory with page tables that can be freed",
                    "gauge",
                    float(totals.objects),
                ),
                "page_table_bytes_total": (
                    "Page tables that went",
                    "counter",
                    float(totals.back),
                ),
                "processor_seconds_total": (
                    "Processor time of the watcher",
                    "counter",
                    totals.processor,
                ),
            }
            try:
                write_metrics(self._metrics, figures, totals.chunks)
            except OSError as error:
                raise CommandError(f"{self._metrics}: {error.strerror}") from None


def _notify(text: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
        sending.sendto(text.encode(), address)
