"""`mshare ls`, which, in which order, how wide; `mshare wait`; and figures of regions."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command import MSHARE, SIZE, Command, Terminal, donate, environment, make
from command import mshare_fixture as _mshare  # noqa: F401 - what tests ask for
from command import terminal_fixture as _terminal  # noqa: F401 - the same
from conftest import ALIGNMENT, BASE, Client, Daemon
from hypothesis import given, settings
from hypothesis import strategies as st

from libmshare.cli import listing, output
from libmshare.cli.errors import CommandError
from libmshare.cli.exits import Exit
from libmshare.cli.listing import Choice
from libmshare.cli.output import Column
from libmshare.cli.regions import Region
from libmshare.cli.views import Order

PROJECT = Path(__file__).resolve().parents[2]


def names(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()[1:]]


def test_ls_lists_what_it_is_asked_for(
    mshare: Command, daemon: Daemon, spawn: Callable[..., Client]
) -> None:
    _donor = donate(spawn, "web-1")
    for name in ("web-2", "a[1]"):
        (daemon.mount / name).touch()
    os.chown(daemon.mount / "web-2", 65534, 65534)
    assert names(mshare.ok("ls")) == ["'a[1]'", "web-1", "web-2"]
    assert names(mshare.ok("ls", "web*", "--reverse", "--sort=memory")) == ["web-2", "web-1"]
    assert names(mshare.ok("ls", "--user=nobody")) == ["web-2"]
    listed = mshare.json("ls", "web*", "--sort=memory")
    assert [each["name"] for each in listed] == ["web-1", "web-2"]
    assert "nope: no such region" in mshare.fails("ls", "nope", "web*")


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ((), ["a1", "a[1]", "web-1"]),
        (("a[1]",), ["a1", "a[1]"]),  # a name as it is, too
        (("web-1", "a1"), ["a1", "web-1"]),
        (("none*",), []),
        (("?1", "w*"), ["a1", "web-1"]),
    ],
)
def test_patterns(patterns: tuple[str, ...], found: list[str]) -> None:
    there = [region(name) for name in (b"web-1", b"a[1]", b"a1")]
    assert [os.fsdecode(each.name) for each in Choice(patterns).of(there)] == found


def test_what_nobody_is_called() -> None:
    with pytest.raises(CommandError, match="nope: no such region"):
        Choice(("nope", "a*")).of([region(b"a")])
    with pytest.raises(CommandError, match="no such user; give a name or a number"):
        Choice(user="nope").of([])
    assert Choice(user="1").of([region(b"a")]) == []


def region(name: bytes, **info: str) -> Region:
    return Region(name, 0o600, 0, 0, int(info.get("memory", 0)), info)


def test_what_is_not_told_comes_last() -> None:
    known = {"size": "4096", "start": "0x1000", "sharers": "3", "faults": "2"}
    one, other = region(b"b", **known), region(b"a")
    for order in (Order.SIZE, Order.SHARERS, Order.ADDRESS):
        assert listing.in_order([other, one], order) == [one, other]
    assert listing.in_order([one, other], Order.NAME) == [other, one]
    counted = {b"a": 7.0, b"b": 1.0}
    by_faults = listing.in_order([one, other], Order.FAULTS, more=lambda each: counted[each.name])
    assert by_faults == [other, one]


# -- names --

ODD = st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        ODD | st.sampled_from([b"=ls", b"~", b"a b", b"$(id)", b"a;id", b"'", b"\\"]),
        min_size=1,
        max_size=8,
    )
)
def test_shells_read_names_back(found: list[bytes]) -> None:
    words = [output.printable(name) for name in found]
    script = os.fsencode(f"printf '%s\\0' {' '.join(words)}")
    for shell in (["bash", "--norc"], ["zsh", "-f"]):
        done = subprocess.run(
            [*shell, "-c", script],
            check=True,
            capture_output=True,
            cwd="/",
            env={"LC_ALL": "C.UTF-8", "PATH": os.defpath},
        )
        assert done.stdout.split(b"\0")[:-1] == found
    assert all(len(word.split()) == 1 for word in words)


# -- widths --

TABLE = (
    [Column("NAME"), Column("A", rank=2), Column("B", right=True, rank=1), Column("C", rank=3)],
    [["name", "aaaa", "bb", "cccccc"], ["界", "a", "b", "c"]],
)


@pytest.mark.parametrize(
    ("width", "left"),
    [
        (22, "NAME A B C"),
        (21, "NAME A B"),
        (14, "NAME A B"),
        (13, "NAME B"),
        (8, "NAME B"),
        (7, "NAME"),
        (1, "NAME"),
    ],
)
def test_columns_go_as_a_whole(width: int, left: str) -> None:
    columns, rows = output.fitted(*TABLE, width)
    assert [column.title for column in columns] == left.split()
    assert all(len(row) == len(columns) for row in rows)


def test_wide_characters_are_as_wide_as_they_are() -> None:
    assert [output.columns_of(text) for text in ("abc", "界界", "e\u0301", "")] == [3, 4, 1, 0]
    assert output.plain_table(*TABLE).splitlines()[2] == "界    a      b  c"


def test_ls_fits(mshare: Command, terminal: Callable[..., Terminal], daemon: Daemon) -> None:
    for name in ("a-name-of-some-length", "b"):
        (daemon.mount / name).touch()
    for columns in (40, 80, 200):
        listed = terminal("ls", columns=columns)
        assert listed.end() == 0
        lines = re.sub(r"\x1b\[[0-9;]*m", "", listed.read().decode()).splitlines()
        assert len(lines) == 3
        assert all(len(line.rstrip()) <= columns for line in lines)
        assert "MEMORY" in lines[0]
        assert ("MODE" in lines[0]) == (columns >= 80)


# -- figures --


def test_figures_of_a_region(mshare: Command, daemon: Daemon, spawn: Callable[..., Client]) -> None:
    donor = spawn()
    donor.ok("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_RDWR, 0o600)
    donor.ok("mmap", BASE, SIZE, 3, 0x11)
    donor.ok("fill", BASE, ALIGNMENT, 1)
    told = mshare.json("info", "r")
    assert told["faults"] > 0
    assert told["populated"] == told["memory"] == ALIGNMENT
    assert daemon.metric('region_memory_bytes{region="r",uid="0"}') == ALIGNMENT
    assert daemon.metric('region_populated_bytes_total{region="r",uid="0"}') == ALIGNMENT
    assert daemon.metric('region_faults_total{region="r",uid="0"}') == told["faults"]
    assert daemon.metric('region_sharers{region="r",uid="0"}') == 1
    served = daemon.metric('fault_seconds_count{source="memory"}')
    assert served == daemon.metric('faults_total{kind="anonymous"}') == told["faults"]
    assert daemon.metric('fault_seconds_bucket{le="+Inf",source="memory"}') == served
    assert daemon.metric('fault_seconds_sum{source="memory"}') > 0
    theirs = subprocess.run(
        ["cat", daemon.mount / ".metrics"],
        check=True,
        capture_output=True,
        text=True,
        user=65534,
        group=65534,
        extra_groups=[],
    ).stdout
    assert 'region="r"' not in theirs
    assert 'msharefs_faults_total{kind="anonymous"}' in theirs


# -- wait --


def waiting(mshare: Command, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [MSHARE, "wait", *words], stderr=subprocess.PIPE, text=True, env=environment(mshare.root)
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    with process:
        _, said = process.communicate(timeout=50)
    return process.returncode, said


def test_wait(mshare: Command, daemon: Daemon, spawn: Callable[..., Client]) -> None:
    created, gone = waiting(mshare, "r"), waiting(mshare, "s", "--for=gone")
    assert ended(gone) == (0, "")
    donor = donate(spawn, "r")
    assert ended(created) == (0, "")
    mshare.ok("wait", "r", "--for", "used")
    gone, unused = waiting(mshare, "r", "--for=gone"), waiting(mshare, "r", "--for=unused")
    why = mshare.fails("wait", "r", "--for=unused", "--timeout=0", code=Exit.TIME_IS_OVER)
    assert "r: not unused within 0 s: 1 have it attached" in why
    donor.ok("detach", "r")
    assert ended(unused) == (0, "")
    assert gone.poll() is None
    (daemon.mount / "r").unlink()
    assert ended(gone) == (0, "")


def test_wait_for_a_daemon(mshare: Command, daemon: Daemon) -> None:
    make(mshare, "r")
    daemon.kill()
    over = mshare.fails("wait", "r", "--timeout=0", code=Exit.TIME_IS_OVER)
    assert "there is no daemon" in over
    created = waiting(mshare, "r")
    daemon.expected += ["a dead daemon left", "of a daemon that died"]
    daemon.start()
    assert ended(created) == (0, "")


def test_wait_until_it_is_collapsed(
    mshare: Command, daemon: Daemon, spawn: Callable[..., Client]
) -> None:
    donor = donate(spawn, "r")
    over = mshare.fails("wait", "r", "--for=collapsed", "--timeout=0", code=Exit.TIME_IS_OVER)
    assert f"0 of {ALIGNMENT} bytes are in huge pages" in over
    other = spawn()
    other.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    mshare.ok("wait", "r", "--for=collapsed", "--timeout=60")
    told = mshare.json("info", "r")
    assert told["huge"] == ALIGNMENT
    assert daemon.metric('region_huge_bytes{region="r",uid="0"}') == ALIGNMENT
    del donor


def test_exit_statuses_are_those_of_the_page() -> None:
    page = (PROJECT / "docs/mshare.1").read_text()
    section = page[page.index(".SH EXIT STATUS") : page.index(".SH ENVIRONMENT")]
    listed = [int(number) for number in re.findall(r"^\.B (\d+)", section, re.MULTILINE)]
    assert listed == [status for status in Exit if status is not Exit.SIGNAL] + [Exit.SIGNAL]
