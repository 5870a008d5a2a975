"""docs/page-tables.md: each command that it tells is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BIN, TESTS
from pages import DOCS, blocks

sys.path.append(str(TESTS.parent))

from benchmarks.postgres import Postgres

DOCUMENT = DOCS / "page-tables.md"
SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

pytestmark = pytest.mark.shm_only


def commands(*kinds: str) -> list[str]:
    """The lines of its blocks of those kinds, in their order."""
    found = []
    for block in blocks(DOCUMENT):
        if " ".join((block.language, *block.words)) in kinds:
            found += block.text.splitlines()
    return found


@pytest.fixture
def postgres(directory: Path) -> Iterator[Postgres]:
    server = Postgres(directory / "postgres")
    yield server
    server.remove()


@pytest.fixture
def _setting() -> Iterator[None]:
    """The machine's, as it was."""
    before = re.search(r"\[(\w+)\]", SETTING.read_text())
    assert before is not None
    yield
    SETTING.write_text(before[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
@pytest.mark.usefixtures("_setting")
def test_every_command_runs(postgres: Postgres) -> None:
    postgres.start({"shared_buffers": "128MB"}, [str(BIN / "mshare"), "run", "--no-watch", "--"])
    postgres.load(4)
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PGDATA": str(postgres.data),
        "PGBIN": str(postgres.bin),
    }
    said = {}
    with postgres.sessions(3):
        for command in commands("sh", "sh root"):
            if " -C " in command:
                continue  # of a server that is stopped
            done = subprocess.run(
                ["sh", "-c", command], capture_output=True, text=True, check=False, env=environment
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            said[command] = done.stdout
    assert len(said) >= 12
    text = "".join(said.values())
    for word in ("PageTables:", "anonymous of postgres", "libmshare-align.so", "->", "GROWTH"):
        assert word in text, word


def test_the_number_of_huge_pages_is_told_by_a_server_that_is_stopped(postgres: Postgres) -> None:
    (command,) = [each for each in commands("sh") if " -C " in each]
    told = postgres.ask("shared_memory_size_in_huge_pages")
    assert "-C shared_memory_size_in_huge_pages" in command
    assert int(told) > 0
