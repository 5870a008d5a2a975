"""Regions of huge pages: what is theirs alone.  The corpus runs on them, too."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    BASE,
    Client,
    Daemon,
    MiB,
    clients,
    eventually,
    huge_pages,
    huge_pages_for_group,
    no_free_huge_pages,
)

from libmshare import Region
from msharefsd.errors import Refused
from msharefsd.memory import hugetlb
from msharefsd.memory.hugetlb import Pool

HUGE = 2 * MiB
SIZE = 64 * MiB
NOBODY = 65534
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
BOTH = mmap.PROT_READ | mmap.PROT_WRITE
SHARED, PRIVATE, FIXED, NORESERVE = mmap.MAP_SHARED, mmap.MAP_PRIVATE, 0x10, 0x4000
Start = Callable[..., Client]


def minus(code: int) -> str:
    return str(-code)


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon with regions of 64 MiB: more than there are huge pages for."""
    daemon = make_daemon(f"--alignment={SIZE}", "--backing=hugetlb")
    daemon.expected.append("no huge pages are reserved")
    return daemon


@pytest.fixture
def pages() -> Iterator[None]:
    """Eight huge pages, and no others that are free."""
    with no_free_huge_pages(), huge_pages(8):
        yield


@pytest.fixture
def start(daemon: Daemon, client_program: Path) -> Iterator[Start]:
    daemon.start()
    with clients(client_program, daemon) as start:
        yield start


def create(client: Client, size: int = SIZE) -> None:
    client.ok("mshare", "r", BASE, size, CREATE, 0o600)


def free_pages() -> int:
    return Pool(Path("/nowhere"), HUGE).free()


def test_who_removes_everything_is_not_told_to_reserve_huge_pages(daemon: Daemon) -> None:
    with no_free_huge_pages():
        daemon.start()
        # The machine may have some of its own.
        warned = "no huge pages are reserved" in daemon.log()
        assert warned == (Pool(Path("/nowhere"), HUGE).total() == 0)
        daemon.kill()
        done = daemon.purge()
    assert (done.returncode, "reserved" in done.stderr) == (0, False), done.stderr


def test_without_any_huge_page_a_region_is_refused_with_the_command(
    daemon: Daemon, client_program: Path
) -> None:
    daemon.start()
    with no_free_huge_pages(), clients(client_program, daemon) as start:
        client = start()
        assert client.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == minus(errno.ENOMEM)
        needed = "1 huge pages of 2048 kB are needed, 0 are free: sysctl vm.nr_hugepages="
        assert needed in daemon.log()
        assert not (daemon.mount / "r").exists()


def test_memory_that_cannot_be_had_is_refused_when_it_is_mapped(
    pages: None, start: Start, daemon: Daemon
) -> None:
    client = start()
    create(client)
    assert client.do("mmap", BASE, SIZE, BOTH, SHARED | FIXED) == minus(errno.ENOMEM)
    free = free_pages()
    assert (
        f"{SIZE // HUGE} huge pages of 2048 kB are needed, {free} are free: sysctl vm.nr_hugepages="
        in daemon.log()
    )
    client.ok("mmap", BASE, SIZE, BOTH, SHARED | FIXED | NORESERVE)
    client.ok("store", BASE + SIZE - 1, 1)


def test_donated_memory_that_cannot_be_had_is_refused_and_stays_the_donors(
    pages: None, start: Start, daemon: Daemon
) -> None:
    client = start()
    for flags in (PRIVATE, SHARED):
        client.ok("map", BASE, SIZE, flags)
        client.ok("fill", BASE, SIZE, 5)
        assert client.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == minus(errno.ENOMEM)
        assert client.do("load", BASE + SIZE - 4096) == "5"
        eventually(lambda: not (daemon.mount / "r").exists(), "the name is gone")
        client.ok("munmap", BASE, SIZE)
    assert f"{SIZE // HUGE} huge pages of 2048 kB are needed" in daemon.log()


def test_an_empty_pool_is_sigbus_and_heals(pages: None, start: Start, daemon: Daemon) -> None:
    daemon.expected.append("no memory for a fault")
    first, second = start(), start()
    create(first)
    first.ok("mmap", BASE, SIZE, BOTH, SHARED | FIXED | NORESERVE)
    second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    free = free_pages()
    assert first.do("fill", BASE, SIZE, 7) == "SIGBUS"
    assert free_pages() == 0
    assert int(daemon.field("r", "memory")) == free * HUGE
    last = BASE + SIZE - HUGE
    for client in (first, second):
        assert client.do("load", BASE + (free - 1) * HUGE) == "7"
        assert client.do("load", last) == "SIGBUS"
        assert client.do("from_memory", last, 1) == minus(errno.EFAULT)
    assert daemon.metric('sigbus_total{reason="no memory"}') >= 2
    first.ok("madvise", BASE, SIZE, 4)  # no private memory: it changes nothing
    second.ok("munmap", BASE, 2 * HUGE)
    for client in (first, second):
        eventually(lambda of=client: of.do("load", last) == "0", "memory is there again")  # type: ignore[misc] # bound now
    first.ok("store", last, 9)
    assert second.do("load", last) == "9"


def test_a_hole_that_was_touched_can_be_mapped(pages: None, start: Start) -> None:
    first, second = start(), start()
    create(first)
    second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    for _ in range(3):
        for client in (first, second):
            assert client.do("load", BASE + HUGE) == "SIGBUS"
        second.ok("mmap", BASE + HUGE, HUGE, BOTH, SHARED | FIXED)
        for value, client in enumerate((first, second), start=1):
            client.ok("store", BASE + HUGE, value)
        assert first.do("load", BASE + HUGE) == "2"
        first.ok("munmap", BASE + HUGE, HUGE)


@pytest.mark.parametrize(
    "words",
    [
        ("mmap", BASE, 4096, BOTH, SHARED | FIXED),
        ("mmap", BASE + 4096, HUGE, BOTH, SHARED | FIXED),
        ("munmap", BASE, 4096),
        ("mprotect", BASE + HUGE, 4096, 1),
        ("mshare", "q", BASE + SIZE, HUGE // 2, CREATE, 0o600),
    ],
)
def test_what_is_not_whole_huge_pages_is_einval(
    pages: None, start: Start, words: tuple[object, ...]
) -> None:
    client = start()
    create(client)
    client.ok("mmap", BASE, 4 * HUGE, BOTH, SHARED | FIXED)
    assert client.do(*words) == minus(errno.EINVAL)
    client.ok("store", BASE, 1)


def test_unaligned_donations_are_refused(pages: None, start: Start) -> None:
    client = start()
    client.ok("map", BASE + 4096, HUGE, PRIVATE)
    client.ok("store", BASE + 4096, 3)
    assert client.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == minus(errno.EINVAL)
    assert client.do("load", BASE + 4096) == "3"


def test_a_donor_needs_pages_for_what_it_touched_only(
    pages: None, start: Start, daemon: Daemon
) -> None:
    donor, second = start(), start()
    donor.ok("map", BASE, SIZE, SHARED)
    for offset in (0, 4096, 3 * HUGE + 8192, SIZE - 4096):
        donor.ok("store", BASE + offset, 1 + offset // 4096 % 200)
    create(donor)
    assert int(daemon.field("r", "memory")) == 3 * HUGE
    second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    for client in (donor, second):
        for offset in (0, 4096, 3 * HUGE + 8192, SIZE - 4096):
            assert client.do("load", BASE + offset) == str(1 + offset // 4096 % 200)
        assert client.do("load", BASE + HUGE - 1) == "0"


def test_a_private_file_that_the_donor_has_written_to(
    pages: None, start: Start, directory: Path
) -> None:
    """Huge pages are of the donor's small ones and of the file's, up to its end."""
    path = directory / "file"
    path.write_bytes(b"\x21" * (HUGE + 3 * 4096))
    donor, second = start(), start()
    donor.ok("mmap", BASE, 2 * HUGE, BOTH, PRIVATE | FIXED, path, os.O_RDONLY, 0)
    donor.ok("store", BASE + 8192, 77)
    donor.ok("store", BASE + HUGE + 4096, 78)
    create(donor)
    second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    for client in (donor, second):
        found = [client.do("load", BASE + at) for at in (0, 8192, HUGE, HUGE + 4096, 2 * HUGE - 1)]
        assert found == ["33", "77", "33", "78", "0"]
    assert path.read_bytes() == b"\x21" * (HUGE + 3 * 4096)


def test_who_may_have_huge_pages(pages: None, start: Start) -> None:
    user = {"user": NOBODY, "group": NOBODY}
    client = start(**user, extra_groups=[])
    with huge_pages_for_group(0):
        assert client.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == minus(errno.EPERM)
    with huge_pages_for_group(12345):
        assert client.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == minus(errno.EPERM)
        member = start(**user, extra_groups=[12345])
        member.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        # Who may open the region's file may attach it: that is the owner's affair.
        client.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)


def test_the_rule_for_who_may() -> None:
    hugetlb.may_use(0, ())
    hugetlb.may_use(os.geteuid(), ())
    with huge_pages_for_group(54321):
        hugetlb.may_use(1000, (7, 54321))
        with pytest.raises(Refused) as caught:
            hugetlb.may_use(1000, (7, 1000))
        assert caught.value.code == errno.EPERM


def test_each_region_has_the_backing_that_was_asked_for(
    make_daemon: Callable[..., Daemon], client_program: Path, pages: None
) -> None:
    daemon = make_daemon(f"--alignment={SIZE}", "--backing=shm").start()
    with clients(client_program, daemon) as start:
        for name, kind in (("default", None), ("a", "shm"), ("b", "hugetlb"), ("c", "")):
            before = [] if kind is None else ["env", f"MSHARE_BACKING={kind}"]
            client = start(before=before)
            client.ok("mshare", name, BASE, SIZE, CREATE, 0o600)
            expected = kind or "shm"
            assert daemon.field(name, "backing").split()[0] == expected
            client.ok("mmap", BASE, 2 * HUGE, BOTH, SHARED | FIXED)
            client.ok("store", BASE, 1)
            assert (
                int(daemon.field(name, "memory")) % (HUGE if expected == "hugetlb" else 4096) == 0
            )
        client = start(before=["env", "MSHARE_BACKING=nonsense"])
        assert client.do("mshare", "d", BASE, SIZE, CREATE, 0o600) == minus(errno.EINVAL)
        client.ok("mshare", "a", BASE, SIZE, os.O_RDWR, 0)  # what exists is attached as it is


def test_python_chooses_the_backing(
    pages: None, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.start()
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    for kind in ("shm", "hugetlb"):
        with Region.create(kind, SIZE, start=BASE, backing=kind) as region:
            region.buf[HUGE] = 3
            assert daemon.field(kind, "backing").split()[0] == kind
            region.unlink()
    with pytest.raises(OSError, match="backing is"):
        Region.create("r", SIZE, start=BASE, backing="paper")


def test_what_a_daemon_that_died_has_left_is_no_hindrance(
    pages: None, daemon: Daemon, start: Start
) -> None:
    client = start()
    create(client)
    client.ok("mmap", BASE, HUGE, BOTH, SHARED | FIXED)
    client.ok("store", BASE, 5)
    daemon.kill()
    assert client.do("load", BASE) == "5"
    assert (daemon.run / "huge").is_mount()


def test_a_daemon_without_the_right_to_mount_says_so(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    daemon = make_daemon(f"--alignment={SIZE}", "--backing=shm", "--without=hugetlb")
    daemon.expected.append("no hugetlbfs")
    daemon.start()
    with clients(client_program, daemon) as start:
        client = start(before=["env", "MSHARE_BACKING=hugetlb"])
        result = client.do("mshare", "r", BASE, SIZE, CREATE, 0o600)
        assert result == minus(errno.EOPNOTSUPP)
    daemon.stop()
    refused = subprocess.run(
        [*daemon.command(), "--backing=hugetlb", "--without=hugetlb"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "hugetlb cannot be had" in refused.stderr


GiB = 1 << 30


@contextlib.contextmanager
def gigantic_page() -> Iterator[None]:
    setting = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
    if not setting.exists():
        pytest.skip("this machine has no huge pages of 1 GiB")
    before = int(setting.read_text())
    setting.write_text(str(before + 1))
    try:
        if int(setting.read_text()) <= before:
            pytest.skip("this machine cannot reserve a huge page of 1 GiB")
        yield
    finally:
        setting.write_text(str(before))


def test_pages_of_1_gib(make_daemon: Callable[..., Daemon], client_program: Path) -> None:
    with gigantic_page():
        daemon = make_daemon("--alignment=1G", "--backing=hugetlb", "--huge-page=1G").start()
        daemon.expected.append("the longest run")  # a page of 1 GiB is made in one piece
        with clients(client_program, daemon) as start:
            first, second = start(), start()
            first.ok("mshare", "r", BASE, 2 * GiB, CREATE, 0o600)
            second.ok("mshare", "r", BASE, 2 * GiB, os.O_RDWR, 0)
            assert first.do("mmap", BASE, HUGE, BOTH, SHARED | FIXED) == minus(errno.EINVAL)
            first.ok("mmap", BASE, GiB, BOTH, SHARED | FIXED)
            second.ok("store", BASE + GiB - 1, 8)
            assert first.do("load", BASE + GiB - 1) == "8"
            assert first.do("load", BASE + GiB) == "SIGBUS"
            first.ok("mprotect", BASE, GiB, mmap.PROT_READ)
            assert second.do("store", BASE, 1) == "SIGSEGV"
            assert second.do("load", BASE + GiB - 1) == "8"
            first.ok("munmap", BASE, GiB)
            assert second.do("load", BASE) == "SIGBUS"
        daemon.stop()


def test_a_size_that_the_kernel_does_not_have_is_refused(daemon: Daemon) -> None:
    refused = subprocess.run(
        [*daemon.command(), "--huge-page=3M"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "no huge pages of 3M: this kernel has" in refused.stderr
