"""Clients in adverse circumstances: out of descriptors or address space, under signals."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, Client, Daemon, clients

SIZE = 2 * ALIGNMENT
PAGE = mmap.PAGESIZE
FIXED = 0x10
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
Spawn = Callable[..., Client]


def minus(code: int) -> str:
    return str(-code)


def descriptors(client: Client) -> list[str]:
    """What the client has open, by number."""
    directory = Path(f"/proc/{client.pid}/fd")
    return sorted(f"{fd.name} {fd.readlink()}" for fd in directory.iterdir())


def mapped(client: Client) -> list[str]:
    """The client's mappings in the region's range."""
    found = []
    for line in Path(f"/proc/{client.pid}/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if start < BASE + SIZE and end > BASE:
            found.append(line)
    return found


def prepare(spawn: Spawn, kind: str, user: int) -> tuple[Client, tuple[object, ...]]:
    """A client and a call of mshare() that would succeed."""
    client = spawn(user=user, group=user, extra_groups=[])
    client.ok("hello")  # the dynamic linker has finished
    donor = spawn(user=user, group=user, extra_groups=[]) if kind == "attach" else client
    if kind != "empty":
        donor.ok("map", BASE, SIZE, mmap.MAP_SHARED)
        donor.ok("fill", BASE, SIZE, 7)
        donor.ok("mprotect", BASE, PAGE, 0)
    if kind == "attach":
        donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        return client, ("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    access = os.O_RDONLY if kind == "donate for readers" else os.O_RDWR
    return client, ("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_EXCL | access, 0o600)


KINDS = ("attach", "empty", "donate", "donate for readers")


@pytest.mark.parametrize("user", [0, 65534])
@pytest.mark.parametrize("kind", KINDS)
def test_out_of_descriptors_at_every_step(
    spawn: Spawn, daemon: Daemon, kind: str, user: int
) -> None:
    client, call = prepare(spawn, kind, user)
    used, before = descriptors(client), mapped(client)
    answers: list[str] = []
    while not answers or answers[-1] != "0":
        assert len(answers) < 20
        client.ok("limit", resource.RLIMIT_NOFILE, len(used) + len(answers))
        answers.append(client.do(*call))
        if answers[-1] != "0":
            # The device, once it has been handed one, is kept on purpose.
            assert {fd for fd in descriptors(client) if "/dev/userfaultfd" not in fd} == set(used)
            assert mapped(client) == before
            assert (daemon.mount / "r").exists() == (kind == "attach")
    assert set(answers[:-1]) == {minus(errno.EMFILE)}
    assert len(answers) > 4
    if kind != "empty":
        assert client.do("load", BASE + PAGE) == "7"
    if kind != "attach":
        assert daemon.sharers("r") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_address_space(spawn: Spawn, daemon: Daemon, kind: str) -> None:
    client, call = prepare(spawn, kind, 0)
    used, before = descriptors(client), mapped(client)
    size = int(Path(f"/proc/{client.pid}/statm").read_text().split()[0]) * PAGE
    client.ok("limit", resource.RLIMIT_AS, size + SIZE // 2)
    assert client.do(*call) == minus(errno.ENOMEM)
    assert (descriptors(client), mapped(client)) == (used, before)
    assert (daemon.mount / "r").exists() == (kind == "attach")
    client.ok("limit", resource.RLIMIT_AS, size + (64 << 20))
    client.ok(*call)


def test_signals_all_the_time(spawn: Spawn, daemon: Daemon) -> None:
    donor, other = spawn(), spawn()
    for client in (donor, other):
        client.ok("timer", 300)
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        donor.ok("map", BASE, SIZE, flags)
        donor.ok("fill", BASE, SIZE, 5)
        donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        for _ in range(20):
            other.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
            assert other.do("scan", BASE, SIZE) == "5"
            other.ok("munmap", BASE + PAGE, 16 * PAGE)
            assert donor.do("load", BASE + PAGE) == "SIGBUS"
            donor.ok("mmap", BASE + PAGE, 16 * PAGE, 3, mmap.MAP_SHARED | FIXED)
            assert other.do("from_memory", BASE, 32 * PAGE) == str(32 * PAGE)
            assert other.do("fork", "fill", BASE + PAGE, 16 * PAGE, 5) == "0"
            assert donor.do("thread", "mprotect", BASE, PAGE, 1) == "0"
            assert other.do("store", BASE, 1) == "SIGSEGV"
            donor.ok("mprotect", BASE, PAGE, 3)
            other.ok("detach", "r")
        donor.ok("unlink", "r")
    for client in (donor, other):
        assert int(client.do("timer", 0)) > 100


def test_a_guard_page_cannot_be_donated(spawn: Spawn, daemon: Daemon) -> None:
    donor = spawn()
    donor.ok("map", BASE, SIZE, mmap.MAP_PRIVATE)
    donor.ok("fill", BASE, SIZE, 7)
    guard = donor.do("madvise", BASE + PAGE, PAGE, 102)
    if guard == minus(errno.EINVAL):
        pytest.skip("this kernel has no MADV_GUARD_INSTALL (Linux 6.13)")
    assert guard == "0"
    assert donor.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == minus(errno.EOPNOTSUPP)
    assert donor.do("load", BASE + PAGE) == "SIGSEGV"
    assert donor.do("load", BASE) == "7"
    donor.ok("store", BASE, 8)
    assert not (daemon.mount / "r").exists()


def test_a_stack_cannot_be_donated_by_who_runs_on_it(daemon: Daemon, client_program: Path) -> None:
    """Its owner would write to memory that it holds back itself, and wait for ever."""
    with clients(client_program, daemon) as start:
        donor = start()
        donor.ok("map", BASE, SIZE, mmap.MAP_PRIVATE)
        call = ("mshare", "r", BASE, SIZE, CREATE, 0o600)
        assert donor.do("on_stack", BASE, SIZE, *call) == minus(errno.EOPNOTSUPP)
        donor.ok(*call)


@pytest.mark.parametrize("root", ["/nonexistent", "/etc/passwd", "/etc", ".", "{mount}/r"])
def test_a_root_where_no_msharefs_is(
    daemon: Daemon, client_program: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (daemon.mount / "r").touch()
    with monkeypatch.context() as patch:
        patch.setattr(daemon, "mount", Path(root.format(mount=daemon.mount)))
        with clients(client_program, daemon) as start:
            client = start()
            for call in (
                ("mshare", "r", BASE, SIZE, CREATE, 0o600),
                ("unlink", "r"),
                ("stat", "r"),
            ):
                assert client.do(*call) == minus(errno.ENOENT)
