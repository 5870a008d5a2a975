"""A pager's life: what is set up in which order.

It has one user's memory and everything that belongs to it, and makes system calls on what
that user's processes hold.  So it may be stopped by them, and nobody else is.

It ends when the front does, at once and without a word: as if it had been killed, because
that must be right at any time.  If it is told to end, it writes back before that; and only
when it is told to does it remove what it has (purge.py).
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import logging
import os
import pwd
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import trio
from setproctitle import setproctitle

from msharefsd.config import Config
from msharefsd.control.control import Control
from msharefsd.control.guards import Guards, split
from msharefsd.control.orphans import Orphans
from msharefsd.control.peer import Peer
from msharefsd.errors import Refused, StartError, StateError
from msharefsd.journal.journal import Journal
from msharefsd.life import lock, recovery, unknown
from msharefsd.life.keeping import Keeper
from msharefsd.life.limiting import make_limits
from msharefsd.life.lookout import Lookout
from msharefsd.life.saving import Saver, held_by
from msharefsd.link.channel import Channel
from msharefsd.link.messages import FromFront, Held
from msharefsd.linux import priority
from msharefsd.linux.features import LACKING, Capabilities
from msharefsd.linux.processes import Deaths
from msharefsd.memory import names
from msharefsd.memory.backing import NOT_LEFT, Backing, Left
from msharefsd.memory.hugetlb import HugetlbBacking, Pool
from msharefsd.memory.kept import Files
from msharefsd.memory.names import Mark, MemoryNames
from msharefsd.memory.shmbacking import ShmBacking
from msharefsd.pager import purging
from msharefsd.pager.accepting import Accepting
from msharefsd.pager.dialog import Dialog, FrontEndedError
from msharefsd.paging.addressspace import AddressSpaces
from msharefsd.paging.bringing import Bringing
from msharefsd.paging.collapse import Collapser
from msharefsd.paging.server import PageServer
from msharefsd.paging.writeback import Writeback
from msharefsd.region.registry import Regions
from msharefsd.security import privileges
from msharefsd.telemetry import logs
from msharefsd.telemetry.metrics import Metrics
from msharefsd.threads import runs
from msharefsd.threads.disposal import Disposal
from msharefsd.threads.pool import Threads

log = logging.getLogger(__name__)

DIRECTORY: Final = "users"
"""In the run directory: a directory for each user, with the journal of its pager."""
HUGE: Final = "huge"
"""There: the hugetlbfs."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all pagers of a daemon have in common."""

    config: Config
    features: Capabilities
    run_directory: Path
    identity: str
    """The run directory's."""
    purge: bool = False
    """Memory and journals that nobody understands are removed, and keep nobody waiting."""


def main(setting: Setting, uid: int, channel: socket.socket) -> NoReturn:
    """Be a pager; called in a process of its own."""
    code = 1
    try:
        setproctitle(f"msharefsd: pager {_user(uid)}")
        logs.set_up(setting.config.log_level, setting.config.log_format, uid, _user(uid))
        faulthandler.enable()
        privileges.drop(privileges.PAGER)
        trio.run(
            _run,
            setting,
            uid,
            channel,
            strict_exception_groups=True,
            instruments=runs.instruments(),
        )
        code = 0
    except* FrontEndedError:
        code = 0
    except* Exception:
        log.exception("the pager has failed")
    finally:
        logging.shutdown()
        os._exit(code)  # nothing of ours waits for what a client holds


def _leave() -> NoReturn:
    """End at once.  What is to be right for a pager that is killed is right now."""
    logging.shutdown()
    os._exit(0)


def _user(uid: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


async def _run(setting: Setting, uid: int, sock: socket.socket) -> None:
    channel: Channel[FromFront] = Channel(sock, FromFront)
    directory = setting.run_directory / DIRECTORY / str(uid)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.take_over(directory)
        journal = _open_journal(setting, Mark(setting.run_directory, setting.identity, uid))
    except (lock.HeldError, OSError) as error:
        await channel.send(Held(f"{directory}: {error}"))
        return
    except StartError as error:
        await channel.send(Held(str(error), for_good=isinstance(error, StateError)))
        return
    await _Pager(setting, uid, directory, channel, journal).run()


def _open_journal(setting: Setting, mark: Mark) -> Journal:
    """The user's, which knows all memory that there is.  Raises StateError, StartError."""
    huge = setting.run_directory / HUGE
    directory = setting.run_directory / DIRECTORY / str(mark.uid)
    fresh = not Journal.exists(directory)
    try:
        journal = Journal(directory)
    except StateError as error:
        if not setting.purge:
            raise
        log.warning("%s", error)
        Journal.discard(directory)
        journal = Journal(directory)
    if setting.purge:
        unknown.free(journal, mark, huge)
    try:
        unknown.check(journal, mark, huge, directory / Journal.file)
    except StateError:
        # Whoever puts another in its place finds nothing of this one's beside it.
        journal.close(remove=fresh)
        raise
    return journal


class _Pager:
    def __init__(
        self,
        setting: Setting,
        uid: int,
        directory: Path,
        channel: Channel[FromFront],
        journal: Journal,
    ) -> None:
        self._setting = setting
        self._config = setting.config
        self._uid = uid
        self._directory = directory
        self._journal = journal
        self._dialog = Dialog(channel)
        self._disposal = Disposal()
        self._pool = _pool(setting)
        self._regions = Regions(
            setting.config.alignment_bytes,
            self._name_memory,
            self._make_backing,
            journal=journal,
            tell=self._dialog.tell,
        )
        self._metrics = Metrics(self._regions.alive)
        self._limits = make_limits(setting.config, self._metrics, self._pool)
        self._regions.limits = self._limits
        self._keeper = Keeper(directory)
        self._files = Files(journal, self._keeper, self._disposal)

    def _name_memory(self, kind: str) -> MemoryNames:
        huge = None
        if kind == HugetlbBacking.kind:
            if self._pool is None:
                raise Refused(errno.EOPNOTSUPP, LACKING["hugetlb"])
            huge = self._pool.directory
        return Mark(self._setting.run_directory, self._setting.identity, self._uid).new(huge)

    def _make_backing(
        self,
        memory: MemoryNames,
        start: int,
        size: int,
        kind: str,
        *,
        adopt: bool = False,
        left: Left = NOT_LEFT,
    ) -> Backing:
        if kind == ShmBacking.kind:
            return ShmBacking(memory, size, self._disposal, adopt=adopt, left=left)
        if self._pool is None:
            raise Refused(errno.EOPNOTSUPP, LACKING["hugetlb"])
        return HugetlbBacking(
            self._pool, memory, start, size, self._disposal, adopt=adopt, left=left
        )

    def _open_backing(
        self, saver: Saver, number: int, memory: MemoryNames, start: int, size: int, kind: str
    ) -> Backing:
        """What another pager has left, with its name or without."""
        backing, stash = saver.left(number)
        if backing < 0 and not os.path.exists(names.path(memory.backing)):
            sharers = [row.pid for row in self._journal.sharers() if row.region == number]
            backing = held_by(sharers, memory.backing)
        left = backing, stash
        return self._make_backing(memory, start, size, kind, adopt=True, left=left)

    async def run(self) -> None:
        """Adopt what is there, serve, and end."""
        known, device, board = await self._dialog.names()
        self._regions.board = board
        self._regions.know(known)
        kept, guarded = split(self._keeper.take())
        guards = Guards(self._keeper)
        saver = Saver(self._keeper, kept)
        recovery.adopt_regions(
            self._journal,
            self._regions,
            self._files,
            kept,
            known,
            partial(self._open_backing, saver),
        )
        config, found, regions = self._config, self._setting.features, self._regions
        threads = Threads(self._limits.threads)
        pages = PageServer(
            found, self._metrics, config.region_memory_bytes, threads, self._journal, self._uid
        )
        pages.lanes.idle_seconds = config.idle_seconds
        pages.bringers.patience = config.fill_seconds
        writeback = Writeback(threads, self._metrics, self._journal)
        regions.release = writeback.release
        spaces = AddressSpaces(found, pages, writeback, self._journal)
        with contextlib.closing(Deaths()) as deaths:
            orphans = Orphans(regions, pages, deaths, guards)
            control = Control(
                self._dialog,
                regions,
                pages,
                spaces,
                Bringing(threads, self._journal, pages, spaces),
                found,
                deaths,
                self._metrics,
                device,
                self._disposal,
                # Of their own: a file that hangs when it is read keeps nobody from mapping.
                Threads(self._limits.threads),
                self._files,
                orphans,
                guards,
                config.backing,
                partial(_may_have_device, config),
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keeper.run)
                nursery.start_soon(deaths.run)
                nursery.start_soon(control.turns.run)
                await nursery.start(pages.run)
                await nursery.start(orphans.run)
                await recovery.adopt_sharers(
                    self._journal, regions, pages, spaces, orphans, guards, guarded
                )
                for region in regions.alive():
                    pages.bringers.notice(region)  # who filled it may have died with us
                await self._dialog.ready(list(regions.alive()))
                priority.give_back()
                nursery.start_soon(writeback.run, regions.alive)
                nursery.start_soon(saver.run, regions.alive)
                nursery.start_soon(Lookout(self._state(), self._metrics, self._keeper.lost).run)
                if config.collapse and found.collapse:
                    collapser = Collapser(self._metrics, pages.fresh, config.collapse_seconds)
                    nursery.start_soon(collapser.run, regions.alive)
                finish = partial(writeback.finish, regions.alive)
                door = Accepting(self._uid, control, self._dialog)
                purge = await self._dialog.run(door, regions, self._metrics, finish, _leave)
                runs.over()
                nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                if purge:
                    await purging.remove_all(regions, writeback.finish)
                    await self._dialog.flush()
                if any(True for _ in regions.alive()):
                    self._journal.close()  # all of it is in one file then
                else:
                    self._remove_state()

    def _state(self) -> list[Path]:
        """What another pager would need, and is the same as long as we live."""
        return [*Journal.lies_in(self._directory), self._directory / lock.FILE]

    def _remove_state(self) -> None:
        """There is nothing that another pager would need it for."""
        self._keeper.close(for_good=True)
        self._disposal.close()
        self._journal.close(remove=True)
        with contextlib.suppress(OSError):
            os.unlink(self._directory / lock.FILE)
            self._directory.rmdir()


def _pool(setting: Setting) -> Pool | None:
    if not setting.features.hugetlb:
        return None
    return Pool(setting.run_directory / HUGE, setting.config.huge_page_bytes)


def _may_have_device(config: Config, peer: Peer) -> bool:
    return peer.uid == os.geteuid() or config.may_have_device(peer.groups)
