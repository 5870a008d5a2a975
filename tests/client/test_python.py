"""The Python package, against a real daemon."""

from __future__ import annotations

import ctypes
import errno
import mmap
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from become import run_as
from conftest import ALIGNMENT, BASE, Client, Daemon, eventually
from inside import root_fixture as _root_fixture  # noqa: F401 - of every test here

import libmshare
from libmshare import Region, core

SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
Spawn = Callable[..., Client]


def create(name: str = "r") -> Region:
    return Region.create(name, SIZE, start=BASE, exist_ok=True)


def test_a_python_donor_and_a_c_consumer(spawn: Spawn) -> None:
    with create() as memory:
        memory.buf[0:5] = b"hello"
        consumer = spawn()
        consumer.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        assert consumer.do("load", BASE + 1) == str(ord("e"))
        consumer.ok("store", BASE, ord("j"))
        assert bytes(memory.buf[0:5]) == b"jello"
        consumer.ok("unlink", "r")
        memory.unlink()


def test_a_c_donor_and_a_python_consumer(spawn: Spawn, daemon: Daemon) -> None:
    donor = spawn()
    donor.ok("map", BASE, SIZE, mmap.MAP_SHARED)
    donor.ok("store", BASE + 7, 7)
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    with Region.attach("r") as memory:
        assert (memory.start, memory.size, memory.name) == (BASE, SIZE, "r")
        assert memory.buf[7] == 7
        memory.buf[8] = 8
    assert donor.do("load", BASE + 8) == "8"
    assert daemon.sharers("r") == 1


def test_who_becomes_another_user_stands_in_that_users_line() -> None:
    """What a process keeps of the mount it keeps as the user that it was."""
    another = 64123

    def has_a_line() -> bool:
        sockets = Path("/proc/net/unix").read_text().splitlines()
        return any(line.endswith(f"/{another}") for line in sockets)

    def attach_twice() -> None:
        for user in (0, another):
            os.seteuid(user)
            with Region.attach("r") as memory:
                assert memory.buf[0] == 1
            assert has_a_line() == (user == another)

    with create() as memory:
        memory.buf[0] = 1
        os.chmod(Path(os.environ["MSHARE_ROOT"]) / "r", 0o666)
        run_as(0, attach_twice)


@pytest.mark.parametrize("user", [0, 65534])
@pytest.mark.parametrize("consumer", ["C", "Python"])
@pytest.mark.parametrize("donor", ["C", "Python"])
def test_every_donor_with_every_consumer(
    spawn: Spawn, daemon: Daemon, donor: str, consumer: str, user: int
) -> None:
    who = {"user": user, "group": user, "extra_groups": []} if user else {}

    def donate() -> None:
        with create() as memory:
            memory.buf[SIZE - 1] = 42

    def consume() -> None:
        with Region.attach("r") as memory:
            assert memory.buf[SIZE - 1] == 42
            assert memory.buf[4096] == 0
            memory.unlink()

    if donor == "C":
        client = spawn(**who)
        client.ok("map", BASE, SIZE, mmap.MAP_SHARED)
        client.ok("store", BASE + SIZE - 1, 42)
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        client.ok("detach", "r")
    else:
        run_as(user, donate)
    assert daemon.field("r", "owner") == f"{user}:{user}"
    if consumer == "C":
        client = spawn(**who)
        client.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        assert client.do("load", BASE + SIZE - 1) == "42"
        assert client.do("from_memory", BASE + 8192, 1) == "1"
        client.ok("unlink", "r")
    else:
        run_as(user, consume)
    assert not (daemon.mount / "r").exists()


def test_the_functions_are_those_of_c() -> None:
    with pytest.raises(FileNotFoundError):
        libmshare.mshare("r", BASE, SIZE, os.O_RDWR)
    libmshare.mshare("r", BASE, SIZE, CREATE, 0o640)
    assert libmshare.mshare_stat("r") == (BASE, SIZE)
    with pytest.raises(FileExistsError):
        libmshare.mshare("r", BASE, SIZE, CREATE)
    with pytest.raises(OSError, match="multiples of the alignment") as caught:
        libmshare.mshare("q", BASE + 1, SIZE, CREATE)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.filename == "q"
    with pytest.raises(ValueError, match="null byte"):
        libmshare.mshare("a\0b", BASE, SIZE, CREATE)
    libmshare.mshare_unlink("r")
    with pytest.raises(FileNotFoundError):
        libmshare.mshare_unlink("r")
    with pytest.raises(FileNotFoundError):
        libmshare.mshare_detach("r")


def test_attaching_a_region_where_it_lies(spawn: Spawn, daemon: Daemon) -> None:
    with pytest.raises(FileNotFoundError):
        libmshare.mshare_attach("r", os.O_RDWR)
    donor = spawn()
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    with pytest.raises(OSError, match="Invalid"):
        libmshare.mshare_attach("r", os.O_RDWR | os.O_CREAT)
    core.map_anonymous(BASE, ALIGNMENT)
    with pytest.raises(OSError, match="has something where the region lies"):
        libmshare.mshare_attach("r", os.O_RDWR)
    ctypes.memset(BASE, 1, 1)  # what was there still is
    core.mshare_munmap(BASE, ALIGNMENT)
    eventually(lambda: daemon.sharers("r") == 1, "the refused sharer is gone")
    assert libmshare.mshare_attach("r", os.O_RDWR) == (BASE, SIZE)
    assert daemon.sharers("r") == 2
    libmshare.mshare_detach("r")
    (daemon.mount / "empty").touch()
    with pytest.raises(FileNotFoundError):
        libmshare.mshare_attach("empty", os.O_RDWR)


def test_create_attaches_what_exists(spawn: Spawn) -> None:
    donor = spawn()
    donor.ok("map", BASE, SIZE, mmap.MAP_SHARED)
    donor.ok("store", BASE, 3)
    donor.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    with pytest.raises(libmshare.RegionExists):
        Region.create("r", SIZE, start=BASE)
    with create() as memory:
        assert memory.buf[0] == 3
    with Region.create("r", SIZE, exist_ok=True) as memory:
        assert memory.buf[0] == 3
        assert (memory.start, memory.size) == (BASE, SIZE)


def test_a_failed_creation_leaves_no_mapping_behind(daemon: Daemon) -> None:
    for name, code in (("a/b", errno.EINVAL), (".x", errno.EPERM)):
        with pytest.raises(libmshare.MshareError) as caught:
            Region.create(name, SIZE, start=BASE)
        assert caught.value.errno == code
    with create() as memory:  # the range is free
        memory.unlink()
    assert not (daemon.mount / "r").exists()


def test_arrays_are_views(spawn: Spawn) -> None:
    with create() as memory:
        numbers = memory.ndarray((4, 8), np.int64, offset=4096)
        numbers[:] = np.arange(32).reshape(4, 8)
        assert numbers.ctypes.data == BASE + 4096
        consumer = spawn()
        consumer.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        assert consumer.do("load", BASE + 4096 + 8 * 31) == "31"
        assert memory.ndarray(16, np.uint8).shape == (16,)
        for shape, offset in ((SIZE, 1), (SIZE + 1, 0), (1, -1), (1, SIZE)):
            with pytest.raises(ValueError, match="do not lie in"):
                memory.ndarray(shape, np.uint8, offset)
        del numbers
        consumer.ok("detach", "r")


def test_memory_stays_as_long_as_something_shows_it(daemon: Daemon) -> None:
    exports: list[Callable[[Region], Any]] = [
        lambda memory: memory.buf,
        lambda memory: memory.buf[10:20],
        lambda memory: memory.ndarray(8, np.uint8),
        lambda memory: memory.ndarray((2, 4), np.uint8).T[1:],
    ]
    for export in exports:
        memory = create()
        held = export(memory)
        memory.close()
        held[0] = held[0]  # it still works
        assert daemon.sharers("r") == 1
        del held
        eventually(lambda: daemon.sharers("r") == 0, "nobody uses it")
    memory.unlink()
    memory.close()  # twice is fine
    for use in (lambda: memory.buf, lambda: memory.start, lambda: memory.ndarray(1)):
        with pytest.raises(ValueError, match="is closed"):
            use()
    assert repr(memory) == "<Region 'r' closed>"


def test_two_objects_of_one_region(daemon: Daemon) -> None:
    first = create()
    second = Region.attach("r")
    assert first == second
    assert len({first, second}) == 1
    assert daemon.sharers("r") == 1
    first.unlink()
    assert not (daemon.mount / "r").exists()
    first.close()
    second.buf[0] = 1
    second.close()


def test_close_leaves_the_region_and_unlink_does_not(daemon: Daemon) -> None:
    with create() as memory:
        memory.buf[0] = 5
    assert daemon.sharers("r") == 0
    with Region.attach("r") as memory:
        assert memory.buf[0] == 5
        memory.unlink()
    assert not (daemon.mount / "r").exists()


def test_reading_only(daemon: Daemon) -> None:
    with create() as memory:
        memory.buf[0] = 5
        with pytest.raises(libmshare.Mismatch, match="it lies at"):
            Region.create("r", SIZE, start=BASE + SIZE, exist_ok=True)
    with Region.attach("r", readonly=True) as memory:
        assert memory.readonly
        assert memory.buf[0] == 5
        assert memory.buf.readonly
        assert not memory.ndarray(1, np.uint8).flags.writeable
        with pytest.raises(TypeError):
            memory.buf[0] = 1
        with pytest.raises(PermissionError):
            Region.attach("r")
    libmshare.mshare_unlink("r")


def test_pickled_in_the_same_process() -> None:
    with create() as memory:
        copy = pickle.loads(pickle.dumps(memory))
        memory.buf[3] = 9
        assert copy.buf[3] == 9
        copy.close()
        memory.unlink()


def _child(memory: Region, queue: multiprocessing.Queue[int]) -> None:
    array = memory.ndarray(4, np.int64)
    array += 1
    queue.put(int(array.sum()))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    with create() as memory:
        memory.ndarray(4, np.int64)[:] = [1, 2, 3, 4]
        queue = context.Queue()
        process = context.Process(target=_child, args=(memory, queue))
        process.start()
        assert queue.get(timeout=30) == 14
        process.join()
        assert memory.ndarray(4, np.int64).tolist() == [2, 3, 4, 5]
        queue.close()
        queue.join_thread()
        memory.unlink()


def test_pointers_mean_the_same_everywhere(tmp_path: Path) -> None:
    script = tmp_path / "reader.py"
    script.write_text(
        textwrap.dedent(
            """
            import ctypes, libmshare
            with libmshare.Region.attach("r") as memory:
                pointer = int.from_bytes(memory.buf[0:8], "little")
                print(ctypes.string_at(pointer).decode())
            """
        )
    )
    with create() as memory:
        target = memory.start + ALIGNMENT + 123
        ctypes.memmove(target, b"a text\0", 7)
        memory.buf[0:8] = target.to_bytes(8, "little")
        done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
        assert done.stdout == "a text\n"
        memory.unlink()


def test_threads_attach_and_touch_at_once(daemon: Daemon) -> None:
    with create() as memory:
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for _ in range(20):
                    with Region.attach("r") as own:
                        own.buf[number * 4096] = number
                memory.ndarray(SIZE, np.uint8)[number :: 4096 * 8] = number
            except BaseException as error:  # noqa: BLE001 - shown below
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert daemon.sharers("r") == 1
        memory.unlink()


def in_child(function: Callable[[], int]) -> int:
    """What `function` returns in a child after fork; 255 if it fails, -14 if it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            os._exit(function())
        finally:
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_another_thread_attaches(daemon: Daemon) -> None:
    with create() as memory:
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                with Region.create("other", SIZE, start=BASE + 4 * SIZE, exist_ok=True):
                    pass

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(50):
                assert in_child(lambda: Region.attach("r").buf[0]) == 0
        finally:
            stop.set()
            thread.join()
        libmshare.mshare_unlink("other")
        memory.unlink()


@pytest.mark.parametrize("name", ["a\nb", "two words", "caf\udce9", "x" * 255, "-rf", "%s%n", "~"])
def test_odd_names(daemon: Daemon, name: str) -> None:
    with Region.create(name, SIZE, start=BASE) as memory:
        memory.buf[0] = 5
        assert in_child(lambda: memory.buf[0]) == 5
        assert name in os.listdir(daemon.mount)
        assert len(daemon.info(name, "maps").splitlines()) == 1
        assert daemon.sharers(name) == 1
        with pickle.loads(pickle.dumps(memory)) as same:
            assert same.buf[0] == 5
        memory.unlink()
    assert name not in os.listdir(daemon.mount)


def test_the_module_prints_how_to_build() -> None:
    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "libmshare", *words]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    assert (Path(ask("--cflags").stdout.strip()[2:]) / "mshare.h").exists()
    assert "-l:libmshare.so.0" in ask("--libs").stdout
    assert Path(ask("--preload").stdout.strip()).exists()
    assert ask().returncode == 2


def test_mapping_in_a_region(spawn: Spawn, daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abcd" * 2048)
    with Region.create("r", SIZE, start=BASE, empty=True) as memory:
        other = spawn()
        other.ok("mshare", "r", BASE, SIZE, os.O_RDWR, 0)
        assert other.do("load", BASE) == "SIGBUS"
        memory.mmap(0, 8192)
        assert memory.buf[0] == 0
        with pytest.raises(FileExistsError):
            memory.mmap(4096, 4096)
        memory.mmap(4096, 4096, flags=mmap.MAP_PRIVATE | core.MAP_FIXED)
        with file.open("r+b") as opened:
            memory.mmap(16384, 8192, file=opened)
            memory.mmap(32768, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, opened.fileno(), 4096)
        assert bytes(memory.buf[16384:16388]) == b"abcd"
        other.ok("store", BASE + 16384, ord("z"))
        memory.flush()
        assert file.read_bytes()[:4] == b"zbcd"
        memory.protect(0, 8192, mmap.PROT_READ)
        assert other.do("store", BASE, 1) == "SIGSEGV"
        memory.munmap(0, 8192)
        assert other.do("load", BASE) == "SIGBUS"
        assert len(daemon.info("r", "maps").splitlines()) == 2
        with pytest.raises(ValueError, match="do not lie in a region"):
            memory.munmap(SIZE - 4096, 8192)
        with pytest.raises(OSError, match="not a multiple of the page size"):
            memory.munmap(1, 4096)
        memory.unlink()
