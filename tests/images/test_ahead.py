"""The first part comes while the region is made, in pieces; and whatever goes wrong with that."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, eventually, temporary
from machines import SIZE, named
from machines import both_fixture as _both  # noqa: F401 - a fixture
from machines import here_fixture as _here  # noqa: F401 - a fixture
from objectstores import Bad, bad_server

from libmshare import ImageError, Region
from libmshare.images import store as stores
from libmshare.images.bringing import Memories
from libmshare.images.manifest import Manifest, Object, Part, digest_of, dump
from libmshare.images.units import Unit

MiB = 1 << 20
LENGTH = 4 * MiB
START = 0x2_0000_0000_0000 >> 3
PAGE = 4096
Misdeed = Callable[[Any, str], bool]


class Image:
    """Of two parts of four pieces each."""

    def __init__(self, directory: Path, server: Bad) -> None:
        self.contents = [random.Random(number).randbytes(LENGTH) for number in range(2)]
        parts = []
        for number, content in enumerate(self.contents):
            name = digest_of(content).removeprefix("sha256:")
            file = directory / "parts" / name[:2] / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            parts.append(Part(number * LENGTH, LENGTH, name))
        whole = (Object(0, SIZE, 3, shared=True),)
        manifest = Manifest(START, SIZE, os.uname().machine, "", "shm", whole, tuple(parts))
        (directory / "r.img").write_bytes(dump(manifest))
        self.first, self.second = parts
        self.url = f"{server.url}/r.img"
        self.asked: list[tuple[str, str | None]] = []
        """Which part, and which range of it."""
        self.misdeed: Misdeed = lambda _handler, _path: False
        server.misdeed = self._answers

    def _answers(self, handler: Any, path: str) -> bool:
        name = path.rpartition("/")[2]
        if "/parts/" in path:
            self.asked.append((name, handler.headers.get("Range")))
        return self.misdeed(handler, path)

    def check(self) -> None:
        with Region.pull(self.url) as region:
            for number, content in enumerate(self.contents):
                assert bytes(region.buf[number * LENGTH : (number + 1) * LENGTH]) == content
            assert not any(region.buf[2 * LENGTH : 2 * LENGTH + MiB])
            region.unlink()


@pytest.fixture
def image(here: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Image]:
    monkeypatch.setattr(stores, "PATIENCE", timedelta(seconds=1))
    with temporary() as directory, bad_server(directory) as server:
        yield Image(directory, server)
        assert named(here) == []


def test_the_first_part_comes_in_pieces_and_the_others_whole(image: Image) -> None:
    image.check()
    pieces = sorted(
        tuple(map(int, str(asked).removeprefix("bytes=").split("-")))
        for name, asked in image.asked
        if name == image.first.hash
    )
    assert pieces == [(at, at + MiB - 1) for at in range(0, LENGTH, MiB)]
    assert image.asked.count((image.second.hash, None)) == 1
    assert len(image.asked) == len(pieces) + 1


def _all_of_it(handler: Any, _path: str) -> bool:
    del handler.headers["Range"]
    return False


def _wrong(handler: Any, path: str) -> bool:
    asked = handler.headers["Range"]
    if asked and asked.startswith("bytes=0-"):
        file = handler.server.directory / path.lstrip("/")
        body = bytearray(file.read_bytes())
        body[100] ^= 1
        handler.answer(200, bytes(body))
        return True
    return False


def _refused(handler: Any, _path: str) -> bool:
    if handler.headers["Range"]:
        handler.answer(503, b"later")
        return True
    return False


def _cut(handler: Any, path: str) -> bool:
    if handler.headers["Range"]:
        file = handler.server.directory / path.lstrip("/")
        handler.answer(206, file.read_bytes()[:100], length=MiB)
        return True
    return False


@pytest.mark.parametrize("misdeed", [_all_of_it, _wrong, _refused, _cut])
def test_a_store_that_has_no_such_pieces(image: Image, misdeed: Misdeed) -> None:
    """Then the part is fetched as the others are, and what was wrong is never seen."""
    image.misdeed = misdeed
    image.check()
    assert image.asked.count((image.first.hash, None)) == 1


def test_a_first_part_that_is_gone(image: Image) -> None:
    def gone(handler: Any, path: str) -> bool:
        if path.endswith(image.first.hash):
            handler.answer(404, b"")
            return True
        return False

    image.misdeed = gone
    with pytest.raises(ImageError) as caught:
        Region.pull(image.url)
    assert caught.value.errno == errno.ENOENT
    image.misdeed = lambda _handler, _path: False
    image.check()


class EnoughError(Exception):
    """What a signal's handler raises."""


@pytest.mark.parametrize("which", [0, 1, 2], ids=["ahead", "first", "second"])
def test_a_signal_while_a_thread_begins(
    image: Image, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """The thread is there, and has not said so yet: then nobody can wait for its end."""
    over = threading.Event()
    begun: list[threading.Thread] = []

    class Late(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            eventually(lambda: begun[which].ident is not None, "a thread")
            raise EnoughError

        def set(self) -> None:
            over.wait()
            super().set()

    class Thread(threading.Thread):
        def start(self) -> None:
            if threading.current_thread() is threading.main_thread():
                begun.append(self)
                if len(begun) == which + 1:
                    self._started = Late()
            super().start()

    monkeypatch.setattr(threading, "Thread", Thread)
    try:
        with pytest.raises(EnoughError):
            Region.pull(image.url)
    finally:
        over.set()
    assert len(begun) == which + 1
    eventually(lambda: not begun[which].is_alive() and begun[which]._started.is_set(), "its end")  # type: ignore[attr-defined] # Python's own


def test_nothing_is_left_of_what_was_in_a_memory_before() -> None:
    """Where a unit has no part it is zeros, whatever came in its memory before."""
    memories = Memories()
    full = Unit(0, 2 * PAGE, (Part(0, 2 * PAGE, "a"),))
    gaps = Unit(0, 3 * PAGE, (Part(0, 1, "b"), Part(2 * PAGE, 1, "c")))
    with memories.lent(full) as memory:
        os.pwrite(memory, b"x" * 2 * PAGE, 0)
        first = memory
    with memories.lent(gaps) as memory:
        assert memory == first
        assert os.pread(memory, 4 * PAGE, 0) == bytes(3 * PAGE)
        memories.close()
        os.fstat(memory)  # who has it still has it
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)


def test_memory_of_a_call_that_failed_is_not_used_again() -> None:
    """The pager may still be about to read what is in it."""
    memories, unit = Memories(), Unit(0, PAGE, (Part(0, PAGE, "a"),))
    lent = memories.lent(unit)
    memory = lent.__enter__()
    os.pwrite(memory, b"x" * PAGE, 0)
    theirs = os.dup(memory)
    assert not lent.__exit__(OSError, OSError(errno.ETIMEDOUT, "no answer"), None)
    with memories.lent(unit) as memory:
        os.pwrite(memory, b"y" * PAGE, 0)
    memories.close()
    assert os.pread(theirs, PAGE, 0) == b"x" * PAGE
    os.close(theirs)
