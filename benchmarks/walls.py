"""What one user's attack costs another: a table, and JSON in benchmarks/results.

    .venv/bin/python benchmarks/walls.py
    .venv/bin/python benchmarks/walls.py --quick --only storm

As root.  Alice touches fresh pages, makes calls, forks and lists the mount; each of them
is timed (a) alone, (b) beside plain busy loops, as many as the attack has threads that
compute, and (c) beside the attack, in turns.  So what (c) takes longer than (b) is not
for want of a processor.  The attacks are those of tests/support/hostile.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

# Behind what is installed: libmshare and msharefsd are the wheel's, not the source's.
sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import hostile
from hostile import ATTACKS, Attack
from victim import SOURCE, Kind, StuckError, Victim

from benchmarks import results, service
from benchmarks.options import Options
from benchmarks.table import Table
from benchmarks.worker import library_flags
from libmshare import core

ALIGNMENT: Final = 2 << 20
PAUSE_US: Final = 1000
"""Between two things that she does: she is not to be the one who computes most."""
TIMES: Final = 3.0
MORE_MS: Final = 2.0
"""The goal: p99 beside the attack is at most so many times that beside loops, and this."""
LONGEST_MS: Final = 200.0
"""And nothing takes longer than that which does not beside loops."""
SIDES: Final = ("alone", "loops", "attack")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    rounds: int
    seconds: float
    attacks: int | None = None
    """How many of them; None for all."""


FULL: Final = Plan(rounds=3, seconds=3.0)
QUICK: Final = Plan(rounds=1, seconds=1.0)
SMOKE: Final = Plan(rounds=1, seconds=0.3, attacks=2)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that so many are not above."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass(slots=True)
class Row:
    """One thing that alice does, beside one attack; samples in milliseconds."""

    attack: str
    runnable: int
    kind: Kind
    samples: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})

    def p99(self, side: str) -> float:
        """The 99th percentile."""
        return percentile(self.samples[side], 99)

    @property
    def ratio(self) -> float:
        """Beside the attack over beside loops."""
        return self.p99("attack") / max(self.p99("loops"), 1e-3)

    def verdict(self) -> str:
        """Whether the goal is met."""
        late = self.p99("attack") > TIMES * self.p99("loops") + MORE_MS
        longest = {side: max(self.samples[side]) for side in SIDES}
        hung = longest["attack"] > max(LONGEST_MS, TIMES * longest["loops"])
        return "MISSED" if late or hung else "met"

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "beside": self.attack,
            "runnable": self.runnable,
            "what": self.kind.name,
            "unit": "ms",
            "ratio": self.ratio,
            "verdict": self.verdict(),
            **{
                side: {
                    "count": len(samples),
                    "p50": percentile(samples, 50),
                    "p99": percentile(samples, 99),
                    "max": max(samples),
                }
                for side, samples in self.samples.items()
            },
        }


def render(rows: Sequence[Row]) -> str:
    """The table: plain text, columns aligned."""
    heads = [f"{side} p50/p99/max" for side in SIDES]
    cells = []
    for row in rows:
        each = [
            "/".join(
                f"{value:.3g}"
                for value in (percentile(found, 50), percentile(found, 99), max(found))
            )
            for found in (row.samples[side] for side in SIDES)
        ]
        what = row.kind.name.lower()
        cells.append(
            (row.attack, str(row.runnable), what, *each, f"{row.ratio:.2f}", row.verdict())
        )
    head = ("attack", "threads", "what", *heads, "p99 ratio", "goal")
    goal = (
        f"in ms; the goal: p99 at most {TIMES:g} times what it is beside as many plain loops and "
        f"{MORE_MS:g} ms, and no wait over {LONGEST_MS:g} ms that those do not cause"
    )
    return f"{Table('', head, cells, words=range(len(head)))}\n{goal}"


def _measure_for(alice: Victim, seconds: float) -> dict[Kind, list[float]]:
    """What she does in that time; what she waits for at the end counts as well."""
    before = alice.check()
    time.sleep(seconds)
    after = alice.check()
    found = {kind: alice.samples(kind, before.done) for kind in Kind}
    if after.doing is not None:
        found[after.doing].append((time.monotonic_ns() - after.since) / 1e6)
    return found


def _loops(threads: int) -> Attack:
    def compute(evil: hostile.Evil) -> None:
        evil.c.spin(threads)
        evil.held()

    return Attack(f"{threads} loops", compute, threads)


@dataclass(frozen=True)
class Bench:
    """Where programs and mounts are."""

    directory: Path
    victim: Path
    helpers: Path
    arguments: tuple[str, ...]

    def measure(self, attack: Attack, plan: Plan) -> list[Row]:
        """One attack, in turns with what it is compared with."""
        rows = [Row(attack.name, attack.runnable, kind) for kind in Kind]
        own = Path(tempfile.mkdtemp(dir=self.directory))
        own.chmod(0o755)
        arguments = list(self.arguments)
        if attack.config:
            (own / "config").write_text(attack.config)
            arguments.append(f"--config={own / 'config'}")
        mode = 0o644 if attack.on_alice else 0o600
        with service.running(own, ALIGNMENT, *arguments) as running:
            alice = Victim(self.victim, running.mountpoint, own, mode=mode, pause_us=PAUSE_US)
            try:
                alice.goes_on()
                for _ in range(plan.rounds):
                    for side in SIDES:
                        self._one_side(side, attack, running.mountpoint, own, alice, rows, plan)
            finally:
                alice.end()
        for row in rows:
            for samples in row.samples.values():
                if not samples:  # she did not come so far
                    samples.append(plan.rounds * plan.seconds * 1e3)
        return rows

    def _one_side(
        self,
        side: str,
        attack: Attack,
        mount: Path,
        own: Path,
        alice: Victim,
        rows: list[Row],
        plan: Plan,
    ) -> None:
        what = {"alone": None, "loops": _loops(attack.runnable), "attack": attack}[side]
        with contextlib.ExitStack() as stack:
            if what is not None:
                stack.enter_context(hostile.held(what, mount, own, self.helpers))
            for kind, samples in _measure_for(alice, plan.seconds).items():
                rows[kind].samples[side] += samples
        for name in os.listdir(mount):
            if name.startswith("evil"):
                os.unlink(mount / name)
        # What the attack has left to do is not the next side's.
        alice.goes_on(100)


@contextlib.contextmanager
def _bench() -> Iterator[Bench]:
    directory = Path(tempfile.mkdtemp(prefix="mshare-walls-"))
    directory.chmod(0o755)
    binaries = Path(sys.executable).parent
    try:
        library = core.library_directory()
        if library is not None:
            shutil.copy(library / core.LIBRARY, directory)
        victim = directory / "victim"
        flags = ["-std=gnu11", "-O2", "-Wl,-rpath,$ORIGIN", "-pthread"]
        subprocess.run(["cc", *flags, "-o", victim, SOURCE, *library_flags()], check=True)
        usage = subprocess.run([binaries / "msharefsd", "--help"], check=True, capture_output=True)
        arguments = ("--userfaultfd=all",) if b"--userfaultfd" in usage.stdout else ()
        yield Bench(directory, victim, hostile.compile_helpers(directory), arguments)
    finally:
        # Never through a mount that could not be taken down.
        if not any(os.path.ismount(path / "mshare") for path in directory.iterdir()):
            shutil.rmtree(directory)


def main() -> None:
    """Run, print, write."""
    options = Options(__doc__, (FULL, QUICK, SMOKE), "a second for each side")
    options.parser.add_argument("--only", default="", help="attacks that have this in their name")
    arguments, plan = options.parse()
    attacks = [attack for name, attack in ATTACKS.items() if arguments.only in name]
    rows: list[Row] = []
    with results.Run("walls") as run, _bench() as bench:
        for attack in attacks[: plan.attacks]:
            print(f"{attack.name} ...", file=sys.stderr, flush=True)
            try:
                rows += bench.measure(attack, plan)
            except (StuckError, AssertionError, service.ServiceError) as error:
                print(f"left out: {attack.name}: {error}", file=sys.stderr)
    if not rows:
        sys.exit("walls: nothing was measured")
    document = run.document(
        plan={"rounds": plan.rounds, "seconds": plan.seconds},
        goal={"times": TIMES, "more_ms": MORE_MS, "longest_ms": LONGEST_MS},
        rows=[row.as_json() for row in rows],
    )
    print(render(rows), results.conditions(document), sep="\n")
    print(f"\n{run.write(document, arguments.results)}")


if __name__ == "__main__":
    main()
