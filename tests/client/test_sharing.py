"""The calls on a real mount: every row of the table of what they mean."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    ALIGNMENT,
    BASE,
    LARGEST_CHUNK,
    PAGE,
    Client,
    Daemon,
    clients,
    eventually,
)

NOBODY = 65534
SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SHARED, PRIVATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE
Spawn = Callable[..., Client]


def donate(client: Client, name: str = "r", *, mode: int = 0o600, oflags: int = CREATE) -> None:
    """Make SIZE bytes of the client's memory a region."""
    client.ok("map", BASE, SIZE, SHARED)
    client.ok("mshare", name, BASE, SIZE, oflags, mode)


def attach(client: Client, name: str = "r", oflags: int = os.O_RDWR) -> str:
    return client.do("mshare", name, BASE, SIZE, oflags, 0)


def minus(code: int) -> str:
    return str(-code)


def test_two_processes_share_at_one_address(spawn: Spawn, daemon: Daemon) -> None:
    donor, consumer = spawn(), spawn()
    donate(donor)
    assert attach(consumer) == "0"
    assert daemon.sharers("r") == 2
    donor.ok("store", BASE + 5, 77)
    assert consumer.do("load", BASE + 5) == "77"
    consumer.ok("store", BASE + SIZE - 1, 78)
    assert donor.do("load", BASE + SIZE - 1) == "78"
    assert consumer.do("stat", "r") == f"{BASE} {SIZE}"


@pytest.mark.parametrize("flags", [SHARED, PRIVATE])
def test_donated_memory_keeps_its_contents(spawn: Spawn, daemon: Daemon, flags: int) -> None:
    donor, consumer = spawn(), spawn()
    donor.ok("map", BASE, SIZE, flags)
    for page in (0, 3, 100, SIZE // PAGE - 1):
        donor.ok("store", BASE + page * PAGE, page % 200 + 1)
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    # Only what existed was copied.
    assert int(daemon.field("r", "memory")) == 4 * PAGE
    assert attach(consumer) == "0"
    for client in (donor, consumer):
        for page in (0, 3, 100, SIZE // PAGE - 1):
            assert client.do("load", BASE + page * PAGE) == str(page % 200 + 1)
        assert client.do("load", BASE + PAGE) == "0"


def test_memory_populated_by_a_relative_is_donated(spawn: Spawn) -> None:
    donor, consumer = spawn(), spawn()
    donor.ok("map", BASE, SIZE, SHARED)
    donor.ok("fork", "store", BASE + 2 * PAGE, 9)  # no entry in the donor's own page table
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    assert attach(consumer) == "0"
    assert consumer.do("load", BASE + 2 * PAGE) == "9"


def test_mappings_that_stick_out_keep_their_outer_parts(spawn: Spawn, daemon: Daemon) -> None:
    donor, consumer = spawn(), spawn()
    donor.ok("map", BASE - ALIGNMENT, SIZE + 2 * ALIGNMENT, PRIVATE)
    donor.ok("fill", BASE - ALIGNMENT, SIZE + 2 * ALIGNMENT, 3)
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    assert attach(consumer) == "0"
    donor.ok("store", BASE - 1, 4)
    donor.ok("store", BASE + SIZE, 5)
    assert donor.do("load", BASE - 1) == "4"
    assert consumer.do("load", BASE - 1) == "SIGSEGV"
    assert consumer.do("load", BASE) == "3"
    assert daemon.info("r", "maps").startswith(f"{BASE:x}-{BASE + SIZE:x} rw-p ")


def test_parts_that_were_not_mapped_are_holes(spawn: Spawn, daemon: Daemon) -> None:
    donor, consumer = spawn(), spawn()
    donor.ok("map", BASE, ALIGNMENT, SHARED)
    donor.ok("store", BASE, 1)
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    assert attach(consumer) == "0"
    for client in (donor, consumer):
        assert client.do("load", BASE) == "1"
        assert client.do("load", BASE + ALIGNMENT) == "SIGBUS"
        assert client.do("store", BASE + SIZE - 1, 1) == "SIGBUS"
        assert client.do("from_memory", BASE + ALIGNMENT + PAGE, 1) == minus(errno.EFAULT)
        assert client.do("to_memory", BASE + ALIGNMENT + 2 * PAGE, 1) == minus(errno.EFAULT)
    assert int(daemon.field("r", "memory")) <= ALIGNMENT


def test_an_empty_region_is_one_hole(spawn: Spawn, daemon: Daemon) -> None:
    client = spawn()
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    assert client.do("load", BASE) == "SIGBUS"
    assert daemon.field("r", "objects") == "0"


@pytest.mark.shm_only  # a donor's threads must leave huge pages alone: donate.c
def test_writes_of_other_threads_survive_the_donation(spawn: Spawn) -> None:
    for flags in (SHARED, PRIVATE):
        for _ in range(5):
            donor = spawn()
            donor.ok("map", BASE, SIZE, flags)
            donor.ok("writers", "r", BASE, SIZE, 3)
            donor.ok("unlink", "r")
            donor.kill()


def test_a_mapping_that_cannot_be_donated_leaves_everything(spawn: Spawn, daemon: Daemon) -> None:
    donor = spawn()
    executable = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    donor.ok("mmap", BASE, SIZE, executable, SHARED)
    donor.ok("store", BASE, 9)
    assert donor.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == minus(errno.EOPNOTSUPP)
    assert donor.do("load", BASE) == "9"
    eventually(lambda: not (daemon.mount / "r").exists(), "the name is gone")


@pytest.mark.parametrize(
    ("start", "size", "code"),
    [
        (BASE + 4096, ALIGNMENT, errno.EINVAL),
        (BASE, 4096, errno.EINVAL),
        (BASE, 0, errno.EINVAL),
        (2**64 - ALIGNMENT, ALIGNMENT, errno.EINVAL),
        (2**63, 2**63, errno.EINVAL),
        (2**47 - ALIGNMENT, 2 * ALIGNMENT, errno.EINVAL),
    ],
)
def test_a_range_that_cannot_be_is_einval_and_leaves_no_name(
    spawn: Spawn, daemon: Daemon, start: int, size: int, code: int
) -> None:
    result = spawn().do("mshare", "r", start, size, CREATE, 0o600)
    # The kernel may refuse the address before the daemon does.
    assert result in (minus(code), minus(errno.ENOMEM), minus(errno.EPERM))
    assert not (daemon.mount / "r").exists()


@pytest.mark.parametrize(
    "oflags",
    [os.O_WRONLY, os.O_RDWR | os.O_WRONLY, os.O_RDWR | os.O_TRUNC, os.O_RDWR | os.O_EXCL],
)
def test_flags_that_mean_nothing_are_einval(spawn: Spawn, oflags: int) -> None:
    assert spawn().do("mshare", "r", BASE, SIZE, oflags, 0o600) == minus(errno.EINVAL)


def test_attaching_a_region_that_does_not_exist_is_enoent(spawn: Spawn, daemon: Daemon) -> None:
    client = spawn()
    assert attach(client) == minus(errno.ENOENT)
    assert client.do("stat", "r") == minus(errno.ENOENT)
    assert client.do("unlink", "r") == minus(errno.ENOENT)
    assert client.do("detach", "r") == minus(errno.ENOENT)
    # A name that nobody has given a range is no region yet.
    (daemon.mount / "r").touch()
    assert attach(client) == minus(errno.ENOENT)
    assert client.do("stat", "r") == minus(errno.ENOENT)


def test_without_a_mount_everything_is_enoent(client_program: Path, directory: Path) -> None:
    daemon = Daemon(directory)  # never started
    with clients(client_program, daemon) as start:
        client = start()
        assert client.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == minus(errno.ENOENT)
        assert client.do("unlink", "r") == minus(errno.ENOENT)


def test_a_name_without_range_can_be_given_one(spawn: Spawn, daemon: Daemon) -> None:
    (daemon.mount / "r").touch()
    assert (daemon.mount / "r").read_bytes() == bytes(16)
    client = spawn()
    assert client.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == minus(errno.EEXIST)
    client.ok("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_RDWR, 0o600)
    assert client.do("stat", "r") == f"{BASE} {SIZE}"


def test_creating_what_exists(spawn: Spawn) -> None:
    donor, second = spawn(), spawn()
    donate(donor)
    assert second.do("mshare", "r", BASE, SIZE, CREATE, 0o600) == minus(errno.EEXIST)
    second.ok("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_RDWR, 0o600)
    donor.ok("store", BASE, 4)
    assert second.do("load", BASE) == "4"


def test_another_range_than_the_regions_is_einval(spawn: Spawn) -> None:
    donor, client = spawn(), spawn()
    donate(donor)
    for start, size in (
        (BASE, ALIGNMENT),
        (BASE + ALIGNMENT, SIZE),
        (BASE, SIZE + ALIGNMENT),
    ):
        assert client.do("mshare", "r", start, size, os.O_RDWR, 0) == minus(errno.EINVAL)
        assert client.do("vma", start) == "none"


def test_attaching_over_a_mapping_touches_nothing(spawn: Spawn) -> None:
    donor, client = spawn(), spawn()
    donate(donor)
    client.ok("map", BASE + ALIGNMENT, 4096, PRIVATE)
    client.ok("store", BASE + ALIGNMENT, 6)
    assert attach(client) == minus(errno.EINVAL)
    assert client.do("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_RDWR, 0) == minus(errno.EINVAL)
    assert client.do("load", BASE + ALIGNMENT) == "6"
    assert client.do("vma", BASE) == "none"
    assert attach(donor) == minus(errno.EINVAL), "nobody attaches twice"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("a/b", errno.EINVAL),
        ("/abs", errno.EINVAL),
        (".", errno.EPERM),
        ("..", errno.EPERM),
        (".control", errno.EPERM),
        (".anything", errno.EPERM),
        ("mshare_info", errno.EPERM),
        ("n" * 256, errno.ENAMETOOLONG),
    ],
)
def test_names_that_cannot_be(spawn: Spawn, name: str, code: int) -> None:
    client = spawn()
    assert client.do("mshare", name, BASE, SIZE, CREATE, 0o600) == minus(code)
    assert client.do("unlink", name) == minus(code)
    assert client.do("stat", name) == minus(code)


def test_empty_and_null_names(spawn: Spawn) -> None:
    client = spawn()
    assert client.do("mshare_empty", BASE, SIZE, CREATE) == minus(errno.ENOENT)
    assert client.do("mshare_null", BASE, SIZE, CREATE) == minus(errno.EFAULT)


def test_the_longest_name(spawn: Spawn, daemon: Daemon) -> None:
    name = "n" * 255
    donate(spawn(), name)
    assert (daemon.mount / name).exists()


# -- who may what --


def test_the_files_mode_decides_who_attaches(spawn: Spawn, daemon: Daemon) -> None:
    donate(spawn(), mode=0o600)
    other = spawn(user=NOBODY, group=NOBODY, extra_groups=[])
    assert attach(other) == minus(errno.EACCES)
    assert attach(other, oflags=os.O_RDONLY) == minus(errno.EACCES)
    (daemon.mount / "r").chmod(0o644)
    assert attach(other) == minus(errno.EACCES)
    assert attach(other, oflags=os.O_RDONLY) == "0"
    third = spawn(user=NOBODY, group=NOBODY, extra_groups=[])
    os.chown(daemon.mount / "r", NOBODY, NOBODY)
    assert attach(third) == "0"


def test_the_umask_applies(spawn: Spawn, daemon: Daemon) -> None:
    donate(spawn(umask=0o027), mode=0o666)
    assert stat.S_IMODE((daemon.mount / "r").stat().st_mode) == 0o640


def test_a_region_belongs_to_its_creator(spawn: Spawn, daemon: Daemon) -> None:
    donate(spawn(user=NOBODY, group=NOBODY, extra_groups=[]))
    status = (daemon.mount / "r").stat()
    assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY)


def test_an_ordinary_user_takes_faults_in_system_calls(spawn: Spawn) -> None:
    donor = spawn(user=NOBODY, group=NOBODY, extra_groups=[])
    donate(donor)
    assert donor.do("from_memory", BASE + PAGE, 4096) == "4096"
    assert donor.do("to_memory", BASE + ALIGNMENT, 4096) == "4096"
    assert donor.do("fork", "from_memory", BASE + SIZE - 4096, 4096) == "4096"


def test_readers_see_writes_and_cannot_write(spawn: Spawn, daemon: Daemon) -> None:
    donor = spawn()
    donate(donor, mode=0o644)
    reader = spawn(user=NOBODY, group=NOBODY, extra_groups=[])
    assert attach(reader, oflags=os.O_RDONLY) == "0"
    assert reader.do("vma", BASE) == "r--p"
    assert reader.do("store", BASE, 1) == "SIGSEGV"
    donor.ok("store", BASE, 5)
    assert reader.do("load", BASE) == "5"
    donor.ok("store", BASE, 6)
    assert reader.do("load", BASE) == "6"
    # First touched by the reader, written afterwards by the donor.
    assert reader.do("load", BASE + ALIGNMENT) == "0"
    donor.ok("store", BASE + ALIGNMENT, 7)
    assert reader.do("load", BASE + ALIGNMENT) == "7"
    assert reader.do("from_memory", BASE + 9 * PAGE, 4096) == "4096"
    # Making it writable gives the reader copies of its own, and nobody else.
    assert reader.do("mprotect", BASE, PAGE, 3) == minus(errno.EACCES)
    reader.ok("raw_mprotect", BASE, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    reader.ok("store", BASE, 99)
    assert donor.do("load", BASE) == "6"
    assert "read-only" in daemon.info("r", "sharers")


def test_a_region_created_read_only_is_so_for_everyone(spawn: Spawn) -> None:
    donor, other = spawn(), spawn()
    donor.ok("map", BASE, SIZE, SHARED)
    donor.ok("store", BASE, 8)
    donor.ok("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o666)
    assert attach(other) == minus(errno.EPERM)
    assert attach(other, oflags=os.O_RDONLY) == "0"
    for client in (donor, other):
        assert client.do("load", BASE) == "8"
        assert client.do("store", BASE, 1) == "SIGSEGV"
        assert client.do("fork", "load", BASE) == "8"


def test_another_users_empty_file_gets_no_range_from_a_reader(spawn: Spawn, daemon: Daemon) -> None:
    (daemon.mount / "r").touch(mode=0o644)
    other = spawn(user=NOBODY, group=NOBODY, extra_groups=[])
    flags = os.O_CREAT | os.O_RDONLY
    assert other.do("mshare", "r", BASE, SIZE, flags, 0) == minus(errno.EACCES)


# -- how long it lives --


def test_the_last_sharers_unlink_takes_name_and_memory(spawn: Spawn, daemon: Daemon) -> None:
    donor, consumer = spawn(), spawn()
    donate(donor)
    assert attach(consumer) == "0"
    donor.ok("store", BASE, 1)
    donor.ok("unlink", "r")
    assert donor.do("vma", BASE) == "none"
    assert donor.do("load", BASE) == "SIGSEGV"
    assert consumer.do("load", BASE) == "1"
    assert (daemon.mount / "r").exists()
    consumer.ok("unlink", "r")
    assert not (daemon.mount / "r").exists()
    assert daemon.backings() == []


def test_detach_leaves_name_and_memory(spawn: Spawn, daemon: Daemon) -> None:
    donor = spawn()
    donate(donor)
    donor.ok("store", BASE, 2)
    donor.ok("detach", "r")
    assert donor.do("vma", BASE) == "none"
    assert daemon.sharers("r") == 0
    assert attach(donor) == "0"
    assert donor.do("load", BASE) == "2"


def test_rm_takes_the_name_at_once_and_the_memory_with_the_last_sharer(
    spawn: Spawn, daemon: Daemon
) -> None:
    donor, late = spawn(), spawn()
    donate(donor)
    donor.ok("store", BASE, 3)
    (daemon.mount / "r").unlink()
    assert attach(late) == minus(errno.ENOENT)
    assert donor.do("load", BASE) == "3"
    donor.ok("store", BASE + ALIGNMENT, 3)  # absent pages are still served
    assert donor.do("fork", "load", BASE) == "3", "a child attaches a region without a name"
    # The name is free for another region meanwhile.
    donate(late)
    assert late.do("load", BASE) == "0"
    assert len(daemon.backings()) == 2
    donor.ok("unlink", "r")
    assert len(daemon.backings()) == 1
    assert daemon.sharers("r") == 1


def test_unlink_by_a_process_that_is_not_attached_needs_the_right(
    spawn: Spawn, daemon: Daemon
) -> None:
    donor = spawn()
    donate(donor, mode=0o666)
    stranger = spawn(user=NOBODY, group=NOBODY, extra_groups=[])
    assert stranger.do("unlink", "r") == minus(errno.EPERM)
    other = spawn()
    other.ok("unlink", "r")
    assert not (daemon.mount / "r").exists()
    donor.ok("store", BASE, 1)


def test_a_last_sharer_that_may_not_delete_leaves_the_region(spawn: Spawn, daemon: Daemon) -> None:
    donor = spawn()
    donate(donor, mode=0o666)
    (daemon.mount / "r").chmod(0o666)
    donor.ok("store", BASE, 4)
    stranger = spawn(user=NOBODY, group=NOBODY, extra_groups=[])
    assert attach(stranger) == "0"
    donor.kill()
    eventually(lambda: daemon.sharers("r") == 1, "the donor is gone")
    stranger.ok("unlink", "r")
    assert stranger.do("vma", BASE) == "none"
    assert daemon.sharers("r") == 0
    assert attach(stranger) == "0"
    assert stranger.do("load", BASE) == "4"


@pytest.mark.parametrize("end", ["kill", "exec"])
def test_the_region_outlives_its_donor(spawn: Spawn, daemon: Daemon, end: str) -> None:
    donor = spawn()
    donate(donor)
    donor.ok("store", BASE, 5)
    if end == "kill":
        donor.kill()
    else:
        donor.send("exec")
        donor.ok("hello")
        assert donor.do("vma", BASE) == "none"
    eventually(lambda: daemon.sharers("r") == 0, "the donor is gone")
    consumer = spawn()
    assert attach(consumer) == "0"
    assert consumer.do("load", BASE) == "5"


def test_a_child_that_keeps_the_connection_does_not_keep_its_parent_alive(
    spawn: Spawn, daemon: Daemon
) -> None:
    """A raw clone() has the descriptors; the pidfd tells that the sharer is gone."""
    donor = spawn()
    donate(donor)
    donor.send("branch")
    child = int(donor.result())
    assert daemon.sharers("r") == 2
    donor.kill()
    eventually(lambda: daemon.sharers("r") == 1, "the parent is gone")
    os.kill(child, 9)
    eventually(lambda: daemon.sharers("r") == 0, "the child is gone")


# -- fork, threads, syscall --


def test_a_child_is_a_sharer_of_its_own(spawn: Spawn, daemon: Daemon) -> None:
    client = spawn()
    donate(client)
    client.ok("store", BASE, 1)
    client.send("branch")
    child = int(client.result())
    assert child != client.pid
    assert daemon.sharers("r") == 2
    assert f"\n{child} " in daemon.info("r", "sharers")
    assert client.do("load", BASE) == "1"
    client.ok("store", BASE + ALIGNMENT, 2)
    assert client.do("fork", "load", BASE + ALIGNMENT) == "2"
    client.ok("detach", "r")
    assert daemon.sharers("r") == 1
    os.kill(child, 9)


def test_a_raw_clone_faults_and_reads_nothing(spawn: Spawn, daemon: Daemon) -> None:
    client = spawn()
    donate(client)
    client.ok("store", BASE, 1)
    for offset in (0, ALIGNMENT):
        assert client.do("clone", "load", BASE + offset) == "SIGSEGV"
        assert client.do("clone", "from_memory", BASE + offset, 1) == minus(errno.EFAULT)
    assert int(daemon.field("r", "memory")) <= ALIGNMENT // 16


def test_other_threads_may_attach_and_detach(spawn: Spawn) -> None:
    donor, client = spawn(), spawn()
    donate(donor)
    client.ok("thread", "mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    client.ok("store", BASE, 1)
    client.ok("thread", "store", BASE + ALIGNMENT, 2)
    assert donor.do("load", BASE + ALIGNMENT) == "2"
    client.ok("thread", "unlink", "r")


def test_a_process_attaches_several_regions(spawn: Spawn, daemon: Daemon) -> None:
    client = spawn()
    for number in range(5):
        client.ok("map", BASE + number * SIZE, SIZE, SHARED)
        client.ok("mshare", f"r{number}", BASE + number * SIZE, SIZE, CREATE, 0o600)
        client.ok("store", BASE + number * SIZE, number)
    for number in range(5):
        assert client.do("fork", "load", BASE + number * SIZE) == str(number)
        client.ok("unlink", f"r{number}")
        assert not (daemon.mount / f"r{number}").exists(), "the child that was waited for is gone"


# -- memory --


def test_du_and_ls_tell_the_memory(spawn: Spawn, daemon: Daemon) -> None:
    client = spawn()
    donate(client)
    assert (daemon.mount / "r").stat().st_blocks == 0
    client.ok("fill", BASE, SIZE, 1)
    # Who waits is woken by the kernel, and only then does the pager write down what has come.
    eventually(lambda: (daemon.mount / "r").stat().st_blocks * 512 == SIZE, "all is counted")
    eventually(lambda: int(daemon.field("r", "memory")) == SIZE, "all is told")


def test_a_sharer_faults_once_a_chunk_and_the_next_not_at_all(spawn: Spawn, daemon: Daemon) -> None:
    donor, second = spawn(), spawn()
    donate(donor)
    donor.ok("fill", BASE, SIZE, 1)
    served = daemon.metric('faults_total{kind="anonymous"}')
    assert 2 <= served <= SIZE // LARGEST_CHUNK + 6, "little, then twice as much each time"
    assert attach(second) == "0"
    assert second.do("scan", BASE, SIZE) == "1"
    assert daemon.metric('faults_total{kind="anonymous"}') == served


def test_region_memory_is_a_limit(make_daemon: Callable[..., Daemon], client_program: Path) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}", f"--region-memory={64 * PAGE}").start()
    daemon.expected.append("no memory for a fault")
    with clients(client_program, daemon) as start:
        client = start()
        donate(client)
        client.ok("fill", BASE, 64 * PAGE, 1)
        assert client.do("store", BASE + 64 * PAGE, 1) == "SIGBUS"
        assert client.do("from_memory", BASE + SIZE - PAGE, 1) == minus(errno.EFAULT)
        assert client.do("load", BASE) == "1"
        assert int(daemon.field("r", "memory")) == 64 * PAGE
        assert daemon.metric('sigbus_total{reason="no memory"}') == 2
        assert "no memory for a fault of process" in daemon.log()


@pytest.mark.shm_only
def test_a_full_tmpfs_is_sigbus_and_heals(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    """Own /dev/shm of 1 MiB, in the test's own mount namespace."""
    from msharefsd.linux import syscalls

    syscalls.mount("shm", "/dev/shm", "tmpfs", 0, "size=1m,mode=1777")
    try:
        daemon = make_daemon(f"--alignment={ALIGNMENT}").start()
        daemon.expected.append("no memory for a fault")
        with clients(client_program, daemon) as start:
            client, other = start(), start()
            donate(client)
            assert attach(other) == "0"
            assert client.do("fill", BASE, SIZE, 1) == "SIGBUS"
            assert daemon.metric('sigbus_total{reason="no memory"}') == 1
            assert client.do("load", BASE) == "1"
            page = BASE + (1 << 20)
            assert client.do("load", page) == "SIGBUS"
            syscalls.mount("shm", "/dev/shm", "tmpfs", 1 << 5, "size=4m")  # MS_REMOUNT
            deadline = time.monotonic() + 20
            while client.do("load", page) == "SIGBUS":
                assert time.monotonic() < deadline, "the page stays poisoned"
                time.sleep(0.1)
            client.ok("fill", BASE, SIZE, 2)
            assert other.do("load", page) == "2"
            daemon.stop()
    finally:
        syscalls.umount("/dev/shm", syscalls.MNT_DETACH)
