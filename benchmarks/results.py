"""What the JSON of every run begins with: the machine, versions, what else ran meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

RESULTS: Final = Path(__file__).resolve().parent / "results"
LIBRARIES: Final = ("pyfuse3", "trio", "numpy", "posix_ipc")
SETTINGS: Final = Path("/sys/kernel/mm/transparent_hugepage")
LOOK_SECONDS: Final = 1.0
MOST_LOOKS: Final = 120

Document = dict[str, Any]


class Run:
    """A run, from `with` to `write()`; a thread looks at the load of the machine meanwhile."""

    def __init__(self, part: str) -> None:
        """`part`: of the whole benchmark, a word for a file's name."""
        self._part = part
        self._began = datetime.now(UTC)
        self._since = time.monotonic()
        self._looks: list[tuple[float, float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        seconds = LOOK_SECONDS
        before = _processor_time()
        over = False
        while not over:
            # Once more at the end, so that a short run has a look, too.
            over = self._over.wait(seconds)
            now = _processor_time()
            total = now[1] - before[1]
            busy = (now[0] - before[0]) / total if total else 0.0
            before = now
            at = time.monotonic() - self._since
            self._looks.append((round(at, 1), round(busy, 2), round(os.getloadavg()[0], 2)))
            if len(self._looks) == MOST_LOOKS:
                del self._looks[::2]
                seconds *= 2

    def document(self, **found: Any) -> Document:
        """All that is told of it; call it when the run is over."""
        return {
            "part": self._part,
            "time": self._began.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._since, 1),
            "msharefs": version("msharefs"),
            "python": platform.python_version(),
            "libraries": {name: version(name) for name in LIBRARIES},
            "kernel": platform.release(),
            "machine": platform.machine(),
            "processor": _field("/proc/cpuinfo", "model name"),
            "processors": os.cpu_count(),
            "memory": _field("/proc/meminfo", "MemTotal"),
            "transparent_huge_pages": _setting("enabled"),
            "shmem_huge_pages": _setting("shmem_enabled"),
            "load": [
                {"seconds": at, "busy": busy, "average": average}
                for at, busy, average in self._looks
            ],
            **found,
        }

    def write(self, document: Document, directory: Path) -> Path:
        """As JSON; returns where."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self._began:%Y%m%dT%H%M%SZ}-{self._part}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        return path


def conditions(document: Document) -> str:
    """Where and beside what it was measured, in a line."""
    averages = [look["average"] for look in document["load"]]
    kernel = document["kernel"].split("-")[0]
    return (
        f"Linux {kernel}, {document['processors']} processors, "
        f"load average {min(averages):.0f} to {max(averages):.0f}"
    )


def _processor_time() -> tuple[int, int]:
    """Of all processors since boot, in ticks: busy, and altogether (proc_stat(5))."""
    with Path("/proc/stat").open() as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    idle, waiting = ticks[3:5]
    return sum(ticks) - idle - waiting, sum(ticks)


def _field(path: str, key: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return "unknown"


def _setting(name: str) -> str:
    with contextlib.suppress(OSError):
        words = (SETTINGS / name).read_text().split()
        return next((word[1:-1] for word in words if word.startswith("[")), "unknown")
    return "unknown"
