"""The limits of a process: what there is, and who is told when one is met."""

from __future__ import annotations

import logging

from msharefsd.config import Config
from msharefsd.memory import shm
from msharefsd.memory.hugetlb import Pool
from msharefsd.region.limits import Limits
from msharefsd.telemetry.metrics import Metrics
from msharefsd.telemetry.seldom import Seldom

log = logging.getLogger(__name__)


def make_limits(config: Config, metrics: Metrics, pool: Pool | None) -> Limits:
    """As the settings have them."""
    seldom = Seldom()

    def memory() -> int:
        return shm.pool_bytes() + (pool.total() * pool.page if pool else 0)

    def hit(limit: str, message: str) -> None:
        metrics.limited.labels(limit).inc()
        if seldom.now(message):
            log.warning("%s", message)

    def free() -> int:
        return shm.free_bytes() + (pool.free() * pool.page if pool else 0)

    return Limits(config.limits, memory, hit, free)
