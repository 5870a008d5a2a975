"""What the journal's rows are: plain records."""

from __future__ import annotations

from typing import NamedTuple


class SavedRegion(NamedTuple):
    """A row of `regions`."""

    id: int
    name: bytes
    mode: int
    uid: int
    gid: int
    linked: int
    state: str
    start: int
    size: int
    read_only: int
    creator: int
    made_file: int
    kind: str
    backing_name: str | None
    stash_name: str | None
    stashed: int
    changes: int


class SavedFile(NamedTuple):
    """A row of `files`."""

    key: int
    uid: int
    may_write: int
    path: bytes
    major: int
    minor: int
    inode: int
    awaited: int


class SavedObject(NamedTuple):
    """A row of `objects`, without its region."""

    offset: int
    length: int
    prot: int
    private: int
    file: int | None
    file_offset: int


class SavedSharer(NamedTuple):
    """A row of `sharers`."""

    number: int
    region: int
    pid: int
    started: int
    uid: int
    writable: int
    userfaultfd: int
    since: float
    done: int


class SavedName(NamedTuple):
    """A row of `names`."""

    id: int
    name: bytes
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    linked: int
    creator: int
    home: int
    start: int
    size: int
    major: int
    minor: int
    inode: int
    identity: bytes
    length: int
    making: int
    image: bytes
