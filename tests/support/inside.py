"""Tests that are clients themselves, in pytest's own process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from conftest import Daemon

from libmshare import holding


@pytest.fixture(autouse=True, name="root")
def root_fixture(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a client, too; it must have detached when a test is over."""
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    yield
    gc.collect()
    assert holding.held() == []
