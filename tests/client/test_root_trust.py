"""Whom a client hands its memory to: mounts that others have made are none.

Every user mounts a fuse.msharefs and moves directories of their own.  The fakes here
have all that the library looks for; what they hear is what counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from become import BECOME_NOBODY, seen_by
from conftest import (
    ALIGNMENT,
    BASE,
    CLIENT_SOURCE,
    Client,
    Daemon,
    clients,
    compile_c,
)

from msharefsd.control import wire
from msharefsd.linux import syscalls
from msharefsd.mount import mounting

SIZE = 2 * ALIGNMENT
PAGE = 4096
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SYS = Path("/sys/fs/mshare")
NOBODY, MALLORY = 65534, 65533
AS_NOBODY: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
AS_MALLORY: dict[str, Any] = {"user": MALLORY, "group": MALLORY, "extra_groups": []}
READ, WRITE, SHARED, FIXED, MS_SYNC = 1, 2, 1, 0x10, 4
ATTACH, USERFAULTFD = 1, 5
STALE = "taking down the mount"
Make = Callable[..., Daemon]


def failure(number: int) -> str:
    """What the client prints."""
    return str(-number)


@dataclass
class Fake:
    """Somebody who listens where a daemon would, and answers with an error."""

    sock: socket.socket
    gives: int = 0
    """So many descriptors come with each answer."""
    heard: list[tuple[int, list[int]]] = field(default_factory=list)
    """What was asked (an op), and the inodes of what came with it."""

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.sock.accept()
            except OSError:
                return
            with connection:
                while self._answer(connection):
                    pass

    def _answer(self, connection: socket.socket) -> bool:
        data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
        op = struct.unpack_from("=IHH", data)[2] if data else 0
        self.heard.append((op, [os.fstat(fd).st_ino for fd in fds]))
        for fd in fds:
            os.close(fd)
        if data:
            reply = (wire.MAGIC, wire.VERSION, op, errno.EDOM, 0, 0, 0, b"")
            given = [os.memfd_create("given") for _ in range(self.gives)]
            socket.send_fds(connection, [wire.REPLY.pack(*reply)], given)
            for fd in given:
                os.close(fd)
        return bool(data)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[Fake]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))
        path.chmod(0o777)
        sock.listen(50)
        fake = Fake(sock)
        thread = threading.Thread(target=fake.serve)
        thread.start()
        try:
            yield fake
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextlib.contextmanager
def look_alike(directory: Path) -> Iterator[Fake]:
    """A plain directory that has what an msharefs has."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    (directory / "mshare_info").write_text(f"{ALIGNMENT}\n")
    (directory / "r").write_bytes(struct.pack("QQ", BASE, SIZE))
    (directory / "r").chmod(0o666)
    with listening(directory / ".control") as fake:
        yield fake


@contextlib.contextmanager
def mounted(place: Path, user: int, more: str = ",allow_other") -> Iterator[None]:
    """An msharefs of a user's in the mount table, that never answers."""
    place.mkdir(parents=True, exist_ok=True)
    fd = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={fd},rootmode=40000,user_id={user},group_id={user}{more}"
        syscalls.mount("msharefs", str(place), mounting.FSTYPE, 0, options)
    finally:
        if sys.exc_info()[0] is not None:
            os.close(fd)
    try:
        yield
    finally:
        os.close(fd)  # whoever waits for an answer has one
        syscalls.umount(str(place), syscalls.MNT_DETACH)


@contextlib.contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    syscalls.mount(str(source), str(target), None, syscalls.MS_BIND)
    try:
        yield
    finally:
        syscalls.umount(str(target), syscalls.MNT_DETACH)


def exchange(one: Path, other: Path) -> None:
    at_fdcwd, rename_exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.renameat2(
        at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange
    )
    assert result == 0, os.strerror(ctypes.get_errno())


def attach(program: Path, root: Path | str = "", **popen: object) -> str:
    """What mshare() of the region r says; one that waits for an answer is a failure."""
    done = subprocess.run(  # type: ignore[call-overload] # popen is the test's
        [str(program)],
        check=False,
        input=f"mshare r {BASE} {SIZE} {os.O_RDWR} 0\n",
        capture_output=True,
        text=True,
        timeout=15,
        env={"MSHARE_ROOT": str(root), "MSHARE_RECONNECT_SECONDS": "0"},
        cwd="/",
        **popen,
    )
    return str(done.stdout).strip()


def create(client: Client, name: str = "r", at: int = BASE) -> None:
    """A region with memory in it."""
    client.ok("map", at, SIZE, SHARED)
    client.ok("mshare", name, at, SIZE, CREATE, 0o600)


def make_region(program: Path, daemon: Daemon) -> None:
    """One for everybody, that stays."""
    with clients(program, daemon) as start:
        create(start())
    (daemon.mount / "r").chmod(0o666)


@pytest.fixture
def fuse_for_everybody(directory: Path) -> Iterator[None]:
    """/dev/fuse as distributions have it, mode 0666, in our mount namespace."""
    node = directory / "fuse"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(10, 229))
    node.chmod(0o666)
    with bound(node, Path("/dev/fuse")):
        yield


# -- whose mount it is --


@pytest.fixture(params=["found", "named"])
def said(request: pytest.FixtureRequest) -> Callable[[Path], Path | str]:
    """What MSHARE_ROOT says of a mount: nothing, or where it is."""
    return (lambda _: "") if request.param == "found" else (lambda place: place)


@pytest.mark.usefixtures("fuse_for_everybody")
def test_a_mount_by_fusermount_is_its_users_alone(
    directory: Path, client_program: Path, said: Callable[[Path], Path]
) -> None:
    place = directory / "nobody" / "mshare"
    place.mkdir(parents=True)
    os.chown(place, NOBODY, NOBODY)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        subprocess.run(
            # What is taken from its caller may say anything.
            ["fusermount3", "-o", r"subtype=msharefs,fsname=n - x\,user_id=0", "--", place],
            check=True,
            pass_fds=[theirs.fileno()],
            env={"_FUSE_COMMFD": str(theirs.fileno())},
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
        )
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    try:
        assert mounting.is_mounted(str(place))
        assert attach(client_program, said(place)) == failure(errno.EPERM)
        assert attach(client_program, said(place), **AS_MALLORY) == failure(errno.EPERM)
    finally:
        os.close(fd)
        syscalls.umount(str(place), syscalls.MNT_DETACH)


def test_a_server_of_others_is_not_waited_for(
    directory: Path, client_program: Path, said: Callable[[Path], Path]
) -> None:
    with mounted(directory / "mallorys", MALLORY):
        found = attach(client_program, said(directory / "mallorys"))
    assert found == failure(errno.EPERM)


def test_no_mount_at_all(directory: Path, client_program: Path) -> None:
    assert attach(client_program) == failure(errno.ENOENT)
    assert attach(client_program, directory) == failure(errno.ENOENT)


def test_ours_is_found_behind_those_of_others(
    directory: Path, client_program: Path, make_daemon: Make
) -> None:
    with (
        mounted(directory / "mallorys", MALLORY),
        mounted(directory / "nobodys", NOBODY, ""),
    ):
        daemon = make_daemon(f"--alignment={ALIGNMENT}").start()
        with clients(client_program, daemon, MSHARE_ROOT="") as start:
            first, second = start(), start()
            create(first)
            second.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
            first.ok("store", BASE, 5)
            assert second.do("load", BASE) == "5"


@pytest.mark.usefixtures("fuse_for_everybody")
def test_a_users_own_mount_is_theirs_alone(
    directory: Path, client_program: Path, make_daemon: Make
) -> None:
    runtime = directory / "runtime"
    runtime.mkdir()
    os.chown(runtime, NOBODY, NOBODY)
    with mounted(directory / "mallorys", MALLORY):
        daemon = make_daemon(f"--alignment={ALIGNMENT}", mountpoint=runtime / "mshare")
        daemon.run = runtime / "run"
        # What an ordinary user's daemon has to do without: see test_mount.
        daemon.expected += ["WARNING"]
        daemon.start([sys.executable, "-c", BECOME_NOBODY])
        with clients(client_program, daemon, MSHARE_ROOT="") as start:
            owner = start(**AS_NOBODY)
            create(owner)
            assert attach(client_program, **AS_NOBODY) == "0"
            for root in ("", daemon.mount):
                assert attach(client_program, root) == failure(errno.EPERM)
        assert daemon.process is not None
        daemon.process.terminate()
        assert daemon.process.wait(20) == 0
        daemon.process = None


def test_who_acts_for_a_user_for_a_while_is_not_theirs(directory: Path) -> None:
    place = directory / "nobodys"
    script = f"""
        import os
        from libmshare import core
        os.seteuid({NOBODY})
        try:
            core.mshare_root()
        except PermissionError:
            print("refused")
    """
    with mounted(place, NOBODY):
        for root in ("", str(place)):
            found = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(script)],
                check=True,
                capture_output=True,
                text=True,
                timeout=15,
                env={"MSHARE_ROOT": root},
                cwd="/",
            )
            assert found.stdout == "refused\n"


@pytest.mark.parametrize(
    ("owner", "why"), [(MALLORY, errno.EPERM), (0, errno.ENOENT)], ids=["others", "roots"]
)
def test_what_is_where_the_table_says_is_looked_at_itself(
    directory: Path, client_program: Path, owner: int, why: int
) -> None:
    """The table has an msharefs; its path leads to something else."""
    place = directory / "mount"
    with mounted(place, owner), look_alike(directory / "plain") as fake:
        with bound(directory / "plain", place):
            assert attach(client_program) == failure(why)
            assert attach(client_program, place) == failure(errno.ENOENT)
        assert fake.heard == []


def test_paths_of_every_kind_are_read(
    daemon: Daemon, directory: Path, client_program: Path
) -> None:
    make_region(client_program, daemon)
    place = directory.joinpath("a b\t\\040", "-", " - ", "line\n36 21 0:1", *["d" * 250] * 14)
    place.mkdir(parents=True)
    (directory / "plain").mkdir()
    with bound(daemon.mount, place), bound(directory / "plain", daemon.mount):
        # The first line's path leads elsewhere, and this one leads there.
        assert attach(client_program) == "0"
        assert attach(client_program, place) == "0"


@pytest.mark.usefixtures("fuse_for_everybody")
def test_root_of_a_user_namespace_of_ones_own(directory: Path, client_program: Path) -> None:
    """Its mounts say user_id=0.  They are seen where its owner rules, and the kernel
    lets nobody in who came there without its user namespace.
    """
    place = directory / "mount"
    place.mkdir()
    script = f"""
        import ctypes, os, sys
        fd = os.open("/dev/fuse", os.O_RDWR)
        options = b"fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other" % fd
        libc = ctypes.CDLL(None, use_errno=True)
        where = {os.fsencode(place)!r}
        if libc.mount(b"msharefs", where, b"fuse.msharefs", 0, options) != 0:
            sys.exit(os.strerror(ctypes.get_errno()))
        print("mounted", flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        ["unshare", "-Urm", "/usr/bin/python3", "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
    ) as mallory:
        assert mallory.stdout is not None
        assert mallory.stdout.readline() == "mounted\n"
        table = Path(f"/proc/{mallory.pid}/mountinfo").read_text()
        (line,) = [line for line in table.splitlines() if mounting.FSTYPE in line]
        assert "user_id=0" in line
        # Whoever is not in the namespace does not see it.
        assert attach(client_program) == failure(errno.ENOENT)
        # Who enters the mount namespace alone sees it, and cannot come in.
        found = subprocess.run(
            ["nsenter", f"--mount=/proc/{mallory.pid}/ns/mnt", client_program],
            input=f"mshare r {BASE} {SIZE} {os.O_RDWR} 0\n",
            check=False,
            capture_output=True,
            text=True,
            timeout=15,
            env={"PATH": os.defpath, "MSHARE_ROOT": str(place)},
        )
        assert found.stdout.strip() == failure(errno.EACCES)
        mallory.communicate()


def test_who_has_more_rights_than_its_caller_asks_nobody_where(
    directory: Path, client_program: Path, make_daemon: Make
) -> None:
    helper = directory / "helper"
    # $ORIGIN means nothing to such a program (ld.so(8)).
    compile_c(CLIENT_SOURCE, helper, f"-Wl,-rpath,{client_program.parent}")
    helper.chmod(0o4755)
    first = make_daemon(f"--alignment={ALIGNMENT}").start()
    make_region(client_program, first)
    assert attach(client_program, first.mount, **AS_NOBODY) == "0"
    for root in (first.mount, ""):
        assert attach(helper, root, **AS_NOBODY) == failure(errno.ENOENT)
    usual = make_daemon(f"--alignment={ALIGNMENT}", mountpoint=SYS).start()
    for root in (first.mount, ""):
        # It goes to the usual place, where the name leads to nothing yet.
        assert attach(helper, root, **AS_NOBODY) == failure(errno.ENOENT)
    make_region(client_program, usual)
    for root in (first.mount, ""):
        assert attach(helper, root, **AS_NOBODY) == "0"
    # Even the mount of who called it is not for it.
    with mounted(SYS, NOBODY):
        assert attach(helper, first.mount, **AS_NOBODY) == failure(errno.EPERM)


# -- the mount that is held --


@pytest.fixture
def waiting(daemon: Daemon, client_program: Path) -> Iterator[Client]:
    """A sharer of r that does not wait long for a daemon."""
    with clients(client_program, daemon, MSHARE_RECONNECT_SECONDS="0.3") as start:
        client = start()
        create(client)
        client.ok("store", BASE, 7)
        yield client


def held(client: Client, daemon: Daemon) -> list[int]:
    """The devices of the directories that the client has open at the mountpoint."""
    descriptors = Path(f"/proc/{client.pid}/fd")
    return [fd.stat().st_dev for fd in descriptors.iterdir() if fd.readlink() == daemon.mount]


def test_another_directory_in_its_place_is_not_taken_for_it(
    daemon: Daemon, waiting: Client, directory: Path
) -> None:
    lies = directory / "lies"
    with look_alike(lies / daemon.mount.name) as fake:
        exchange(daemon.mount.parent, lies)
        try:
            gone = failure(errno.ENOTCONN)
            assert waiting.do("stat", "r") == gone
            assert waiting.do("mshare", "q", BASE + SIZE, SIZE, CREATE, 0o600) == gone
            assert waiting.do("mshare", "r", BASE + SIZE, SIZE, os.O_RDWR, 0) == gone
            assert waiting.do("unlink", "q") == gone
            assert not (lies / daemon.mount.name / "q").exists()
            # A child would attach again: it has nothing there.
            assert waiting.do("fork", "load", BASE) == "SIGSEGV"
        finally:
            exchange(daemon.mount.parent, lies)
        assert fake.heard == []
    assert waiting.do("stat", "r") == f"{BASE} {SIZE}"
    assert waiting.do("fork", "load", BASE) == "7"


def test_no_directory_in_its_place_is_the_next_daemon(
    daemon: Daemon, waiting: Client, directory: Path
) -> None:
    lies = directory / "lies"
    daemon.kill()
    with look_alike(lies / daemon.mount.name) as fake:
        exchange(daemon.mount.parent, lies)
        try:
            assert waiting.do("mprotect", BASE, PAGE, READ) == failure(errno.ENOTCONN)
            assert waiting.do("fork", "load", BASE) == "SIGSEGV"
        finally:
            exchange(daemon.mount.parent, lies)
        assert fake.heard == []
    daemon.expected.append(STALE)
    daemon.start()
    waiting.ok("mprotect", BASE, PAGE, READ)


def test_the_next_daemons_mount_is_found_anew(daemon: Daemon, spawn: Callable[..., Client]) -> None:
    client = spawn()
    create(client)
    client.ok("store", BASE, 7)
    assert held(client, daemon) == [daemon.mount.stat().st_dev]
    before = held(client, daemon)
    daemon.kill()
    daemon.expected.append(STALE)
    daemon.start()
    # A child first: it has the descriptor of the mount that is gone.
    assert client.do("fork", "load", BASE) == "7"
    assert client.do("fork", "mprotect", BASE, PAGE, READ) == "0"
    client.ok("mprotect", BASE, PAGE, READ | WRITE)
    assert held(client, daemon) == [daemon.mount.stat().st_dev] != before
    create(client, "q", BASE + SIZE)
    client.ok("store", BASE + SIZE, 8)
    assert client.do("fork", "load", BASE + SIZE) == "8"
    assert client.do("stat", "r") == f"{BASE} {SIZE}"
    assert held(client, daemon) == [daemon.mount.stat().st_dev]


def test_a_program_that_closes_what_it_did_not_open(daemon: Daemon, client_program: Path) -> None:
    make_region(client_program, daemon)
    script = """
        import os
        from libmshare import core
        before = set(os.listdir("/proc/self/fd"))
        where = core.mshare_stat("r")
        (held,) = set(os.listdir("/proc/self/fd")) - before
        os.closerange(3, 1000)
        assert core.mshare_stat("r") == where
        # Its number is the program's own now.
        os.closerange(3, 1000)
        own = [os.open("/proc", os.O_RDONLY) for _ in range(100)]
        assert int(held) in own
        assert core.mshare_stat("r") == where
        assert core.mshare_stat("r") == where
        assert all(os.path.samestat(os.fstat(fd), os.stat("/proc")) for fd in own)
        os.close(int(held))
        os.open("ROOT", os.O_RDONLY)
        assert core.mshare_stat("r") == where
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script).replace("ROOT", str(daemon.mount))],
        check=True,
        env={"MSHARE_ROOT": str(daemon.mount)},
        cwd="/",
    )


# -- what is sent and what comes back --


@contextlib.contextmanager
def answering_to(uid: int, daemon: Daemon, directory: Path) -> Iterator[Fake]:
    """In the daemon's own mount another one listens, where that user finds `.control`."""
    with (
        listening(directory / "socket") as fake,
        seen_by(uid),
        bound(directory / "socket", daemon.mount / ".control"),
    ):
        yield fake


@pytest.fixture
def answering(daemon: Daemon, directory: Path) -> Iterator[Fake]:
    with answering_to(os.geteuid(), daemon, directory) as fake:
        yield fake


@pytest.fixture
def answering_nobody(daemon: Daemon, directory: Path) -> Iterator[Fake]:
    with answering_to(NOBODY, daemon, directory) as fake:
        yield fake


@pytest.mark.parametrize("count", [2, 3])
def test_no_descriptor_of_an_answer_is_left_open(
    daemon: Daemon, answering: Fake, spawn: Callable[..., Client], count: int
) -> None:
    (daemon.mount / "r").touch()
    answering.gives = count
    client = spawn()
    refused = failure(errno.EDOM)
    assert client.do("mshare", "r", BASE, SIZE, os.O_RDWR, 0) == refused
    before = sorted(os.listdir(f"/proc/{client.pid}/fd"))
    for _ in range(10):
        assert client.do("mshare", "r", BASE, SIZE, os.O_RDWR, 0) == refused
    assert sorted(os.listdir(f"/proc/{client.pid}/fd")) == before
    assert [op for op, _ in answering.heard if op] == [ATTACH] * 11


@pytest.fixture
def no_userfaultfd() -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n":
        pytest.skip("every user has a userfaultfd here")
    if Path("/dev/userfaultfd").exists() and Path("/dev/userfaultfd").stat().st_mode & 0o66:
        pytest.skip("every user may open /dev/userfaultfd here")


@pytest.mark.usefixtures("no_userfaultfd")
def test_who_asks_for_a_userfaultfd_shows_a_region(
    daemon: Daemon, answering_nobody: Fake, spawn: Callable[..., Client]
) -> None:
    region = daemon.mount / "r"
    region.touch()
    region.chmod(0o666)
    client = spawn(**AS_NOBODY)
    refused = failure(errno.EDOM)
    assert client.do("mshare", "r", BASE, SIZE, os.O_RDWR, 0) == refused
    assert answering_nobody.heard[0] == (USERFAULTFD, [region.stat().st_ino])
    assert region.exists()


@pytest.mark.usefixtures("no_userfaultfd")
def test_what_was_made_for_nothing_is_removed(
    daemon: Daemon, answering_nobody: Fake, spawn: Callable[..., Client]
) -> None:
    client = spawn(**AS_NOBODY)
    before = sorted(os.listdir(daemon.mount))
    for flags in (CREATE, os.O_CREAT | os.O_RDWR, os.O_CREAT | os.O_RDONLY):
        assert client.do("mshare", "r", BASE, SIZE, flags, 0o600) == failure(errno.EDOM)
        assert sorted(os.listdir(daemon.mount)) == before
    heard = [(op, len(inodes)) for op, inodes in answering_nobody.heard if op]
    assert heard == [(USERFAULTFD, 1)] * 3


def test_who_was_refused_removes_what_it_made_and_nothing_else(
    daemon: Daemon, answering: Fake, spawn: Callable[..., Client]
) -> None:
    region = daemon.mount / "r"
    region.touch()
    client = spawn()
    refused = failure(errno.EDOM)
    assert client.do("mshare", "r", BASE, SIZE, os.O_CREAT | os.O_RDWR, 0o600) == refused
    assert region.exists()
    assert client.do("mshare", "q", BASE, SIZE, os.O_CREAT | os.O_RDWR, 0o600) == refused
    assert not (daemon.mount / "q").exists()
    assert [op for op, _ in answering.heard if op] == [ATTACH] * 2


@pytest.mark.parametrize("flag", [os.O_APPEND, os.O_DIRECT])
def test_a_file_that_only_the_program_may_open(
    daemon: Daemon, spawn: Callable[..., Client], directory: Path, flag: int
) -> None:
    """The daemon overrides no modes, and cannot use the program's descriptor as it is."""
    home = directory / "home"
    home.mkdir(mode=0o700)
    file = home / "file"
    content = bytearray(os.urandom(4 * PAGE))
    file.write_bytes(content)
    file.chmod(0o600)
    for path in (home, file):
        os.chown(path, NOBODY, NOBODY)
    client = spawn(**AS_NOBODY)
    client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    client.ok("mmap", BASE, 4 * PAGE, READ | WRITE, SHARED | FIXED, file, os.O_RDWR | flag, 0)
    assert client.do("load", BASE + PAGE) == str(content[PAGE])
    content[2 * PAGE] ^= 0xFF
    client.ok("store", BASE + 2 * PAGE, content[2 * PAGE])
    client.ok("msync", BASE, 4 * PAGE, MS_SYNC)
    assert file.read_bytes() == content
    # The program has closed its own by now.
    descriptors = Path(f"/proc/{client.pid}/fd")
    assert file not in [fd.readlink() for fd in descriptors.iterdir()]
