"""The pieces of the front's start: the run directory, the mount, the control socket."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyfuse3

from msharefsd.config import Config
from msharefsd.errors import StartError
from msharefsd.life import lock
from msharefsd.linux.features import LACKING, Capabilities
from msharefsd.memory.hugetlb import HugetlbBacking, Pool
from msharefsd.mount import mounting
from msharefsd.mount.filesystem import FileSystem
from msharefsd.security import trust

log = logging.getLogger(__name__)

_MOST_DESCRIPTORS: Final = 1 << 20


@dataclass(slots=True)
class End:
    """How the daemon ends."""

    for_good: bool
    """Nothing stays.  Otherwise everything does, for the next daemon: as when we are
    killed, so it is what happens unless somebody says otherwise."""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The run directory, ours alone while we live.  Raises StartError."""
    try:
        trust.make_directory(directory)
    except trust.UntrustedError as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"cannot use the run directory {directory}: {error.strerror}") from error
    fd = lock.take_run_directory(directory)
    try:
        yield
        # What the next daemon needs is in there, or nothing of ours any more; anything
        # else is not ours to remove.
        with contextlib.suppress(OSError):
            if set(os.listdir(directory)) <= {lock.FILE}:
                os.unlink(directory / lock.FILE)
                directory.rmdir()
    finally:
        os.close(fd)


def raise_descriptor_limit() -> None:
    """Three descriptors a sharer: thousands of sharers need thousands."""
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
def huge_pages(config: Config, found: Capabilities, directory: Path, end: End) -> Iterator[None]:
    """Where the hugetlb backing has its names, if there can be one.  Raises StartError."""
    if not found.hugetlb:
        if config.backing == HugetlbBacking.kind:
            raise StartError(LACKING["hugetlb"])
        yield
        return
    pool = Pool(directory / "huge", config.huge_page_bytes)
    try:
        pool.mount()
    except OSError as error:
        raise StartError(f"cannot mount hugetlbfs: {error}") from error
    try:
        if config.backing == HugetlbBacking.kind and pool.total() == 0:
            log.warning("no huge pages are reserved: %s", pool.command())
        yield
    finally:
        if end.for_good:
            pool.unmount()


@contextlib.contextmanager
def mounted(config: Config, workspace: Path, operations: FileSystem, end: End) -> Iterator[None]:
    """The file system, at its mountpoint.  Raises StartError, MountError."""
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


def open_root(mountpoint: str) -> int:
    """The mount's root directory, whatever is mounted over it later."""
    return os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
