"""What is counted; `.metrics` shows it as OpenMetrics text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.registry import Collector
from trio.lowlevel import current_statistics


class Counted(Protocol):
    """What is shown of a region."""

    @property
    def sharers(self) -> Sized:
        """Its sharers."""

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
        self.attaches = self._counter("attaches", "sharers attached")
        self.refused = self._counter("refused", "calls turned down", "errno")
        self.limited = self._counter("limited", "calls that met a user's limit", "limit")
        self._registry.register(_Current(regions))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"msharefs_{name}", text, labels, registry=self._registry)

    def render(self) -> bytes:
        """OpenMetrics text."""
        return bytes(generate_latest(self._registry))  # type: ignore[no-untyped-call] # theirs


class _Current(Collector):
    def __init__(self, regions: Callable[[], Iterable[Counted]]) -> None:
        self._regions = regions

    def collect(self) -> Iterator[Metric]:
        living = list(self._regions())
        for name, text, value in (
            ("msharefs_regions", "regions that have memory", len(living)),
            ("msharefs_sharers", "sharers", sum(len(region.sharers) for region in living)),
            ("msharefs_memory_bytes", "memory held", sum(r.allocated() for r in living)),
            ("msharefs_tasks", "tasks of the daemon", current_statistics().tasks_living),
        ):
            yield GaugeMetricFamily(name, text, value=value)
