"""`make bench` runs; what it says is not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TESTS, eventually

from benchmarks.huge_pages import reserved_huge_pages
from msharefsd.linux import mounts, syscalls
from msharefsd.mount import mounting

BENCHMARKS = TESTS.parent / "benchmarks"
FREE_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


def run(script: str, results: Path, *words: str) -> tuple[str, str]:
    """Run it to see that everything runs; its standard output and error."""
    # A /dev/shm of its own, in the tests' mount namespace: what is left there is its.
    syscalls.mount("shm", "/dev/shm", "tmpfs", 0, "mode=1777")
    try:
        done = subprocess.run(
            [sys.executable, BENCHMARKS / script, "--smoke", f"--results={results}", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        assert not [mount for mount in mounts.mounts() if mount.fstype == mounting.FSTYPE]
        assert os.listdir("/dev/shm") == []
    finally:
        syscalls.umount("/dev/shm", syscalls.MNT_DETACH)
    return done.stdout, done.stderr


@pytest.mark.timeout(300)
def test_the_benchmarks_run_and_leave_nothing(tmp_path: Path) -> None:
    printed, _ = run("run.py", tmp_path)
    (results,) = tmp_path.iterdir()
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) > 20
    for row in rows:
        assert row["measure"] in printed
        assert row["peer_value"] > 0


@pytest.mark.timeout(300)
def test_the_paths_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    """Ours against ours: what `--against` names is another version, or the same."""
    environment = Path(sys.executable).parent.parent
    printed, _ = run("paths.py", tmp_path, f"--against={environment}")
    (results,) = tmp_path.iterdir()
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == 7
    for row in rows:
        assert row["measure"] in printed
        assert {"ours", "before"} <= row["medians"].keys()


@pytest.mark.timeout(300)
def test_the_story_runs_and_leaves_nothing(tmp_path: Path) -> None:
    free = FREE_HUGE_PAGES.read_text()
    printed, told = run("story.py", tmp_path)
    results, drawn = sorted(tmp_path.iterdir())
    story = json.loads(results.read_text())
    kinds = {point["kind"] for point in story["points"]}
    assert len(kinds) + len(story["crashes"]) + told.count("left out") == 7 + 3
    for each in (*story["points"], *story["crashes"]):
        assert each["kind"] in printed
    svg = drawn.read_text()
    assert svg.startswith("<?xml")
    assert all(kind in svg for kind in kinds)
    assert FREE_HUGE_PAGES.read_text() == free


RESERVING = """
import sys
sys.path.append(sys.argv[1])
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
