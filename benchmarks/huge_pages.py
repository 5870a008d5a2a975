"""Huge pages of 2 MiB, reserved while something is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

HUGE: Final = 2 << 20
NR_HUGE: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def free_huge_pages() -> int:
    """How many are free; 0 on a kernel without them."""
    with contextlib.suppress(OSError):
        return int(NR_HUGE.with_name("free_hugepages").read_text())
    return 0


class NoHugePagesError(Exception):
    """They cannot be reserved."""


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many free huge pages more than there were.  Raises NoHugePagesError."""
    try:
        before = int(NR_HUGE.read_text())
        NR_HUGE.write_text(str(before + count))
    except OSError as error:
        raise NoHugePagesError(f"no huge pages to be had: {error}") from error
    try:
        if int(NR_HUGE.read_text()) < before + count:
            # There may be memory enough, in pieces.
            Path("/proc/sys/vm/compact_memory").write_text("1")
            NR_HUGE.write_text(str(before + count))
        if int(NR_HUGE.read_text()) < before + count:
            raise NoHugePagesError(f"{count} huge pages cannot be reserved")
        yield
    finally:
        NR_HUGE.write_text(str(before))
