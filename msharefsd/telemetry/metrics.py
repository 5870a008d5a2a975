"""What is counted; `.metrics` shows it as OpenMetrics text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import accumulate
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.registry import Collector
from trio.lowlevel import current_statistics

COUNTED: Final = ("_total", "_bucket", "_sum", "_count")
"""What names of samples end with that only grow."""

Sample = tuple[str, dict[str, str], float]
"""Name, labels and value."""


BUCKETS: Final = (
    *(5e-05, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 5.0),
)
"""Seconds; the last one is +Inf."""
SOURCES: Final = ("memory", "file")


class Counted(Protocol):
    """What is shown of a region."""

    @property
    def sharers(self) -> Sized:
        """Its sharers."""

    @property
    def linked(self) -> bool:
        """Whether it has its name."""

    def allocated(self) -> int:
        """Bytes of memory that it holds."""


class Metrics:
    """The counters of one daemon."""

    def __init__(self, regions: Callable[[], Iterable[Counted]]) -> None:
        """`regions()` gives the regions that have memory, at the time of a read."""
        self._registry = CollectorRegistry()
        self.faults = self._counter("faults", "page faults served", "kind")
        self._faults: dict[str, Counter] = {}
        self.populated = self._counter("populated_bytes", "memory populated for faults, bytes")
        self.sigbus = self._counter("sigbus", "faults answered with SIGBUS or EFAULT", "reason")
        self.written_back = self._counter("written_back_bytes", "written to mapped files, bytes")
        self.writeback_errors = self._counter("writeback_errors", "rounds that a file failed")
        self.collapsed = self._counter("collapsed_chunks", "2 MiB chunks made huge pages")
        self.collapse_calls = self._counter(
            "collapse_calls", "calls of MADV_COLLAPSE, by what the kernel said", "errno"
        )
        self.not_collapsed = self._counter("not_collapsed", "chunks that were not", "why")
        self.intruded = self._counter("intruded_pages", "pages that a reader made, taken out")
        self.attaches = self._counter("attaches", "sharers attached")
        self.refused = self._counter("refused", "calls turned down", "errno")
        self.lost_files = self._counter(
            "lost_files", "files of the run directory that were removed under the daemon"
        )
        self.limited = self._counter("limited", "calls that met a user's limit", "limit")
        self.service = _ServiceTimes()
        self._registry.register(self.service)
        self._registry.register(_Current(regions))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"msharefs_{name}", text, labels, registry=self._registry)

    def count_fault(self, kind: str) -> None:
        """One was served.  To look up a label takes much longer than to count."""
        child = self._faults.get(kind)
        if child is None:
            child = self._faults[kind] = self.faults.labels(kind)
        child.inc()

    def samples(self) -> list[Sample]:
        """What is counted here: for the front, which adds up."""
        return [
            (sample.name, dict(sample.labels), float(sample.value))
            for family in self._registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]

    def render(self, others: Iterable[Sample] = (), more: Iterable[Metric] = ()) -> bytes:
        """OpenMetrics text of what is counted here and in `others`, and of `more` families."""
        registry = CollectorRegistry()
        registry.register(_Sum([*self._registry.collect()], others, more))
        return bytes(generate_latest(registry))  # type: ignore[no-untyped-call] # theirs


class _ServiceTimes(Collector):
    """How long faults took, from when they were read to the answer, by what was waited for.

    prometheus_client's Histogram goes through its buckets one by one, in a lock; here it is on
    the way of each fault.
    """

    def __init__(self) -> None:
        self._counts = {source: [0] * (len(BUCKETS) + 1) for source in SOURCES}
        self._sums = dict.fromkeys(SOURCES, 0.0)

    def observe(self, source: str, seconds: float) -> None:
        """One has been answered."""
        self._counts[source][bisect_left(BUCKETS, seconds)] += 1
        self._sums[source] += seconds

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "msharefs_fault_seconds",
            "from when a page fault was read to its answer; file: a file had to be read",
            labels=["source"],
        )
        for source, counts in self._counts.items():
            bounds = [*map(str, BUCKETS), "+Inf"]
            buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
            family.add_metric([source], buckets, self._sums[source])
        yield family


class _Sum(Collector):
    """The same families, counted in several processes."""

    def __init__(
        self, families: list[Metric], others: Iterable[Sample], more: Iterable[Metric]
    ) -> None:
        self._families = families
        self._more = more
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for name, labels, value in others:
            key = name, tuple(sorted(labels.items()))
            self._values[key] = self._values.get(key, 0.0) + value

    def collect(self) -> Iterator[Metric]:
        left = dict(self._values)
        for family in self._families:
            names = {family.name, *(f"{family.name}{ending}" for ending in COUNTED)}
            ours = [s for s in family.samples if not s.name.endswith("_created")]
            whole = Metric(family.name, family.documentation, family.type)
            for sample in ours:
                key = sample.name, tuple(sorted(sample.labels.items()))
                whole.add_sample(sample.name, sample.labels, sample.value + left.pop(key, 0.0))
            for key in [key for key in left if key[0] in names]:
                whole.add_sample(key[0], dict(key[1]), left.pop(key))
            yield whole
        yield from self._more


def _allocated(region: Counted) -> int:
    return region.allocated()


class _Current(Collector):
    def __init__(self, regions: Callable[[], Iterable[Counted]]) -> None:
        self._regions = regions

    def collect(self) -> Iterator[Metric]:
        living = list(self._regions())
        removed = [region for region in living if not region.linked]
        for name, text, value in (
            ("msharefs_regions", "regions that have memory", len(living)),
            ("msharefs_sharers", "sharers", sum(len(region.sharers) for region in living)),
            ("msharefs_memory_bytes", "memory held", sum(map(_allocated, living))),
            ("msharefs_removed_regions", "of these, removed and in use still", len(removed)),
            ("msharefs_removed_memory_bytes", "held by those", sum(map(_allocated, removed))),
            ("msharefs_tasks", "tasks of the daemon", current_statistics().tasks_living),
        ):
            yield GaugeMetricFamily(name, text, value=value)
