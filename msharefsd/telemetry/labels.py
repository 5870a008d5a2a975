"""Names of other people's as our logs and texts show them: printable, and on one line."""

from __future__ import annotations


def label(name: bytes) -> str:
    r"""A name for logs and texts: printable, on one line, and no other name's.

    Other bytes, space and backslash are \ooo.
    """
    return "".join(
        char
        if char.isprintable() and char not in " \\"
        else "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape"))
        for char in name.decode("utf-8", "surrogateescape")
    )
