"""The front's life: what is set up in which order, and taken down again.

Everything hangs on one exit stack, so whatever fails, all that was set up before it
is undone: no mount, no directory, no graft stays behind.  What regions hold is another
matter: it stays for the next daemon, however this one ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pyfuse3
import trio
from prometheus_client.core import GaugeMetricFamily, Metric

from msharefsd.barriers import barrier
from msharefsd.config import Config
from msharefsd.errors import StartError
from msharefsd.front import exporter
from msharefsd.front.ending import Ending, rest, sentence, what_is_kept
from msharefsd.front.pagers import Pager, Pagers, adopt, homes
from msharefsd.front.router import Router
from msharefsd.front.setting_up import (
    End,
    huge_pages,
    identified,
    locked,
    mounted,
    open_root,
    raise_descriptor_limit,
)
from msharefsd.front.starter import Kind, Main, Starter
from msharefsd.front.status import Status
from msharefsd.journal.names import NamesJournal
from msharefsd.life import lock
from msharefsd.life.limiting import make_limits
from msharefsd.life.lookout import Lookout
from msharefsd.life.notify import Manager
from msharefsd.life.selfcheck import SelfCheck
from msharefsd.life.signals import Signals
from msharefsd.linux import cgroups, features, priority
from msharefsd.linux.mounts import Mount, top_mount
from msharefsd.memory.hugetlb import HugetlbBacking
from msharefsd.memory.names import IDENTITY_FILE
from msharefsd.mount import graft, mounting
from msharefsd.mount.asking import Asking
from msharefsd.mount.controls import Controls
from msharefsd.mount.filesystem import FileSystem
from msharefsd.mount.names import Names
from msharefsd.pager.pager import DIRECTORY, Setting
from msharefsd.pager.pager import main as pager_main
from msharefsd.security import privileges
from msharefsd.telemetry import byregion
from msharefsd.telemetry.metrics import Metrics
from msharefsd.threads import runs
from msharefsd.threads.fairness import Turns

log = logging.getLogger(__name__)

SELF_CHECK_SECONDS: Final = 30
ADOPT_SECONDS: Final = 1.5
"""How long the start waits for pagers to take over what was left."""
GRAFT_SECONDS: Final = 5.0
METRICS_SECONDS: Final = 0.5
MOST_TASKS: Final = 1000
"""Of file-system requests under way; pyfuse3 has one task for each."""


def run(config: Config, signals: Signals) -> None:
    """Serve until a signal.  What there is stays for the next daemon.

    After SIGTERM and SIGINT the mount goes, after SIGHUP it stays.  Raises StartError or
    UnsupportedError when it cannot start.
    """
    found = features.probe(config.without)
    for missing in found.missing():
        log.warning("%s", missing)
    raise_descriptor_limit()
    directory = Path(config.run_directory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(directory))
        end = End()
        pool = stack.enter_context(huge_pages(config, found, directory))
        if pool and config.backing == HugetlbBacking.kind and pool.total() == 0:
            log.warning("no huge pages are reserved: %s", pool.command())
        setting = Setting(config, found, directory, identified(directory))
        mains: dict[Kind, Main] = {Kind.PAGER: partial(pager_main, setting)}
        where = config.metrics_address
        if where is not None:
            mains[Kind.EXPORTER] = partial(exporter.main, where, config.mountpoint)
        starter = Starter(mains, cgroups.delegated())
        stack.callback(starter.close)
        journal = NamesJournal(directory)
        end.empty = not journal.names()
        stack.callback(lambda: _clear(directory, journal, end))
        trio.run(
            _Front(setting, end, journal, starter, signals).serve,
            stack,
            strict_exception_groups=True,
            instruments=runs.instruments(),
        )


def _clear(directory: Path, journal: NamesJournal, end: End) -> None:
    with contextlib.suppress(OSError):
        (directory / DIRECTORY).rmdir()
    journal.close(remove=end.empty and not (directory / DIRECTORY).exists())


@dataclass(slots=True)
class _Front:
    setting: Setting
    end: End
    journal: NamesJournal
    starter: Starter
    signals: Signals

    async def serve(self, stack: contextlib.ExitStack) -> None:
        config, end = self.setting.config, self.end
        barrier("start")
        if self.signals.came:
            log.info("%s: not started", self.signals.words())
            return
        manager = Manager()
        metrics = Metrics(lambda: ())
        limits = make_limits(config, metrics, None)
        names = Names(config.alignment_bytes, limits, self.journal)
        turns = Turns()
        asked = _Asked(metrics, names)
        controls = Controls(config.control_group)
        stack.callback(controls.close)
        operations = FileSystem(names, Asking(asked), turns, controls)
        directory = self.setting.run_directory
        stack.enter_context(mounted(config, directory / "graft", operations, end))
        mount = top_mount(config.mountpoint)
        assert mount is not None, "pyfuse3.init() returned without a mount"
        barrier("start.mounted")
        privileges.drop(privileges.FRONT)
        # From here on there may be threads.
        pagers = Pagers(self.starter, names, mount.device, config.idle_seconds)
        asked.begin(pagers, Status(config, self.setting.features, names, limits, pagers))
        router = Router(names, pagers, limits, turns, mount.device)
        async with trio.open_nursery() as pagers_nursery:
            await pagers_nursery.start(pagers.run)
            with contextlib.ExitStack() as serving:
                async with trio.open_nursery() as nursery:
                    ending = Ending(self.signals, end, nursery.cancel_scope)
                    await nursery.start(ending.listen)
                    nursery.start_soon(_serve_fuse, ending)
                    nursery.start_soon(turns.run)
                    nursery.start_soon(_stop_when_unmounted, mount, ending)
                    nursery.start_soon(_follow_sysfs)
                    check = await self._check(serving)
                    await self._adopt(pagers, await homes(directory, self.setting.identity, names))
                    await nursery.start(router.run)
                    with trio.fail_after(SELF_CHECK_SECONDS):
                        await controls.bind(config.mountpoint, router.serve)
                    end.unmount = False  # as when we are killed, if something fails
                    priority.give_back()
                    log.info(
                        "ready: %s, alignment %d bytes", config.mountpoint, config.alignment_bytes
                    )
                    nursery.start_soon(Lookout(_state(directory), metrics).run)
                    nursery.start_soon(exporter.keep, self.starter, config.metrics_address)
                    nursery.start_soon(
                        manager.run,
                        partial(_status, config.mountpoint, names, pagers),
                        check.answers,
                    )
            manager.stopping()
            if not ending.hands_over():
                await rest(pagers, self.signals, ending)
            kept = what_is_kept(names)
            end.empty = not kept
            pagers_nursery.cancel_scope.cancel()
        log.info("stopped%s", sentence(kept, config, handed_over=not end.unmount))

    async def _adopt(self, pagers: Pagers, whose: list[int]) -> None:
        """Have pagers take over what was left.  One that cannot keeps nobody else waiting."""
        for pager in await adopt(pagers, whose, ADOPT_SECONDS):
            if not pager.ready.is_set():
                log.warning(
                    "pager of user %d, process %d, is not ready yet (%s): its regions wait",
                    pager.uid,
                    pager.pid,
                    pager.where(),
                )

    async def _check(self, stack: contextlib.ExitStack) -> SelfCheck:
        """Use the mount as a client would, once.

        It shows that the kernel's and our side have met.  And it closes a file: flush()
        answers ENOSYS, and from then on the kernel closes files of this mount without
        asking.  We rely on that when we close descriptors of it.
        """
        mountpoint = self.setting.config.mountpoint
        with trio.fail_after(SELF_CHECK_SECONDS):
            root = await trio.to_thread.run_sync(open_root, mountpoint, abandon_on_cancel=True)
            stack.callback(os.close, root)
            check = stack.enter_context(contextlib.closing(SelfCheck(root)))
            if not await check.answers(SELF_CHECK_SECONDS):
                raise StartError(f"{mountpoint} is mounted and does not answer")
        return check


class _Asked:
    """Whom the mount asks: the pagers, and the front itself."""

    def __init__(self, metrics: Metrics, names: Names) -> None:
        self._metrics = metrics
        self._names = names
        self._pagers: Pagers
        self._about: Status

    def begin(self, pagers: Pagers, about: Status) -> None:
        """From now on somebody asks."""
        self._pagers, self._about = pagers, about

    async def text(self, home: int, kind: str, number: int, seconds: float) -> bytes | int | None:
        return await self._pagers.text(home, kind, number, seconds)  # type: ignore[arg-type] # Text

    async def metrics(self, uid: int) -> bytes:
        await self._pagers.look(METRICS_SECONDS)
        more = [_silence(self._pagers.all()), *byregion.families(self._figures(uid))]
        return self._metrics.render(self._pagers.samples(), more)

    def _figures(self, uid: int) -> Iterator[byregion.Figures]:
        """Of the regions that the user may know all about: their own; root's are all."""
        everybody = uid in (0, os.geteuid())
        for name in self._names:
            if name.size and (everybody or name.uid == uid):
                yield byregion.Figures(
                    name.allocated(), name.shared(), name.uid, name.label(), name.counted()
                )

    def status(self, uid: int) -> bytes:
        return self._about.text(uid)


def _state(directory: Path) -> list[Path]:
    """What another front would need."""
    return [*NamesJournal.lies_in(directory), directory / lock.FILE, directory / IDENTITY_FILE]


def _silence(pagers: list[Pager]) -> Metric:
    """For how long each pager has not answered: what `mshare doctor` looks at."""
    family = GaugeMetricFamily(
        "msharefs_pager_silent_seconds",
        "how long a pager has not answered, by its user and process",
        labels=["uid", "pid"],
    )
    for pager in pagers:
        family.add_metric([str(pager.uid), str(pager.pid)], round(pager.silent, 3))
    return family


def _status(mountpoint: str, names: Names, pagers: Pagers) -> str:
    regions = sum(1 for name in names.all() if name.size)
    return f"serving {mountpoint}: regions {regions}, sharers {pagers.sharers()}"


async def _serve_fuse(ending: Ending) -> None:
    await pyfuse3.main(max_tasks=MOST_TASKS)
    ending.begin("the mount's connection was cut (umount -f, or fusectl's abort)")


async def _follow_sysfs() -> None:
    """New file systems appear in /sys/fs as without us."""
    if not graft.shows_all_of_sysfs():
        return
    grafted = graft.Graft()
    while True:
        await trio.sleep(GRAFT_SECONDS)
        grafted.look()


async def _stop_when_unmounted(mount: Mount, ending: Ending) -> None:
    await mounting.until_unmounted(mount)
    ending.begin("unmounted by somebody else")
