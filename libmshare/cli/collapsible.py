"""What `mshare doctor` says of page tables: whether they can be told, and had back here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from msharetables import proc
from msharetables.pagemap import Pagemap

THP: Final = Path("/sys/kernel/mm/transparent_hugepage")
_CAPABILITIES: Final = {"CAP_SYS_PTRACE": 19, "CAP_SYS_NICE": 23}


class Line(NamedTuple):
    """A line of the result; no advice is needed where it is good."""

    check: str
    good: bool
    found: str
    advice: str = ""


def lines() -> Iterator[Line]:
    """All of them."""
    yield _telling()
    yield _rights()
    yield from _settings()


def _telling() -> Line:
    check = "telling page tables"
    try:
        with Pagemap("self") as pagemap:
            next(iter(pagemap.slots(0, 1 << 46)), None)
    except OSError as error:
        advice = "mshare ptes and collapse take PAGEMAP_SCAN: Linux 6.7"
        return Line(check, good=False, found=error.strerror or "no", advice=advice)
    return Line(check, good=True, found="PAGEMAP_SCAN")


def _rights() -> Line:
    """What of others this user may look at and change."""
    check = "page tables of others"
    match = re.search(rb"^CapEff:\s*([0-9a-f]+)$", proc.read("self", "status"), re.MULTILINE)
    mask = int(match[1], 16) if match else 0
    lacking = [name for name, bit in _CAPABILITIES.items() if not mask >> bit & 1]
    if not lacking:
        return Line(check, good=True, found="can be shown and freed")
    return Line(
        check,
        good=False,
        found=f"without {' and '.join(lacking)}",
        advice="one's own can be told; having any back takes CAP_SYS_NICE: root, or "
        "mshare-collapse.service",
    )


def _chosen(path: Path) -> str | None:
    """The word in brackets; None if there is no such setting."""
    try:
        match = re.search(rb"\[(\w+)\]", path.read_bytes())
    except OSError:
        return None
    return match[1].decode() if match else None


def _settings() -> Iterator[Line]:
    check = "shmem_enabled"
    own = _chosen(THP / "shmem_enabled")
    if own is None:
        yield Line(check, good=False, found="no transparent huge pages", advice="nothing to free")
        return
    advice = {
        "never": "shared memory lies where huge pages fit only by chance: start programs with "
        f"`mshare run`, or `echo advise >{THP}/shmem_enabled` before they start",
        "advise": "anonymous shared memory lies where huge pages fit, and mshare collapse makes "
        "them; /dev/shm needs huge= of its own mount",
        "within_size": "anonymous shared memory is of huge pages from its first touch, for the "
        "whole machine: nothing is left for mshare collapse to do; sparse memory grows",
        "always": "as within_size, and small objects grow, too",
    }.get(own, "huge pages of shared memory are switched off: debugging settings")
    yield Line(check, good=own not in ("deny", "force"), found=own, advice=advice)
    name = "hugepages-2048kB/shmem_enabled"
    sized = _chosen(THP / name)
    if sized not in (None, "inherit"):
        yield Line(
            name,
            good=False,
            found=str(sized),
            advice=f"nothing can be freed: every try fails (EINVAL); echo inherit >{THP}/{name}",
        )
    elif sized is not None:
        yield Line(name, good=True, found=sized)
    yield Line(
        "free ways",
        good=True,
        found="huge_pages=on of PostgreSQL, shmem_enabled=within_size",
        advice="each does the same by itself: the first for PostgreSQL alone, out of a pool that "
        "is set aside (vm.nr_hugepages); the second for all that is started afterwards",
    )
