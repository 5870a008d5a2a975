"""A process that attaches, forks, creates and touches, and takes the time; see paths.py.

Each line of its input is a command and its numbers, each line of its output a JSON list of
nanoseconds.  It runs with whatever libmshare its interpreter has, or with SharedMemory
(`--peer`), or with plain memory and the least server of page faults (`--least`), and as another
user (`--uid`).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import resource_tracker, shared_memory
from typing import Any, Final

PAGE: Final = 4096
CHUNK: Final = 64 << 10
"""What a fault at a random place populates; faults are timed in distinct ones."""
ALIGNED: Final = 2 << 20
PR_SET_DUMPABLE: Final = 4


class Least:
    """Shared memory whose page faults the least server answers: least.c."""

    def __init__(self, size: int, program: str, chunk: int) -> None:
        from msharefsd.linux import uffd  # noqa: PLC0415 - nobody else needs it

        memory = os.memfd_create("least")
        os.ftruncate(memory, size)
        self._mapped = mmap.mmap(memory, size)
        os.close(memory)
        start = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._mapped))
        faults = uffd.open_own()
        uffd.handshake(faults, uffd.Feature.MISSING_SHMEM)
        os.set_blocking(faults, True)
        uffd.register(faults, start, size, uffd.Mode.MISSING)
        words = [program, *map(str, (faults, start, start + size, chunk))]
        self._server = subprocess.Popen(words, pass_fds=[faults])
        os.close(faults)
        self.buf = memoryview(self._mapped)

    def unlink(self) -> None:
        """It has no name."""

    def close(self) -> None:
        """No more of it."""
        self.buf.release()
        self._mapped.close()
        self._server.kill()
        if self._server.wait() != -signal.SIGKILL:
            raise RuntimeError("the least server has ended before: what was measured is nothing")


class Ways:
    """How memory is made and attached; what comes of that has `buf`, `close`, `unlink`."""

    def __init__(self, *, peer: bool, least: str, chunk: int) -> None:
        self.tracked = False
        """Whether what is attached is removed when we end, unless that is undone."""
        if least:
            self.create: Callable[[str, int], Any] = lambda _, size: Least(size, least, chunk)
            return
        if peer:
            self.create = lambda name, size: shared_memory.SharedMemory(
                name, create=True, size=size
            )
            self.attach: Callable[[str], Any] = shared_memory.SharedMemory
            self.tracked = sys.version_info < (3, 13)
            return
        import libmshare  # noqa: PLC0415 - the peer has none of it

        region: Any = libmshare.Region
        if hasattr(region, "attach"):
            self.create, self.attach = region.create, region.attach
        else:  # a version of before that
            self.create = lambda name, size: region(
                name, create=True, exclusive=True, start=_place(), size=_aligned(size)
            )
            self.attach = region


def _place() -> int:
    return (32 << 40) + random.randrange(1 << 19) * (64 << 20)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class Worker:
    """What it is told to do."""

    def __init__(self, ways: Ways) -> None:
        self._ways = ways
        self._kept: dict[str, Any] = {}
        self._made: set[str] = set()

    def end(self) -> None:
        """Leave nothing behind."""
        for name in list(self._kept):
            if name in self._made:
                self.remove(name)
            else:
                self.drop(name)

    def make(self, name: str, size: str, mode: str) -> list[int]:
        """Memory that stays, for others as well."""
        self._kept[name] = self._ways.create(name, int(size))
        self._made.add(name)
        if root := os.environ.get("MSHARE_ROOT"):
            os.chmod(f"{root}/{name}", int(mode, 8))
        return []

    def hold(self, name: str) -> list[int]:
        """Attach what another process has made."""
        self._kept[name] = self._ways.attach(name)
        if self._ways.tracked:
            resource_tracker.unregister(f"/{name}", "shared_memory")
        return []

    def drop(self, name: str) -> list[int]:
        """No more of that."""
        self._kept.pop(name).close()
        return []

    def remove(self, name: str) -> list[int]:
        """No more of that, and no name."""
        self._made.discard(name)
        self._kept[name].unlink()
        return self.drop(name)

    def attach(self, name: str, count: str) -> list[int]:
        """Attach; what it takes to detach is not told."""
        times = []
        for _ in range(int(count)):
            since = time.perf_counter_ns()
            memory = self._ways.attach(name)
            times.append(time.perf_counter_ns() - since)
            memory.close()
            if self._ways.tracked:
                resource_tracker.unregister(f"/{name}", "shared_memory")
        return times

    def fork(self, count: str) -> list[int]:
        """Fork with everything that is kept; the child ends at once."""
        times = []
        for _ in range(int(count)):
            since = time.perf_counter_ns()
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
            times.append(time.perf_counter_ns() - since)
        return times

    def create(self, size: str, count: str) -> list[int]:
        """Create, unlink, close."""
        times = []
        for number in range(int(count)):
            since = time.perf_counter_ns()
            memory = self._ways.create(f"paths-{os.getpid()}-{number}", int(size))
            memory.unlink()
            memory.close()
            times.append(time.perf_counter_ns() - since)
        return times

    def faults(self, name: str, size: str, count: str, seed: str) -> list[int]:
        """Write one random page in each of so many random chunks."""
        buf = self._kept[name].buf
        chosen = random.Random(int(seed))
        times = []
        for chunk in chosen.sample(range(int(size) // CHUNK), int(count)):
            at = chunk * CHUNK + chosen.randrange(CHUNK // PAGE) * PAGE
            since = time.perf_counter_ns()
            buf[at] = 1
            times.append(time.perf_counter_ns() - since)
        return times

    def shuffle(self, name: str, size: str, seed: str) -> list[int]:
        """Write every page, in random order."""
        buf = self._kept[name].buf
        order = [*range(0, int(size), PAGE)]
        random.Random(int(seed)).shuffle(order)
        since = time.perf_counter_ns()
        for at in order:
            buf[at] = 1
        return [time.perf_counter_ns() - since]

    def touch(self, name: str, size: str) -> list[int]:
        """Write every page, one after the other."""
        buf = self._kept[name].buf
        since = time.perf_counter_ns()
        for at in range(0, int(size), PAGE):
            buf[at] = 1
        return [time.perf_counter_ns() - since]


def _become(uid: int) -> None:
    """After everything is imported: the interpreter may be root's alone."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # Or /proc/self is root's (proc(5)), and a donor cannot read it.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def main() -> None:
    """Obey until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--least", default="", metavar="PROGRAM")
    parser.add_argument("--chunk", type=int, default=0, help="what that populates, in bytes")
    parser.add_argument("--uid", type=int, default=0)
    arguments = parser.parse_args()
    ways = Ways(peer=arguments.peer, least=arguments.least, chunk=arguments.chunk)
    if arguments.uid:
        _become(arguments.uid)
    worker = Worker(ways)
    for line in sys.stdin:
        command, *words = line.split()
        print(json.dumps(getattr(worker, command)(*words)), flush=True)
    worker.end()


if __name__ == "__main__":
    main()
