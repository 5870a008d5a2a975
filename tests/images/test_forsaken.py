"""A region that is not filled, and nobody fills it any more: nobody waits for ever."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BIN, PAGE, Daemon, eventually, huge_pages, temporary
from machines import SIZE, named
from objectstores import bad_server
from test_filling import (
    HUGE,
    PIECES,
    PULL,
    STEP,
    TOUCH,
    Image,
    end,
    page,
    program,
    refuse,
    running,
)

from libmshare import ImageError, Region
from libmshare.images.crew import IN_FLIGHT

pytestmark = pytest.mark.shm_only
NOBODY = 65530
NOBODY_BRINGS = "no process that brings them was heard of"
SOME = 3
SECONDS = 5
"""After how long who waits is not kept waiting any more; a puller tells of itself once in one."""


@pytest.fixture(name="here")
def here_fixture(
    make_daemon: Callable[..., Daemon],
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Daemon]:
    """A daemon that gives up soon, of regions of the backing that is the fixture's parameter."""
    backing = getattr(request, "param", "shm")
    with huge_pages(SIZE // HUGE) if backing == "hugetlb" else contextlib.nullcontext():
        config = directory / "soon.toml"
        config.write_text(f"fill_seconds = {SECONDS}\n")
        daemon = make_daemon(
            f"--config={config}", f"--alignment={ALIGNMENT}", f"--backing={backing}"
        )
        daemon.expected += [NOBODY_BRINGS, "taking down the mount", "no huge pages are reserved"]
        daemon.start()
        monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
        yield daemon


@pytest.fixture(name="image")
def image_fixture(here: Daemon) -> Iterator[Image]:
    with temporary() as directory, bad_server(directory) as server:
        made = Image(directory, server)
        yield made
        made.release()
        leftover = named(here)
        for name in leftover:
            os.unlink(here.mount / name)
        assert leftover == []


def begun(here: Daemon) -> None:
    eventually((here.mount / "r").exists, "it has its name")


def given_up(here: Daemon) -> None:
    eventually(lambda: here.field("r", "bringer") == "given up", "it is given up")


def touches() -> subprocess.Popen[bytes]:
    """All of it, in some order; exit code 0 if everything is right."""
    return program(TOUCH, "3")


def is_right(region: Region) -> bool:
    return all(bytes(region.buf[at * STEP : at * STEP + PAGE]) == page(at) for at in range(PIECES))


def command(*words: str) -> str:
    done = subprocess.run(
        [str(BIN / "mshare"), *words], capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("here", ["shm", "hugetlb"], indirect=True)
def test_the_puller_is_killed(here: Daemon, image: Image, restarted: bool) -> None:
    """Who touches the rest has SIGBUS, everybody is told, and the next pull makes it right."""
    image.hold()
    pull = program(PULL, image.url)
    with running(pull):
        begun(here)
        eventually(lambda: len(image.fetched()) == IN_FLIGHT, "all that fit are on their way")
        image.may_answer.release(SOME)
        eventually(lambda: len(image.fetched()) == IN_FLIGHT + SOME, "some have come")
    touch = touches()
    with running(touch):
        if restarted:
            eventually(
                lambda: "handle_userfault" in Path(f"/proc/{touch.pid}/wchan").read_text(),
                "it waits",
            )
            here.kill()
            here.start()
        assert touch.wait(60) == -signal.SIGBUS
    given_up(here)
    told = json.loads(command("info", "r", "--json"))
    assert told["bringer"] == "given up" and told["awaited"] > 0
    assert "r (not filled)" in command("ls")
    assert "mshare pull of the same image" in command("info", "r")
    checks = json.loads(command("doctor", "--json"))
    (found,) = [each for each in checks if each["check"] == "region r"]
    assert found["status"] == "warn" and "no process fetches them" in found["found"]
    with Region.attach("r") as region:
        with pytest.raises(ImageError) as caught:
            region.wait_filled()
        assert caught.value.errno == errno.EIO
        image.release()
        with Region.pull(image.url) as again:
            assert again.filled and again.identity == region.identity
        assert is_right(region)
        region.unlink()
    # Nothing that had come was fetched again; a part of a huge page comes when all of it does.
    twice = SOME if told["backing"] == "hugetlb" else 0
    assert len(image.fetched()) <= PIECES + IN_FLIGHT + twice


def test_what_somebody_waits_for_is_first_for_the_next_puller_too(
    here: Daemon, image: Image
) -> None:
    """The one before was told of it, and has died with it."""
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
            eventually(lambda: last in image.fetched(), "the puller was told")
            end([pull])
            eventually(lambda: here.sharers("r") == 1, "it is known to be dead")
            image.server.requests.clear()
            second = program(PULL, image.url)
            with running(second):
                # (As many as fit are on their way, and none is answered.)
                eventually(lambda: last in image.fetched(), "it is among the first")
                image.release()
                assert touch.wait(60) == 0 and second.wait(60) == 0
    os.unlink(here.mount / "r")


def test_who_had_sigbus_before_has_it_when_it_is_pulled(here: Daemon, image: Image) -> None:
    """A process that handles the signal, or has EFAULT: the very same one is served then."""
    image.hold()
    pull = program(PULL, image.url)
    with running(pull):
        begun(here)
    with Region.attach("r") as region:
        with pytest.raises(ImageError, match="pull it again"):
            region.populate(0, PAGE)
        with Region.pull(image.url, wait=False) as again:  # by a process of its own
            eventually(lambda: here.field("r", "bringer").isdecimal(), "somebody brings it")
            image.release()
            again.wait_filled(60)
        assert is_right(region)
        region.unlink()


@pytest.mark.timeout(120)
def test_a_puller_that_is_slow_is_not_given_up(here: Daemon, image: Image) -> None:
    """A store that has nothing for long: whoever waits does so."""
    image.hold()
    pull = program(PULL, image.url)
    with running(pull):
        begun(here)
        touch = touches()
        with running(touch):
            time.sleep(2 * SECONDS)
            assert here.field("r", "bringer") == str(pull.pid)
            assert touch.poll() is None
            image.release()
            assert touch.wait(60) == 0 and pull.wait(60) == 0
    assert NOBODY_BRINGS not in here.log()
    os.unlink(here.mount / "r")


@pytest.mark.timeout(120)
def test_a_puller_that_is_stopped(here: Daemon, image: Image) -> None:
    """It is as good as dead, although it has the lock: another one goes on; and so does it."""
    image.hold()
    pull = program(PULL, image.url)
    with running(pull):
        begun(here)
        eventually(lambda: len(image.fetched()) == IN_FLIGHT, "all that fit are on their way")
        pull.send_signal(signal.SIGSTOP)
        image.release()
        touch = touches()
        with running(touch):
            assert touch.wait(60) == -signal.SIGBUS
        with Region.pull(image.url) as region:
            assert is_right(region)
        pull.send_signal(signal.SIGCONT)
        assert pull.wait(60) == 0
    os.unlink(here.mount / "r")


@pytest.mark.timeout(120)
def test_the_store_is_gone_for_ever(here: Daemon, image: Image) -> None:
    """Who pulls says so, and ends; of a pull that nobody waits for nobody is told but here."""
    image.hold()
    region = Region.pull(image.url, wait=False)
    with region:
        image.server.misdeed = refuse
        image.release()
        touch = touches()
        with running(touch):
            assert touch.wait(60) == -signal.SIGBUS
        with pytest.raises(ImageError, match="nobody fetches"):
            region.wait_filled()
        image.server.misdeed = lambda _handler, _path: False
        with Region.pull(image.url) as again:
            assert again.identity == region.identity and is_right(again)
        region.unlink()


READ_AS_NOBODY = f"""
import libmshare.images.pull, libmshare.images.told, obstore.store  # who it is may not read these
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
os.environ["HOME"] = "/nonexistent"
try:
    with Region.pull(sys.argv[1]) as region:
        right = all(bytes(region.buf[n * STEP : n * STEP + PAGE]) == page(n) for n in range(PIECES))
        sys.exit(0 if right else 1)
except OSError as error:
    print(error, flush=True)
    sys.exit(error.errno)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("goes_on", [False, True])
def test_another_user_pulls_what_root_has_begun(
    here: Daemon, image: Image, goes_on: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """It may only read it, and so cannot fill it: it has it filled, or is told whose it is."""
    image.hold()
    first = program("Region.pull(sys.argv[1], mode=0o644)", image.url)
    with running(first):
        begun(here)
    reader = program(READ_AS_NOBODY, image.url)
    with running(reader):
        eventually(lambda: here.sharers("r") == 1, "it waits")
        if not goes_on:
            assert reader.wait(60) == errno.EIO
            assert "user 0" in capfd.readouterr().out
            assert (here.mount / "r").exists()
            return _filled(here, image)
        second = program(PULL, image.url)
        with running(second):
            eventually(lambda: here.field("r", "bringer") == str(second.pid), "it is brought")
            image.release()
            assert reader.wait(60) == 0 and second.wait(60) == 0
    os.unlink(here.mount / "r")
    return None


def _filled(here: Daemon, image: Image) -> None:
    """By root, after all."""
    image.release()
    with contextlib.closing(Region.pull(image.url)) as region:
        assert is_right(region)
    os.unlink(here.mount / "r")
