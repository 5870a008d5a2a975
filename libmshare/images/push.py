"""Pushing: parts first, each once, and the manifest when all of them are there.

Who is killed before that has changed nothing that anybody reads: parts are never overwritten by
anything else, and a manifest is written in one piece.
"""

from __future__ import annotations

import hashlib
import platform
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from libmshare.images import crew
from libmshare.images.manifest import PART, Manifest, Part, digest_of, dump, parse
from libmshare.images.memory import Contents
from libmshare.images.store import Store, Url, part_key

if TYPE_CHECKING:
    from libmshare.region import Region


_ZEROS: Final = bytes(PART)


class Pushed(NamedTuple):
    """What became of it; sizes in bytes."""

    digest: str
    """What names this image for ever: for pull."""
    size: int
    """Of the contents."""
    sent: int
    """What was not in the store already."""


class _Push:
    def __init__(self, contents: Contents, store: Store) -> None:
        self._contents = contents
        self._store = store
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self.parts: list[Part] = []
        self.done = self.sent = 0

    def part(self, run: tuple[int, int, bool]) -> None:
        offset, length, touch = run
        data = self._contents.read(offset, length, touch=touch)
        with self._lock:
            self.done += length
        if data == _ZEROS[:length]:
            return
        name = hashlib.sha256(data).hexdigest()
        with self._lock:
            self.parts.append(Part(offset, length, name))
            if name in self._known:
                return
            self._known.add(name)
        if not self._store.has_part(name, length):
            self._store.put(part_key(name), data)
            with self._lock:
                self.sent += length


def push(
    region: Region,
    url: str,
    *,
    unsynchronized: bool = False,
    abi: str = "",
    progress: crew.Progress = lambda _done, _of: None,
) -> Pushed:
    """See Region.push()."""
    where = Url(url)
    store = Store(where, make=True)
    with Contents(region, unsynchronized=unsynchronized) as contents:
        runs = list(contents.runs())
        total = sum(length for _, length, _ in runs)
        work = _Push(contents, store)
        crew.each(runs, work.part, lambda: progress(work.done, total))
        manifest = Manifest(
            region.start,
            region.size,
            platform.machine(),
            abi,
            contents.backing,
            contents.objects,
            tuple(sorted(work.parts, key=lambda part: part.offset)),
        )
        content = dump(manifest)
        parse(content)  # what pull would refuse is not written
        contents.check()
        store.put(where.name, content)
    return Pushed(digest_of(content), manifest.stored(), work.sent)
