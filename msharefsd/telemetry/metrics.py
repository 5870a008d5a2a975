"""What is counted; `.metrics` shows it as OpenMetrics text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.registry import Collector
from trio.lowlevel import current_statistics

Sample = tuple[str, dict[str, str], float]
"""Name, labels and value."""


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
        self.limited = self._counter("limited", "calls that met a user's limit", "limit")
        self._registry.register(_Current(regions))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"msharefs_{name}", text, labels, registry=self._registry)

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
            names = {family.name, f"{family.name}_total"}
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
