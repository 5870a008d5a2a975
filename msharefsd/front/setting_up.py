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
from msharefsd.memory import names
from msharefsd.memory.hugetlb import HugetlbBacking, Pool
from msharefsd.memory.names import IDENTITY_FILE
from msharefsd.mount import mounting
from msharefsd.mount.filesystem import FileSystem
from msharefsd.security import trust

log = logging.getLogger(__name__)

_MOST_DESCRIPTORS: Final = 1 << 20


@dataclass(slots=True)
class End:
    """How the daemon ends."""

    unmount: bool = True
    """The mount goes.  Otherwise it stays and tells its users to wait, as when we are
    killed."""
    empty: bool = False
    """There is nothing that a next daemon would need to know."""


def _missing(path: Path) -> list[Path]:
    """What of a path does not exist: the deepest first."""
    return [each for each in (path, *path.parents) if not os.path.lexists(each)]


def _take_away(made: list[Path]) -> None:
    for each in made:
        with contextlib.suppress(OSError):
            each.rmdir()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The run directory, ours alone while we live.  Raises StartError."""
    made = _missing(directory)
    try:
        with _locked(directory):
            yield
    finally:
        _take_away(made)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        trust.make_directory(directory)
    except trust.UntrustedError as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"cannot use the run directory {directory}: {error.strerror}") from error
    fd = lock.take_run_directory(directory)
    try:
        yield
    finally:
        # What the next daemon needs is in there, or nothing of ours any more; anything
        # else is not ours to remove.
        with contextlib.suppress(OSError):
            if set(os.listdir(directory)) <= {lock.FILE, IDENTITY_FILE}:
                (directory / IDENTITY_FILE).unlink(missing_ok=True)
                os.unlink(directory / lock.FILE)
                directory.rmdir()
        os.close(fd)


def identified(directory: Path) -> str:
    """The number of the run directory.  Raises StartError."""
    try:
        return names.identity(directory)
    except OSError as error:
        raise StartError(f"cannot write into {directory}: {error.strerror}") from error


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
def huge_pages(config: Config, found: Capabilities, directory: Path) -> Iterator[Pool | None]:
    """Where the hugetlb backing has its names, if there can be one.  Raises StartError."""
    if not found.hugetlb:
        if config.backing == HugetlbBacking.kind:
            raise StartError(LACKING["hugetlb"])
        yield None
        return
    pool = Pool(directory / "huge", config.huge_page_bytes)
    try:
        pool.mount()
    except OSError as error:
        raise StartError(f"cannot mount hugetlbfs: {error}") from error
    try:
        yield pool
    finally:
        # What lies in it stays, and the next daemon finds it.
        if pool.empty():
            pool.unmount()


@contextlib.contextmanager
def mounted(config: Config, workspace: Path, operations: FileSystem, end: End) -> Iterator[None]:
    """The file system, at its mountpoint.  Raises StartError."""
    made = _missing(Path(config.mountpoint))
    served = False
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
            served = True
        finally:
            # A mount whose daemon is gone tells its users to wait for the next one.
            if end.unmount and mounting.is_mounted(config.mountpoint):
                mounting.unmount(config.mountpoint)
            pyfuse3.close(unmount=False)
    finally:
        if grafted and end.unmount:
            mounting.give_back(config.mountpoint)
        if not served:
            _take_away(made)


def open_root(mountpoint: str) -> int:
    """The mount's root directory, whatever is mounted over it later."""
    return os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
