"""Others are spared: pauses, and calls that nobody interrupts."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from msharetables import pace
from msharetables.pace import Haste, Pace

pytestmark = pytest.mark.shm_only

TICKS = os.sysconf("SC_CLK_TCK")

Machine = Callable[[float], None]


@pytest.fixture(name="machine")
def make_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Say for how long all its processors together have been idle."""
    stat = tmp_path / "stat"
    monkeypatch.setattr(pace, "_STAT", stat)
    # The next look is always due, and a second later than the last.
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr(pace, "time", type("", (), {"monotonic": staticmethod(clock)}))

    def idle(seconds: float) -> None:
        stat.write_text(f"cpu  1 2 3 {round(seconds * TICKS)} 0 5 6 7 0 0\ncpu0 1\n")

    idle(0)
    return idle


@pytest.mark.parametrize(
    ("idle", "share"),
    [(0.0, 0.25), (0.2, 0.25), (0.5, 0.35), (0.75, 0.6), (1.5, 1.0), (63.0, 1.0)],
)
def test_what_nobody_wants_is_taken(machine: Machine, idle: float, share: float) -> None:
    """With a tenth of a processor taken in the last second, of which a quarter is left alone."""
    one = Pace(0.25)
    machine(2 * idle)  # the clock is looked at twice in between
    machine(idle)
    pause = one.pause(0.1, worth_it=True)
    assert 0.1 / (0.1 + pause) == pytest.approx(share)
    # And not for what is not worth it.
    assert one.pause(0.1) == pytest.approx(0.3)


@pytest.mark.parametrize(("processors", "share"), [(1, 1 / 16), (2, 0.125), (4, 0.25), (256, 0.25)])
def test_a_machine_loses_no_more_than_a_sixteenth(
    processors: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    assert pace.moderate() == share


@pytest.mark.parametrize("text", ["", "cpu  1 2\n", "cpu a b c d e f\n"])
def test_where_nothing_is_known_nothing_is_idle(machine: Machine, text: str) -> None:
    machine(100)
    pace._STAT.write_text(text)
    assert Pace(0.5).pause(0.1, worth_it=True) == pytest.approx(0.1)
    pace._STAT.unlink()
    assert Pace(0.5).pause(0.1, worth_it=True) == pytest.approx(0.1)


def test_who_has_waited_pauses_less(machine: Machine) -> None:
    machine(0)
    assert Pace(0.5).pause(1.0, 0.75) == pytest.approx(0.25)
    assert Pace(0.5).pause(1.0, 2.0) == 0.0


def spin(seconds: float) -> int:
    """Take processor time; the policy under which."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass
    return os.sched_getscheduler(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes CAP_SYS_NICE")
def test_a_short_call_runs_before_others() -> None:
    haste = Haste()
    assert haste.call(lambda: spin(0), 1, 3) == os.SCHED_RR
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    # In very many places, or of somebody of whom it has taken long: as everybody else.
    assert haste.call(lambda: spin(0), 1, pace.MOST_VMAS + 1) == os.SCHED_OTHER
    haste.call(lambda: spin(2 * pace.SLOW_SECONDS), 1, 3)
    assert haste.call(lambda: spin(0), 1, 3) == os.SCHED_OTHER
    assert haste.call(lambda: spin(0), 2, 3) == os.SCHED_RR
    haste._slow.update(range(100, 100 + pace.MOST_SLOW))
    assert haste.call(lambda: spin(0), 2, 3) == os.SCHED_OTHER


@pytest.mark.skipif(os.geteuid() != 0, reason="takes CAP_SYS_NICE")
def test_a_call_that_fails_leaves_nothing() -> None:
    def fail() -> None:
        raise OSError(errno.EBUSY, "busy")

    with pytest.raises(OSError, match="busy"):
        Haste().call(fail, 1, 1)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the capability away")
def test_without_the_right_it_is_done_all_the_same() -> None:
    code = (
        "import os\nfrom msharetables.pace import Haste\n"
        "print(Haste().call(lambda: os.sched_getscheduler(0), 1, 1))"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice", sys.executable, "-c", code],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "0\n"
