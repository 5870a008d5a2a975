"""Failures that are expected: one line that says what is wrong and what to do."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from typing import Final

from libmshare.cli.output import printable


class CommandError(Exception):
    """The command fails; the text is told to the user."""

    def __init__(self, text: str, code: int = 1) -> None:
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


GONE: Final = frozenset(
    {errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ECONNRESET}
)
"""What calls fail with once the daemon has died."""

_ADVICE: Final = {
    errno.ENOENT: "no such region; `mshare ls` lists them",
    errno.ESTALE: "the region was removed just now",
    errno.EACCES: "permission denied; its mode says who may, `mshare ls` shows it",
    errno.EINVAL: "a region's name has no slash",
    errno.ENAMETOOLONG: "a region's name has at most 255 bytes",
    errno.EMFILE: "out of descriptors, here or in the daemon; see `mshare doctor`",
    errno.ENFILE: "the system is out of descriptors",
    errno.EPROTO: "library and daemon are of different versions; install the same for both",
}


def not_mounted() -> DaemonGoneError:
    """For when no msharefs is found."""
    wanted = os.environ.get("MSHARE_ROOT")
    if wanted:
        return DaemonGoneError(
            f"no msharefs is mounted on {printable(wanted)}; start msharefsd "
            f"--mountpoint={printable(wanted)}, or unset MSHARE_ROOT"
        )
    return DaemonGoneError(
        "msharefs is not mounted; start msharefsd, or say where it is with --root"
    )


def explain(error: OSError, name: bytes, advice: Mapping[int, str] | None = None) -> CommandError:
    """The failure that a call on the region `name` stands for.

    `advice` says what an errno means for that call, where it is something special.
    """
    code = error.errno or errno.EIO
    if code in GONE:
        return DaemonGoneError("the daemon of msharefs has died; start msharefsd again")
    text = (advice or {}).get(code) or _ADVICE.get(code) or os.strerror(code)
    return CommandError(f"{printable(name)}: {text}")
