"""Tests that are clients themselves, in pytest's own process."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ALIGNMENT, Daemon

from libmshare import holding


@pytest.fixture(autouse=True, name="root")
def root_fixture(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a client, too; it must have detached when a test is over."""
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    yield
    gc.collect()
    assert holding.held() == []


@pytest.fixture(scope="module", name="daemon")
def one_daemon_fixture() -> Iterator[Daemon]:
    """One for all tests of a module: nothing there does it any harm."""
    with tempfile.TemporaryDirectory(prefix="mshare-test-") as directory:
        made = Daemon(Path(directory), f"--alignment={ALIGNMENT}")
        try:
            yield made.start()
            made.stop()
            made.check_log()
        finally:
            made.clean_up()
