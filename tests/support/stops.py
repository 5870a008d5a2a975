"""A daemon that stops at a barrier: see msharefsd/barriers.py."""

from __future__ import annotations

from pathlib import Path

from conftest import Daemon, eventually

from msharefsd.linux import processes


def may_stop(daemon: Daemon) -> None:
    """Before it is started: `arm` has an effect."""
    daemon.variables = {"MSHAREFSD_PARK": f"@{_file(daemon)}"}


def _file(daemon: Daemon) -> Path:
    return daemon.directory / "barrier"


def stopped(pid: int) -> bool:
    """Whether a process has stopped itself."""
    return processes.state(pid) == "T"


def arm(daemon: Daemon, barrier: str) -> None:
    """It runs, and will stop there."""
    file = _file(daemon)
    file.with_suffix(".new").write_text(barrier)
    file.with_suffix(".new").rename(file)


def reached(daemon: Daemon) -> None:
    """Wait until it is there; it would not stop there again."""
    eventually(lambda: any(map(stopped, daemon.processes())), "the barrier")
    _file(daemon).unlink()
