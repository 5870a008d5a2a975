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
from functools import partial
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from msharefsd import backing, capabilities, control, mounting, privileges, trust
from msharefsd.addressspace import AddressSpaces
from msharefsd.backing import Backing, ShmBacking
from msharefsd.capabilities import Capabilities
from msharefsd.collapse import Collapser
from msharefsd.config import Config
from msharefsd.control import Control
from msharefsd.disposal import Disposal
from msharefsd.errors import Refused
from msharefsd.files import Threads
from msharefsd.filesystem import CONTROL_NAME, FileSystem
from msharefsd.hugetlb import HugetlbBacking, Pool
from msharefsd.limits import Limits
from msharefsd.liveness import Deaths
from msharefsd.metrics import Metrics
from msharefsd.notify import Manager
from msharefsd.pageserver import PageServer
from msharefsd.regions import Region, Regions
from msharefsd.seldom import Seldom
from msharefsd.selfcheck import SelfCheck
from msharefsd.writeback import Writeback

log = logging.getLogger(__name__)

SELF_CHECK_SECONDS: Final = 30
_MOST_DESCRIPTORS: Final = 1 << 20


class StartError(Exception):
    """The daemon cannot start; the text says why and what to do."""


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
        # Nothing of ours is in there any more; anything else is not ours to remove.
        with contextlib.suppress(OSError):
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
def _mounted(config: Config, workspace: Path, operations: FileSystem) -> Iterator[None]:
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
            if mounting.is_mounted(config.mountpoint):
                mounting.unmount(config.mountpoint)
            pyfuse3.close(unmount=False)
    finally:
        if grafted:
            mounting.ungraft()


def _open_root(mountpoint: str) -> int:
    """The mount's root directory, whatever is mounted over it later."""
    return os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _status(mountpoint: str, regions: Regions) -> str:
    living = list(regions.alive())
    sharers = sum(len(region.sharers) for region in living)
    return f"serving {mountpoint}: regions {len(living)}, sharers {sharers}"


def _bind_control(mountpoint: str) -> socket.socket:
    path = os.path.join(mountpoint, os.fsdecode(CONTROL_NAME))
    listener = socket.socket(
        socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    )
    try:
        if len(os.fsencode(path)) < 108:
            listener.bind(path)
        else:
            directory = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                listener.bind(f"/proc/self/fd/{directory}/{os.fsdecode(CONTROL_NAME)}")
            finally:
                os.close(directory)
        listener.listen(control.BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises StartError, MountError or UnsupportedError when it cannot start.
    """
    found = capabilities.probe(config.without)
    for sentence in found.missing():
        log.warning("%s", sentence)
    _raise_descriptor_limit()
    directory = Path(config.run_directory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(directory))
        prefix = _backing_prefix(directory)
        for name in backing.remove_leftovers(prefix):
            log.warning("removed shared memory %s of a daemon that died", name)
        pool = stack.enter_context(_huge_pages(config, found, directory))
        disposal = Disposal()

        def make_backing(number: int, start: int, size: int, kind: str) -> Backing:
            name = f"{prefix}{number}"
            if (kind or config.backing) == ShmBacking.kind:
                return ShmBacking(name, size, disposal)
            if pool is None:
                raise Refused(errno.EOPNOTSUPP, capabilities.LACKING["hugetlb"])
            return HugetlbBacking(pool, number, start, size, backing.stash_name(name), disposal)

        regions = Regions(config.alignment_bytes, make_backing, _forget_name)
        stack.callback(regions.close)
        stack.callback(disposal.close)
        metrics = Metrics(regions.alive)
        regions.limits = _limits(config, metrics, pool)
        operations = FileSystem(regions, metrics)
        stack.enter_context(_mounted(config, directory / "graft", operations))
        privileges.drop()
        await _serve(config, found, regions, metrics, operations, disposal)


@contextlib.contextmanager
def _huge_pages(config: Config, found: Capabilities, directory: Path) -> Iterator[Pool | None]:
    """The pool of the hugetlb backing, if there can be one."""
    if not found.hugetlb:
        if config.backing == HugetlbBacking.kind:
            raise StartError(capabilities.LACKING["hugetlb"])
        yield None
        return
    pool = Pool(directory / "huge", config.huge_page_bytes)
    try:
        pool.mount()
    except OSError as error:
        raise StartError(f"cannot mount hugetlbfs: {error}") from error
    try:
        for name in pool.leftovers():
            log.warning("removed huge pages %s of a daemon that died", name)
            (pool.directory / name).unlink()
        if config.backing == HugetlbBacking.kind and pool.total() == 0:
            log.warning("no huge pages are reserved: %s", pool.command())
        yield pool
    finally:
        pool.unmount()


def _backing_prefix(directory: Path) -> str:
    # By run directory: daemons of several mounts share /dev/shm.
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:8]
    return f"/msharefs-{digest}-"


def _limits(config: Config, metrics: Metrics, pool: Pool | None) -> Limits:
    seldom = Seldom()

    def memory() -> int:
        return backing.pool_bytes() + (pool.total() * pool.page if pool else 0)

    def hit(limit: str, message: str) -> None:
        metrics.limited.labels(limit).inc()
        if seldom.now(message):
            log.warning("%s", message)

    return Limits(config.limits, memory, hit)


def _forget_name(name: bytes) -> None:
    # Names have no lifetime in the kernel's cache, but a dentry that is in use stays
    # until it is looked up again; drop it now.
    pyfuse3.invalidate_entry_async(pyfuse3.ROOT_INODE, pyfuse3.FileNameT(name), ignore_enoent=True)


async def _serve(
    config: Config,
    found: Capabilities,
    regions: Regions,
    metrics: Metrics,
    operations: FileSystem,
    disposal: Disposal,
) -> None:
    mount = mounting.top_mount(config.mountpoint)
    assert mount is not None, "pyfuse3.init() returned without a mount"
    manager = Manager()
    threads = Threads(regions.limits)
    pages = PageServer(found, metrics, config.region_memory_bytes, threads)
    writeback = Writeback(threads, metrics)
    regions.release = writeback.release
    spaces = AddressSpaces(found, pages, writeback)
    with contextlib.closing(Deaths()) as deaths, contextlib.ExitStack() as stack:
        server = Control(
            regions,
            pages,
            spaces,
            found,
            deaths,
            metrics,
            operations.region_of_inode,
            mount.device,
            disposal,
            threads,
            config.backing,
        )
        stack.callback(server.close)
        async with trio.open_nursery() as nursery:
            await nursery.start(_stop_on_signal, nursery.cancel_scope)
            nursery.start_soon(_serve_fuse, nursery.cancel_scope)
            nursery.start_soon(_stop_when_unmounted, mount, nursery.cancel_scope)
            with trio.fail_after(SELF_CHECK_SECONDS):
                root = await trio.to_thread.run_sync(
                    _open_root, config.mountpoint, abandon_on_cancel=True
                )
                stack.callback(os.close, root)
                check = stack.enter_context(contextlib.closing(SelfCheck(root)))
                # It shows that the kernel's and our side have met.  And a file is closed:
                # flush() answers ENOSYS, and from then on the kernel closes files of this
                # mount without asking.  We rely on that when we close descriptors of it.
                if not await check.answers(SELF_CHECK_SECONDS):
                    raise StartError(f"{config.mountpoint} is mounted and does not answer")
                bound = await trio.to_thread.run_sync(
                    _bind_control, config.mountpoint, abandon_on_cancel=True
                )
            listener = stack.enter_context(trio.socket.from_stdlib_socket(bound))
            nursery.start_soon(deaths.run)
            nursery.start_soon(pages.run)
            nursery.start_soon(writeback.run, regions.alive)
            if config.collapse and found.collapse:
                collapser = Collapser(metrics, config.collapse_seconds)
                nursery.start_soon(collapser.run, regions.alive)
            nursery.start_soon(server.run, listener)
            log.info("ready: %s, alignment %d bytes", config.mountpoint, config.alignment_bytes)
            status = partial(_status, config.mountpoint, regions)
            nursery.start_soon(manager.run, status, check.answers)
        manager.stopping()
        await writeback.finish(regions.alive())
        regions.release = Region.close_memory
    log.info("stopped")


async def _serve_fuse(scope: trio.CancelScope) -> None:
    try:
        await pyfuse3.main()
    finally:
        scope.cancel()  # the connection was aborted: nothing is left to serve


async def _stop_when_unmounted(mount: mounting.Mount, scope: trio.CancelScope) -> None:
    await mounting.until_unmounted(mount)
    log.info("unmounted by somebody else: stopping")
    scope.cancel()


async def _stop_on_signal(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            scope.cancel()
