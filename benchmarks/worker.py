"""The C programs that are measured: compiled, started, told what to do.

`worker.c` is one program with two backends: msharefs (`ours`) and POSIX shared
memory (`peer`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

SOURCES: Final = Path(__file__).parent
SHM_DIRECTORY: Final = Path("/dev/shm")
"""Where shm_open(3) has its objects."""
Side = Literal["ours", "peer"]
BACKENDS: Final[Mapping[Side, str]] = {"ours": "backend_mshare.c", "peer": "backend_shm.c"}


class WorkerError(Exception):
    """A worker failed; it has said why on stderr."""


def compile_program(source: str, target: Path, *more: str) -> Path:
    """Compile one of our programs; `more` is put at the end of the command line."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise WorkerError("no C compiler: install one, or name it in $CC")
    command = [compiler, "-O2", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", str(target), str(SOURCES / source), *more], check=True)
    return target


def library_flags() -> list[str]:
    """What links libmshare, as a user of the wheel has it: not the checkout, if we run there."""
    words = subprocess.run(
        [sys.executable, "-P", "-m", "libmshare", "--cflags", "--libs"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return words.split()


def compile_workers(directory: Path) -> dict[Side, Path]:
    """Compile both programs into `directory`, as a user of the installed wheel does."""
    flags = library_flags()
    # The peer has no libmshare in it: nothing is interposed there.
    return {
        side: compile_program(
            "worker.c",
            directory / f"worker-{side}",
            str(SOURCES / backend),
            *(flags if side == "ours" else ["-lrt"]),
        )
        for side, backend in BACKENDS.items()
    }


class Worker:
    """One process of such a program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Speak to `process` over its pipes."""
        self._process = process

    def do(self, *words: object) -> list[int]:
        """Give a command (see worker.c); the nanoseconds it took, item by item.

        Raises WorkerError.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        command = " ".join(str(word) for word in words)
        try:
            print(command, file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"a worker ended ({self._process.wait()}) at: {command}")
        return [int(word) for word in line.split()]

    def one(self, *words: object) -> int:
        """Give a command that does one thing; the nanoseconds it took."""
        (nanoseconds,) = self.do(*words)
        return nanoseconds

    def page_tables(self) -> int:
        """The process's VmPTE (proc_pid_status(5)) in bytes."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        for line in status.splitlines():
            key, _, value = line.partition(":")
            if key == "VmPTE":
                return int(value.split()[0]) * 1024
        raise WorkerError("no VmPTE in /proc/PID/status")


class Workers:
    """Starts workers, and can end all that live."""

    def __init__(self, programs: Mapping[Side, Path], mountpoint: Path) -> None:
        """Workers find msharefs at `mountpoint`."""
        self._programs = programs
        self._mountpoint = mountpoint
        self.environment = {**os.environ, "MSHARE_ROOT": str(mountpoint)}
        self._processes: set[subprocess.Popen[str]] = set()

    @contextlib.contextmanager
    def start(self, side: Side) -> Iterator[Worker]:
        """A worker, gone at the end."""
        with self._process([str(self._programs[side])]) as process:
            yield Worker(process)

    @contextlib.contextmanager
    def backed_by(self, backing: str) -> Iterator[None]:
        """Meanwhile the regions that workers create have this backing."""
        self.environment["MSHARE_BACKING"] = backing
        try:
            yield
        finally:
            del self.environment["MSHARE_BACKING"]

    def directory(self, side: Side) -> Path:
        """Where a side's memory has its names."""
        return self._mountpoint if side == "ours" else SHM_DIRECTORY

    def run_python(self, script: Path, *arguments: str) -> str:
        """Run one of our Python scripts to its end; what it prints.  Raises WorkerError."""
        with self._process([sys.executable, str(script), *arguments]) as process:
            output, _ = process.communicate()
            if process.returncode != 0:
                raise WorkerError(f"{script.name} failed ({process.returncode})")
            return output

    def kill(self) -> None:
        """End every worker now; from any thread."""
        for process in list(self._processes):
            process.kill()

    @contextlib.contextmanager
    def _process(self, command: list[str]) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd="/",
        )
        self._processes.add(process)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            self._processes.discard(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
