"""The daemon's processes: which there are, what each may do, and each one's death."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bare import Bare, in_child
from conftest import ALIGNMENT, BASE, BIN, Client, Daemon, alive, command_line, eventually

from msharefsd.linux import processes, syscalls, uffd
from msharefsd.security import privileges

pytestmark = pytest.mark.shm_only
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SIZE = 2 * ALIGNMENT
ALICE, BOB = 65531, 65530
FIXED_SHARED = mmap.MAP_SHARED | 0x10
Spawn = Callable[..., Client]


def as_user(user: int) -> dict[str, object]:
    return {"user": user, "group": user, "extra_groups": []}


def create(spawn: Spawn, user: int, name: str, start: int = BASE) -> Client:
    """A client of a user's with a region of its own, all of it mapped."""
    client = spawn(**as_user(user))
    client.ok("mshare", name, start, SIZE, CREATE, 0o600)
    client.ok("mmap", start, SIZE, 3, FIXED_SHARED)
    client.ok("store", start, 7)
    return client


def capabilities(pid: int) -> int:
    for line in processes.read_proc(pid, "status").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    raise AssertionError(pid)


def test_each_user_has_a_process_that_ps_names(daemon: Daemon, spawn: Spawn) -> None:
    assert daemon.pagers() == {}, "nobody has anything"
    create(spawn, ALICE, "alices")
    create(spawn, 0, "roots", BASE + SIZE)
    assert daemon.pagers().keys() == {ALICE, 0}
    assert command_line(daemon.pager(ALICE)).startswith(b"msharefsd: pager 65531")
    assert command_line(daemon.pager(0)).startswith(b"msharefsd: pager root")
    had = syscalls.capabilities()
    assert capabilities(daemon.pid) == privileges.mask(privileges.FRONT) & had
    assert capabilities(daemon.pager(ALICE)) == privileges.mask(privileges.PAGER) & had


def test_a_front_has_nothing_of_a_clients(daemon: Daemon, spawn: Spawn) -> None:
    """No memory, no userfaultfd, no file, no connection."""
    client = create(spawn, ALICE, "alices")
    client.ok("mmap", BASE, 4096, 1, mmap.MAP_PRIVATE | 0x10, "/etc/passwd", os.O_RDONLY, 0)
    assert client.do("load", BASE).isdigit()
    eventually(lambda: not foreign(daemon.pid), f"nothing: {foreign(daemon.pid)}")
    maps = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert "/dev/shm/msharefs-" not in maps


def foreign(pid: int) -> list[str]:
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return [link for link in links if "userfaultfd" in link or "shm" in link or "passwd" in link]


def test_a_pager_with_nothing_to_do_ends_and_comes_again(daemon: Daemon, spawn: Spawn) -> None:
    client = create(spawn, ALICE, "alices")
    first = daemon.pager(ALICE)
    client.ok("unlink", "alices")
    eventually(lambda: daemon.pagers() == {}, "its end", 40)
    eventually(lambda: not alive(first), "all of it")
    assert not (daemon.run / "users" / str(ALICE)).exists()
    client.ok("mshare", "again", BASE, SIZE, CREATE, 0o600)
    assert daemon.pagers().keys() == {ALICE}


def test_a_pager_that_is_killed_is_replaced_and_nothing_is_lost(
    daemon: Daemon, spawn: Spawn
) -> None:
    alice, bob = create(spawn, ALICE, "alices"), create(spawn, BOB, "bobs", BASE + SIZE)
    bobs = daemon.pager(BOB)
    for number in range(1, 4):
        before = daemon.pager(ALICE)
        os.kill(before, signal.SIGKILL)
        assert alice.do("load", BASE) == "7", "what is there needs nobody"
        alice.ok("store", BASE + number * 65536, number)
        alice.ok("mmap", BASE + SIZE // 2, 4096, 3, FIXED_SHARED)
        bob.ok("store", BASE + SIZE + number * 65536, number)
        assert daemon.pager(ALICE) != before
    assert daemon.pager(BOB) == bobs
    assert daemon.sharers("alices") == 1
    for number in range(1, 4):
        assert alice.do("load", BASE + number * 65536) == str(number)


def test_a_pager_that_hangs_keeps_its_user_waiting_and_nobody_else(
    daemon: Daemon, spawn: Spawn, make_daemon: Callable[..., Daemon]
) -> None:
    alice, bob = create(spawn, ALICE, "alices"), create(spawn, BOB, "bobs", BASE + SIZE)
    assert "old:" not in daemon.info("bobs")
    hung = daemon.pager(BOB)
    os.kill(hung, signal.SIGSTOP)
    bob.send("store", BASE + SIZE + 65536, 1)
    for number in range(20):
        alice.ok("store", BASE + number * 65536, number)
        alice.ok("mmap", BASE + SIZE // 2, 4096, 3, FIXED_SHARED)
    assert (daemon.mount / "bobs").stat().st_blocks > 0
    info = daemon.info("bobs")
    assert info.startswith("old: ")
    assert "sharers:   1" in info, "what it said last"
    assert "old:" not in daemon.info("alices")

    def says() -> bool:
        shown = subprocess.run(
            [BIN / "mshare", "doctor"],
            env=os.environ | {"MSHARE_ROOT": str(daemon.mount)},
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        return f"pager of user {BOB}: process {hung} has not answered" in shown

    eventually(says, "the doctor's word")
    # A new front beside it: that user's memory is taken over, from a process that is killed.
    assert daemon.process is not None
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.process.wait()
    daemon.expected.append("taking down the mount")
    daemon.start()
    assert bob.result() == "0"
    assert bob.do("load", BASE + SIZE) == "7"
    assert not alive(hung)


def test_the_fronts_death_alone_ends_all_at_once(daemon: Daemon, spawn: Spawn) -> None:
    alice = create(spawn, ALICE, "alices")
    others = [pid for pid in daemon.processes() if pid != daemon.pid]
    assert len(others) == 2, "the starter and a pager"
    assert daemon.process is not None
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.process.wait()
    eventually(lambda: not any(map(alive, others)), "their end")
    assert alice.do("load", BASE) == "7"
    daemon.expected.append("taking down the mount")
    daemon.start()
    alice.ok("store", BASE + 65536, 8)


def test_without_who_starts_pagers_it_ends_as_soon_as_one_is_needed(
    daemon: Daemon, spawn: Spawn
) -> None:
    """Otherwise whoever needs one waits for ever, with a daemon that looks well."""
    alice, bob = create(spawn, ALICE, "alices"), spawn(**as_user(BOB))
    assert daemon.process is not None
    (starter,) = (
        pid for pid in daemon.processes() if command_line(pid).startswith(b"msharefsd: starter")
    )
    os.kill(starter, signal.SIGKILL)
    bob.send("mshare", "bobs", BASE + SIZE, SIZE, CREATE, 0o600)
    assert daemon.process.wait(20) == 1
    daemon.expected += ["the process that starts pagers has ended", "taking down the mount"]
    daemon.start()
    assert bob.result() == "0"
    alice.ok("store", BASE + 65536, 8)


def test_two_users_faults_use_two_processors(daemon: Daemon, spawn: Spawn) -> None:
    """Each pager has used its own."""
    alice, bob = create(spawn, ALICE, "alices"), create(spawn, BOB, "bobs", BASE + SIZE)
    before = {uid: used(daemon.pager(uid)) for uid in (ALICE, BOB)}
    front = used(daemon.pid)
    for client, start in ((alice, BASE), (bob, BASE + SIZE)):
        for number in range(30):
            client.ok("fill", start + number * 65536, 65536, 1)
    grown = {uid: used(daemon.pager(uid)) - before[uid] for uid in (ALICE, BOB)}
    assert min(grown.values()) > 0
    assert used(daemon.pid) - front < min(grown.values()), "the front has no part in it"


def used(pid: int) -> int:
    """Processor time of a process, in nanoseconds."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def test_a_region_of_another_owner_keeps_its_pager_until_it_loses_its_memory(
    daemon: Daemon, spawn: Spawn
) -> None:
    client = create(spawn, ALICE, "given")
    os.chown(daemon.mount / "given", BOB, BOB)
    client.ok("store", BASE + 65536, 1)
    assert daemon.field("given", "owner") == f"{BOB}:{BOB}"
    assert daemon.pagers().keys() == {ALICE}
    daemon.kill()
    daemon.expected.append("taking down the mount")
    daemon.start()
    assert daemon.field("given", "owner") == f"{BOB}:{BOB}"
    assert client.do("load", BASE + 65536) == "1"


def test_a_name_of_another_owner_has_its_memory_with_that_owners_pager(
    daemon: Daemon, spawn: Spawn
) -> None:
    """The pager of who made the name is there, and knew of it."""
    alice = create(spawn, ALICE, "alices", BASE + SIZE)
    path = daemon.mount / "given"
    path.touch()
    os.chown(path, ALICE, ALICE)
    path.chmod(0o666)
    os.chown(path, BOB, BOB)
    late = spawn(**as_user(ALICE))
    late.ok("mshare", "given", BASE, SIZE, os.O_CREAT | os.O_RDWR, 0o600)
    late.ok("mmap", BASE, SIZE, 3, FIXED_SHARED)
    late.ok("store", BASE, 9)
    bob = spawn(**as_user(BOB))
    bob.ok("mshare", "given", BASE, SIZE, os.O_RDWR, 0)
    assert bob.do("load", BASE) == "9"
    assert daemon.pagers().keys() == {ALICE, BOB}
    # Each by itself: whose memory it is shows when the other is gone.
    os.kill(daemon.pager(ALICE), signal.SIGKILL)
    daemon.expected.append("is given up")
    bob.ok("store", BASE + 65536, 1)
    assert alice.do("load", BASE + SIZE) == "7"


def test_who_looked_the_socket_up_as_another_user_is_served_as_who_it_is(
    daemon: Daemon, spawn: Spawn
) -> None:
    """The line is alice's, and so is the pager that accepts; what is asked for is bob's."""
    create(spawn, BOB, "bobs")

    def connects() -> None:
        own = uffd.open_new()
        os.setresuid(ALICE, ALICE, 0)
        path = os.open(daemon.mount / ".control", os.O_PATH)
        os.setresuid(0, 0, 0)
        os.setresuid(BOB, BOB, BOB)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(f"/proc/self/fd/{path}")
        bare = Bare.on(sock, daemon.mount)
        answer = bare.attach("bobs", own=own)
        assert (answer.message, answer.start) == ("", BASE)

    assert in_child(connects).wait() == 0


def test_memory_whose_names_were_lost_has_its_names_again(daemon: Daemon, spawn: Spawn) -> None:
    client = create(spawn, ALICE, "alices")
    daemon.kill()
    for journal in daemon.run.glob("names.sqlite*"):
        journal.unlink()
    daemon.expected += ["taking down the mount", "it has its name again"]
    daemon.start()
    found = (daemon.mount / "alices").stat()
    assert (found.st_uid, found.st_mode & 0o777) == (ALICE, 0o600)
    assert client.do("load", BASE) == "7"
    client.ok("store", BASE + 65536, 1)


def test_what_cannot_be_opened_is_left_for_another_time(daemon: Daemon, spawn: Spawn) -> None:
    client = create(spawn, ALICE, "alices")
    (memory,) = daemon.backings()
    daemon.kill()
    memory.chmod(0o644)
    daemon.expected += ["taking down the mount", "cannot be had"]
    daemon.start()
    time.sleep(0.1)
    daemon.kill()
    memory.chmod(0o600)
    daemon.start()
    assert client.do("load", BASE) == "7"
    eventually(lambda: daemon.sharers("alices") == 1, "the sharer")
