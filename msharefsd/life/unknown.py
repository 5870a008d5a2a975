"""Memory that carries our mark and that no journal knows, or that is newer than its journal.

A journal names memory before it is made, and has a change before memory has seen it.  So this
happens in one way only: the journal was lost, emptied, or put back as it had been before.  To
go on then would mean to guess: whose objects, which files, which sharers.  So nothing is
changed and nothing is served, until somebody who knows has said what to do.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from msharefsd.errors import StateError
from msharefsd.journal.journal import Journal
from msharefsd.memory import names
from msharefsd.memory.names import Mark
from msharefsd.telemetry.figures import size

log = logging.getLogger(__name__)

MOST_TOLD = 4


def _unknown(journal: Journal, mark: Mark, huge: Path) -> list[str]:
    known = {
        name
        for row in journal.regions()
        if row.backing_name is not None and names.stamped(row.backing_name) <= row.changes
        for name in (row.backing_name, row.stash_name)
    }
    return [name for name in mark.found(huge) if name not in known]


def check(journal: Journal, mark: Mark, huge: Path, where: Path) -> None:
    """Raise StateError if there is memory of the mark's that the journal `where` lacks."""
    unknown = _unknown(journal, mark, huge)
    if not unknown:
        return
    told = [f"{names.path(name)} ({_held(name)})" for name in unknown[:MOST_TOLD]]
    if len(unknown) > MOST_TOLD:
        told.append(f"{len(unknown) - MOST_TOLD} more")
    raise StateError(
        f"{where} does not know of memory of user {mark.uid}'s regions: {', '.join(told)}.  It "
        "was removed, or emptied, or is older than that memory.  Nothing was changed: put the "
        "right one in its place; or save what is there (cp --sparse=always), and have msharefsd "
        "--purge --force remove it"
    )


def free(journal: Journal, mark: Mark, huge: Path) -> None:
    """Remove such memory, and say so.  Who has it mapped has SIGBUS."""
    for name in _unknown(journal, mark, huge):
        held = _held(name)
        try:
            os.truncate(names.path(name), 0)
            names.remove_one(name)
        except OSError as error:
            log.error("cannot remove %s: %s", names.path(name), error.strerror)
        else:
            log.warning("removed %s (%s) that no journal knows", names.path(name), held)


def _held(name: str) -> str:
    try:
        return size(os.stat(names.path(name)).st_blocks * 512)
    except OSError:
        return "?"
