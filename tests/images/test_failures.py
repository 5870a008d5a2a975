"""Whatever fails: an error that says so, nothing that is half filled, and nothing that stays."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import Daemon, eventually, temporary
from machines import SIZE, named
from machines import both_fixture as _both  # noqa: F401 - a fixture
from machines import here_fixture as _here  # noqa: F401 - a fixture
from objectstores import Bad, bad_server, free_ports
from objectstores import s3_fixture as _s3  # noqa: F401 - a fixture
from objectstores import sources_fixture as _sources  # noqa: F401 - a fixture

from libmshare import ImageError, NoMemory, Region, RegionExists
from libmshare.images import store as stores
from libmshare.images.load import load
from libmshare.images.manifest import PART, digest_of, parse
from libmshare.texts import parse_maps

Sources = Callable[[str], Path]
AT = (0, PART + 5 * 4096, 2 * PART, 3 * PART - 4096)
"""Where the image has contents; the last are in two parts."""
PARTS = 5


class Image:
    """One, in a directory that a server shows which does what it is told."""

    def __init__(self, directory: Path, server: Bad) -> None:
        self.server = server
        self.file = f"file://{directory}/r.img"
        self.url = f"{server.url}/r.img"
        self.manifest = directory / "r.img"
        self.contents = [random.Random(at).randbytes(8192) for at in AT]
        self.digest = digest_of(self.manifest.read_bytes()) if self.manifest.exists() else ""

    def push(self, *, changed: bool = False) -> str:
        with Region.create("pushed", SIZE) as region:
            for at, content in zip(AT, self.contents, strict=True):
                region[at : at + 8192] = content[::-1] if changed else content
            pushed = region.push(self.file)
            region.unlink()
        return pushed.digest

    def is_in(self, region: Region) -> bool:
        return all(
            bytes(region.buf[at : at + 8192]) == content
            for at, content in zip(AT, self.contents, strict=True)
        )

    def parts(self) -> list[Path]:
        return sorted(
            path for path in (self.manifest.parent / "parts").rglob("*") if path.is_file()
        )

    def check(self) -> None:
        """It can be pulled, and is right."""
        self.server.misdeed = lambda _handler, _path: False
        with Region.pull(self.url) as region:
            assert self.is_in(region)
            region.unlink()


@pytest.fixture(scope="module")
def pushed(both: tuple[Daemon, Daemon]) -> Iterator[Path]:
    """A store with the image, of which each test has a copy."""
    with temporary() as directory, bad_server(directory) as server:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("MSHARE_ROOT", str(both[0].mount))
            Image(directory, server).push()
        yield directory


@pytest.fixture
def image(here: Daemon, pushed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Image]:
    monkeypatch.setattr(stores, "PATIENCE", timedelta(seconds=1))
    monkeypatch.setattr(stores, "ANSWER", timedelta(seconds=2))
    with temporary() as directory, bad_server(directory) as server:
        shutil.copytree(pushed, directory, dirs_exist_ok=True)
        made = Image(directory, server)
        assert len(made.parts()) == PARTS
        yield made
        leftover = named(here)
        for name in leftover:
            os.unlink(here.mount / name)
        assert leftover == []


def fails(image: Image, *codes: int) -> ImageError:
    with pytest.raises(ImageError) as caught:
        Region.pull(image.url)
    assert caught.value.errno in codes, caught.value
    assert "\n" not in str(caught.value)
    return caught.value


def once(misdeed: Callable[[str], bool]) -> Callable[[str], bool]:
    done: set[str] = set()

    def decide(path: str) -> bool:
        if path in done or not misdeed(path):
            return False
        done.add(path)
        return True

    return decide


def is_part(path: str) -> bool:
    return "/parts/" in path


def test_each_part_is_fetched_once(image: Image) -> None:
    """Also by those who come at one time; each has it then."""
    program = (
        "import sys\nfrom libmshare import Region\n"
        "with Region.pull(sys.argv[1]) as r: print(r.identity.id)"
    )
    pullers = [
        subprocess.Popen([sys.executable, "-c", program, image.url], stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    found = {puller.communicate(timeout=60)[0] for puller in pullers}
    assert len(found) == 1 and all(puller.returncode == 0 for puller in pullers)
    asked = Counter(path for path in image.server.requests if is_part(path))
    assert len(asked) == PARTS and set(asked.values()) == {1}
    with Region.attach("r") as region:
        assert image.is_in(region)
        region.unlink()


def test_nobody_is_there(image: Image) -> None:
    good, image.url = image.url, f"http://127.0.0.1:{free_ports(1)[0]}/r.img"
    fails(image, errno.EHOSTUNREACH, errno.ETIMEDOUT)
    image.url = good
    image.check()


@pytest.mark.parametrize(
    ("code", "number"),
    [(403, errno.EACCES), (401, errno.EACCES), (404, errno.ENOENT), (503, errno.EHOSTUNREACH)],
)
@pytest.mark.parametrize("which", ["manifest", "part"])
def test_an_answer_that_says_no(image: Image, which: str, code: int, number: int) -> None:
    def misdeed(handler: object, path: str) -> bool:
        if is_part(path) == (which == "part"):
            handler.answer(code, b"no")  # type: ignore[attr-defined] # the server's
            return True
        return False

    image.server.misdeed = misdeed
    fails(image, number)
    image.check()


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("how", ["cut", "short", "long", "wrong", "zeros", "hang", "503"])
def test_an_answer_that_is_wrong(image: Image, how: str, again: bool) -> None:
    """Once, it is asked again; always, and it is an error."""
    bad = image.parts()[1].name
    chosen = (lambda path: path.endswith(bad)) if again else once(lambda path: path.endswith(bad))
    let_go = threading.Event()

    def misdeed(handler: object, path: str) -> bool:
        if not chosen(path):
            return False
        answer = handler.answer  # type: ignore[attr-defined] # the server's
        body = (image.server.directory / path.lstrip("/")).read_bytes()
        if how == "cut":
            answer(200, body[:-100], length=len(body))
        elif how == "short":
            answer(200, body[:-100])
        elif how == "long":
            answer(200, body + b"more")
        elif how == "wrong":
            answer(200, body[:-1] + bytes([body[-1] ^ 1]))
        elif how == "zeros":
            answer(200, bytes(len(body)))
        elif how == "hang":
            let_go.wait(60)
        else:
            answer(503, b"later")
        return True

    image.server.misdeed = misdeed
    try:
        if again:
            error = fails(image, errno.EIO, errno.EHOSTUNREACH, errno.ETIMEDOUT)
            assert bad in str(error)
        else:
            with Region.pull(image.url) as region:
                assert image.is_in(region)
                region.unlink()
    finally:
        let_go.set()
    image.check()


def test_an_image_that_is_replaced_meanwhile(image: Image) -> None:
    """It is the one that was begun, and no other; or, if its parts go, none."""
    replace = once(is_part)

    def misdeed(_: object, path: str) -> bool:
        if replace(path) and len(image.server.requests) == 2:
            image.push(changed=True)
        return False

    image.server.requests.clear()
    image.server.misdeed = misdeed
    with Region.pull(image.url) as region:
        assert image.is_in(region)
        with pytest.raises(RegionExists):
            Region.pull(image.url, digest="sha256:" + "1" * 64)
        region.unlink()
    with pytest.raises(ImageError):  # it is pinned
        Region.pull(image.url, digest=image.digest)
    image.contents = [content[::-1] for content in image.contents]
    image.check()
    image.parts()[0].unlink()
    for part in image.parts():
        part.unlink()
    fails(image, errno.ENOENT)


def test_an_object_that_is_replaced_meanwhile(here: Daemon, image: Image) -> None:
    """It is of one version, or there is no region; whatever the server thinks of conditions."""
    file = image.manifest.parent / "object"
    file.write_bytes(bytes(range(1, 256)) * (PART // 100))
    url = f"{image.server.url}/object"
    with load("raw", url) as region:
        assert bytes(region.buf) == file.read_bytes()
        region.unlink()
    seen: list[str] = []

    def misdeed(handler: object, path: str) -> bool:
        seen.append(path)
        if len(seen) == 3:
            other = file.with_suffix(".new")
            other.write_bytes(file.read_bytes()[::-1])
            other.rename(file)  # nobody sees a part of it
        return False

    image.server.misdeed = misdeed
    with pytest.raises(ImageError) as caught:
        load("raw", url)
    assert caught.value.errno == errno.ESTALE
    assert not (here.mount / "raw").exists()


def test_what_is_no_image_is_not_one(image: Image) -> None:
    image.manifest.write_bytes(image.manifest.read_bytes()[:-20])
    fails(image, errno.EBADMSG)
    image.manifest.write_bytes(b"<html>")
    fails(image, errno.EBADMSG)


def test_it_does_not_fit(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is known before anything is fetched, or found out in time: no SIGBUS."""

    class Little:
        f_bavail, f_frsize = 1, 4096

    image.server.requests.clear()
    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", lambda _: Little)
        with pytest.raises(NoMemory) as caught:
            Region.pull(image.url)
    assert caught.value.errno == errno.ENOSPC
    assert not any(map(is_part, image.server.requests))
    image.check()


def test_a_user_may_not_have_so_much(
    make_daemon: Callable[..., Daemon], image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is met when it is filled: an error, and not SIGBUS."""
    daemon = make_daemon()
    config = daemon.directory / "config"
    config.write_text('alignment = "2M"\n[limits.user.root]\nmemory = "128K"\n')
    daemon.arguments = (f"--config={config}",)
    daemon.expected.append("memory")
    daemon.start()
    with monkeypatch.context() as patched:
        patched.setenv("MSHARE_ROOT", str(daemon.mount))
        with pytest.raises(NoMemory):
            Region.pull(image.url)
        assert named(daemon) == []
    image.check()


PROGRAM = """
import itertools, os, signal, sys
import libmshare.core, libmshare.images.pull, libmshare.images.store, libmshare.touching
from libmshare import Region
url, where, when, which = sys.argv[1:]
module, _, name = where.rpartition(".")
owner = eval(module)
right, calls = getattr(owner, name), itertools.count(1)
def wrong(*arguments, **options):
    call = next(calls)
    if call == int(which) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = right(*arguments, **options)
    if call == int(which):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, wrong)
Region.pull(url, mode=0o644)
"""
BEFORE = [
    ("os.pwrite", "before", 1),
    ("os.pwrite", "after", 1),
    ("libmshare.waiting.apart", "after", 1),
    ("libmshare.core.mshare_mmap", "after", 1),
    ("libmshare.core.mshare_await", "after", 2),
    ("os.chmod", "before", 1),
    ("os.setxattr", "before", 1),
    ("os.rename", "before", 1),
]
FILLING = [
    ("os.rename", "after", 1),
    ("libmshare.images.store.Store.part", "after", 2),
    ("libmshare.core.mshare_fill", "before", 2),
    ("libmshare.core.mshare_fill", "after", 4),
]


def killed(image: Image, where: str, when: str, which: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, image.url, where, when, str(which)],
        check=False,
        timeout=60,
    )
    assert done.returncode == -9


@pytest.mark.parametrize(("where", "when", "which"), BEFORE)
def test_whoever_pulls_is_killed(
    here: Daemon, image: Image, where: str, when: str, which: int
) -> None:
    """As long as there is no region, nothing is left; and then it is pulled anew."""
    killed(image, where, when, which)
    assert not (here.mount / "r").exists()
    eventually(lambda: here.shm_objects() == [], "no memory is left")
    leftover = [name for name in named(here) if name.startswith("pull-")]
    assert not leftover or where == "os.pwrite"
    for name in leftover:
        os.unlink(here.mount / name)
    image.check()
    # What held others off may stay as a name without memory; who pulls takes it away.
    assert not (here.mount / "r.pulling").exists()


def awaited_parts(daemon: Daemon, image: Image, region: Region) -> int:
    """How many parts of the image have not come."""
    lines = parse_maps(daemon.info("r", "maps"))
    ranges = [(line["start"], line["end"]) for line in lines if "[awaited:" in line["name"]]
    parts = [region.start + part.offset for part in parse(image.manifest.read_bytes()).parts]
    return sum(any(start <= part < end for start, end in ranges) for part in parts)


@pytest.mark.parametrize(("where", "when", "which"), FILLING)
def test_whoever_fills_is_killed(
    here: Daemon, image: Image, where: str, when: str, which: int
) -> None:
    """What has come stays, nobody sees the rest, and the next one fetches that alone."""
    killed(image, where, when, which)
    with Region.attach("r") as region:
        eventually(lambda: here.sharers("r") == 1, "it is known to be dead")
        left = awaited_parts(here, image, region)
        assert left and not region.filled
        with pytest.raises(TimeoutError):
            region.wait_filled(0.05)
        image.server.requests.clear()
        with Region.pull(image.url) as again:
            assert again.identity == region.identity
            assert region.filled and image.is_in(region)
        fetched = [path for path in image.server.requests if is_part(path)]
        assert len(fetched) == len(set(fetched)) == left
        region.unlink()
    assert not (here.mount / "r.pulling").exists()


def test_the_daemon_is_killed(here: Daemon, image: Image) -> None:
    """In the middle of it: the next one goes on, and so does the pull."""
    here.expected.append("taking down the mount")
    first = once(is_part)

    def misdeed(_: object, path: str) -> bool:
        if first(path) and path.endswith(image.parts()[0].name):
            here.kill()
            threading.Thread(target=here.start).start()
        return False

    image.server.misdeed = misdeed
    with Region.pull(image.url) as region:
        assert image.is_in(region)
        region.unlink()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "r.img",
        "ftp://host/r.img",
        "s3:///r.img",
        "s3://images/",
        "s3://images/..",
        "http://[/x",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ImageError) as caught:
        stores.Url(url)
    assert caught.value.errno == errno.EINVAL


def test_who_was_forked_after_a_store_was_used(image: Image) -> None:
    """It is told so, and does not wait for threads that are not there."""
    image.check()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(ImageError):
            Region.pull(image.url, "other")
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
