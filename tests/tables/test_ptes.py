"""`mshare ptes`: page tables to the kilobyte, by object, from outside."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commanding import mshare
from conftest import ALIGNMENT, BASE, TESTS, Daemon, clients, eventually, huge_pages
from sharers import Sharers, make_sharers  # noqa: F401 - a fixture

sys.path.append(str(TESTS.parent))

from benchmarks.postgres import Postgres, identity
from msharefsd.mount import mounting
from msharetables import proc, survey
from msharetables.objects import Kernel, Kind
from msharetables.patience import (
    MOST_LEFT,
    MOST_OF_ONE,
    NoAnswerError,
    NotAskedError,
    Patience,
)
from msharetables.survey import Object, Survey
from msharetables.tables import count

MiB = 1 << 20
TABLE = 4096
NOBODY = 65534

pytestmark = pytest.mark.shm_only

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")


def of(pid: int) -> Survey:
    return survey.take(proc.with_children([pid]))


def postgres_user() -> dict[str, int]:
    """Whose server it is, if we are not."""
    who = identity()
    return {key: int(str(who[key])) for key in ("user", "group") if key in who}


def exact(found: Survey) -> None:
    """Each process's VmPTE is explained to the kilobyte."""
    for process in found.processes:
        assert process.tables is not None
        assert process.tables.bytes == process.status.tables, (process.pid, process.status.name)


def named(found: Survey, label: str) -> Object:
    (each,) = [each for each in found.objects if each.label == label]
    return each


@pytest.fixture
def postgres(directory: Path) -> Iterator[Postgres]:
    server = Postgres(directory / "postgres")
    yield server
    server.remove()


def test_postgresql_is_explained_to_the_kilobyte_by_its_own_user(postgres: Postgres) -> None:
    postgres.start({"shared_buffers": "256MB"})
    postgres.load(8)
    with postgres.sessions(20):
        done = mshare("ptes", "--pid", postgres.pid, "--json", **postgres_user())
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        vmpte = {each["pid"]: each["vmpte"] for each in found["processes"]}
        assert set(vmpte) == set(postgres.processes())
        assert {each["pid"]: each["explained"] for each in found["processes"]} == vmpte
        (memory,) = [each for each in found["objects"] if each["name"] == "anonymous of postgres"]
        assert memory["size"] > 256 * MiB
        assert set(memory["sharers"]) == set(vmpte)
        size = int(postgres.sql("SELECT pg_relation_size('pgbench_accounts')"))
        assert memory["tables"] >= 20 * (size // (2 * MiB)) * TABLE
        assert found["shared"] + found["private"] + found["above"] == sum(vmpte.values())
        by_user = mshare("ptes", "--by", "user", "--pid", postgres.pid).stdout
        assert f"{len(vmpte)}  {'postgres' if os.geteuid() == 0 else ''}" in by_user


@pytest.mark.parametrize(
    ("label", "kind", "make"),
    [
        ("anonymous of {comm}", Kind.ANONYMOUS, "at = shared(32 * MiB)"),
        (
            "anonymous of {comm}",
            Kind.ANONYMOUS,
            "at = shared(32 * MiB, fd=os.open('/dev/zero', os.O_RDWR))",
        ),
        (
            "memfd a\\012b",
            Kind.MEMFD,
            "fd = os.memfd_create('a\\nb')\nos.ftruncate(fd, size)\nat = shared(size, fd=fd)",
        ),
        (
            "shm mshare-test-{pid} (deleted)",
            Kind.SHM,
            "path = f'/dev/shm/mshare-test-{os.getpid()}'\nfd = os.open(path, 0o102)\n"  # noqa: ISC004
            "os.unlink(path)\nos.ftruncate(fd, size)\nat = shared(size, fd=fd)",
        ),
        (
            "SysV {sysv} (key 0x00000000)",
            Kind.SYSV,
            "number = libc.shmget(0, size, 0o1600)\nat = libc.shmat(number, place(size), 0)\n"  # noqa: ISC004
            "libc.shmctl(number, 0, None)",
        ),
    ],
)
def test_what_objects_are_called_and_what_they_cost(
    sharers: Sharers, label: str, kind: Kind, make: str
) -> None:
    code = f"size = 32 * MiB\n{make}\ntouch(at, 32 * MiB)\nchildren(2, lambda: read(at, 16 * MiB))"
    program = sharers(code)
    found = of(program.pid)
    exact(found)
    status = proc.status(program.pid)
    assert status is not None
    sysv = program.do("number") if kind is Kind.SYSV else ""
    # Anonymous memory lies beside what the interpreter itself shares: nothing of that size.
    memory = max(found.objects, key=lambda each: each.tables)
    assert memory.label == label.format(comm=status.name, pid=program.pid, sysv=sysv)
    assert memory.name.kind is kind
    assert memory.size == 32 * MiB
    # The first has touched all of it, two more half of it; a table is 2 MiB.
    assert memory.tables == (16 + 8 + 8) * TABLE
    assert memory.reclaimable == memory.tables
    assert memory.congruent == len(memory.sharers) == 3


def test_what_is_not_congruent_cannot_be_had_back(sharers: Sharers) -> None:
    program = sharers(
        "at = shared(16 * MiB, 4096)\n"
        "touch(at, 16 * MiB)\n"
        "fd = os.memfd_create('half')\n"
        "os.ftruncate(fd, 16 * MiB)\n"
        "at = shared(16 * MiB, fd=fd)\n"
        "touch(at, 16 * MiB)\n"
        "def other():\n"
        "    touch(shared(15 * MiB, MiB, fd=fd, offset=MiB), 15 * MiB)\n"
        "    touch(shared(8 * MiB, 8192, fd=fd), 8 * MiB)\n"
        "children(1, other)"
    )
    found = of(program.pid)
    exact(found)
    memory = next(each for each in found.objects if each.name.kind is Kind.ANONYMOUS)
    assert (memory.tables, memory.reclaimable, memory.congruent) == (9 * TABLE, 0, 0)
    half = named(found, "memfd half")
    assert half.congruent == 2
    # 8, then 8 at a congruent offset, of which the first is no whole chunk, then 5 that are not.
    assert (half.tables, half.reclaimable) == ((8 + 8 + 5) * TABLE, (8 + 7) * TABLE)
    text = mshare("ptes", "--pid", program.pid, "--sort", "name").stdout
    assert "0 of 2" in text or "0 of 1" in text
    assert "2 of 2  memfd half" in text


def test_huge_pages_of_private_memory_keep_their_tables(sharers: Sharers) -> None:
    program = sharers(
        "m = mmap.mmap(-1, 64 * MiB, flags=PRIVATE | ANONYMOUS)\n"
        "m.madvise(mmap.MADV_HUGEPAGE)\n"
        "for at in range(0, 64 * MiB, 4096): m[at] = 1"
    )
    exact(of(program.pid))


def test_holes_sparse_pages_and_protections_are_counted_as_the_kernel_does(
    sharers: Sharers,
) -> None:
    program = sharers(
        "at = shared(1 << 30)\n"
        "touch(at, 1 << 30, 6 * MiB)\n"
        "touch(at + 64 * MiB, 4 * MiB, 16384)\n"
        "libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(MiB), 1)\n"
        "far = libc.mmap(1 << 46, MiB, 3, PRIVATE | ANONYMOUS, -1, 0); touch(far, MiB)"
    )
    exact(of(program.pid))


@root_only
def test_page_tables_of_hugetlb_that_are_shared_count_once(sharers: Sharers) -> None:
    with huge_pages(1024):
        program = sharers(
            "MAP_HUGETLB = 0x40000\n"
            "at = libc.mmap(1 << 40, 1 << 30, 3, SHARED | ANONYMOUS | MAP_HUGETLB, -1, 0)\n"
            "assert at == 1 << 40\n"
            "touch(at, 1 << 30, HUGE)\n"
            "children(3, lambda: read(at, 1 << 30, HUGE))"
        )
        found = of(program.pid)
        exact(found)
        memory = next(each for each in found.objects if each.name.kind is Kind.HUGETLB)
        assert memory.label.startswith("huge pages of ")
        assert len(memory.sharers) == 4
        shared = memory.counted_twice
        assert memory.tables == (4 - shared) * TABLE
        assert shared in (0, 3)  # 0: a kernel that shares none


def test_the_machine_is_explained_as_far_as_it_can_be(sharers: Sharers) -> None:
    program = sharers("at = shared(64 * MiB); touch(at, 64 * MiB)")
    done = mshare("ptes", "--json", "--all")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert program.pid in [each["pid"] for each in found["processes"]]
    assert found["explained"] > 0
    text = mshare("ptes", "--top", "1", "--by", "process", "--sort", "size")
    assert text.returncode == 0, text.stderr
    assert "of the machine's PageTables" in text.stdout
    assert mshare("ptes", "--by", "unit").returncode == 0


def test_regions_are_called_by_their_names(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}", "--no-collapse").start()
    with clients(client_program, daemon) as spawn:
        for client in (spawn(), spawn()):
            client.ok("mshare", "r", BASE, 8 * ALIGNMENT, os.O_CREAT | os.O_RDWR, 0o600)
            client.ok("mmap", BASE, 8 * ALIGNMENT, 3, mmap.MAP_SHARED | 0x10)
            client.ok("fill", BASE, 8 * ALIGNMENT, 7)
        environment = os.environ | {"MSHARE_ROOT": str(daemon.mount)}
        done = mshare("ptes", "--json", "--pid", client.pid, env=environment)
        (region,) = [each for each in json.loads(done.stdout)["objects"] if each["tables"]][:1]
        assert region["name"] == "region r"
        assert region["tables"] == 8 * TABLE
        # A daemon that does not answer is not waited for.
        daemon.freeze()
        done = mshare("ptes", "--pid", client.pid, env=environment)
        daemon.thaw()
        assert done.returncode == 0, done.stderr
        assert "shm msharefs-" in done.stdout


@pytest.mark.parametrize(
    ("cgroup", "name"),
    [
        ("/system.slice/system-postgresql.slice/postgresql@15-main.service", "@15-main.service"),
        ("/system.slice/docker-" + "ab" * 32 + ".scope", "docker abababababab"),
        ("/docker/" + "cd" * 32, "container cdcdcdcdcdcd"),
        ("/kubepods.slice/x/cri-containerd-" + "ef" * 32 + ".scope/init", "cri-containerd efef"),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        ("/mine/own", "own"),
        ("", "-"),
    ],
)
def test_units_and_containers_are_called_as_people_do(cgroup: str, name: str) -> None:
    assert name in survey.unit(cgroup)


def test_wrong_usage_is_told_on_one_line() -> None:
    for words in (("--pid", "0"), ("--by", "planet"), ("r", "--all"), ("--all", "--pid", "1")):
        assert mshare("ptes", *words).returncode == 2, words
    done = mshare("ptes", "--pid", (1 << 22) + 1)
    assert done.returncode == 1
    assert done.stderr == "mshare: 4194305: no such process\n"


@root_only
def test_others_are_told_of_without_being_looked_at(sharers: Sharers) -> None:
    program = sharers("at = shared(8 * MiB); touch(at, 8 * MiB)")
    done = mshare("ptes", "--by", "process", "--top", "0", user=NOBODY)
    assert done.returncode == 0, done.stderr
    assert "other users' processes take root" in done.stdout
    (line,) = [row for row in done.stdout.splitlines() if row.split()[:1] == [str(program.pid)]]
    assert line.split()[3:7] == ["-"] * 4


# -- who makes it hard --


def test_names_cannot_change_the_output(sharers: Sharers) -> None:
    program = sharers(
        "name = b'a\\nb\\x1b[31m'\n"
        "libc.prctl(15, ctypes.c_char_p(name), 0, 0, 0)\n"
        "fd = os.memfd_create(b'x (deleted)\\n\\x1b[2J 0:0 7')\n"
        "os.ftruncate(fd, 8 * MiB)\n"
        "touch(shared(8 * MiB, fd=fd), 8 * MiB)"
    )
    for view in ("object", "process"):
        done = mshare("ptes", "--pid", program.pid, "--by", view)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
    assert "memfd x (deleted)" in mshare("ptes", "--pid", program.pid).stdout
    exact(of(program.pid))


def test_tens_of_thousands_of_mappings(sharers: Sharers) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    program = sharers(
        f"many = min({limit} - 1000, 64000)\n"
        "at = shared(many * 4096)\n"
        "for n in range(0, many, 2):\n"
        "    libc.mprotect(ctypes.c_void_p(at + n * 4096), ctypes.c_size_t(4096), 1)\n"
        "read(at, many * 4096)"
    )
    kernel = Kernel.learn()
    before = time.process_time()
    tables = count(program.pid, kernel)
    used = time.process_time() - before
    status = proc.status(program.pid)
    assert status is not None and tables.bytes == status.tables
    assert used < 20  # a second or so; no load explains more


def test_processes_that_come_go_and_become_others_meanwhile(sharers: Sharers) -> None:
    program = sharers(
        "at = shared(4 * MiB)\n"
        "def storm():\n"
        "    while True:\n"
        "        pid = os.fork()\n"
        "        if pid == 0:\n"
        "            read(at, 4 * MiB)\n"
        "            os.execv('/bin/true', ['/bin/true'])\n"
        "        os.waitpid(pid, 0)\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0: storm()"
    )
    until = time.monotonic() + 2
    while time.monotonic() < until:
        assert program.pid in [each.pid for each in of(program.pid).processes]


@pytest.fixture
def hung(directory: Path) -> Iterator[Path]:
    """A file whose pages never come."""
    mount = directory / "hung"
    mount.mkdir()
    server = subprocess.Popen(
        [sys.executable, TESTS / "support/hung.py", mount], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    with server.stdout as said:
        assert said.readline() == "ready\n"
    yield mount / "hangs"
    server.kill()
    server.wait()
    mounting.unmount(str(mount))


@root_only
def test_who_holds_its_address_space_holds_up_nobody(sharers: Sharers, hung: Path) -> None:
    # A thread reads its own memory where a file is mapped that never comes: in the middle of
    # that it has mmap_lock, and a writer that waits for it keeps all further readers out.
    program = sharers(
        f"import threading\n"
        f"fd = os.open({str(hung)!r}, os.O_RDONLY)\n"
        "at = libc.mmap(None, 4096, 1, PRIVATE, fd, 0)\n"
        "mem = os.open('/proc/self/mem', os.O_RDONLY)\n"
        "def later(seconds, function):\n"
        "    both = lambda: (time.sleep(seconds), function())\n"
        "    threading.Thread(target=both, daemon=True).start()\n"
        "later(0.5, lambda: os.pread(mem, 1, at))\n"
        "later(1, lambda: libc.mmap(None, 4096, 1, PRIVATE | ANONYMOUS, -1, 0))\n"
    )
    other = sharers("at = shared(8 * MiB); touch(at, 8 * MiB)")
    patience = Patience(0.5)
    eventually(lambda: _locked(program.pid), "its lock")
    found = survey.take([program.pid, other.pid], patience)
    assert [each.lacking for each in found.processes] == ["no answer within 0.5 s", ""]
    assert found.unseen > 0
    text = mshare("ptes", "--pid", program.pid)
    assert (text.returncode, text.stderr) == (0, "")
    assert "1 process could not be looked at" in text.stdout
    program.process.kill()


def _locked(pid: int) -> bool:
    patience = Patience(0.2)
    try:
        patience.call(count, pid, Kernel.learn())
    except NoAnswerError:
        return True
    finally:
        patience.close()
    return False


def test_who_does_not_answer_keeps_nobody_else_from_being_looked_at() -> None:
    patience = Patience(0.01)
    release = threading.Event()
    for _ in range(MOST_OF_ONE):
        with pytest.raises(NoAnswerError, match="within"):
            patience.call(release.wait, whose=1000)
    for _ in range(2 * MOST_LEFT):
        with pytest.raises(NotAskedError, match="user 1000"):
            patience.call(int, "7", whose=1000)
    assert patience.call(int, "7", whose=1001) == 7
    release.set()
    patience.close()


def test_only_so_many_threads_are_left_behind() -> None:
    before = set(threading.enumerate())
    patience = Patience(0.01)
    release = threading.Event()
    for _ in range(MOST_LEFT):
        with pytest.raises(NoAnswerError, match="within"):
            patience.call(release.wait)
    with pytest.raises(NoAnswerError, match="already"):
        patience.call(release.wait)
    release.set()
    eventually(lambda: set(threading.enumerate()) <= before, "their end")
    assert patience.call(int, "7") == 7
    # Who works is waited for.
    assert patience.call(sum, range(3_000_000)) == 4_499_998_500_000
    with pytest.raises(ValueError, match="invalid literal"):
        patience.call(int, "seven")
    patience.close()
