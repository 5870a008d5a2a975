"""A region is used while it is filled: never zeros, what is waited for first, nothing twice."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bare import in_child
from conftest import ALIGNMENT, BIN, PAGE, Daemon, eventually, huge_pages, temporary
from machines import SIZE, named
from machines import both_fixture as _both  # noqa: F401 - a fixture
from machines import here_fixture as _here  # noqa: F401 - a fixture
from objectstores import Bad, bad_server

from libmshare import Busy, ImageError, NoMemory, Region, RegionExists
from libmshare.images.bringing import Turns
from libmshare.images.crew import IN_FLIGHT
from libmshare.images.manifest import Manifest, Object, Part, digest_of, dump
from libmshare.images.units import Unit, jobs_of, units_of

PIECES = 48
"""Parts of the image, each a page that has its own contents."""
STEP = SIZE // PIECES // PAGE * PAGE
START = 0x2_0000_0000_0000 >> 3
TOUCHERS = 16
HUGE = 2 << 20
KILLS = int(os.environ.get("MSHARE_KILLS", "4"))


def page(number: int) -> bytes:
    return random.Random(number).randbytes(PAGE)


class Image:
    """One of many small parts, on a server whose answers can be held back."""

    def __init__(self, directory: Path, server: Bad) -> None:
        parts = []
        for number in range(PIECES):
            name = digest_of(page(number)).removeprefix("sha256:")
            file = directory / "parts" / name[:2] / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(page(number))
            parts.append(Part(number * STEP, PAGE, name))
        manifest = Manifest(
            START, SIZE, os.uname().machine, "", "shm", (Object(0, SIZE, 3, True),), tuple(parts)
        )
        (directory / "r.img").write_bytes(dump(manifest))
        self.names = [part.hash for part in parts]
        self.server, self.url = server, f"{server.url}/r.img"
        self.may_answer = threading.Semaphore(0)
        self.held = False
        server.misdeed = self._wait

    def _wait(self, _handler: object, path: str) -> bool:
        while self.held and "/parts/" in path and not self.may_answer.acquire(timeout=0.1):
            pass
        return False

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False

    def fetched(self) -> list[int]:
        """Which parts were asked for, in order."""
        names = [path.rpartition("/")[2] for path in self.server.requests if "/parts/" in path]
        return [self.names.index(name) for name in names]


@pytest.fixture
def image(here: Daemon) -> Iterator[Image]:
    with temporary() as directory, bad_server(directory) as server:
        made = Image(directory, server)
        yield made
        made.release()
        leftover = named(here)
        for name in leftover:
            os.unlink(here.mount / name)
        assert leftover == []


def program(text: str, *arguments: str) -> subprocess.Popen[bytes]:
    head = "import os, random, sys\nfrom libmshare import Region\n"
    head += f"PIECES, STEP, PAGE = {PIECES}, {STEP}, {PAGE}\n"
    head += "def page(number): return random.Random(number).randbytes(PAGE)\n"
    return subprocess.Popen([sys.executable, "-c", head + text, *arguments])


PULL = "Region.pull(sys.argv[1], mode=0o666)"
PULL_WHEN_MOUNTED = f"""
from libmshare import DaemonGone, NotMounted
while True:
    try:
        {PULL}
        break
    except (DaemonGone, NotMounted):  # between two daemons
        pass
"""
TOUCH = """
with Region.attach("r") as region:
    order = list(range(PIECES))
    random.Random(int(sys.argv[1])).shuffle(order)
    for number in order:
        assert bytes(region.buf[number * STEP : number * STEP + PAGE]) == page(number), number
        region[number * STEP + PAGE - 1] = page(number)[-1]
"""


def end(made: Iterable[subprocess.Popen[bytes]]) -> None:
    for each in made:
        each.kill()
        each.wait()


@contextlib.contextmanager
def running(*made: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        end(made)


def test_others_use_it_while_it_is_filled(here: Daemon, image: Image) -> None:
    """Who touches what is not there yet waits; it is neither pushed nor protected meanwhile."""
    image.hold()
    pull = program(PULL, image.url)
    with running(pull):
        eventually((here.mount / "r").exists, "it has its name")
        with Region.attach("r") as region:
            assert not region.filled
            assert region[PAGE] == 0  # what has no contents is there at once
            touch = program(TOUCH, "1")
            with running(touch):
                with pytest.raises(TimeoutError):
                    region.wait_filled(0.2)
                assert touch.poll() is None
                with pytest.raises(Busy):
                    region.push(f"file://{here.directory}/again.img")
                image.release()
                assert touch.wait(60) == 0 and pull.wait(60) == 0
            region.wait_filled(30)
            assert sorted(image.fetched()) == list(range(PIECES))
            region.unlink()


def test_what_somebody_waits_for_comes_first(here: Daemon, image: Image) -> None:
    """As soon as one more can be fetched at all."""
    image.hold()
    pull = program(PULL, image.url)
    last = PIECES - 1
    look = f"with Region.attach('r') as region: assert region[{last * STEP}] == {page(last)[0]}"
    with running(pull):
        eventually(lambda: len(image.fetched()) == IN_FLIGHT, "all that fit are on their way")
        touch = program(look)
        with running(touch):
            eventually(
                lambda: "handle_userfault" in Path(f"/proc/{touch.pid}/wchan").read_text(),
                "somebody waits",
            )
            image.may_answer.release(1)
            eventually(lambda: len(image.fetched()) > IN_FLIGHT, "the next one")
            assert image.fetched()[IN_FLIGHT] == last
            image.release()
            assert touch.wait(60) == 0
        assert pull.wait(60) == 0
    os.unlink(here.mount / "r")


@pytest.mark.timeout(120 + 10 * KILLS)
def test_many_touch_while_everybody_is_killed(here: Daemon, image: Image) -> None:
    """Daemon and puller, at random: never zeros, and what has come is not fetched again."""
    here.expected.append("taking down the mount")
    chance = random.Random()
    image.hold()
    pull = program(PULL, image.url)
    made = [pull]
    with contextlib.ExitStack() as stack:
        eventually((here.mount / "r").exists, "it has its name")
        made.extend(program(TOUCH, str(number)) for number in range(TOUCHERS))
        stack.callback(end, made)
        eventually(lambda: here.sharers("r") > TOUCHERS, "all are there")
        killed = 0
        for number in range(KILLS):
            for _ in range(chance.randrange(1 + PIECES // KILLS)):
                image.may_answer.release()
            time.sleep(chance.random() / 10)
            if number % 2:
                here.kill()
                here.start()
            else:
                pull.kill()
                pull.wait()
                killed += 1
                pull = program(PULL_WHEN_MOUNTED, image.url)
                made.append(pull)
        image.release()
        for each in made[1 : 1 + TOUCHERS]:
            assert each.wait(60) == 0
        assert pull.wait(60) == 0
        with Region.attach("r") as region:
            assert region.filled
            for number in range(PIECES):
                assert bytes(region.buf[number * STEP : number * STEP + PAGE]) == page(number)
            region.unlink()
    # Only what was on its way when the puller was killed is fetched again.
    assert sum(Counter(image.fetched()).values()) <= PIECES + killed * IN_FLIGHT


def test_who_does_not_wait_has_it_at_once(here: Daemon, image: Image) -> None:
    """A process of its own fills it; what goes wrong before is said as in any pull."""
    image.hold()
    region = Region.pull(image.url, wait=False)
    with region:
        assert not region.filled and region.name == "r"
        with Region.pull(image.url, wait=False) as again:
            assert again.identity == region.identity and not again.filled
        last = (PIECES - 1) * STEP
        image.release()
        region.populate(last, PAGE)  # (The server is in this process, and needs the interpreter.)
        assert bytes(region.buf[last : last + PAGE]) == page(PIECES - 1)
        region.wait_filled(60)
        assert sorted(image.fetched()) == list(range(PIECES))
        with Region.pull(image.url, wait=False) as again:
            assert again.identity == region.identity
        region.unlink()
    with pytest.raises(ImageError) as caught:
        Region.pull(image.url.replace("r.img", "s.img"), wait=False)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(ValueError, match="progress"):
        Region.pull(image.url, wait=False, progress=print)
    with Region.create("r", SIZE) as other:
        with pytest.raises(RegionExists):
            Region.pull(image.url, wait=False)
        other.unlink()


def test_the_command_does_not_wait(here: Daemon, image: Image) -> None:
    image.hold()
    done = subprocess.run(
        [str(BIN / "mshare"), "pull", image.url, "--no-wait"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["name"] == "r"
    assert int(here.field("r", "awaited")) > 0
    image.release()
    eventually(lambda: here.field("r", "awaited") == "0", "it is filled")
    os.unlink(here.mount / "r")


def refuse(handler: Any, path: str) -> bool:
    """No part is to be had."""
    if "/parts/" in path:
        handler.answer(403, b"")
    return "/parts/" in path


def test_a_pull_that_fails_leaves_what_others_use(here: Daemon, image: Image) -> None:
    """They wait for the rest, and whoever pulls it then goes on."""
    image.hold()
    pull = program(f"try: {PULL}\nexcept OSError as error: sys.exit(error.errno)", image.url)
    with running(pull):
        eventually((here.mount / "r").exists, "it has its name")
        with Region.attach("r") as region:
            image.server.misdeed = refuse
            image.release()
            assert pull.wait(60) == errno.EACCES
            assert (here.mount / "r").exists() and not region.filled
            image.server.misdeed = lambda _handler, _path: False
            with Region.pull(image.url) as again:
                assert again.filled and again.identity == region.identity
            region.unlink()


def test_a_user_with_too_little_memory(
    make_daemon: Callable[..., Daemon],
    image: Image,
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
) -> None:
    """It is said, and nothing is there then."""
    config = directory / "limits.toml"
    config.write_text('region_memory = "64K"\n')
    daemon = make_daemon(f"--config={config}")
    daemon.expected.append("memory")
    daemon.start()
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    with pytest.raises(NoMemory):
        Region.pull(image.url)
    assert named(daemon) == []
    eventually(lambda: daemon.shm_objects() == [], "no memory is left")


# -- what is brought at one time, and in which order --


def test_who_is_waited_for_has_the_next_turn() -> None:
    """And else they come in order, whoever was there first."""
    turns, came = Turns(), list[int]()
    threads = []

    def take(number: int) -> None:
        with turns.turn(number):
            came.append(number)

    with turns.turn(0):
        for number in (5, 2, 9, 7):
            thread = threading.Thread(target=take, args=(number,))
            thread.start()
            threads.append(thread)
        eventually(lambda: len(turns._waiting) == 4, "all of them wait")
        turns.urge(7)
        turns.urge(1)  # which is not there yet
    for thread in threads:
        thread.join()
    assert came == [7, 2, 5, 9]


def test_who_becomes_urgent_has_the_turn_that_nobody_has_taken_yet() -> None:
    """Those who were woken for it saw that it was another one's, and that one will see the same."""
    turns, came = Turns(), list[int]()

    def take(number: int) -> None:
        with turns.turn(number):
            came.append(number)

    with turns.turn(0):
        for number in (5, 7):
            threading.Thread(target=take, args=(number,), daemon=True).start()
        eventually(lambda: len(turns._waiting) == 2, "both wait")
        with turns._changed:
            turns._taken = False
        turns.urge(7)
        eventually(lambda: came == [7, 5], "both have had it")


def test_a_turn_ends_with_a_failure() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="no"), turns.turn(1):
        raise ValueError("no")
    with turns.turn(2):
        pass


def manifest(*parts: tuple[int, int, str]) -> Manifest:
    made = tuple(Part(*each) for each in parts)
    return Manifest(START, SIZE, "x86_64", "", "shm", (Object(0, SIZE, 3, True),), made)


def test_units_are_whole_pages() -> None:
    """Parts that meet in a page come together, and those that only touch do not."""
    image = manifest((0, 4096, "a"), (8192, 100, "b"), (16384, 8192, "c"), (24576, 1, "d"))
    small = units_of(image, 4096)
    assert [(unit.start, unit.end) for unit in small] == [
        (0, 4096), (8192, 12288), (16384, 24576), (24576, 28672),
    ]  # fmt: skip
    (large,) = units_of(image, 2 << 20)
    assert (large.start, large.end) == (0, 2 << 20)
    assert [part.hash for part in large.parts] == ["a", "b", "c", "d"]
    assert units_of(manifest(), 4096) == []


def test_equal_parts_are_fetched_once() -> None:
    """Whatever lies between them, all that has one of them is one job."""
    image = manifest(
        (0, 4096, "a"), (4096, 4096, "b"), (8192, 4096, "a"), (12288, 4096, "c"), (16384, 9, "a")
    )
    jobs = [[unit.start for unit in job] for job in jobs_of(units_of(image, 4096))]
    assert jobs == [[0, 8192], [4096], [12288], [16384]]  # (the last is of another length)
    chained = [
        Unit(0, 1, (Part(0, 1, "a"), Part(0, 1, "b"))),
        Unit(1, 2, (Part(1, 1, "c"),)),
        Unit(2, 3, (Part(2, 1, "b"), Part(2, 1, "d"))),
        Unit(3, 4, (Part(3, 1, "d"),)),
    ]
    assert [[unit.start for unit in job] for job in jobs_of(chained)] == [[0, 2, 3], [1]]


def test_on_huge_pages(
    make_daemon: Callable[..., Daemon], image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where many parts lie in one page, that comes when it is whole."""
    with huge_pages(SIZE // HUGE):
        daemon = make_daemon("--backing=hugetlb", f"--alignment={ALIGNMENT}")
        daemon.expected.append("no huge pages are reserved")
        daemon.start()
        monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
        image.hold()
        pull = program(PULL, image.url)
        with running(pull):
            eventually((daemon.mount / "r").exists, "it has its name")
            touch = program(TOUCH, "1")
            with running(touch):
                image.release()
                assert touch.wait(60) == 0 and pull.wait(60) == 0
        with Region.attach("r") as region:
            assert region.filled
            for number in range(PIECES):
                assert bytes(region.buf[number * STEP : number * STEP + PAGE]) == page(number)
            region.unlink()
        assert sorted(image.fetched()) == list(range(PIECES))


NOBODY, MALLORY = 65530, 65531


def test_a_name_of_another_user_holds_nobody_off(here: Daemon, image: Image) -> None:
    """The lock that has one of several fetch is the user's own."""

    def hold() -> None:
        fd = os.open(here.mount / "r.pulling", os.O_CREAT | os.O_RDWR, 0o600)
        os.fchmod(fd, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX)
        signal.pause()

    held = in_child(hold, uid=MALLORY)
    eventually(lambda: _mode(here.mount / "r.pulling") == 0o666, "it is held")
    pull = program(PULL, image.url)
    with running(pull):
        assert pull.wait(20) == 0
    held.kill()
    os.unlink(here.mount / "r.pulling")
    os.unlink(here.mount / "r")


def _mode(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mode & 0o777
    return -1


PULL_AS_NOBODY = f"""
import libmshare.images.pull, obstore.store  # whoever it is may not read these
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
os.environ["HOME"] = "/nonexistent"
with Region.pull(sys.argv[1], mode=0o444) as region:
    assert region.filled and bytes(region.buf[:PAGE]) == page(0)
"""


def test_what_its_owner_may_not_write_is_gone_on_with(here: Daemon, image: Image) -> None:
    """Whatever mode was asked for; and it has that mode when it is filled."""
    image.hold()
    first = program(PULL_AS_NOBODY, image.url)
    with running(first):
        eventually((here.mount / "r").exists, "it has its name")
    image.release()
    eventually(lambda: here.sharers("r") == 0, "it is known to be dead")
    assert int(here.field("r", "awaited"))
    second = program(PULL_AS_NOBODY, image.url)
    with running(second):
        assert second.wait(30) == 0
    assert _mode(here.mount / "r") == 0o444
    os.unlink(here.mount / "r")
