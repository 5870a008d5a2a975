"""The daemon's life: what is set up in which order, and taken down again.

Everything hangs on one exit stack, so whatever fails, all that was set up before it
is undone: no mount, no shared memory, no graft stays behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from msharefsd.config import Config
from msharefsd.control import server
from msharefsd.control.orphans import Orphans
from msharefsd.control.server import Control
from msharefsd.errors import Refused, StartError
from msharefsd.journal.journal import Journal
from msharefsd.life import fdstore, recovery
from msharefsd.life.fdstore import FdStore
from msharefsd.life.notify import Manager
from msharefsd.life.selfcheck import SelfCheck
from msharefsd.linux import features, mounts
from msharefsd.linux.features import Capabilities
from msharefsd.linux.processes import Deaths
from msharefsd.memory import shm
from msharefsd.memory.backing import Backing
from msharefsd.memory.hugetlb import HugetlbBacking, Pool
from msharefsd.memory.kept import Files
from msharefsd.memory.shmbacking import ShmBacking
from msharefsd.mount import mounting
from msharefsd.mount.filesystem import CONTROL_NAME, FileSystem
from msharefsd.paging.addressspace import AddressSpaces
from msharefsd.paging.collapse import Collapser
from msharefsd.paging.server import PageServer
from msharefsd.paging.writeback import Writeback
from msharefsd.region.limits import Limits
from msharefsd.region.region import Region
from msharefsd.region.registry import Regions
from msharefsd.security import privileges, trust
from msharefsd.telemetry.metrics import Metrics
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads import apart
from msharefsd.threads.disposal import Disposal
from msharefsd.threads.pool import Threads

log = logging.getLogger(__name__)

SELF_CHECK_SECONDS: Final = 30
_MOST_DESCRIPTORS: Final = 1 << 20


@dataclass(slots=True)
class _End:
    """How the daemon ends."""

    for_good: bool
    """Nothing stays.  Otherwise everything does, for the next daemon: as when we are
    killed, so it is what happens unless somebody says otherwise."""


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The run directory, ours alone while we live."""
    try:
        trust.make_directory(directory)
        fd = os.open(
            directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    except trust.UntrustedError as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"cannot use the run directory {directory}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"another msharefsd holds {directory}: stop that one first") from None
        yield
        # What the next daemon needs is in there, or nothing of ours any more; anything
        # else is not ours to remove.
        with contextlib.suppress(OSError):
            if set(os.listdir(directory)) <= {"lock"}:
                os.unlink(directory / "lock")
                directory.rmdir()
    finally:
        os.close(fd)


def _raise_descriptor_limit() -> None:
    # Three descriptors a sharer: thousands of sharers need thousands.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # More than the hard limit takes CAP_SYS_RESOURCE, which a container's root lacks.
    with contextlib.suppress(OSError, ValueError):
        most = min(int(Path("/proc/sys/fs/nr_open").read_text()), _MOST_DESCRIPTORS)
        if most > hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    log.debug("descriptors: %s, were %d", resource.getrlimit(resource.RLIMIT_NOFILE), soft)


@contextlib.contextmanager
def _mounted(config: Config, workspace: Path, operations: FileSystem, end: _End) -> Iterator[None]:
    workspace.mkdir(exist_ok=True)
    try:
        grafted = mounting.prepare(config.mountpoint, workspace)
    finally:
        workspace.rmdir()
    try:
        try:
            pyfuse3.init(operations, config.mountpoint, mounting.mount_options())
        except RuntimeError as error:
            raise StartError(
                f"cannot mount on {config.mountpoint} (see the message of fuse above): /dev/fuse "
                "and, for an ordinary user, fusermount3 are needed"
            ) from error
        try:
            yield
        finally:
            # A mount whose daemon is gone tells its users to wait for the next one.
            if end.for_good and mounting.is_mounted(config.mountpoint):
                mounting.unmount(config.mountpoint)
            pyfuse3.close(unmount=False)
    finally:
        if grafted and end.for_good:
            mounting.ungraft()


def _open_root(mountpoint: str) -> int:
    """The mount's root directory, whatever is mounted over it later."""
    return os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _status(mountpoint: str, regions: Regions) -> str:
    living = list(regions.alive())
    sharers = sum(len(region.sharers) for region in living)
    return f"serving {mountpoint}: regions {len(living)}, sharers {sharers}"


async def _bind_control(mountpoint: str) -> socket.socket:
    listener = socket.socket(
        socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    )

    def bind() -> None:
        path = os.path.join(mountpoint, os.fsdecode(CONTROL_NAME))
        if len(os.fsencode(path)) < 108:
            listener.bind(path)
            return
        directory = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/thread-self/fd/{directory}/{os.fsdecode(CONTROL_NAME)}")
        finally:
            os.close(directory)

    try:
        await apart.run(bind, keep=[listener.fileno()])
        listener.listen(server.BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, after which nothing stays, or SIGHUP.

    Raises StartError, MountError or UnsupportedError when it cannot start.
    """
    found = features.probe(config.without)
    for sentence in found.missing():
        log.warning("%s", sentence)
    _raise_descriptor_limit()
    directory = Path(config.run_directory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(directory))
        manager = Manager()
        journal = Journal(directory)
        # If it does not come so far that there is something to leave.
        end = _End(for_good=not journal.regions())
        stack.callback(lambda: journal.close(remove=end.for_good))
        prefix = _backing_prefix(directory)
        pool = stack.enter_context(_huge_pages(config, found, directory, end))
        disposal = Disposal()

        def open_backing(
            number: int, start: int, size: int, kind: str, *, adopt: bool = False
        ) -> Backing:
            name = f"{prefix}{number}"
            if (kind or config.backing) == ShmBacking.kind:
                return ShmBacking(name, size, disposal, adopt=adopt)
            if pool is None:
                raise Refused(errno.EOPNOTSUPP, features.LACKING["hugetlb"])
            stash = shm.stash_name(name)
            return HugetlbBacking(pool, number, start, size, stash, disposal, adopt=adopt)

        regions = Regions(config.alignment_bytes, open_backing, journal=journal)
        stack.callback(lambda: regions.close() if end.for_good else None)
        stack.callback(disposal.close)
        metrics = Metrics(regions.alive)
        regions.limits = _limits(config, metrics, pool)
        operations = FileSystem(regions, metrics)
        stack.enter_context(_mounted(config, directory / "graft", operations, end))
        privileges.drop()
        # From here on there may be threads.
        store = fdstore.open_store(config.fd_store, directory, manager)
        stack.callback(lambda: store.close(for_good=end.for_good))
        files = Files(journal, store, disposal)
        kept = store.take()
        recovery.adopt_regions(journal, regions, files, kept, partial(open_backing, adopt=True))
        used = {region.id for region in regions.alive()}
        for name in shm.remove_leftovers(prefix, used):
            log.warning("removed shared memory %s of no region", name)
        for name in pool.remove_leftovers(used) if pool else ():
            log.warning("removed huge pages %s of no region", name)
        daemon = _Daemon(
            config, found, manager, end, journal, store, disposal, regions, files, metrics
        )
        await daemon.serve(operations)


@contextlib.contextmanager
def _huge_pages(
    config: Config, found: Capabilities, directory: Path, end: _End
) -> Iterator[Pool | None]:
    """The pool of the hugetlb backing, if there can be one."""
    if not found.hugetlb:
        if config.backing == HugetlbBacking.kind:
            raise StartError(features.LACKING["hugetlb"])
        yield None
        return
    pool = Pool(directory / "huge", config.huge_page_bytes)
    try:
        pool.mount()
    except OSError as error:
        raise StartError(f"cannot mount hugetlbfs: {error}") from error
    try:
        if config.backing == HugetlbBacking.kind and pool.total() == 0:
            log.warning("no huge pages are reserved: %s", pool.command())
        yield pool
    finally:
        if end.for_good:
            pool.unmount()


def _backing_prefix(directory: Path) -> str:
    # By run directory: daemons of several mounts share /dev/shm.
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:8]
    return f"/msharefs-{digest}-"


def _limits(config: Config, metrics: Metrics, pool: Pool | None) -> Limits:
    seldom = Seldom()

    def memory() -> int:
        return shm.pool_bytes() + (pool.total() * pool.page if pool else 0)

    def hit(limit: str, message: str) -> None:
        metrics.limited.labels(limit).inc()
        if seldom.now(message):
            log.warning("%s", message)

    return Limits(config.limits, memory, hit)


@dataclass(slots=True)
class _Daemon:
    config: Config
    found: Capabilities
    manager: Manager
    end: _End
    journal: Journal
    store: FdStore
    disposal: Disposal
    regions: Regions
    files: Files
    metrics: Metrics

    async def serve(self, operations: FileSystem) -> None:
        config, regions, end = self.config, self.regions, self.end
        mount = mounts.top_mount(config.mountpoint)
        assert mount is not None, "pyfuse3.init() returned without a mount"
        threads = Threads(regions.limits.threads)
        pages = PageServer(
            self.found, self.metrics, config.region_memory_bytes, threads, self.journal
        )
        writeback = Writeback(threads, self.metrics, self.journal)
        regions.release = writeback.release
        spaces = AddressSpaces(self.found, pages, writeback, self.journal)
        with contextlib.closing(Deaths()) as deaths, contextlib.ExitStack() as stack:
            orphans = Orphans(regions, pages, deaths)
            server = Control(
                regions,
                pages,
                spaces,
                self.found,
                deaths,
                self.metrics,
                operations.region_of_inode,
                mount.device,
                self.disposal,
                # Of their own: a file that hangs when it is read keeps nobody from mapping.
                Threads(regions.limits.threads),
                self.files,
                orphans,
                config.backing,
                keeping=lambda: not end.for_good,
            )
            stack.callback(server.close)
            async with trio.open_nursery() as nursery:
                await nursery.start(_stop_on_signal, nursery.cancel_scope, end)
                nursery.start_soon(_serve_fuse, nursery.cancel_scope)
                nursery.start_soon(_stop_when_unmounted, mount, nursery.cancel_scope, end)
                check = await self._check(stack)
                nursery.start_soon(self.store.run)
                nursery.start_soon(deaths.run)
                await nursery.start(pages.run)
                await nursery.start(orphans.run)
                await recovery.adopt_sharers(self.journal, regions, pages, spaces, orphans)
                with trio.fail_after(SELF_CHECK_SECONDS):
                    bound = await _bind_control(config.mountpoint)
                listener = stack.enter_context(trio.socket.from_stdlib_socket(bound))
                nursery.start_soon(writeback.run, regions.alive)
                if config.collapse and self.found.collapse:
                    collapser = Collapser(self.metrics, config.collapse_seconds)
                    nursery.start_soon(collapser.run, regions.alive)
                nursery.start_soon(server.run, listener)
                end.for_good = False
                log.info("ready: %s, alignment %d bytes", config.mountpoint, config.alignment_bytes)
                status = partial(_status, config.mountpoint, regions)
                nursery.start_soon(self.manager.run, status, check.answers)
            self.manager.stopping()
            if end.for_good:
                await writeback.finish(regions.alive())
            regions.release = Region.close_memory
        log.info("stopped%s", "" if end.for_good else ", and left everything to the next daemon")

    async def _check(self, stack: contextlib.ExitStack) -> SelfCheck:
        """Use the mount as a client would, once.

        It shows that the kernel's and our side have met.  And it closes a file: flush()
        answers ENOSYS, and from then on the kernel closes files of this mount without
        asking.  We rely on that when we close descriptors of it.
        """
        mountpoint = self.config.mountpoint
        with trio.fail_after(SELF_CHECK_SECONDS):
            root = await trio.to_thread.run_sync(_open_root, mountpoint, abandon_on_cancel=True)
            stack.callback(os.close, root)
            check = stack.enter_context(contextlib.closing(SelfCheck(root)))
            if not await check.answers(SELF_CHECK_SECONDS):
                raise StartError(f"{mountpoint} is mounted and does not answer")
        return check


async def _serve_fuse(scope: trio.CancelScope) -> None:
    try:
        await pyfuse3.main()
    finally:
        scope.cancel()  # the connection was aborted: nothing is left to serve


async def _stop_when_unmounted(mount: mounts.Mount, scope: trio.CancelScope, end: _End) -> None:
    await mounting.until_unmounted(mount)
    log.info("unmounted by somebody else: stopping")
    end.for_good = True
    scope.cancel()


async def _stop_on_signal(
    scope: trio.CancelScope,
    end: _End,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            end.for_good = number != signal.SIGHUP
            scope.cancel()
