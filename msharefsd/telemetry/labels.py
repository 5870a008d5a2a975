"""Names of other people's as our logs and texts show them: printable, and on one line."""

from __future__ import annotations


def label(name: bytes) -> str:
    r"""A name for logs and texts: printable, on one line, and no other name's.

    Other bytes, space and backslash are \ooo.
    """
    return _escaped(name.decode("utf-8", "surrogateescape"), " \\")


def line(text: str) -> str:
    r"""A value for a text of one line each: what is not printable, and the backslash, is \ooo."""
    return _escaped(text, "\\")


def _escaped(text: str, also: str) -> str:
    return "".join(
        char
        if char.isprintable() and char not in also
        else "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape"))
        for char in text
    )
