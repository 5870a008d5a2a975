"""All regions, and how each begins and ends.

Nothing here awaits: each method runs to its end before anything else does, so no
task ever sees a region half changed.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import time
from collections.abc import Callable, Iterator

import trio

from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.memory.backing import Backing
from msharefsd.region.limits import Limits
from msharefsd.region.record import region_row, save_objects, sharer_row
from msharefsd.region.region import TASK_SIZE, Region, Sharer, State, check_name


class Regions:
    """All regions of one mount."""

    def __init__(
        self,
        alignment: int,
        make_backing: Callable[[int, int, int, str], Backing],
        release: Callable[[Region], None] = Region.close_memory,
        limits: Limits | None = None,
        journal: Journal | None = None,
    ) -> None:
        """Start without regions.

        `make_backing(region id, start, size, kind)` makes memory; `release(region)` sees
        to it that the memory of a region that nobody uses any more is closed;
        `limits` says what each user may have; `journal` is where everything is
        written before it is so.
        """
        self.release = release
        self.limits = limits or Limits()
        self.journal = journal or Journal()
        self.alignment = alignment
        self._make_backing = make_backing
        self._ids = itertools.count(self.journal.next_region())
        self._sharer_numbers = itertools.count(self.journal.next_sharer())
        self._by_name: dict[bytes, Region] = {}
        self._by_id: dict[int, Region] = {}
        self._by_backing: dict[tuple[int, int, int], Region] = {}

    def __iter__(self) -> Iterator[Region]:
        """Regions that have a name, oldest first."""
        return iter(sorted(self._by_name.values(), key=lambda region: region.id))

    def all(self) -> Iterator[Region]:
        """Every region that has a name, memory or a sharer."""
        return iter(list(self._by_id.values()))

    def alive(self) -> Iterator[Region]:
        """Every region with memory, its name gone or not."""
        return iter([r for r in self._by_id.values() if r.backing is not None])

    def find(self, name: bytes) -> Region | None:
        """The region of that name."""
        return self._by_name.get(name)

    def with_id(self, number: int) -> Region | None:
        """The region with that id, for as long as it lives or has a name."""
        return self._by_id.get(number)

    def of_backing(self, major: int, minor: int, inode: int) -> Region | None:
        """The region whose backing is that file."""
        return self._by_backing.get((major, minor, inode))

    def adopt(self, region: Region) -> None:
        """Take over a region that another daemon left."""
        region.closed = self._closed
        region.account = self.limits.account(region.uid)
        region.account.regions.add(region)
        self._by_id[region.id] = region
        if region.linked:
            self._by_name[region.name] = region
        if region.backing is not None:
            self._by_backing[_key(region.backing)] = region

    def change(self, region: Region, **fields: object) -> None:
        """Set fields of a region, and write it down.  Raises Refused, and nothing is set."""
        before = {name: getattr(region, name) for name in fields}
        for name, value in fields.items():
            setattr(region, name, value)
        try:
            self.journal.save_region(region_row(region))
        except Refused:
            for name, value in before.items():
                setattr(region, name, value)
            raise

    def create(self, name: bytes, mode: int, uid: int, gid: int, *, creator: int = 0) -> Region:
        """A new name without a range.

        Raises Refused (EEXIST, EPERM, ENAMETOOLONG; EDQUOT, see limits.py).
        """
        check_name(name)
        if name in self._by_name:
            raise Refused(errno.EEXIST, "a region of that name exists")
        account = self.limits.account(uid)
        account.check_regions()
        now = time.time_ns()
        region = Region(
            next(self._ids),
            name,
            mode & 0o7777,
            uid,
            gid,
            now,
            now,
            now,
            account,
            creator=creator,
        )
        self.journal.save_region(region_row(region))
        self.adopt(region)
        return region

    def give(self, region: Region, uid: int) -> None:
        """chown(2): another owner, who has it in their account from now on.

        Nothing is refused: root does that, whom no limit binds.
        """
        region.uid = uid
        account = self.limits.account(uid)
        if region in region.account.regions:
            region.account.regions.discard(region)
            account.regions.add(region)
        region.account = account

    def check_range(self, start: int, size: int) -> None:
        """Raises Refused(EINVAL) for a range that no region can have."""
        if size == 0 or start % self.alignment or size % self.alignment:
            raise Refused(
                errno.EINVAL, f"address and length must be multiples of {self.alignment} bytes"
            )
        if start == 0 or start + size > TASK_SIZE:
            raise Refused(errno.EINVAL, "the range is not in user space")

    def establish(
        self,
        region: Region,
        start: int,
        size: int,
        *,
        kind: str = "",
        read_only: bool,
        made_file: bool = False,
    ) -> None:
        """Give a region its range and an empty backing (FILE to BUILDING).

        `kind` of backing, or "" for the daemon's default.
        """
        assert region.state is State.FILE
        self.check_range(start, size)
        backing = self._make_backing(region.id, start, size, kind)
        try:
            self.change(
                region,
                start=start,
                size=size,
                read_only=read_only,
                made_file=made_file,
                backing=backing,
                state=State.BUILDING,
            )
        except Refused:
            backing.release()
            raise
        region.settled = trio.Event()
        self._by_backing[_key(backing)] = region

    def commit(self, region: Region, by: Sharer | None = None) -> None:
        """The objects are in place: let others in (BUILDING to LIVE), as sharer `by` asks."""
        assert region.state is State.BUILDING
        now = time.time_ns()
        with self.journal.transaction():
            save_objects(self.journal, region, by=by)
            self.change(region, state=State.LIVE, mtime_ns=now, ctime_ns=now)
        region.settled.set()

    def abandon(self, region: Region) -> None:
        """The donor did not finish: BUILDING to FILE, or GONE if the donor made the file."""
        assert region.state is State.BUILDING
        # What another daemon finds is a region that is being built, until it is freed.
        self._free(region)
        with contextlib.suppress(Refused), self.journal.transaction():
            self.journal.empty_region(region.id)
            self.change(region, start=0, size=0, state=State.FILE)
        region.start = region.size = 0
        region.state = State.FILE
        region.settled.set()
        if region.made_file and region.linked:
            self._unlink_anyway(region)
        else:
            self._reap(region)

    def attach(
        self,
        region: Region,
        pid: int,
        uid: int,
        uffd: int,
        *,
        writable: bool,
        ended: Callable[[], bool] = lambda: False,
        pidfd: int | None = None,
        uffd_number: int = -1,
        started: int = 0,
    ) -> Sharer:
        """A new sharer.  `uffd` and `pidfd` stay the caller's to close.

        Whether its user may have one more is for the caller to ask, before anything
        is made for it.
        """
        number = next(self._sharer_numbers)
        account = self.limits.account(uid)
        sharer = Sharer(
            number,
            region,
            pid,
            uid,
            writable,
            uffd,
            ended,
            pidfd,
            account,
            uffd_number=uffd_number,
            started=started,
        )
        self.journal.save_sharer(sharer_row(sharer))
        self.adopt_sharer(sharer)
        return sharer

    def adopt_sharer(self, sharer: Sharer) -> None:
        """Take over a sharer that another daemon left."""
        sharer.account = self.limits.account(sharer.uid)
        sharer.account.sharers.add(sharer)
        sharer.region.sharers[sharer.number] = sharer

    def detach(self, sharer: Sharer) -> None:
        """A sharer is gone; a region without name and sharers goes with it."""
        region = sharer.region
        del region.sharers[sharer.number]
        sharer.account.sharers.discard(sharer)
        self.journal.forget_sharer(sharer.number)
        self._reap(region)

    def detach_and_unlink(self, sharer: Sharer) -> None:
        """mshare_unlink() by a sharer: the last one takes the name with it.

        Unless it may not: the root directory is sticky, so only the owner and root
        remove a name (the check of the kernel's unlink(2), made here because no
        system call does it for us).

        A parent that has waited for its children is the last, even if the news of
        their end is still on its way to us.
        """
        region = sharer.region
        last = all(other is sharer or other.ended() for other in region.sharers.values())
        with contextlib.suppress(Refused), self.journal.transaction():
            if last and region.linked and sharer.uid in (0, region.uid):
                self._unlink_anyway(region)
            self.detach(sharer)

    def unlink(self, region: Region) -> None:
        """The name goes now, the memory when the last sharer has gone."""
        assert region.linked
        self.change(region, linked=False, ctime_ns=time.time_ns())
        del self._by_name[region.name]
        self._reap(region)

    def _unlink_anyway(self, region: Region) -> None:
        # Whether it can be written or not.
        with contextlib.suppress(Refused):
            self.change(region, linked=False, ctime_ns=time.time_ns())
        region.linked = False
        del self._by_name[region.name]
        self._reap(region)

    def close(self) -> None:
        """Free everything: the file system is being unmounted."""
        for region in list(self._by_id.values()):
            region.state = State.GONE
            self._free(region)
            if region.backing is None:
                region.account.regions.discard(region)

    def _reap(self, region: Region) -> None:
        # A region that is being built has a donor: abandon() or commit() comes.
        if region.linked or region.sharers or region.state is State.BUILDING:
            return
        region.state = State.GONE
        self._by_id.pop(region.id, None)
        if region.backing is None:
            region.account.regions.discard(region)
            self.journal.forget_region(region.id)
        self._free(region)

    def reap(self, region: Region) -> None:
        """Free a region that has neither name nor sharers."""
        self._reap(region)

    def _closed(self, region: Region) -> None:
        # Not before: until its memory is gone a region has pages to write back.
        if region.state is State.GONE:
            self.journal.forget_region(region.id)

    def _free(self, region: Region) -> None:
        if region.backing is not None:
            del self._by_backing[_key(region.backing)]
            self.release(region)


def _key(backing: Backing) -> tuple[int, int, int]:
    identity = backing.identity
    return identity.major, identity.minor, identity.inode
