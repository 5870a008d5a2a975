"""Many sharers, and who pays for memory."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ALIGNMENT, BASE, BIN, Client, Daemon, clients, eventually

SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
MiB = 1 << 20
Spawn = Callable[..., Client]


def donate(client: Client, size: int = SIZE) -> None:
    client.ok("map", BASE, size, mmap.MAP_SHARED)
    client.ok("mshare", "r", BASE, size, CREATE, 0o666)


def resident(pid: int) -> int:
    """Anonymous resident memory of a process, bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise KeyError("RssAnon")


def test_200_sharers_come_and_go(spawn: Spawn, daemon: Daemon) -> None:
    donor = spawn()
    donate(donor)
    donor.ok("fill", BASE, SIZE, 1)

    def round_of_200() -> None:
        sharers = [spawn() for _ in range(200)]
        for sharer in sharers:
            sharer.send("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        for sharer in sharers:
            assert sharer.result() == "0"
        assert daemon.sharers("r") == 201
        for sharer in sharers:
            sharer.send("scan", BASE, SIZE)
        for sharer in sharers:
            assert sharer.result() == "1"
        for number, sharer in enumerate(sharers):
            if number % 2:
                sharer.ok("detach", "r")
        for sharer in sharers:
            sharer.kill()

    def state() -> tuple[float, ...]:
        return daemon.sharers("r"), daemon.metric("tasks"), daemon.descriptors()

    before = state()
    round_of_200()  # the allocator's pools are as large as they get
    eventually(lambda: state() == before, "everything is given back")
    memory = resident(daemon.pid)
    for _ in range(3):
        round_of_200()
        eventually(lambda: state() == before, "everything is given back")
    # Three more rounds take no more memory than one: a leak of a few hundred bytes
    # for each of the 600 sharers would show.
    assert resident(daemon.pid) - memory < MiB // 2


def test_a_fork_storm(spawn: Spawn, daemon: Daemon) -> None:
    donor = spawn()
    donate(donor)
    assert donor.do("storm", 100, BASE) == "0"
    eventually(lambda: daemon.sharers("r") == 1, "the children are gone")


def test_the_daemon_raises_its_descriptor_limit(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    daemon.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)))
    with clients(client_program, daemon) as start:
        donate(start())
        sharers = [start() for _ in range(40)]
        for sharer in sharers:
            sharer.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        assert daemon.sharers("r") == 41


def test_without_descriptors_clients_are_turned_away_and_the_daemon_lives(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}")
    command = ["prlimit", "--nofile=48:48", "setpriv", "--bounding-set=-sys_resource"]
    daemon.expected.append("(turning clients away|cannot accept a connection): Too many open files")
    daemon.start([*command, str(BIN / "msharefsd")])
    with clients(client_program, daemon) as start:
        donor = start()
        donate(donor)
        sharers = [start() for _ in range(40)]
        results = [sharer.do("mshare", "r", BASE, SIZE, os.O_RDWR, 0) for sharer in sharers]
        assert set(results) == {"0", "-24"}, "some fit, and EMFILE for the others"
        # Those that are served go on; and when they leave there is room again.
        donor.ok("store", BASE, 3)
        for sharer, result in zip(sharers, results, strict=True):
            if result == "0":
                assert sharer.do("load", BASE) == "3"
            sharer.kill()
        eventually(lambda: daemon.sharers("r") == 1, "they are gone")
        late = start()  # the descriptors of who has left are closed by a thread
        attach = ("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        eventually(lambda: late.do(*attach) == "0", "there is room again")


# -- memory cgroups --


class MemoryGroup:
    """A memory cgroup, of version 1 or 2, whichever this machine has."""

    def __init__(self, name: str) -> None:
        self.v1 = Path("/sys/fs/cgroup/memory")
        if (self.v1 / "memory.usage_in_bytes").exists():
            self.path = self.v1 / name
            self.usage_file, self.limit_file = "memory.usage_in_bytes", "memory.limit_in_bytes"
        else:
            root = Path("/sys/fs/cgroup")
            controllers = root / "cgroup.controllers"
            if not controllers.exists() or "memory" not in controllers.read_text().split():
                pytest.skip("this machine has no memory cgroup controller")
            (root / "cgroup.subtree_control").write_text("+memory")
            self.path = root / name
            self.usage_file, self.limit_file = "memory.current", "memory.max"
        self.path.mkdir()

    def usage(self) -> int:
        return int((self.path / self.usage_file).read_text())

    def limit(self, size: int) -> None:
        (self.path / self.limit_file).write_text(str(size))

    def add(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                self.path.rmdir()
            except OSError:
                assert time.monotonic() < deadline, "the cgroup stays busy"
                time.sleep(0.05)
            else:
                return


@contextlib.contextmanager
def memory_groups(*names: str) -> Iterator[list[MemoryGroup]]:
    with contextlib.ExitStack() as stack:
        groups = []
        for name in names:
            group = MemoryGroup(f"mshare-test-{os.getpid()}-{name}")
            stack.callback(group.remove)
            groups.append(group)
        yield groups


CHARGED = 64 * MiB


def test_the_sharer_that_touches_first_pays(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    daemon = make_daemon("--alignment=256M")
    size = 256 * MiB
    with memory_groups("daemon", "donor", "second") as (of_daemon, of_donor, of_second):
        daemon.start()
        of_daemon.add(daemon.pid)
        with clients(client_program, daemon) as start:
            donor, second = start(), start()
            of_donor.add(donor.pid)
            of_second.add(second.pid)
            donor.ok("map", BASE, size, mmap.MAP_SHARED)
            donor.ok("store", BASE, 1)
            donor.ok("mshare", "r", BASE, size, CREATE, 0o600)
            second.ok("mshare", "r", BASE, size, os.O_RDWR, 0)
            groups = (of_daemon, of_donor, of_second)
            before = [group.usage() for group in groups]
            donor.ok("fill", BASE, CHARGED, 1)
            assert second.do("scan", BASE, CHARGED) == "1"
            second.ok("fill", BASE + CHARGED, CHARGED, 1)
            grown = [group.usage() - was for group, was in zip(groups, before, strict=True)]
            slack = 8 * MiB  # page tables, and what the kernel charges in batches
            assert grown[0] < slack
            assert CHARGED - slack < grown[1] < CHARGED + slack
            assert CHARGED - slack < grown[2] < CHARGED + slack
        daemon.stop()


def test_huge_pages_are_charged_where_the_small_ones_were(
    make_daemon: Callable[..., Daemon], client_program: Path, directory: Path
) -> None:
    (directory / "config").write_text("collapse_seconds = 0.1\n")
    daemon = make_daemon("--alignment=256M", f"--config={directory / 'config'}")
    size = 256 * MiB
    with memory_groups("daemon", "donor", "second") as (of_daemon, of_donor, of_second):
        daemon.start()
        if "MADV_COLLAPSE" in daemon.log():
            pytest.skip("this kernel has no MADV_COLLAPSE of shared memory")
        of_daemon.add(daemon.pid)
        with clients(client_program, daemon) as start:
            donor, second = start(), start()
            of_donor.add(donor.pid)
            of_second.add(second.pid)
            donor.ok("mshare", "r", BASE, size, CREATE, 0o600)
            donor.ok("mmap", BASE, size, 3, mmap.MAP_SHARED | 0x10)
            second.ok("mshare", "r", BASE, size, os.O_RDWR, 0)
            groups = (of_daemon, of_donor, of_second)
            before = [group.usage() for group in groups]
            donor.ok("fill", BASE, CHARGED, 1)
            second.ok("fill", BASE + CHARGED, CHARGED, 1)
            chunks = 2 * CHARGED // (2 * MiB)
            eventually(lambda: daemon.metric("collapsed_chunks_total") == chunks, "collapsed")
            grown = [group.usage() - was for group, was in zip(groups, before, strict=True)]
            slack = 8 * MiB
            assert grown[0] < slack
            assert CHARGED - slack < grown[1] < CHARGED + slack
            assert CHARGED - slack < grown[2] < CHARGED + slack
        daemon.stop()


def test_a_sharer_over_its_limit_does_not_take_the_daemon_down(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    daemon = make_daemon("--alignment=256M").start()
    size = 256 * MiB
    with memory_groups("limited") as (limited,), clients(client_program, daemon) as start:
        rich, poor = start(), start()
        rich.ok("map", BASE, size, mmap.MAP_SHARED)
        rich.ok("mshare", "r", BASE, size, CREATE, 0o600)
        limited.add(poor.pid)
        limited.limit(32 * MiB)
        poor.ok("mshare", "r", BASE, size, os.O_RDWR, 0)
        daemon.expected.append("no memory for a fault")
        poor.send("fill", BASE, size, 7)
        assert poor.process.stdout is not None
        # As with plain shared memory: the OOM killer's, or SIGBUS.
        assert poor.process.stdout.readline() in ("", "SIGBUS\n")
        poor.kill()
        assert daemon.process is not None and daemon.process.poll() is None
        rich.ok("fill", BASE + size - CHARGED, CHARGED, 1)
        assert rich.do("load", BASE) == "7"
        rich.kill()
        daemon.stop()


# -- a kernel with less --


@pytest.mark.parametrize(
    "without",
    [
        "poison",
        "map_present",
        "map_files",
        "device",
        "write_protect",
        "exact_address",
        "collapse",
    ],
)
def test_without_a_kernel_feature(
    make_daemon: Callable[..., Daemon], client_program: Path, without: str
) -> None:
    """Each feature's fallback does the same, as far as it can."""
    daemon = make_daemon(f"--alignment={ALIGNMENT}", f"--without={without}")
    daemon.expected.append("WARNING: (no|/dev/userfaultfd)")
    daemon.start()
    assert "WARNING" in daemon.log()
    user = {"user": 65534, "group": 65534, "extra_groups": []}
    with clients(client_program, daemon) as start:
        donor, second = start(**user), start(**user)
        donor.ok("map", BASE, ALIGNMENT, mmap.MAP_SHARED)
        donor.ok("store", BASE + 8192, 1)
        assert donor.do("fork", "store", BASE + ALIGNMENT - 4096, 3) == "0"
        donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        assert donor.do("load", BASE + ALIGNMENT - 4096) == "3"
        second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        assert second.do("load", BASE + 8192) == "1"
        second.ok("store", BASE, 2)
        assert donor.do("load", BASE) == "2"
        assert second.do("load", BASE + ALIGNMENT) == "SIGBUS"
        assert donor.do("thread", "store", BASE + SIZE - 1, 1) == "SIGBUS"
        assert int(daemon.field("r", "memory")) < ALIGNMENT


def test_without_map_files_and_knowledge_of_swap_each_page_is_tried(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}", "--without=map_files")
    daemon.expected.append("WARNING: no right to /proc/PID/map_files")
    daemon.start()
    hide = 'mount --bind /dev/null /proc/vmstat && exec "$@"'
    with clients(client_program, daemon) as start:
        donor = start(before=["unshare", "--mount", "sh", "-c", hide, "sh"])
        donor.ok("map", BASE, ALIGNMENT, mmap.MAP_SHARED)
        donor.ok("store", BASE, 1)
        donor.ok("fork", "store", BASE + ALIGNMENT - 4096, 3)
        donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        assert donor.do("load", BASE) == "1"
        assert donor.do("load", BASE + 4096) == "0"
        assert donor.do("load", BASE + ALIGNMENT - 4096) == "3"


def test_without_write_protection_what_needs_it_is_refused(
    make_daemon: Callable[..., Daemon], client_program: Path, directory: Path
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}", "--without=write_protect")
    daemon.expected.append("WARNING: no UFFD_FEATURE_WP")
    daemon.start()
    (directory / "file").write_bytes(b"x" * 8192)
    with clients(client_program, daemon) as start:
        client = start()
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        unsupported = str(-errno.EOPNOTSUPP)
        fixed = mmap.MAP_SHARED | 0x10
        assert client.do("mmap", BASE, 4096, mmap.PROT_READ, fixed) == unsupported
        file = (directory / "file", os.O_RDWR, 0)
        assert client.do("mmap", BASE, 4096, 3, fixed, *file) == unsupported
        client.ok("mmap", BASE, 8192, 3, mmap.MAP_PRIVATE | 0x10, *file)
        client.ok("mmap", BASE + 8192, 4096, 0, fixed)
        assert client.do("load", BASE) == str(ord("x"))
        assert client.do("load", BASE + 8192) == "SIGSEGV"
        assert client.do("mprotect", BASE, 4096, 0) == unsupported
        client.ok("mprotect", BASE + 8192, 4096, 3)
        client.ok("store", BASE + 8192, 1)


def test_subprocesses_of_a_sharer_start_as_ever(spawn: Spawn, daemon: Daemon) -> None:
    """fork and exec at once: the child is a sharer for a moment, and then is not."""
    donor = spawn()
    donate(donor)
    for _ in range(20):
        assert donor.do("fork", "true") == "0"
    eventually(lambda: daemon.sharers("r") == 1, "the children are gone")
