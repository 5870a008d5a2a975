"""Huge pages take back the page tables of all sharers, and change nothing else."""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from conftest import ALIGNMENT, BASE, Client, Daemon, clients, eventually

from msharefsd.linux import features
from msharefsd.memory.shmbacking import ShmBacking
from msharefsd.paging import awaiting, collapse
from msharefsd.paging.fresh import Fresh
from msharefsd.region.region import Region
from msharefsd.telemetry.metrics import Metrics

CHUNKS = 8
SIZE = CHUNKS * ALIGNMENT
PAGE = 4096
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
READ, BOTH = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
SHARED, PRIVATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE
FIXED = 0x10
Pair = tuple[Client, Client]

pytestmark = pytest.mark.skipif(
    not features.probe().collapse, reason="this kernel has no MADV_COLLAPSE of shared memory"
)


@pytest.fixture
def eager(make_daemon: Callable[..., Daemon], directory: Path) -> Daemon:
    """A daemon that looks for chunks all the time."""
    (directory / "config").write_text("collapse_seconds = 0.05\n")
    return make_daemon(f"--alignment={ALIGNMENT}", f"--config={directory / 'config'}").start()


@pytest.fixture
def pair(client_program: Path, eager: Daemon) -> Iterator[Pair]:
    """Two sharers that have written all of a region."""
    with clients(client_program, eager) as spawn:
        first, second = spawn(), spawn()
        first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        first.ok("mmap", BASE, SIZE, BOTH, SHARED | FIXED)
        first.ok("fill", BASE, SIZE, 7)
        second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        second.ok("fill", BASE, SIZE, 8)
        yield first, second


def page_tables(client: Client) -> int:
    """VmPTE in kB (proc_pid_status(5))."""
    for line in Path(f"/proc/{client.pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "VmPTE":
            return int(value.split()[0])
    raise AssertionError


def collapsed(daemon: Daemon, chunks: int) -> None:
    eventually(lambda: daemon.metric("collapsed_chunks_total") >= chunks, f"{chunks} collapsed")


def test_page_tables_shrink_and_the_sharers_do_nothing_for_it(
    pair: Pair, eager: Daemon, client_program: Path
) -> None:
    with clients(client_program, eager) as spawn:
        idle = spawn()  # what a sharer has that has touched little
        idle.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        collapsed(eager, CHUNKS)
        assert idle.do("load", BASE) == "8"
        after = [page_tables(client) for client in pair]
        # A page of PMD entries, and what the C library touches here and there; the page
        # tables of small pages were 4 kB a chunk.
        most = page_tables(idle) + 2 * CHUNKS
    assert max(after) <= most
    for client in pair:
        assert [client.do("load", BASE + n * ALIGNMENT + PAGE) for n in range(CHUNKS)] == ["8"] * 8
    # A whole chunk is one fault now, and no page table of small pages.
    faults = int(pair[0].do("faults"))
    pair[0].ok("fill", BASE, SIZE, 9)
    assert int(pair[0].do("faults")) - faults <= 4 * CHUNKS
    assert page_tables(pair[0]) == after[0]
    assert pair[1].do("load", BASE + SIZE - PAGE) == "9"


def test_a_large_region_is_collapsed_before_others_come(
    make_daemon: Callable[..., Daemon], directory: Path, client_program: Path
) -> None:
    """As it is being filled: nobody has to look for that."""
    (directory / "config").write_text("collapse_seconds = 86400\n")
    daemon = make_daemon(f"--alignment={ALIGNMENT}", f"--config={directory / 'config'}").start()
    chunks = collapse.LARGE // ALIGNMENT
    with clients(client_program, daemon) as spawn:
        first, second = spawn(), spawn()
        first.ok("mshare", "r", BASE, collapse.LARGE, CREATE, 0o600)
        first.ok("mmap", BASE, collapse.LARGE, BOTH, SHARED | FIXED)
        first.ok("fill", BASE, collapse.LARGE, 7)
        # What is in use just then is left for a look.
        collapsed(daemon, chunks // 2)
        second.ok("mshare", "r", BASE, collapse.LARGE, os.O_RDWR, 0)
        faults = int(second.do("faults"))
        second.ok("fill", BASE, collapse.LARGE, 8)
        # 512 for each chunk, if the kernel maps every page by itself.
        assert int(second.do("faults")) - faults < 512 * chunks * 3 // 4
        assert first.do("load", BASE + collapse.LARGE - PAGE) == "8"
        assert daemon.metric('collapse_calls_total{errno="done"}') >= 1
        assert re.search(r"^attempts: \d+ .*done \d+", daemon.info("r", "pagetables"), re.MULTILINE)


def test_what_changes_afterwards_works_on_parts_of_a_huge_page(
    pair: Pair, eager: Daemon, directory: Path
) -> None:
    first, second = pair
    collapsed(eager, CHUNKS)
    first.ok("munmap", BASE + PAGE, PAGE)
    assert second.do("load", BASE + PAGE) == "SIGBUS"
    assert second.do("load", BASE) == "8"
    first.ok("mmap", BASE + PAGE, PAGE, BOTH, SHARED | FIXED)
    assert second.do("load", BASE + PAGE) == "0"
    second.ok("mprotect", BASE + ALIGNMENT + PAGE, PAGE, READ)
    for client in pair:
        assert client.do("store", BASE + ALIGNMENT + PAGE, 1) == "SIGSEGV"
        assert client.do("load", BASE + ALIGNMENT + PAGE) == "8"
        client.ok("store", BASE + ALIGNMENT, 5)
    second.ok("mprotect", BASE + 2 * ALIGNMENT, PAGE, 0)
    assert first.do("load", BASE + 2 * ALIGNMENT) == "SIGSEGV"
    first.ok("mprotect", BASE + 2 * ALIGNMENT, PAGE, BOTH)
    assert second.do("load", BASE + 2 * ALIGNMENT) == "8"
    path = directory / "file"
    path.write_bytes(b"\3" * PAGE)
    first.ok("mmap", BASE + 3 * ALIGNMENT, PAGE, BOTH, SHARED | FIXED, path, os.O_RDWR, 0)
    assert second.do("load", BASE + 3 * ALIGNMENT) == "3"
    second.ok("store", BASE + 3 * ALIGNMENT, 4)
    first.ok("msync", BASE + 3 * ALIGNMENT, PAGE, 4)
    assert path.read_bytes()[0] == 4
    assert first.do("check", BASE + 4 * ALIGNMENT, PAGE, 8).startswith("byte 1 is 0")


def test_a_chunk_that_was_unmapped_is_collapsed_anew(pair: Pair, eager: Daemon) -> None:
    first, second = pair
    collapsed(eager, CHUNKS)
    first.ok("mmap", BASE, ALIGNMENT, BOTH, PRIVATE | FIXED)
    second.ok("fill", BASE, ALIGNMENT, 3)
    collapsed(eager, CHUNKS + 1)
    assert first.do("load", BASE + PAGE) == "3"


def test_chunks_with_absent_or_protected_pages_and_lonely_sharers_are_left_alone(
    client_program: Path, eager: Daemon
) -> None:
    with clients(client_program, eager) as spawn:
        first, second = spawn(), spawn()
        for name, start in (("r", BASE), ("alone", BASE + SIZE)):
            first.ok("mshare", name, start, SIZE, CREATE, 0o600)
            first.ok("mmap", start, SIZE, BOTH, SHARED | FIXED)
        first.ok("fill", BASE + SIZE, SIZE, 1)
        first.ok("fill", BASE, ALIGNMENT, 1)
        first.ok("mprotect", BASE, PAGE, READ)
        first.ok("fill", BASE + 2 * ALIGNMENT, ALIGNMENT, 1)
        first.ok("munmap", BASE + 3 * ALIGNMENT - PAGE, PAGE)
        second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        first.ok("store", BASE + ALIGNMENT + 100 * PAGE, 1)
        first.ok("fill", BASE + 4 * ALIGNMENT, ALIGNMENT, 1)  # the one that can be
        collapsed(eager, 1)
        before = eager.metric("collapsed_chunks_total")
        first.ok("fill", BASE + 5 * ALIGNMENT, ALIGNMENT, 1)
        collapsed(eager, 2)
        assert (before, eager.metric("collapsed_chunks_total")) == (1, 2)
        assert first.do("store", BASE, 2) == "SIGSEGV"


@pytest.mark.parametrize("all_of_them", [False, True], ids=["one", "all"])
def test_who_has_no_huge_pages_is_passed_over(
    eager: Daemon, client_program: Path, *, all_of_them: bool
) -> None:
    with clients(client_program, eager) as spawn:
        first, second = spawn(), spawn()
        first.ok("no_huge_pages")
        if all_of_them:
            second.ok("no_huge_pages")
        first.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        first.ok("mmap", BASE, SIZE, BOTH, SHARED | FIXED)
        first.ok("fill", BASE, SIZE, 7)
        second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        second.ok("fill", BASE, SIZE, 8)
        if not all_of_them:
            collapsed(eager, CHUNKS)
            return
        count = 'not_collapsed_total{why="refused"}'
        eventually(lambda: eager.metric(count) >= 2 * CHUNKS, "it is counted")
        assert eager.metric("collapsed_chunks_total") == 0
        assert eager.metric('collapse_calls_total{errno="EINVAL"}') >= 2 * CHUNKS
        assert eager.log().count("PR_SET_THP_DISABLE") == 1, "and said once"


def test_it_can_be_switched_off(
    make_daemon: Callable[..., Daemon], directory: Path, client_program: Path
) -> None:
    (directory / "config").write_text("collapse_seconds = 0.01\n")
    daemon = make_daemon(
        f"--alignment={ALIGNMENT}", f"--config={directory / 'config'}", "--no-collapse"
    ).start()
    with clients(client_program, daemon) as spawn:
        first, second = spawn(), spawn()
        first.ok("mshare", "r", BASE, ALIGNMENT, CREATE, 0o600)
        second.ok("mshare", "r", BASE, ALIGNMENT, os.O_RDWR, 0)
        first.ok("mmap", BASE, ALIGNMENT, BOTH, SHARED | FIXED)
        first.ok("fill", BASE, ALIGNMENT, 1)
        second.ok("fill", BASE, ALIGNMENT, 1)
        for _ in range(20):
            assert second.do("load", BASE) == "1"
        assert daemon.metric("collapsed_chunks_total") == 0


def test_what_is_being_filled_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for the rest comes first; but a pull may go on for hours."""
    now = [1000.0]
    monkeypatch.setattr(awaiting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    paging, left = SimpleNamespace(awaiting=awaiting.Awaiting()), [1]
    monkeypatch.setattr(collapse, "pages_of", lambda _region: paging)
    region: Any = SimpleNamespace(
        size=collapse.LARGE,
        sharers={},
        backing=ShmBacking.__new__(ShmBacking),
        objects=SimpleNamespace(awaited=lambda: left[0]),
    )
    region.sharers[1] = None
    assert not collapse._worth_it(region)
    now[0] += collapse.FILLING_SECONDS
    assert collapse._worth_it(region)
    now[0] -= 1
    assert not collapse._worth_it(region)
    left[0] = 0
    assert collapse._worth_it(region)


def test_it_waits_for_descriptors() -> None:
    """Sharers may have all that there are, and nobody fails for that."""
    looks: list[int] = []

    def regions() -> list[Region]:
        looks.append(len(looks))
        if len(looks) <= 3:
            raise OSError((errno.EMFILE, errno.ENFILE, errno.ENOMEM)[looks[-1]], "not now")
        raise OSError(errno.EBADF, "this one is a defect")

    async def run() -> None:
        with trio.fail_after(60):
            await collapse.Collapser(Metrics(tuple), Fresh(), 0.001).run(regions)

    with pytest.raises(OSError, match="a defect"):
        trio.run(run)
    assert len(looks) == 4
