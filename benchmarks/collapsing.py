"""How soon a region has its page tables back after it was filled.

    make bench BENCH="--only collapsing"
    .venv/bin/python benchmarks/collapsing.py
    .venv/bin/python benchmarks/collapsing.py --quick

A region on 4 KiB pages that many processes have attached, with the daemon's default settings.
One of them fills it; from then until all of it is huge pages is what is measured.  What a
huge page costs grows with the sharers: the kernel looks for each of the 512 pages in all of
them (rmap_walk_file(), mm/rmap.c).  Takes root, or CAP_SYS_NICE and CAP_SYS_PTRACE.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

# Behind what is installed: libmshare and msharefsd are the wheel's, not the source's.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import results, service, story
from benchmarks.huge_pages import HUGE
from benchmarks.options import Options
from benchmarks.table import Table
from benchmarks.worker import WorkerError


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure; the size in bytes."""

    size: int
    counts: tuple[int, ...]
    """Of sharers."""
    rounds: int


FULL: Final = Plan(2 * story.GiB, (1, 10, 100), 3)
QUICK: Final = Plan(512 * story.MiB, (1, 10, 100), 1)
SMOKE: Final = Plan(64 * story.MiB, (2, 4), 1)


@dataclass(frozen=True, slots=True)
class Point:
    """A region that so many have attached."""

    sharers: int
    filled: float
    """In how many seconds one of them filled it."""
    collapsed: float
    """How many seconds later all of it was huge pages."""


def measure(stage: story.Stage, plan: Plan, sharers: int) -> Point:
    """One filling of one region.  Raises CrowdError."""
    with stage.empty(story.COLLAPSED) as (first, start, mount):
        assert mount is not None
        start().add(sharers - 1)
        (filled,) = first.do("fill")
        since = time.monotonic()
        story.wait_until_collapsed(mount, plan.size // HUGE)
        return Point(sharers, int(filled) / 1e9, time.monotonic() - since)


def _measured(plan: Plan) -> Iterator[Point]:
    with story.temporary_directory() as directory:
        stage = story.Stage(directory, story.Plan(plan.size, plan.counts, 0))
        for _ in range(plan.rounds):
            for sharers in plan.counts:
                yield measure(stage, plan, sharers)


def tables(document: results.Document) -> list[Table]:
    """What is printed of it: medians of its rounds."""
    plan = document["plan"]
    caption = (
        f"A region of {plan['size'] / story.GiB:g} GiB that one process fills, collapsed by the "
        f"daemon. {results.conditions(document)}"
    )
    rows = []
    for sharers in plan["counts"]:
        rounds = [point for point in document["points"] if point["sharers"] == sharers]
        filled, collapsed = (
            statistics.median(point[key] for point in rounds) for key in ("filled", "collapsed")
        )
        rows.append((str(sharers), f"{filled:.1f} s", f"{collapsed:.1f} s later"))
    return [Table(caption, ("sharers", "filled in", "collapsed"), rows)]


def main() -> None:
    """Run, print, write."""
    options = Options(__doc__, (FULL, QUICK, SMOKE), "less memory")
    arguments, plan = options.parse(story.LONGEST)
    try:
        with results.Run("collapsing") as run:
            points = list(_measured(plan))
    except (service.ServiceError, WorkerError, subprocess.CalledProcessError) as error:
        sys.exit(f"collapsing: {error}")
    document = run.document(plan=asdict(plan), points=[asdict(point) for point in points])
    print(*tables(document), run.write(document, arguments.results), sep="\n\n")


if __name__ == "__main__":
    main()
