"""Loading: a region of the bytes of one object, whatever wrote that.

An object may be replaced while it is read, so each answer has to be of the version that the
first one was of; or there is no region.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import threading
from typing import TYPE_CHECKING

from libmshare import core
from libmshare.errors import ImageError
from libmshare.images import crew, unnamed
from libmshare.images.manifest import PART
from libmshare.images.store import Store, Url
from libmshare.images.told import Told
from libmshare.images.unnamed import Unnamed

if TYPE_CHECKING:
    from libmshare.region import Region


class _Fill:
    """What is copied where; the threads share it."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._buffer = region.buf
        self._lock = threading.Lock()
        self.done = 0

    def close(self) -> None:
        """The memory is not held any more, whatever holds this: a failure's traceback, say."""
        self._buffer.release()

    def put(self, offset: int, data: memoryview) -> None:
        """Contents come to an offset.  Raises NoMemory."""
        # First the memory: to touch what cannot be had is SIGBUS, and this is an error.
        self._region.populate(offset, len(data))
        self._buffer[offset : offset + len(data)] = data
        with self._lock:
            self.done += len(data)


def load(
    name: str,
    url: str,
    *,
    start: int | None = None,
    size: int | None = None,
    backing: str | None = None,
    mode: int = 0o600,
    progress: crew.Progress = lambda _done, _of: None,
) -> Region:
    """A new region that begins with the bytes of the object, and is under its name then.

    `size`, in bytes, is the object's by default, and `start` the daemon's choice.
    Raises as Region.pull(); ImageError (ESTALE) if the object is replaced meanwhile.
    """
    unnamed.check_name(name)
    where = Url(url)
    store = Store(where)
    version = store.version(where.name)
    length = version[0]
    size = length if size is None else size
    if not 0 < length <= size:
        raise ImageError(errno.EFBIG, f"it has {length} bytes, and the region {size}", str(where))
    region = _made(start, size, backing)
    try:
        unnamed.check_room(region.identity.root, length, Told(region).pages()[0])
        with contextlib.closing(_Fill(region)) as fill:

            def fetch(offset: int) -> None:
                part = min(PART, length - offset)
                fill.put(offset, store.range(where.name, offset, part, version))

            crew.each(range(0, length, PART), fetch, lambda: progress(fill.done, length))
        Unnamed(region).give(name, mode)
    except BaseException:
        region.close()
        raise
    return region


def _made(start: int | None, size: int, backing: str | None) -> Region:
    """A region of zeros without a name."""
    from libmshare.region import Region as Made  # noqa: PLC0415 - it imports us

    if start is None:
        made = Made.create(size=size, backing=backing, ephemeral=True)
        made._warn = False  # noqa: SLF001 - until it is given to somebody
        return made
    region = unnamed.make(start, size, size, backing)
    try:
        page = Told(region).pages()[1]
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | core.MAP_FIXED_NOREPLACE
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        core.mshare_mmap(start, -(-size // page) * page, prot, flags)
    except BaseException:
        region.close()
        raise
    return region
