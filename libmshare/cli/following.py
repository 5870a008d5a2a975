"""What goes with a program that `mshare run` has become: it has page tables back.

A process of its own, a child of nobody: the program keeps its pid, its signals and its
children.  It follows what the program starts, and ends when nothing of that is left.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from libmshare.cli.output import printable_line
from msharetables import proc

if TYPE_CHECKING:
    from msharetables.survey import Object

INTERVAL: Final = 1.0
FILLED: Final = 0.5
FIRST: Final = 0.2
"""A program that ends within so many seconds is not followed."""


class Tree:
    """A process and all that it has started, also what has lost its parent since."""

    def __init__(self, root: int) -> None:
        self._members = {root: proc.started(root)}

    def members(self) -> list[int]:
        """Those that are there now."""
        alive = {}
        for pid, started in self._members.items():
            with contextlib.suppress(OSError):
                # A zombie may be one until we end: who waits for its output reads ours, too.
                if proc.started(pid) == started and not proc.has_ended(pid):
                    alive[pid] = started
        for pid in proc.with_children(alive) - set(alive):
            with contextlib.suppress(OSError):
                if not proc.has_ended(pid):
                    alive[pid] = proc.started(pid)
        self._members = alive
        return list(alive)


def start(smallest: int, *, aligned: bool) -> None:
    """Follow this process, which is about to become a program.

    `smallest`: objects of fewer bytes are left alone.  `aligned`: whether its memory is
    supposed to lie where huge pages fit.  Raises OSError: no process can be made.
    """
    program = os.getpid()
    tree, pidfd = Tree(program), os.pidfd_open(program)
    between = os.fork()
    if between == 0:
        try:
            # Of the one in between, which ends at once: so the program has no child that it
            # knows nothing of.
            if os.fork() == 0:
                _follow(tree, pidfd, smallest, aligned=aligned)
        finally:
            os._exit(0)
    os.waitpid(between, 0)
    os.close(pidfd)


def _follow(tree: Tree, pidfd: int, smallest: int, *, aligned: bool) -> NoReturn:
    try:
        os.setsid()
        os.chdir("/")
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        kept = os.dup(pidfd)
        os.dup2(kept, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        if not _ended(3, FIRST):
            _watch(tree, smallest, aligned=aligned)
    except PermissionError:
        _say(
            "its page tables stay as they are: having them back takes CAP_SYS_NICE, and "
            "CAP_SYS_PTRACE for other users' processes; mshare-collapse.service has both"
        )
    except Exception as error:  # noqa: BLE001 - nobody else would tell
        _say(f"its page tables are not looked after any more: {error}")
    finally:
        os._exit(0)


def _ended(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _watch(tree: Tree, smallest: int, *, aligned: bool) -> None:
    """Raises OSError: EPERM."""
    # The program does not wait for these.
    from msharetables.pace import Pace, hurry, moderate  # noqa: PLC0415
    from msharetables.watch import Limits, Watcher  # noqa: PLC0415

    members: Sequence[int] = ()

    def pids() -> Iterable[int]:
        nonlocal members
        members = tree.members()
        return members

    watcher = Watcher(Limits(smallest, FILLED), Pace(moderate()), pids=pids)
    told: set[object] = set()
    hurry()
    ended = False
    while True:
        objects = watcher.once(_nothing)
        if not members:
            return
        for each in objects:
            if aligned and not each.congruent and each.key not in told:
                told.add(each.key)
                _say(_unreached(each))
        # The program's own end is told at once; what is left of it then is looked for.
        ended = _ended(3, INTERVAL) if not ended else _wait()


def _nothing(*_: object) -> None:
    """The program's own output is not for this."""


def _wait() -> bool:
    select.select([], [], [], INTERVAL)
    return True


def _unreached(each: Object) -> str:
    from libmshare.cli import tables  # noqa: PLC0415 - as above

    return (
        f"{printable_line(each.label)} in process {min(each.sharers)} was mapped by who does not "
        "ask this library (RTLD_DEEPBIND as PHP's extensions, static or Go code): "
        f"{tables.not_congruent(each).split(', or start')[0]}"
    )


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"mshare run: {text}", file=sys.stderr, flush=True)  # noqa: T201 - where it goes
