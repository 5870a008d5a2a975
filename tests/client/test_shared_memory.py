"""Regions in the place of multiprocessing.shared_memory."""

from __future__ import annotations

import subprocess

import pytest
from conftest import SUPPORT, Daemon
from pythons import Python
from pythons import python_fixture as _python_fixture  # noqa: F401 - of every test here


def test_cpythons_own_tests_pass(daemon: Daemon, python: Python) -> None:
    done = subprocess.run(
        [python.executable, "-P", str(SUPPORT / "as_shared_memory.py")],
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
        env=python.environment(daemon),
    )
    if done.returncode == 77:
        pytest.skip("this Python comes without its own tests")
    assert done.returncode == 0, done.stderr
