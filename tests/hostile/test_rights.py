"""What a user is given, and what is believed of what a client says.

Descriptors that prove nothing, flags that lie, users who are told apart by what they may,
and what they can put in the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bare import Answer, Bare, in_child
from conftest import ALIGNMENT, BASE, Client, Daemon, clients, eventually
from hostile import MALLORY, START, MiB, hung_at, open_window, userfaultfd
from victim import ALICE, HANG_SECONDS
from walls import Make
from walls import make_walls_fixture as _make_walls_fixture  # noqa: F401 - what tests ask for
from walls import own_shm as _own_shm  # noqa: F401 - as above
from walls import programs_fixture as _programs_fixture  # noqa: F401 - as above

from msharefsd.control.wire import Op, RequestFlag
from msharefsd.linux import syscalls, uffd
from msharefsd.linux.uffd import Mode

pytestmark = pytest.mark.shm_only
PAGE = syscalls.PAGE
SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SHARED, PRIVATE, ANONYMOUS, FIXED = mmap.MAP_SHARED, mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS, 0x10
UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")


def make_name(daemon: Daemon, name: str, mode: int, owner: int) -> Path:
    """A name that has no range yet."""
    path = daemon.mount / name
    path.touch(mode=0o600)
    os.chown(path, owner, owner)
    path.chmod(mode)
    return path


# -- userfaultfds --


def device_of(mount: Path, *proof: int) -> Answer:
    """What a connection is answered that asks for a userfaultfd."""
    one = Bare(mount)
    answer = one.call(Op.USERFAULTFD, *proof)
    one.sock.close()
    return answer


def is_given(answer: Answer) -> bool:
    """Whether that makes userfaultfds which hold up the kernel."""
    if answer.fd < 0:
        return False
    with contextlib.suppress(OSError):
        own = fcntl.ioctl(answer.fd, uffd.USERFAULTFD_IOC_NEW, os.O_CLOEXEC)
        uffd.handshake(own, uffd.Feature(0))
        return True
    return False


@pytest.mark.skipif(UNPRIVILEGED.read_text().strip() != "0", reason="everybody may have one")
def test_who_may_have_no_userfaultfd_is_not_given_one(make_daemon: Callable[..., Daemon]) -> None:
    """vm.unprivileged_userfaultfd is 0: an administrator wants it so."""
    daemon = make_daemon(f"--alignment={ALIGNMENT}", "--userfaultfd=auto").start()

    def ask() -> None:
        proof = os.open(daemon.mount / "own", CREATE, 0o600)
        for fds in ((), (proof,), (os.open("/dev/null", os.O_RDONLY),), (proof, proof)):
            assert not is_given(device_of(daemon.mount, *fds)), fds

    assert in_child(ask, uid=MALLORY).wait() == 0
    assert is_given(device_of(daemon.mount, os.open(daemon.mount / "own", os.O_RDWR)))
    os.unlink(daemon.mount / "own")


def test_root_is_given_one(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}").start()
    proof = os.open(daemon.mount / "own", CREATE, 0o600)
    assert is_given(device_of(daemon.mount, proof))
    os.close(proof)
    os.unlink(daemon.mount / "own")


def _nothing(_: Path) -> tuple[int, ...]:
    return ()


def _path_only(mount: Path) -> tuple[int, ...]:
    return (os.open(mount / "private", os.O_PATH),)


def _of_the_root(mount: Path) -> tuple[int, ...]:
    return (os.open(mount, os.O_RDONLY),)


def _info(mount: Path) -> tuple[int, ...]:
    return (os.open(mount / "mshare_info", os.O_RDONLY),)


def _metrics(mount: Path) -> tuple[int, ...]:
    return (os.open(mount / ".metrics", os.O_RDONLY),)


def _socket(mount: Path) -> tuple[int, ...]:
    return (Bare(mount).sock.detach(),)


def _no_proof(fd: Callable[[], int]) -> Callable[[Path], tuple[int, ...]]:
    return lambda _: (fd(),)


NO_PROOF: dict[str, Callable[[Path], tuple[int, ...]]] = {
    "nothing": _nothing,
    "/dev/null": _no_proof(lambda: os.open("/dev/null", os.O_RDWR)),
    "a file": _no_proof(lambda: os.open("/etc/passwd", os.O_RDONLY)),
    "a memfd": _no_proof(lambda: os.memfd_create("x")),
    "a pipe": _no_proof(lambda: os.pipe()[0]),
    "another's name, not opened": _path_only,
    "the mount's directory": _of_the_root,
    "the mount's own file": _info,
    "the counters": _metrics,
    "a connection": _socket,
}


@pytest.mark.skipif(UNPRIVILEGED.read_text().strip() != "0", reason="everybody may have one")
@pytest.mark.parametrize("kind", NO_PROOF)
def test_a_userfaultfd_is_for_who_shows_a_region(kind: str, make_walls: Make) -> None:
    """Also where everybody who has one may have it (--userfaultfd=all)."""
    walls = make_walls()
    mount = walls.daemon.mount
    make_name(walls.daemon, "private", 0o600, ALICE)

    def ask() -> None:
        assert not is_given(device_of(mount, *NO_PROOF[kind](mount)))
        own = os.open(mount / "own", CREATE, 0o600)
        assert is_given(device_of(mount, own)), "and so it is"

    assert in_child(ask, uid=MALLORY).wait() == 0
    for name in ("private", "own"):
        os.unlink(mount / name)


@pytest.mark.skipif(UNPRIVILEGED.read_text().strip() != "0", reason="everybody may have one")
def test_a_container_whose_filter_forbids_it_is_not_given_one(
    make_daemon: Callable[..., Daemon],
) -> None:
    """A seccomp filter as containers have it says EPERM to userfaultfd(2)."""
    daemon = make_daemon(f"--alignment={ALIGNMENT}", "--userfaultfd=auto").start()

    def ask() -> None:
        clone_newuser, set_no_new_privs, set_seccomp, number = 0x10000000, 38, 22, 323
        with contextlib.suppress(OSError):
            syscalls.unshare(clone_newuser)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(set_no_new_privs, 1, 0, 0, 0)
        instructions = struct.pack(
            "=" + "HBBI" * 4,
            *(0x20, 0, 0, 0, 0x15, 0, 1, number, 0x06, 0, 0, 0x00050001, 0x06, 0, 0, 0x7FFF0000),
        )
        memory = ctypes.create_string_buffer(instructions)
        program = struct.pack("=H6xQ", 4, ctypes.addressof(memory))
        assert libc.prctl(set_seccomp, 2, ctypes.c_char_p(program), 0, 0) == 0
        with pytest.raises(OSError, match="not permitted"):
            uffd.open_by_system_call(uffd.USER_MODE_ONLY)
        proof = os.open(daemon.mount / "own", CREATE, 0o600)
        assert not is_given(device_of(daemon.mount, proof))

    assert in_child(ask, uid=MALLORY).wait() == 0
    os.unlink(daemon.mount / "own")


# -- what a client says --


def lie(one: Bare, path: Path, own: int, flags: int, **fields: Any) -> Answer:
    """An ATTACH that says more than is so."""
    proof = os.open(path, os.O_RDWR)
    answer = one.call(Op.ATTACH, proof, own, oflags=os.O_RDWR | os.O_CREAT, flags=flags, **fields)
    os.close(proof)
    return answer


MADE, MAPPINGS, REPEATED = RequestFlag.MADE_FILE, RequestFlag.HAS_MAPPINGS, RequestFlag.REPEATED
HERE: Any = {"start": START, "size": 2 * MiB}
LIES: dict[str, tuple[int, Any, bool]] = {
    "a bad range": (MADE, {"start": 12345, "size": 1}, False),
    "a range too large": (MADE, {"start": START, "size": 1 << 62}, False),
    "no range": (MADE, {"start": 0, "size": 0}, False),
    "no userfaultfd": (MADE, HERE, True),
    "a donation that ends at once": (MADE | MAPPINGS, HERE, False),
    "the same, said twice": (MADE | MAPPINGS | REPEATED, HERE, False),
    "a bad range, said twice": (MADE | REPEATED, {"start": 12345, "size": 1}, False),
}


@contextlib.contextmanager
def acting_as(uid: int) -> Iterator[None]:
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def test_who_has_the_number_of_who_made_a_name_does_not_have_it_removed(
    make_walls: Make,
) -> None:
    """A process that has become another user's, or another process of that number."""
    walls = make_walls()
    path = walls.daemon.mount / "service"

    def claim() -> None:
        os.umask(0)
        with acting_as(ALICE):
            os.close(os.open(path, CREATE, 0o666))
        with acting_as(MALLORY):
            proof = os.open(path, os.O_RDWR)
            own = userfaultfd(walls.daemon.mount, proof)
            one = Bare(walls.daemon.mount)
            assert lie(one, path, own, MADE, start=12345, size=1).error == errno.EINVAL

    assert in_child(claim).wait() == 0
    assert path.stat().st_uid == ALICE
    os.unlink(path)


@pytest.mark.parametrize("orphaned", [False, True])
def test_a_connection_of_before_a_process_was_another_users_takes_nothing_of_its(
    orphaned: bool, make_walls: Make
) -> None:
    """As of a set-user-ID program, or of a process whose number is another's now."""
    walls = make_walls()
    path = make_name(walls.daemon, "shared", 0o644, ALICE)
    mount = walls.daemon.mount

    def make() -> None:
        one = Bare(mount)
        proof = os.open(path, os.O_RDWR)
        assert lie(one, path, userfaultfd(mount, proof), 0, **HERE).error == 0
        assert one.mmap(0, 2 * MiB, 3, SHARED | ANONYMOUS).error == 0

    def steal() -> None:
        with acting_as(MALLORY):
            early, proof = Bare(mount), os.open(path, os.O_RDONLY)
            own = userfaultfd(mount, proof)
        with acting_as(ALICE):
            one = Bare(mount)
            readable = os.open(path, os.O_RDONLY)
            one.uffd = userfaultfd(mount, readable)
            answer = one.call(
                Op.ATTACH, readable, one.uffd, oflags=os.O_RDONLY, flags=RequestFlag.AS_IT_LIES
            )
            assert answer.error == 0
            one.backing, one.start, one.size = answer.fd, answer.start, answer.size
            open_window(one)
        if not orphaned:
            assert early.call(Op.REJOIN, proof).error == errno.ESTALE
            assert one.call(Op.READY).error == 0
        else:
            one.sock.close()
            flags = RequestFlag.AS_IT_LIES | REPEATED
            answer = early.call(Op.ATTACH, proof, own, oflags=os.O_RDONLY, flags=flags)
            assert answer.error == 0
        assert one.byte(0) == 0

    assert in_child(make, uid=ALICE).wait() == 0
    assert in_child(steal).wait() == 0
    os.unlink(path)


@pytest.mark.parametrize("what", LIES)
def test_who_did_not_make_a_name_does_not_have_it_removed(what: str, make_walls: Make) -> None:
    """The directory is sticky, whatever MADE_FILE says."""
    flags, fields, bad = LIES[what]
    walls = make_walls()
    path = make_name(walls.daemon, "service", 0o666, 0)
    before = path.stat()

    def claim() -> None:
        with pytest.raises(PermissionError):
            os.unlink(path)
        one = Bare(walls.daemon.mount)
        proof = os.open(path, os.O_RDWR)
        own = os.pipe()[0] if bad else userfaultfd(walls.daemon.mount, proof)
        os.close(proof)
        lie(one, path, own, flags, **fields)
        one.sock.close()
        two = Bare(walls.daemon.mount)
        two.call(Op.READY)

    assert in_child(claim, uid=MALLORY).wait() == 0
    eventually(lambda: walls.daemon.metric("sharers") == 0, "she has gone")
    after = path.stat()
    assert (after.st_ino, after.st_uid, after.st_mode) == (
        before.st_ino,
        before.st_uid,
        before.st_mode,
    )
    os.unlink(path)


@pytest.mark.parametrize("how", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY])
def test_who_may_only_write_a_file_does_not_read_its_region(
    how: int, make_walls: Make, client_program: Path
) -> None:
    """mmap(2) wants a file that is open for reading, and so does a region."""
    walls = make_walls()
    with clients(client_program, walls.daemon) as start:
        alice: Client = start(user=ALICE, group=ALICE, extra_groups=[])
        alice.ok("mshare", "good", BASE, SIZE, CREATE, 0o600)
        alice.ok("mmap", BASE, SIZE, 3, SHARED | FIXED)
        alice.ok("fill", BASE, PAGE, 7)
        (walls.daemon.mount / "good").chmod(0o622)

        def read() -> None:
            with pytest.raises(PermissionError):
                os.open(walls.daemon.mount / "good", os.O_RDONLY)
            proof = os.open(walls.daemon.mount / "good", os.O_WRONLY)
            one = Bare(walls.daemon.mount)
            own = os.open(walls.daemon.mount / "own", CREATE, 0o600)
            mine = userfaultfd(walls.daemon.mount, own)
            answer = one.call(Op.ATTACH, proof, mine, oflags=how, flags=RequestFlag.AS_IT_LIES)
            assert answer.fd < 0, os.pread(answer.fd, 1, 0)
            assert answer.error == errno.EACCES
            again = Bare(walls.daemon.mount).call(Op.REJOIN, proof)
            assert again.error
            assert again.fd < 0

        assert in_child(read, uid=MALLORY).wait() == 0
        for name in ("good", "own"):
            os.unlink(walls.daemon.mount / name)


# -- an ordinary user's own files --


@pytest.mark.parametrize("flags", [SHARED, PRIVATE])
@pytest.mark.parametrize("more", [os.O_APPEND, os.O_DIRECT, os.O_APPEND | os.O_DIRECT])
def test_a_file_that_only_its_owner_may_open_however_it_is_open(
    more: int, flags: int, make_walls: Make, client_program: Path, directory: Path
) -> None:
    """What mmap(2) can map, a region can: also after a restart."""
    walls = make_walls()
    home = directory / "home"
    home.mkdir(mode=0o700)
    path = home / "file"
    path.write_bytes(b"F" * 8 * PAGE)
    path.chmod(0o600)
    for each in (home, path):
        os.chown(each, ALICE, ALICE)
    with clients(client_program, walls.daemon) as start:
        alice: Client = start(user=ALICE, group=ALICE, extra_groups=[])
        alice.ok("mshare", "good", BASE, SIZE, CREATE, 0o600)
        alice.ok("mmap", BASE, 8 * PAGE, 3, flags | FIXED, path, os.O_RDWR | more, 0)
        assert alice.do("load", BASE + PAGE) == str(ord("F"))
        alice.ok("store", BASE + 2 * PAGE, ord("w"))
        walls.killed()
        walls.started()
        assert alice.do("load", BASE + 3 * PAGE) == str(ord("F"))
        alice.ok("store", BASE + 4 * PAGE, ord("w"))
        alice.ok("msync", BASE, 8 * PAGE, syscalls.MS_SYNC)
        found = path.read_bytes()
        assert len(found) == 8 * PAGE
        written = b"w" if flags == SHARED else b"F"
        assert found[2 * PAGE : 2 * PAGE + 1] == written
        assert found[4 * PAGE : 4 * PAGE + 1] == written
        assert found.count(b"F") == 8 * PAGE - (2 if flags == SHARED else 0)
        os.unlink(walls.daemon.mount / "good")


# -- the log --

FORGED = (
    "x\nmsharefsd: CRITICAL: \x1b[31malice did it\x1b[0m\r\x9b2J\u2028msharefsd: CRITICAL: again"
)


def check_lines(daemon: Daemon) -> None:
    """Each line begins as the daemon begins lines, and says nothing to a terminal."""
    data = daemon.log_file.read_bytes()
    for line in data.decode(errors="surrogateescape").splitlines():
        assert re.match(r"msharefsd(\[\w+\])?: (DEBUG|INFO|WARNING|ERROR): ", line), line
    text = data.decode(errors="surrogateescape")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", text), data


def test_no_file_and_no_region_forges_a_line_of_the_log(make_walls: Make, directory: Path) -> None:
    """Where names of mallory's are told: a file that fails, a limit, what is lost."""
    limits = f'[limits.user.{MALLORY}]\nmemory = "64K"\nobjects = 3\nregions = 2\n'
    walls = make_walls(config=limits)
    daemon = walls.daemon
    daemon.expected.append(".")
    ready = os.pipe()
    file = directory / FORGED
    file.write_bytes(b"F" * 16 * PAGE)
    file.chmod(0o600)
    os.chown(file, MALLORY, MALLORY)
    strange = directory / f"dir {FORGED}"

    def provoke() -> None:
        syscalls.prctl(15, ctypes.addressof(ctypes.create_string_buffer(FORGED[:15].encode())))
        one = Bare(daemon.mount)
        name = os.open(daemon.mount / FORGED, CREATE, 0o600)
        one.uffd = userfaultfd(daemon.mount, name)
        answer = one.call(
            Op.ATTACH, name, one.uffd, **HERE, oflags=os.O_RDWR | os.O_CREAT, flags=MADE
        )
        assert answer.error == 0, answer
        one.backing, one.start, one.size = answer.fd, answer.start, answer.size
        one.map_window(mode=Mode.MISSING | Mode.WP)
        for path, more in ((file, os.O_APPEND), (file, 0), (strange / "fails", 0)):
            given = os.open(path, os.O_RDWR | more)
            assert one.mmap(0, PAGE, 3, SHARED, given).error == 0
            one.byte(0)
            one.call(Op.MSYNC, objects=((0, PAGE, 0, 0, 0),))
            one.call(Op.MUNMAP, objects=((0, PAGE, 0, 0, 0),))
        one.mmap(64 * PAGE, 256 * PAGE, 3, SHARED | ANONYMOUS)
        for page in range(64, 300, 16):
            one.byte(page * PAGE)
        for page in range(10):
            one.mmap((400 + page * 2) * PAGE, PAGE, 3, SHARED | ANONYMOUS)
        for number in range(5):
            with contextlib.suppress(OSError):
                os.close(os.open(daemon.mount / f"{FORGED}{number}", CREATE, 0o600))
        os.write(ready[1], b"x")
        signal.pause()

    with hung_at(strange):
        child = in_child(provoke, uid=MALLORY)
        os.close(ready[1])
        assert os.read(ready[0], 1) == b"x"
    for name in os.listdir("/dev/shm"):  # what a region has is gone, which is told
        os.unlink(f"/dev/shm/{name}")
    walls.killed()
    child.kill()
    walls.started()
    check_lines(daemon)
    os.close(ready[0])
    for name in os.listdir(daemon.mount):
        if name.startswith("x"):
            os.unlink(daemon.mount / name)


def test_what_is_refused_often_is_told_seldom(make_walls: Make) -> None:
    """One user's mistakes, of all kinds and for as many regions as there may be."""
    walls = make_walls()
    walls.daemon.expected.append(".")
    before = len(walls.daemon.log().splitlines())

    def err() -> None:
        for number in range(200):
            path = walls.daemon.mount / f"evil-{number}"
            proof = os.open(path, CREATE, 0o600)
            one = Bare(walls.daemon.mount)
            one.call(Op.ATTACH, proof, os.pipe()[0], oflags=os.O_RDWR | os.O_CREAT, **HERE)
            one.call(99)
            one.call(Op.COMMIT)
            one.call(Op.MMAP, objects=((0, PAGE, 0, 3, SHARED),))
            one.sock.close()
            os.unlink(path)

    assert in_child(err, uid=MALLORY).wait() == 0
    assert len(walls.daemon.log().splitlines()) - before < 50


# -- a region that is never made --


@pytest.mark.timeout(110)
@pytest.mark.parametrize("lives", [False, True])
def test_who_waits_for_a_region_that_is_never_made_is_told_so(
    lives: bool, make_walls: Make
) -> None:
    """A donor that stops, or does just enough to be alive, holds nobody up for ever.

    And who waits for it in one thread can do everything else in others, fork too.
    """
    walls = make_walls()
    path = make_name(walls.daemon, "shared", 0o666, 0)
    donating = os.pipe()

    def donate() -> None:
        one = Bare(walls.daemon.mount)
        proof = os.open(path, os.O_RDWR)
        own = userfaultfd(walls.daemon.mount, proof)
        answer = lie(one, path, own, MAPPINGS, **HERE)
        assert answer.error == 0, answer
        os.write(donating[1], b"x")
        if not lives:
            os.kill(os.getpid(), signal.SIGSTOP)
        while True:
            with contextlib.suppress(OSError):
                one.call(Op.READY)  # no progress: it is refused
            signal.sigtimedwait([], 0.2)

    child = in_child(donate, uid=MALLORY, seconds=100)
    os.close(donating[1])
    try:
        assert os.read(donating[0], 1) == b"x"
        alice = walls.victim(waits_for="shared")
        eventually(lambda: alice.check().answered > 0, "she is told", 2 * HANG_SECONDS)
        walls.all_go_on()
        alice.end()
    finally:
        child.kill()
        os.close(donating[0])
    for name in ("shared", "good"):
        os.unlink(walls.daemon.mount / name)
