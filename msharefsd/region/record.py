"""Regions, sharers and objects as rows of the journal."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from msharefsd.journal.database import signed
from msharefsd.journal.journal import Journal
from msharefsd.journal.rows import SavedFile, SavedObject, SavedRegion, SavedSharer
from msharefsd.memory.awaited import Awaited
from msharefsd.memory.files import MappedFile
from msharefsd.memory.names import stamp
from msharefsd.region.objects import Object
from msharefsd.region.region import Region, Sharer


def region_row(region: Region) -> SavedRegion:
    """Everything about a region but its objects and sharers."""
    return SavedRegion(
        region.id,
        region.name,
        region.mode,
        region.uid,
        region.gid,
        region.linked,
        region.state.name,
        region.start,
        region.size,
        region.read_only,
        region.creator,
        region.made_file,
        region.kind,
        region.memory.backing if region.memory else None,
        region.memory.stash if region.memory else None,
        region.stashed,
        region.changes,
    )


def sharer_row(sharer: Sharer) -> SavedSharer:
    """Everything about a sharer but its poisoned pages."""
    return SavedSharer(
        sharer.number,
        sharer.region.id,
        sharer.pid,
        sharer.started,
        sharer.uid,
        sharer.writable,
        sharer.uffd_number,
        sharer.since,
        sharer.done,
    )


def _object_row(item: Object) -> SavedObject:
    return SavedObject(
        item.offset,
        item.length,
        item.prot,
        item.private,
        item.file.key if item.file else None,
        item.file_offset,
    )


def _file_row(file: MappedFile) -> SavedFile:
    identity = file.identity
    return SavedFile(
        file.key,
        file.uid,
        file.may_write,
        file.path,
        identity.major,
        identity.minor,
        signed(identity.inode),
        isinstance(file, Awaited),
    )


def save_objects(
    journal: Journal,
    region: Region,
    *,
    by: Sharer | None = None,
    gone: tuple[int, int] | None = None,
    clearing: Iterable[tuple[int, int]] = (),
    mapping: bool = False,
) -> None:
    """Write what has changed in the region's object map since the last time.

    With it that the call of sharer `by` is done; the others are as in the journal.
    Raises Refused(ENOSPC).
    """
    changed = region.objects.changed
    now = [(offset, region.objects.at(offset)) for offset in changed]
    call = (by.number, by.call) if by is not None and by.call else None
    journal.save_objects(
        region.id,
        [(offset, None if item is None else _object_row(item)) for offset, item in now],
        number=region.changes + 1,
        files=[_file_row(item.file) for _, item in now if item is not None and item.file],
        call=call,
        gone=gone,
        clearing=clearing,
        mapping=mapping,
    )
    changed.clear()
    region.changes += 1
    journal.when_written(partial(_stamp_memory, region))
    if by is not None and by.call:
        by.done = by.call


def _stamp_memory(region: Region) -> None:
    """The memory is about to see what the journal has: never before that."""
    if region.backing is not None:
        stamp(region.backing.fd, region.changes)
