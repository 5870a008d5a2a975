"""`make bench` runs; what it says is not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TESTS

from msharefsd import mounting

RUN = TESTS.parent / "benchmarks" / "run.py"


@pytest.mark.timeout(300)
def test_the_benchmarks_run_and_leave_nothing(tmp_path: Path) -> None:
    memory = sorted(os.listdir("/dev/shm"))
    done = subprocess.run(
        [sys.executable, RUN, "--smoke", f"--results={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.iterdir()
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) > 20
    for row in rows:
        assert row["measure"] in done.stdout
        assert row["peer_value"] > 0
    assert not [mount for mount in mounting.mounts() if mount.fstype == mounting.FSTYPE]
    assert sorted(os.listdir("/dev/shm")) == memory
