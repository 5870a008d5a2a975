"""Tables, and rows of results: what was measured on both sides, as text and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

PERCENTILES = 100
CLOSE = 1.05


@dataclass(frozen=True, slots=True)
class Table:
    """What is printed, and shown in the report."""

    caption: str
    """Lines of what it is and where it was measured; may be empty."""
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[int] = frozenset({0})
    """Columns that are no numbers, and begin at the left."""

    def __str__(self) -> str:
        """Plain text, columns aligned."""
        cells = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if place in self.words else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([self.caption, *lines] if self.caption else lines)


@dataclass(frozen=True, slots=True)
class Row:
    """One measure; `ours` and `peers` are samples in `unit`."""

    measure: str
    unit: str
    ours: Sequence[float]
    peers: Sequence[float]
    peer: str
    """What the peer is."""
    target: float | None = None
    """The ratio that is not to be exceeded."""
    limit: float | None = None
    """What ours, in `unit`, is not to exceed."""
    percentile: int = 50
    """Which percentile of the samples stands for them."""

    def _typical(self, samples: Sequence[float]) -> float:
        if self.percentile == PERCENTILES // 2 or len(samples) == 1:
            return statistics.median(samples)
        return statistics.quantiles(samples, n=PERCENTILES)[self.percentile - 1]

    @property
    def our_value(self) -> float:
        """What stands for our samples."""
        return self._typical(self.ours)

    @property
    def peer_value(self) -> float:
        """What stands for the peer's samples."""
        return self._typical(self.peers)

    @property
    def ratio(self) -> float:
        """Ours over the peer's: below 1, ours is the better one."""
        return self.our_value / self.peer_value

    def verdict(self) -> str:
        """The target and whether it is met, if there is one.

        Above it by little is said to be so: two runs of the same side differ as much.
        """
        if self.limit is not None:
            word = "met" if self.our_value <= self.limit else "MISSED"
            return f"<= {self.limit:g} {self.unit} {word}"
        if self.target is None:
            return ""
        if self.ratio <= self.target:
            word = "met"
        elif self.ratio <= self.target * CLOSE:
            word = f"within {CLOSE - 1:.0%}"
        else:
            word = "MISSED"
        return f"<= {self.target:g} {word}"

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "measure": self.measure,
            "unit": self.unit,
            "percentile": self.percentile,
            "ours": self.our_value,
            "peer": self.peer,
            "peer_value": self.peer_value,
            "ratio": self.ratio,
            "target": self.target,
            "limit": self.limit,
            "verdict": self.verdict(),
            "ours_summary": _summary(self.ours),
            "peer_summary": _summary(self.peers),
        }


def _quartile(samples: Sequence[float], which: int) -> float:
    if len(samples) == 1:
        return samples[0]
    return statistics.quantiles(samples, n=4, method="inclusive")[which]


def _summary(samples: Sequence[float]) -> dict[str, float]:
    return {
        "count": len(samples),
        "min": min(samples),
        "first_quartile": _quartile(samples, 0),
        "median": _quartile(samples, 1),
        "third_quartile": _quartile(samples, 2),
        "max": max(samples),
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"


def of_peers(rows: Sequence[dict[str, Any]], caption: str) -> Table:
    """The table of rows that are JSON."""
    return Table(
        caption,
        ("measure", "unit", "ours", "peer", "ratio", "target", "the peer is"),
        [
            (
                row["measure"],
                row["unit"],
                _number(row["ours"]),
                _number(row["peer_value"]),
                f"{row['ratio']:.2f}",
                row["verdict"],
                row["peer"],
            )
            for row in rows
        ],
        words={0, 1, 5, 6},
    )
