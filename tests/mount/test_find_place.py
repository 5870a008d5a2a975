"""Where regions lie that leave it to the daemon, and the details that their files tell."""

from __future__ import annotations

import errno
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_filesystem import CONTEXT, ROOT, fails, files, regions  # noqa: F401 - fixtures

from msharefsd.errors import Refused
from msharefsd.journal.names import NamesJournal
from msharefsd.link.messages import Extent
from msharefsd.mount.filesystem import DETAILS, DETAILS_STRUCT, PLACE_STRUCT
from msharefsd.mount.names import Name, Names
from msharefsd.mount.places import AREAS, TIB, lowest_free

UNIT = 1 << 39


def established(names: Names, name: Name, start: int, size: int) -> None:
    names.established(Extent(name.id, start, size, 0, 1, name.id, 0, name.record()))


@given(
    st.lists(st.tuples(st.integers(0, 128 * TIB), st.integers(1, 4 * TIB)), max_size=60),
    st.integers(1, 60),
    st.integers(0, 120 * TIB),
)
def test_what_is_found_is_free_and_the_lowest(
    taken: list[tuple[int, int]], units: int, above: int
) -> None:
    size = units * UNIT
    found = lowest_free(taken, size, above, UNIT)

    def free(start: int) -> bool:
        inside = any(low <= start and start + size <= high for low, high in AREAS)
        return inside and all(at + length <= start or start + size <= at for at, length in taken)

    first = -(-above // UNIT) * UNIT
    free_ones = [start for start in range(first, 128 * TIB, UNIT) if free(start)]
    assert found == (free_ones[0] if free_ones else None)


def test_no_room_for_one_user_is_room_for_another() -> None:
    names = Names(UNIT)
    greedy = [names.create(b"%d" % n, 0o600, 1, 1) for n in range(3)]
    for name, (low, high) in zip(greedy, AREAS, strict=True):
        established(names, name, low, high - low)
    with pytest.raises(Refused) as caught:
        names.find_place(names.create(b"more", 0o600, 1, 1), 1, 0)
    assert caught.value.code == errno.ENOMEM
    other = [names.create(name, 0o600, 2, 2) for name in (b"a", b"b")]
    for name in other:
        names.find_place(name, 1, 0)
    assert [name.place[0] for name in other] == [AREAS[0][0], AREAS[0][0] + UNIT]


def test_a_place_is_kept_until_it_is_used_or_the_name_goes() -> None:
    names = Names(UNIT)
    first, second = (names.create(name, 0o600, 1, 1) for name in (b"a", b"b"))
    names.find_place(first, 5, 0)
    names.find_place(second, UNIT + 1, 0)
    assert (first.place, second.place) == (
        (AREAS[0][0], UNIT),
        (AREAS[0][0] + UNIT, 2 * UNIT),
    )
    established(names, second, *second.place)
    assert (second.length, second.start) == (UNIT + 1, AREAS[0][0] + UNIT)
    with pytest.raises(Refused):
        names.find_place(second, 1, 0)
    names.unlink(first)
    names.gone(first.id)
    third = names.create(b"c", 0o600, 1, 1)
    names.find_place(third, 1, 0)
    assert third.place[0] == AREAS[0][0]
    established(names, third, 5 * UNIT, UNIT)  # it went elsewhere by itself
    assert third.length == 0


async def test_a_name_is_made_with_a_place(files: Any, regions: Names) -> None:  # noqa: F811
    handle, _ = await files.create(ROOT, b".sized-100-r", 0o600, 2, CONTEXT)
    details = DETAILS_STRUCT.unpack(await files.read(handle.fh, DETAILS, 100))
    assert details[1:] == (100, AREAS[0][0], 1 << 21)
    await files.write(handle.fh, DETAILS, PLACE_STRUCT.pack(100, AREAS[0][0] + (1 << 21)))
    details = DETAILS_STRUCT.unpack(await files.read(handle.fh, DETAILS, 100))
    assert details[1:] == (100, AREAS[0][0] + (1 << 21), 1 << 21)  # something was in the first
    other, _ = await files.create(ROOT, b".sized-1-5-x", 0o600, 2, CONTEXT)
    assert regions.find(b"5-x") is not None
    await files.release(other.fh)
    assert regions.find(b"5-x") is None, "it has been given no memory"
    for name, error in (
        (b".sized-1-r", errno.EEXIST),
        (b".sized-%d-y" % (1 << 62), errno.ENOMEM),
        (b".sized-1-" + b"y" * 256, errno.ENAMETOOLONG),
        (b".sized-1-.y", errno.EPERM),
        (b".sized-1-", errno.EPERM),
        (b".sized-0-y", errno.EPERM),
        (b".sized--1-y", errno.EPERM),
        (b".sized-%d-y" % (10**19), errno.EPERM),
    ):
        await fails(error, files.create(ROOT, name, 0o600, 2, CONTEXT))
    assert [name.name for name in regions] == [b"r"]
    long = b".sized-1-" + b"y" * 255
    await fails(errno.ENOENT, files.lookup(ROOT, long, CONTEXT))


async def test_a_region_is_found_by_its_identity(files: Any, regions: Names) -> None:  # noqa: F811
    handle, entry = await files.create(ROOT, b"r", 0o600, 2, CONTEXT)
    identity, length, start, size = DETAILS_STRUCT.unpack(await files.read(handle.fh, DETAILS, 100))
    assert (length, start, size) == (0, 0, 0)
    assert await files.write(handle.fh, DETAILS, PLACE_STRUCT.pack(100, 0)) == PLACE_STRUCT.size
    details = DETAILS_STRUCT.unpack(await files.read(handle.fh, DETAILS, 100))
    assert details == (identity, 100, AREAS[0][0], 1 << 21)
    for offset, data in ((0, b"x"), (DETAILS, b"x"), (DETAILS, PLACE_STRUCT.pack(0, 0))):
        await fails(errno.EINVAL, files.write(handle.fh, offset, data))
    for odd in (struct.pack("=QQ", (1 << 64) - 1, 0), struct.pack("=QQ", 1, (1 << 64) - 1)):
        await fails(errno.ENOMEM, files.write(handle.fh, DETAILS, odd))
    path = b".identity-" + identity.hex().encode()
    found = await files.lookup(ROOT, path, CONTEXT)
    assert found.st_ino != entry.st_ino
    region = regions.find(b"r")
    assert region is not None
    established(regions, region, AREAS[0][0], 1 << 21)
    await files.unlink(ROOT, path, CONTEXT)
    assert not region.linked
    await fails(errno.ESTALE, files.open(entry.st_ino, 0, CONTEXT))
    again = await files.open(found.st_ino, 0, CONTEXT)
    assert (await files.read(again.fh, DETAILS, 100))[:16] == identity
    regions.gone(region.id)
    await fails(errno.ENOENT, files.lookup(ROOT, path, CONTEXT))
    for unknown in (b".identity-", b".identity-" + b"0" * 32, path.upper(), path + b"0"):
        await fails(errno.ENOENT, files.lookup(ROOT, unknown, CONTEXT))


def test_a_length_that_no_journal_has_room_for_is_refused(tmp_path: Path) -> None:
    """And the name is as it was: it can be removed, and made again."""
    journal = NamesJournal(tmp_path)
    names = Names(UNIT, journal=journal)
    name = names.create(b"x", 0o600, 1, 1)
    for length in (1 << 63, (1 << 63) - 1, (1 << 64) - 1):
        with pytest.raises(Refused) as caught:
            names.keep_place(name, length, 0)
        assert caught.value.code == errno.EINVAL
        with pytest.raises(Refused) as caught:
            names.find_place(name, length, 0)
        assert caught.value.code == errno.ENOMEM
    with pytest.raises(Refused):
        names.create(b"sized", 0o600, 1, 1, length=10**19 - 1)
    names.unlink(name)
    names.create(b"x", 0o600, 1, 1)
    journal.close(remove=True)


def test_a_name_whose_maker_is_not_seen_is_there_for_the_next_daemon(tmp_path: Path) -> None:
    """In another pid namespace it has no number, and may live; who is known to be dead does not."""
    journal = NamesJournal(tmp_path)
    names = Names(UNIT, journal=journal)
    names.create(b"unseen", 0o600, 1, 1, making=True)
    names.create(b"dead", 0o600, 1, 1, creator=(1 << 22) + 1, making=True)  # beyond pid_max
    journal.close()
    journal = NamesJournal(tmp_path)
    assert [each.name for each in Names(UNIT, journal=journal)] == [b"unseen"]
    journal.close(remove=True)
