"""What the mount tells about regions: its directory and the texts in .regions/NAME.

Everything here touches the mount, so it is called through `ask.bounded`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from libmshare import core
from libmshare.cli.errors import CommandError, explain, not_mounted
from libmshare.cli.output import printable
from libmshare.texts import Sharer, parse_info, parse_sharers

_REMOVED: Final = b".removed-"
HUGE_PAGE: Final = 2 << 20
"""What page tables are had back by (bytes)."""
_TABLE: Final = 4096
"""A page table of one huge page's small ones (bytes)."""
_IMAGE: Final = b"user.mshare.image"


@dataclass(frozen=True, slots=True)
class Region:
    """A region, as its file and its `info` tell it; sizes and addresses in bytes."""

    name: bytes
    mode: int
    uid: int
    gid: int
    memory: int
    info: Mapping[str, str] = field(default_factory=dict)
    """The lines of `info`; none for who may not read it."""
    directory: bytes = b""
    """In .regions; its name, if that was not removed."""

    @property
    def removed(self) -> bool:
        """Whether it has no name any more, and memory until its sharers have gone."""
        return self.directory != self.name

    @property
    def state(self) -> str | None:
        """Whether it has a range yet."""
        return self.info.get("state")

    @property
    def size(self) -> int | None:
        """None: not told, or it has no range yet."""
        value = self.info.get("size")
        return (int(value) or None) if value is not None else None

    @property
    def start(self) -> int | None:
        """As `size`."""
        return int(self.info["start"], 16) if self.size else None

    @property
    def sharers(self) -> int | None:
        """How many processes have it attached."""
        value = self.info.get("sharers")
        return None if value is None else int(value)

    def number(self, key: str) -> int:
        """A figure of `info`; 0 if it is not told."""
        value = self.info.get(key, "")
        return int(value) if value.isdecimal() else 0

    @property
    def forsaken(self) -> bool:
        """Whether contents of it are missing, and no process brings them just now."""
        return self.number("awaited") > 0 and self.info.get("bringer") in ("none", "given up")

    @property
    def saved(self) -> int | None:
        """Page tables that sharers do without because of huge pages (bytes).

        As many as there would be if each had touched all of it.
        """
        if self.sharers is None:
            return None
        return self.number("huge") // HUGE_PAGE * _TABLE * self.sharers

    @property
    def backing(self) -> str | None:
        """What kind of memory it has."""
        value = self.info.get("backing")
        return None if value is None else value.split(" ", 1)[0]

    def record(self) -> dict[str, Any]:
        """For JSON.  Keys of `info` that this program does not know are there as text."""
        known = {
            "name": os.fsdecode(self.name),
            "start": self.start,
            "size": self.size,
            "memory": self.memory,
            "sharers": self.sharers,
            "backing": self.backing,
            "uid": self.uid,
            "gid": self.gid,
            "mode": f"{self.mode:04o}",
            "state": self.state,
            "removed": self.removed,
        }
        more: dict[str, Any] = {
            key: int(value) if value.isdecimal() else value
            for key, value in self.info.items()
            if key not in known and key != "owner"
        }
        return known | more


def root() -> str:
    """Where msharefs is mounted.  Raises DaemonGoneError."""
    try:
        return core.mshare_root()
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise not_mounted() from None
        raise explain(error, b"msharefs") from None


def alignment(mount: str) -> int:
    """What addresses and sizes of regions are multiples of (bytes).  Raises CommandError."""
    try:
        with open(f"{mount}/mshare_info", "rb") as file:
            return int(file.read())
    except OSError as error:
        raise explain(error, b"mshare_info") from None
    except ValueError:
        raise CommandError(
            f"{printable(mount)}/mshare_info holds no number: is that msharefs?"
        ) from None


def check_name(name: bytes) -> None:
    """Raises CommandError for a name that no region has: it would lead elsewhere."""
    if not name:
        raise CommandError("a region's name is not empty")
    if b"/" in name:
        raise CommandError(f"{printable(name)}: a region's name has no slash")
    if name.startswith(b".") or name == b"mshare_info":
        raise CommandError(f"{printable(name)}: this name is reserved by msharefs")


def names() -> list[bytes]:
    """The regions' names, sorted.  Raises CommandError."""
    try:
        listed = os.listdir(os.fsencode(root()))
    except OSError as error:
        raise explain(error, b"msharefs") from None
    return sorted(name for name in listed if not name.startswith(b".") and name != b"mshare_info")


def everything(*, removed: bool = False) -> list[Region]:
    """Every region, by name; also those that were removed and have memory still.

    Raises CommandError.
    """
    mount = root()
    found = []
    for name in names() + (_removed(mount) if removed else []):
        try:
            found.append(_region(mount, name))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # gone since it was listed
                raise explain(error, name) from None
    return found


def _removed(mount: str) -> list[bytes]:
    """The directories of regions that were removed.  Raises CommandError."""
    try:
        listed = os.listdir(os.fsencode(f"{mount}/.regions"))
    except OSError as error:
        raise explain(error, b".regions") from None
    return sorted(name for name in listed if name.startswith(_REMOVED))


def one(name: bytes) -> Region:
    """The region of that name.  Raises CommandError."""
    check_name(name)
    try:
        found = _region(mount := root(), name)
    except OSError as error:
        raise explain(error, name) from None
    if not found.info:
        return found
    with contextlib.suppress(OSError):  # it is of no image
        image = os.getxattr(os.path.join(os.fsencode(mount), name), _IMAGE)
        return replace(found, info={**found.info, "image": os.fsdecode(image)})
    return found


def _region(mount: str, directory: bytes) -> Region:
    """What is in .regions/DIRECTORY: a region's name, or what one that was removed has."""
    removed = directory.startswith(_REMOVED)
    where = (b".regions", directory) if removed else (directory,)
    status = os.stat(os.path.join(os.fsencode(mount), *where))
    try:
        info = parse_info(_read(mount, directory, "info"))
    except PermissionError:
        info = {}
    mode = stat.S_IMODE(status.st_mode)
    return Region(
        unescaped(info.get("name", os.fsdecode(directory))) if removed else directory,
        int(info.get("mode", f"{mode:o}"), 8),
        status.st_uid,
        status.st_gid,
        int(info.get("memory", status.st_blocks * 512)),
        info,
        directory,
    )


def unescaped(label: str) -> bytes:
    r"""The name that a text shows: there bytes that are not printable are \ooo."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), os.fsencode(label))


def told(region: Region, file: str) -> str | None:
    """The text FILE of a region that was found; None if it has gone, or may not be read."""
    try:
        return _read(root(), region.directory, file)
    except OSError:
        return None


def text(name: bytes, file: str) -> str:
    """The text .regions/NAME/FILE.  Raises CommandError."""
    check_name(name)
    mount = root()
    try:
        return _read(mount, name, file)
    except FileNotFoundError as error:
        if os.path.exists(os.path.join(os.fsencode(mount), name)):
            raise CommandError(
                f"this msharefsd has no {file} file for its regions; a newer one may"
            ) from None
        raise explain(error, name) from None
    except OSError as error:
        raise explain(error, name) from None


def _read(mount: str, name: bytes, file: str) -> str:
    path = os.path.join(os.fsencode(mount), b".regions", name, file.encode())
    with open(path, "rb") as opened:
        return os.fsdecode(opened.read())


def daemon() -> dict[str, str]:
    """What `.status` tells of the daemon, as it stands there.  Raises CommandError."""
    try:
        with open(os.path.join(os.fsencode(root()), b".status"), "rb") as file:
            return parse_info(os.fsdecode(file.read()))
    except FileNotFoundError:
        raise CommandError("this msharefsd has no .status file; a newer one has") from None
    except OSError as error:
        raise explain(error, b".status") from None


def sharers(name: bytes) -> list[Sharer]:
    """Who has attached the region, oldest first.  Raises CommandError."""
    return parse_sharers(text(name, "sharers"))


def holders(region: Region) -> list[Sharer]:
    """Who has it attached, as far as one may know; nobody, if it has gone meanwhile."""
    return parse_sharers(told(region, "sharers") or "")
