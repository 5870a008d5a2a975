"""The one exception for what a client may not or cannot have."""

from __future__ import annotations

from collections.abc import Iterator


class Refused(OSError):  # noqa: N818 - an answer, not a defect
    """A request is turned down: the errno for the caller, a sentence for people.

    File-system handlers answer with the errno, the control socket with both.
    Anything else that leaves a handler is a defect of the daemon.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message


def leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The exceptions in a group, and in groups in there."""
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from leaves(each)
        else:
            yield each


class StartError(Exception):
    """The daemon cannot start; the text says why and what to do."""


class StateError(StartError):
    """What another daemon has left cannot be used, and will not become right by itself."""
