"""Figures for people."""

from __future__ import annotations

from typing import Final

_UNITS: Final = "KMGTPE"


def size(count: int) -> str:
    """Bytes: at most four digits, in powers of 1024.

    Exact when there is no point in it: 512G is 512 GiB to the byte.
    """
    if count < 1024:
        return str(count)
    value, unit = float(count), ""
    for unit in _UNITS:  # noqa: B007 - the one that it stopped at is wanted
        value /= 1024
        if value < 1023.5:
            break
    exact = count % (1 << 10 * (_UNITS.index(unit) + 1)) == 0
    return f"{value:.0f}{unit}" if exact or value >= 99.95 else f"{value:.1f}{unit}"


def plural(count: int, what: str) -> str:
    """1 region, 2 regions, 2 processes."""
    if count == 1:
        return f"1 {what}"
    return f"{count} {what}es" if what.endswith("s") else f"{count} {what}s"
