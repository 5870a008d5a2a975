"""How things are written: names, sizes, tables, JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from msharefsd.telemetry import figures

if TYPE_CHECKING:
    from rich.table import Table


def printable(name: str | bytes) -> str:
    r"""A name on one line that no terminal takes for a command.

    What is not printable becomes \ooo, byte by byte, and so does the backslash: two
    names are never printed alike.  Other bytes, undecodable ones too, as the daemon's
    texts have them.
    """
    return _escape(name, " \\")


def printable_line(line: str | bytes) -> str:
    """The same for a line of text: spaces and backslashes stay."""
    return _escape(line, "")


def _escape(text: str | bytes, also: str) -> str:
    decoded = text if isinstance(text, str) else os.fsdecode(text)
    return "".join(
        char
        if char.isprintable() and char not in also
        else "".join(f"\\{byte:03o}" for byte in os.fsencode(char))
        for char in decoded
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
    """A table: with rich on a terminal, else as aligned text."""
    if not on_terminal():
        write(plain_table(columns, rows))
        return
    from rich.console import Console  # noqa: PLC0415 - a pipe does not pay for it

    Console(highlight=False).print(rich_table(columns, rows))


def plain_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text, the titles above it."""
    lines = [[column.title for column in columns], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    )


def rich_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    """The same for a terminal."""
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        # Folded, not cut: half a name is nobody's.
        table.add_column(
            Text(column.title), justify="right" if column.right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table
