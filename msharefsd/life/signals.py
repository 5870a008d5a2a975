"""What tells the daemon to end: heard from the program's first line to its last.

Python's own way, a handler for each signal while somebody listens, leaves gaps: before
there is a loop the process would die of the signal, and while it ends a second one would
tear the end apart (a traceback, a mount that nobody takes down).  So the handlers are there
from the first line on, they only note what came, and they stay.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """The signals that came, oldest first."""

    def __init__(self) -> None:
        """Begin to listen.

        SIGHUP stays ignored if it was (nohup(1)).
        """
        self.came: list[signal.Signals] = []
        self.wake: Callable[[], object] = lambda: None
        """Called after each, by the handler: so it has to be safe there."""
        self._terminal = _has_terminal()
        for number in ENDING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.came.append(signal.Signals(number))
        self.wake()

    @property
    def hands_over(self) -> bool:
        """Whether we are to leave all as it is for the next daemon, the mount too.

        SIGHUP alone asks for that, but from a terminal: there it says that the terminal is
        gone.  sudo(8) may send one beside another's SIGTERM.
        """
        return set(self.came) == {signal.SIGHUP} and not self._terminal

    def words(self) -> str:
        """What the first was, for the log."""
        name = self.came[0].name
        return f"{name} (the terminal is gone)" if self._closed_terminal() else name

    def _closed_terminal(self) -> bool:
        return self.came[0] == signal.SIGHUP and self._terminal

    def close(self) -> None:
        """The very end: whatever comes now is nobody's, and does not change how we end."""
        self.wake = lambda: None
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def _has_terminal() -> bool:
    """Whether we have a controlling terminal: tty_nr in proc_pid_stat(5)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{os.getpid()}/stat").read_text(errors="replace")
        return int(status.rpartition(")")[2].split()[4]) != 0
    return False
