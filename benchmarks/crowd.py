"""Many processes that share memory: crowd.c, compiled, started, told what to do."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.worker import WorkerError, compile_program, library_flags

SOURCES: Final = Path(__file__).parent
START: Final = 0x2000_0000_0000
TRIES: Final = 10
END_SECONDS: Final = 300.0


class CrowdError(WorkerError):
    """A crowd failed; it has said why on stderr."""


@dataclass(frozen=True, slots=True)
class Touch:
    """What touching all of the memory was to one process."""

    faults: int
    """Minor ones."""
    nanoseconds: int


def compile_crowd(backend: str, directory: Path) -> Path:
    """Compile it with a backend ("mshare", "shm", "hugetlb"), as a user of the wheel does."""
    program = directory / f"crowd-{backend}"
    # The peers have no libmshare in them.
    words = library_flags() if backend == "mshare" else ["-lrt"]
    return compile_program("crowd.c", program, str(SOURCES / f"backend_{backend}.c"), *words)


class Crowd:
    """A process, and the children that it is told to have."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Speak to `process` over its pipes; it has a session of its own."""
        self.process = process

    def do(self, *words: object) -> list[str]:
        """Give a command (see crowd.c); the words of its answer.  Raises CrowdError."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        command = " ".join(str(word) for word in words)
        try:
            print(command, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise CrowdError(f"a crowd ended ({self.process.wait()}) at: {command}")
        return line.split()

    def add(self, count: int) -> None:
        """So many children more, that attach the memory.  Raises CrowdError."""
        (attached,) = self.do("add", count)
        if int(attached) != count:
            raise CrowdError(f"{attached} of {count} processes attached")

    def touch(self, first: int, count: int, how: str = "write") -> list[Touch | None]:
        """Have children touch all of the memory; None for one that was killed."""
        words = iter(self.do("touch", first, count, how))
        return [
            None if faults == "-" else Touch(int(faults), int(nanoseconds))
            for faults, nanoseconds in zip(words, words, strict=True)
        ]

    def tables(self) -> int:
        """The page tables of the machine without those of other programs (bytes).

        PageTables of /proc/meminfo counts shared ones once, but it is one number for all,
        and other programs come and go: the reading counts during which they changed least.
        """
        readings = []
        for _ in range(TRIES):
            before = self._of_others()
            # Sum up what the processors count each for itself (proc_sys_vm(5)).
            with contextlib.suppress(OSError):
                Path("/proc/sys/vm/stat_refresh").read_text()
            machine = kib(Path("/proc/meminfo").read_text(), "PageTables")
            readings.append((abs(self._of_others() - before), machine - before))
            if readings[-1][0] == 0:
                break
        return min(readings)[1]

    def _of_others(self) -> int:
        found = 0
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError, KeyError):
                    if os.getsid(int(entry)) != self.process.pid:
                        found += kib(Path(f"/proc/{entry}/status").read_text(), "VmPTE")
        return found


def kib(text: str, key: str) -> int:
    """A field in kB of a file of /proc, in bytes.  Raises KeyError."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) << 10
    raise KeyError(key)


@contextlib.contextmanager
def crowd(program: Path, name: str, size: int, environment: Mapping[str, str]) -> Iterator[Crowd]:
    """A crowd for `size` bytes of memory of that name, gone at the end."""
    process = subprocess.Popen(
        [program, name, str(START), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        yield Crowd(process)
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """End it and its children; when they are gone, what they had is free again.

    May be called again.
    """
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    process.kill()
    process.wait()
