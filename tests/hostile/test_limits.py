"""What a user may have: accounts that are exact whatever ends how, and clear refusals."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
from collections.abc import Callable, Sized
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from both import Both
from conftest import ALIGNMENT, BASE, Client, Daemon, clients, eventually
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from msharefsd import config
from msharefsd.config import ConfigError, LimitSettings
from msharefsd.errors import Refused
from msharefsd.linux import syscalls
from msharefsd.region import limits
from msharefsd.region.limits import Account, Limits
from msharefsd.region.objects import Object
from msharefsd.region.region import Region, Sharer, State

PAGE = syscalls.PAGE
MiB = 1 << 20
SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
ALICE, BOB = 1000, 1001
Spawn = Callable[..., Client]


def refusal(call: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value


# -- settings --


def load(tmp_path: Path, text: str) -> LimitSettings:
    file = tmp_path / "config"
    file.write_text(text)
    return config.load(file, {}).limits


def test_a_user_can_have_limits_of_their_own(tmp_path: Path) -> None:
    own = "[limits.user.root]\nobjects = 7\n[limits.user.1000]\nregions = 5\n"
    made = Limits(load(tmp_path, f"[limits]\nregions = 3\n{own}"))
    assert made.account(ALICE).allowance.regions == 5
    assert made.account(BOB).allowance.regions == 3
    assert made.account(0).allowance.objects == 7
    assert made.account(0).allowance.regions == 3, "root has given itself limits"


def test_root_and_the_daemons_own_user_are_exempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: ALICE)
    made = Limits(LimitSettings(threads=3))
    for uid in (0, ALICE):
        assert made.account(uid).allowance == config.unlimited(3), "but for threads"
    assert made.account(BOB).allowance == LimitSettings(threads=3)
    assert made.threads(0) == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("regions = -1", "regions"),
        ('regions = "many"', "regions"),
        ('memory = "90 percent"', "not a size"),
        ("threads = 0", "threads"),
        ("wishes = 3", "wishes"),
        ("[limits.user.nobody-of-that-name]\nregions = 1", "no such user"),
        ("[limits.user.root]\nwishes = 1", "limits.user.root.*wishes"),
        ('[limits.user.root]\nmemory = "much"', "not a size"),
    ],
)
def test_a_limit_that_cannot_be_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, f"[limits]\n{text}\n")


@pytest.mark.parametrize(
    ("text", "is_bytes"), [("90%", 900), ("64M", 64 * MiB), ("unlimited", config.LARGEST_SIZE)]
)
def test_memory_is_a_size_or_a_share(text: str, is_bytes: int) -> None:
    assert config.share_of(text, 1000) == is_bytes


class Memory:
    """A region that holds what it is told."""

    def __init__(self) -> None:
        self.objects: Sized = ()
        self.size = 0
        self.looked = 0

    def allocated(self) -> int:
        self.looked += 1
        return self.size


def test_a_refusal_says_which_limit_and_fits_its_message_field() -> None:
    told: list[str] = []
    most = 2**31
    account = Account(
        2**32 - 2,
        LimitSettings(regions=0, sharers=0, objects=most, connections=0, memory="0"),
        hit=lambda limit, _: told.append(limit),
    )
    memory = Memory()
    memory.objects, memory.size = range(most), PAGE
    account.regions.add(memory)
    connect = contextlib.ExitStack()
    for limit, code, call in (
        ("regions", errno.EDQUOT, account.check_regions),
        ("sharers", errno.EMFILE, account.check_sharers),
        ("objects", errno.ENOMEM, lambda: account.check_objects(1)),
        ("memory", errno.EDQUOT, account.check_memory),
        ("connections", errno.EMFILE, lambda: connect.enter_context(account.connection())),
    ):
        refused = refusal(call)
        assert refused.code == code
        assert f"[limits] {limit}" in refused.message
        assert len(refused.message) < 96
        assert told.pop() == limit
    assert account.connections == 0


# -- memory --


def test_memory_is_given_up_to_the_limit_and_again_when_it_is_freed() -> None:
    account = Account(ALICE, LimitSettings(memory="1M"))
    memory = Memory()
    account.regions.add(memory)
    assert account.room(768 * 1024) == 768 * 1024
    memory.size = 768 * 1024
    assert account.room(768 * 1024) == 256 * 1024
    memory.size = MiB
    account.freed()
    assert account.room(PAGE) == 0
    memory.size = 0
    account.freed()
    assert account.room(PAGE) == PAGE


def test_a_page_may_be_larger_than_what_is_given_at_once() -> None:
    account = Account(ALICE, LimitSettings(memory="3G"))
    memory = Memory()
    account.regions.add(memory)
    assert account.room(1 << 30) == 1 << 30
    memory.size = 5 << 29
    assert account.room(1 << 30) == 1 << 29


def test_the_memory_of_many_regions_is_not_added_up_at_every_fault() -> None:
    account = Account(ALICE, LimitSettings(memory="1G"))
    memory = Memory()
    account.regions.add(memory)
    for _ in range(limits.LOOK // MiB):
        assert account.room(MiB) == MiB
    assert memory.looked == 1
    memory.size = 1 << 30
    for _ in range(3):
        account.room(MiB)
    looked = memory.looked
    account._look_again += 60  # as if adding up had taken long
    assert account.room(PAGE) == 0
    assert memory.looked == looked


# -- the model --


class Accounts(RuleBasedStateMachine):
    """Every way in which things begin and end; what the accounts say is what there is."""

    USERS = (ALICE, BOB)
    MOST = LimitSettings(regions=2, sharers=3, objects=4, connections=2, memory="64K")

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.limits = Limits(self.MOST)
        self.regions = Both(
            ALIGNMENT, self.make_backing, self.release, self.limits, Limits(self.MOST)
        )
        self.all: list[Region] = []
        self.sharers: list[Sharer] = []
        self.connections: list[tuple[int, contextlib.ExitStack]] = []
        self.unwritten: list[Region] = []
        """Gone, but their files have not taken what was written."""
        self.hangs = False

    def make_backing(self, number: int, start: int, size: int, kind: str) -> Any:
        return SimpleNamespace(
            kind="shm",
            name=f"/{number}",
            fd=-1,
            identity=SimpleNamespace(major=1, minor=2, inode=number),
            release=lambda: None,
            allocated=lambda: 8 * PAGE,
        )

    def release(self, region: Region) -> None:
        if self.hangs:
            self.unwritten.append(region)
        else:
            region.close_memory()

    def expect(self, limit: str, count: int, call: Callable[[], object]) -> bool:
        """`call` is refused if and only if `count` are too many; whether it was not."""
        try:
            call()
        except Refused:
            assert count > getattr(self.MOST, limit)
            return False
        assert count <= getattr(self.MOST, limit)
        return True

    def held(self, uid: int) -> list[Region]:
        return [
            region
            for region in self.all
            if region.uid == uid and (region.state is not State.GONE or region in self.unwritten)
        ]

    @rule(uid=st.sampled_from(USERS))
    def create(self, uid: int) -> None:
        self.number += 1
        name = b"%d" % self.number
        self.expect(
            "regions",
            len(self.held(uid)) + 1,
            lambda: self.all.append(self.regions.create(name, 0o600, uid, uid)),
        )

    @precondition(lambda self: self.all)
    @rule(number=st.integers(0, 9))
    def establish(self, number: int) -> None:
        region = self.all[number % len(self.all)]
        if region.state is State.FILE and region.linked:
            self.regions.make(region, ALIGNMENT, ALIGNMENT)

    @precondition(lambda self: self.all)
    @rule(number=st.integers(0, 9), gives_up=st.booleans(), drop=st.booleans())
    def settle(self, number: int, gives_up: bool, drop: bool) -> None:
        region = self.all[number % len(self.all)]
        if region.state is State.BUILDING and gives_up:
            self.hangs = False  # nothing was written yet
            region.made_file = drop
            self.regions.abandon(region)
        elif region.state is State.BUILDING:
            self.regions.commit(region)

    @precondition(lambda self: self.all)
    @rule(number=st.integers(0, 9), uid=st.sampled_from(USERS))
    def attach(self, number: int, uid: int) -> None:
        region = self.all[number % len(self.all)]
        if region.state is State.LIVE and self.expect(
            "sharers",
            sum(sharer.uid == uid for sharer in self.sharers) + 1,
            self.limits.account(uid).check_sharers,
        ):
            self.sharers.append(self.regions.attach(region, 1, uid, -1, writable=True))

    @precondition(lambda self: self.sharers)
    @rule(number=st.integers(0, 9), unlink=st.booleans(), hangs=st.booleans())
    def detach(self, number: int, unlink: bool, hangs: bool) -> None:
        self.hangs = hangs
        sharer = self.sharers.pop(number % len(self.sharers))
        (self.regions.detach_and_unlink if unlink else self.regions.detach)(sharer)

    @precondition(lambda self: self.all)
    @rule(number=st.integers(0, 9), hangs=st.booleans())
    def unlink(self, number: int, hangs: bool) -> None:
        self.hangs = hangs
        region = self.all[number % len(self.all)]
        if region.linked:
            self.regions.unlink(region)

    @precondition(lambda self: self.unwritten)
    @rule()
    def write(self) -> None:
        self.unwritten.pop().close_memory()

    @precondition(lambda self: self.all)
    @rule(number=st.integers(0, 9), uid=st.sampled_from(USERS))
    def give(self, number: int, uid: int) -> None:
        # Root does it, whom no limit binds, so the user may have too many now.
        region = self.all[number % len(self.all)]
        self.regions.give(region, uid)

    @precondition(lambda self: self.all)
    @rule(number=st.integers(0, 9), page=st.integers(0, 20))
    def map(self, number: int, page: int) -> None:
        region = self.all[number % len(self.all)]
        if region.state is State.LIVE and region.objects.find(page * PAGE) is None:
            count = sum(len(each.objects) for each in self.held(region.uid)) + 1
            if self.expect("objects", count, lambda: region.account.check_objects(1)):
                region.objects.insert(Object(page * PAGE, PAGE, 3, private=bool(page % 2)))

    @rule(uid=st.sampled_from(USERS))
    def connect(self, uid: int) -> None:
        stack = contextlib.ExitStack()
        account = self.limits.account(uid)
        count = sum(user == uid for user, _ in self.connections) + 1
        if self.expect("connections", count, lambda: stack.enter_context(account.connection())):
            self.connections.append((uid, stack))

    @precondition(lambda self: self.connections)
    @rule(number=st.integers(0, 9))
    def hang_up(self, number: int) -> None:
        _, stack = self.connections.pop(number % len(self.connections))
        stack.close()

    @invariant()
    def accounts_say_what_there_is(self) -> None:
        for uid in self.USERS:
            account = self.limits.account(uid)
            assert account.regions == set(self.held(uid))
            assert account.sharers == {each for each in self.sharers if each.uid == uid}
            assert account.connections == sum(user == uid for user, _ in self.connections)
            assert account.memory() == 8 * PAGE * sum(
                region.backing is not None for region in self.held(uid)
            )

    def teardown(self) -> None:
        self.hangs = False
        for _, stack in self.connections:
            stack.close()
        self.connections.clear()
        for sharer in self.sharers:
            self.regions.detach(sharer)
        self.sharers.clear()
        self.regions.close()
        for region in self.unwritten:
            region.close_memory()
        self.unwritten.clear()
        for uid in self.USERS:
            account = self.limits.account(uid)
            assert (account.regions, account.sharers, account.connections) == (set(), set(), 0)


TestAccounts = Accounts.TestCase


def test_an_account_that_has_nothing_is_forgotten() -> None:
    made = Limits(LimitSettings())
    regions = Both(ALIGNMENT, lambda *_: None, names_limits=made)
    region = regions.create(b"r", 0o600, ALICE, ALICE)
    assert list(made._accounts) == [ALICE]
    regions.unlink(region)
    del region
    assert list(made._accounts) == []


# -- on a real mount --


@pytest.fixture
def limited(make_daemon: Callable[..., Daemon], directory: Path) -> Daemon:
    """A daemon that gives everybody little."""
    (directory / "config").write_text(
        '[limits]\nregions = 2\nmemory = "1M"\nsharers = 3\nobjects = 4\nconnections = 5\n'
    )
    daemon = make_daemon(f"--alignment={ALIGNMENT}", f"--config={directory / 'config'}")
    daemon.expected += [r"WARNING: user 100\d may have \d+M? \w+: see \[limits\]", "no memory for"]
    return daemon.start()


@pytest.fixture
def start(limited: Daemon, client_program: Path) -> Any:
    with clients(client_program, limited) as started:
        yield started


def as_user(uid: int) -> dict[str, object]:
    return {"user": uid, "group": uid, "extra_groups": []}


def for_all(client: Client, daemon: Daemon) -> None:
    """A region that everybody may write."""
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    (daemon.mount / "r").chmod(0o666)


def test_names_are_limited_also_those_that_open_makes(start: Spawn, limited: Daemon) -> None:
    alice, bob = start(**as_user(ALICE)), start(**as_user(BOB))
    alice.ok("mshare", "a", BASE, SIZE, CREATE, 0o666)
    (limited.mount / "a").chmod(0o666)
    assert alice.do("open", limited.mount / "b", CREATE, 0o600) == "0"
    for _ in range(3):
        assert alice.do("open", limited.mount / "c", CREATE, 0o600) == f"-{errno.EDQUOT}"
        assert alice.do("mshare", "c", BASE + SIZE, SIZE, CREATE, 0o600) == f"-{errno.EDQUOT}"
    # A region whose name is gone is hers as long as anybody has it.
    bob.ok("mshare", "a", BASE, SIZE, os.O_RDWR, 0)
    alice.ok("unlink", "a")
    (limited.mount / "a").unlink()
    assert alice.do("open", limited.mount / "c", CREATE, 0o600) == f"-{errno.EDQUOT}"
    bob.kill()
    eventually(
        lambda: alice.do("open", limited.mount / "c", CREATE, 0o600) == "0", "it has gone with bob"
    )
    assert limited.metric('limited_total{limit="regions"}') >= 7
    for number in range(4):
        (limited.mount / f"root{number}").touch()


def test_a_region_that_is_given_away_counts_for_its_new_owner(
    start: Spawn, limited: Daemon
) -> None:
    alice, bob = start(**as_user(ALICE)), start(**as_user(BOB))
    for name in ("a", "b"):
        assert alice.do("open", limited.mount / name, CREATE, 0o600) == "0"
    os.chown(limited.mount / "a", BOB, BOB)
    assert alice.do("open", limited.mount / "c", CREATE, 0o600) == "0"
    assert bob.do("open", limited.mount / "d", CREATE, 0o600) == "0"
    assert bob.do("open", limited.mount / "e", CREATE, 0o600) == f"-{errno.EDQUOT}"


def test_sharers_and_connections_are_limited_and_freed_by_death(
    start: Spawn, limited: Daemon
) -> None:
    for_all(start(), limited)
    crowd = [start(**as_user(ALICE)) for _ in range(5)]
    results = [each.do("mshare", "r", BASE, SIZE, os.O_RDWR, 0) for each in crowd]
    assert results == ["0"] * 3 + [f"-{errno.EMFILE}"] * 2
    start(**as_user(BOB)).ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    crowd[0].kill()
    eventually(
        lambda: crowd[3].do("mshare", "r", BASE, SIZE, os.O_RDWR, 0) == "0", "there is room again"
    )
    crowd[1].ok("detach", "r")
    crowd[4].ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    # The child of a fork is a sharer too; one too many has no window.
    assert crowd[4].do("fork", "load", BASE) == "SIGSEGV"


def test_a_connection_too_many_is_told_so(start: Spawn, limited: Daemon) -> None:
    # From a process of that user's; it holds them until it ends.
    flood = start(**as_user(ALICE))
    assert flood.do("connect", limited.mount / ".control", 9) == "5"
    second = start(**as_user(ALICE))
    for_all(start(), limited)
    assert second.do("mshare", "r", BASE, SIZE, os.O_RDWR, 0) == f"-{errno.EMFILE}"
    start(**as_user(BOB)).ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as sock:
        sock.connect(str(limited.mount / ".control"))  # root has no limit
    flood.kill()
    eventually(
        lambda: second.do("mshare", "r", BASE, SIZE, os.O_RDWR, 0) == "0", "there is room again"
    )


def test_objects_of_all_regions_are_limited(start: Spawn, limited: Daemon) -> None:
    alice = start(**as_user(ALICE))
    fixed, anonymous = 0x10, mmap.MAP_SHARED
    for number, name in enumerate(("a", "b")):
        alice.ok("mshare", name, BASE + number * SIZE, SIZE, CREATE, 0o600)
    alice.ok("mmap", BASE, 4 * PAGE, 3, anonymous | fixed)
    alice.ok("mmap", BASE + SIZE, 4 * PAGE, 3, anonymous | fixed)
    alice.ok("mprotect", BASE, PAGE, 1)
    too_many = f"-{errno.ENOMEM}"
    assert alice.do("mprotect", BASE + 2 * PAGE, PAGE, 1) == too_many
    assert alice.do("mmap", BASE + PAGE * 2, PAGE, 0, anonymous | fixed) == too_many
    alice.ok("munmap", BASE + SIZE + PAGE, PAGE)
    assert alice.do("munmap", BASE + SIZE + 3 * PAGE, PAGE) == "0", "that makes none more"
    assert alice.do("mmap", BASE + 8 * PAGE, PAGE, 3, anonymous | fixed) == too_many
    assert alice.do("munmap", BASE + 2 * PAGE, PAGE) == too_many, "and that does"
    alice.ok("munmap", BASE, 8 * PAGE)
    alice.ok("mmap", BASE, PAGE, 3, anonymous | fixed)


def test_memory_of_all_regions_is_limited(start: Spawn, limited: Daemon) -> None:
    alice, bob = start(**as_user(ALICE)), start(**as_user(BOB))
    for number, name in enumerate(("a", "b")):
        alice.ok("mshare", name, BASE + number * SIZE, SIZE, CREATE, 0o600)
        alice.ok("mmap", BASE + number * SIZE, ALIGNMENT, 3, mmap.MAP_SHARED | 0x10)
    bob.ok("mshare", "c", BASE, SIZE, CREATE, 0o600)
    bob.ok("mmap", BASE, ALIGNMENT, 3, mmap.MAP_SHARED | 0x10)
    alice.ok("fill", BASE, MiB - 8 * PAGE, 1)
    assert alice.do("fill", BASE + SIZE, 64 * PAGE, 1) == "SIGBUS"
    held = sum(int(limited.field(name, "memory")) for name in ("a", "b"))
    assert held == MiB
    bob.ok("fill", BASE, MiB // 2, 2)
    assert bob.do("check", BASE, 1, 2) == "0"
    # What is protected is still hers, and comes back although there is no room.
    alice.ok("mprotect", BASE, PAGE, 0)
    alice.ok("mprotect", BASE, PAGE, 3)
    assert alice.do("load", BASE) == "1"
    # Freed in one region it can be had in the other, at once.
    alice.ok("munmap", BASE, MiB // 2)
    alice.ok("fill", BASE + SIZE + 64 * PAGE, 64 * PAGE, 3)
    eventually(lambda: alice.do("load", BASE + SIZE + 32 * PAGE) == "0", "mended")


def test_a_donor_cannot_bring_more_than_a_user_may_have(start: Spawn, limited: Daemon) -> None:
    donor = start(**as_user(ALICE))
    donor.ok("map", BASE, SIZE, mmap.MAP_PRIVATE)
    donor.ok("fill", BASE, SIZE, 7)
    assert donor.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == f"-{errno.EDQUOT}"
    assert donor.do("load", BASE + SIZE - 1) == "0"
    assert donor.do("load", BASE) == "7", "it keeps its memory"
    eventually(lambda: not (limited.mount / "r").exists(), "the name is gone")
    donor.ok("munmap", BASE, SIZE)
    donor.ok("map", BASE, ALIGNMENT, mmap.MAP_PRIVATE)
    donor.ok("fill", BASE, MiB, 7)
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)


def test_pages_that_holes_were_do_not_get_around_the_limit(start: Spawn, limited: Daemon) -> None:
    """Poisoned pages of what is mapped later are populated at once: within the limit."""
    alice = start(**as_user(ALICE))
    alice.ok("mshare", "a", BASE, SIZE, CREATE, 0o600)
    pages = 2 * MiB // PAGE
    for page in range(pages):
        assert alice.do("load", BASE + page * PAGE) == "SIGBUS"
    alice.ok("mmap", BASE, pages * PAGE, 3, mmap.MAP_SHARED | 0x10)
    assert int(limited.field("a", "memory")) <= MiB
