"""Pulling: a region of an image, which can be used while it is filled.

It is made without a name; what is mapped in it is as in the image, and all that has contents
there is memory that waits for them.  Then it gets its name, and the parts are fetched, checked
one by one, and brought (core.mshare_fill()): in order, but first what somebody waits for.
Nobody ever sees zeros where contents belong.

Who is killed meanwhile leaves what has come; who pulls the same image then goes on with the
rest.  What is missing and brought by nobody is SIGBUS after a while, in place of a wait without
end, and until then a wait (docs/beyond.md).  What a manifest says is immutable, so there are
never two versions in one region, whatever happens in the store.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import platform
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from libmshare import core, texts, waiting
from libmshare.errors import ImageError, RegionExists, Stale
from libmshare.images import crew, unnamed
from libmshare.images.ahead import Ahead
from libmshare.images.bringing import Bringing, say
from libmshare.images.manifest import LARGEST, Manifest, Object, check_digest, digest_of, parse
from libmshare.images.patience import patiently
from libmshare.images.store import Store, Url
from libmshare.images.told import GIVEN_UP, Told, bringer_of
from libmshare.images.units import Unit, units_of
from libmshare.images.unnamed import Unnamed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from libmshare.region import Region


_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_SUFFIX: Final = ".img"
_LOOKED_EVERY: Final = 1.0
"""How often who waits for another one looks whether that is given up, in seconds."""


def name_of(url: str) -> str:
    """What a region is called that was pulled from there, if nobody says otherwise."""
    name = Url(url).name
    return name.removesuffix(_SUFFIX) or name


def pull(
    url: str,
    called: str,
    backing: str | None,
    digest: str | None,
    abi: str | None,
    mode: int,
    *,
    progress: crew.Progress | None = None,
    begun: Callable[[str], object] | None = None,
) -> Region:
    """See Region.pull().

    `begun`: told the image's digest when there is a region that has the name; perhaps twice.
    If that is gone before it is filled, no other one is made: Stale.
    """
    unnamed.check_name(called)
    patiently(core.mshare_root)  # (Later `mounted`: between two daemons nothing is.)
    if digest is not None:
        there = _filled(called, check_digest(digest))
        if there is not None:
            if begun is not None:
                begun(digest)
            return there
    where = Url(url)
    store = Store(where)
    manifest, got = _checked(store, where, digest, abi)
    turn = _Turn(called, got, begun)
    with unnamed.alone(called, turn.is_stuck), Ahead(store, manifest.parts) as ahead:
        region, units = _found(called, got), None
        if region is None and turn.told:
            raise Stale(errno.ESTALE, "the region was removed", called)
        if region is None:
            region, units = _begin(called, got, manifest, backing, mode, ahead)
        with _given_up(region):
            if region._readonly:  # noqa: SLF001 - who may write it fills it
                turn.has_come()
                region.wait_filled()
            else:
                wanted = say(region)  # first: whoever is told that it has begun may touch it
                turn.has_come()
                bringing = _left(region, manifest, store, ahead, units)
                with contextlib.closing(bringing):
                    bringing.heard(wanted)
                    ahead.wait()
                    _fill(bringing, progress)
    return region


class _Turn:
    """Somebody else pulls it under that name, and this process has to wait for its turn."""

    def __init__(self, called: str, got: str, begun: Callable[[str], object] | None) -> None:
        self._called = called
        self._got = got
        self._begun = begun
        self.told = False
        """Whether it was told that there is a region, because there was one."""
        self._look = time.monotonic()

    def is_stuck(self) -> bool:
        """Whether they have been given up; tells of the region as soon as there is one."""
        if self._begun is not None and not self.told:
            found = unnamed.attach_image(self._called, self._got)
            if found is not None:
                found.close()
                self.told = True
                self._begun(self._got)
        if time.monotonic() < self._look:
            return False
        self._look = time.monotonic() + _LOOKED_EVERY
        return bringer_of(self._called) == GIVEN_UP

    def has_come(self) -> None:
        """There is a region, and this process is at it."""
        if self._begun is not None:
            self._begun(self._got)


def _filled(called: str, got: str) -> Region | None:
    """The region of that image, if it is here and filled."""
    found = unnamed.attach_image(called, got)
    if found is None or _is_filled(found):
        return found
    found.close()
    return None


def _found(called: str, got: str) -> Region | None:
    """The region of that image, for writing if it is ours to fill."""
    region = unnamed.attach_image(called, got)
    if region is None or not region._readonly or _is_filled(region):  # noqa: SLF001 - as below
        return region
    return unnamed.to_be_filled(region, called, got)


def _is_filled(region: Region) -> bool:
    with _closed_by_failure(region):
        return region.filled


@contextlib.contextmanager
def _closed_by_failure(region: Region) -> Iterator[None]:
    try:
        yield
    except BaseException:
        region.close()
        raise


@contextlib.contextmanager
def _given_up(region: Region) -> Iterator[None]:
    """If it cannot be filled it goes, unless somebody else uses it: who comes may go on with it."""
    with _closed_by_failure(region):
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                told = Told(region)
                if all(each.pid == os.getpid() for each in told.sharers()):
                    region.unlink()
            raise


def _begin(
    called: str, got: str, manifest: Manifest, backing: str | None, mode: int, ahead: Ahead
) -> tuple[Region, list[Unit] | None]:
    """The region, which has its name and waits for its contents: for these units, if it is new."""
    region = unnamed.make(manifest.start, manifest.size, _end(manifest), backing)
    try:
        kind, page = Told(region).pages()
        unnamed.check_room(region.identity.root, manifest.stored(), kind)
        ahead.begin()
        units = units_of(manifest, page)
        _map(region, manifest, units, page)
        Unnamed(region).give(called, mode, got)
    except RegionExists:  # by somebody who is not held off by our lock
        region.close()
        found = unnamed.attach_image(called, got)
        if found is None:
            raise
        return found, None
    except BaseException:
        region.close()
        raise
    return region, units


def described(url: str, digest: str | None, abi: str | None) -> tuple[Manifest, str]:
    """The manifest of an image, and its digest.  Raises ImageError if it is not as wanted."""
    where = Url(url)
    return _checked(Store(where), where, digest and check_digest(digest), abi)


def _checked(store: Store, where: Url, digest: str | None, abi: str | None) -> tuple[Manifest, str]:
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


def _map(region: Region, manifest: Manifest, units: list[Unit], page: int) -> None:
    """What is mapped in the image is mapped, and what has contents there waits for them."""
    objects = [_whole(each, page) for each in manifest.objects]
    for each, behind in zip(objects, [*objects[1:], None], strict=True):
        if behind is not None and each.offset + each.length > behind.offset:
            raise ImageError(errno.EINVAL, f"it does not lie in whole pages of {page} bytes")
        kind_of = mmap.MAP_SHARED if each.shared else mmap.MAP_PRIVATE
        flags = kind_of | mmap.MAP_ANONYMOUS | core.MAP_FIXED_NOREPLACE
        # (Not Region.mmap(): the last page may end beyond the region's size.)
        _call(core.mshare_mmap, region, each, each.prot, flags)
    for item in _awaited(objects, units):
        kind_of = mmap.MAP_SHARED if item.shared else mmap.MAP_PRIVATE
        _call(core.mshare_await, region, item, item.prot, kind_of)


def _awaited(objects: list[Object], units: list[Unit]) -> Iterator[Object]:
    """What waits: of each object the runs of units that lie behind each other."""
    left = iter(units)
    unit = next(left, None)
    for each in objects:
        end = each.offset + each.length
        while unit is not None and unit.start < end:
            start, stop = unit.start, unit.end
            unit = next(left, None)
            while unit is not None and unit.start == stop and unit.end <= end:
                stop = unit.end
                unit = next(left, None)
            yield Object(start, stop - start, each.prot, each.shared)


def _left(
    region: Region, manifest: Manifest, store: Store, ahead: Ahead, units: list[Unit] | None
) -> Bringing:
    """What is left to be brought: `units`, if it is a new region."""
    if units is None:
        told = Told(region)
        awaited = [
            (each["start"] - region.start, each["end"] - region.start)
            for each in told.maps()
            if texts.is_awaited(each)
        ]
        units = units_of(manifest, told.pages()[1])
    else:
        awaited = [(unit.start, unit.end) for unit in units]
    return Bringing(region, units, awaited, store, manifest.stored(), ahead)


def _fill(bringing: Bringing, progress: crew.Progress | None) -> None:
    def tick() -> None:
        bringing.go_on()
        if progress is not None:
            progress(bringing.done, bringing.total)

    crew.each(bringing, bringing.bring, tick)


def _call(function: Callable[..., object], region: Region, item: Object, *more: int) -> None:
    call = partial(function, region.start + item.offset, item.length, *more)
    waiting.interruptible(call)


def _whole(item: Object, page: int) -> Object:
    """In whole pages: what was mapped in small ones may be of large ones here."""
    if item.offset % page:
        raise ImageError(errno.EINVAL, f"it does not lie in whole pages of {page} bytes")
    return Object(item.offset, -(-item.length // page) * page, item.prot, item.shared)
