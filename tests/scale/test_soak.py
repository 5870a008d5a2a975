"""A mixed load for some time; `make soak HOURS=1` for long.  See soak.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ALIGNMENT, Daemon, clients
from soak import Soak

SECONDS = float(os.environ.get("MSHARE_SOAK_SECONDS", "20"))
RESTARTS = os.environ.get("MSHARE_SOAK_RESTARTS", "") not in ("", "0")


@pytest.mark.timeout(120 + 1.1 * SECONDS)
def test_a_mixed_load_changes_nothing_that_it_should_not(
    make_daemon: Callable[..., Daemon],
    client_program: Path,
    directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seed = int(os.environ.get("MSHARE_SOAK_SEED") or time.time_ns() % (1 << 32))
    with capsys.disabled():
        print(f"\nsoak: seed {seed}, {SECONDS:.0f} s", flush=True)
    (directory / "config").write_text("collapse_seconds = 0.2\n")
    daemon = make_daemon(f"--alignment={ALIGNMENT}", f"--config={directory / 'config'}")
    if RESTARTS:
        daemon.expected.append("taking down the mount")
    files = directory / "files"
    files.mkdir()
    daemon.start()
    with clients(client_program, daemon) as start:
        soak = Soak(daemon, start, files, seed, restarts=RESTARTS)
        told = soak.run(SECONDS)
    with capsys.disabled():
        print(f"soak: {told}", flush=True)
