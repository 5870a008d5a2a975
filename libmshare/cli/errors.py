"""Failures that are expected: one line that says what is wrong and what to do."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from typing import Final

from libmshare import errors
from libmshare.cli.exits import Exit
from libmshare.cli.output import printable
from libmshare.errors import ADVICE, GONE


class CommandError(Exception):
    """The command fails; the text is told to the user."""

    def __init__(self, text: str, code: int = Exit.FAILED) -> None:
        """`code` is the exit status."""
        super().__init__(text, code)
        self.text = text
        self.code = code

    def __str__(self) -> str:
        return self.text

    def tell(self) -> None:
        """Tell the user, on standard error."""
        print(f"mshare: {self.text}", file=sys.stderr)  # noqa: T201 - that is where it goes


class DaemonGoneError(CommandError):
    """msharefs is not there, or its daemon has died: it may come back."""


class NotAnsweringError(CommandError):
    """The daemon lives, or seems to, and does not answer."""


_ADVICE: Final = ADVICE | {errno.EINVAL: "a region's name has no slash"}


def not_mounted() -> DaemonGoneError:
    """For when no msharefs is found."""
    wanted = os.environ.get("MSHARE_ROOT")
    text = errors.not_mounted(printable(wanted) if wanted else None)
    for environment, option in (
        ("or unset MSHARE_ROOT", "or say where it is (--root, MSHARE_ROOT)"),
        ("or say where it is with MSHARE_ROOT", "or say where it is with --root"),
    ):
        text = text.replace(environment, option)
    return DaemonGoneError(text)


def no_such_region(name: bytes) -> CommandError:
    """For a name that is not there."""
    return explain(OSError(errno.ENOENT, os.strerror(errno.ENOENT)), name)


def explain(error: OSError, name: bytes, advice: Mapping[int, str] | None = None) -> CommandError:
    """The failure that a call on the region `name` stands for.

    `advice` says what an errno means for that call, where it is something special.
    """
    code = error.errno or errno.EIO
    if code in GONE:
        return DaemonGoneError(errors.DAEMON_GONE)
    text = (advice or {}).get(code) or _ADVICE.get(code) or os.strerror(code)
    return CommandError(f"{printable(name)}: {text}")
