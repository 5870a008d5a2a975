"""The messages of .control as Python sees them.

`libmshare/core/wire.h` is where they are defined; this mirrors it, and
tests/test_wire.py has the C compiler confirm every size, offset and constant.
Whatever comes in is hostile: `parse_request` accepts exactly what it names.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from msharefsd.errors import Refused

MAGIC: Final = 0x4D534852
VERSION: Final = 3
MAX_OBJECTS: Final = 1024

REQUEST: Final = struct.Struct("=IHHQQIIIIII")
OBJECT: Final = struct.Struct("=QQQII")
REPLY: Final = struct.Struct("=IHHiIQQ96s")
MESSAGE_FIELD: Final = 96
DETAILS: Final = struct.Struct("=Q16s")
"""In place of a message in what ATTACH is answered with: length and identity."""

MAX_REQUEST_BYTES: Final = REQUEST.size + MAX_OBJECTS * OBJECT.size
MAX_FDS: Final = 2


class Op(IntEnum):
    """What a request asks for."""

    ATTACH = 1
    COMMIT = 2
    DETACH = 3
    UNLINK = 4
    USERFAULTFD = 5
    VMA_FILE = 6
    READY = 7
    MMAP = 8
    MUNMAP = 9
    MPROTECT = 10
    MSYNC = 11
    DISCARD = 12
    NEED = 13
    REJOIN = 14
    AWAIT = 15
    FILL = 16


NOTE: Final = 0x4E
"""The `op` of a message that answers no call: ask READY before you open your window."""

_ONE_OBJECT: Final = frozenset(
    {Op.MMAP, Op.MUNMAP, Op.MPROTECT, Op.MSYNC, Op.DISCARD, Op.AWAIT, Op.FILL}
)


class RequestFlag(IntFlag):
    """Flags of a request."""

    HAS_MAPPINGS = 1
    MADE_FILE = 2
    AS_IT_LIES = 4
    REPEATED = 8
    ZEROS = 16


_ALL_FLAGS: Final = sum(RequestFlag)


class BackingKind(IntEnum):
    """What holds the pages of a region that ATTACH creates."""

    BACKING_DEFAULT = 0
    BACKING_SHM = 1
    BACKING_HUGETLB = 2


class ReplyFlag(IntFlag):
    """Flags of a reply."""

    CREATED = 1
    DONATE = 2
    USER_MODE_ONLY = 4
    PROTECTED = 8
    WANTED = 16


NO_FLAGS: Final = ReplyFlag(0)


@dataclass(frozen=True, slots=True)
class WireObject:
    """A range of the region and what is mapped there; bytes."""

    offset: int
    length: int
    file_offset: int
    prot: int
    flags: int


@dataclass(frozen=True, slots=True)
class Request:
    """One call of a client."""

    op: Op
    start: int
    size: int
    oflags: int
    flags: RequestFlag
    objects: tuple[WireObject, ...] = ()
    backing: BackingKind = BackingKind.BACKING_DEFAULT
    sequence: int = 0
    userfaultfd: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one call."""

    op: int
    error: int = 0
    flags: ReplyFlag = NO_FLAGS
    start: int = 0
    size: int = 0
    message: str = ""
    details: bytes = b""
    """In place of a message: see DETAILS."""

    def pack(self) -> bytes:
        """The bytes that go over the socket."""
        text = self.details or self.message.encode(errors="replace")[: MESSAGE_FIELD - 1]
        return REPLY.pack(
            MAGIC, VERSION, self.op, self.error, int(self.flags), self.start, self.size, text
        )


def parse_request(data: bytes) -> Request:
    """Check and decode one message.

    Raises Refused: EPROTO for another version or what is no message of ours,
    EINVAL for a field that makes no sense.
    """
    if len(data) < REQUEST.size:
        raise Refused(errno.EPROTO, "message too short: is this libmshare?")
    (
        magic,
        version,
        op,
        start,
        size,
        oflags,
        flags,
        count,
        kind,
        sequence,
        userfaultfd,
    ) = REQUEST.unpack_from(data)
    if magic != MAGIC:
        raise Refused(errno.EPROTO, "not a message of libmshare")
    if version != VERSION:
        raise Refused(errno.EPROTO, f"protocol {version}, daemon speaks {VERSION}: upgrade both")
    try:
        operation = Op(op)
    except ValueError:
        raise Refused(errno.EINVAL, f"no operation has the number {op}") from None
    if flags & ~_ALL_FLAGS:
        raise Refused(errno.EINVAL, "unknown request flags")
    try:
        backing = BackingKind(kind)
    except ValueError:
        raise Refused(errno.EINVAL, f"no backing has the number {kind}") from None
    if backing and operation is not Op.ATTACH:
        raise Refused(errno.EINVAL, "only ATTACH takes a backing")
    if count > MAX_OBJECTS or len(data) != REQUEST.size + count * OBJECT.size:
        raise Refused(errno.EINVAL, "object count and message length differ")
    if operation is not Op.COMMIT and count != (1 if operation in _ONE_OBJECT else 0):
        raise Refused(errno.EINVAL, "this operation does not take that many objects")
    objects = tuple(WireObject(*item) for item in OBJECT.iter_unpack(data[REQUEST.size :]))
    return Request(
        operation,
        start,
        size,
        oflags,
        RequestFlag(flags),
        objects,
        backing,
        sequence,
        userfaultfd,
    )
