"""`msharefsd --purge`: remove everything that a daemon has left.

Nothing is served and nothing is mounted: pagers take over what there is, so that it can be
told, written back and taken from whoever has it, and then they remove it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from functools import partial
from pathlib import Path
from typing import Final

import trio

from msharefsd.config import Config
from msharefsd.errors import StartError, StateError
from msharefsd.front.ending import LAST_SECONDS, Kept, summary, what_is_kept
from msharefsd.front.pagers import Pagers, adopt, homes
from msharefsd.front.setting_up import huge_pages, identified, locked, raise_descriptor_limit
from msharefsd.front.starter import Kind, Starter
from msharefsd.journal.names import NamesJournal
from msharefsd.linux import features
from msharefsd.mount import graft, mounting
from msharefsd.mount.names import Names
from msharefsd.pager.pager import DIRECTORY, Setting
from msharefsd.pager.pager import main as pager_main
from msharefsd.security import privileges

log = logging.getLogger(__name__)

ADOPT_SECONDS: Final = 60.0
"""How long pagers have to take over what was left."""
_NOWHERE: Final = (0, 0)
"""There is no mount whose files could prove anything."""


def run(config: Config, *, force: bool) -> None:
    """Remove all regions, their memory and what the daemon has left beside it.

    Raises StartError if a daemon lives, if something is in use and not `force`, and if
    something had to be kept.
    """
    directory = Path(config.run_directory)
    if not directory.exists():
        _unmount(config)
        log.info("there is nothing to remove: %s does not exist", directory)
        return
    found = features.probe(config.without)
    raise_descriptor_limit()
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(directory))
        _unmount(config)
        stack.enter_context(huge_pages(config, found, directory))
        identity = identified(directory)
        setting = Setting(config, found, directory, identity, purge=force)
        starter = Starter({Kind.PAGER: partial(pager_main, setting)})
        stack.callback(starter.close)
        journal = _names(directory, force=force)
        names = Names(config.alignment_bytes, journal=journal)
        try:
            trio.run(
                partial(_purge, names, starter, directory, identity, force=force),
                strict_exception_groups=True,
            )
        finally:
            with contextlib.suppress(OSError):
                (directory / DIRECTORY).rmdir()
            left = bool(journal.names()) or (directory / DIRECTORY).exists()
            journal.close(remove=not left)


def _names(directory: Path, *, force: bool) -> NamesJournal:
    """The front's journal; with `force` a new one, if it is damaged.  Raises StateError."""
    try:
        return NamesJournal(directory)
    except StateError as error:
        if not force:
            raise
        log.warning("%s", error)
        NamesJournal.discard(directory)
        return NamesJournal(directory)


def _unmount(config: Config) -> None:
    mounting.clear_stale(config.mountpoint)
    if os.path.dirname(config.mountpoint) == graft.SYS_FS and os.geteuid() == 0:
        mounting.give_back(config.mountpoint)


async def _purge(
    names: Names, starter: Starter, directory: Path, identity: str, *, force: bool
) -> None:
    privileges.drop(privileges.FRONT)
    pagers = Pagers(starter, names, _NOWHERE)
    async with trio.open_nursery() as nursery:
        await nursery.start(pagers.run)
        for pager in await adopt(pagers, await homes(directory, identity, names), ADOPT_SECONDS):
            if not pager.ready.is_set():
                raise StartError(
                    f"pager of user {pager.uid}, process {pager.pid}, is not ready "
                    f"({pager.where()}): nothing was removed"
                )
        kept = what_is_kept(names)
        _check_use(kept, force=force)
        if kept:
            log.info("removing %s", summary(kept))
        await pagers.stop(LAST_SECONDS, purge=True)
        nursery.cancel_scope.cancel()
    for name in list(names.all()):
        if not name.size:
            if name.linked:
                names.unlink(name)
            names.gone(name.id)
    if left := what_is_kept(names):
        raise StartError(f"not removed: {summary(left)}; the lines above say why")


def _check_use(kept: list[Kept], *, force: bool) -> None:
    used = [each for each in kept if each.sharers]
    if used and not force:
        raise StartError(
            f"in use: {summary(used)}.  Nothing was removed: end these processes, or say "
            "--force, and what they touch next is SIGBUS"
        )
