"""benchmarks/walls.py runs; what it says is not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TESTS
from walls import own_shm as _own_shm  # noqa: F401 - what tests ask for

from msharefsd.linux import mounts
from msharefsd.mount import mounting

pytestmark = pytest.mark.shm_only
SCRIPT = TESTS.parent / "benchmarks" / "walls.py"


def test_the_walls_are_measured_and_nothing_is_left(tmp_path: Path, own_shm: None) -> None:
    words = ["--smoke", "--only=moved for ever", f"--results={tmp_path}"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.iterdir()
    rows = json.loads(results.read_text())["rows"]
    assert {row["what"] for row in rows} == {"TOUCH", "CALL", "FORK", "STAT", "LIST"}
    for row in rows:
        assert row["beside"] in done.stdout
        assert all(row[side]["count"] for side in ("alone", "loops", "attack"))
    assert not [mount for mount in mounts.mounts() if mount.fstype == mounting.FSTYPE]
    assert os.listdir("/dev/shm") == []
