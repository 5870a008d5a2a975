"""What the tests share: daemons that are taken down whatever happens, and clients.

Everything runs in a mount namespace of its own, so a mount that a test leaves behind
cannot outlive the test run.  A watchdog aborts the FUSE connections of a test that
hangs: a process in an unanswered FUSE request ignores SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from libmshare import core
from msharefsd.linux import mounts, processes, syscalls
from msharefsd.memory import hugetlb, names
from msharefsd.mount import graft, mounting

# Behind what is installed: libmshare and msharefsd are the wheel's, not the source's.
sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import huge_pages as reserved

# Whoever runs the tests with nohup(1) does not mean the daemons, which would ignore it, too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
BIN = Path(sys.executable).parent
TESTS = Path(__file__).parent
SUPPORT = TESTS / "support"
CLIENT_SOURCE = SUPPORT / "client.c"
WATCHDOG_SECONDS = 60.0
CONNECTIONS = Path("/sys/fs/fuse/connections")
SUSPICIOUS = re.compile(r"WARNING|ERROR|CRITICAL|Traceback|exception|never awaited", re.IGNORECASE)
MiB = 1 << 20
BACKING = os.environ.get("MSHARE_TEST_BACKING", "shm")
"""What holds the pages: the tests of regions and objects are one corpus for all."""
PAGE = {"shm": 4096, "hugetlb": 2 * MiB}[BACKING]
LARGEST_CHUNK = {"shm": 2 * MiB, "hugetlb": 4 * MiB}[BACKING]
"""The most that is populated for one fault."""
ALIGNMENT = 512 * PAGE
CORPUS_HUGE_PAGES = 1600
"""What the corpus needs of them, if that is the backing."""
BASE = 0x2000_0000_0000
"""Where the tests put their regions."""


def pytest_configure() -> None:
    """Enter a mount namespace of our own, for us and every process we start."""
    # The source directories have the packages' names: what is installed is what counts.
    os.environ["PYTHONSAFEPATH"] = "1"
    if os.geteuid() != 0:
        return
    clone_newns = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(clone_newns) != 0:
        raise pytest.UsageError("cannot unshare the mount namespace: CAP_SYS_ADMIN is needed")
    syscalls.mount("", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    for mount in list(mounts.mounts()):  # of the machine's own daemons
        if mount.fstype == mounting.FSTYPE:
            syscalls.umount(mount.target, syscalls.MNT_DETACH)
    graft.take_away()
    if mounts.top_mount(str(CONNECTIONS)) is None:
        syscalls.mount("none", str(CONNECTIONS), "fusectl", 0)


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many free huge pages of 2 MiB more than there were, given back whatever happens."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(reserved.huge_pages(count))
        except reserved.NoHugePagesError as error:
            pytest.skip(f"this machine cannot reserve {count} huge pages: {error}")
        yield


@contextlib.contextmanager
def no_free_huge_pages() -> Iterator[None]:
    """Hold what is free of the huge pages of 2 MiB: the machine may have some of its own.

    A mapping reserves its pages without taking them: mmap(2), MAP_NORESERVE.
    """
    map_hugetlb, page = 0x40000, 2 * MiB
    with contextlib.ExitStack() as held:
        if (free := hugetlb.Pool(Path("/nowhere"), page).free()) > 0:
            flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | map_hugetlb
            held.enter_context(contextlib.closing(mmap.mmap(-1, free * page, flags)))
        yield


@contextlib.contextmanager
def huge_pages_for_group(group: int) -> Iterator[None]:
    """Let a group have huge pages: vm.hugetlb_shm_group."""
    setting = Path("/proc/sys/vm/hugetlb_shm_group")
    before = setting.read_text()
    setting.write_text(str(group))
    try:
        yield
    finally:
        setting.write_text(before)


@pytest.fixture(scope="session", autouse=True)
def _huge_pages_of_the_corpus() -> Iterator[None]:
    if BACKING == "shm":
        yield
        return
    nogroup = 65534  # the ordinary user of the tests
    with huge_pages(CORPUS_HUGE_PAGES), huge_pages_for_group(nogroup):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is about one backing alone does not run with another one."""
    other = [item for item in items if BACKING != "shm" and item.get_closest_marker("shm_only")]
    items[:] = [item for item in items if item not in other]
    if other:
        config.hook.pytest_deselected(items=other)


def pytest_collection_finish() -> None:
    """What is there before the first test is none's garbage: _collect() need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _collect() -> Iterator[None]:
    """Have a resource that is not closed complain in the test that forgot it."""
    yield
    gc.collect()


def eventually(condition: Callable[[], bool], what: str, seconds: float = 45.0) -> None:
    """Wait until something holds; the time limit is for defects only."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not come: {what}"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process can still do anything."""
    return processes.state(pid) not in ("", "Z", "X")


def command_line(pid: int) -> bytes:
    """What it was started with; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


class Daemon:
    """A msharefsd of a test's own."""

    def __init__(self, directory: Path, *arguments: str, mountpoint: Path | None = None) -> None:
        self.directory = directory
        self.mount = mountpoint or directory / "mshare"
        self.run = directory / "run"
        self.log_file = directory / "log"
        self.arguments = arguments
        self.expected: list[str] = []
        """Patterns of warnings that the test provokes."""
        self.variables: dict[str, str] = {}
        """More of its environment."""
        self.process: subprocess.Popen[bytes] | None = None
        self._launched: tuple[Sequence[str], dict[str, object]] = (), {}

    def command(self, program: Sequence[str] = ()) -> list[str]:
        """How it is started; `program` stands in for msharefsd."""
        return [
            *(program or [str(BIN / "msharefsd")]),
            f"--mountpoint={self.mount}",
            f"--run-directory={self.run}",
            "--log-level=info",
            f"--backing={BACKING}",
            "--userfaultfd=all",
            *self.arguments,
        ]

    def launch(self, command: Sequence[str] = (), **popen: object) -> None:
        """Start and do not wait.  `command` stands in for msharefsd."""
        # Too long a run between two checkpoints is an ERROR in its log then.
        environment = dict(popen.pop("env", os.environ))  # type: ignore[call-overload] # the test's
        environment |= {"MSHAREFSD_MEASURE_RUNS": "1"} | self.variables
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(  # type: ignore[call-overload] # popen is the test's
                self.command(command),
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,  # no terminal of ours is the daemon's
                **popen,
            )
        self._launched = command, {"env": environment, **popen}

    def purge(self, *options: str) -> subprocess.CompletedProcess[str]:
        """`msharefsd --purge`, as the daemon was started."""
        command, popen = self._launched
        return subprocess.run(  # type: ignore[call-overload,no-any-return] # popen is the test's
            [*self.command(command), "--purge", *options],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **popen,
        )

    def start(self, command: Sequence[str] = (), **popen: object) -> Daemon:
        """Start and wait until it is ready."""
        offset = self.log().count("ready:")
        self.launch(command, **popen)
        eventually(
            lambda: (
                self.process.poll() is not None or self.log().count("ready:") > offset
                if self.process
                else False
            ),
            "ready",
            60,  # beside other tests' processes, thousands of them, everything takes its time
        )
        assert self.process is not None and self.process.poll() is None, self.log()
        return self

    def begins(self) -> bool:
        """Start, and say whether it serves then, or has ended because it cannot."""
        offset = self.log().count("ready:")
        self.launch()
        process = self.process
        assert process is not None
        eventually(
            lambda: process.poll() is not None or self.log().count("ready:") > offset,
            "that it starts or says why not",
            60,
        )
        if process.poll() is None:
            return True
        assert process.returncode in (1, 3), self.log()
        self.process = None
        return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def connection(self) -> Path | None:
        mount = mounts.top_mount(str(self.mount))
        return None if mount is None else CONNECTIONS / str(mount.device[1])

    def abort(self) -> None:
        """Fail every request that is under way: frees processes stuck in them."""
        connection = self.connection()
        if connection is not None and connection.exists():
            (connection / "abort").write_text("1")

    def halt(self, number: int = signal.SIGTERM) -> None:
        """End it by a signal: regions stay, and nothing else does."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            assert self.process.wait(20) == 0, self.log()
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end: {self.whereabouts()}\n{self.log()}")
        self.process = None
        assert mounts.top_mount(str(self.mount)) is None
        assert not any(map(alive, self.pagers().values()))

    def stop(self) -> None:
        """Remove every region, end it, and see that nothing stays behind."""
        assert self.process is not None
        if self.process.poll() is None:
            self._remove_names()
        self.halt()
        # There is nothing then, but what sharers have still.
        if self.run.exists():
            done = self.purge("--force")
            assert done.returncode == 0, done.stderr
            for line in done.stderr.splitlines():
                assert not SUSPICIOUS.search(line) or any(
                    re.search(p, line) for p in self.expected
                ), done.stderr
        assert not self.run.exists()
        assert self.shm_objects() == []

    def _remove_names(self) -> None:
        """As `rm` does, if we may and it answers; their memory goes soon."""
        remove = 'cd -- "$1" && for each in *; do unlink -- "$each"; done'
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                ["sh", "-c", remove, "sh", str(self.mount)],
                check=False,
                capture_output=True,
                timeout=10,
            )
        deadline = time.monotonic() + 0.3
        while self.backings() and time.monotonic() < deadline:
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL, all of it but the keepers."""
        assert self.process is not None
        everyone = self.processes()
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
        eventually(lambda: not any(map(alive, everyone)), "the end of all")

    def whereabouts(self) -> list[str]:
        """What its processes are doing."""
        return [
            f"{command_line(pid)[:40]!r} {processes.state(pid)} {processes.read_proc(pid, 'wchan')}"
            f" {processes.read_proc(pid, 'stack')}"
            for pid in self.processes()
        ]

    def freeze(self) -> None:
        """SIGSTOP, all of it."""
        for pid in self.processes():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on, all of it."""
        for pid in self.processes():
            os.kill(pid, signal.SIGCONT)

    def processes(self) -> list[int]:
        """The front, what it started, and the pagers, wherever they hang."""
        found = [] if self.process is None else [self.process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                found += [int(each) for each in children]
        found += [pid for pid in self.pagers().values() if pid not in found]
        keepers = [pid for pid in found if b"keeper.py" in command_line(pid)]
        helpers = [pid for pid in found if command_line(pid).startswith(b"cat\0")]
        return [pid for pid in found if pid not in keepers + helpers]

    def pagers(self) -> dict[int, int]:
        """Each user's, by its lock."""
        found = {}
        for file in self.run.glob("users/*/lock"):
            with contextlib.suppress(OSError, ValueError):
                pid, started = map(int, file.read_text().split())
                if processes.started(pid) == started:
                    found[int(file.parent.name)] = pid
        return found

    def pager(self, uid: int = 0) -> int:
        """The process that has a user's memory."""
        return self.pagers()[uid]

    def shm_objects(self) -> list[str]:
        """What regions have in /dev/shm: their memory, or what stashes it."""
        prefix = names.prefix(self.run).lstrip("/")
        return [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]

    def backings(self) -> list[Path]:
        """The files that hold the pages of regions."""
        if BACKING == "shm":
            return [Path("/dev/shm", name) for name in self.shm_objects()]
        huge = self.run / "huge"
        return list(huge.iterdir()) if huge.exists() else []

    def descriptors(self) -> int:
        """Of all its processes, and of those threads that have a table of their own."""
        tables: set[tuple[int, frozenset[str]]] = set()
        for pid in self.processes():
            gone = contextlib.suppress(FileNotFoundError, ProcessLookupError)
            with gone:
                for thread in os.listdir(f"/proc/{pid}/task"):
                    with gone:
                        table = frozenset(os.listdir(f"/proc/{pid}/task/{thread}/fd"))
                        tables.add((pid, table))
        return sum(len(table) for _, table in tables)

    def has_open(self, file: Path) -> bool:
        for pid in self.processes():
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    if fd.readlink() == file:
                        return True
        return False

    def metric(self, name: str) -> float:
        """The value of a metric, 0 if it has none yet."""
        for line in (self.mount / ".metrics").read_text().splitlines():
            key, _, value = line.rpartition(" ")
            if key == f"msharefs_{name}":
                return float(value)
        return 0.0

    def info(self, region: str, file: str = "info") -> str:
        return (self.mount / ".regions" / region / file).read_text()

    def field(self, region: str, key: str) -> str:
        """One line of a region's info."""
        for line in self.info(region).splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return value.strip()
        raise KeyError(key)

    def info_as(self, region: str, file: str, user: int) -> str:
        """As `info`, by another user: an ordinary user's mount is closed even to root."""
        return subprocess.run(
            ["cat", str(self.mount / ".regions" / region / file)],
            check=True,
            capture_output=True,
            text=True,
            user=user,
            group=user,
            extra_groups=[],
        ).stdout

    def field_as(self, region: str, key: str, user: int) -> str:
        """As `field`, by another user."""
        lines = self.info_as(region, "info", user).splitlines()
        return dict(line.split(":", 1) for line in lines)[key].strip()

    def sharers(self, region: str) -> int:
        return int(self.field(region, "sharers"))

    def check_log(self) -> None:
        """No line of the log is suspicious but those that the test provoked."""
        for line in self.log().splitlines():
            if SUSPICIOUS.search(line) and not any(re.search(p, line) for p in self.expected):
                pytest.fail(f"suspicious line in the daemon's log: {line}\n\n{self.log()}")

    def clean_up(self) -> None:
        """Whatever happened; each step, whatever became of those before."""
        with contextlib.ExitStack() as steps:  # from the last to the first
            steps.callback(graft.take_away)
            steps.callback(self._remove_memory)
            steps.callback(self._take_down)
            steps.callback(self._end_processes)

    def _end_processes(self) -> None:
        with contextlib.suppress(OSError):
            self.abort()
        if self.process is not None:
            self.kill()
        for pid in self.processes():  # of a front that is gone
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _take_down(self) -> None:
        while mounting.is_mounted(str(self.mount)):
            mounting.unmount(str(self.mount))
        while (huge := mounts.top_mount(str(self.run / "huge"))) is not None:
            mounting.unmount(huge.target)

    def _remove_memory(self) -> None:
        for name in self.shm_objects():
            os.unlink(f"/dev/shm/{name}")


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A temporary directory that ordinary users can enter."""
    path = Path(tempfile.mkdtemp(prefix="mshare-test-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture
def directory() -> Iterator[Path]:
    """As temporary()."""
    with temporary() as path:
        yield path


@contextlib.contextmanager
def watched(daemons: list[Daemon], seconds: float = WATCHDOG_SECONDS) -> Iterator[None]:
    """Have daemons ended that are not done with in time; see above."""

    def bark() -> None:
        for each in daemons:
            with contextlib.suppress(OSError):
                each.abort()
            for pid in each.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    watchdog = threading.Timer(seconds, bark)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


@contextlib.contextmanager
def taken_down(daemons: list[Daemon]) -> Iterator[None]:
    """Stop daemons at the end, and look at what they leave."""
    try:
        yield
        for each in daemons:
            if each.process is not None:
                assert each.process.poll() is None, f"the daemon died:\n{each.log()}"
                each.stop()
        for each in daemons:
            each.check_log()
    finally:
        with contextlib.ExitStack() as stack:
            for each in daemons:
                stack.callback(each.clean_up)


@pytest.fixture
def make_daemon(directory: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Daemon]]:
    """Make daemons that are taken down at the end, under a watchdog."""
    daemons: list[Daemon] = []
    longer = request.node.get_closest_marker("timeout")
    seconds = longer.args[0] if longer else WATCHDOG_SECONDS

    def make(*arguments: str, mountpoint: Path | None = None) -> Daemon:
        own = directory / f"daemon{len(daemons)}"
        own.mkdir()
        own.chmod(0o755)
        made = Daemon(own, *arguments, mountpoint=mountpoint)
        daemons.append(made)
        return made

    with watched(daemons, seconds), taken_down(daemons):
        yield make


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    """A running daemon with regions of 2 MiB."""
    return make_daemon(f"--alignment={ALIGNMENT}").start()


def compile_c(source: Path, output: Path, *flags: str) -> Path:
    """Compile a program as a user of the installed wheel does."""
    words = subprocess.run(
        [sys.executable, "-m", "libmshare", "--cflags", "--libs"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    subprocess.run(
        ["cc", "-std=gnu11", "-g", *flags, "-o", str(output), str(source), "-pthread", *words],
        check=True,
    )
    return output


@pytest.fixture(scope="session")
def client_program() -> Iterator[Path]:
    """tests/client.c, compiled."""
    with tempfile.TemporaryDirectory(prefix="mshare-test-") as name:
        Path(name).chmod(0o755)
        # With the library beside it: ordinary users may not be able to enter where
        # the project lies.
        directory = core.library_directory()
        if directory is not None:
            shutil.copy(directory / core.LIBRARY, name)
        flags = ["-Wall", "-Wextra", "-Werror", "-Wl,-rpath,$ORIGIN"]
        yield compile_c(CLIENT_SOURCE, Path(name) / "client", *flags)


class Client:
    """A C program that is told call by call what to do; see client.c."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, *words: object) -> None:
        """Give a command and do not wait for its result."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(str(word) for word in words) + "\n")
        self.process.stdin.flush()

    def result(self) -> str:
        """The result of the oldest command that has not been asked for."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the client ended: {self.process.wait()}"
        return line.rstrip("\n")

    def has_result(self) -> bool:
        """Whether a command is done whose result has not been asked for."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def do(self, *words: object) -> str:
        self.send(*words)
        return self.result()

    def ok(self, *words: object) -> None:
        """A command that must succeed."""
        assert self.do(*words) == "0", words

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def spawn(client_program: Path, daemon: Daemon) -> Iterator[Callable[..., Client]]:
    """Start clients of `daemon`; keyword arguments are Popen's (user, group, ...)."""
    with clients(client_program, daemon) as start:
        yield start


@contextlib.contextmanager
def clients(program: Path, of: Daemon, **variables: str) -> Iterator[Callable[..., Client]]:
    """Clients of one daemon, all gone at the end; with more variables in their environment."""
    started: list[Client] = []

    def start(*, before: Sequence[str] = (), **popen: object) -> Client:
        environment = {"MSHARE_ROOT": str(of.mount), "PATH": os.defpath, **variables}
        process = subprocess.Popen(  # type: ignore[call-overload] # popen is the test's
            [*before, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd="/",
            start_new_session=True,
            **popen,
        )
        started.append(Client(process))
        return started[-1]

    try:
        yield start
    finally:
        for client in started:
            # With its children: one may try a system call on memory that is gone for ever.
            # If it has been waited for, its number may be anybody's.
            if client.process.returncode is None:
                os.killpg(client.pid, signal.SIGKILL)
                client.process.wait()
            for pipe in (client.process.stdin, client.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
