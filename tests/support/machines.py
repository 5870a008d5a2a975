"""Two daemons that stand for two machines, for all tests of a module."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

import pytest
from conftest import ALIGNMENT, Daemon, eventually, taken_down, temporary, watched

from libmshare import holding

SIZE = 16 * ALIGNMENT
MODULE_SECONDS = 900.0
"""How long the tests of a module may take; each has a limit of its own."""


@pytest.fixture(scope="module", name="both")
def both_fixture() -> Iterator[tuple[Daemon, Daemon]]:
    """Two daemons, for all tests here: two machines."""
    with temporary() as directory:
        made = [directory / "here", directory / "there"]
        for each in made:
            each.mkdir()
            each.chmod(0o755)
        daemons = [Daemon(each, f"--alignment={ALIGNMENT}") for each in made]
        with watched(daemons, MODULE_SECONDS), taken_down(daemons):
            yield daemons[0].start(), daemons[1].start()


@pytest.fixture(name="here")
def here_fixture(both: tuple[Daemon, Daemon], monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """Where regions are pushed from."""
    monkeypatch.setenv("MSHARE_ROOT", str(both[0].mount))
    yield both[0]
    gc.collect()
    assert holding.held() == []
    for each in both:
        assert named(each) == []
        eventually(lambda each=each: each.shm_objects() == [], "no memory is left")  # type: ignore[misc] # the loop's


@pytest.fixture(name="there")
def there_fixture(both: tuple[Daemon, Daemon]) -> Daemon:
    """Where they are pulled."""
    return both[1]


def named(daemon: Daemon) -> list[str]:
    """What regions it has that have a name."""
    return [name for name in os.listdir(daemon.mount / ".regions") if name[0] != "."]


@contextlib.contextmanager
def on(daemon: Daemon) -> Iterator[None]:
    """Calls are about that one's regions."""
    before = os.environ["MSHARE_ROOT"]
    os.environ["MSHARE_ROOT"] = str(daemon.mount)
    try:
        yield
    finally:
        os.environ["MSHARE_ROOT"] = before
