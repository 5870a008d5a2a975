"""What one user does, another does not notice.

Each attack of hostile.py is put into force and held.  Meanwhile alice touches, maps,
forks and looks around, and all of it comes to its end; also after the daemon was killed
and started anew in the middle.  When the attack is over nothing of it is left.  How long
things take is no matter here: the bounds are such that only hanging explains more.
benchmarks/walls.py has the times.
"""

from __future__ import annotations

import os
import time

import pytest
from become import found_by
from conftest import eventually
from hostile import ATTACKS, MALLORY, MANY_USERS, QUIET_READER, Attack
from victim import ALICE
from walls import SETTLE_SECONDS, Make, Walls, processor_time
from walls import make_walls_fixture as _make_walls_fixture  # noqa: F401 - what tests ask for
from walls import own_shm as _own_shm  # noqa: F401 - as above
from walls import programs_fixture as _programs_fixture  # noqa: F401 - as above

pytestmark = pytest.mark.shm_only

OWN = [name for name, attack in ATTACKS.items() if not attack.on_alice]
ON_ALICE = [name for name, attack in ATTACKS.items() if attack.on_alice]


def withstand(walls: Walls, attack: Attack) -> None:
    """Twice in force, and the second time the daemon is killed in the middle."""
    if attack.on_alice:
        # What a region gets when it is first read is no leak.
        with walls.attacked(QUIET_READER):
            walls.all_go_on()
    found_by(walls.daemon.mount, MALLORY, *MANY_USERS)
    before = walls.settled()
    walls.go()
    with walls.attacked(attack):
        walls.all_go_on()
    walls.nothing_more_than(before)
    with walls.attacked(attack) as held:
        walls.all_go_on()
        walls.killed()
        walls.started()
        walls.all_go_on()
        held.again()
        walls.all_go_on()
    walls.all_go_on()
    eventually(
        lambda: len(os.listdir("/dev/shm")) <= before[1], "its memory is gone", SETTLE_SECONDS
    )
    for each in walls.victims:
        each.check()
        each.end()
        os.unlink(walls.daemon.mount / each.name)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", OWN)
def test_alice_goes_on_beside(name: str, make_walls: Make) -> None:
    attack = ATTACKS[name]
    walls = make_walls(config=attack.config)
    walls.victim()
    withstand(walls, attack)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ON_ALICE)
def test_alice_goes_on_in_the_very_region_of(name: str, make_walls: Make) -> None:
    """Whom she lets read it can neither hold her up nor change what she has."""
    attack = ATTACKS[name]
    walls = make_walls(config=attack.config)
    walls.victim(mode=0o666 if attack.writes else 0o644)
    withstand(walls, attack)


@pytest.mark.timeout(300)
def test_some_who_attack_and_two_who_go_on(make_walls: Make) -> None:
    """Who attacks is another user each: the first would hold up the others' own pager."""
    walls = make_walls()
    walls.victim()
    walls.victim(name="hers too", uid=ALICE - 100, start=0x2100_0000_0000)
    with (
        walls.attacked(
            ATTACKS["a write to the backing whose source is never there: its inode's lock"]
        ),
        walls.attacked(ATTACKS["the address space's lock, by /proc/self/mem"], MALLORY - 200),
        walls.attacked(ATTACKS["a lingering socket as one descriptor too many"], MALLORY - 201),
    ):
        walls.all_go_on()
        walls.killed()
        walls.started()
        walls.all_go_on()


SLEEPERS = (
    "userfaultfds whose O_NONBLOCK is taken away",
    "attachments of a process that was stopped, and never listens",
    "a lingering socket as one descriptor too many",
    "a write to the backing whose source is never there: its inode's lock",
    "a mapped file whose server does not answer",
    "thousands of connections that say nothing",
)
LOOKED_SECONDS = 2.0
MOST_SECONDS = 0.5
"""What a daemon may use in that time for nobody; one that spins uses all that it gets."""


@pytest.mark.parametrize("name", SLEEPERS)
def test_who_sleeps_costs_nothing(name: str, make_walls: Make) -> None:
    attack = ATTACKS[name]
    walls = make_walls(config=attack.config)
    with walls.attacked(attack):
        time.sleep(0.5)
        before = processor_time(walls.daemon)
        time.sleep(LOOKED_SECONDS)
        used = processor_time(walls.daemon) - before
        assert used < MOST_SECONDS, f"{used:.1f} s of a processor in {LOOKED_SECONDS} s"
