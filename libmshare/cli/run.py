"""`mshare run`: a program with the preload libraries, and with its page tables looked after."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from libmshare import core
from libmshare.cli.errors import CommandError
from libmshare.cli.exits import Exit
from libmshare.cli.output import printable

PRELOAD: Final = "libmshare-preload.so"
ALIGN: Final = "libmshare-align.so"
SMALLEST: Final = 64 << 20
"""As env(1) has it."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a program is run."""

    backing: str = "shm"
    smallest: int = SMALLEST
    """Smaller mappings are left alone (bytes)."""
    follow: bool = True
    """Whether its page tables are freed."""
    dry_run: bool = False


def run(command: list[str], manner: Manner | None = None) -> NoReturn:
    """Become the program; its large shared memory lies where huge pages fit.

    Plain mmap() and its kin act on regions, too.  Raises CommandError if it cannot be executed.
    """
    manner = manner or Manner()
    obstacles, libraries = _libraries(command[0])
    for obstacle in obstacles:
        _say(f"{printable(command[0])}: {obstacle}")
    if manner.dry_run:
        _tell(command, manner, libraries)
    others = os.environ.get("LD_PRELOAD")
    if libraries:
        os.environ["LD_PRELOAD"] = ":".join([*libraries, *([others] if others else [])])
    os.environ["MSHARE_RUN_MIN_SIZE"] = str(manner.smallest)
    os.environ["MSHARE_RUN_BACKING"] = manner.backing
    if manner.follow:
        _follow(manner, aligned=bool(libraries))
    _become(command)


def _libraries(program: str) -> tuple[list[str], list[str]]:
    """What is to be said, and what is to be preloaded.  Raises CommandError."""
    from libmshare.cli.reach import closed_to_others, reach  # noqa: PLC0415 - a short start

    found = reach(program)
    if found.obstacle:
        return [f"{found.obstacle}; its memory stays where it puts it"], []
    directory = core.library_directory()
    # In this order: each asks the next one.
    libraries = [name if directory is None else str(directory / name) for name in (ALIGN, PRELOAD)]
    for library in libraries:
        if re.search(r"[ :]", library):
            # ld.so(8): "there is no support for escaping either separator".
            raise CommandError(
                f"{printable(library)}: LD_PRELOAD takes no path with a space or a colon; install "
                "msharefs elsewhere"
            )
    said = []
    if os.geteuid() == 0 and directory is not None:
        closed = closed_to_others(Path(libraries[0]))
        if closed is not None:
            said.append(
                f"other users cannot read {printable(str(closed))}: if it becomes another user "
                "and executes something, that is not reached; install msharefs elsewhere"
            )
    if found.sanitizer:
        libraries.insert(0, found.sanitizer)
    return said, libraries


def _tell(command: list[str], manner: Manner, libraries: list[str]) -> NoReturn:
    """What would be done."""
    lines = [f"LD_PRELOAD={':'.join(libraries)}" if libraries else "nothing is preloaded"]
    if libraries:
        lines.append(
            f"shared memory of {manner.smallest} bytes and more, for which the program names no "
            "address, lies at a multiple of 2 MiB"
        )
    if manner.backing == "hugetlb":
        lines.append("if it is anonymous, it is of huge pages of the pool, as far as all are free")
    if manner.follow:
        lines.append("what it starts is watched, and its page tables are freed")
    lines.append(" ".join(map(printable, command)))
    print("\n".join(lines))  # noqa: T201 - a command's output
    sys.stdout.flush()
    sys.exit(Exit.DONE)


def _follow(manner: Manner, *, aligned: bool) -> None:
    from libmshare.cli import following  # noqa: PLC0415 - as above

    try:
        following.start(manner.smallest, aligned=aligned)
    except OSError as error:
        _say(f"its page tables are not looked after: {error.strerror}")


def _become(command: list[str]) -> NoReturn:
    # Python ignores these, and exec would hand that on.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    with _telling(command[0]):
        os.execvp(command[0], command)  # noqa: S606 - that is what it is for
    raise AssertionError


@contextlib.contextmanager
def _telling(program: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CommandError(f"{printable(program)}: {error.strerror}", Exit.NOT_FOUND) from None
    except ValueError:  # Python's own refusal
        raise CommandError("the program's name is empty", Exit.NOT_FOUND) from None
    except OSError as error:
        raise CommandError(f"{printable(program)}: {error.strerror}", Exit.CANNOT_EXECUTE) from None


def _say(text: str) -> None:
    print(f"mshare run: {text}", file=sys.stderr, flush=True)  # noqa: T201 - where it goes
