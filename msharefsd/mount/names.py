"""The names of regions, as the mount shows them, and what is known of each.

The front has names: who made them, who may do what, which pager has the memory.  What that
memory is, only the pager knows; what it has said of it is remembered here.

Nothing here awaits: each method runs to its end before anything else does.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Final

from msharefsd.errors import Refused
from msharefsd.journal.names import NamesJournal
from msharefsd.journal.rows import SavedName
from msharefsd.link.messages import Extent, NameRecord
from msharefsd.linux import processes
from msharefsd.mount.places import lowest_free
from msharefsd.region.limits import Account, Limits
from msharefsd.region.region import region_of_file
from msharefsd.telemetry.counts import Counts
from msharefsd.telemetry.labels import label

NAME_MAX: Final = 255
INFO_FILE: Final = b"mshare_info"
IDENTITY_BYTES: Final = 16
IMAGE_BYTES: Final = 256
"""The most that is remembered of where a region's contents came from."""


def check_name(name: bytes) -> None:
    """Raises Refused for a name that no region can have (design: EPERM, ENAMETOOLONG)."""
    if len(name) > NAME_MAX:
        raise Refused(errno.ENAMETOOLONG, f"a region's name has at most {NAME_MAX} bytes")
    if name.startswith(b".") or name == INFO_FILE:
        raise Refused(errno.EPERM, "this name is reserved by msharefs: choose another")


@dataclass(eq=False, slots=True)
class Name:
    """One region, as far as the front knows it."""

    id: int
    name: bytes
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    home: int
    """The user whose pager has its memory: who owned it when it got that."""
    creator: int = 0
    """The process that made the file."""
    linked: bool = True
    start: int = 0
    size: int = 0
    """0 as long as it has no range."""
    identity: bytes = field(default_factory=lambda: os.urandom(IDENTITY_BYTES))
    """What no other region has, ever and anywhere; who knows it finds the region by it."""
    length: int = 0
    """How much of it its creator wanted, in bytes, if they left its place to us; else 0."""
    making: bool = False
    """It is a name for memory that its maker is about to give it, and goes with that one."""
    users: int = 0
    """How many have its file open."""
    image: bytes = b""
    """What its writers say that it came from; nothing here depends on it."""
    given: bool = False
    """Whether it was given its name when it had memory: it goes with that, then."""
    place: tuple[int, int] = (0, 0)
    """Start and size of what is kept for it, as long as it has no range."""
    backing: tuple[int, int, int] | None = None
    """Which file its memory is: device and inode."""
    memory: int = 0
    """Bytes that it held when its pager was there last."""
    look: Callable[[], int] | None = None
    """Tells what it holds now, if its pager is there."""
    sharers: int = 0
    """How many had it when its pager was there last."""
    count: Callable[[], int] | None = None
    """Tells how many have it now, if its pager is there."""
    counts: tuple[int, int, int] = (0, 0, 0)
    """What was counted of it when its pager was there last (telemetry/counts.py)."""
    tell: Callable[[], tuple[int, int, int]] | None = None
    """Tells what is counted now, if its pager is there."""
    account: Account = field(default_factory=Account)
    """Its owner's."""
    objects: Sized = ()
    """The pager's."""

    def allocated(self) -> int:
        """Bytes of memory that it holds, as far as its pager has said."""
        if self.look is not None:
            self.memory = self.look()
        return self.memory

    @property
    def lingers(self) -> bool:
        """Whether it was removed, and has memory until nobody has it attached any more."""
        return not self.linked and self.size > 0

    def shared(self) -> int:
        """How many processes have it attached, as far as its pager has said."""
        if self.count is not None:
            self.sharers = self.count()
        return self.sharers

    def counted(self) -> Counts:
        """What is counted of it, as far as its pager has said."""
        if self.tell is not None:
            self.counts = self.tell()
        return Counts(*self.counts)

    def let_go(self) -> None:
        """Its pager ends: what it has said last is what is known."""
        self.allocated()
        self.shared()
        self.counted()
        self.look = self.count = self.tell = None

    def label(self) -> str:
        """The name for logs and texts: see telemetry/labels.py."""
        return label(self.name)

    def record(self) -> NameRecord:
        """What the pager has to know."""
        return NameRecord(
            self.id,
            self.name,
            self.mode,
            self.uid,
            self.gid,
            self.linked,
            self.creator,
            self.length,
            self.identity,
        )


def _row(name: Name) -> SavedName:
    return SavedName(
        name.id,
        name.name,
        name.mode,
        name.uid,
        name.gid,
        name.atime_ns,
        name.mtime_ns,
        name.ctime_ns,
        name.linked,
        name.creator,
        name.home,
        name.start,
        name.size,
        *(name.backing or (0, 0, 0)),
        name.identity,
        name.length,
        name.making,
        name.image,
    )


def _from_row(row: SavedName) -> Name:
    return Name(
        row.id,
        row.name,
        row.mode,
        row.uid,
        row.gid,
        row.atime_ns,
        row.mtime_ns,
        row.ctime_ns,
        row.home,
        row.creator,
        bool(row.linked),
        row.start,
        row.size,
        backing=(row.major, row.minor, row.inode) if row.inode else None,
        identity=row.identity,
        length=row.length,
        making=bool(row.making),
        image=row.image,
    )


def _is_abandoned(row: SavedName) -> bool:
    """Whether its maker died while no daemon was there, before it had memory.

    (The number may be another process's by now: then it is left for the next time.  So is that
    of a process which our pid namespace does not see, whose number is 0: it may live.)
    """
    if not row.making or row.size or not row.creator:
        return False
    return processes.state(row.creator) in ("", "Z", "X")


class Names:
    """All names of one mount."""

    def __init__(
        self, alignment: int, limits: Limits | None = None, journal: NamesJournal | None = None
    ) -> None:
        """What the journal has; `alignment` is that of regions, in bytes."""
        self.alignment = alignment
        self.limits = limits or Limits()
        self._journal = journal or NamesJournal()
        self._ids = itertools.count(self._journal.next_id())
        self._by_name: dict[bytes, Name] = {}
        self._by_id: dict[int, Name] = {}
        self._by_identity: dict[bytes, Name] = {}
        self._by_backing: dict[tuple[int, int, int], Name] = {}
        self.changed: Callable[[Name], None] = lambda _: None
        """Told when a name is new, or has changed in a way that concerns its pager."""
        self.moved: Callable[[Name, int], None] = lambda _name, _home: None
        """Told when a name without memory has another pager, and whose it was."""
        for row in self._journal.names():
            if _is_abandoned(row):
                self._journal.forget(row.id)
            else:
                self._add(_from_row(row))

    def __iter__(self) -> Iterator[Name]:
        """Those that are seen, oldest first."""
        return iter(sorted(self._by_name.values(), key=lambda name: name.id))

    def __len__(self) -> int:
        return len(self._by_name)

    def all(self) -> Iterator[Name]:
        """Those that were removed and still have memory, too."""
        return iter(list(self._by_id.values()))

    def find(self, name: bytes) -> Name | None:
        """What is seen under that name."""
        return self._by_name.get(name)

    def with_id(self, number: int) -> Name | None:
        """The region with that id, for as long as it lives or has a name."""
        return self._by_id.get(number)

    def of_inode(self, inode: int) -> Name | None:
        """The region whose file has that inode number in the mount."""
        number = region_of_file(inode)
        return None if number is None else self._by_id.get(number)

    def of_identity(self, identity: bytes) -> Name | None:
        """The region with that identity, for as long as it has a name or memory."""
        return self._by_identity.get(identity)

    def of_backing(self, major: int, minor: int, inode: int) -> Name | None:
        """The region whose memory is that file."""
        return self._by_backing.get((major, minor, inode))

    def homes(self) -> set[int]:
        """The users whose pagers have memory, or had."""
        return {name.home for name in self._by_id.values() if name.size}

    def of_home(self, home: int) -> list[Name]:
        """What a pager has or may get."""
        return [name for name in self._by_id.values() if name.home == home]

    def _add(self, name: Name) -> None:
        name.account = self.limits.account(name.uid)
        name.account.regions.add(name)
        self._by_id[name.id] = name
        self._by_identity[name.identity] = name
        if name.linked:
            self._by_name[name.name] = name
        if name.backing is not None:
            self._by_backing[name.backing] = name

    def create(
        self,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        *,
        creator: int = 0,
        making: bool = False,
        length: int = 0,
    ) -> Name:
        """A new name without a range.

        `making`: if it gets none, it goes when nobody has its file open any more.
        `length`: a range of so many bytes is kept for it, as by find_place(); if it is not 0.

        Raises Refused (EEXIST, EPERM, ENAMETOOLONG, ENOSPC; EDQUOT, see limits.py; ENOMEM).
        """
        check_name(name)
        if name in self._by_name:
            raise Refused(errno.EEXIST, "a region of that name exists")
        self.limits.account(uid).check_regions()
        now = time.time_ns()
        made = Name(
            next(self._ids), name, mode & 0o7777, uid, gid, now, now, now, uid, creator=creator
        )
        made.making, made.length = making, length
        if length:
            made.place = self._free_place(made, length, 0)
        self._journal.save(_row(made))
        self._add(made)
        self.changed(made)
        return made

    def change(self, name: Name, **fields: int) -> None:
        """chmod, chown, utimes.  Raises Refused, and nothing is changed."""
        before, home = {key: getattr(name, key) for key in fields}, name.home
        self._set(name, fields)
        try:
            self._journal.save(_row(name))
        except Refused:
            self._set(name, before)
            raise
        if name.home != home:
            self.moved(name, home)
        if not fields.keys() <= {"atime_ns", "mtime_ns", "ctime_ns"}:
            self.changed(name)

    def _set(self, name: Name, fields: dict[str, int]) -> None:
        for key, value in fields.items():
            setattr(name, key, value)
        if "uid" in fields:
            # Nothing is refused: root does that, whom no limit binds.
            name.account.regions.discard(name)
            name.account = self.limits.account(name.uid)
            name.account.regions.add(name)
            if not name.size:
                name.home = name.uid

    def unlink(self, name: Name) -> None:
        """The name goes now, the memory when the last sharer has gone.  Raises Refused."""
        if not name.linked:
            return
        self.change(name, linked=False, ctime_ns=time.time_ns())
        del self._by_name[name.name]

    def closed(self, name: Name) -> None:
        """One has closed its file.  Raises Refused, and the name stays."""
        name.users -= 1
        if name.making and not name.size and name.users == 0:
            self.unlink(name)

    def give(self, region: Name, name: bytes) -> None:
        """A region that has lost its name, or never had one for long, gets one.

        Whoever looks finds all of it under that name, or nothing.
        Raises Refused: EEXIST, EPERM if it has a name, ESTALE if it has no memory, ENOSPC, and
        as create().
        """
        check_name(name)
        if region.linked:
            raise Refused(errno.EPERM, "the region has a name")
        if not region.size:
            raise Refused(errno.ESTALE, "the region has no memory")
        if name in self._by_name:
            raise Refused(errno.EEXIST, "a region of that name exists")
        before, region.name = region.name, name
        region.given = True
        try:
            self.change(region, linked=True, ctime_ns=time.time_ns())
        except Refused:
            region.name, region.given = before, False
            raise
        self._by_name[name] = region

    def say_image(self, region: Name, image: bytes) -> None:
        """Remember what it came from.  Raises Refused: ERANGE, ENOSPC."""
        if len(image) > IMAGE_BYTES:
            raise Refused(errno.ERANGE, f"that has at most {IMAGE_BYTES} bytes")
        before, region.image = region.image, image
        try:
            self._journal.save(_row(region))
        except Refused:
            region.image = before
            raise

    def keep_place(self, name: Name, length: int, start: int) -> None:
        """Its creator wants `length` bytes at `start`, whoever else has regions there.

        Raises Refused(EINVAL).
        """
        if name.size:
            raise Refused(errno.EINVAL, "the region has its range already")
        size = -(-length // self.alignment) * self.alignment
        if length <= 0 or start % self.alignment or start + size >= 1 << 63:
            raise Refused(errno.EINVAL, f"a region begins at a multiple of {self.alignment} bytes")
        self.change(name, length=length)
        name.place = start, size

    def find_place(self, name: Name, length: int, above: int) -> None:
        """Keep a range of at least `length` bytes at or above `above` for a name without one.

        It meets no other region's range.  If the address space has no room for that any more,
        it meets none of the same owner's: what one user has takes nothing from another.
        Raises Refused: EINVAL, or ENOMEM when no range is left.
        """
        if name.size:
            raise Refused(errno.EINVAL, "the region has its range already")
        if length <= 0:
            raise Refused(errno.EINVAL, "a region's size is at least a byte")
        place = self._free_place(name, length, above)
        self.change(name, length=length)
        name.place = place

    def _free_place(self, name: Name, length: int, above: int) -> tuple[int, int]:
        """Start and size of a range for a name.  Raises Refused(ENOMEM)."""
        size = -(-length // self.alignment) * self.alignment
        others = [each for each in self._by_id.values() if each is not name]
        for those in (others, [each for each in others if each.uid == name.uid]):
            taken = [(each.start, each.size) if each.size else each.place for each in those]
            start = lowest_free(taken, size, above, self.alignment)
            if start is not None:
                return start, size
        raise Refused(errno.ENOMEM, f"no range of {size} bytes of addresses is left for a region")

    # -- what pagers say --

    def established(self, extent: Extent) -> None:
        """It has its range and memory.  Raises Refused(ENOSPC), and it is known all the same."""
        name = self._by_id.get(extent.id)
        if name is None:
            return
        if name.backing is not None:
            self._by_backing.pop(name.backing, None)
        if not name.size:
            name.mtime_ns = name.ctime_ns = time.time_ns()
        before = _row(name)
        if name.place not in ((0, 0), (extent.start, extent.size)):
            name.length = 0  # its creator has chosen another one
        name.place = (0, 0)
        name.making = False
        name.start, name.size = extent.start, extent.size
        name.backing = extent.major, extent.minor, extent.inode
        self._by_backing[name.backing] = name
        if before.length != name.length:
            self.changed(name)
        if before != _row(name):
            self._journal.save(_row(name))

    def emptied(self, number: int) -> None:
        """It has no range any more."""
        name = self._by_id.get(number)
        if name is None:
            return
        if name.backing is not None:
            self._by_backing.pop(name.backing, None)
        name.look = name.count = name.tell = None
        name.start = name.size = name.memory = name.sharers = 0
        name.backing = None
        name.home = name.uid
        self._journal.save(_row(name))

    def gone(self, number: int) -> None:
        """Nothing is left of it; if it still has its name, that is one without a range."""
        name = self._by_id.get(number)
        if name is None:
            return
        if name.linked and name.given:
            # Its last user has ended while it was given its name: nothing is under it.
            with contextlib.suppress(Refused):
                name.given = False
                self.unlink(name)
        if name.linked:
            self.emptied(number)
            return
        if number not in self._by_id:  # unlink() has had it said again
            return
        name.let_go()
        del self._by_id[number]
        del self._by_identity[name.identity]
        if name.backing is not None:
            self._by_backing.pop(name.backing, None)
        name.account.regions.discard(name)
        self._journal.forget(number)

    def recover(self, extent: Extent, home: int) -> Name | None:
        """A region that a pager has and no journal of ours: it gets the name that it had.

        None if there is another region with that number or name.  Raises Refused(ENOSPC).
        """
        record = extent.name
        if record.id in self._by_id or (record.linked and record.name in self._by_name):
            return None
        now = time.time_ns()
        made = Name(
            record.id,
            record.name,
            record.mode,
            record.uid,
            record.gid,
            now,
            now,
            now,
            home,
            linked=record.linked,
        )
        self._ids = itertools.count(max(next(self._ids), record.id + 1))
        self._journal.save(_row(made))
        self._add(made)
        return made
