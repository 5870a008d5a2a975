"""How much to populate around a fault."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

STREAMS: Final = 16


class Chunks:
    """More the longer a thread goes on upwards.

    Chunks are aligned to their size, so that they fill huge-page ranges.  A fault
    right behind a chunk doubles the next one; several threads each have their own
    run.  A fault anywhere else begins small: a program that touches one page here
    and one there must not be given memory that it never uses.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        """`smallest` and `largest` chunk, in bytes, powers of two."""
        self._smallest = smallest
        self._largest = largest
        self._runs: OrderedDict[int, int] = OrderedDict()

    def chunk(self, offset: int, largest: int | None = None) -> tuple[int, int]:
        """Where to populate for a fault at `offset`: (start, length) in bytes.

        `largest`: another one, for this time.
        """
        length = min(self._runs.pop(offset, self._smallest // 2) * 2, largest or self._largest)
        start = offset - offset % length
        self._runs[start + length] = length
        if len(self._runs) > STREAMS:
            self._runs.popitem(last=False)
        return start, length
