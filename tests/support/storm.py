"""storm NUMBER SEED: threads that make, attach, close and unlink regions until SIGTERM.

SIGINT and SIGALRM raise in the main thread, wherever it is.  A region's first bytes are its
identity, or zeros: whoever finds another one's has been given stale data.  Each round is a
byte on standard output; what is wrong is told on standard error, and the exit status is 1.
"""

from __future__ import annotations

import gc
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from typing import Any

from libmshare import MshareError, NoSuchRegion, Region, RegionExists, Stale, holding

THREADS = 8
SHARED = 3
SIZE = 64 << 10
AREA = (0x2000_0000_0000, 0x5000_0000_0000)
"""Where the daemon gives addresses out first, and nothing else is."""


class AlarmError(Exception):
    """What the signals raise."""


class Storm:
    """One process's part."""

    def __init__(self, number: int, seed: int) -> None:
        self.prefix = f"storm{number}-{os.getpid()}-"
        self.seed = seed
        self.stop = threading.Event()
        self.armed = False
        self.wrong = False
        self.sent: list[bytes] = []

    def ring(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise AlarmError

    def look(self, region: Region) -> None:
        """What is in it is its own."""
        found, identity = bytes(region.buf[:16]), bytes.fromhex(region.identity.id)
        if found not in (identity, bytes(16)):
            raise AssertionError(f"{identity.hex()} has the data of {found.hex()}")

    def create(self, name: str, dice: random.Random) -> None:
        with Region.create(name, SIZE) as region:
            if any(region.buf[:16]):
                raise AssertionError("a new region is not zeros")
            region.buf[:16] = bytes.fromhex(region.identity.id)
            self.sent.append(pickle.dumps(region))
            del self.sent[:-20]
            view = region.buf[:8] if dice.random() < 0.3 else None
            with Region.attach(region.identity) as same:
                self.look(same)
            region.unlink()
        if view is not None and not any(view):
            raise AssertionError("memory changed under a buffer")

    def share(self, name: str) -> None:
        """What others make, and unlink, at the same time."""
        try:
            with Region.create(name, SIZE) as region:
                region.buf[:16] = bytes.fromhex(region.identity.id)
        except RegionExists:
            pass
        try:
            with Region.attach(name) as region:
                self.look(region)
                self.sent.append(pickle.dumps(region))
                region.unlink()
        except (NoSuchRegion, Stale):
            pass

    def unpickle(self, dice: random.Random) -> None:
        try:
            with pickle.loads(dice.choice(self.sent)) as region:
                self.look(region)
        except (Stale, IndexError):
            pass

    def one_round(self, number: int, dice: random.Random) -> None:
        what = dice.randrange(4)
        if what == 0:
            self.share(f"shared{dice.randrange(SHARED)}")
        elif what == 1:
            self.unpickle(dice)
        elif what == 2:
            Region.create(size=SIZE, ephemeral=True).buf[0] = 1  # dropped as it is
        else:
            self.create(f"{self.prefix}{threading.get_ident()}-{number}", dice)

    def rounds(self, thread: int) -> None:
        dice = random.Random(f"{self.seed} {thread}")
        number = 0
        while not self.stop.is_set():
            number += 1
            try:
                self.armed |= thread == 0
                self.one_round(number, dice)
            except AlarmError:
                pass
            except Exception:  # noqa: BLE001 - told, and the end
                traceback.print_exc()
                self.wrong = True
                self.stop.set()
            if thread == 0:
                self.armed = False
            os.write(1, b".")

    def run(self) -> None:
        threads = [threading.Thread(target=self.rounds, args=(i,)) for i in range(1, THREADS)]
        for thread in threads:
            thread.start()
        self.rounds(0)
        for thread in threads:
            thread.join()

    def left(self, descriptors: int) -> str:
        """What is there that was not before, as so many descriptors; or nothing."""
        gc.collect()
        if held := holding.held():
            return f"held: {held}"
        with open("/proc/self/maps") as maps:
            starts = [int(line.partition("-")[0], 16) for line in maps]
        if left := [hex(at) for at in starts if AREA[0] <= at < AREA[1]]:
            return f"mapped: {left}"
        now = len(os.listdir("/proc/self/fd"))
        return f"{now} descriptors, and {descriptors} before" if now > descriptors else ""


def ignore(what: Any) -> None:
    """An error of a signal handler that met a destructor is seen nowhere else."""
    if not isinstance(what.exc_value, AlarmError):
        sys.__unraisablehook__(what)


def main() -> None:
    storm = Storm(int(sys.argv[1]), int(sys.argv[2]))
    sys.setswitchinterval(1e-6)
    sys.unraisablehook = ignore
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, storm.ring)
    signal.signal(signal.SIGTERM, lambda *_: storm.stop.set())
    with Region.create(size=SIZE, ephemeral=True):
        before = len(os.listdir("/proc/self/fd"))
    del before
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    storm.run()
    deadline = time.monotonic() + 30  # for what is undone when the daemon comes to it
    while (left := storm.left(before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if left:
        print(left, file=sys.stderr)
        storm.wrong = True
    # What was made, and then the signal came: it is there, and whole.
    for name in os.listdir(os.environ["MSHARE_ROOT"]):
        if name.startswith(storm.prefix):
            try:
                with Region.attach(name) as region:
                    storm.look(region)
                    region.unlink()
            except MshareError as error:
                print(f"{name}: {error}", file=sys.stderr)
                storm.wrong = True
    os._exit(storm.wrong)


if __name__ == "__main__":
    main()
