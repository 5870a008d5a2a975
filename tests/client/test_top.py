"""`mshare top`: what is on the screen, through a pseudo terminal and a terminal's emulator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from command import MSHARE, Command, Terminal, donate, environment, make
from command import mshare_fixture as _mshare  # noqa: F401 - what tests ask for
from command import terminal_fixture as _terminal  # noqa: F401 - the same
from conftest import ALIGNMENT, BASE, Client, Daemon, eventually
from test_cli import stopped

from libmshare.cli import output
from libmshare.cli.regions import Region
from libmshare.cli.screen import Screen, Seen, heading, page
from libmshare.cli.views import Order
from libmshare.texts import Sharer

SINCE = "2026-01-01T00:00:00Z"


def region(number: int, **info: object) -> Region:
    name = b"region-%03d" % number
    told = {
        "name": name.decode(),
        "state": "live",
        "start": f"{BASE + number * ALIGNMENT:#x}",
        "size": ALIGNMENT,
        "memory": number << 20,
        "backing": "shm x",
        "sharers": 2,
        "faults": 10 * number,
        "populated": number << 20,
        "huge": 0,
    } | info
    texts = {key: str(value) for key, value in told.items()}
    return Region(name, 0o600, 0, 0, int(texts["memory"]), texts, name)


def seen(count: int, at: float = 0.0, **info: object) -> Seen:
    found = [region(number, **info) for number in range(count)]
    sharers = [
        (each, Sharer(1 << 30 | 2 * number + which, 0, "read-write", SINCE, "a program"))
        for number, each in enumerate(found)
        for which in (1, 0)
    ]
    return Seen("/mnt", at, found, sharers, sum(each.number("faults") for each in found))


def text(screen: Screen, now: Seen, width: int = 80, height: int = 24) -> list[str]:
    return [line for line, _ in screen.lines(now, None, "", width, height)]


# -- without a terminal --


@pytest.mark.parametrize("height", [3, 5, 10, 24, 50])
@pytest.mark.parametrize("width", [10, 20, 40, 60, 80, 120, 200, 300])
@pytest.mark.parametrize("count", [0, 1, 200])
def test_it_fits_every_screen(width: int, height: int, count: int) -> None:
    lines = text(Screen(Order.MEMORY), seen(count), width, height)
    assert len(lines) <= height
    assert all(output.columns_of(line) <= width for line in lines)
    assert lines[-1].startswith("q quits")
    if count and width >= 40 and height >= 10:
        titles = lines[1].split()
        assert titles[:2] == ["NAME", "MEMORY"]
        assert ("MODE" in titles) == (width >= 120)
        assert sum(line.startswith("region-") for line in lines) >= min(count, 2)
        assert any("PID" in line for line in lines)


def test_every_sharer_can_be_reached() -> None:
    now, screen = seen(200), Screen(Order.NAME)
    screen.press("\t")
    found: set[str] = set()
    for _ in range(60):
        found |= {line.split()[1] for line in text(screen, now) if "read-write" in line}
        screen.press("KEY_NPAGE")
    assert found == {str(each.pid) for _, each in now.sharers}
    assert "391-400 of 400" in " ".join(text(screen, now)) or "of 400" in text(screen, now)[-1]
    screen.press("KEY_HOME")
    assert text(screen, now)[-1].split("  ")[-1].startswith("1-")


def names(screen: Screen, now: Seen, before: Seen | None = None) -> list[str]:
    lines = screen.lines(now, before, "", 300, 40)
    return [line.split()[0] for line, _ in lines[2:] if line.startswith("region-")][:5]


def test_keys() -> None:
    now, screen = seen(9), Screen(Order.MEMORY)
    assert names(screen, now)[0] == "region-008"
    screen.press("r")
    assert names(screen, now)[0] == "region-000"
    screen.press("r")
    orders = {screen.order}
    for _ in range(6):
        screen.press("s")
        orders.add(screen.order)
    assert orders == set(Order)
    screen = Screen(Order.NAME)
    for key in "/q*3x":
        screen.press(key)
    assert text(screen, now)[-1] == "/'q*3x'_"
    for key in ("KEY_BACKSPACE", "\x7f", "\b", "\b", "0", "*", "3", "\n"):
        screen.press(key)
    assert names(screen, now)[:2] == ["region-003", "region-003"]  # and its sharers
    assert "/'0*3'" in text(screen, now)[-1]
    screen.press("\x1b")
    assert len(names(screen, now)) == 5
    screen.press("KEY_DOWN")
    assert names(screen, seen(200))[0] == "region-001"
    screen.press("KEY_END")
    screen.press("KEY_RESIZE")  # and other keys that mean nothing
    assert "200 of 200" in " ".join(text(screen, seen(200)))


def test_rates() -> None:
    before, now = seen(3, 1.0), seen(3, 3.0, faults=1000, populated=50 << 20, huge=4 << 20)
    assert now.rate(None) is None
    assert now.rate(before) == (3000 - 30) / 2
    assert before.rate(now) is None
    upper, _ = page(now, before, Order.FAULTS)
    titles = [column.title for column in upper.columns]
    row = dict(zip(titles, upper.rows(0, 1)[0], strict=True))
    assert row["NAME"] == "region-000"
    assert (row["FAULTS/S"], row["MB/S"]) == ("500", f"{(50 << 20) / 2e6:.1f}")
    # Two tables of 4 KiB in each of two sharers.
    assert row["SAVED"] == "16K"
    assert "1485 faults/s" in heading(now, before)
    # Another region has taken the place.
    (first,) = seen(1, 0.0, start="0x1000").regions
    assert now.rate_of(Seen("/mnt", 0.0, [first], [], 0), now.regions[0], "faults") is None


def test_long_names_leave_room() -> None:
    long = region(1, name="x")
    long = Region(b"x" * 255, 0o600, 0, 0, 4096, long.info, b"x" * 255)
    lines = text(Screen(Order.NAME), Seen("/mnt", 0, [long], [], 0), 40)
    assert "…" in lines[2]
    assert "4K" in lines[2] or "4096" in lines[2]


# -- on terminals --


@pytest.mark.parametrize("how", ["q", "Ctrl-C", "SIGTERM"])
def test_it_shows_what_happens_and_ends(
    daemon: Daemon, terminal: Callable[..., Terminal], spawn: Callable[..., Client], how: str
) -> None:
    top = terminal("top", "--interval=0.5", columns=80, lines=24)
    top.displays("0 regions, 0 sharers", "q quits")
    donor = donate(spawn, "numbers")
    screen = top.displays(
        "1 region, 1 sharer, 2M of memory", "numbers", "faults/s", str(donor.pid), "client"
    )
    assert len(screen) == 24
    titles = ["NAME", "MEMORY", "SHARERS", "FAULTS/S", "MB/S", "SAVED", "SIZE"]
    assert screen[1].split()[:7] == titles
    assert screen[2].split()[:3] == ["numbers", "2M", "1"]
    during = termios.tcgetattr(top.slave)[3]
    assert not during & (termios.ICANON | termios.ECHO)
    if how == "SIGTERM":
        top.process.terminate()
        assert top.end() == 128 + signal.SIGTERM
    else:
        top.type({"q": b"q", "Ctrl-C": b"\x03"}[how])
        assert top.end() == 0
    assert termios.tcgetattr(top.slave) == top.before
    assert b"\x1b[?1049l" in top.read()  # the screen of before
    assert b"Traceback" not in top.read()


def test_a_large_screen(mshare: Command, daemon: Daemon, terminal: Callable[..., Terminal]) -> None:
    for number in range(100):
        (daemon.mount / f"region-{number:02}").touch()
    top = terminal("top", "--sort=name", "--interval=0.5", columns=200, lines=50)
    screen = top.displays("100 regions", "region-00", "1-45 of 100 by name")
    assert screen[1].split()[-4:] == ["ADDRESS", "BACKING", "OWNER", "MODE"]
    assert screen[49].startswith("q quits  s sort")
    top.type(b"\x1b[6~")  # page down, as xterm has it
    top.displays("region-45", "46-90 of 100")
    top.type(b"/8\r")
    screen = top.displays("region-80", "region-89", "region-08", "/8")
    assert not any("region-90" in line for line in screen)
    top.type(b"q")
    assert top.end() == 0


@pytest.mark.parametrize("term", ["dumb", "no-such-terminal"])
def test_a_terminal_that_cannot_move_its_cursor(
    daemon: Daemon, terminal: Callable[..., Terminal], term: str
) -> None:
    (daemon.mount / "r").touch()
    top = terminal("top", "--interval=0.2", TERM=term)
    eventually(lambda: top.read().count(b"1 region, 0 sharers") > 1, "two pages")
    top.type(b"q")
    assert top.end() == 0
    assert b"\x1b[" not in top.read()


def test_it_waits_for_a_daemon(
    mshare: Command, daemon: Daemon, terminal: Callable[..., Terminal]
) -> None:
    make(mshare, "r")
    top = terminal("top", "--interval=0.5")
    top.displays("1 region,")
    daemon.kill()
    top.displays("has died", "q quits")
    daemon.expected += ["a dead daemon left", "of a daemon that died"]
    daemon.start()
    top.displays("1 region, 0 sharers")
    top.type(b"q")
    assert top.end() == 0


def test_it_ends_when_there_is_no_answer(daemon: Daemon, terminal: Callable[..., Terminal]) -> None:
    top = terminal("--timeout=5", "top", "--interval=0.5")
    top.displays("0 regions")
    with stopped(daemon):
        assert top.end() == 1
    assert b"no answer from the daemon" in top.read()
    assert termios.tcgetattr(top.slave) == top.before


# -- into a pipe --


def test_once(mshare: Command, spawn: Callable[..., Client], daemon: Daemon) -> None:
    assert mshare.ok("top") == f"{daemon.mount}: 0 regions, 0 sharers, 0 bytes of memory\n"
    donor = donate(spawn, "r")
    heading_, of_regions, of_sharers = mshare.ok("top", "--once").split("\n\n")
    assert heading_ == f"{daemon.mount}: 1 region, 1 sharer, 2M of memory"
    assert of_regions.splitlines()[1].split()[:3] == ["r", "2M", "1"]
    told, pid, user, access, _, rss, tables, command = of_sharers.splitlines()[1].split()
    assert (told, pid, user, access) == ("r", str(donor.pid), "root", "read-write")
    assert command == "client"
    status = Path(f"/proc/{donor.pid}/status").read_text()
    kibibytes = {
        key: next(line.split()[1] for line in status.splitlines() if key in line)
        for key in ("VmPTE", "VmRSS")
    }
    assert tables == output.size(int(kibibytes["VmPTE"]) * 1024)
    assert rss == output.size(int(kibibytes["VmRSS"]) * 1024)
    assert "r" not in mshare.ok("top", "other").split()


def test_a_stream_of_objects(mshare: Command, spawn: Callable[..., Client], daemon: Daemon) -> None:
    donor = donate(spawn, "r")
    with subprocess.Popen(
        [MSHARE, "top", "--json", "--interval=0.3", "r"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(mshare.root),
    ) as process:
        assert process.stdout is not None
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.returncode in (128 + signal.SIGINT, 1, -signal.SIGINT)
    assert first["faults_per_second"] is None
    assert second["faults_per_second"] == 0
    (one,) = second["regions"]
    assert (one["name"], one["memory"], one["faults_per_second"]) == ("r", ALIGNMENT, 0)
    (other,) = second["processes"]
    assert (other["pid"], other["region"]) == (donor.pid, "r")
    assert other["rss"] > other["tables"] > 0
    assert json.loads(mshare.ok("top", "--json", "--once"))["root"] == os.fspath(daemon.mount)
