"""A msharefsd for the benchmarks alone, which leaves nothing behind however they end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from msharefsd.linux import mounts
from msharefsd.memory import names, shm
from msharefsd.mount import mounting

START_SECONDS = 20.0
STOP_SECONDS = 20.0


class ServiceError(Exception):
    """The daemon did not start, or did not stop as it should; the text has its log."""


@dataclass(frozen=True, slots=True)
class Service:
    """A running daemon."""

    mountpoint: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def running(
    directory: Path, alignment: int, *arguments: str, daemon: str | None = None
) -> Iterator[Service]:
    """A daemon that mounts in `directory`, with regions aligned to `alignment` bytes.

    `directory` is for this daemon alone; `arguments` are further ones of its command
    line; `daemon` is its program, if that is not the one beside our Python.
    Raises ServiceError.
    """
    mountpoint, run, log_file = directory / "mshare", directory / "run", directory / "log"
    command = [
        daemon or str(Path(sys.executable).parent / "msharefsd"),
        f"--mountpoint={mountpoint}",
        f"--run-directory={run}",
        f"--alignment={alignment}",
        *arguments,
    ]
    with log_file.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
    try:
        _wait_ready(process, log_file)
        yield Service(mountpoint, process)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        if process.poll() != 0:
            raise ServiceError(f"msharefsd did not stop as it should:\n{_text(log_file)}")
        purge = [*command, "--purge", "--force"]
        subprocess.run(purge, check=False, capture_output=True, timeout=STOP_SECONDS)
    finally:
        # Killing it fails every request that waits in its mount, so this comes first.
        process.kill()
        process.wait()
        mount = mounts.top_mount(str(mountpoint))
        if mount is not None and mount.fstype == mounting.FSTYPE:
            mounting.unmount(str(mountpoint))
        huge = str(run / "huge")
        if mounts.top_mount(huge) is not None:
            mounting.unmount(huge)
        for left in names.left_behind(run):
            shm.unlink_shm(left)


def _wait_ready(process: subprocess.Popen[bytes], log_file: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while "ready:" not in _text(log_file):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServiceError(f"msharefsd did not start:\n{_text(log_file)}")
        time.sleep(0.01)


def _text(log_file: Path) -> str:
    return log_file.read_text(errors="replace")
