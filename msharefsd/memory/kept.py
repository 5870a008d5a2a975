"""Makes mapped files, keeps each where it survives us, and closes it everywhere."""

from __future__ import annotations

import errno
import itertools
import logging
import stat
from functools import partial
from typing import Final, Protocol

from msharefsd.errors import Refused
from msharefsd.journal.database import unsigned
from msharefsd.journal.journal import Journal
from msharefsd.journal.rows import SavedFile
from msharefsd.linux import syscalls
from msharefsd.memory.awaited import Awaited
from msharefsd.memory.files import MappedFile
from msharefsd.telemetry.labels import label
from msharefsd.threads.disposal import Disposal

log = logging.getLogger(__name__)

_NOBODY: Final = -1


class Store(Protocol):
    """Holds descriptors by their keys, and outlives us: see life/keeping.py."""

    async def put(self, key: int, fd: int, *, stays: bool = True) -> None:
        """Store a duplicate of `fd`; returns when it would survive us.  Raises OSError.

        `stays`: `fd` stays open, and is brought again to a store that had to be replaced.
        """

    def closes(self, key: int) -> None:
        """What it had of ours when we began does not stay open any more."""

    def remove(self, key: int) -> None:
        """Let go of it, soon."""


class Files:
    """Makes mapped files, and closes each everywhere it is kept."""

    def __init__(self, journal: Journal, store: Store, disposal: Disposal) -> None:
        self._journal = journal
        self._store = store
        self._disposal = disposal
        self._keys = itertools.count(journal.next_file())

    async def new(self, fd: int, uid: int, *, may_write: bool) -> MappedFile:
        """A file that would survive us.  `fd` is taken over.  Raises Refused."""
        key = next(self._keys)
        file = MappedFile(
            fd, uid, may_write=may_write, close=partial(self._close, key, uid), key=key
        )
        try:
            await self._store.put(key, fd)
        except OSError as error:
            file.let_go()
            raise Refused(
                error.errno or errno.EIO, f"nobody to keep the file: {error.strerror}"
            ) from error
        except BaseException:
            file.let_go()
            raise
        return file

    def awaited(self, uid: int) -> Awaited:
        """Contents that somebody will bring."""
        return self._awaited(next(self._keys), uid)

    def _awaited(self, key: int, uid: int) -> Awaited:
        return Awaited(uid, close=partial(self._close, key, uid), key=key)

    def restore(self, saved: SavedFile, fd: int) -> MappedFile:
        """A file that another daemon had; `fd` is -1 if its descriptor was lost."""
        if saved.awaited:
            return self._awaited(saved.key, saved.uid)
        path, inode = label(saved.path), unsigned(saved.inode)
        if fd >= 0:
            found = syscalls.identify(fd)
            if found.inode != inode or (found.major, found.minor) != (saved.major, saved.minor):
                log.error("what was kept of %s is another file: not used", path)
                self._disposal.close_fd(fd, saved.uid)
                fd = -1
        else:
            log.error(
                "the descriptor of %s was lost: what is in memory stays, the rest is SIGBUS, and "
                "nothing is written back; map it again",
                path,
            )
        return MappedFile(
            fd,
            saved.uid,
            may_write=bool(saved.may_write),
            close=partial(self._close, saved.key, saved.uid),
            key=saved.key,
            identity=syscalls.FileIdentity(saved.major, saved.minor, inode, stat.S_IFREG),
            path=saved.path,
        )

    def drop(self, key: int, fd: int) -> None:
        """A descriptor of no file that is mapped, of nobody knows whom."""
        self._close(key, _NOBODY, fd)

    def _close(self, key: int, uid: int, fd: int) -> None:
        self._journal.forget_file(key)
        self._store.remove(key)
        if fd >= 0:
            self._disposal.close_fd(fd, uid)
