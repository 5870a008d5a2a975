"""Regions whose address and size are nobody's affair; what is refused, and how it is said."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from become import NOBODY, run_as
from conftest import ALIGNMENT, BASE, Client, Daemon, eventually
from inside import root_fixture as _root_fixture  # noqa: F401 - of every test here

import libmshare
from libmshare import Region, core, errors
from msharefsd.mount import places

SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
Spawn = Callable[..., Client]


def test_no_two_regions_meet(spawn: Spawn) -> None:
    other = spawn()
    other.ok("mshare", "theirs", places.AREAS[0][0] + ALIGNMENT, SIZE, CREATE, 0o600)
    made = [Region.create(size=size) for size in (1, ALIGNMENT, ALIGNMENT + 1, 5 * ALIGNMENT)]
    spans = [(each._hold.region.start, each._hold.region.size) for each in made]
    spans.append((places.AREAS[0][0] + ALIGNMENT, SIZE))
    spans.sort()
    for (start, size), (following, _) in itertools.pairwise(spans):
        assert start + size <= following
    assert [len(each) for each in made] == [1, ALIGNMENT, ALIGNMENT + 1, 5 * ALIGNMENT]
    for each in made:
        with Region.attach(each.name) as same:
            assert len(same) == len(each)
        each.unlink()
        each.close()


def test_what_this_process_has_is_in_nobodys_way() -> None:
    low = places.AREAS[0][0]
    core.map_anonymous(low, 4096)
    ctypes.memset(low, 9, 10)
    with Region.create(size="1M") as region:
        assert region.start >= low + ALIGNMENT
        region.unlink()
    assert ctypes.string_at(low, 1) == b"\x09"
    core.mshare_munmap(low, 4096)


def test_threads_get_places_of_their_own() -> None:
    made: list[Region] = []
    threads = [
        threading.Thread(target=lambda: made.append(Region.create(size="64K"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({region.start for region in made}) == 8
    for region in made:
        region.unlink()
        region.close()


def test_c_leaves_it_to_the_daemon_too(spawn: Spawn, daemon: Daemon) -> None:
    client = spawn()
    client.ok("mshare", "c", 0, 10000, CREATE, 0o600)
    found = libmshare.mshare_stat("c")
    assert found.start >= places.AREAS[0][0]
    client.ok("store", found.start + 8191, 5)
    with Region.attach("c") as region:
        assert len(region) == 10000
        assert region.buf[8191] == 5
    other = spawn()
    other.ok("mshare", "c", 0, 10000, os.O_CREAT | os.O_RDWR, 0o600)
    assert other.do("load", found.start + 8191) == "5"
    assert client.do("load", found.start + 16384) == "SIGBUS"
    client.ok("detach", "c")
    other.ok("unlink", "c")


def test_places_after_a_restart(daemon: Daemon) -> None:
    with Region.create("first", "1M") as first:
        daemon.kill()
        daemon.expected.append("taking down the mount")
        daemon.start()
        with Region.create("second", "1M") as second:
            assert second.start != first.start
            with Region.attach("first") as same:
                assert len(same) == 1 << 20
            second.unlink()
        first.unlink()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("64K", 1 << 16), ("1.5M", 3 << 19), ("2 GiB", 2 << 30), ("1TB", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    from libmshare.region import parse_size

    assert parse_size(text) == size
    assert parse_size(np.int64(size)) == size


def test_arguments_are_refused_and_not_ignored(tmp_path: Path) -> None:
    with Region.create("r", SIZE, mode=0o600, backing="shm") as region:
        changes: list[dict[str, Any]] = [
            {"size": SIZE + ALIGNMENT},
            {"start": BASE + 4 * SIZE},
            {"empty": True},
            {"backing": "hugetlb"},
            {"mode": 0o400},
        ]
        for change in changes:
            with pytest.raises(libmshare.Mismatch, match="the region exists, and"):
                Region.create("r", **({"size": SIZE, "exist_ok": True} | change))
        with Region.create("r", SIZE, exist_ok=True, backing="shm", mode=0o600) as same:
            assert same == region
        region.unlink()
    nonsense: list[dict[str, Any]] = [
        {"size": 0},
        {"size": -5},
        {"size": "many"},
        {"size": "0.3B"},
        {"size": 1, "empty": True, "donate": True},
        {"size": 1, "donate": True},
        {"size": 1, "exist_ok": True},
        {"size": 1, "reserve": True, "empty": True},
    ]
    for bad in nonsense:
        with pytest.raises(ValueError, match=r"size|empty|donate|exist_ok|reserve"):
            Region.create(**bad)
    with pytest.raises(TypeError, match="say how large"):
        Region.create("r")
    with pytest.raises(TypeError, match=r"Region\.create"):
        Region("r")
    with pytest.raises(TypeError):
        Region.create("r", 1.5)  # type: ignore[arg-type]


def test_empty_is_empty() -> None:
    core.map_anonymous(BASE, 4096)
    ctypes.memmove(BASE, b"my secret", 9)
    for more in ({}, {"empty": True}):
        with pytest.raises(libmshare.AddressTaken) as caught:
            Region.create("r", SIZE, start=BASE, **more)  # type: ignore[arg-type]
        assert caught.value.errno == errno.EADDRINUSE
    assert ctypes.string_at(BASE, 9) == b"my secret"
    with Region.create("r", SIZE, start=BASE, donate=True) as region:
        assert bytes(region.buf[:9]) == b"my secret"
        region.unlink()
    with Region.create("r", SIZE, start=BASE, empty=True) as region:
        for _ in range(2):  # also when it has no name any more
            with pytest.raises(OSError, match="nothing is mapped"):
                region.populate()
            region.unlink()


def test_reasons(daemon: Daemon, monkeypatch: pytest.MonkeyPatch, spawn: Spawn) -> None:
    other = spawn()
    other.ok("mshare", "a", BASE, SIZE, CREATE, 0o600)
    other.ok("mshare", "b", BASE + 2 * SIZE, SIZE, CREATE | os.O_RDONLY, 0o600)
    with pytest.raises(libmshare.MshareError, match=f"of the alignment, {ALIGNMENT} bytes"):
        Region.create("n", 4096, start=BASE)
    with pytest.raises(libmshare.MshareError, match=r"the region is \d+ bytes at 0x"):
        core.mshare("a", BASE + SIZE, SIZE, os.O_RDWR)
    with pytest.raises(libmshare.RegionExists, match=r"attach\(\) it, or say exist_ok=True"):
        Region.create("a", SIZE)
    with pytest.raises(libmshare.NoSuchRegion, match="mshare ls"):
        Region.attach("nosuch")
    with pytest.raises(TypeError, match="is a str, not int"):
        Region.attach(5)  # type: ignore[arg-type]
    with Region.create(size="1M", heap=True, ephemeral=True) as region:
        with pytest.raises(libmshare.MshareError, match="multiple of the page size, 4096"):
            region.protect(1, 4096, mmap.PROT_READ)
        with pytest.raises(ValueError, match="a semaphore is 0 to 2147483647"):
            region.semaphore("s", -1)
        with pytest.raises(ValueError, match="does not lie in this region"):
            region.atomic(np.zeros(1, np.int64))
    core.map_anonymous(BASE, 4096)
    with pytest.raises(libmshare.AddressTaken, match="has something where the region lies"):
        Region.attach("a")
    core.mshare_munmap(BASE, 4096)
    for kind in (FileNotFoundError, OSError, libmshare.MshareError):
        with pytest.raises(kind):
            Region.attach("nosuch")
    monkeypatch.setenv("MSHARE_ROOT", "/nonexistent")
    with pytest.raises(libmshare.NotMounted, match="start msharefsd"):
        Region.create("n", 4096)
    assert issubclass(errors.NoMemory, MemoryError)
    assert isinstance(errors.of(errno.ENOTCONN, "", "x"), errors.DaemonGone)


def test_arrays_are_as_numpy_has_them() -> None:
    with Region.create(size="1M") as region:
        region.unlink()
        assert region.ndarray(np.int64(5)).shape == (5,)
        assert region.ndarray([2, 3]).shape == (2, 3)
        assert region.ndarray(()).shape == ()
        assert region.ndarray((0, 5)).shape == (0, 5)
        assert region.ndarray(3, np.dtype((np.int32, (2, 2)))).shape == (3, 2, 2)
        assert region.ndarray((2, 3), order="F").flags.f_contiguous
        assert region.ndarray(4, [("a", "i4"), ("b", "f8")])["b"].dtype == np.float64
        for shape in ((np.int64(1 << 40), np.int64(1 << 40)), 1 << 62, (-2, -3)):
            with pytest.raises(ValueError, match=r"do not lie|negative"):
                region.ndarray(shape)
        with pytest.raises(ValueError, match="Python objects"):
            region.ndarray(1, object)  # type: ignore[type-var]
        with pytest.raises(TypeError):
            region.ndarray(10.0)  # type: ignore[call-overload]


def test_a_region_is_a_buffer() -> None:
    with Region.create(size=100) as region:
        region.unlink()
        assert len(region) == len(region.buf) == 100
        region[3] = 7
        assert region[3] == 7
        assert bytes(region[2:5]) == b"\0\x07\0"
        assert region.buf == region.buf
        assert 7 in region.buf
        assert max(region.buf) == 7
        region.madvise(mmap.MADV_WILLNEED)


def test_memory_is_there_after_populating(make_daemon: Callable[..., Daemon]) -> None:
    small = make_daemon(f"--alignment={ALIGNMENT}", "--region-memory=4M").start()
    small.expected.append("no memory|holds as much as it may|may have|limit")
    os.environ["MSHARE_ROOT"] = str(small.mount)
    with Region.create("r", "1M", reserve=True) as region:
        held = small.mount / "r"
        eventually(lambda: os.stat(held).st_blocks * 512 >= 1 << 20, "its memory is told")
        region.unlink()
    with pytest.raises(MemoryError):
        Region.create("big", "64M", reserve=True)
    assert not (small.mount / "big").exists()


def test_a_region_is_not_made_over_another_one(daemon: Daemon) -> None:
    with Region.create("a", SIZE, start=BASE) as region:
        region[ALIGNMENT] = 7
        with pytest.raises(libmshare.AddressTaken, match="another region in that range"):
            Region.create("b", 2 * SIZE, start=BASE + ALIGNMENT, donate=True)
        with pytest.raises(libmshare.MshareError, match="another region in that range") as caught:
            core.mshare("b", BASE - ALIGNMENT, SIZE, CREATE, 0o600)
        assert caught.value.errno == errno.EINVAL
        assert not (daemon.mount / "b").exists()
        assert region[ALIGNMENT] == 7
        region.unlink()


@pytest.mark.timeout(60)
def test_offsets_and_lengths_are_any_integers() -> None:
    page = np.int64(mmap.PAGESIZE)
    with Region.create(size="1M", empty=True, ephemeral=True) as region:
        region.mmap(page, 4 * page, np.int32(mmap.PROT_READ | mmap.PROT_WRITE))
        region.populate(page, np.uint32(page))
        region.flush(page, page)
        region.protect(page, page, np.int8(mmap.PROT_READ))
        region.madvise(np.int64(mmap.MADV_NORMAL), page, page)
        region.munmap(2 * page, page)
        calls: list[Callable[[Any], object]] = [
            lambda size: region.populate(0, size),
            lambda size: region.munmap(0, size),
            region.flush,
            lambda size: region.pin(0, size),
        ]
        for call in calls:
            with pytest.raises(TypeError):
                call(region.size / 2)


def test_populating_what_may_not_be_written() -> None:
    with Region.create("r", "1M") as region:
        region.unlink()
        region.protect(0, mmap.PAGESIZE, mmap.PROT_READ)
        region.populate(timeout=20)
        assert region[0] == 0
        region.protect(0, mmap.PAGESIZE, 0)
        with pytest.raises(libmshare.AccessDenied, match="PROT_NONE"):
            region.populate(timeout=20)


@pytest.mark.parametrize("setting", ["auto", "none"])
def test_an_ordinary_user_populates(
    make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Whose userfaultfd serves no faults of the kernel: a lack of memory ends nobody, either."""
    small = make_daemon(
        f"--alignment={ALIGNMENT}", "--region-memory=1M", f"--userfaultfd={setting}"
    ).start()
    small.expected.append("no memory for a fault")
    monkeypatch.setenv("MSHARE_ROOT", str(small.mount))

    def populate() -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with Region.create("r", "512K", mode=0o666) as region:
            region.populate(timeout=20)
            assert bytes(region.buf) == bytes(len(region))
            if setting == "none":
                with open("/dev/zero", "rb", buffering=0) as zeros:  # the kernel finds it there
                    assert zeros.readinto(region.buf) == len(region)
            with Region.attach("r", readonly=True) as same:
                same.populate(timeout=20)
        with pytest.raises(MemoryError):
            Region.create("big", "8M", reserve=True)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    run_as(NOBODY, populate)


def test_populating_ends_in_time_and_lets_others_go_on(daemon: Daemon) -> None:
    with Region.create("r", "8M") as region:
        region.unlink()
        daemon.freeze()
        try:
            with pytest.raises(TimeoutError):
                region.populate(timeout=0.2)
        finally:
            daemon.thaw()
        region.populate(timeout=20)
        for thread in threading.enumerate():  # the one that was given up has the memory until then
            if thread.name == "mshare populate":
                thread.join(20)


def test_it_tells_its_alignment() -> None:
    assert libmshare.alignment() == ALIGNMENT
