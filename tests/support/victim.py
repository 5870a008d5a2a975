"""Alice, who only wants to go on: victim.c, and the board on which she notes what she did."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_name("victim.c")
ALICE: Final = 65533
START: Final = 0x2000_0000_0000
AREA: Final = 16 << 20
SIZE: Final = 2 * AREA
FILE_BYTES: Final = 16 * 4096
SAMPLES: Final = 1 << 15


class Kind(IntEnum):
    """What she does; the order is that of victim.c."""

    TOUCH = 0
    CALL = 1
    FORK = 2
    STAT = 3
    LIST = 4


_HEAD: Final = struct.Struct(f"=6Q{len(Kind)}Q{len(Kind)}Q256s")
_PAUSED_AT: Final = 24
_RESTS: Final = 4
BOARD_BYTES: Final = _HEAD.size + len(Kind) * SAMPLES * 4
ENOUGH: Final = {Kind.TOUCH: 100, Kind.CALL: 10, Kind.FORK: 3, Kind.STAT: 10, Kind.LIST: 3}
"""What she does in a fraction of a second, if nobody keeps her from it."""
HANG_SECONDS: Final = float(os.environ.get("MSHARE_HANG_SECONDS", "45"))
"""No load explains that she does not get that far in this time."""


class StuckError(AssertionError):
    """She does not go on; the text says what she waits for."""


@dataclass(frozen=True, slots=True)
class Noted:
    """The board at one moment."""

    pid: int
    doing: Kind | None
    since: int
    rests: bool
    answered: int
    done: tuple[int, ...]
    refused: tuple[int, ...]
    trouble: str

    def waits(self) -> str:
        """What she waits for, for people."""
        if self.doing is None:
            return "nothing"
        seconds = (time.monotonic_ns() - self.since) / 1e9
        return f"{self.doing.name}, for {seconds:.1f} s"


class Victim:
    """One process of hers; `end()` it whatever happens."""

    def __init__(
        self,
        program: Path,
        mount: Path,
        directory: Path,
        *,
        name: str = "good",
        mode: int = 0o600,
        start: int = START,
        uid: int = ALICE,
        create: bool = True,
        pause_us: int = 0,
        waits_for: str = "",
    ) -> None:
        """`waits_for` is another region, which a thread of hers attaches again and again."""
        self.name = name
        board = directory / f"board-{name}-{uid}-{os.urandom(4).hex()}"
        file = directory / f"file-{name}-{uid}"
        file.write_bytes(b"F" * FILE_BYTES)
        file.chmod(0o644)
        board.touch()
        os.truncate(board, BOARD_BYTES)
        os.chown(board, uid, uid)
        with board.open("r+b") as opened:
            self._board = mmap.mmap(opened.fileno(), BOARD_BYTES)
        words = [program, board, name, hex(start), f"{mode:o}", file, str(int(create))]
        self.process = subprocess.Popen(
            [*map(str, words), str(pause_us), *([waits_for] if waits_for else [])],
            env={"MSHARE_ROOT": str(mount), "PATH": os.defpath, "MSHARE_RECONNECT_SECONDS": "100"},
            cwd="/",
            user=uid,
            group=uid,
            extra_groups=[],
            start_new_session=True,
        )

    def look(self) -> Noted:
        """What the board says."""
        pid, doing, since, _, rests, answered, *counts, trouble = _HEAD.unpack_from(self._board)
        kinds = len(Kind)
        return Noted(
            pid,
            Kind(doing - 1) if doing else None,
            since,
            bool(rests),
            answered,
            tuple(counts[:kinds]),
            tuple(counts[kinds:]),
            trouble.rstrip(b"\0").decode(errors="replace"),
        )

    def check(self) -> Noted:
        """She lives, and has found nothing wrong."""
        noted = self.look()
        code = self.process.poll()
        assert not noted.trouble, f"{self.name}: {noted.trouble}"
        assert code is None, f"{self.name} ended with {code}"
        return noted

    def goes_on(self, seconds: float = HANG_SECONDS) -> None:
        """Wait until she has done enough of everything, from now on.

        Raises StuckError when nothing of it has come on for so many seconds: a machine that
        has much else to do is slow, and that is no hang.
        """
        before = last = self.check()
        deadline = time.monotonic() + seconds
        while True:
            now = self.check()
            if now.done != last.done:
                last, deadline = now, time.monotonic() + seconds
            less = [
                f"{kind.name} {now.done[kind] - before.done[kind]} of {enough}"
                for kind, enough in ENOUGH.items()
                if now.done[kind] - before.done[kind] < enough
            ]
            if not less:
                return
            if time.monotonic() > deadline:
                raise StuckError(
                    f"for {seconds:.0f} s nothing, and only {', '.join(less)}; {now.waits()}"
                )
            time.sleep(0.005)

    def rest(self) -> None:
        """Have her do nothing; returns when she does."""
        struct.pack_into("=Q", self._board, _PAUSED_AT, 1)
        deadline = time.monotonic() + HANG_SECONDS
        while not self.check().rests:
            assert time.monotonic() < deadline, self.look().waits()
            time.sleep(0.005)

    def go(self) -> None:
        """Have her go on."""
        struct.pack_into("=Q", self._board, _PAUSED_AT, 0)

    def samples(self, kind: Kind, since: tuple[int, ...]) -> list[float]:
        """How long each took that was done after `since` (milliseconds), as far as kept."""
        done = self.look().done[kind]
        first = max(since[kind], done - SAMPLES)
        base = _HEAD.size + kind * SAMPLES * 4
        return [
            struct.unpack_from("=I", self._board, base + number % SAMPLES * 4)[0] / 1e3
            for number in range(first, done)
        ]

    def end(self) -> None:
        """SIGKILL, her children too."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait()


@contextlib.contextmanager
def victim(program: Path, mount: Path, directory: Path, **how: object) -> Iterator[Victim]:
    """Alice, who has begun and goes on."""
    made = Victim(program, mount, directory, **how)  # type: ignore[arg-type] # Victim's own
    try:
        made.goes_on()
        yield made
    finally:
        made.end()
