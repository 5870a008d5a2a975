"""Pulling: a region without a name is filled, checked part by part, and then given its name.

So nobody ever sees a region that is half filled, or has zeros where contents belong; who is
killed leaves nothing, and who comes again begins anew.  What a manifest says is immutable, so
there are never two versions in one region, whatever happens in the store meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import platform
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from libmshare import core, texts, touching, waiting
from libmshare.errors import ImageError, RegionExists
from libmshare.images import crew, unnamed
from libmshare.images.manifest import LARGEST, Manifest, Object, check_digest, digest_of, parse
from libmshare.images.store import Store, Url
from libmshare.images.unnamed import Unnamed

if TYPE_CHECKING:
    from libmshare.region import Region


_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_SUFFIX: Final = ".img"


class Fill:
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


def name_of(url: str) -> str:
    """What a region is called that was pulled from there, if nobody says otherwise."""
    name = Url(url).name
    return name.removesuffix(_SUFFIX) or name


def pull(
    url: str,
    name: str | None = None,
    *,
    backing: str | None = None,
    digest: str | None = None,
    abi: str | None = None,
    mode: int = 0o600,
    progress: crew.Progress = lambda _done, _of: None,
) -> Region:
    """See Region.pull()."""
    called = name_of(url) if name is None else name
    unnamed.check_name(called)
    if digest is not None:
        found = unnamed.attach_image(called, check_digest(digest))
        if found is not None:
            return found
    where = Url(url)
    store = Store(where)
    manifest, got = _described(store, where, digest, abi)
    found = unnamed.attach_image(called, got)
    if found is not None:
        return found
    with unnamed.alone(called):
        found = unnamed.attach_image(called, got)
        if found is not None:
            return found
        region = unnamed.make(manifest.start, manifest.size, _end(manifest), backing)
        try:
            _fill(region, manifest, store, progress)
            Unnamed(region).give(called, mode, got)
        except RegionExists:  # by somebody who is not held off by our lock
            region.close()
            found = unnamed.attach_image(called, got)
            if found is None:
                raise
            return found
        except BaseException:
            region.close()
            raise
        return region


def _described(
    store: Store, where: Url, digest: str | None, abi: str | None
) -> tuple[Manifest, str]:
    """The manifest there, and its digest, if it is what is wanted.  Raises ImageError."""
    content = store.get(where.name, LARGEST)
    got = digest_of(content)
    if digest is not None and got != digest:
        raise ImageError(errno.EBADMSG, f"the image there is {got}", str(where))
    manifest = parse(content)
    if manifest.arch != platform.machine():
        raise ImageError(errno.ENOEXEC, f"the image is for {manifest.arch}", str(where))
    if abi is not None and abi != manifest.abi:
        raise ImageError(
            errno.ENOEXEC, f"the image is of {manifest.abi!r}, and {abi!r} is wanted", str(where)
        )
    return manifest, got


def _end(manifest: Manifest) -> int:
    return max((each.offset + each.length for each in manifest.objects), default=0)


def _fill(region: Region, manifest: Manifest, store: Store, progress: crew.Progress) -> None:
    kind, page = pages_of(region)
    unnamed.check_room(region.identity.root, manifest.stored(), kind)
    objects = [_whole(each, page) for each in manifest.objects]
    for each, behind in zip(objects, [*objects[1:], None], strict=True):
        if behind is not None and each.offset + each.length > behind.offset:
            raise ImageError(errno.EINVAL, f"it does not lie in whole pages of {page} bytes")
        kind_of = mmap.MAP_SHARED if each.shared else mmap.MAP_PRIVATE
        flags = kind_of | mmap.MAP_ANONYMOUS | core.MAP_FIXED_NOREPLACE
        # (Not Region.mmap(): the last page may end beyond the region's size.)
        _call(core.mshare_mmap, region, each, _READ_WRITE, flags)
    places: dict[tuple[str, int], list[int]] = {}
    for part in manifest.parts:
        places.setdefault((part.hash, part.length), []).append(part.offset)
    total = manifest.stored()
    with contextlib.closing(Fill(region)) as fill:

        def fetch(item: tuple[tuple[str, int], list[int]]) -> None:
            (name, length), offsets = item
            data = store.part(name, length)
            for offset in offsets:
                fill.put(offset, data)

        crew.each(places.items(), fetch, lambda: progress(fill.done, total))
    for each in objects:
        if each.prot != _READ_WRITE:
            _call(core.mshare_mprotect, region, each, each.prot)


def _call(function: Callable[..., object], region: Region, item: Object, *more: int) -> None:
    call = partial(function, region.start + item.offset, item.length, *more)
    waiting.interruptible(call)


def pages_of(region: Region) -> tuple[str, int]:
    """What kind of memory it has, and of how large pages."""
    root = region.identity.root

    def ask() -> dict[str, str]:
        directory = touching.directory_of(region.start, root)
        if directory is None:
            raise ImageError(errno.EIO, "the daemon does not say what memory it is")
        with open(f"{directory}/info", errors="surrogateescape") as file:
            return texts.parse_info(file.read())

    info = unnamed.patiently(ask)
    return info["backing"].split(" ")[0], int(info["page"])


def _whole(item: Object, page: int) -> Object:
    """In whole pages: what was mapped in small ones may be of large ones here."""
    if item.offset % page:
        raise ImageError(errno.EINVAL, f"it does not lie in whole pages of {page} bytes")
    return Object(item.offset, -(-item.length // page) * page, item.prot, item.shared)
