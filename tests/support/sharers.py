"""Processes that have page tables, for who wants to find them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Final

import pytest

PRELUDE: Final = """
import ctypes, mmap, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MiB, HUGE = 1 << 20, 2 << 20
SHARED, PRIVATE, ANONYMOUS, NORESERVE = 1, 2, 0x20, 0x4000

def place(size, off=0):  # a free place, `off` behind a multiple of 2 MiB
    at = libc.mmap(None, size + 2 * HUGE, 0, PRIVATE | ANONYMOUS | NORESERVE, -1, 0)
    libc.munmap(at, size + 2 * HUGE)
    return at + -at % HUGE + off

def shared(size, off=0, fd=-1, offset=0):
    flags = SHARED | NORESERVE | (ANONYMOUS if fd < 0 else 0)
    at = libc.mmap(place(size, off), size, 3, flags, fd, offset)
    assert at % HUGE == off, hex(at)
    return at

def touch(at, size, step=4096):
    for each in range(at, at + size, step):
        ctypes.c_char.from_address(each).value = b"x"

def read(at, size, step=4096):
    places = range(at, at + size, step)
    return sum(ctypes.c_ubyte.from_address(each).value == 120 for each in places)

def children(count, function):
    for _ in range(count):
        receiving, sending = os.pipe()
        if os.fork() == 0:
            function()
            os.write(sending, b"x")
            signal.pause()
            os._exit(0)
        os.read(receiving, 1)
        os.close(receiving), os.close(sending)

def become(user):  # and be one whom that user may look at: prctl(2), PR_SET_DUMPABLE
    os.setgroups([]), os.setgid(user), os.setuid(user), libc.prctl(4, 1, 0, 0, 0)

def ready():
    print("ready", flush=True)
    for line in sys.stdin:
        print(eval(line), flush=True)
    os.killpg(0, signal.SIGKILL)
"""


class Sharer:
    """A Python program that maps, forks and waits; its children go with it."""

    def __init__(self, code: str, **popen: object) -> None:
        self.process = subprocess.Popen(  # type: ignore[call-overload] # popen is the test's
            [sys.executable, "-c", f"{PRELUDE}\n{code}\nready()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd="/",
            **popen,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        line = self.process.stdout.readline()
        assert line, "it ended"
        return str(line.rstrip("\n"))

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def do(self, expression: str) -> str:
        """What an expression comes to, in the program."""
        self.process.stdin.write(f"{expression}\n")
        self.process.stdin.flush()
        return self._line()

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


Sharers = Callable[..., Sharer]


@pytest.fixture(name="sharers")
def make_sharers() -> Iterator[Sharers]:
    """Start such programs; they end with the test."""
    started: list[Sharer] = []

    def start(code: str, **popen: object) -> Sharer:
        started.append(Sharer(code, **popen))
        return started[-1]

    yield start
    for each in started:
        each.end()
