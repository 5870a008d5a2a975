"""The units under a real systemd, in a machine of the tests' own (machine.py)."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import (
    ALIGNMENT,
    BASE,
    BIN,
    SUSPICIOUS,
    WATCHDOG_SECONDS,
    Client,
    eventually,
    huge_pages,
)
from machine import PROGRAMS, LackingError, Machine, Service, running
from test_document import commands

from libmshare import core
from msharefsd.mount import graft
from msharefsd.security import privileges

SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
NOBODY = 65534
READ, WRITE, FIXED, MS_SYNC = mmap.PROT_READ, mmap.PROT_WRITE, 0x10, 4
MOUNT = "/sys/fs/mshare"
RUN = "/run/msharefs/sys-fs-mshare"
SETTINGS = """
alignment = "2M"
userfaultfd = "all"
collapse_seconds = 0.2
"""


pytestmark = pytest.mark.shm_only


@pytest.fixture(scope="module")
def machine(client_program: Path) -> Iterator[Machine]:
    directory = Path(tempfile.mkdtemp(prefix="mshare-test-"))
    try:
        with running(directory, client_program) as made:
            made.write("/etc/msharefs.toml", SETTINGS)
            made.write("/etc/default/msharefsd", "MSHAREFSD_OPTIONS=--config=/etc/msharefs.toml\n")
            yield made
    except LackingError as lacking:
        pytest.skip(f"no systemd as PID 1 can be had here, for want of {lacking}")
    finally:
        shutil.rmtree(directory)


class Watched(Service):
    """The service, and what its journal may say."""

    expected: tuple[str, ...] = ()

    def is_serving(self) -> bool:
        """Whether it is ready."""
        return self.show("ActiveState") == "active"

    def restarts(self) -> int:
        """How often systemd started it by itself."""
        return int(self.show("NRestarts"))

    def processes(self) -> set[str]:
        """The pids of all that is in its cgroup, or below."""
        files = f"find /sys/fs/cgroup -path '*/{self.unit}/*procs'"
        return set(self.machine.run("sh", "-c", f"cat /dev/null $({files})").stdout.split())

    def came_back(self, number: int) -> None:
        """Wait until it serves, started by itself for the `number`th time."""
        eventually(lambda: self.restarts() == number and self.is_serving(), f"restart {number}", 50)


@pytest.fixture
def service(machine: Machine) -> Iterator[Watched]:
    """msharefsd.service, started; stopped after the test, and then nothing is left."""

    def bark() -> None:
        machine.abort()
        machine.kill()

    watchdog = threading.Timer(WATCHDOG_SECONDS, bark)
    watchdog.start()
    before = machine.mounts()
    made = Watched(machine)
    start = machine.run("date", "+%s.%N").stdout.strip()
    try:
        made.systemctl("start")
        yield made
        made.systemctl("stop")
        # Regions stay; whoever had one has ended.
        machine.run(str(BIN / "msharefsd"), "--purge", "--force", f"--run-directory={RUN}")
        check_journal(made, start)
        eventually(lambda: not made.processes(), "the end of all that the service started")
        assert machine.mounts() == before
        assert machine.run("find", "/dev/shm", "-name", "msharefs-*").stdout == ""
        assert machine.run("ls", RUN, check=False).returncode != 0
    finally:
        watchdog.cancel()
        made.systemctl("stop", check=False)
        made.systemctl("reset-failed", check=False)
        shutil.rmtree(machine.root / f"etc/systemd/system/{made.unit}.d", ignore_errors=True)
        machine.run("systemctl", "daemon-reload")


def field(machine: Machine, key: str) -> int:
    """A number of region r's info."""
    text = machine.run("cat", f"{MOUNT}/.regions/r/info").stdout
    return int(dict(line.split(":", 1) for line in text.splitlines())[key])


def metric(machine: Machine, name: str) -> float:
    text = machine.run("cat", f"{MOUNT}/.metrics").stdout
    found = re.search(rf"^msharefs_{name} (.*)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def process_status(machine: Machine, pid: int) -> dict[str, str]:
    text = machine.run("cat", f"/proc/{pid}/status").stdout
    return dict(line.split(":\t", 1) for line in text.splitlines())


def sharers(machine: Machine) -> list[str]:
    """The pids of region r's sharers, as the machine numbers them."""
    lines = machine.run("cat", f"{MOUNT}/.regions/r/sharers").stdout.splitlines()
    return [line.split()[0] for line in lines[1:]]


def share(donor: Client, consumer: Client) -> None:
    """Use a region."""
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    donor.ok("mmap", BASE, SIZE, READ | WRITE, mmap.MAP_SHARED | FIXED)
    consumer.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    donor.ok("store", BASE + 4096, 7)
    assert consumer.do("load", BASE + 4096) == "7"


def check_journal(service: Watched, since: str) -> None:
    text = service.journal(since)
    assert "ready: " in text
    for line in text.splitlines():
        if SUSPICIOUS.search(line) and not any(re.search(p, line) for p in service.expected):
            pytest.fail(f"suspicious line in the journal: {line}\n\n{text}")


def test_it_is_ready_and_everybody_sees_the_mount(machine: Machine, service: Watched) -> None:
    assert service.is_serving()
    assert service.show("StatusText") == f"serving {MOUNT}: regions 0, sharers 0"
    words = ("cat", f"{MOUNT}/mshare_info")
    assert machine.run(*words).stdout == f"{ALIGNMENT}\n"
    assert machine.run(*words, user=NOBODY).stdout == f"{ALIGNMENT}\n"
    # Another service, with a view of its own.
    own = ("--property=ProtectSystem=strict", "--property=PrivateTmp=yes")
    for sandbox in ((), own):
        done = machine.run("systemd-run", "--quiet", "--wait", "--pipe", *sandbox, *words)
        assert done.stdout == f"{ALIGNMENT}\n"
    # What was there shows through the graft.
    assert "cgroup" in machine.run("ls", "/sys/fs").stdout.split()


def test_a_service_that_was_there_before_sees_it_come_and_go(
    machine: Machine, service: Watched
) -> None:
    service.systemctl("stop")
    other = Service(machine, "earlier.service")
    words = ("--quiet", "--unit=earlier", "--property=ProtectSystem=strict", "sleep", "1000")
    machine.run("systemd-run", *words)
    try:
        inside = ("nsenter", f"--target={other.pid}", "--mount")
        assert machine.run(*inside, "ls", MOUNT, check=False).returncode != 0
        service.systemctl("start")
        assert machine.run(*inside, "cat", f"{MOUNT}/mshare_info").stdout == f"{ALIGNMENT}\n"
        service.systemctl("stop")
        table = machine.run(*inside, "cat", "/proc/self/mountinfo").stdout
        assert MOUNT not in table
        assert graft.SOURCE not in table
        service.systemctl("start")
    finally:
        other.systemctl("stop")


def test_it_has_the_rights_that_it_names_and_no_mount_namespace(
    machine: Machine, service: Watched
) -> None:
    status, first = process_status(machine, service.pid), process_status(machine, 1)
    for key in ("CapPrm", "CapEff"):
        assert int(status[key], 16) == privileges.mask(privileges.FRONT)
    # What pagers are started with; without CAP_SETPCAP nobody can take more out of it.
    assert int(status["CapBnd"], 16) == privileges.mask({**privileges.FRONT, **privileges.PAGER})
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    for kind, own in (("mnt", 1), ("net", 2), ("uts", 2)):
        links = ("readlink", f"/proc/{service.pid}/ns/{kind}", f"/proc/1/ns/{kind}")
        assert len(set(machine.run(*links).stdout.split())) == own
    assert status["Umask"] == "0077"
    found = machine.run("find", RUN, "-mindepth", "1", "-perm", "/077").stdout
    assert found == ""
    if int(first["CapEff"], 16) & 1 << 24:  # CAP_SYS_RESOURCE: PID 1 may raise what it has
        limits = machine.run("cat", f"/proc/{service.pid}/limits").stdout
        assert re.search(r"^Max open files +1048576 +1048576 ", limits, re.MULTILINE)
        assert machine.run("cat", f"/proc/{service.pid}/oom_score_adj").stdout == "-900\n"


@pytest.mark.parametrize("user", [None, NOBODY])
def test_the_hardening_takes_nothing_away(
    machine: Machine, service: Watched, user: int | None
) -> None:
    """Donors, files, faults in system calls, violations, collapse, sharers' deaths."""
    before = metric(machine, "collapsed_chunks_total")
    donor, consumer = machine.client(user), machine.client(user)
    donor.ok("map", BASE, SIZE, mmap.MAP_SHARED)
    donor.ok("store", BASE + 4096, 7)
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    consumer.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
    assert consumer.do("load", BASE + 4096) == "7"
    # A donor's shared memory is found by map_files, not searched page by page.
    assert field(machine, "memory") == 4096
    # Page tables are taken back.
    for client in (donor, consumer):
        client.ok("fill", BASE, ALIGNMENT, 1)
    try:
        eventually(lambda: metric(machine, "collapsed_chunks_total") > before, "collapse")
    except AssertionError:  # which it did on one machine's first run, and nobody knew why
        text = machine.run("cat", f"{MOUNT}/.metrics", "/proc/buddyinfo").stdout
        why = [line for line in text.splitlines() if "collapsed" in line or "Node" in line]
        pytest.fail("\n".join(["no chunk was collapsed:", *why]))
    # Faults in system calls, for an ordinary user as well.
    assert consumer.do("from_memory", BASE + ALIGNMENT, 1) == "1"
    # A file that is read and written back by the daemon, with its sharer's rights.
    path = PROGRAMS / f"data-{user}"
    machine.write(str(path), "x" * 4096)
    machine.run("chown", f"{user or 0}:{user or 0}", path)
    flags = mmap.MAP_SHARED | FIXED
    donor.ok("munmap", BASE + ALIGNMENT, 4096)
    donor.ok("mmap", BASE + ALIGNMENT, 4096, READ | WRITE, flags, path, os.O_RDWR, 0)
    assert consumer.do("load", BASE + ALIGNMENT) == str(ord("x"))
    consumer.ok("store", BASE + ALIGNMENT, ord("y"))
    donor.ok("msync", BASE + ALIGNMENT, 4096, MS_SYNC)
    assert machine.run("head", "-c", "2", path).stdout == "yx"
    # Violations: SIGSEGV with its address, and EFAULT.
    donor.ok("mprotect", BASE, 4096, READ)
    assert consumer.do("guilty", BASE + 9) == str(BASE + 9)
    assert consumer.do("to_memory", BASE, 1) == "-14"
    donor.ok("mprotect", BASE, 4096, READ | WRITE)
    # Who is killed is gone.
    machine.run("kill", "-KILL", sharers(machine)[0])
    eventually(lambda: len(sharers(machine)) == 1, "the death of a sharer")


def test_huge_pages_are_had_under_the_hardening(machine: Machine, service: Watched) -> None:
    huge = 2 << 20
    service.systemctl("stop")
    machine.write("/etc/huge.toml", 'alignment = "4M"\nbacking = "hugetlb"\n')
    service.drop_in(EnvironmentFile="", Environment="MSHAREFSD_OPTIONS=--config=/etc/huge.toml")
    with huge_pages(8):
        service.systemctl("start")
        # Where everybody sees it, and the next daemon will find it.
        assert (f"{RUN}/huge", "hugetlbfs") in {(m.target, m.fstype) for m in machine.mounts()}
        donor, consumer = machine.client(), machine.client()
        donor.ok("mshare", "r", BASE, 2 * huge, CREATE, 0o600)
        donor.ok("mmap", BASE, 2 * huge, READ | WRITE, mmap.MAP_SHARED | FIXED)
        consumer.ok("mshare", "r", BASE, 2 * huge, os.O_RDWR, 0)
        donor.ok("store", BASE + huge, 7)
        assert consumer.do("load", BASE + huge) == "7"
        assert consumer.do("from_memory", BASE, 1) == "1"
        donor.ok("munmap", BASE, huge)
        assert consumer.do("load", BASE) == "SIGBUS"
        donor.ok("unlink", "r")
        consumer.ok("unlink", "r")
        service.systemctl("stop")


# What a killed daemon leaves, the next one clears away, and says so.
LEFT_BEHIND = ("the mount that a dead daemon left",)


def test_a_killed_daemon_comes_back(machine: Machine, service: Watched) -> None:
    service.expected = (*LEFT_BEHIND, r"status=9/KILL", "Failed with result 'signal'")
    holder = machine.client()
    share(holder, machine.client())
    for number in (1, 2, 3):
        machine.run("kill", "-KILL", service.pid)
        service.came_back(number)
        # Who has memory keeps it, whatever becomes of the daemon.
        assert holder.do("load", BASE + 4096) == "7"
        assert machine.run("cat", f"{MOUNT}/mshare_info").stdout == f"{ALIGNMENT}\n"
    holder.kill()


def test_a_daemon_that_hangs_is_killed_by_the_watchdog(machine: Machine, service: Watched) -> None:
    service.expected = (
        *LEFT_BEHIND,
        "Watchdog timeout",
        r"code=(dumped|killed), status=(6/ABRT|11/SEGV)",
        "Failed with result 'watchdog'",
        # Where it hung: Python's faulthandler(3).
        # (Other threads go on meanwhile, and it may stumble over what they do.)
        "Fatal Python error: (Aborted|Segmentation fault)",
        "thread 0x[0-9a-f]+",
    )
    service.systemctl("stop")
    service.drop_in(WatchdogSec="4s")
    service.systemctl("start")
    first = service.pid
    # It lives on for longer than that as long as it serves.
    machine.run("sleep", "6")
    assert (service.pid, service.restarts()) == (first, 0)
    machine.run("kill", "-STOP", first)
    service.came_back(1)
    assert service.pid != first
    share(machine.client(), machine.client())


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_restart(machine: Machine, service: Watched, how: str) -> None:
    """Regions and sharers outlive it, and the files that are mapped."""
    first = service.pid
    donor, consumer = machine.client(), machine.client()
    share(donor, consumer)
    machine.run("sh", "-c", "printf %8192s > /tmp/mapped")
    donor.ok("mmap", BASE, 8192, READ | WRITE, mmap.MAP_SHARED | FIXED, "/tmp/mapped", os.O_RDWR, 0)
    donor.ok("store", BASE, 7)
    service.expected = ("taking down the mount", "status=9/KILL", "Failed with result 'signal'")
    if how == "restart":
        service.systemctl("restart")
        assert service.is_serving()
    else:
        machine.run("kill", "-KILL", service.pid)
        service.came_back(1)
    assert service.pid != first
    assert consumer.do("load", BASE) == "7"
    assert consumer.do("load", BASE + 4096) == "32"
    assert consumer.do("load", BASE + SIZE - 4096) == "0"
    donor.ok("msync", BASE, 4096, 4)
    assert machine.run("head", "-c", "2", "/tmp/mapped").stdout == "\7 "
    donor.ok("unlink", "r")
    consumer.ok("unlink", "r")


HANGING = """
for procs in $(find /sys/fs/cgroup -path '*/msharefsd.service/*procs'); do
    echo $$ >"$procs" || exit
done
trap "" TERM HUP
sleep 1000 >/dev/null 2>&1 &
echo $!
"""
"""A process that no signal but SIGKILL ends, in the service's cgroup."""


def test_nothing_waits_for_what_hangs(machine: Machine, service: Watched) -> None:
    service.expected = ("taking down the mount", "status=9/KILL", "Failed with result 'signal'")
    hanging = int(machine.run("sh", "-c", HANGING).stdout)
    try:
        assert "/msharefsd.service" in machine.run("cat", f"/proc/{hanging}/cgroup").stdout
        donor, consumer = machine.client(), machine.client()
        share(donor, consumer)
        begin = time.monotonic()
        first = service.pid
        service.systemctl("restart")
        machine.run("kill", "-KILL", service.pid)
        service.came_back(1)
        assert service.pid != first
        assert {str(service.pid), str(hanging)} <= service.processes()
        assert donor.do("load", BASE + 4096) == "7"
        # The next daemon serves both.
        donor.ok("store", BASE, 9)
        assert consumer.do("load", BASE) == "9"
        for client in (donor, consumer):
            client.ok("unlink", "r")
        service.systemctl("stop")
        # TimeoutStopSec= is a minute.
        assert time.monotonic() - begin < 30
        assert process_status(machine, hanging)["State"].startswith("S")
        service.systemctl("start")
        assert process_status(machine, hanging)["State"].startswith("S")
    finally:
        machine.run("kill", "-KILL", hanging)


def test_each_pager_has_a_control_group_of_its_own(machine: Machine, service: Watched) -> None:
    listed = machine.run("grep", "cgroup2", "/proc/self/mountinfo", check=False).stdout
    group = machine.run("cat", f"/proc/{service.pid}/cgroup").stdout
    if not listed or not re.search(r"^0::.*/msharefsd\.service", group, re.MULTILINE):
        pytest.skip("systemd has no cgroup2 hierarchy on this machine")
    clients = machine.client(), machine.client()
    share(*clients)
    words = (f"cat /proc/{pid}/cgroup" for pid in service.processes())
    groups = machine.run("sh", "-c", "; ".join(words)).stdout
    assert re.search(r"^0::.*/msharefsd\.service/pager-0$", groups, re.MULTILINE), groups
    for client in clients:  # a keeper of what is kept stays in the group of its pager
        client.ok("unlink", "r")
    service.systemctl("stop")
    assert machine.run("find", "/sys/fs/cgroup", "-path", "*msharefsd.service/pager-0").stdout == ""


def test_what_restarts_by_itself(machine: Machine, service: Watched) -> None:
    """Any end but that of a stop; an umount by somebody else too."""
    machine.run("kill", "-TERM", service.pid)
    service.came_back(1)
    machine.run("umount", "--lazy", MOUNT)
    service.came_back(2)
    assert machine.run("cat", f"{MOUNT}/mshare_info").stdout == f"{ALIGNMENT}\n"


def test_wrong_settings_are_not_tried_again(machine: Machine, service: Watched) -> None:
    service.expected = ("status=2/INVALIDARGUMENT", "Failed with result 'exit-code'")
    service.systemctl("stop")
    service.drop_in(Environment="MSHAREFSD_OPTIONS=--alignment=3", EnvironmentFile="")
    service.systemctl("start", check=False)
    assert service.show("ActiveState") == "failed"
    assert service.restarts() == 0


def test_the_units_are_well_formed(machine: Machine) -> None:
    """systemd-analyze verify; by itself it says nothing of a unit that is right."""
    runtime = {"XDG_RUNTIME_DIR": "/run"}
    for scope in ("--system", "--user"):
        unit = f"/usr/lib/systemd/{scope.strip('-')}/msharefsd.service"
        done = machine.run("systemd-analyze", "verify", scope, "--man=no", unit, env=runtime)
        assert done.stdout + done.stderr == ""


def test_an_ordinary_users_own_service(machine: Machine, service: Watched) -> None:
    """Beside the system's; fusermount3 mounts for it."""
    runtime = f"/run/user/{NOBODY}"
    environment = {"XDG_RUNTIME_DIR": runtime, "HOME": runtime}
    machine.run("install", "--directory", f"--owner={NOBODY}", "--mode=700", runtime)
    words = ("--quiet", "--unit=manager", f"--uid={NOBODY}", "--property=Delegate=yes")
    variables = [f"--setenv={key}={value}" for key, value in environment.items()]
    manager = ("/usr/lib/systemd/systemd", "--user", "--unit=basic.target")
    machine.run("systemd-run", *words, *variables, *manager)
    try:

        def systemctl(*words: str, check: bool = True) -> str:
            command = ("systemctl", "--user", *words)
            return machine.run(*command, user=NOBODY, check=check, env=environment).stdout

        eventually(
            lambda: systemctl("is-active", "basic.target", check=False) == "active\n",
            "the user's systemd",
        )
        file = f"{runtime}/.config/msharefsd.env"
        machine.run("mkdir", f"{runtime}/.config", user=NOBODY)
        machine.run("sh", "-c", f"echo MSHAREFSD_OPTIONS=--alignment=2M >{file}", user=NOBODY)
        systemctl("start", "msharefsd")
        info = f"{runtime}/mshare/mshare_info"
        assert machine.run("cat", info, user=NOBODY).stdout == f"{ALIGNMENT}\n"
        # The mount is that user's alone.
        assert machine.run("cat", info, check=False).returncode != 0
        donor, consumer = (
            machine.client(NOBODY, MSHARE_ROOT=f"{runtime}/mshare") for _ in range(2)
        )
        share(donor, consumer)
        pid = systemctl("show", "--property=MainPID", "--value", "msharefsd").strip()
        machine.run("kill", "-KILL", pid)
        eventually(
            lambda: (
                systemctl("show", "--property=NRestarts,ActiveState", "msharefsd")
                == "NRestarts=1\nActiveState=active\n"
            ),
            "a restart",
        )
        assert machine.run("cat", info, user=NOBODY).stdout == f"{ALIGNMENT}\n"
        systemctl("stop", "msharefsd")
        assert f"{runtime}/mshare" not in {mount.target for mount in machine.mounts()}
        run = f"{runtime}/msharefs/mshare"
        purge = [str(BIN / "msharefsd"), "--purge", f"--run-directory={run}"]
        refused = machine.run(*purge, user=NOBODY, env=environment, check=False)
        assert (refused.returncode, "in use: 1 region" in refused.stderr) == (1, True), refused
        machine.run(*purge, "--force", user=NOBODY, env=environment)
        assert machine.run("ls", run, check=False).returncode != 0
    finally:
        machine.run("systemctl", "stop", "manager.service", check=False)
        machine.run("rm", "--recursive", "--force", runtime)


PROGRAM = """
import mmap, os, signal, time
size = 64 << 20
m = mmap.mmap(-1, size)
for at in range(0, len(m), 4096): m[at] = 1
if os.fork() == 0:
    for at in range(0, len(m), 4096): m[at]
signal.pause()
"""


def test_the_collapse_service_has_page_tables_back_with_two_capabilities(
    machine: Machine,
) -> None:
    """Of a program that knows nothing of it, started with the library that aligns."""
    library = core.library_directory()
    assert library is not None
    metrics = "/run/mshare-collapse/metrics.prom"
    machine.write("/etc/mshare-collapse.toml", f'interval = 0.2\nmetrics = "{metrics}"\n')
    machine.write(
        "/etc/default/mshare-collapse",
        "MSHARE_COLLAPSE_OPTIONS=--config=/etc/mshare-collapse.toml\n",
    )
    service = Service(machine, "mshare-collapse.service")
    service.drop_in(PrivateTmp="no")  # the project itself may lie there
    began = f"{time.time():.0f}"
    service.systemctl("start", check=False)
    try:
        assert service.show("ActiveState") == "active", service.journal(began)
        machine.run(
            *("systemd-run", "--unit=program", f"--setenv=LD_PRELOAD={library}/libmshare-align.so"),
            *(sys.executable, "-c", PROGRAM),
        )
        eventually(lambda: " chunks in " in service.journal(began), "its chunks", 40)
        eventually(lambda: _has(machine, metrics, 'outcome="done"'), "its metrics", 20)
        assert "page tables back" in service.show("StatusText")
        capabilities = machine.run("grep", "CapEff", f"/proc/{service.pid}/status").stdout.split()
        nice, ptrace = 23, 19
        assert int(capabilities[1], 16) == 1 << nice | 1 << ptrace
    finally:
        machine.run("systemctl", "stop", "program.service", check=False)
        service.systemctl("stop")
    assert service.show("Result") == "success"
    # What the document tells of the service, as it stands there.
    for command in commands("sh service"):
        machine.run("sh", "-c", command)
    machine.write("/etc/mshare-collapse.toml", 'budget = "none"\n')
    service.systemctl("start", check=False)
    assert service.show("NRestarts") == "0"
    assert "write 0% to 100%" in service.journal(began)
    machine.run("systemctl", "reset-failed", check=False)


def _has(machine: Machine, path: str, text: str) -> bool:
    return text in machine.run("cat", path, check=False).stdout
