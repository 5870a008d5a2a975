"""Keys without Enter, for what goes on until q."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import Final, NoReturn

from libmshare.cli.exits import Exit

_ENDING: Final = frozenset(b"q\x03\x04")
"""What ends it: q, Ctrl-C, Ctrl-D."""


@contextlib.contextmanager
def keys() -> Iterator[Callable[[float], bool]]:
    """Keys without Enter, on a terminal that is put back whatever ends us.

    Gives a function that waits so many seconds and says whether q was pressed.
    """

    def end(number: int, frame: object) -> NoReturn:
        del frame
        sys.exit(Exit.SIGNAL + number)

    def wait(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([source] if listening else [], [], [], left)[0]:
                break
            typed = os.read(source, 64)
            if not typed or set(typed.lower()) & _ENDING:
                return True
        return False

    source = sys.stdin.fileno()
    listening = os.isatty(source)
    ending = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    old = termios.tcgetattr(source) if listening else None
    try:
        if old is not None:
            tty.setcbreak(source)
            # Ctrl-C is a key as well: as a signal it would interrupt whatever runs just now,
            # the child that asks the daemon too.
            modes = termios.tcgetattr(source)
            modes[6][termios.VINTR] = os.fpathconf(source, "PC_VDISABLE").to_bytes(1, "little")
            termios.tcsetattr(source, termios.TCSADRAIN, modes)
        yield wait
    except KeyboardInterrupt:
        pass
    finally:
        if old is not None:
            termios.tcsetattr(source, termios.TCSADRAIN, old)
        for number, handler in ending.items():
            signal.signal(number, handler)
