"""A heap in a region, and the locks, semaphores and integers of it."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import random
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SUPPORT, Daemon, compile_c, eventually
from inside import one_daemon_fixture as _one_daemon_fixture  # noqa: F401 - of every test here
from inside import root_fixture as _root_fixture  # noqa: F401 - the same
from numpy.typing import NDArray

import libmshare
from libmshare import Atomic, Corrupt, Lock, OwnerDied, Region, Semaphore, holding

NAMES, SPACES = 4096, 4096 + 1024 * 128
"""Where a heap has its named objects, and its tree (heap.h)."""


@pytest.fixture(name="region")
def region_fixture(root: None) -> Iterator[Region]:
    with Region.create("heap", "8M", heap=True) as region:
        yield region
        region.unlink()


@pytest.fixture(name="pool")
def pool_fixture() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as made:
        yield made


def in_child(function: Callable[[], object]) -> int:
    """Its exit status, of a fork that ends without a word."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:  # noqa: BLE001 - it is told by the status
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- pieces ----


def test_arrays_of_the_heap(region: Region) -> None:
    whole = region.check_heap()
    assert (whole.used, whole.pieces) == (0, 0)
    assert whole.largest == whole.size > 7 << 20
    one = region.empty((100, 10), np.int32)
    one[:] = 7
    two = region.zeros(5)
    three = region.full((2, 2), 3, "u1", order="F")
    four = region.copy_in(np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    nothing = region.empty((0, 5))
    assert one.shape == (100, 10)
    assert one.dtype == np.int32
    assert two.tolist() == [0] * 5
    assert three.flags.f_contiguous and three.sum() == 12
    assert four.flags.f_contiguous and four[1].tolist() == [3, 4, 5]
    assert region.full(3, 2.5).dtype == np.float64
    assert region.zeros(3, [("a", "i4"), ("b", "f8")])["b"].sum() == 0
    assert nothing.shape == (0, 5)
    assert region.check_heap().pieces == 7
    for array in (one, two, three, four, nothing):
        assert array.ctypes.data % 64 == 0
        region.free(array)
    assert region.check_heap().pieces == 2
    with pytest.raises(ValueError, match="Python objects"):
        region.empty(1, object)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="negative"):
        region.zeros(-1)


def test_any_piece_that_fits_is_had(region: Region) -> None:
    """Not only powers of two, and what is freed is one piece again."""
    size = region.check_heap().size
    large = region.empty(size * 3 // 5, np.uint8)
    rest = region.empty(size - -(-large.nbytes // 1024) * 1024, np.uint8)
    with pytest.raises(MemoryError):
        region.empty(1, np.uint8)
    region.free(large)
    region.free(rest)
    assert region.check_heap().largest == size
    with pytest.raises(MemoryError):
        region.empty(size + 1, np.uint8)
    with pytest.raises(MemoryError):
        region.empty(1 << 50, np.uint8)


def test_zeros_are_zeros_in_memory_that_was_used(region: Region) -> None:
    for size in (100, 3000, (1 << 20) + 5000):
        used = region.full(size, 255, np.uint8)
        region.free(used)
        zeros = region.zeros(size, np.uint8)
        assert zeros.ctypes.data == used.ctypes.data
        assert not zeros.any()
        region.free(zeros)


def test_a_large_free_piece_takes_no_memory(region: Region, daemon: Daemon) -> None:
    region.free(region.full(4 << 20, 1, np.uint8))
    file = daemon.mount / "heap"
    eventually(lambda: os.stat(file).st_blocks * 512 < 2 << 20, "its memory is given back")


def test_what_is_no_piece_is_not_freed(region: Region) -> None:
    array = region.empty(1000)
    for wrong in (array[1:], np.ones(3), region.ndarray(1), region.buf[5000:5010]):
        with pytest.raises(libmshare.MshareError, match="no piece") as caught:
            region.free(wrong)
        assert caught.value.errno == errno.EINVAL
    region.free(array)
    with pytest.raises(libmshare.MshareError, match="freed before"):
        region.free(array)


def test_a_region_has_a_heap_if_it_was_made_with_one() -> None:
    with Region.create("raw", "1M") as raw:
        raw.unlink()
        for call in (lambda: raw.empty(1), lambda: raw.lock("x"), raw.check_heap):
            with pytest.raises(libmshare.MshareError, match="no heap"):
                call()
    with Region.create("h", "1M", heap=True) as region:
        array = region.full(3, 4)
        with Region.create("h", "1M", exist_ok=True, heap=True) as same:
            same.free(array)
        with Region.attach("h", readonly=True) as reader:
            for refused in (lambda: reader.empty(1), lambda: reader.lock("x")):
                with pytest.raises(libmshare.AccessDenied, match="only reads"):
                    refused()
        region.unlink()
    with Region.create("raw", "1M") as raw:
        raw[:8] = b"my own.."
        with pytest.raises(libmshare.RegionExists, match="something else"):
            Region.create("raw", "1M", exist_ok=True, heap=True)
        raw.unlink()
    with pytest.raises(libmshare.MshareError, match="too small"):
        Region.create("small", "64K", heap=True)
    with pytest.raises(libmshare.NoSuchRegion):
        Region.attach("small")
    nonsense: list[dict[str, Any]] = [{"empty": True}, {"readonly": True}]
    for more in nonsense:
        with pytest.raises(ValueError, match="heap"):
            Region.create("h", "1M", heap=True, **more)


def add_and_return(array: NDArray[Any], region: Region) -> NDArray[Any]:
    array += 1
    return region.copy_in(array * 2)


def test_pieces_travel_and_are_freed_elsewhere(pool: ProcessPoolExecutor, region: Region) -> None:
    array = region.zeros(1000)
    made = pool.submit(add_and_return, array, region).result()
    assert array.sum() == 1000
    assert made.sum() == 2000
    assert region.check_heap().pieces == 2
    region.free(made)
    region.free(array)
    assert region.check_heap().used == 0


def test_a_large_heap_costs_what_is_used(daemon: Daemon) -> None:
    with Region.create("vast", "256G", heap=True) as region:
        array = region.zeros(100 << 30, np.uint8)
        array[50 << 30] = 1
        small = region.full(10, 1.0)
        assert small.sum() == 10
        assert os.stat(daemon.mount / "vast").st_blocks * 512 < 64 << 20
        region.unlink()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_state_that_was_overwritten_is_an_error_and_no_crash(region: Region) -> None:
    """Whatever is written over it: calls return, what they give lies in the region."""
    dice = random.Random(11)
    pristine = bytes(region.buf[:NAMES])
    tree = bytes(region.buf[SPACES : SPACES + 65536])
    seen = set()
    for round_ in range(300):
        region.buf[:NAMES] = pristine
        region.buf[SPACES : SPACES + 65536] = tree
        low, high = ((0, 160), (SPACES, SPACES + 4000))[round_ % 2]
        for _ in range(dice.choice((1, 3, 50))):
            at = dice.randrange(low, high - 4) & ~3
            value = dice.choice((1, 2, 0x7FFFFFFF, 0xFFFFFFFF, dice.getrandbits(32)))
            if not 24 <= at < 64:  # who has the lock is not known: that would wait for a minute
                region.buf[at : at + 4] = struct.pack("=I", value)
        try:
            for size in (1, 5000, 2 << 20):
                array = region.empty(size, np.uint8)
                assert region.start <= array.ctypes.data
                assert array.ctypes.data + size <= region.start + region.size
                region.free(array)
            region.check_heap()
        except libmshare.MshareError as error:
            seen.add(type(error))
    assert Corrupt in seen
    region.buf[:NAMES] = pristine
    region.buf[SPACES : SPACES + 65536] = tree


# ---- killed ----


@pytest.fixture(name="program", scope="module")
def program_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(SUPPORT / "heaps.c", tmp_path_factory.mktemp("heaps") / "heaps", "-O1")


def test_killed_processes_leave_a_whole_heap(region: Region, program: Path) -> None:
    """Most of their time they are in the heap; so most of them are killed there."""
    dice = random.Random(3)
    running: list[subprocess.Popen[str]] = []

    def start() -> None:
        process = subprocess.Popen(
            [str(program), "heap"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        running.append(process)

    def end(process: subprocess.Popen[str]) -> None:
        process.kill()
        _, told = process.communicate(timeout=60)
        assert (process.returncode, told) == (-signal.SIGKILL, "")

    died = 0
    try:
        for _ in range(60):
            while len(running) < 3:
                start()
            time.sleep(dice.uniform(0.0005, 0.01))
            end(running.pop(dice.randrange(3)))
            region.check_heap()
            lock = region.lock("lock", recover=True)
            with lock:
                died += lock.owner_died
    finally:
        for process in running:
            end(process)
    info = region.check_heap()
    assert region.atomic("count").load() >= info.pieces
    # What they had is nobody's, and the heap goes on with the rest.
    region.free(region.full(1000, 1))


def test_killed_at_any_store_it_leaves_a_whole_heap(tmp_path: Path) -> None:
    """The heap's sources, and every store a place to die at; see killed.c."""
    core = SUPPORT.parent.parent / "libmshare"
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover"]
    flags += [f"-I{core}/include", f"-I{core}/core"]
    program = tmp_path / "killed"
    source = str(SUPPORT / "killed.c")
    subprocess.run(["cc", *flags, source, "-o", str(program), "-pthread"], check=True)
    done = subprocess.run([program, "5"], check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_allocation_is_done_by_whoever_comes_next(region: Region) -> None:
    """What a process wrote down, and did not live to do."""
    take, header = 1, 24 + 44
    fields = struct.Struct("=5I")  # change, start, count, used_then, pieces_then
    offset = region.buf[:NAMES].tobytes().find(fields.pack(0, 0, 0, 0, 0), header)
    region.free(region.empty(10))
    written = [
        at
        for at in range(offset - 64, offset + 64, 4)
        if fields.unpack_from(region.buf, at)[:3] == (0, 0, 1)
    ]
    assert written, "where a change is written down"
    fields.pack_into(region.buf, written[0], take, 5, 7, 7, 1)
    info = region.check_heap()
    assert (info.used, info.pieces) == (7 * 1024, 1)


# ---- locks ----


def test_a_lock_is_one_threads(region: Region) -> None:
    lock = region.lock("l")
    assert lock.acquire()
    with pytest.raises(OSError, match="already") as caught:
        lock.acquire(timeout=0)
    assert caught.value.errno == errno.EDEADLK
    results: list[object] = []

    def other() -> None:
        results.append(region.lock("l").acquire(timeout=0))
        try:
            lock.release()
        except RuntimeError as error:
            results.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert results == [False, "this thread does not have the lock"]
    lock.release()
    with pytest.raises(RuntimeError):
        lock.release()
    with lock:
        pass
    with pytest.raises(libmshare.RegionExists):
        region.semaphore("l")


def count_up(lock: Lock, array: NDArray[Any], rounds: int) -> None:
    for _ in range(rounds):
        with lock:
            array[0] += 1


def test_locks_travel_and_exclude(pool: ProcessPoolExecutor, region: Region) -> None:
    lock, array = region.lock("l"), region.zeros(1, np.int64)
    done = [pool.submit(count_up, lock, array, 300) for _ in range(4)]
    count_up(lock, array, 300)
    for each in done:
        each.result()
    assert array[0] == 1500


def test_who_comes_after_the_dead_is_told(region: Region) -> None:
    def die() -> None:
        region.lock("l").acquire()
        kill_myself()

    assert in_child(die) == signal.SIGKILL
    for _ in range(2):
        with pytest.raises(OwnerDied) as caught, region.lock("l"):
            pass
        assert caught.value.errno == errno.EOWNERDEAD

    def fail() -> None:
        with region.lock("l", recover=True) as lock:
            assert lock.owner_died
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with region.lock("l", recover=True) as lock:
        assert lock.owner_died
    with region.lock("l", recover=True) as lock:
        assert not lock.owner_died
    with region.lock("l"):
        pass


def test_only_who_has_a_lock_says_that_all_is_well(region: Region) -> None:
    """Not a release() too many, nor a child that leaves its parent's block."""

    def die() -> None:
        region.lock("l").acquire()
        kill_myself()

    def leave() -> None:
        with pytest.raises(RuntimeError, match="does not have the lock"):
            lock.release()

    assert in_child(die) == signal.SIGKILL
    lock = region.lock("l", recover=True)

    def fail() -> None:
        with lock:
            assert in_child(leave) == 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    leave()
    with pytest.raises(OwnerDied):
        region.lock("l").acquire()
    with region.lock("l", recover=True) as had:
        assert had.owner_died
    with region.lock("l"):
        pass


def test_numpys_integers_are_integers(region: Region) -> None:
    one, two = np.int64(1), np.uint8(2)
    semaphore = region.semaphore("s", np.int32(0))
    semaphore.release(two)
    assert semaphore.value == 2
    with pytest.raises(OSError, match="too large") as caught:
        semaphore.release(1 << 40)
    assert caught.value.errno == errno.EOVERFLOW
    number = region.atomic("n")
    number.store(np.int32(-5))
    assert number.add(np.ones(3, bool).sum()) == -5
    assert number.compare_exchange(np.int8(-2), one) and number.load() == 1
    for wrong in (0.5, "1"):
        with pytest.raises(TypeError):
            number.add(wrong)  # type: ignore[arg-type] # that is it
        with pytest.raises(TypeError):
            semaphore.release(wrong)  # type: ignore[arg-type] # that is it


def test_a_thread_that_ends_with_a_lock_is_dead_too(region: Region) -> None:
    thread = threading.Thread(target=region.lock("l").acquire)
    thread.start()
    thread.join()
    with pytest.raises(OwnerDied), region.lock("l"):
        pass
    with region.lock("l", recover=True):
        pass


def test_a_lock_that_is_held_keeps_the_memory_mapped() -> None:
    with Region.create("heap", "1M", heap=True) as region:
        region.unlink()
        region.lock("l").acquire()
        identity = region.identity
    gc.collect()
    assert len(holding.held()) == 1
    with Region.attach(identity) as region:
        region.lock("l").release()


def test_a_fork_has_no_locks(region: Region) -> None:
    lock = region.lock("l")

    def child() -> None:
        with pytest.raises(RuntimeError):
            lock.release()
        assert not lock.acquire(timeout=0)

    with lock:
        assert in_child(child) == 0


@pytest.mark.parametrize("what", ["lock", "semaphore"])
def test_signal_handlers_run_while_it_waits(region: Region, what: str) -> None:
    object_: Lock | Semaphore
    ready, go = os.pipe()
    if what == "lock":
        object_ = region.lock("x")
        child = os.fork()
        if child == 0:
            object_.acquire()
            os.write(go, b"!")
            signal.pause()
        os.read(ready, 1)
    else:
        object_, child = region.semaphore("x", 0), 0

    class Alarm(Exception):  # noqa: N818
        pass

    rung: list[int] = []

    def ring(number: int, _frame: object) -> None:
        rung.append(number)
        if len(rung) == 3:
            raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        with pytest.raises(Alarm):
            object_.acquire()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(ready)
        os.close(go)
    assert len(rung) == 3
    if what == "lock":
        with region.lock("x", recover=True) as lock:
            assert lock.owner_died


def test_a_lock_that_was_overwritten_is_an_error_and_no_crash(region: Region) -> None:
    lock = region.lock("l")
    offset = lock._place.address - region.start
    whole = bytes(region.buf[offset : offset + 64])
    dice = random.Random(4)
    lock.acquire()
    held = bytes(region.buf[offset : offset + 64])
    for _ in range(100):  # the links of the C library's list, while it is held
        at = offset + dice.choice((16, 24, 32))
        region.buf[at : at + 8] = struct.pack("=Q", dice.getrandbits(64))
        with pytest.raises(Corrupt):
            lock.release()
        region.buf[offset : offset + 64] = held
    lock.release()
    region.buf[offset + 16 : offset + 20] = b"\x05\0\0\0"
    with pytest.raises(Corrupt):
        lock.acquire(timeout=0)
    region.buf[offset : offset + 64] = whole
    with lock:
        pass


# ---- semaphores and integers ----


def take_and_give(semaphore: Semaphore, inside: Atomic, most: Atomic) -> None:
    for _ in range(100):
        with semaphore:
            now = inside.add() + 1
            while now > (seen := most.load()) and not most.compare_exchange(seen, now):
                pass
            inside.add(-1)


def test_a_semaphore_lets_so_many_in(pool: ProcessPoolExecutor, region: Region) -> None:
    semaphore = region.semaphore("s", 2)
    inside, most = region.atomic("inside"), region.atomic("most")
    for each in [pool.submit(take_and_give, semaphore, inside, most) for _ in range(4)]:
        each.result()
    assert (semaphore.value, inside.load()) == (2, 0)
    assert 1 <= most.load() <= 2
    assert region.semaphore("s", 9).value == 2
    assert semaphore.acquire() and semaphore.acquire() and not semaphore.acquire(timeout=0.01)
    semaphore.release(2)
    with pytest.raises(OSError, match="too large") as caught:
        semaphore.release((1 << 31) - 1)
    assert caught.value.errno == errno.EOVERFLOW


def test_a_semaphore_wakes(region: Region) -> None:
    semaphore = region.semaphore("s", 0)
    thread = threading.Thread(target=semaphore.release)
    thread.start()
    assert semaphore.acquire()
    thread.join()


def add_many(integer: Atomic) -> None:
    for _ in range(1000):
        integer.add(3)


def test_integers_change_in_one_step(pool: ProcessPoolExecutor, region: Region) -> None:
    counts = region.zeros(4, np.int32)
    named, of_array = region.atomic("n"), region.atomic(counts[2:3])
    for each in [pool.submit(add_many, integer) for integer in (named, of_array) * 2]:
        each.result()
    assert (named.load(), counts.tolist()) == (6000, [0, 0, 6000, 0])


def test_integers_are_as_c_has_them() -> None:
    with Region.create(size="64K") as raw:  # no heap is needed
        raw.unlink()
        for kind in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"):
            integer, array = raw.atomic(64, kind), raw.ndarray(1, kind, offset=64)
            for value in (np.iinfo(kind).max, np.iinfo(kind).min):
                integer.store(int(value))
                assert array[0] == value
                assert int(integer) == value
            assert integer.exchange(5) == np.iinfo(kind).min
            assert integer.bit_or(2) == 5
            assert integer.bit_and(6) == 7
            assert integer.bit_xor(1) == 6
            assert integer.compare_exchange(7, 1)
            assert not integer.compare_exchange(7, 1)
            integer.store(np.iinfo(kind).max)
            integer.add()
            assert integer.load() == np.iinfo(kind).min
        assert raw.atomic(8, np.int16).load() == 0
        for where, kind in ((3, "int64"), (1 << 16, "int64"), (-8, "int64"), (0, "float64")):
            with pytest.raises(ValueError, match=r"multiple|do not lie|none of"):
                raw.atomic(where, kind)
        with pytest.raises(ValueError, match="which integer"):
            raw.atomic(raw.ndarray(2, np.int64))
        again = pickle.loads(pickle.dumps(raw.atomic(64, "uint64")))
        again.store(9)
        assert raw.buf[64] == 9
        with Region.attach(raw.identity, readonly=True) as reader:
            assert reader.atomic(64).load() == 9
            with pytest.raises(libmshare.AccessDenied):
                reader.atomic(64).add()
