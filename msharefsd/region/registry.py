"""All regions of one pager, and how each begins and ends.

Nothing here awaits: each method runs to its end before anything else does, so no
task ever sees a region half changed.

Names are the front's (mount/names.py).  What is known of them here came with a connection
or a change of theirs, and what follows from our side is told: see link/messages.py.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import trio

from msharefsd.errors import Refused
from msharefsd.journal.journal import Journal
from msharefsd.link.board import Board
from msharefsd.link.messages import Emptied, Gone, NameRecord, Unlink
from msharefsd.memory import names as memory_names
from msharefsd.memory.backing import Backing
from msharefsd.memory.names import MemoryNames
from msharefsd.region.limits import Limits
from msharefsd.region.record import region_row, save_objects, sharer_row
from msharefsd.region.region import TASK_SIZE, Region, Sharer, State

Tell = Callable[[Emptied | Gone | Unlink], None]


class Regions:
    """All regions of one pager."""

    def __init__(
        self,
        alignment: int,
        name_memory: Callable[[str], MemoryNames],
        make_backing: Callable[[MemoryNames, int, int, str], Backing],
        release: Callable[[Region], None] = Region.close_memory,
        limits: Limits | None = None,
        journal: Journal | None = None,
        tell: Tell = lambda _: None,
        board: Board | None = None,
    ) -> None:
        """Start without regions.

        `name_memory(kind)` names memory and `make_backing(names, start, size, kind)` makes
        it; `release(region)` sees to it that the memory of a region that nobody uses any
        more is closed; `limits` says what each user may have; `journal` is where everything
        is written before it is so; `tell` tells the front, and `board` shows it.
        """
        self.release = release
        self.limits = limits or Limits()
        self.journal = journal or Journal()
        self.alignment = alignment
        self._name_memory = name_memory
        self._make_backing = make_backing
        self._tell = tell
        self._going: set[int] = set()
        self.board = board
        self._sharer_numbers = itertools.count(self.journal.next_sharer())
        self._named: dict[int, NameRecord] = {}
        """Names of which nobody has wanted anything yet."""
        self._by_id: dict[int, Region] = {}
        self._by_backing: dict[tuple[int, int, int], Region] = {}

    def all(self) -> Iterator[Region]:
        """Every region that is known: it has a name, memory or a sharer."""
        return iter(list(self._by_id.values()))

    def alive(self) -> Iterator[Region]:
        """Every region with memory, its name gone or not."""
        return iter([r for r in self._by_id.values() if r.backing is not None])

    def with_id(self, number: int) -> Region | None:
        """The region with that id, if it is known."""
        return self._by_id.get(number)

    def of_backing(self, major: int, minor: int, inode: int) -> Region | None:
        """The region whose backing is that file."""
        return self._by_backing.get((major, minor, inode))

    # -- names --

    def know(self, records: Iterable[NameRecord]) -> None:
        """Names as the front knows them now; of most of them nobody ever wants anything."""
        for record in records:
            if record.id in self._by_id:
                self.learn(record, has_name=record.linked)
            elif record.linked:
                self._named[record.id] = record

    def named(self, number: int) -> Region | None:
        """The region with that id, if it has a name or memory."""
        record = self._named.get(number)
        return self._by_id.get(number) if record is None else self.learn(record)

    def moved(self, number: int) -> None:
        """A name without memory is another pager's affair from now on."""
        self._named.pop(number, None)
        region = self._by_id.get(number)
        if region is not None and region.state is State.FILE:
            del self._by_id[number]
            region.account.regions.discard(region)

    def learn(self, record: NameRecord, *, has_name: bool | None = None) -> Region:
        """A name as the front knows it, or knew it when it handed a connection over.

        `has_name`: whether it has one, and which: what comes with a connection may be older
        than what has been told since, and does not say that of a region that is known.
        """
        self._named.pop(record.id, None)
        region = self._by_id.get(record.id)
        if region is None:
            region = Region(
                record.id,
                record.name,
                record.mode,
                record.uid,
                record.gid,
                linked=record.linked and not self.is_going(record.id),
                creator=record.creator,
                length=record.length,
                identity=record.identity,
            )
            self.adopt(region)
            return region
        region.length, region.identity = record.length, record.identity
        linked, name = region.linked, region.name
        if has_name is not None:
            linked, name = has_name and not self.is_going(record.id), record.name
        if (region.mode, region.uid, region.gid, region.linked, region.name) != (
            record.mode,
            record.uid,
            record.gid,
            linked,
            name,
        ):
            region.mode, region.gid, region.linked = record.mode, record.gid, linked
            region.name = name
            if record.uid != region.uid:
                self._give(region, record.uid)
            self._save(region)
        return region

    def changed(self, record: NameRecord) -> None:
        """A name is new or has changed; if it has gone, so does a region that nobody uses."""
        if not record.linked:
            self._named.pop(record.id, None)
            self._going.discard(record.id)
        region = self._by_id.get(record.id)
        if region is not None:
            self.learn(record, has_name=record.linked)
            self.reap(region)
        elif record.linked:
            self._named[record.id] = record
        else:
            self._tell(Gone(record.id))

    def _give(self, region: Region, uid: int) -> None:
        """chown(2): another owner, who has it in their account from now on.

        Nothing is refused: root does that, whom no limit binds.
        """
        region.uid = uid
        account = self.limits.account(uid)
        if region in region.account.regions:
            region.account.regions.discard(region)
            account.regions.add(region)
        region.account = account

    def _save(self, region: Region) -> None:
        """Write down what may be written again at any time."""
        if region.memory is not None:
            with contextlib.suppress(Refused):
                self.journal.save_region(region_row(region))

    def forget_creator(self, region: Region) -> None:
        """Nobody may say any more that it made the file."""
        region.creator = 0
        self._save(region)

    def unlinked(self, region: Region) -> None:
        """The front has taken the name away, as we asked."""
        region.linked = False
        self._save(region)

    def _unlink_soon(self, region: Region) -> None:
        region.linked = False
        self._going.add(region.id)
        self._tell(Unlink(0, region.id))

    def is_going(self, number: int) -> bool:
        """Whether the front has been asked to take that name away, and may not have yet.

        What it hands over meanwhile may be for a name that nobody will find.
        """
        return number in self._going

    # -- life --

    def adopt(self, region: Region) -> None:
        """Take over a region that is new, or that another pager left."""
        region.closed = self._closed
        region.account = self.limits.account(region.uid)
        region.account.regions.add(region)
        self._by_id[region.id] = region
        if region.backing is not None:
            self._has_memory(region)

    def _has_memory(self, region: Region) -> None:
        assert region.backing is not None
        self._by_backing[_key(region.backing)] = region
        if self.board is not None:
            region.board, region.slot = self.board, self.board.take()
        region.backing.growth = region.grown
        region.backing.stashing = partial(self._stashes, region)
        region.show()

    def _stashes(self, region: Region) -> None:
        """Pages are about to be hidden: a stash that is missing later is a loss."""
        if not region.stashed:
            self.change(region, stashed=True)

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
        kind: str,
        read_only: bool,
        made_file: bool = False,
    ) -> None:
        """Give a region its range and an empty backing of that kind (FILE to BUILDING).

        What its memory is called is written down before it is made.
        """
        assert region.state is State.FILE
        self.check_range(start, size)
        memory = self._name_memory(kind)
        self.change(
            region,
            start=start,
            size=size,
            read_only=read_only,
            made_file=made_file,
            kind=kind,
            memory=memory,
            state=State.BUILDING,
        )
        try:
            backing = self._make_backing(memory, start, size, kind)
        except BaseException:
            memory_names.remove(memory)  # what was made of it has no place in the journal now
            self._empty(region)
            raise
        region.backing = backing
        region.settled = trio.Event()
        self._has_memory(region)

    def _empty(self, region: Region) -> None:
        """It is a name without a range again."""
        self.journal.forget_region(region.id)
        region.start = region.size = 0
        region.memory = None
        region.stashed = False
        region.state = State.FILE

    def commit(self, region: Region, by: Sharer | None = None) -> None:
        """The objects are in place: let others in (BUILDING to LIVE), as sharer `by` asks."""
        assert region.state is State.BUILDING
        with self.journal.transaction():
            save_objects(self.journal, region, by=by)
            self.change(region, state=State.LIVE)
        region.settled.set()

    def abandon(self, region: Region) -> None:
        """The donor did not finish: BUILDING to FILE, or GONE if the donor made the file."""
        assert region.state is State.BUILDING
        # What another pager finds is a region that is being built, until it is freed.  What
        # the donor wrote to files meanwhile is nobody's: its own memory is as it was.
        if region.backing is not None:
            self._by_backing.pop(_key(region.backing), None)
            region.close_memory()
        self._empty(region)
        self._tell(Emptied(region.id))
        region.settled.set()
        if region.made_file and region.linked:
            self._unlink_soon(region)
        self.reap(region)

    def new_number(self) -> int:
        """For a sharer: no other has it, before or after."""
        return next(self._sharer_numbers)

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
        number: int | None = None,
    ) -> Sharer:
        """A new sharer.  `uffd` and `pidfd` stay the caller's to close.

        `number`: of `new_number`, if something has been called by it before.
        Whether its user may have one more is for the caller to ask, before anything
        is made for it.
        """
        number = self.new_number() if number is None else number
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
        """Take over a sharer that another pager left."""
        sharer.account = self.limits.account(sharer.uid)
        sharer.account.sharers.add(sharer)
        sharer.region.sharers[sharer.number] = sharer
        sharer.region.show_sharers()

    def detach(self, sharer: Sharer) -> None:
        """A sharer is gone; a region without name and sharers goes with it."""
        region = sharer.region
        del region.sharers[sharer.number]
        region.show_sharers()
        sharer.account.sharers.discard(sharer)
        self.journal.forget_sharer(sharer.number)
        self.reap(region)

    def reap(self, region: Region) -> None:
        """Free a region that has neither name nor sharers."""
        # A region that is being built has a donor: abandon() or commit() comes.
        if region.linked or region.sharers or region.state in (State.BUILDING, State.GONE):
            return
        region.state = State.GONE
        if region.backing is None:
            self._forget(region)
        self._free(region)

    def remove(self, region: Region) -> None:
        """Free a region whoever has it: it was asked for."""
        region.linked = False
        region.state = State.GONE
        if region.backing is None:
            self._forget(region)
        self._free(region)

    def _closed(self, region: Region) -> None:
        # Not before: until its memory is gone a region has pages to write back.
        if region.state is State.GONE:
            self._forget(region)

    def _forget(self, region: Region) -> None:
        if self._by_id.pop(region.id, None) is not None:
            region.account.regions.discard(region)
            self.journal.forget_region(region.id)
            self._tell(Gone(region.id))

    def _free(self, region: Region) -> None:
        if region.backing is not None:
            self._by_backing.pop(_key(region.backing), None)
            self.release(region)


def is_last(sharer: Sharer) -> bool:
    """Whether nobody else uses its region.

    A parent that has waited for its children is the last, even if the news of their end
    is still on its way to us.
    """
    others = sharer.region.sharers.values()
    return all(other is sharer or other.ended() for other in others)


def _key(backing: Backing) -> tuple[int, int, int]:
    identity = backing.identity
    return identity.major, identity.minor, identity.inode
