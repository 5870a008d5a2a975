"""The pages of README.md and docs/: what they tell somebody to do is done, as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import BIN, Daemon, huge_pages
from pages import DOCS, PROJECT, README, Shell, blocks

pytestmark = pytest.mark.shm_only

PAGES = [README, *sorted(DOCS.glob("*.md"))]
SHOWN = ("text", "toml")
"""Languages that nobody runs: figures, what programs print, settings of others."""
RUN = {
    "README.md": {"console", "python", "c"},
    # images/, cluster/; what is around the commands of Slurm and Kubernetes is not run.
    "beyond.md": {"python", "sh", "yaml"},
    "cpp.md": {"console", "cpp"},
    "filesystem.md": {"console"},
    "hugetlb.md": {"console"},
    "monitoring.md": {"console"},  # and life/test_metrics.py
    "numpy-workers.md": {"python"},  # test_python_pages.py
    "python.md": {"python"},  # the same
    "page-tables.md": {"sh"},  # tables/test_document.py
    "systemd.md": {"sh"},  # life/test_supply.py, and what life/test_systemd.py installs
    "web.md": {"sh"},  # client/test_web.py
    "tutorial.md": {"console", "c", "python"},  # packages/test_packages.py
}
"""What is run of each page, and by whom if it is not here."""


@pytest.fixture
def follow(make_daemon: Callable[..., Daemon], directory: Path) -> Iterator[Callable[..., int]]:
    """Do what a page says, beside a daemon, in a directory as the sources are."""
    shells = []

    def go(page: Path, *kind: str) -> int:
        daemon = make_daemon().start()
        place = directory / "here"
        place.mkdir()
        (place / "examples").symlink_to(PROJECT / "examples")
        (place / ".venv").symlink_to(BIN.parent)
        process = subprocess.Popen(
            ["bash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=place,
            env=os.environ
            | {
                "MSHARE_ROOT": str(daemon.mount),
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "LC_ALL": "C.UTF-8",
            },
        )
        shells.append(Shell(process))
        return shells[-1].follow(page, place, *kind)

    yield go
    for shell in shells:
        shell.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="its files are root's")
@pytest.mark.parametrize(
    ("page", "count"),
    [
        (README, 6),
        (DOCS / "cpp.md", 4),
        (DOCS / "filesystem.md", 10),
        (DOCS / "hugetlb.md", 2),
        (DOCS / "monitoring.md", 1),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_what_a_page_tells_to_do_is_done(
    follow: Callable[..., int], page: Path, count: int
) -> None:
    assert follow(page) >= count


@pytest.mark.skipif(os.geteuid() != 0, reason="reserves huge pages")
def test_what_takes_huge_pages_is_done_with_some(follow: Callable[..., int]) -> None:
    with huge_pages(8):
        assert follow(DOCS / "hugetlb.md", "hugetlb") >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_is_nothing_to_run(page: Path) -> None:
    for block in blocks(page):
        directive = block.language.startswith("{")
        where = f"{page.name}, line {block.line}: a block of {block.language or 'no language'}"
        assert directive or block.language in {*SHOWN, *RUN.get(page.name, ())}, where
        if block.language == "toml":
            assert tomllib.loads(block.text), where


def test_pages_that_are_run_are_there() -> None:
    for name, languages in RUN.items():
        (page,) = [each for each in PAGES if each.name == name]
        assert languages <= {block.language for block in blocks(page)}


def test_what_they_have_make_do_it_can() -> None:
    makefile = (PROJECT / "Makefile").read_text().replace("\\\n", " ")
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    named = set()
    for page in PAGES:
        text = page.read_text()
        found = re.findall(r"`make ([a-z-]+)", text)
        for block in blocks(page):
            found += re.findall(r"^make ([a-z-]+)", block.text, re.MULTILINE)
        assert set(found) <= set(targets.split()), page.name
        named |= set(found)
    assert {"setup", "demo", "test", "deb", "docs"} <= named


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_the_readmes_c_is_that_of_the_example() -> None:
    source = re.sub(r"\s+", " ", (PROJECT / "examples/counter.c").read_text())
    (shown,) = [block.text for block in blocks(README) if block.language == "c"]
    for statement in shown.split(";"):
        assert re.sub(r"\s+", " ", statement).strip() in source


def test_the_readmes_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(links) > 15
    for link in links:
        assert (PROJECT / link).exists(), link
