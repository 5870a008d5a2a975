"""`mshare run`: a program with the preload library."""

from __future__ import annotations

import os
import re
import signal
from typing import Final, NoReturn

from libmshare import core
from libmshare.cli.errors import CommandError
from libmshare.cli.output import printable

PRELOAD: Final = "libmshare-preload.so"
CANNOT_EXECUTE: Final = 126
NOT_FOUND: Final = 127
"""As env(1) has it."""


def run(command: list[str]) -> NoReturn:
    """Become the program, with plain mmap() and its kin acting on regions.

    Raises CommandError if it cannot be executed.
    """
    directory = core.library_directory()
    library = PRELOAD if directory is None else str(directory / PRELOAD)
    if re.search(r"[ :]", library):
        # ld.so(8): "there is no support for escaping either separator".
        raise CommandError(
            f"{printable(library)}: LD_PRELOAD takes no path with a space or a colon; install "
            "msharefs elsewhere"
        )
    others = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = f"{library}:{others}" if others else library
    # Python ignores these, and exec would hand that on.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - that is what it is for
    except FileNotFoundError as error:
        raise CommandError(f"{printable(command[0])}: {error.strerror}", NOT_FOUND) from None
    except ValueError:  # Python's own refusal
        raise CommandError("the program's name is empty", NOT_FOUND) from None
    except OSError as error:
        raise CommandError(f"{printable(command[0])}: {error.strerror}", CANNOT_EXECUTE) from None
