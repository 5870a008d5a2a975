"""The Pythons that the client is for: this one, and what scripts/pythons has found and made."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import BIN, Daemon

import libmshare

VERSIONS = ("3.11", "3.12", "3.13")
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass
class Python:
    """One of them, with the package as it is installed here: nothing in it is for one alone."""

    version: str
    executable: str = sys.executable
    variables: dict[str, str] = field(default_factory=dict)

    def environment(self, daemon: Daemon) -> dict[str, str]:
        """For a program that is a client of the daemon."""
        own = {"MSHARE_ROOT": str(daemon.mount), "PATH": "/usr/bin:/bin", "PYTHONSAFEPATH": "1"}
        return own | self.variables


@pytest.fixture(params=VERSIONS, name="python")
def python_fixture(request: Any, tmp_path: Path) -> Python:
    if request.param == OWN:
        return Python(OWN)
    executable = BIN.parent / "pythons" / request.param / "bin" / f"python{request.param}"
    if not executable.exists():
        pytest.skip(f"no CPython {request.param}: `make pythons` has found none, or was not run")
    package = Path(libmshare.__file__).parent
    directory = tmp_path / "packages"
    directory.mkdir()
    for each in (package, *package.parent.glob("msharefs-*.dist-info")):
        (directory / each.name).symlink_to(each)
    return Python(request.param, str(executable), {"PYTHONPATH": str(directory)})
