"""What the fuzzers share: how long, from which seed, and processes that are replaced.

`MSHARE_FUZZ_SECONDS` says how long each runs (12), `MSHARE_FUZZ_SEED` where the dice
begin; a run that fails prints its seed.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence

from bare import Child
from world import World

SECONDS = float(os.environ.get("MSHARE_FUZZ_SECONDS", "12"))
SEED = int(os.environ.get("MSHARE_FUZZ_SEED", str(time.time_ns() % 2**32)))
TIMEOUT = SECONDS * 2 + 120

Job = Callable[[random.Random], object]

NUMBERS = (
    *(0, 1, 2, 7, 4095, 4096, 4097, 8192, 2**21 - 1, 2**21, 2**21 + 4096),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**46, 2**47 - 4096, 2**47),
    *(2**62, 2**63 - 4096, 2**63 - 1, 2**63, 2**64 - 2**21, 2**64 - 4096, 2**64 - 1),
)


def number(dice: random.Random, bits: int = 64) -> int:
    """One that may be hard."""
    chosen: int = dice.choice(NUMBERS) if dice.random() < 0.7 else dice.getrandbits(bits)
    near: int = dice.choice((0, 0, 0, 1, -1, 4096, -4096))
    return (chosen + near) % (1 << bits)


def keep_at_it(world: World, jobs: Sequence[tuple[int, Job]]) -> None:
    """Have a process of each (user, job), and another when it has died, until time is up.

    Alice does well all the time.  A job that raises has found something.
    """
    print(f"MSHARE_FUZZ_SEED={SEED}")
    dice = random.Random(SEED)
    running: dict[int, Child] = {}
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        for place, (uid, job) in enumerate(jobs):
            child = running.get(place)
            if child is not None and dice.random() < 0.05:
                child.kill()
                child = None
            elif child is not None and (code := child.poll()) is not None:
                assert code != 1, "a fuzzer found something: see above"
                child = None
            if child is None:
                seed = dice.getrandbits(32)

                def run(job: Job = job, seed: int = seed) -> None:
                    job(random.Random(seed))

                running[place] = world.mallory_does(run, uid=uid)
        time.sleep(0.05)
        world.alice_is_well()
        assert world.daemon.process is not None
        assert world.daemon.process.poll() is None, "the daemon is dead"
    for child in running.values():
        code = child.poll()
        assert code != 1, "a fuzzer found something: see above"
        child.kill()
