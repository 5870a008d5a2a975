"""Mallory: attacks that are put into force, held, and ended.

An attack is a function that runs in a process of its own.  It does its harm, says
`evil.held()`, and when it returns the process sleeps, so what it holds stays held.  The
tests (test_walls.py) and the benchmark (benchmarks/walls.py) see what a bystander
notices of it.  Attacks speak the protocol themselves (bare.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import itertools
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bare import Answer, Bare, become

from msharefsd.control import wire
from msharefsd.control.wire import Op, RequestFlag
from msharefsd.linux import syscalls, uffd
from msharefsd.linux.uffd import Mode

SUPPORT: Final = Path(__file__).parent
MALLORY: Final = 65532
MANY_USERS: Final = range(65400, 65420)
"""Users that are all hers: subordinate ones, say (subuid(5))."""
START: Final = 0x3000_0000_0000
PAGE: Final = syscalls.PAGE
MiB: Final = 1 << 20
GiB: Final = 1 << 30
CREATE: Final = os.O_CREAT | os.O_EXCL | os.O_RDWR
SHARED, PRIVATE, ANONYMOUS = mmap.MAP_SHARED, mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS
FORCE_SECONDS: Final = 45.0
"""How long an attack may take to be in force; only a hang of its own takes longer."""
AGAIN_SECONDS: Final = 3.0
"""The same beside one that is: she may well be refused what she wants now."""
LIVES_SECONDS: Final = 110
"""After so long a process of hers ends, whatever became of who started it."""


def compile_helpers(directory: Path) -> Path:
    """hostile.c, as a library that ordinary users can load."""
    output = directory / "hostile.so"
    flags = ["-std=gnu11", "-O1", "-shared", "-fPIC", "-Wl,-z,now", "-Wall", "-Werror"]
    subprocess.run(
        ["cc", *flags, "-o", str(output), str(SUPPORT / "hostile.c"), "-pthread"], check=True
    )
    return output


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.storm.argtypes = [pointer, size, size, number, number, number]
    library.once.argtypes = [pointer, size, size]
    library.look.argtypes = [ctypes.c_char_p, number, number]
    library.allocate.argtypes = [number, size, number]
    library.execute_for_ever.argtypes = [
        *(ctypes.c_char_p, pointer, number),
        *(ctypes.c_char_p, size, number, number),
        *(ctypes.c_char_p, size),
    ]
    return library


def userfaultfd(mount: Path, proof: int) -> int:
    """One of the caller's, made with the device that the daemon hands to sharers."""
    one = Bare(mount)
    try:
        answer = one.call(Op.USERFAULTFD, proof)
    finally:
        one.sock.close()
    if answer.error or answer.fd < 0:
        raise OSError(answer.error or errno.EPERM, f"no device: {answer.message}")
    try:
        return fcntl.ioctl(answer.fd, uffd.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(answer.fd)


def message(op: Op, *objects: tuple[int, int, int, int, int], **fields: int) -> bytes:
    """A request as it goes over the socket."""
    start, size = fields.get("start", 0), fields.get("size", 0)
    oflags, flags = fields.get("oflags", 0), fields.get("flags", 0)
    head = (wire.MAGIC, wire.VERSION, op, start, size, oflags, flags, len(objects), 0, 0)
    number = fields.get("userfaultfd", 0)
    return wire.REQUEST.pack(*head, number) + b"".join(wire.OBJECT.pack(*each) for each in objects)


def lingering(seconds: int = 60) -> int:
    """A TCP socket whose last close waits so long, as nobody reads what it has sent."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        sender = socket.socket()
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sender.connect(listener.getsockname())
        peer, _ = listener.accept()
    _kept.append(peer)
    sender.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sender.send(b"x" * 65536)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    return sender.detach()


def let_go(*fds: int) -> None:
    """Close them, in threads: whoever is the last to close one waits."""
    for fd in fds:
        in_thread(lambda fd=fd: os.close(fd))  # type: ignore[misc] # a default


_kept: list[object] = []
"""What an attack needs as long as it is held."""


def in_socket(fd: int) -> int:
    """A socket with an unread message that carries `fd`, which is closed with it."""
    here, there = socket.socketpair()
    socket.send_fds(here, [b"x"], [fd])
    here.close()
    os.close(fd)
    return there.detach()


def in_thread(function: Callable[[], object]) -> None:
    threading.Thread(target=function, daemon=True).start()


def also(function: Callable[[], object], uid: int = 0) -> int:
    """Run `function` in one more process of the attack; its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if uid:
            become(uid)
        _ends_with_parent()
        function()
        while True:
            signal.pause()
    except BaseException:  # noqa: BLE001 - the attack must not go on here
        traceback.print_exc()
    os._exit(1)


def at_once(evil: Evil, prepares: Sequence[Callable[[], Callable[[], object]]]) -> None:
    """A process for each: what its `prepare` returns is done when all are prepared.

    One that begins while others of hers attack already may be the one whom they hold up.
    """
    prepared, ready = os.pipe()
    may_begin, begin = os.pipe()
    begun, has_begun = os.pipe()

    def one(prepare: Callable[[], Callable[[], object]]) -> None:
        act = prepare()
        os.write(ready, b"x")
        os.read(may_begin, 1)
        act()
        os.write(has_begun, b"x")

    for each in prepares:
        also(lambda prepare=each: one(prepare))  # type: ignore[misc] # a default
    for _ in prepares:
        os.read(prepared, 1)
    os.write(begin, bytes(len(prepares)))
    for _ in prepares:
        os.read(begun, 1)


def _ends_with_parent() -> None:
    pr_set_pdeathsig = 1
    syscalls.prctl(pr_set_pdeathsig, signal.SIGKILL)
    signal.alarm(LIVES_SECONDS)


class Attached(Bare):
    """A connection that has attached a region."""

    name = ""


@contextlib.contextmanager
def hung_at(path: Path) -> Iterator[None]:
    """A file system that everybody may use and that does not answer: see hung.py."""
    path.mkdir()
    with subprocess.Popen(
        [sys.executable, SUPPORT / "hung.py", path], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            server.kill()
            server.wait()
            syscalls.umount(str(path), syscalls.MNT_DETACH)
            path.rmdir()


@dataclass
class Evil:
    """What an attack has to work with, in its process."""

    mount: Path
    directory: Path
    """Hers; files in it are hers."""
    helpers: Path
    hung: Path | None
    """A file system that does not answer: see hung.py."""
    ready: int
    alice: str = "good"
    """The name of a region that mallory may read."""
    mildly: bool = False
    """With fewer threads: a load, but none that a slow machine has to be forgiven for."""
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def some(self, threads: int) -> int:
        """So many, or a few."""
        return max(2, threads // 32) if self.mildly else threads

    @property
    def c(self) -> ctypes.CDLL:
        """The functions of hostile.c."""
        return _load(self.helpers)

    def held(self) -> None:
        """From here on the attack is in force."""
        os.write(self.ready, b"x")

    def create(self, size: int = 2 * MiB, mode: int = 0o600, *, window: bool = True) -> Attached:
        """A region of mallory's, attached."""
        number = next(self.numbers)
        one = Attached(self.mount)
        name = f"evil-{os.getpid()}-{number}"
        file = os.open(self.mount / name, CREATE, 0o600)
        os.chmod(self.mount / name, mode)
        one.uffd = userfaultfd(self.mount, file)
        answer = one.call(
            Op.ATTACH,
            file,
            one.uffd,
            start=START + (number << 36),
            size=size,
            oflags=os.O_RDWR | os.O_CREAT,
            flags=RequestFlag.MADE_FILE,
        )
        os.close(file)
        return self._attached(one, answer, name, window=window)

    def join(self, name: str, oflags: int = os.O_RDWR, *, window: bool = True) -> Attached:
        """Attach a region that is there."""
        one = Attached(self.mount)
        proof = os.open(self.mount / name, oflags)
        one.uffd = userfaultfd(self.mount, proof)
        flags = RequestFlag.AS_IT_LIES
        answer = one.call(Op.ATTACH, proof, one.uffd, oflags=oflags, flags=flags)
        os.close(proof)
        return self._attached(one, answer, name, window=window)

    @staticmethod
    def _attached(one: Attached, answer: Answer, name: str, *, window: bool) -> Attached:
        if answer.error:
            raise OSError(answer.error, answer.message, name)
        one.backing, one.start, one.size = answer.fd, answer.start, answer.size
        one.name = name
        if window:
            open_window(one)
        _kept.append(one)
        return one

    def read(self) -> Attached:
        """Attach alice's region, which mallory may read."""
        return self.join(self.alice, os.O_RDONLY)

    def trap(self) -> int:
        """The address of a page of ours whose first touch waits for ever."""
        proof = os.open(self.mount / f"evil-{os.getpid()}-{next(self.numbers)}", CREATE, 0o600)
        own = userfaultfd(self.mount, proof)
        os.close(proof)
        uffd.handshake(own, uffd.Feature(0))
        at = syscalls.mmap(None, PAGE, 3, PRIVATE | ANONYMOUS, -1, 0)
        uffd.register(own, at, PAGE, Mode.MISSING)
        return at

    def hung_page(self) -> int:
        """The address of a page of a file whose file system does not answer."""
        assert self.hung is not None
        file = os.open(self.hung / "hangs", os.O_RDONLY)
        return syscalls.mmap(None, PAGE, 1, PRIVATE, file, 0)

    def file(self, name: str, size: int = MiB) -> Path:
        """A file of hers."""
        path = self.directory / f"{name}-{os.getpid()}-{next(self.numbers)}"
        path.write_bytes(b"E" * size)
        return path


def open_window(one: Bare) -> None:
    """Map a region where it lies; a reader's window is private, as libmshare makes it."""
    writes = fcntl.fcntl(one.backing, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    kind = SHARED if writes else PRIVATE
    flags = kind | syscalls.MAP_FIXED | syscalls.MAP_NORESERVE
    syscalls.mmap(one.start, one.size, 3, flags, one.backing, 0)
    uffd.register(one.uffd, one.start, one.size, Mode.MISSING | Mode.WP)


def bytes_at(address: int, length: int = PAGE) -> ctypes.Array[ctypes.c_char]:
    """Memory, for system calls."""
    return (ctypes.c_char * length).from_address(address)


@dataclass(frozen=True, slots=True)
class Attack:
    """One of them."""

    name: str
    act: Callable[[Evil], object]
    runnable: int
    """How many of its threads compute, so that plain ones can be compared with it."""
    needs_hung: bool = False
    as_root: bool = False
    """It becomes mallory itself."""
    on_alice: bool = False
    """It needs a region of alice's that mallory may read."""
    writes: bool = False
    """And that mallory may write."""
    config: str = ""
    """What an administrator might have set."""
    expected: tuple[str, ...] = ()
    """What the daemon may say of it in its log."""


ATTACKS: Final[dict[str, Attack]] = {}


def attack(
    name: str,
    *expected: str,
    runnable: int = 1,
    needs_hung: bool = False,
    as_root: bool = False,
    on_alice: bool = False,
    writes: bool = False,
    config: str = "",
) -> Callable[[Callable[[Evil], object]], Callable[[Evil], object]]:
    """Enter a function among the attacks."""

    def enter(act: Callable[[Evil], object]) -> Callable[[Evil], object]:
        assert name not in ATTACKS
        who = needs_hung, as_root, on_alice, writes
        ATTACKS[name] = Attack(name, act, runnable, *who, config, expected)
        return act

    return enter


class Held:
    """An attack in force."""

    def __init__(
        self,
        attack: Attack,
        mount: Path,
        directory: Path,
        helpers: Path,
        *,
        mildly: bool,
        uid: int = MALLORY,
    ) -> None:
        self.attack = attack
        self.mildly = mildly
        self.uid = uid
        self.mount = mount
        self.directory = directory / f"mallory-{uid}"
        self.helpers = helpers
        self.hung: Path | None = None
        self._server = contextlib.ExitStack()
        self._groups: list[int] = []
        self._ready: list[int] = []
        self.directory.mkdir(exist_ok=True)
        os.chown(self.directory, uid, uid)
        if attack.needs_hung:
            self.hung = directory / f"hung-{os.urandom(4).hex()}"
            self._server.enter_context(hung_at(self.hung))

    def again(self, seconds: float = AGAIN_SECONDS) -> bool:
        """Put it into force once more, by another process; whether any says so in time."""
        ready, said = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ready)
            self._attack(said)
        os.close(said)
        os.set_blocking(ready, False)
        self._server.callback(os.close, ready)
        self._ready.append(ready)
        self._groups.append(pid)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        deadline = time.monotonic() + seconds
        while not any(map(_says_so, self._ready)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def _attack(self, said: int) -> None:
        try:
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            if not self.attack.as_root:
                become(self.uid)
            _ends_with_parent()
            where = (self.mount, self.directory, self.helpers, self.hung)
            self.attack.act(Evil(*where, said, mildly=self.mildly))
            while True:
                signal.pause()
        except BaseException:  # noqa: BLE001 - whoever forked us must not go on here
            traceback.print_exc()
        finally:
            os._exit(1)

    def lives(self) -> bool:
        """Whether none of its processes has ended by itself."""
        return not any(os.waitpid(pid, os.WNOHANG)[0] for pid in self._groups)

    def end(self) -> None:
        """End every process of it."""
        for pid in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        # A process in a request that was never answered goes when its server has gone.
        self._server.close()
        for pid in self._groups:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._groups.clear()

    def clear(self) -> None:
        """Take her names away, as an administrator would."""
        for name in os.listdir(self.mount):
            if name.startswith("evil"):
                os.unlink(self.mount / name)


def _says_so(ready: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return os.read(ready, 1) == b"x"
    return False


@contextlib.contextmanager
def held(
    attack: Attack,
    mount: Path,
    directory: Path,
    helpers: Path,
    *,
    mildly: bool = False,
    uid: int = MALLORY,
) -> Iterator[Held]:
    """An attack in force, which is over at the end whatever happens."""
    one = Held(attack, mount, directory, helpers, mildly=mildly, uid=uid)
    try:
        # An attack on its own address space may be the first whom it holds up.
        if not any(one.again(FORCE_SECONDS) for _ in range(2)):
            raise AssertionError(f"the attack did not come into force: {attack.name}")
        yield one
    finally:
        one.end()


# -- what is closed waits: a socket with SO_LINGER --


@attack("a lingering socket as one descriptor too many")
def linger_third(evil: Evil) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    one = Bare(evil.mount)
    one.send(b"hello", null, null, lingering())
    # With what is a request, and in the second message of a connection.
    two = Bare(evil.mount)
    two.send(message(Op.READY))
    fds = [lingering() for _ in range(3)]
    two.send(message(Op.READY), *fds)
    let_go(*fds)
    _kept.extend((one, two))
    evil.held()


@attack("as many lingering sockets as a message can carry")
def linger_253(evil: Evil) -> None:
    fds = [lingering() for _ in range(40)]
    more = [os.dup(fds[0]) for _ in range(213)]
    for data in (b"hello", message(Op.USERFAULTFD), message(Op.ATTACH), b""):
        one = Bare(evil.mount)
        one.send(data, *fds, *more)
        _kept.append(one)
    let_go(*fds, *more)
    evil.held()


@attack("lingering sockets inside sockets")
def linger_nested(evil: Evil) -> None:
    for count in (1, 2, 3, 100):
        one = Bare(evil.mount)
        fds = [in_socket(in_socket(lingering())) for _ in range(count)]
        one.send(message(Op.USERFAULTFD), *fds)
        let_go(*fds)
        _kept.append(one)
    evil.held()


@attack("lingering sockets where each operation has its descriptors")
def linger_in_place(evil: Evil) -> None:
    for op in Op:
        one = evil.create(window=False)
        item = [(0, PAGE, 0, 3, SHARED)] if op in wire._ONE_OBJECT else []
        fds = lingering(), lingering()
        one.send(message(op, *item), *fds)
        other = Bare(evil.mount)
        other.send(message(op, *item), fds[0])
        third = Bare(evil.mount)
        third.send(message(op, *item), os.open("/dev/null", os.O_RDONLY), fds[1])
        _kept.extend((other, third))
        let_go(*fds)
    evil.held()


def building(evil: Evil) -> str:
    """The name of a region that mallory begins to make and never ends."""
    name = f"evil-{os.getpid()}-{next(evil.numbers)}"
    donor = Bare(evil.mount)
    file = os.open(evil.mount / name, CREATE, 0o600)
    answer = donor.call(
        Op.ATTACH,
        file,
        userfaultfd(evil.mount, file),
        start=START + (next(evil.numbers) << 36),
        size=2 * MiB,
        oflags=os.O_RDWR | os.O_CREAT,
        flags=RequestFlag.HAS_MAPPINGS,
    )
    assert answer.error == 0, answer
    _kept.append(donor)
    return name


@attack("lingering sockets in messages that nobody reads any more")
def linger_unread(evil: Evil) -> None:
    name = building(evil)
    null = os.open("/dev/null", os.O_RDONLY)
    fds = [lingering() for _ in range(8)]
    proof = os.open(evil.mount / name, os.O_RDWR)
    attach = message(Op.ATTACH, oflags=os.O_RDWR, flags=RequestFlag.AS_IT_LIES)
    for each in fds:
        # It waits for the region, and what comes after it is not read; then it dies.
        def wait_and_die(fd: int = each) -> None:
            one = Bare(evil.mount)
            one.send(attach, proof, userfaultfd(evil.mount, proof))
            for _ in range(3):
                one.send(b"more", fd)
                one.send(b"more", null, null, fd)
            let_go(*fds)
            time.sleep(0.2)
            os._exit(0)

        also(wait_and_die)
    time.sleep(0.2)
    let_go(*fds)
    time.sleep(0.3)
    evil.held()


@attack("lingering sockets of who hangs up before being accepted", runnable=2)
def linger_pending(evil: Evil) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    for _ in range(100):
        one = Bare(evil.mount)
        fd = lingering()
        # The kernel lets nobody have more under way than they may have open.
        with contextlib.suppress(OSError):
            for fds in ((fd,), (null, null, fd), (null,) * 200 + (fd,)):
                one.send(b"", *fds)
                one.send(b"half", *fds)
        let_go(fd)
        one.sock.close()
    evil.held()


@attack(
    "lingering sockets of who is refused",
    r"may have \d+ connections",
    config=f"[limits.user.{MALLORY}]\nconnections = 4\n",
)
def linger_refused(evil: Evil) -> None:
    _kept.extend(Bare(evil.mount) for _ in range(4))
    for _ in range(20):
        one = Bare(evil.mount)
        fds = [lingering() for _ in range(3)]
        with contextlib.suppress(OSError):
            one.send(b"hello", fds[0])
            one.send(b"hello", *fds)
            one.send(b"", *fds)
        let_go(*fds)
        _kept.append(one)
    evil.held()


@attack("odd descriptors as one too many", needs_hung=True)
def odd_third(evil: Evil) -> None:
    assert evil.hung is not None
    io_uring_setup = 425
    ring = int(ctypes.CDLL(None).syscall(io_uring_setup, 8, bytes(120)))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 65536)
    registered = evil.create(window=True)
    odd = [
        os.open(evil.hung / "hangs", os.O_RDONLY),
        os.open(evil.hung / "full", os.O_RDWR),
        registered.uffd,
        os.pidfd_open(os.getpid()),
        writer,
        reader,
        os.open("/proc/self/mem", os.O_RDWR),
        os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY),
        os.eventfd(0),
        os.memfd_create("x"),
    ] + ([ring] if ring >= 0 else [])
    null = os.open("/dev/null", os.O_RDONLY)
    for fd in odd:
        for data in (b"hello", message(Op.ATTACH), message(Op.USERFAULTFD), b""):
            one = Bare(evil.mount)
            with contextlib.suppress(OSError):  # too many that nobody has received
                one.send(data, null, null, fd)
                one.send(data, *[fd] * 100)
            _kept.append(one)
    evil.held()


def closing(evil: Evil) -> int:
    """A file whose server does not answer when it is closed, by whoever has it, however often."""
    assert evil.hung is not None
    return os.open(evil.hung / "closes", os.O_RDWR)


@attack(
    "files whose server does not answer when they are closed",
    f"user {MALLORY} makes no connections",
    needs_hung=True,
)
def hung_close(evil: Evil) -> None:
    file, null = closing(evil), os.open("/dev/null", os.O_RDONLY)
    for data in (b"hello", message(Op.ATTACH), message(Op.USERFAULTFD), b""):
        for fds in ((file,), (null, null, file), (file,) * 100):
            one = Bare(evil.mount)
            one.send(data, *fds)
            _kept.append(one)
    evil.held()


@attack("subordinate users, each with a lingering socket and a lock", as_root=True, runnable=8)
def many_users(evil: Evil) -> None:
    reader, writer = os.pipe()
    mine = evil.ready

    def one() -> None:
        evil.ready = writer
        linger_third(evil)
        inode_lock(evil)

    for uid in MANY_USERS:
        also(one, uid)
    said, deadline = 0, time.monotonic() + AGAIN_SECONDS
    os.set_blocking(reader, False)
    # Whoever is held up by another of them is no less in force.
    while said < 2 * len(MANY_USERS) and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            said += len(os.read(reader, 100))
        time.sleep(0.01)
    become(MALLORY)
    os.write(mine, b"x")


# -- the backing's own lock --


def ask_all(evil: Evil, first: Attached) -> None:
    """Everything that has the daemon look at the backing, each on a connection of its own."""
    page = (0, PAGE, 0, 0, 0)
    for op in (Op.MUNMAP, Op.MPROTECT, Op.DISCARD, Op.MSYNC, Op.READY, Op.DETACH):
        one = evil.join(first.name, window=False)
        item = [] if op in (Op.READY, Op.DETACH) else [page]
        one.send(message(op, *item))
    one = evil.join(first.name, window=False)
    anonymous = SHARED | ANONYMOUS | syscalls.MAP_FIXED
    one.send(message(Op.MMAP, (0, PAGE, 0, 1, anonymous)))


def fault_all(one: Bare) -> None:
    """Faults of every kind, which nobody has to answer."""
    in_thread(lambda: one.byte(PAGE))
    in_thread(lambda: one.byte(one.size - PAGE))


@attack("a write to the backing whose source is never there: its inode's lock")
def inode_lock(evil: Evil) -> None:
    one = evil.create()
    one.mmap(0, one.size, 3, SHARED | ANONYMOUS)
    source = bytes_at(evil.trap())
    os.pwrite(one.backing, b"x" * PAGE, 0)
    in_thread(lambda: os.pwrite(one.backing, source, 0))
    time.sleep(0.2)
    evil.held()
    fault_all(one)
    ask_all(evil, one)


@attack("the same while everything is already asked for")
def inode_lock_late(evil: Evil) -> None:
    one = evil.create()
    one.mmap(0, one.size, 3, SHARED | ANONYMOUS)
    source = bytes_at(evil.trap())
    others = [evil.join(one.name, window=False) for _ in range(40)]
    in_thread(lambda: os.pwrite(one.backing, source, 0))
    for number, other in enumerate(others):
        op = (Op.MUNMAP, Op.MPROTECT, Op.DISCARD)[number % 3]
        other.send(message(op, (number * PAGE, PAGE, 0, 0, 0)))
    evil.held()
    fault_all(one)


@attack("a write to the backing from a file that does not answer", needs_hung=True)
def inode_lock_hung(evil: Evil) -> None:
    one = evil.create()
    one.mmap(0, one.size, 3, SHARED | ANONYMOUS)
    source = bytes_at(evil.hung_page())
    in_thread(lambda: os.pwrite(one.backing, source, 0))
    time.sleep(0.2)
    evil.held()
    fault_all(one)
    ask_all(evil, one)


@attack("the backing allocated and freed for ever", runnable=2)
def allocating(evil: Evil) -> None:
    one = evil.create(4 * GiB)
    one.mmap(0, GiB // 4, 3, SHARED | ANONYMOUS)
    evil.c.allocate(one.backing, GiB // 4, 2)
    evil.held()
    fault_all(one)
    while True:
        with contextlib.suppress(TimeoutError):
            one.call(Op.MUNMAP, objects=((2 * GiB, PAGE, 0, 0, 0),))
        time.sleep(0.01)


@attack("the backing truncated for ever", "no memory for a fault", "was cut to", runnable=2)
def truncating(evil: Evil) -> None:
    one = evil.create(GiB)
    one.mmap(0, GiB, 3, SHARED | ANONYMOUS)

    def truncate() -> None:
        while True:
            os.ftruncate(one.backing, 0)
            os.ftruncate(one.backing, 1 << 50)

    in_thread(truncate)
    evil.held()
    while True:
        with contextlib.suppress(OSError):
            one.byte(next(evil.numbers) * PAGE % one.size)
            one.call(Op.MPROTECT, objects=((0, GiB, 0, 0, 0),))
            one.call(Op.MPROTECT, objects=((0, GiB, 0, 3, 0),))


@attack("many who look for holes in a large backing", runnable=16)
def seeking(evil: Evil) -> None:
    one = evil.create(2 * GiB, 0o644)
    one.mmap(0, GiB // 4, 3, SHARED | ANONYMOUS)
    os.posix_fallocate(one.backing, 0, GiB // 4)
    evil.c.seek(one.backing, evil.some(16))
    evil.held()
    while True:
        with contextlib.suppress(TimeoutError):
            one.mmap(GiB, PAGE, 3, SHARED | ANONYMOUS)
            one.byte(GiB)


# -- the address space's own lock --


def hold_address_space(evil: Evil, *then: Callable[[], object]) -> None:
    """Have this process's mmap_lock taken, for reading, for ever.

    No thread can be made after that: `then` is done by threads that are there.
    """
    at = evil.hung_page()
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    go = threading.Event()
    for each in then:
        in_thread(lambda each=each: (go.wait(), each()))  # type: ignore[misc] # a default
    in_thread(lambda: os.pread(memory, 1, at))
    time.sleep(0.3)
    go.set()


@attack("the address space's lock, by /proc/self/mem", needs_hung=True)
def address_space_lock(evil: Evil) -> None:
    _lock_address_space(evil, _to_be_locked(evil))
    evil.held()


def _to_be_locked(evil: Evil) -> Attached:
    one = evil.create()
    one.mmap(0, one.size, 3, SHARED | ANONYMOUS)
    return one


def _lock_address_space(evil: Evil, one: Attached) -> None:
    anonymous = SHARED | ANONYMOUS | syscalls.MAP_FIXED
    read_only = message(Op.MMAP, (0, PAGE, 0, 1, anonymous))  # it is armed
    hold_address_space(evil, lambda: one.byte(4 * PAGE), lambda: one.byte(one.size - PAGE))
    one.send(read_only)


@attack("the same in all that a process forks", needs_hung=True)
def address_space_locks(evil: Evil) -> None:
    def prepare() -> Callable[[], None]:
        one = _to_be_locked(evil)
        return lambda: _lock_address_space(evil, one)

    at_once(evil, [prepare] * 6)
    evil.held()


@attack("the address space's lock, by a debugger", needs_hung=True)
def address_space_lock_debugged(evil: Evil) -> None:
    """PTRACE_PEEKDATA: who is read is not the one that hangs."""
    said = evil.ready
    reader, evil.ready = os.pipe()
    page = mmap.mmap(-1, PAGE)

    def debugged() -> None:
        pr_set_ptracer = 0x59616D61
        with contextlib.suppress(OSError):
            syscalls.prctl(pr_set_ptracer, (1 << 64) - 1)
        one = evil.create()
        one.mmap(0, one.size, 3, SHARED | ANONYMOUS)
        page[:8] = struct.pack("=Q", evil.hung_page())
        os.write(evil.ready, b"x")
        # The debugger stops us: what is to be asked, another process of ours asks.
        anonymous = SHARED | ANONYMOUS | syscalls.MAP_FIXED

        def ask() -> None:
            time.sleep(0.5)
            one.send(message(Op.MMAP, (0, PAGE, 0, 1, anonymous)))

        also(ask)

    pid = also(debugged)
    os.read(reader, 1)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    peek, seize, interrupt, go_on = 2, 0x4206, 0x4207, 7
    (at,) = struct.unpack("=Q", page[:8])

    def debug() -> None:
        libc.ptrace(seize, pid, 0, 0)
        libc.ptrace(interrupt, pid, 0, 0)
        os.waitpid(pid, os.WUNTRACED)
        libc.ptrace(peek, pid, at, 0)
        libc.ptrace(go_on, pid, 0, 0)

    in_thread(debug)
    time.sleep(0.7)
    os.write(said, b"x")


@attack("the address space's lock, and a connection that has attached nothing", needs_hung=True)
def address_space_lock_bare(evil: Evil) -> None:
    one = Bare(evil.mount)
    at = syscalls.mmap(None, PAGE, 3, SHARED | ANONYMOUS, -1, 0)
    # A writer that waits keeps readers out as well.
    look = message(Op.VMA_FILE, start=at, size=PAGE)
    hold_address_space(evil, lambda: syscalls.mmap(None, PAGE, 1, PRIVATE | ANONYMOUS, -1, 0))
    time.sleep(0.1)
    one.send(look)
    evil.held()


@attack("the locks of a process that executes a program for ever", needs_hung=True)
def executing(evil: Evil) -> None:
    one = evil.create(window=False)
    proof = os.open(evil.mount / one.name, os.O_RDWR)
    own = userfaultfd(evil.mount, proof)
    attach = message(Op.ATTACH, oflags=os.O_RDWR, flags=RequestFlag.AS_IT_LIES, userfaultfd=own)
    more = message(Op.VMA_FILE, start=one.start, size=PAGE)
    hung = evil.hung_page()
    memory = os.open("/proc/self/mem", os.O_RDONLY)

    def say() -> None:
        time.sleep(1.5)  # it can say nothing itself when it holds its locks
        evil.held()

    also(say)
    evil.c.execute_for_ever(
        os.fsencode(evil.mount / ".control"), hung, memory,
        attach, len(attach), proof, own, more, len(more),
    )  # fmt: skip


@attack("sharers that dump core and die, again and again", runnable=3)
def dumping(evil: Evil) -> None:
    one = evil.create(64 * MiB)
    one.mmap(0, 16 * MiB, 3, SHARED | ANONYMOUS)
    os.chdir(evil.directory)
    resource.setrlimit(resource.RLIMIT_CORE, (MiB, MiB))

    def die() -> None:
        mine = evil.join(one.name)
        mine.byte(0)
        in_thread(lambda: mine.byte(MiB))
        os.abort()

    def dies() -> None:
        faulthandler.disable()  # pytest's: this is no failure of a test
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        while True:
            pid = also(die)
            os.waitpid(pid, 0)

    for _ in range(3):
        also(dies)
    evil.held()


# -- files of hers --


@attack("a mapped file whose server does not answer", "cannot read", needs_hung=True)
def hung_file(evil: Evil) -> None:
    assert evil.hung is not None
    one = evil.create()
    for number in range(20):
        file = os.open(evil.hung / "hangs", os.O_RDONLY)
        one.mmap(number * 2 * PAGE, PAGE, 1, PRIVATE, file)
        os.close(file)
        in_thread(lambda at=number * 2 * PAGE: one.byte(at))  # type: ignore[misc] # a default
    time.sleep(0.2)
    evil.held()
    one.send(message(Op.MUNMAP, (0, PAGE, 0, 0, 0)))


@attack(
    "a mapped file whose server does not take what was written",
    "cannot|is gone with",
    needs_hung=True,
)
def hung_write(evil: Evil) -> None:
    assert evil.hung is not None
    one = evil.create()
    for number in range(6):  # of the eight threads that she has: then she waits for herself
        file = os.open(evil.hung / "full", os.O_RDWR)
        at = number * 2 * PAGE
        one.mmap(at, PAGE, 3, SHARED, file)
        os.close(file)
        ctypes.memset(one.start + at, 7, PAGE)
        other = evil.join(one.name, window=False)
        other.send(message(Op.MSYNC, (at, PAGE, 0, 0, 0)))
    time.sleep(0.2)
    evil.held()


@attack("the lock of a mapped file's own inode", "cannot")
def file_lock(evil: Evil) -> None:
    path = evil.file("locked")
    one = evil.create()
    file = os.open(path, os.O_RDWR)
    one.mmap(0, 16 * PAGE, 3, SHARED, file)
    ctypes.memset(one.start, 7, PAGE)
    source = bytes_at(evil.trap())
    in_thread(lambda: os.pwrite(file, source, 4 * PAGE))
    time.sleep(0.2)
    for op in (Op.MSYNC, Op.MUNMAP):
        other = evil.join(one.name, window=False)
        other.send(message(op, (0, PAGE, 0, 0, 0)))
    time.sleep(0.1)
    evil.held()
    in_thread(lambda: one.byte(8 * PAGE))


@attack("a lease on a file that the daemon has to open anew", "cannot")
def leased_file(evil: Evil) -> None:
    one = evil.create()
    for number, flag in enumerate((os.O_APPEND, os.O_DIRECT)):
        path = evil.file("leased")
        first = os.open(path, os.O_RDWR | flag)
        at = number * 64 * PAGE
        one.mmap(at, 16 * PAGE, 3, SHARED, first)
        os.close(first)
        # Only a file that nobody else has open can be leased for writing.
        for how in (fcntl.F_RDLCK, fcntl.F_WRLCK):
            with contextlib.suppress(OSError):
                lease = os.open(path, os.O_RDONLY)
                _kept.append(lease)
                fcntl.fcntl(lease, fcntl.F_SETLEASE, how)
        in_thread(lambda at=at: one.byte(at))  # type: ignore[misc] # a default
        in_thread(lambda at=at: one.byte(at + 8 * PAGE))  # type: ignore[misc] # a default
    evil.held()
    one.send(message(Op.MSYNC, (0, PAGE, 0, 0, 0)))


@attack("one file mapped thousands of times, and all of it written to")
def many_mappings(evil: Evil) -> None:
    count = 4000
    one = evil.create(GiB)
    file = os.open(evil.file("mapped", 2 * PAGE), os.O_RDWR)
    for number in range(count):
        answer = one.mmap(2 * number * PAGE, PAGE, 3, SHARED, file)
        if answer.error:
            break  # she may not have so many: as good
    evil.c.once(one.start, count, 2 * PAGE)
    evil.held()
    while True:
        evil.c.once(one.start, count, 2 * PAGE)
        time.sleep(0.5)


# -- much to do at once --


def scattered(evil: Evil, pages: int, prot: int = 3) -> Attached:
    """A region of which every second page is there."""
    one = evil.create(4 * GiB, window=False)
    assert one.mmap(0, 4 * GiB, prot, SHARED | ANONYMOUS).error == 0
    for page in range(pages):
        os.pwrite(one.backing, b"x", page * 2 * PAGE)
    return one


@attack("thirty thousand single pages that are hidden")
def hiding(evil: Evil) -> None:
    one = scattered(evil, 30000)
    others = [evil.join(one.name, window=False) for _ in range(2)]
    for other in (one, *others):
        other.send(message(Op.MPROTECT, (0, 60000 * PAGE, 0, 0, 0)))
    evil.held()


@attack("READY of many, where much is protected")
def much_ready(evil: Evil) -> None:
    one = scattered(evil, 10000, prot=1)
    many = [evil.join(one.name, window=False) for _ in range(60)]
    evil.held()
    ready = message(Op.READY)
    for other in many:
        other.sock.setblocking(False)
    while True:
        for other in many:
            with contextlib.suppress(OSError):
                other.send(ready)
                other.sock.recv(4096)
        time.sleep(0.001)


@attack("one mprotect over thousands of objects")
def many_objects(evil: Evil) -> None:
    count = 3000
    one = evil.create(2 * GiB, window=False)
    for number in range(count):
        one.mmap(number * PAGE, PAGE, 1 + 2 * (number % 2), SHARED | ANONYMOUS)
    evil.held()
    for prot in itertools.cycle((3, 1, 0)):
        with contextlib.suppress(TimeoutError):
            one.call(Op.MPROTECT, objects=((0, count * PAGE, 0, prot, 0),))


@attack("holes touched once each, by one attachment after another", runnable=2)
def poisoning(evil: Evil) -> None:
    one = evil.create(512 * MiB, window=False)
    evil.held()
    for _ in range(20):
        other = evil.join(one.name)
        evil.c.once(other.start, 65536, PAGE)
        syscalls.munmap(other.start, other.size)


@attack("faults of 64 threads", runnable=64)
def fault_storm(evil: Evil) -> None:
    one = evil.create(512 * MiB)
    one.mmap(0, 256 * MiB, 3, SHARED | ANONYMOUS)
    evil.c.storm(one.start, 256 * MiB, 1 << 16, evil.some(64), one.backing, 0)
    evil.held()


@attack("system calls of 64 threads on holes", runnable=64)
def hole_storm(evil: Evil) -> None:
    one = evil.create(512 * MiB)
    evil.c.storm(one.start, 256 * MiB, 1 << 16, evil.some(64), -1, 1)
    evil.held()


@attack("a thousand threads in a pid namespace, of which eight touch", as_root=True, runnable=8)
def threads_in_namespace(evil: Evil) -> None:
    """As root: anybody may, in a user namespace of theirs, where those are allowed."""
    clone_newpid = 0x20000000
    syscalls.unshare(clone_newpid)

    def inside() -> None:
        become(MALLORY)
        one = evil.create(64 * MiB)
        one.mmap(0, 32 * MiB, 1, SHARED | ANONYMOUS)
        evil.c.idle(1000)
        evil.c.storm(one.start, 16 * MiB, PAGE, 8, -1, 1)
        evil.held()

    also(inside)


@attack("150 threads that read the counters", runnable=150)
def metrics_storm(evil: Evil) -> None:
    evil.c.look(os.fsencode(evil.mount / ".metrics"), 0, evil.some(150))
    evil.held()


@attack("150 threads that list and read what regions have", runnable=150)
def texts_storm(evil: Evil) -> None:
    one = evil.create(GiB, 0o644, window=False)
    for number in range(3000):
        one.mmap(number * 2 * PAGE, PAGE, 3, SHARED | ANONYMOUS)
    name = one.name
    also(lambda: evil.c.look(os.fsencode(evil.mount / ".regions"), 1, evil.some(50)))
    also(lambda: evil.c.look(os.fsencode(evil.mount), 1, evil.some(50)))
    evil.c.look(os.fsencode(evil.mount / ".regions" / name / "maps"), 0, evil.some(50))
    evil.held()


@attack("names made and removed by many", r"may have \d+ regions", runnable=8)
def names_storm(evil: Evil) -> None:
    def make() -> None:
        for number in itertools.count():
            path = evil.mount / f"evil-{os.getpid()}-{number % 50}"
            with contextlib.suppress(OSError):
                os.close(os.open(path, CREATE, 0o600))
            with contextlib.suppress(OSError):
                os.unlink(path)

    for _ in range(evil.some(8)):
        also(make)
    evil.held()


@attack("connections that come and go with half of a message", runnable=8)
def half_messages(evil: Evil) -> None:
    whole = message(Op.MMAP, (0, PAGE, 0, 3, SHARED))
    null = os.open("/dev/null", os.O_RDONLY)
    long = b"x" * (wire.MAX_REQUEST_BYTES + 100)

    def come_and_go() -> None:
        for number in itertools.count():
            with contextlib.suppress(OSError):
                one = Bare(evil.mount)
                one.send(b"")
                one.sock.close()
                one = Bare(evil.mount)
                one.send(whole[: number % len(whole)], *[null] * (number % 4))
                one.send(long, null)
                one.sock.shutdown(number % 3)
                one.send(whole)
                one.sock.close()

    for _ in range(evil.some(8)):
        also(come_and_go)
    evil.held()


@attack("thousands of connections that say nothing", r"may have \d+ connections")
def silent(evil: Evil) -> None:
    for _ in range(3000):
        try:
            _kept.append(Bare(evil.mount))
        except OSError:
            break
    evil.held()


# -- userfaultfds that are not as they were --


@attack("userfaultfds whose O_NONBLOCK is taken away", runnable=1)
def blocking(evil: Evil) -> None:
    one = evil.create(window=False)
    many = [evil.join(one.name, window=False) for _ in range(200)]
    for each in (one, *many):
        os.set_blocking(each.uffd, True)
    evil.held()
    os.kill(os.getpid(), signal.SIGSTOP)


@attack("a window that is moved for ever", runnable=2)
def moving(evil: Evil) -> None:
    one = evil.create(64 * MiB)
    one.mmap(0, 32 * MiB, 3, SHARED | ANONYMOUS)
    libc = ctypes.CDLL(None)
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    libc.mremap.restype = ctypes.c_void_p
    in_thread(lambda: [one.byte(page) for page in range(0, one.size, PAGE)])
    evil.held()
    at, maymove_fixed = one.start, 3
    while True:
        at = libc.mremap(at, one.size, one.size, maymove_fixed, at ^ 1 << 35)


@attack("events that their own process reads", runnable=4)
def stealing(evil: Evil) -> None:
    one = evil.create(64 * MiB)
    one.mmap(0, 64 * MiB, 3, SHARED | ANONYMOUS)

    def steal() -> None:
        while True:
            os.set_blocking(one.uffd, True)
            os.read(one.uffd, 32)

    for _ in range(4):
        in_thread(steal)
    for at in range(0, 32 * PAGE, PAGE):
        in_thread(lambda at=at: one.byte(at))  # type: ignore[misc] # a default
    evil.held()


@attack("attachments of a process that was stopped, and never listens")
def stopped(evil: Evil) -> None:
    one = evil.create(window=False)
    for _ in range(60):
        evil.join(one.name, window=False)
    evil.held()
    os.kill(os.getpid(), signal.SIGSTOP)


# -- as a reader of alice's own region --


@attack("a reader whose address space is locked", needs_hung=True, on_alice=True)
def reader_lock(evil: Evil) -> None:
    one = evil.read()
    one.byte(0)
    hold_address_space(evil, lambda: one.byte(4 * PAGE), lambda: one.byte(one.size - PAGE))
    evil.held()


GIVEN_UP: Final = r"holds up calls on its address space"
"""What is said of a process that is killed because it does not let itself be protected."""


@attack(
    "a writer whose address space is locked", GIVEN_UP, needs_hung=True, on_alice=True, writes=True
)
def writer_lock(evil: Evil) -> None:
    one = evil.join(evil.alice)
    said = evil.ready
    reader, evil.ready = os.pipe()

    def lock() -> None:
        mine = evil.join(evil.alice)
        mine.byte(0)
        mine.call(Op.READY)
        evil.held()  # she may not live long enough to say so later
        hold_address_space(evil, lambda: mine.byte(4 * PAGE), lambda: mine.byte(mine.size - PAGE))

    # One that may be given up is followed by another.
    def again_and_again() -> None:
        while True:
            pid = also(lock)
            os.waitpid(pid, 0)

    also(again_and_again)
    os.read(reader, 1)
    one.byte(0)
    os.write(said, b"x")


@attack(
    "writers who let go of what is locked", GIVEN_UP, needs_hung=True, on_alice=True, writes=True
)
def writers_let_go(evil: Evil) -> None:
    """The last descriptor of each userfaultfd is the daemon's: its close takes the lock."""

    def prepare() -> Callable[[], None]:
        mine = evil.join(evil.alice)
        mine.byte(0)
        os.close(mine.uffd)
        return lambda: hold_address_space(
            evil, lambda: syscalls.mmap(None, PAGE, 1, PRIVATE | ANONYMOUS, -1, 0), mine.sock.close
        )

    at_once(evil, [prepare] * 6)
    evil.held()


@attack("readers that are stopped, with userfaultfds that block", on_alice=True)
def reader_stopped(evil: Evil) -> None:
    for _ in range(50):
        one = evil.read()
        syscalls.munmap(one.start, one.size)
        os.set_blocking(one.uffd, True)
    evil.held()
    os.kill(os.getpid(), signal.SIGSTOP)


@attack("a reader that has touched every hole", on_alice=True, runnable=2)
def reader_poison(evil: Evil) -> None:
    one = evil.read()
    evil.c.once(one.start, one.size // PAGE, PAGE)
    evil.held()
    while True:
        syscalls.munmap(one.start, one.size)
        one = evil.read()
        evil.c.once(one.start, one.size // PAGE, PAGE)


@attack("many who look for holes in what they may only read", on_alice=True, runnable=16)
def reader_seeking(evil: Evil) -> None:
    one = evil.read()
    evil.c.seek(one.backing, evil.some(16))
    evil.held()


@attack("system calls of a reader's threads", on_alice=True, runnable=16)
def reader_storm(evil: Evil) -> None:
    one = evil.read()
    evil.c.storm(one.start, one.size, PAGE, evil.some(16), -1, 1)
    evil.held()


@attack("a lingering socket from a reader", on_alice=True)
def reader_linger(evil: Evil) -> None:
    for op in (Op.READY, Op.MUNMAP, Op.DETACH):
        one = evil.read()
        syscalls.munmap(one.start, one.size)
        fd = lingering()
        one.send(message(op), fd, fd, fd)
        let_go(fd)
    evil.held()


@attack(
    "a reader's files whose server does not answer when they are closed",
    on_alice=True,
    needs_hung=True,
)
def reader_hung_close(evil: Evil) -> None:
    file = closing(evil)
    for op in (Op.READY, Op.MUNMAP, Op.MMAP, Op.DETACH):
        one = evil.read()
        syscalls.munmap(one.start, one.size)
        item = [(0, PAGE, 0, 1, PRIVATE)] if op in wire._ONE_OBJECT else []
        one.send(message(op, *item), file)
        one.send(message(op, *item), *[file] * 3)
    # In place of a userfaultfd; and in messages that nobody reads.
    proof = os.open(evil.mount / evil.alice, os.O_RDONLY)
    for op in (Op.ATTACH, Op.REJOIN, Op.USERFAULTFD):
        two = Bare(evil.mount)
        two.send(message(op, flags=RequestFlag.AS_IT_LIES), proof, file)
        with contextlib.suppress(OSError):
            two.send(b"more", file, proof)
        _kept.append(two)
    evil.held()


def read_quietly(evil: Evil) -> None:
    """What any reader does: it touches pages, and holes."""
    one = evil.read()
    evil.c.once(one.start, one.size // PAGE // 8, 8 * PAGE)
    evil.held()


QUIET_READER: Final = Attack("a reader as they are", read_quietly, 1, on_alice=True)


def second_mapping(one: Bare, kind: int, prot: int) -> int | None:
    """Another mapping of what she was given, which nobody has registered."""
    try:
        return syscalls.mmap(None, one.size, prot, kind, one.backing, 0)
    except OSError:
        return None


@attack(
    "a reader that maps it a second time and touches all of it",
    r"somebody who may only read it makes pages",
    on_alice=True,
    runnable=2,
)
def reader_touches(evil: Evil) -> None:
    """Contents: a page that is absent becomes zeros, for everybody."""
    one = evil.read()
    places = [second_mapping(one, kind, 1) for kind in (SHARED, PRIVATE)]
    written = second_mapping(one, PRIVATE, 3)
    evil.held()
    while True:
        for at in places:
            if at is not None:
                with contextlib.suppress(OSError):
                    syscalls.madvise(at, one.size, syscalls.MADV_POPULATE_READ)
        if written is not None:
            # Not all of it: they are copies, which would be hers to pay for.
            for offset in range(0, one.size, 64 * PAGE):
                ctypes.memset(written + offset, 1, 1)
        if not any((*places, written)):
            time.sleep(0.1)
