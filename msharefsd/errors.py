"""The one exception for what a client may not or cannot have."""

from __future__ import annotations


class Refused(OSError):  # noqa: N818 - an answer, not a defect
    """A request is turned down: the errno for the caller, a sentence for people.

    File-system handlers answer with the errno, the control socket with both.
    Anything else that leaves a handler is a defect of the daemon.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


class StartError(Exception):
    """The daemon cannot start; the text says why and what to do."""
