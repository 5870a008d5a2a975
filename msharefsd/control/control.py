"""What the connections of one pager share."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from msharefsd.control.guards import Guards
from msharefsd.control.orphans import Orphans
from msharefsd.control.peer import Peer
from msharefsd.control.wire import MAX_FDS
from msharefsd.linux import syscalls, uffd
from msharefsd.linux.features import Capabilities
from msharefsd.linux.processes import Deaths
from msharefsd.memory.kept import Files
from msharefsd.paging.addressspace import AddressSpaces
from msharefsd.paging.bringing import Bringing
from msharefsd.paging.server import PageServer
from msharefsd.region.region import Region, Sharer, region_of_file
from msharefsd.region.registry import Regions
from msharefsd.telemetry.metrics import Metrics
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.disposal import Disposal
from msharefsd.threads.fairness import Turns
from msharefsd.threads.pool import Threads


class Front(Protocol):
    """What a connection needs of the front; both return when it is written down there."""

    async def established(self, region: Region) -> None:
        """A name has its range and memory.  Raises Refused if it is another user's now."""

    async def unlink(self, region: Region) -> None:
        """Its last sharer wants the name to go."""


def _anonymous_device() -> tuple[int, int]:
    """Of anonymous shared memory and memfds: they lie on the same kernel-internal mount."""
    probe = os.memfd_create("msharefsd", os.MFD_CLOEXEC)
    try:
        identity = syscalls.identify(probe)
    finally:
        os.close(probe)
    return identity.major, identity.minor


@dataclass(slots=True)
class Control:
    """What the connections of one pager share."""

    front: Front
    regions: Regions
    pages: PageServer
    spaces: AddressSpaces
    bringing: Bringing
    features: Capabilities
    deaths: Deaths
    metrics: Metrics
    mount_device: tuple[int, int]
    """Of the mount: a descriptor of a file there is a proof."""
    disposal: Disposal
    threads: Threads
    """For looking at files that are about to be mapped."""
    mapped_files: Files
    orphans: Orphans
    guards: Guards
    default_backing: str
    may_have_device: Callable[[Peer], bool]
    """Whether a user may be handed /dev/userfaultfd."""
    turns: Turns = field(default_factory=Turns)
    """Of calls, by user."""
    joined: dict[Sharer, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    """The sharers that have a connection, and how it is made to give them up."""
    seldom: Seldom = field(default_factory=Seldom)
    anonymous_device: tuple[int, int] = field(default_factory=_anonymous_device)
    _device: int | None = None

    def is_ours(self, identity: syscalls.FileIdentity) -> bool:
        """Whether a file is on our mount, or the backing of a region."""
        device = (identity.major, identity.minor)
        return (
            device == self.mount_device
            or self.regions.of_backing(*device, identity.inode) is not None
        )

    def region_of(self, identity: syscalls.FileIdentity) -> Region | None:
        """The region whose file or backing that is."""
        device = (identity.major, identity.minor)
        if device != self.mount_device:
            return self.regions.of_backing(*device, identity.inode)
        number = region_of_file(identity.inode)
        return None if number is None else self.regions.named(number)

    def is_of_region(self, identity: syscalls.FileIdentity) -> bool:
        """Whether it is the file of a region, which may be gone by now."""
        here = (identity.major, identity.minor) == self.mount_device
        return here and region_of_file(identity.inode) is not None

    def close_all(self, fds: list[int], uid: int) -> None:
        """Close what a client of that user sent.

        Closing a file of our own mount asks nobody: flush() answered ENOSYS to the front's
        self-check, and the kernel never sends it again; and a region's backing is ours.  A
        file of another FUSE mount waits for whoever serves that.
        """
        if len(fds) <= MAX_FDS:  # else it is not what any call brings
            for fd in [fd for fd in fds if self.is_ours(syscalls.identify(fd))]:
                fds.remove(fd)
                os.close(fd)
        self.dispose(fds, uid)

    def dispose(self, fds: list[int], uid: int) -> None:
        """Close what may wait for a client of that user.

        Of another user than the owner their lane closes userfaultfds: what hangs there must
        not keep our own table, with everybody's connections, when we are killed.  Whatever
        else might hang has come from who may write (receiving.py).
        """
        if self.pages.lanes.needs_one(uid):
            far = [fd for fd in fds if uffd.is_one(fd)]
            fds = [fd for fd in fds if fd not in far] + self.pages.lanes.dispose(uid, far)
        self.disposal.close_fds(fds, uid)

    def unclosed(self, uid: int) -> int:
        """How many files of a user's wait to be closed."""
        return self.disposal.pending(uid) + self.pages.lanes.unclosed(uid)

    def device(self) -> int:
        """/dev/userfaultfd, open."""
        if self._device is None:
            self._device = os.open(uffd.DEVICE, os.O_RDWR | os.O_CLOEXEC)
        return self._device

    def close(self) -> None:
        """Release what is not a connection's."""
        if self._device is not None:
            os.close(self._device)
