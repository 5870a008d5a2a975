"""What is counted of one region; its pager has it, and the board shows it to the front."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """Since its pager has had the region."""

    faults: int = 0
    """Page faults of its sharers."""
    populated: int = 0
    """Bytes populated for these."""
    huge: int = 0
    """Bytes that are in huge pages now."""

    def numbers(self) -> tuple[int, int, int]:
        """As the board has them."""
        return self.faults, self.populated, self.huge
