"""The `shm` backing: 4 KiB pages on /dev/shm."""

from __future__ import annotations

import os

from msharefsd.linux.uffd import Feature
from msharefsd.memory.backing import NOT_LEFT, Backing, Left
from msharefsd.memory.host import HostMapping
from msharefsd.memory.names import MemoryNames
from msharefsd.memory.shm import SHM_DIRECTORY, open_or_create, unlink_shm
from msharefsd.threads.disposal import Disposal


class ShmBacking(Backing):
    """POSIX shared memory: 4 KiB pages on /dev/shm, whoever touches first pays."""

    kind = "shm"
    charges_sharer = True

    def __init__(
        self,
        names: MemoryNames,
        size: int,
        disposal: Disposal,
        *,
        adopt: bool = False,
        left: Left = NOT_LEFT,
    ) -> None:
        """Create it, without a page, or adopt it.  Raises as ShmObject does."""
        fd = open_or_create(names.backing, size, adopt=adopt, left=left[0])
        try:
            super().__init__(names, size, fd, disposal, adopt=adopt, left=left[1])
        except BaseException:
            os.close(fd)
            raise

    def _open(self, access: int) -> int:
        return self.reopen(SHM_DIRECTORY + self.name, access)

    def _map_host(self) -> HostMapping:
        return HostMapping(self, Feature.MISSING_SHMEM)

    def _unlink(self) -> None:
        unlink_shm(self.name)
