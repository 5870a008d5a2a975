"""The first part of an image is on its way while its region is made.

Somebody who is there already waits for that part, most likely; and nobody has had anything of the
image yet.  So it comes by several requests at one time, and before the others are asked for.
What goes wrong with it is nobody's affair: then it is fetched as the others are.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, Self

from libmshare.errors import ImageError

if TYPE_CHECKING:
    from libmshare.images.manifest import Part
    from libmshare.images.store import Store

_LONG_SECONDS: Final = 5.0
"""A store that has no ranges, or other contents, says so sooner."""
_ALONE_SECONDS: Final = 0.05
"""For so long it has all there is of the network and of this machine."""
_TIDY: Final = 2.0
"""How long it is waited for if nobody wants it any more (seconds): a request may hang."""


class Ahead:
    """That part, once somebody wants it.

    Synchronization: any thread may call `take`.
    """

    def __init__(self, store: Store, parts: tuple[Part, ...]) -> None:
        self._store = store
        self._part = parts[0] if parts else None
        self._thread: threading.Thread | None = None
        self._pieces: list[memoryview] | None = None
        self._seconds = 0.0
        """What a failure took."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # (If a signal's handler raised while it was being started, it may be none yet.)
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(_TIDY)

    def begin(self) -> None:
        """Have it fetched."""
        if self._part is not None:
            self._thread = threading.Thread(target=self._fetch, name="mshare image", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until it has come, or the others are not to wait for it any more."""
        if self._thread is not None:
            self._thread.join(_ALONE_SECONDS)

    def _fetch(self) -> None:
        assert self._part is not None
        begun = time.monotonic()
        try:
            self._pieces = self._store.part_soon(self._part.hash, self._part.length)
        except (ImageError, RuntimeError):  # no thread more, say
            self._seconds = time.monotonic() - begun

    def take(self, part: Part) -> list[memoryview] | None:
        """Its contents, one behind the other, if it is this one and has come; only once.

        Waits for it.
        """
        if self._thread is None or part != self._part:
            return None
        self._thread.join()
        pieces, self._pieces = self._pieces, None
        return pieces

    def was_long(self, part: Part) -> bool:
        """Whether the store has been tried with it for so long that once more is enough."""
        return part == self._part and self._seconds >= _LONG_SECONDS
