"""Metrics of single regions: of the largest ones, since names are whatever users like.

Each series that a scraper has seen costs it memory, so there are never more than a few for
each of MOST regions; how many regions are left out is told.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from msharefsd.telemetry.counts import Counts

MOST: Final = 100


class Figures(NamedTuple):
    """Of one region that has its name."""

    memory: int
    sharers: int
    uid: int
    label: str
    counts: Counts


Value = Callable[[Figures], int]
_GAUGES: Final[dict[str, tuple[str, Value]]] = {
    "memory_bytes": ("memory that the region holds", lambda each: each.memory),
    "sharers": ("processes that have it attached", lambda each: each.sharers),
    "huge_bytes": ("memory of it in huge pages", lambda each: each.counts.huge),
}
_COUNTERS: Final[dict[str, tuple[str, Value]]] = {
    "faults": ("page faults of its sharers", lambda each: each.counts.faults),
    "populated_bytes": ("populated for these", lambda each: each.counts.populated),
}


def families(regions: Iterable[Figures]) -> Iterator[Metric]:
    """What is told of those that hold the most memory."""
    found = list(regions)
    largest = heapq.nlargest(MOST, found, key=lambda each: (each.memory, each.label))
    for kind, told in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
        for name, (text, value) in told.items():
            family = kind(f"msharefs_region_{name}", text, labels=["region", "uid"])
            for each in largest:
                family.add_metric([each.label, str(each.uid)], value(each))
            yield family
    yield GaugeMetricFamily(
        "msharefs_regions_left_out",
        "regions that have no figures of their own here, for being too many",
        value=len(found) - len(largest),
    )
