"""Figures in README.md and docs/ are those that were printed last: docs/measured has them."""

from __future__ import annotations

import re

import pytest
from pages import DOCS, PROJECT, README, blocks

from benchmarks import plot, report

pytestmark = pytest.mark.shm_only

PAGES = [README, *sorted(DOCS.glob("*.md"))]
MEASURED = report.read(DOCS / report.MEASURED)
RULE = re.compile(r"-{20,}")
"""Below the head of a table that was printed; tables of a page's own are Markdown's."""


def unprinted(text: str, printed: str) -> list[str]:
    """The lines of a figure that are not in what was printed."""
    known = printed.splitlines()
    return [line for line in text.splitlines() if line and line not in known]


def is_figure(text: str) -> bool:
    """Whether a block shows what was measured, if only in one line of a table."""
    measures = {
        row[0] for part, found in MEASURED.items() for table in report.TABLES[part](found)
        for row in table.rows
    }  # fmt: skip
    return any(
        RULE.fullmatch(line) or any(line.startswith(f"{measure} ") for measure in measures)
        for line in text.splitlines()
    )


def test_what_the_pages_show_was_printed() -> None:
    printed = report.printed(MEASURED)
    figures = {page.name: 0 for page in PAGES}
    for page in PAGES:
        for block in blocks(page):
            if block.language == "text" and is_figure(block.text):
                figures[page.name] += 1
                strange = unprinted(block.text, printed)
                assert not strange, f"{page.name}, line {block.line}: never printed: {strange}"
    assert figures["README.md"] >= 1
    assert figures["sharing.md"] >= 1


def test_a_figure_that_was_never_printed_is_found() -> None:
    printed = report.printed(MEASURED)
    for block in blocks(README):
        if is_figure(block.text):
            for found in re.finditer(r"\d+", block.text):
                digit = str((int(found[0][0]) + 1) % 10)
                wrong = block.text[: found.start()] + digit + block.text[found.start() + 1 :]
                assert unprinted(wrong, printed)


def test_the_plots_are_of_what_was_measured() -> None:
    """If they are not: benchmarks/report.py --from docs/measured --record."""
    drawn = dict(report.plots(MEASURED))
    assert set(drawn) == {path.name for path in DOCS.glob("*.svg")}
    for name, svg in drawn.items():
        assert (DOCS / name).read_text() == svg, name


def test_the_readme_shows_two_plots_of_the_report() -> None:
    shown = re.findall(r"!\[[^]]+\]\(docs/([^)]+)\)", README.read_text())
    assert sorted(shown) == sorted(report.SHOWN)
    page = report.page(MEASURED)
    for _, svg in report.plots(MEASURED):
        assert plot.inline(svg) in page


def test_huge_pages_of_a_tmpfs_are_among_the_rivals() -> None:
    kinds = {point["kind"] for point in MEASURED["story"]["points"]}
    assert "plain tmpfs file, huge=always" in kinds
    assert "plain tmpfs file, huge=always" in (DOCS / "pagetables.svg").read_text()
    assert "plain tmpfs file, huge=always" in README.read_text()


def test_what_was_measured_says_where() -> None:
    assert "story" in MEASURED
    for part, document in MEASURED.items():
        assert document["part"] == part
        assert document["load"]
        assert document["kernel"]
        assert str(PROJECT) not in str(document)
