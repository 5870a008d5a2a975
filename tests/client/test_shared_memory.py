"""Regions in the place of multiprocessing.shared_memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import SUPPORT, Daemon


def test_cpythons_own_tests_pass(daemon: Daemon) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(SUPPORT / "as_shared_memory.py")],
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
        env={"MSHARE_ROOT": str(daemon.mount), "PATH": "/usr/bin:/bin"},
    )
    if done.returncode == 77:
        pytest.skip("this Python comes without its own tests")
    assert done.returncode == 0, done.stderr
