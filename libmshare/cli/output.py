"""How things are written: names, sizes, tables, JSON."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msharefsd.telemetry import figures

if TYPE_CHECKING:
    from rich.table import Table

_PLAIN: Final = re.compile(r"[\w@%+:,./-][\w@%+:,./=-]*")
"""What no shell takes for anything else; `=ls` is a path in zsh."""
GAP: Final = 2
"""Between two columns."""


def printable(name: str | bytes) -> str:
    r"""A name as a word of bash, zsh and ksh, on one line that no terminal takes for a command.

    As it is, or in quotes, or as $'...' where what is not printable, spaces, quotes and
    backslashes are \ooo, byte by byte: so it can be pasted back, it is one word for awk, too,
    and two names are never printed alike.
    """
    text = name if isinstance(name, str) else os.fsdecode(name)
    if _PLAIN.fullmatch(text) and text.isprintable():
        return text
    escaped = _escape(text, " \\'")
    return f"$'{escaped}'" if escaped != text else f"'{text}'"


def printable_line(line: str | bytes) -> str:
    r"""A line of text: what is not printable is \ooo; spaces and backslashes stay."""
    return _escape(line if isinstance(line, str) else os.fsdecode(line), "")


def _escape(text: str, also: str) -> str:
    return "".join(
        char
        if char.isprintable() and char not in also
        else "".join(f"\\{byte:03o}" for byte in os.fsencode(char))
        for char in text
    )


def size(count: int | None) -> str:
    """Bytes for people, as in 8.1M; "-" for none."""
    if count is None:
        return "-"
    return figures.size(count)


def address(value: int | None) -> str:
    """An address, hexadecimal."""
    return "-" if value is None else f"{value:#x}"


class Column(NamedTuple):
    """A column of a table."""

    title: str
    right: bool = False
    rank: int = 0
    """What goes first where there is no room; 0 stays."""


def on_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout.isatty()


def write(text: str) -> None:
    """A line, or lines, to standard output."""
    print(text)  # noqa: T201 - a command's output


def write_json(value: Any) -> None:
    """JSON, in ASCII: names with undecodable bytes are lone surrogates, as in Python."""
    import json  # noqa: PLC0415 - who wants a table does not pay for it

    write(json.dumps(value, indent=2))


def write_line_of_json(value: Any) -> None:
    """The same on one line, at once: of what goes on there are many."""
    import json  # noqa: PLC0415 - as above

    print(json.dumps(value), flush=True)  # noqa: T201 - a command's output


def write_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """A table: with rich on a terminal, else as aligned text with all its columns."""
    if not on_terminal():
        write(plain_table(columns, rows))
        return
    from rich.console import Console  # noqa: PLC0415 - a pipe does not pay for it

    console = Console(highlight=False)
    console.print(rich_table(*fitted(columns, rows, console.width)))


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes (Unicode's East Asian width)."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def widths(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    """How wide each column is."""
    lines = [[column.title for column in columns], *rows]
    return [max(map(columns_of, column)) for column in zip(*lines, strict=True)]


def fitted(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int
) -> tuple[list[Column], list[list[str]]]:
    """The table without the columns for which there is no room in `width`.

    Whole columns go, by their rank: half a figure is a wrong one.
    """
    each = widths(columns, rows)
    kept = list(range(len(columns)))
    while sum(each[at] + GAP for at in kept) - GAP > width:
        rank, at = max((columns[at].rank, at) for at in kept)
        if rank == 0:
            break
        kept.remove(at)
    return [columns[at] for at in kept], [[row[at] for at in kept] for row in rows]


def plain_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text, the titles above it."""
    each = widths(columns, rows)
    return "\n".join(
        (" " * GAP)
        .join(
            " " * (width - columns_of(cell)) + cell
            if column.right
            else cell + " " * (width - columns_of(cell))
            for cell, width, column in zip(line, each, columns, strict=True)
        )
        .rstrip()
        for line in ([column.title for column in columns], *rows)
    )


def rich_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    """The same for a terminal."""
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for column in columns:
        # Folded, not cut: half a name is nobody's.
        table.add_column(
            Text(column.title), justify="right" if column.right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table
