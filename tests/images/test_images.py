"""Images: pushed to a real S3 server, pulled under another daemon."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import re
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    ALIGNMENT,
    BASE,
    BIN,
    LARGEST_CHUNK,
    PAGE,
    Daemon,
    MiB,
)
from machines import SIZE, named, on
from machines import both_fixture as _both  # noqa: F401 - a fixture
from machines import here_fixture as _here  # noqa: F401 - a fixture
from machines import there_fixture as _there  # noqa: F401 - a fixture
from objectstores import KEY, READER, READER_SECRET, S3, SECRET, rclone
from objectstores import s3_fixture as _s3  # noqa: F401 - a fixture
from objectstores import sources_fixture as _sources  # noqa: F401 - a fixture
from pages import DOCS, blocks

from libmshare import Busy, ImageError, Region, RegionExists
from libmshare.images.manifest import PART

Sources = Callable[[str], Path]


def layout(daemon: Daemon, name: str) -> list[str]:
    """What is mapped where; files become memory."""
    return [
        line.split()[0] + line.split()[1][:3] for line in daemon.info(name, "maps").splitlines()
    ]


@pytest.mark.timeout(180)
def test_a_region_is_the_same_elsewhere(
    here: Daemon, there: Daemon, s3: S3, sources: Sources, directory: Path
) -> None:
    """Contents, holes, protections, files; and what is not touched takes no memory."""
    sources(s3.source())
    file = directory / "file"
    file.write_bytes(random.Random(1).randbytes(2 * PAGE + 100))
    with Region.create("r", SIZE, start=BASE, empty=True) as region:
        region.mmap(0, 9 * ALIGNMENT)
        region.mmap(10 * ALIGNMENT, ALIGNMENT, flags=mmap.MAP_PRIVATE)
        with file.open("rb") as opened:
            region.mmap(11 * ALIGNMENT, 3 * PAGE, mmap.PROT_READ, mmap.MAP_PRIVATE, opened)
        region.mmap(12 * ALIGNMENT, 2 * PAGE)
        region[0:5] = b"hello"
        for at in (PART - 7, PART + 3, 8 * ALIGNMENT):
            region[at : at + 8] = b"contents"
        region[10 * ALIGNMENT] = 7
        region[12 * ALIGNMENT : 12 * ALIGNMENT + 3] = b"end"
        region.protect(12 * ALIGNMENT, PAGE, mmap.PROT_READ)
        memory = int(here.field("r", "memory"))
        first = region.push("s3://images/a/r.img", abi="test 1")
        assert int(here.field("r", "memory")) - memory <= LARGEST_CHUNK  # the file, and no more
        assert first.sent == first.size < 9 * ALIGNMENT
        again = region.push("s3://images/a/r.img", abi="test 1")
        assert again.digest == first.digest and again.sent == 0
        region[PART] ^= 1
        changed = region.push("s3://images/a/changed.img")
        assert 0 < changed.sent < first.sent and changed.size == first.size
        region[PART] ^= 1
        expected = layout(here, "r")
        whole = bytes(region.buf[: 9 * ALIGNMENT])
        region.unlink()
    with on(there), Region.pull("s3://images/a/r.img", abi="test 1") as region:
        assert (region.name, region.start, region.size) == ("r", BASE, SIZE)
        assert layout(there, "r") == expected
        assert int(there.field("r", "memory")) <= first.size + 2 * PAGE
        assert bytes(region.buf[: 9 * ALIGNMENT]) == whole
        assert region[10 * ALIGNMENT] == 7
        at = 11 * ALIGNMENT
        assert bytes(region.buf[at : at + 3 * PAGE]).rstrip(b"\0") == file.read_bytes()
        at = 12 * ALIGNMENT
        assert bytes(region.buf[at : at + 3]) == b"end"
        # It is this one, whatever the store says later, and without asking it.
        with Region.pull("s3://nowhere/r.img", digest=first.digest) as same:
            assert same == region
        with pytest.raises(RegionExists):
            Region.pull("s3://images/a/changed.img", "r")
        with pytest.raises(RegionExists):
            Region.pull("s3://nowhere/r.img", digest=changed.digest)
        region.unlink()


def test_whose_maker_and_machine_are_others_is_refused(
    here: Daemon, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{directory}/store/r.img"
    with Region.create("r", SIZE) as region:
        region[0] = 1
        pushed = region.push(url, abi="mine")
        region.unlink()
    for wrong in ({"abi": "yours"}, {"digest": "sha256:" + "0" * 64}):
        with pytest.raises(ImageError):
            Region.pull(url, **wrong)  # type: ignore[arg-type] # texts both
    with pytest.raises(ValueError, match="name"):
        Region.pull(url, "a/b")
    monkeypatch.setattr("platform.machine", lambda: "vax")
    with pytest.raises(ImageError) as caught:
        Region.pull(url, digest=pushed.digest)
    assert caught.value.errno == errno.ENOEXEC
    assert os.listdir(here.mount / ".regions") == []


def test_a_region_that_others_write_is_not_pushed(here: Daemon, directory: Path) -> None:
    url = f"file://{directory}/store/r.img"
    with Region.create("r", SIZE, start=BASE) as region:
        region[0] = 1
        writer = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from libmshare import *\nr = Region.attach('r')\nprint(r[0], flush=True)\ninput()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"1\n"
        with pytest.raises(Busy):
            region.push(url)
        loose = region.push(url, unsynchronized=True)
        region.protect(0, SIZE, mmap.PROT_READ)
        frozen = region.push(url)
        assert frozen.digest != loose.digest  # its protection
        region.protect(0, SIZE, mmap.PROT_READ | mmap.PROT_WRITE)
        writer.communicate(b"\n")
        assert region.push(url).digest == loose.digest
        region.unlink()
    with Region.create("r", SIZE) as region:
        region.protect(0, ALIGNMENT, 0)
        with pytest.raises(ImageError) as caught:
            region.push(url)
        region.unlink()
    assert caught.value.errno == errno.EACCES


@pytest.fixture(scope="module")
def map_program() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mshare-test-") as name:
        program = Path(name) / "map"
        words = subprocess.run(
            [sys.executable, "-m", "libmshare", "--cflags", "--libs"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        source = Path(__file__).parent.parent / "support" / "map.cc"
        subprocess.run(
            ["c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(program),
             str(source), *words],
            check=True,
        )  # fmt: skip
        yield program


def test_a_map_of_strings_is_right_elsewhere(
    here: Daemon, there: Daemon, s3: S3, sources: Sources, map_program: Path
) -> None:
    """Pointers and all: nothing is made anew from what was written."""
    sources(s3.source())
    count, size = "20000", 4 * ALIGNMENT
    make = [str(map_program), "make", "words", hex(BASE), str(size), count]
    subprocess.run(make, check=True, timeout=60)
    with Region.attach("words") as region:
        region.push("s3://images/map/words.img", abi="map.cc 1")
        region.unlink()
    with on(there):
        Region.pull("s3://images/map/words.img", mode=0o444).close()
        look = [str(map_program), "look", "words", count]
        subprocess.run(look, check=True, timeout=60)
        os.unlink(there.mount / "words")


@pytest.mark.parametrize("size", [SIZE, SIZE - 5 * MiB - 4096 - 5])
def test_a_heap_goes_on_elsewhere(here: Daemon, there: Daemon, directory: Path, size: int) -> None:
    """Arrays that point to arrays, and names; and more can be had of it."""
    url = f"file://{directory}/store/heap.img"
    with Region.create("heap", size, heap=True) as region:
        rows = [region.copy_in(np.arange(i, i + 1000)) for i in range(50)]
        table = region.copy_in(np.array([row.__array_interface__["data"][0] for row in rows]))
        root = region.atomic("root")
        root.exchange(table.__array_interface__["data"][0] - region.start)
        before = region.check_heap()
        region.push(url)
        region.unlink()
    del rows, table, root
    with on(there), Region.pull(url) as region:
        assert region.size == size
        assert region.check_heap() == before
        table = region.ndarray(50, np.int64, region.atomic("root").load())
        for i, address in enumerate(table):
            row = region.ndarray(1000, np.int64, int(address) - region.start)
            assert (row == np.arange(i, i + 1000)).all()
        more = region.zeros(1000)
        region.free(more)
        with region.lock("lock"):
            pass
        region.unlink()
        del table, row, more


def test_what_the_page_shows(here: Daemon, there: Daemon, s3: S3, sources: Sources) -> None:
    """docs/beyond.md, as it stands there."""
    sources(s3.source())
    page = Path(__file__).parent.parent.parent / "docs" / "beyond.md"
    push, pull = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)[
        :2
    ]
    with Region.create("wiki", SIZE) as region:
        region[0] = 42
    known: dict[str, Any] = {}
    exec(push, known)
    os.unlink(here.mount / "wiki")
    del known["region"]
    with on(there):
        exec(pull, known)
        with known.pop("region") as region:
            assert region[0] == 42
            region.unlink()


def mshare(*words: str) -> tuple[list[Any], str]:
    """What a command writes: lines of JSON; and what it says went wrong."""
    done = subprocess.run(
        [str(BIN / "mshare"), *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode == 0) == (done.stderr == ""), done.stderr
    assert done.stderr.count("\n") <= 1
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.timeout(300)
def test_the_commands(here: Daemon, there: Daemon, s3: S3, sources: Sources) -> None:
    """As docs/beyond.md shows them."""
    sources(s3.source())
    page = Path(__file__).parent.parent.parent / "docs" / "beyond.md"
    block, *_ = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    push, pull, create = (shlex.split(line)[1:] for line in block.splitlines())
    with Region.create("wiki", SIZE) as region:
        region.buf[:] = random.Random(5).randbytes(SIZE)
        whole = bytes(region.buf)
    pushed = mshare(*push)[0][-1]
    assert pushed["size"] == pushed["sent"] == SIZE
    os.unlink(here.mount / "wiki")
    with on(there):
        last = mshare(*pull)[0][-1]
        assert (last["name"], last["size"]) == ("wiki", SIZE)
        told = json.loads(
            subprocess.run(
                [str(BIN / "mshare"), "info", "--json", "wiki"], stdout=subprocess.PIPE, check=True
            ).stdout
        )
        assert told["image"] == pushed["digest"] and told["mode"] == "0644"
        with Region.attach("wiki") as region:
            assert bytes(region.buf) == whole
            region.unlink()
    assert mshare(*create)[0][-1]["name"] == "raw"
    with Region.attach("raw") as region:
        manifest = bytes(region.buf)
        assert json.loads(manifest)["abi"] == "index 7"
        region.unlink()
    url = "s3://indexes/wiki.img"
    mshare("create", "raw", "--start", hex(BASE), "--size", str(SIZE), "--from", url)
    with Region.attach("raw") as region:
        assert (region.start, region.size) == (BASE, SIZE)
        assert bytes(region.buf[: len(manifest) + 1]) == manifest + b"\0"
        region.unlink()
    assert "nosuch" in mshare("push", "nosuch", url)[1]


def test_the_commands_of_the_sketches(here: Daemon, s3: S3, sources: Sources) -> None:
    """In docs/beyond.md, without Slurm and Kubernetes around them."""
    sources(s3.source())
    page = (Path(__file__).parent.parent.parent / "docs" / "beyond.md").read_text()
    (slurm,) = re.findall(r"^srun --ntasks-per-node=1 mshare (.*)$", page, re.MULTILINE)
    (kubernetes,) = re.findall(r"^ *command: \[mshare, (.*)\]$", page, re.MULTILINE)
    with Region.create("wiki", SIZE) as region:
        region[0] = 42
        region.push("s3://indexes/wiki.img")
        region.unlink()
    for words in (slurm.split(), [each.strip('"') for each in kubernetes.split(", ")]):
        assert mshare(*words)[0][-1]["name"] == "wiki"
        with Region.attach("wiki", readonly=True) as region:
            assert region[0] == 42
            mode = stat.S_IMODE((here.mount / "wiki").stat().st_mode)
            assert mode == (0o444 if "0444" in words else 0o600)
            region.unlink()


def test_dask_pulls_in_each_worker(here: Daemon, s3: S3, sources: Sources, directory: Path) -> None:
    """The program of docs/beyond.md, as it stands there."""
    sources(s3.source())
    (program,) = [each.text for each in blocks(DOCS / "beyond.md") if "dask" in each.text]
    file = directory / "job.py"
    file.write_text(program)
    with Region.create("wiki", SIZE) as region:
        region[100:104] = b"tobe"
        region.push("s3://indexes/wiki.img")
        region.unlink()
    scratch = {"DASK_TEMPORARY_DIRECTORY": str(directory)}
    done = subprocess.run(
        [sys.executable, str(file)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | scratch,
    )
    assert (done.returncode, done.stdout) == (0, "[1, 1, 0, 0]\n"), done.stderr
    assert named(here) == ["wiki"]
    os.unlink(here.mount / "wiki")


def test_who_may_not_write_the_store_may_pull(
    here: Daemon, s3: S3, sources: Sources, directory: Path
) -> None:
    sources(s3.source())
    with Region.create("r", SIZE) as region:
        region[3] = 3
        region.push("s3://images/rights/r.img")
        sources(s3.source(READER, READER_SECRET))
        with pytest.raises(ImageError) as caught:
            region.push("s3://images/rights/new.img")
        assert caught.value.errno == errno.EACCES
        region.unlink()
    with Region.pull("s3://images/rights/r.img") as region:
        assert region[3] == 3
        region.unlink()
    sources(s3.source(READER, "wrong"))
    with pytest.raises(ImageError) as caught:
        Region.pull("s3://images/rights/r.img")
    assert caught.value.errno == errno.EACCES
    assert READER_SECRET not in str(caught.value)


def test_nothing_secret_is_seen(here: Daemon, s3: S3, sources: Sources, directory: Path) -> None:
    file = sources(s3.source())
    with Region.create("r", SIZE) as region:
        region[0] = 1
        region.push("s3://images/secret/r.img")
        region.unlink()
    s3.pause()
    program = "from libmshare import Region; Region.pull('s3://images/secret/r.img')"
    puller = subprocess.Popen([sys.executable, "-c", program])
    try:
        time.sleep(1)  # it waits for the store
        seen = b""
        for name in ("cmdline", "environ", "comm"):
            seen += Path(f"/proc/{puller.pid}/{name}").read_bytes()
    finally:
        s3.go_on()
    assert puller.wait(60) == 0
    seen += here.log().encode() + os.getxattr(here.mount / "r", "user.mshare.image")
    for text in ("info", "maps", "sharers"):
        seen += here.info("r", text).encode()
    os.unlink(here.mount / "r")
    for database in here.run.rglob("*.sqlite*"):
        seen += database.read_bytes()
    assert SECRET.encode() not in seen and KEY.encode() not in seen
    for url in (f"s3://{KEY}:{SECRET}@images/r.img", f"https://host/r.img?signature={SECRET}"):
        with pytest.raises(ImageError) as caught:
            Region.pull(url)
        assert caught.value.errno == errno.EINVAL and SECRET not in str(caught.value)
    file.chmod(0o644)
    with pytest.raises(ImageError) as caught:
        Region.pull("s3://images/secret/r.img")
    assert caught.value.errno == errno.EACCES
    file.chmod(0o600)
    for content in ("[[source", "x = 1", "[[source]]\nprefix = 1", "source = 7"):
        file.write_text(content)
        with pytest.raises(ImageError) as caught:
            Region.pull("s3://images/secret/r.img")
        assert caught.value.errno == errno.EINVAL


def test_a_store_that_stops_for_a_while(here: Daemon, s3: S3, sources: Sources) -> None:
    """In the middle of it: it goes on when the store does."""
    sources(s3.source())
    with Region.create("r", SIZE) as region:
        region.buf[:] = random.Random(2).randbytes(SIZE)
        expected = bytes(region.buf)
        region.push("s3://images/stops/r.img")
        region.unlink()
    told: list[int] = []

    def progress(done: int, _: int) -> None:
        if not told:
            s3.pause()
        told.append(done)
        if len(told) == 5:
            s3.go_on()

    try:
        with Region.pull("s3://images/stops/r.img", progress=progress) as region:
            assert bytes(region.buf) == expected
            region.unlink()
    finally:
        s3.go_on()


def test_a_server_that_ignores_conditions(here: Daemon, sources: Sources) -> None:
    with rclone() as store:
        sources(store.source())
        with Region.create("r", SIZE) as region:
            region[3] = 3
            region.push("s3://images/r.img")
            region.unlink()
        with Region.pull("s3://images/r.img") as region:
            assert region[3] == 3
            region.unlink()


def test_descriptors_of_a_mount_that_is_dead_are_left_alone(
    here: Daemon, make_daemon: Callable[..., Daemon], directory: Path
) -> None:
    """Whoever pushes looks for the one of the region's memory among all that there are."""
    other = make_daemon().start()
    with (other.mount / "mshare_info").open("rb"):
        other.kill()
        with Region.create("r", SIZE) as region:
            region[0] = 1
            counts = []
            for _ in range(3):
                region.push(f"file://{directory}/r.img")
                counts.append(len(os.listdir("/proc/self/fd")))
            region.unlink()
    assert counts[0] == counts[1] == counts[2]
    other.expected.append("taking down the mount")
    other.start()


def test_an_ordinary_user(here: Daemon, directory: Path) -> None:
    """With nothing but their own rights; and another's region is not taken for an image."""
    store = directory / "store"
    store.mkdir()
    os.chown(store, 65534, 65534)
    program = f"""
import ctypes, os, platform
import obstore.store  # an ordinary user may not be able to enter where it lies
import libmshare.images.pull, libmshare.images.push
from libmshare import Region
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as after exec
url = "file://{store}/mine.img"
with Region.create("mine", {SIZE}) as region:
    region[5] = 5
    pushed = region.push(url)
    region.unlink()
with Region.pull(url, mode=0o644) as region:
    assert region[5] == 5
print(pushed.digest)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd="/",
        env={**os.environ, "HOME": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(RegionExists, match="another user"):
        Region.pull(f"file://{store}/mine.img", digest=done.stdout.strip())
    os.unlink(here.mount / "mine")


def test_a_signal_ends_it(here: Daemon, directory: Path) -> None:
    """Ctrl-C, and nothing is left."""
    url = f"file://{directory}/store/r.img"
    with Region.create("r", SIZE) as region:
        region.buf[:] = random.Random(3).randbytes(SIZE)
        region.push(url)
        region.unlink()

    class EnoughError(Exception):
        pass

    def handler(*_: object) -> None:
        raise EnoughError

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for delay in (0.001, 0.01, 0.03, 0.06):
            with contextlib.suppress(EnoughError):
                signal.setitimer(signal.ITIMER_REAL, delay)
                Region.pull(url).close()
            signal.setitimer(signal.ITIMER_REAL, 0)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(here.mount / "r")
            # (A handler may raise between any two steps: the name that is a lock may stay.)
            assert set(named(here)) <= {"r.pulling"}
        with Region.pull(url) as region:
            region.unlink()
    finally:
        signal.signal(signal.SIGALRM, before)
