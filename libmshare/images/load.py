"""Loading: a region of the bytes of one object, whatever wrote that.

An object may be replaced while it is read, so each answer has to be of the version that the
first one was of; or there is no region.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from typing import TYPE_CHECKING

from libmshare import core
from libmshare.errors import ImageError
from libmshare.images import crew, unnamed
from libmshare.images.manifest import PART
from libmshare.images.pull import Fill, pages_of
from libmshare.images.store import Store, Url
from libmshare.images.unnamed import Unnamed

if TYPE_CHECKING:
    from libmshare.region import Region


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
        unnamed.check_room(region.identity.root, length, pages_of(region)[0])
        with contextlib.closing(Fill(region)) as fill:

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
        page = pages_of(region)[1]
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | core.MAP_FIXED_NOREPLACE
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        core.mshare_mmap(start, -(-size // page) * page, prot, flags)
    except BaseException:
        region.close()
        raise
    return region
