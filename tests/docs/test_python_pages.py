"""The pages that show Python: what they show is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Daemon
from inside import one_daemon_fixture as _one_daemon_fixture  # noqa: F401 - of every test here
from pages import DOCS, PROJECT, README
from pythons import OWN, Python
from pythons import python_fixture as _python_fixture  # noqa: F401 - the same


def snippets(text: str) -> str:
    """The page's Python, from top to bottom, each line where it stands in the page."""
    lines, inside = [], False
    for line in text.split("\n"):
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = (line == "```python") if fence else inside
    return "\n".join(lines)


def run(code: str, directory: Path, daemon: Daemon, python: Python) -> None:
    program = directory / "page.py"
    # A pool's workers import the program.
    body = code.replace("\n", "\n    ")
    program.write_text(f"if __name__ == '__main__':{body}\n")
    done = subprocess.run(
        [python.executable, "-X", "dev", "-W", "error", str(program)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        env=python.environment(daemon),
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("page", "count"),
    [(DOCS / "numpy-workers.md", 5), (README, 1)],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_every_snippet_of_a_page_runs(
    daemon: Daemon, tmp_path: Path, page: Path, count: int
) -> None:
    text = page.read_text()
    assert len(re.findall(r"^```python$", text, re.MULTILINE)) >= count
    run(snippets(text), tmp_path, daemon, Python(OWN))


def test_every_snippet_of_the_python_page_runs(
    daemon: Daemon, tmp_path: Path, python: Python
) -> None:
    text = (DOCS / "python.md").read_text()
    assert len(re.findall(r"^```python$", text, re.MULTILINE)) >= 10
    run(snippets(text), tmp_path, daemon, python)


def test_the_example_runs(daemon: Daemon) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", str(PROJECT / "examples/shared_array.py")],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
        env=Python(OWN).environment(daemon),
    )
    assert done.stdout.count("reads: a pointer means the same everywhere") == 4
    assert "the parent finds [0, 1, 4, 9, 16, 25]" in done.stdout
