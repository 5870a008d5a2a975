"""The messages between the front and a pager, the one place where they are written down.

A SOCK_SEQPACKET pair for each pager, made by the front.  One message is one packet: a
tagged MessagePack map, whose fields are these structs' and nothing else, so what does not
decode is a defect or a lie, and the other side is given up for it.  Descriptors travel with
their message: a client's connection to the pager, a text's memory to the front.

The front is right about names (who made them, who may do what), the pager about memory
(range, objects, sharers).  Each tells the other what has changed, in the order in which it
happened.  Where one has to wait for the other the message has a number, and `Done` or
`Answer` comes back with it.

                 front                                     pager
    Begin (names), ...   ------------------------------->        first of all
                         <-------------------------------   Ready (what has memory)
    Listen + fd          ------------------------------->        its user's clients
                         <-------------------------------   Forward + fd
    Connection + fd, Go  ------------------------------->        another client to serve
                         <-------------------------------   Ended
    Changed              ------------------------------->        chmod, chown, unlink
    Question             ------------------------------->
                         <-------------------------------   Answer + fd
    Stop                 ------------------------------->        write back, and end
                         <-------------------------------   Established, Unlink
    Done                 ------------------------------->
                         <-------------------------------   Emptied, Gone, Held

A pager whose front is gone ends, as if it had been killed: everything stays for the next.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

MOST_BYTES: Final = 96 << 10
"""Of one message; what is longer comes in parts, or as a descriptor of memory."""
MOST_NAMES: Final = 128
"""In one message: a name has at most 255 bytes."""
MOST_NUMBERS: Final = 4096


Kind = Literal["info", "maps", "sharers", "pagetables", "metrics"]
"""Of a question."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """One message."""


class NameRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What the front knows of a name, as far as it concerns its pager."""

    id: int
    name: bytes
    mode: int
    uid: int
    gid: int
    linked: bool
    creator: int
    """The process that made the file; 0 if that is not known."""
    length: int
    """How much of it its creator wanted, in bytes, if they left its place to us; else 0."""
    identity: bytes
    """What no other region has; b"" if that is not known."""


class Extent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What a pager knows of a region that has memory, as far as it concerns the front."""

    id: int
    start: int
    size: int
    major: int
    minor: int
    inode: int
    """Which file the backing is: the proof of a child after fork (bytes; statx(2))."""
    slot: int
    """Where on the board (board.py) it says how much memory it holds."""
    name: NameRecord
    """As the pager knows it: for a front that has lost its own."""


# -- from the front --


class Begin(_Message, frozen=True):
    """Names of this pager's; `last` is set in the last of these.

    `device`: major and minor number of the mount, of which files are proofs.  With the
    first comes the board's memory (the descriptor).
    """

    names: list[NameRecord]
    last: bool
    device: tuple[int, int]


class Listen(_Message, frozen=True):
    """The user's own control socket (the descriptor): accept from it, as long as you live."""


class Connection(_Message, frozen=True):
    """A client's connection (the descriptor), whose first message is still in it.

    `name`: what that message proves a right to, if anything; with `look` nobody knows yet,
    and the pager is to see, as if it had accepted the connection itself.  `error`, `reason`:
    why it is turned down, if it is.  It may be used at once, and closed when the next message
    has come: the front has closed its own descriptor then, so the last close is never the
    front's.
    """

    number: int
    name: NameRecord | None
    error: int = 0
    reason: str = ""
    look: bool = False


class Go(_Message, frozen=True):
    """Whatever connections came before are the pager's alone, and may be closed.

    Any other message that comes later says so, too: the front closes its descriptor of a
    connection before it does anything else.
    """


class Changed(_Message, frozen=True):
    """A name is new, or not what it was: chmod(2), chown(2), unlink(2)."""

    name: NameRecord


class Moved(_Message, frozen=True):
    """A name without memory is another user's now, and another pager's."""

    id: int


class Question(_Message, frozen=True):
    """To be answered soon: the front waits, though not for long.

    The texts are of one region, `metrics` is everything that is counted here.
    """

    number: int
    kind: Kind
    id: int = 0


class Stop(_Message, frozen=True):
    """Write back and end.  What there is stays for the next pager.

    With `purge` all memory that is written back is removed, and what it is called.
    """

    purge: bool = False


class Done(_Message, frozen=True):
    """What the pager asked for with that number is written down."""

    number: int
    error: int = 0


FromFront = Begin | Listen | Connection | Go | Changed | Moved | Question | Stop | Done


# -- from a pager --


class Ready(_Message, frozen=True):
    """Regions that have memory; `last` is set in the last of these."""

    extents: list[Extent]
    last: bool


class Held(_Message, frozen=True):
    """Cannot begin, and why: a process that does not end has this user's memory, say."""

    reason: str
    for_good: bool = False
    """Whether it makes no sense to try again."""


class Forward(_Message, frozen=True):
    """A connection (the descriptor) that is for another pager, or that the front knows better.

    Its first message is still in it, and begins with a descriptor of the file with these
    numbers; `looked` is False if nobody has looked, since it is another user's.  The sender
    keeps its own descriptor until Done has come: the last close is never the front's.
    """

    number: int
    looked: bool
    major: int = 0
    minor: int = 0
    inode: int = 0


class Ended(_Message, frozen=True):
    """Connections that were handed over have ended."""

    numbers: list[int]


class Established(_Message, frozen=True):
    """A name has its range and memory now.  Done is waited for."""

    number: int
    extent: Extent


class Emptied(_Message, frozen=True):
    """A name has no range any more: its donor did not finish."""

    id: int


class Unlink(_Message, frozen=True):
    """The name goes: its last sharer wants it so.  Done is waited for, if `number` is not 0."""

    number: int
    id: int


class Gone(_Message, frozen=True):
    """Nothing is left of a region that had no name any more."""

    id: int


class Answer(_Message, frozen=True):
    """To a Question.  A text comes as memory (the descriptor) of `size` bytes."""

    number: int
    error: int = 0
    samples: list[tuple[str, dict[str, str], float]] = []
    """`metrics`: name, labels and value of each."""
    size: int = 0


FromPager = Ready | Held | Forward | Ended | Established | Emptied | Unlink | Gone | Answer
