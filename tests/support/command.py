"""The command `mshare` in tests of its own: to its end, as nobody, on a terminal."""

from __future__ import annotations

import json
import mmap
import os
import pty
import select
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyte
import pytest
from conftest import ALIGNMENT, BASE, BIN, Client, Daemon, eventually

NOBODY = 65534
SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
MSHARE = str(BIN / "mshare")


def environment(root: Path | None, **more: str) -> dict[str, str]:
    own = {"PATH": f"{BIN}:{os.defpath}", "LC_ALL": "C.UTF-8", "TERM": "xterm"}
    return own | ({} if root is None else {"MSHARE_ROOT": str(root)}) | more


class Command:
    """`mshare` for one daemon, or for none."""

    def __init__(self, root: Path | None) -> None:
        self.root = root

    def run(self, *words: str | bytes | int, **more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [MSHARE, *(word if isinstance(word, bytes) else str(word) for word in words)],
            check=False,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=50,
            cwd="/",
            env=environment(self.root, **more),
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def ok(self, *words: str | bytes | int, **more: str) -> str:
        done = self.run(*words, **more)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def json(self, *words: str | bytes | int) -> Any:
        text = self.ok(*words, "--json")
        assert text.isascii()
        return json.loads(text)

    def fails(self, *words: str | bytes | int, code: int = 1, **more: str) -> str:
        """It says why, on one line."""
        done = self.run(*words, **more)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert done.stderr.startswith("mshare: ")
        assert done.stderr.count("\n") == 1
        assert done.stderr.removesuffix("\n").isprintable()
        return done.stderr


@pytest.fixture(name="mshare")
def mshare_fixture(daemon: Daemon) -> Command:
    return Command(daemon.mount)


def make(command: Command, name: str | bytes, *more: str) -> None:
    command.ok("create", f"--start={BASE}", f"--size={SIZE}", *more, "--", name)


def donate(spawn: Callable[..., Client], name: str, mode: int = 0o600) -> Client:
    """The sharer of a region that has memory in its first half, all of it touched."""
    donor = spawn()
    donor.ok("map", BASE, ALIGNMENT, mmap.MAP_SHARED)
    donor.ok("mshare", name, BASE, SIZE, CREATE, mode)
    donor.ok("fill", BASE, ALIGNMENT, 1)
    return donor


# -- what there is --


AS_NOBODY = f"""
# The interpreter may lie where only root can read: have everything imported first.
import contextlib, io, json, os, sys
from libmshare.cli import __main__, app, create, doctor, listing, remove
with contextlib.redirect_stdout(io.StringIO()):
    app.app(["--timeout=10", "ls"], standalone_mode=False)
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
__main__.main()
"""


def as_nobody(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", AS_NOBODY, *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=50,
        cwd="/",
        env=environment(root),
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


class Terminal:
    """A pseudo terminal with `mshare` on it."""

    def __init__(
        self,
        root: Path,
        *words: str | bytes,
        columns: int = 120,
        lines: int = 40,
        program: Sequence[str] = (MSHARE,),
        cwd: Path | str = "/",
        **more: str,
    ) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (lines, columns))
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._shown = 0
        self.before = termios.tcgetattr(slave)
        self.seen = b""
        self.slave = slave
        # A session's first terminal becomes its own, so that Ctrl-C is a signal.
        script = 'exec "$@" <"$0" >"$0" 2>&1'
        self.process = subprocess.Popen(
            ["sh", "-c", script, os.ttyname(slave), *program, *words],
            cwd=cwd,
            env=environment(root, **more),
            start_new_session=True,
        )

    def read(self, seconds: float = 0.05) -> bytes:
        while select.select([self.master], [], [], seconds)[0]:
            try:
                part = os.read(self.master, 65536)
            except OSError:
                break
            if not part:
                break
            self.seen += part
        return self.seen

    def screen(self) -> list[str]:
        """What a person sees: the lines, without what is blank at their ends."""
        seen = self.read()
        self._stream.feed(seen[self._shown :])
        self._shown = len(seen)
        return [line.rstrip() for line in self._screen.display]

    def displays(self, *texts: str) -> list[str]:
        """The screen, as soon as all of that is on it."""

        def is_there() -> bool:
            screen = "\n".join(self.screen())
            return all(text in screen for text in texts)

        eventually(is_there, repr(texts))
        return self.screen()

    def shows(self, text: bytes) -> None:
        eventually(lambda: text in self.read(), repr(text))

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def end(self) -> int:
        def ended() -> bool:
            self.read()
            return self.process.poll() is not None

        eventually(ended, "the end")
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture(name="terminal")
def terminal_fixture(daemon: Daemon) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str | bytes, **how: Any) -> Terminal:
        opened.append(Terminal(daemon.mount, *words, **how))
        return opened[-1]

    yield start
    for each in opened:
        each.close()
