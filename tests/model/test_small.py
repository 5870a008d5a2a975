"""The small modules: settings, texts, notification, liveness, capabilities."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from both import Both
from conftest import eventually

from msharefsd import config
from msharefsd.config import ConfigError
from msharefsd.errors import Refused
from msharefsd.linux import features, processes, syscalls, uffd
from msharefsd.linux.uffd import Feature, Mode, Outcome
from msharefsd.memory import files
from msharefsd.memory.files import MappedFile, check_mappable
from msharefsd.paging.chunks import Chunks
from msharefsd.paging.server import PageServer
from msharefsd.region import texts
from msharefsd.region.objects import Object
from msharefsd.telemetry import seldom
from msharefsd.threads.disposal import Disposal

KiB, MiB = 1 << 10, 1 << 20
PAGE = syscalls.PAGE


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("64K", 64 * KiB), ("2MiB", 2 * MiB), ("1tb", 1 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert config.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "1X", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        config.parse_size(text)


def test_the_command_line_takes_precedence_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text('alignment = "4M"\nlog_level = "debug"\nmountpoint = "/run/x"\n')
    loaded = config.load(file, {"alignment": "2M"})
    assert (loaded.alignment_bytes, loaded.log_level) == (2 * MiB, "debug")
    assert (loaded.mountpoint, loaded.region_memory_bytes) == ("/run/x", None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("nonsense = 1", "nonsense"),
        ("alignment = 5", "alignment"),
        ('alignment = "3M"', "power of two"),
        ('alignment = "1M"', "power of two"),
        ('log_level = "loud"', "loud"),
        ('region_memory = "much"', "much"),
        ("not toml", "config"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "config"
    file.write_text(content)
    with pytest.raises(ConfigError, match=says):
        config.load(file, {})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        config.load(tmp_path / "missing", {})


def test_defaults_depend_on_who_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    root = config.load(None, {})
    assert (root.mountpoint, root.run_directory) == (
        "/sys/fs/mshare",
        "/run/msharefs/sys-fs-mshare",
    )
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    user = config.load(None, {})
    assert user.mountpoint == "/run/user/1000/mshare"
    assert user.run_directory == "/run/user/1000/msharefs/run-user-1000-mshare"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR"):
        config.load(None, {})


async def test_a_process_that_ends_is_noticed_once() -> None:
    deaths = processes.Deaths()
    ended: list[str] = []
    with subprocess.Popen(["sleep", "60"]) as first, subprocess.Popen(["sleep", "60"]) as second:
        pidfds = [os.pidfd_open(process.pid) for process in (first, second)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deaths.run)
            deaths.watch(pidfds[0], lambda: ended.append("first"))
            deaths.watch(pidfds[1], lambda: ended.append("second"))
            deaths.forget(pidfds[1])
            assert not processes.has_ended(pidfds[0])
            for process in (second, first):
                process.send_signal(signal.SIGKILL)
            with trio.fail_after(20):
                while not ended:
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        assert processes.has_ended(pidfds[0])
    assert ended == ["first"]
    deaths.close()
    for pidfd in pidfds:
        os.close(pidfd)
    assert processes.read_proc(first.pid, "comm") == ""
    assert processes.read_proc(os.getpid(), "comm") != ""


async def test_seldom_is_once_in_a_while(autojump_clock: trio.testing.MockClock) -> None:
    some = seldom.Seldom()
    assert some.now("a")
    assert not some.now("a")
    assert some.now("b")
    await trio.sleep(seldom.INTERVAL)
    assert some.now("a")
    for key in range(seldom.MOST_KEYS):
        some.now(key)
    assert len(some._last) <= seldom.MOST_KEYS


def test_a_feature_that_is_done_without_is_missing() -> None:
    everything = features.probe()
    less = features.probe(frozenset({"poison", "write_protect"}))
    assert Feature.POISON in everything.features
    assert Feature.POISON not in less.features
    assert Feature.WP_HUGETLBFS_SHMEM not in less.features
    assert len(less.missing()) == len(everything.missing()) + 2


def test_without_userfaultfd_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(uffd, "open_new", refuse)
    monkeypatch.setattr(uffd, "open_by_system_call", refuse)
    with pytest.raises(features.UnsupportedError, match="CONFIG_USERFAULTFD"):
        features.probe()


def test_the_texts_of_a_region() -> None:
    regions = Both(1 << 21, lambda *_: _backing())
    region = regions.create(b"a b", 0o640, 1, 2)
    assert "state:     no range" in texts.info(region)
    regions.make(region, 1 << 40, 1 << 21, read_only=False)
    region.objects.insert(Object(0, PAGE, 1, True))
    region.objects.insert(Object(PAGE, PAGE, 3, False))
    regions.attach(region, os.getpid(), 7, -1, writable=False)
    assert "".join(texts.maps(region)).splitlines() == [
        f"10000000000-10000001000 r--p 00000000 00:00 0{'':<28}[anon:a\\040b]",
        f"10000001000-10000002000 rw-s 00000000 00:00 0{'':<28}[anon_shmem:a\\040b]",
    ]
    header, line = "".join(texts.sharers(region)).splitlines()
    assert header.split() == ["PID", "UID", "ACCESS", "SINCE", "COMMAND"]
    assert line.split()[:3] == [str(os.getpid()), "7", "read-only"]
    info = dict(row.split(":", 1) for row in texts.info(region).splitlines())
    assert (info["name"].strip(), info["objects"].strip()) == ("a\\040b", "2")


def _backing() -> Any:
    identity = SimpleNamespace(major=1, minor=1, inode=1)
    return SimpleNamespace(
        fd=-1, kind="shm", name="/x", page=PAGE, identity=identity, allocated=lambda: PAGE
    )


def test_a_window_grows_while_a_thread_goes_on() -> None:
    window = Chunks(64 << 10, 2 << 20)
    at, lengths = 0, []
    for _ in range(8):
        start, length = window.chunk(at)
        assert start <= at < start + length
        lengths.append(length // KiB)
        at = start + length
    assert lengths == [64, 128, 256, 512, 1024, 2048, 2048, 2048]
    assert window.chunk(1 << 30) == (1 << 30, 64 * KiB)
    assert window.chunk((1 << 30) + 200 * KiB)[1] == 64 * KiB


def test_a_window_is_wider_for_what_is_read_ahead() -> None:
    window = Chunks(64 << 10, 2 << 20)
    at, lengths = 0, []
    for _ in range(9):
        start, length = window.chunk(at, 8 << 20)
        lengths.append(length // KiB)
        at = start + length
    assert lengths == [64, 128, 256, 512, 1024, 2048, 4096, 8192, 8192]
    assert window.chunk(at) == (at, 2 << 20)


def test_many_threads_have_each_their_window() -> None:
    window = Chunks(64 << 10, 2 << 20)
    runs = [number << 30 for number in range(16)]
    for _ in range(4):
        runs = [sum(window.chunk(at)) for at in runs]
    assert {window.chunk(at)[1] for at in runs} == {1024 * KiB}


@pytest.mark.parametrize(
    ("path", "mode", "shared", "write", "code"),
    [
        ("file", os.O_WRONLY, False, False, errno.EACCES),
        ("file", os.O_RDONLY, True, True, errno.EACCES),
        ("file", os.O_PATH, False, False, errno.EBADF),
        (".", os.O_RDONLY, False, False, errno.ENODEV),
        ("/dev/zero", os.O_RDONLY, False, False, errno.ENODEV),
        ("file", os.O_RDONLY, False, True, None),
        ("file", os.O_RDONLY, True, False, None),
        ("file", os.O_RDWR, True, True, None),
    ],
)
def test_what_can_be_mapped(
    tmp_path: Path, path: str, mode: int, shared: bool, write: bool, code: int | None
) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / path, mode)
    try:
        if code is None:
            assert check_mappable(fd, shared=shared, write=write) == (mode == os.O_RDWR)
        else:
            with pytest.raises(Refused) as caught:
                check_mappable(fd, shared=shared, write=write)
            assert caught.value.code == code
    finally:
        os.close(fd)


def test_a_sealed_memfd_is_not_written() -> None:
    import fcntl

    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not check_mappable(fd, shared=True, write=False)
    with pytest.raises(Refused, match="sealed"):
        check_mappable(fd, shared=True, write=True)
    os.close(fd)


def test_a_mapped_file_is_closed_by_the_last_user_and_never_extended(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * (PAGE + 10))
    closed: list[int] = []
    file = MappedFile(os.open(path, os.O_RDWR), 0, may_write=True, close=closed.append)
    buffer = bytearray(b"x" * 4 * PAGE)
    assert file.read(memoryview(buffer), 0, PAGE) == 2 * PAGE
    assert buffer[: 2 * PAGE] == b"a" * (PAGE + 10) + bytes(PAGE - 10)
    assert file.read(memoryview(buffer), 2 * PAGE, PAGE) == 0
    file.write(b"b" * 2 * PAGE, PAGE)
    file.write(b"c" * PAGE, 8 * PAGE)
    assert path.read_bytes() == b"a" * PAGE + b"b" * 10
    file.hold()
    file.let_go()
    assert closed == []
    fd = file.fd
    file.let_go()
    assert closed == [fd]
    os.close(fd)


def test_pages_come_whole_or_not_at_all() -> None:
    """The ioctls on a mapping of our own."""
    memory = os.memfd_create("x")
    os.ftruncate(memory, 8 * PAGE)
    fd = uffd.open_own()
    uffd.handshake(fd, Feature.MISSING_SHMEM | Feature.POISON)
    start = syscalls.mmap(None, 8 * PAGE, 3, syscalls.MAP_SHARED, memory, 0)
    uffd.register(fd, start, 8 * PAGE, Mode.MISSING)
    assert uffd.zeropage(fd, start, 2 * PAGE) == (2 * PAGE, Outcome.DONE)
    assert uffd.zeropage(fd, start, PAGE) == (0, Outcome.PRESENT)
    assert uffd.zeropage(fd, start + 9 * PAGE, PAGE) == (0, Outcome.RETRY)
    assert uffd.poison(fd, start + 4 * PAGE, PAGE) == (PAGE, Outcome.DONE)
    done, outcome = uffd.zeropage(fd, start + 3 * PAGE, 3 * PAGE)  # it replaces the poison
    assert (done, outcome) == (3 * PAGE, Outcome.DONE)
    assert os.pread(memory, PAGE, PAGE) == bytes(PAGE)
    assert uffd.Reader(nowait=True).faults(fd) == []
    syscalls.munmap(start, 8 * PAGE)
    for each in (fd, memory):
        os.close(each)


@pytest.mark.parametrize("nowait", [True, False])
def test_a_userfaultfd_that_somebody_makes_blocking_is_read_without_waiting(nowait: bool) -> None:
    fd = uffd.open_own()
    uffd.handshake(fd, Feature.MISSING_SHMEM)
    if nowait and not uffd.can_read_without_waiting(fd):
        pytest.skip("this kernel has no RWF_NOWAIT for userfaultfd (Linux 6.10)")
    reader = uffd.Reader(nowait=nowait)
    stop = threading.Event()

    def make_it_block() -> None:
        while not stop.is_set():
            os.set_blocking(fd, True)

    thread = threading.Thread(target=make_it_block)
    thread.start()
    try:
        for _ in range(20):
            assert reader.faults(fd) == []
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.close(fd)


def test_only_a_userfaultfd_is_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "anon_inode:[userfaultfd]").touch()
    for fd in (
        os.open(tmp_path / "anon_inode:[userfaultfd]", os.O_RDWR),
        os.eventfd(0),
        os.memfd_create("anon_inode:[userfaultfd]"),
    ):
        with pytest.raises(OSError, match="not a userfaultfd"):
            uffd.check_kind(fd)
        os.close(fd)
    own = uffd.open_own()
    uffd.check_kind(own)
    os.close(own)


def test_a_close_that_hangs_holds_up_its_users_only() -> None:
    disposal = Disposal()
    hang, done = threading.Event(), threading.Event()
    disposal.run(hang.wait, 1000)
    disposal.run(done.set, 1000)
    other = threading.Event()
    disposal.run(other.set, 1001)
    own = threading.Event()
    disposal.run(own.set)
    assert other.wait(20)
    assert own.wait(20)
    assert disposal.pending(1000) == 2
    hang.set()
    assert done.wait(20)
    eventually(lambda: disposal.pending(1000) == 0, "all is closed")
    eventually(lambda: disposal.pending(1001) == 0, "the other's is closed")
    eventually(lambda: not disposal._at_work, "the threads have ended")
    disposal.close()
    now: list[str] = []
    disposal.run(lambda: now.append("own"))
    disposal.run(lambda: now.append("a user's"), 1000)
    assert now == ["own"]


@pytest.mark.parametrize("begun", [False, True])
async def test_a_descriptor_of_a_look_that_nobody_waits_for_is_closed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, begun: bool
) -> None:
    """Closed twice it would be another file that has the number by then."""
    closed: list[int] = []
    looks: list[Any] = []
    monkeypatch.setattr(os, "close", closed.append)

    class Late:
        """Threads whose function runs when who waits has gone, or never does."""

        async def run(self, uid: int, function: Any) -> None:
            looks.append(function)
            raise RuntimeError  # as Cancelled would be

    with (tmp_path / "file").open("w+b") as file:
        with pytest.raises(RuntimeError):
            await files.check_mapping(Late(), 0, file.fileno(), os.close, written=False)  # type: ignore[arg-type] # enough
        if begun:
            with pytest.raises(OSError, match="nobody waits"):
                looks[0]()
    assert len(closed) == 1
    monkeypatch.undo()
    os.close(closed[0])


class Thing(SimpleNamespace):
    """One that can be in a set."""

    __hash__ = object.__hash__  # type: ignore[assignment] # a namespace has none


def test_a_sharer_that_is_detached_while_its_server_wakes_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    anything: Any = SimpleNamespace(nowait=True)
    pages = PageServer(anything, anything, None, anything, anything)
    backing = SimpleNamespace(smallest_chunk=PAGE, largest_chunk=PAGE)
    sharer: Any = Thing(
        uffd=os.eventfd(1),
        pid=1,
        uid=0,
        region=SimpleNamespace(backing=backing, start=0, size=PAGE, paging=None),
        paging=None,
    )
    seen = []

    async def detached(fd: int) -> None:
        seen.append(fd)
        os.close(sharer.uffd)
        sharer.uffd = -1

    monkeypatch.setattr(trio.lowlevel, "wait_readable", detached)
    trio.run(pages.serve, sharer)
    assert len(seen) == 1
    assert not caplog.records
