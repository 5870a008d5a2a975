"""Figures for people."""

from __future__ import annotations

from typing import Final

_UNITS: Final = "KMGTPE"


def amount(count: int) -> str:
    """The same within a sentence, where a number alone has no unit."""
    return f"{size(count)} bytes" if count < 1024 else size(count)


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


def duration(seconds: float) -> str:
    """42 s, 7 min 3 s, 5 h 12 min, 3 d 4 h: the two largest units."""
    whole = int(seconds)
    for unit, name, smaller, its_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller} {its_name}"
    return f"{whole} s"


def plural(count: int, what: str) -> str:
    """1 region, 2 regions, 2 processes."""
    if count == 1:
        return f"1 {what}"
    return f"{count} {what}es" if what.endswith("s") else f"{count} {what}s"
