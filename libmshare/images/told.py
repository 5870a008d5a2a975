"""What the mount tells of a region: of one that this process has attached, most of it."""

from __future__ import annotations

import contextlib
import errno
import time
from typing import TYPE_CHECKING, Any, Final

from libmshare import texts, touching
from libmshare.errors import ImageError, Stale
from libmshare.images.patience import mounted, patiently

if TYPE_CHECKING:
    from libmshare.region import Region


_FIRST_PAUSE: Final = 0.005
_LONGEST_PAUSE: Final = 0.1
"""Seconds between two looks whether it is filled."""
GIVEN_UP: Final = "given up"
"""What `bringer` in `info` is where contents are missing and nobody brings them any more."""


def bringer_of(name: str) -> str:
    """The `bringer` in the `info` of the region of that name; "" if that cannot be told."""
    with contextlib.suppress(OSError):
        path = f"{mounted()}/.regions/{name}/info"
        with open(path, errors="surrogateescape") as file:
            return texts.parse_info(file.read()).get("bringer", "")
    return ""


class Told:
    """The texts about one region, whatever its name is meanwhile."""

    def __init__(self, region: Region) -> None:
        """Raises ImageError if this process may not read them; OSError."""
        self._directory = patiently(
            lambda: touching.directory_of(region.start, region.identity.root)
        )
        if self._directory is None:
            raise ImageError(
                errno.EACCES, "only who may read a region's file is told of it", region.name
            )

    def _text(self, file: str) -> str:
        def read() -> str:
            with open(f"{self._directory}/{file}", errors="surrogateescape") as opened:
                return opened.read()

        return patiently(read)

    def info(self) -> dict[str, str]:
        """Its `info`.  Raises OSError."""
        return texts.parse_info(self._text("info"))

    def awaited(self) -> int:
        """How many bytes of its contents are still to come.  Raises OSError."""
        return int(self.info()["awaited"])

    def maps(self) -> list[dict[str, Any]]:
        """Its `maps`.  Raises OSError."""
        return texts.parse_maps(self._text("maps"))

    def sharers(self) -> list[texts.Sharer]:
        """Who has it attached, this process too.  Raises OSError."""
        return texts.parse_sharers(self._text("sharers"))

    def pages(self) -> tuple[str, int]:
        """What kind of memory it has, and of how large pages, in bytes.  Raises OSError."""
        info = self.info()
        return info["backing"].split(" ")[0], int(info["page"])


def wait_filled(region: Region, timeout: float | None) -> None:
    """See Region.wait_filled()."""
    deadline = None if timeout is None else time.monotonic() + timeout
    told, pause = Told(region), _FIRST_PAUSE
    try:
        while left := int((info := told.info())["awaited"]):
            if info.get("bringer") == GIVEN_UP:
                raise ImageError(
                    errno.EIO,
                    f"{left} bytes are missing, and nobody fetches them any more: its owner, user "
                    f"{info['owner'].partition(':')[0]}, has to pull the same image again",
                    region.name,
                )
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"{left} bytes are still to come", region.name)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
    except FileNotFoundError as error:
        raise Stale(errno.ESTALE, "the region is gone", region.name) from error
