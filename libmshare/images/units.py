"""What of an image is brought at one time: whole pages, however parts lie in them."""

from __future__ import annotations

from dataclasses import dataclass

from libmshare.images.manifest import Manifest, Part


@dataclass(frozen=True, slots=True)
class Unit:
    """Pages from `start` to `end` (bytes from the region's start), with all parts in them."""

    start: int
    end: int
    parts: tuple[Part, ...]


def units_of(manifest: Manifest, page: int) -> list[Unit]:
    """The units of an image where pages have so many bytes, by offset."""
    found: list[Unit] = []
    for part in manifest.parts:
        start = part.offset - part.offset % page
        end = -(-(part.offset + part.length) // page) * page
        if found and start < found[-1].end:
            last = found[-1]
            found[-1] = Unit(last.start, max(last.end, end), (*last.parts, part))
        else:
            found.append(Unit(start, end, (part,)))
    return found


def jobs_of(units: list[Unit]) -> list[list[Unit]]:
    """Units with a part in common belong together: that is fetched once."""
    leader = list(range(len(units)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    first: dict[tuple[str, int], int] = {}
    for index, unit in enumerate(units):
        for part in unit.parts:
            other = find(first.setdefault((part.hash, part.length), index))
            here = find(index)
            leader[max(here, other)] = min(here, other)
    jobs: dict[int, list[Unit]] = {}
    for index, unit in enumerate(units):
        jobs.setdefault(find(index), []).append(unit)
    return list(jobs.values())
