"""Regions, their sharers, and how long each lives.

A region's life:

    FILE --establish--> BUILDING --commit--> LIVE --(name and sharers gone)--> GONE
     ^                      |
     +-------abandon--------+

FILE: open(O_CREAT) has made the name (mount/names.py), nobody has given it a range.  BUILDING: the
donor copies its memory; nobody else may attach yet, mshare() is atomic.  LIVE: it
has a backing and may be attached.  A region lives as long as it has a name or a
sharer: the end of a process does not take the name away (the patches' customers
demanded that), and rm does not take the memory from who uses it.

Nothing here awaits: each method runs to its end before anything else does, so no
task ever sees a region half changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import trio

from msharefsd.link.board import NOWHERE, Board
from msharefsd.link.messages import Extent, NameRecord
from msharefsd.linux import syscalls
from msharefsd.memory.backing import Backing
from msharefsd.memory.names import MemoryNames
from msharefsd.region.limits import Account
from msharefsd.region.objects import ObjectMap
from msharefsd.telemetry.counts import Counts
from msharefsd.telemetry.labels import label

INODES: Final = 8
"""Inode numbers in the mount that each region has, from `id * INODES` on: its file's first."""
BY_IDENTITY: Final = 6
"""Which of them is the region's file once more, found by the region's identity."""
TASK_SIZE: Final = 1 << 47
"""The first address that user space cannot have with 4-level page tables."""


def region_of_file(inode: int) -> int | None:
    """The id of the region whose file has that inode number, by its name or its identity."""
    number, kind = divmod(inode, INODES)
    return number if kind in (0, BY_IDENTITY) else None


class State(Enum):
    """Where in its life a region is."""

    FILE = "no range"
    BUILDING = "being created"
    LIVE = "live"
    GONE = "gone"


@dataclass(eq=False, slots=True)
class Sharer:
    """A process that has attached a region."""

    number: int
    region: Region
    pid: int
    uid: int
    writable: bool
    uffd: int
    """-1 once it has been detached, and if a lane has it: see paging/lanes.py."""
    ended: Callable[[], bool] = lambda: False
    """Whether the process is gone, although nobody has detached it yet."""
    pidfd: int | None = None
    """Its connection's; None for a process that this pid namespace does not see."""
    account: Account = field(default_factory=Account)
    """Its user's."""
    since: float = field(default_factory=time.time)
    paging: object = None
    """What paging knows of it: see paging/window.py."""
    uffd_number: int = -1
    """What `uffd` is in the process itself: how the next daemon gets it."""
    started: int = 0
    """When the process started (liveness.started): it and its pid name one process."""
    call: int = 0
    """The number of its call that is under way; 0 for none that counts."""
    done: int = 0
    """The number of its last call that is done and must not be done again."""
    note: Callable[[], None] = lambda: None
    """Tell it to ask, once: protection has changed while it was attaching."""
    dismiss: Callable[[], None] = lambda: None
    """Have it detached: nothing more can be asked of its process."""


@dataclass(eq=False, slots=True)
class Region:
    """One region: its file, its range, its memory, its sharers."""

    id: int
    name: bytes
    mode: int
    uid: int
    gid: int
    account: Account = field(default_factory=Account)
    """Its owner's."""
    linked: bool = True
    state: State = State.FILE
    start: int = 0
    size: int = 0
    read_only: bool = False
    """Created O_RDONLY: "read only access by everyone"."""
    objects: ObjectMap = field(default_factory=ObjectMap)
    backing: Backing | None = None
    kind: str = ""
    """Of its backing."""
    memory: MemoryNames | None = None
    """What its memory is called, from before it is made until it is gone."""
    stashed: bool = False
    """Whether there is a stash, or was about to be one."""
    changes: int = 0
    """How often its objects have been written down."""
    board: Board | None = None
    slot: int = NOWHERE
    """Where it shows how much memory it holds."""
    creator: int = 0
    """The process that made the file, so that it and nobody else may say so; 0 for nobody."""
    length: int = 0
    """How much of it its creator wanted, in bytes, if they left its place to us; else 0."""
    identity: bytes = b""
    """What no other region has, as far as it is known."""
    made_file: bool = False
    """BUILDING: the donor made the file, which goes if it does not finish."""
    closed: Callable[[Region], None] = lambda _: None
    """Told when the memory is closed."""
    sharers: dict[int, Sharer] = field(default_factory=dict)
    settled: trio.Event = field(default_factory=trio.Event)
    """Set when BUILDING ends, one way or the other."""
    change: trio.Lock = field(default_factory=trio.Lock)
    """Held while objects change: what mmap_lock is to an mm.  Faults do without."""
    paging: object = None
    """What paging knows of it: see paging/pages.py.  It goes with the memory."""
    counts: Counts = field(default_factory=Counts)
    bringer: int = 0
    """The number of the sharer that brings what is awaited; 0 if there was none."""
    given_up: bool = False
    """Something is awaited, and nobody brings it any more: see paging/bringers.py."""

    @property
    def page(self) -> int:
        """The size of its pages: what is mapped, protected and populated as a whole (bytes)."""
        return self.backing.page if self.backing else syscalls.PAGE

    def allocated(self) -> int:
        """Bytes of memory that the region holds."""
        return self.backing.allocated() if self.backing else 0

    def close_memory(self) -> None:
        """Free the memory and let go of the files."""
        for file in self.objects.files():
            file.let_go()
        self.objects = ObjectMap()
        self.paging = None
        if self.backing is not None:
            self.backing.release()
            self.backing = None
        if self.board is not None:
            self.board.give_back(self.slot)
            self.slot = NOWHERE
        self.account.freed()
        if self.state is State.GONE:
            self.account.regions.discard(self)
        self.closed(self)

    def label(self) -> str:
        """The name for logs and texts: see telemetry/labels.py."""
        return label(self.name)

    def record(self) -> NameRecord:
        """What is known of the name."""
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

    def extent(self) -> Extent:
        """What the front has to know of its memory."""
        assert self.backing is not None
        of = self.backing.identity
        numbers = of.major, of.minor, of.inode
        return Extent(self.id, self.start, self.size, *numbers, self.slot, self.record())

    def show(self) -> None:
        """Have everybody see how much memory it holds now, how many have it, and its counts."""
        if self.board is not None:
            self.board.set(self.slot, self.allocated())
            self.board.set_sharers(self.slot, len(self.sharers))
            self.board.set_counts(self.slot, self.counts.numbers())

    def show_sharers(self) -> None:
        """Have everybody see how many have it."""
        if self.board is not None:
            self.board.set_sharers(self.slot, len(self.sharers))

    def grown(self, size: int) -> None:
        """As `show`, when so many bytes have come for faults: without looking."""
        self.counts.populated += size
        if self.board is not None:
            self.board.set(self.slot, self.board.get(self.slot) + size)


def writes(oflags: int) -> bool:
    """Whether open flags ask for write access."""
    return oflags & os.O_ACCMODE != os.O_RDONLY
