"""`make bench` runs; what it says is not judged."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import TESTS, eventually

from benchmarks import paths, plot, report, story
from benchmarks.huge_pages import reserved_huge_pages
from msharefsd.linux import mounts, syscalls
from msharefsd.mount import mounting

BENCHMARKS = TESTS.parent / "benchmarks"
PIECES = 8
"""Of the first part of an image."""
FREE_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


def run(script: str, results: Path, *more: str, seconds: float = 280) -> tuple[str, str]:
    """Run it to see that everything runs; its standard output and error."""
    # A /dev/shm of its own, in the tests' mount namespace: what is left there is its.
    syscalls.mount("shm", "/dev/shm", "tmpfs", 0, "mode=1777")
    try:
        done = subprocess.run(
            [sys.executable, BENCHMARKS / script, "--smoke", f"--results={results}", *more],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stderr
        assert not [mount for mount in mounts.mounts() if mount.fstype == mounting.FSTYPE]
        assert os.listdir("/dev/shm") == []
    finally:
        syscalls.umount("/dev/shm", syscalls.MNT_DETACH)
    return done.stdout, done.stderr


class Page(HTMLParser):
    """A page: its cells, what it has of each element, and whether every one is closed."""

    EMPTY = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []
        self.count: Counter[str] = Counter()
        self.refers: list[str] = []
        self.ids: Counter[str] = Counter()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.refers.append(value or "")
            elif name == "id":
                self.ids[value or ""] += 1

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.mark.timeout(600)
def test_the_report_has_all_that_was_measured(tmp_path: Path) -> None:
    """And the benchmarks run, and leave nothing."""
    free = FREE_HUGE_PAGES.read_text()
    results, docs = tmp_path / "results", tmp_path / "docs"
    printed, told = run("report.py", results, "--record", f"--docs={docs}", seconds=580)
    of_story = told.partition(story.IDLE)[2]
    found = {path.suffix: path for path in results.iterdir()}
    parts = {}
    for path in results.glob("*.json"):
        document = json.loads(path.read_text())
        parts[document["part"]] = document
    assert len(list(results.iterdir())) == len(parts) + 1
    text = found[".html"].read_text()
    page = Page(text)

    everybodys = {"peers", "images", "story"}
    assert set(parts) == everybodys | (report.ROOTS if os.geteuid() == 0 else set())
    rows = parts["peers"]["rows"]
    assert len(rows) > 20
    for row in rows:
        assert row["peer_value"] > 0
    assert len(plot.telling(parts["peers"])) >= len(plot.TELLING)
    kinds = {point["kind"] for point in parts["story"]["points"]}
    crashes = parts["story"]["crashes"]
    assert len(kinds) + len(crashes) + of_story.count("left out") == 7 + 3
    measures = [row["measure"] for each in parts.values() for row in each.get("rows", ())]
    if "collapsing" in parts:
        assert all(point["collapsed"] > 0 for point in parts["collapsing"]["points"])
    for each in (*measures, *kinds, *(crash["kind"] for crash in crashes)):
        assert each in printed
        assert each in page.cells
    assert all(kind in text for kind in kinds)

    assert page.open == []
    assert page.count["svg"] == 1 + sum(len(report.PLOTS[part]) for part in parts)
    assert all(each.startswith("#") for each in page.refers), "it needs nothing but itself"
    assert max(page.ids.values()) == 1
    for fact in (platform.release(), version("msharefs"), version("pyfuse3")):
        assert any(fact in cell for cell in page.cells)
    for document in parts.values():
        assert document["load"]

    assert report.read(docs / report.MEASURED) == parts
    for name, svg in report.plots(parts):
        assert (docs / name).read_text() == svg
        assert plot.inline(svg) in text
    assert FREE_HUGE_PAGES.read_text() == free


@pytest.mark.timeout(300)
def test_images_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    """No part is asked for twice, whoever waits for it; the rest depends on the machine.

    (The first one is, in pieces.)
    """
    printed, _ = run("images.py", tmp_path)
    (results,) = tmp_path.iterdir()
    rows = {row["measure"]: row for row in json.loads(results.read_text())["rows"]}
    assert len(rows) >= 5
    requests = rows["requests for that"]
    assert requests["ours"] == requests["peer_value"] + PIECES - 1
    assert "the same, beside rclone" in rows
    assert all(measure in printed for measure in rows)


@pytest.mark.timeout(300)
def test_the_paths_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    """Ours against ours: what `--against` names is another version, or the same."""
    environment = Path(sys.executable).parent.parent
    printed, _ = run("paths.py", tmp_path, f"--against={environment}")
    (results,) = tmp_path.iterdir()
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == 8
    for row in rows:
        assert row["measure"] in printed
        assert {"ours", "before"} <= row["medians"].keys()
        has = paths.LEAST_DAEMON.keys() <= row["medians"].keys()
        assert has == (row["measure"] in paths.CALLS)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
@pytest.mark.timeout(300)
def test_postgresql_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    printed, _ = run("postgres_modes.py", tmp_path, "--modes", "floor", "collapsed")
    (results,) = tmp_path.iterdir()
    samples = json.loads(results.read_text())["samples"]
    assert set(samples) == {"floor", "collapsed"}
    assert len(samples["collapsed"]["stalls_during"]) == 1
    assert "of floor" in printed


RESERVING = """
import sys
sys.path.append(sys.argv[1])
from benchmarks import plot, report, story
from benchmarks.huge_pages import huge_pages
with huge_pages(3):
    print("reserved", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_huge_pages_are_given_back_however_it_ends(*, killed: bool) -> None:
    before, free = reserved_huge_pages(), int(FREE_HUGE_PAGES.read_text())
    with subprocess.Popen(
        [sys.executable, "-c", RESERVING, BENCHMARKS.parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reserved\n"
        assert int(FREE_HUGE_PAGES.read_text()) == free + 3
        if killed:
            process.kill()
    eventually(lambda: reserved_huge_pages() == before, "they are given back")
