"""Sharers that cannot go on for a while, or under a tool: nobody else waits for them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    ALIGNMENT,
    BASE,
    CLIENT_SOURCE,
    PAGE,
    Client,
    Daemon,
    clients,
    compile_c,
    eventually,
)

from libmshare import core
from msharefsd.linux import processes

pytestmark = pytest.mark.shm_only
SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SHARED, PRIVATE = mmap.MAP_SHARED | 0x10, mmap.MAP_PRIVATE | 0x10
BOTH = mmap.PROT_READ | mmap.PROT_WRITE
DONTDUMP = 16
FREEZER = Path("/sys/fs/cgroup/freezer")
Spawn = Callable[..., Client]
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: processes.state(pid) == "T", "stopped")
    yield
    os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    if not (FREEZER / "cgroup.procs").exists():
        pytest.skip("no freezer of cgroup v1 here")
    group = FREEZER / f"mshare-test-{pid}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        eventually(lambda: (group / "freezer.state").read_text() == "FROZEN\n", "frozen")
        yield
        (group / "freezer.state").write_text("THAWED")
    finally:
        (group / "freezer.state").write_text("THAWED")
        (FREEZER / "cgroup.procs").write_text(str(pid))
        group.rmdir()


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    """In a stop of ptrace(2), as in a debugger at a breakpoint."""
    seize, interrupt, detach, wall = 0x4206, 0x4207, 17, 0x40000000
    assert _libc.ptrace(seize, pid, None, None) == 0
    assert _libc.ptrace(interrupt, pid, None, None) == 0
    os.waitpid(pid, wall)
    yield
    assert _libc.ptrace(detach, pid, None, None) == 0


@pytest.fixture
def file(directory: Path) -> Path:
    path = directory / "file"
    path.write_bytes(b"a" * 64 * PAGE)
    return path


def go_on(client: Client, number: int, file: Path) -> None:
    """New pages, changes of what is mapped, in every sharer, and pages that are written back."""
    place = BASE + number * 16 * PAGE
    client.ok("mmap", place, 4 * PAGE, BOTH, SHARED)
    client.ok("store", place, 1)
    client.ok("mprotect", place, PAGE, 0)
    client.ok("mprotect", place, PAGE, 1)
    assert client.do("load", place) == "1"
    client.ok("mmap", place, PAGE, BOTH, SHARED, file, os.O_RDWR, number * PAGE)
    client.ok("store", place, 7)
    client.ok("msync", place, PAGE, 4)
    client.ok("munmap", place + PAGE, PAGE)
    assert client.do("fork", "load", place) == "7"


@pytest.mark.parametrize("condition", [stopped, frozen, traced])
def test_who_cannot_go_on_delays_nobody(
    spawn: Spawn,
    daemon: Daemon,
    file: Path,
    condition: Callable[[int], contextlib.AbstractContextManager[None]],
) -> None:
    held, other = spawn(), spawn()
    held.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    other.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    go_on(held, 0, file)
    with condition(held.pid):
        go_on(other, 1, file)
        daemon.kill()
        daemon.expected.append("taking down the mount")
        daemon.start()
        go_on(other, 2, file)
        third = spawn()
        third.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        go_on(third, 3, file)
    for number in range(4):
        assert held.do("load", BASE + number * 16 * PAGE) == "7"
        assert held.do("load", BASE + number * 16 * PAGE + PAGE) == "SIGBUS"
    go_on(held, 4, file)


def segments(path: Path) -> dict[int, int]:
    """What a core file has of each address: bytes by where they begin (elf(5))."""
    found = {}
    with path.open("rb") as core_file:
        head = core_file.read(64)
        (at,), (count,) = struct.unpack_from("=Q", head, 32), struct.unpack_from("=H", head, 56)
        core_file.seek(at)
        for _ in range(count):
            kind, _, _, address, _, stored, _, _ = struct.unpack("=IIQQQQQQ", core_file.read(56))
            if kind == 1:
                found[address] = stored
    return found


def test_a_core_dump_populates_nothing_and_leaves_out_what_it_is_told(
    spawn: Spawn, daemon: Daemon, file: Path, directory: Path
) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    if pattern.startswith(("|", "/")):
        pytest.skip("core dumps do not go where a test can say")
    where = directory / "dumped"
    where.mkdir()
    dumped, other = spawn(), spawn()
    dumped.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    dumped.ok("mmap", BASE, 8 * PAGE, BOTH, SHARED)
    dumped.ok("mmap", BASE + ALIGNMENT, 64 * PAGE, 1, PRIVATE, file, os.O_RDONLY, 0)
    dumped.ok("fill", BASE, 8 * PAGE, 5)
    dumped.ok("madvise", BASE + 4 * PAGE, 4 * PAGE, DONTDUMP)
    other.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    before = daemon.field("r", "memory")
    dumped.ok("chdir", where)
    dumped.ok("limit", 4, 1 << 40)
    Path(f"/proc/{dumped.pid}/coredump_filter").write_text("0x7f")
    os.kill(dumped.pid, signal.SIGQUIT)
    assert dumped.process.wait() == -signal.SIGQUIT
    assert daemon.field("r", "memory") == before, "what was absent is absent"
    assert other.do("load", BASE + ALIGNMENT) == str(ord("a"))
    (written,) = where.iterdir()
    has = segments(written)
    assert has[BASE] == 4 * PAGE
    assert has[BASE + 4 * PAGE] == 0


def test_a_child_does_not_dump_what_its_parent_does_not(spawn: Spawn) -> None:
    client = spawn()
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    client.ok("madvise", BASE + PAGE, PAGE, DONTDUMP)
    child = int(client.do("branch"))
    flags, start = {}, 0
    for line in Path(f"/proc/{child}/smaps").read_text().splitlines():
        if line.startswith("VmFlags:"):
            flags[start] = line.split()
        elif ":" not in line.split(" ")[0]:
            start = int(line.split("-")[0], 16)
    assert "dd" in flags[BASE + PAGE]
    assert "dd" not in flags[BASE + 2 * PAGE]


def debug(pid: int, *commands: str) -> str:
    words = [word for command in commands for word in ("-ex", command)]
    done = subprocess.run(
        ["gdb", "-batch", "-nx", "-p", str(pid), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={"PATH": os.defpath, "HOME": "/nonexistent", "DEBUGINFOD_URLS": ""},
    )
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb here")
def test_a_debugger_populates_nothing_and_waits_for_nobody(
    spawn: Spawn, daemon: Daemon, file: Path, directory: Path
) -> None:
    """What is absent it cannot read; so it is with gcore(1), and while no daemon is."""
    client, other = spawn(), spawn()
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    client.ok("mmap", BASE, PAGE, BOTH, SHARED)
    client.ok("mmap", BASE + ALIGNMENT, 64 * PAGE, 1, PRIVATE, file, os.O_RDONLY, 0)
    client.ok("store", BASE, 7)
    other.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    before = daemon.field("r", "memory")
    looks = [f"x/1db {BASE:#x}", f"x/1db {BASE + ALIGNMENT:#x}"]
    looks.append(f"gcore {directory / 'core'}")
    said = debug(client.pid, *looks)
    assert f"{BASE:#x}:\t7" in said, said
    assert f"Cannot access memory at address {BASE + ALIGNMENT:#x}" in said, said
    assert "Saved corefile" in said, said
    assert daemon.field("r", "memory") == before
    daemon.kill()
    said = debug(client.pid, *looks[:2])
    assert f"Cannot access memory at address {BASE + ALIGNMENT:#x}" in said, said
    daemon.expected.append("taking down the mount")
    daemon.start()
    assert other.do("load", BASE + ALIGNMENT) == str(ord("a"))
    assert client.do("load", BASE + ALIGNMENT) == str(ord("a"))


@contextlib.contextmanager
def limited(pid: int, limit: int) -> Iterator[None]:
    """In a memory cgroup (version 1) of its own."""
    parent = Path("/sys/fs/cgroup/memory")
    if not (parent / "memory.limit_in_bytes").exists() and not (parent / "cgroup.procs").exists():
        pytest.skip("no memory controller of cgroup v1 here")
    group = parent / f"mshare-test-{pid}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for each in (group / "cgroup.procs").read_text().split():
            (parent / "cgroup.procs").write_text(each)
        # What it was charged for goes to the parent.
        eventually(lambda: not _still_there(group), "the end of the group")


def _still_there(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return group.exists()


def test_who_is_at_its_memory_limit_delays_nobody(spawn: Spawn, daemon: Daemon, file: Path) -> None:
    """It pays for what it touches; when it cannot, it has SIGBUS, or the kernel ends it."""
    size, limit = 32 * ALIGNMENT, 16 << 20
    held, other = spawn(), spawn()
    held.ok("mshare", "r", BASE, size, CREATE, 0o600)
    other.ok("mshare", "r", BASE, size, os.O_RDWR, 0)
    held.ok("mmap", BASE + 2 * ALIGNMENT, size - 2 * ALIGNMENT, BOTH, SHARED)
    daemon.expected.append("cannot be populated|no memory")
    with limited(held.pid, limit):
        held.send("fill", BASE + 2 * ALIGNMENT, size - 2 * ALIGNMENT, 5)
        go_on(other, 0, file)
        go_on(other, 1, file)
        answer = "" if held.process.stdout is None else held.process.stdout.readline()
        assert answer in ("SIGBUS\n", ""), answer
        if not answer:
            assert held.process.wait() == -signal.SIGKILL
        go_on(other, 2, file)
    assert other.do("load", BASE + 2 * ALIGNMENT) == "5"


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind here")
@pytest.mark.parametrize("tool", ["none", "memcheck"])
def test_under_valgrind_memory_calls_and_forks_work(
    spawn: Spawn, daemon: Daemon, file: Path, tool: str
) -> None:
    client = spawn(before=["valgrind", f"--tool={tool}", "-q"], stderr=subprocess.DEVNULL)
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    client.ok("mmap", BASE, 4 * PAGE, 1, PRIVATE, file, os.O_RDONLY, 0)
    client.ok("mmap", BASE + ALIGNMENT, PAGE, BOTH, SHARED)
    client.ok("store", BASE + ALIGNMENT, 9)
    assert client.do("fork", "load", BASE) == str(ord("a"))
    assert client.do("fork", "load", BASE + ALIGNMENT) == "9"
    assert spawn().do("mshare", "r", BASE, SIZE, os.O_RDWR, 0) == "0"
    eventually(lambda: daemon.sharers("r") == 2, "the end of children")


def test_under_address_sanitizer_its_gap_is_left_alone(
    daemon: Daemon, file: Path, directory: Path
) -> None:
    library = core.library_directory()
    assert library is not None
    flags = ["-fsanitize=address", f"-Wl,-rpath,{library}"]
    try:
        program = compile_c(CLIENT_SOURCE, directory / "sanitized", *flags)
    except subprocess.CalledProcessError:
        pytest.skip("no AddressSanitizer here")
    with clients(program, daemon, ASAN_OPTIONS="detect_leaks=0") as start:
        client = start()
        gap = 1 << 40
        assert client.do("mshare", "gap", gap, SIZE, CREATE, 0o600) == str(-errno.EEXIST)
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        client.ok("mmap", BASE, 4 * PAGE, 1, PRIVATE, file, os.O_RDONLY, 0)
        assert client.do("load", BASE) == str(ord("a"))
        assert client.do("fork", "load", BASE + PAGE) == str(ord("a"))
        assert client.do("load", BASE + ALIGNMENT) == "SIGBUS"


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="a kernel without NUMA")
def test_a_region_has_the_memory_policy_of_who_made_it(spawn: Spawn) -> None:
    """By numactl(8): it is the daemon that makes its pages."""

    def policy(client: Client) -> str:
        for line in Path(f"/proc/{client.pid}/numa_maps").read_text().splitlines():
            if line.startswith(f"{BASE:x} "):
                return line.split()[1]
        raise AssertionError

    maker, other, plain = spawn(), spawn(), spawn()
    maker.ok("bind_to_node_0")
    maker.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    other.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    assert policy(other) == "bind:0", "it is the memory's, and so everybody's"
    maker.ok("unlink", "r")
    other.ok("unlink", "r")
    plain.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    assert policy(plain) == "default"
