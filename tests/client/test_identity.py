"""A region is what its identity says: names, pickles, pools, and what becomes of them."""

from __future__ import annotations

import errno
import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
from bare import Bare
from conftest import ALIGNMENT, BASE, Client, Daemon, eventually
from inside import root_fixture as _root_fixture  # noqa: F401 - of every test here
from numpy.typing import NDArray

import libmshare
from libmshare import Region, Stale, holding
from msharefsd.control.wire import Op

SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
Spawn = Callable[..., Client]


@pytest.fixture(name="pool")
def pool_fixture() -> Iterator[ProcessPoolExecutor]:
    """One worker, which lives from job to job."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as made:
        yield made


def mean(region: Region) -> float:
    return float(region.ndarray(1000).mean())


def add_one(array: NDArray[Any]) -> tuple[int, int]:
    array += 1
    return array.ctypes.data, len(holding.held())


def set_first(view: memoryview, value: int) -> int:
    view[0] = value
    return len(view)


def first(which: Any) -> int:
    with Region.attach(which) as region:
        return region.buf[0]


def test_a_worker_computes_on_the_region_that_it_was_sent(
    pool: ProcessPoolExecutor, daemon: Daemon
) -> None:
    for job in (1, 2, 3):
        with Region.create("job", "64K") as region:
            region.ndarray(1000)[:] = job
            assert pool.submit(mean, region).result() == job
            region.unlink()
            assert not (daemon.mount / "job").exists()
            # It goes on, for those who have it and those who get it.
            assert pool.submit(mean, region).result() == job


def test_a_worker_keeps_nothing_of_what_it_is_done_with(
    pool: ProcessPoolExecutor, daemon: Daemon
) -> None:
    for job in range(4):
        with Region.create(f"job{job}", SIZE, start=BASE) as region:
            assert pool.submit(mean, region).result() == 0
            region.unlink()
        # The place is free again, in the worker as well.
        eventually(lambda: pool.submit(holding.held).result() == [], "the worker lets go")


def test_what_is_stale_says_so(daemon: Daemon) -> None:
    region = Region.create("x", SIZE)
    pickled, identity = pickle.dumps(region), region.identity
    region.buf[0] = 1
    region.close()
    assert first(identity) == 1
    os.unlink(daemon.mount / "x")
    with Region.create("x", SIZE) as other:
        assert other.identity != identity
        with pytest.raises(Stale) as caught:
            pickle.loads(pickled)
        assert caught.value.errno == errno.ESTALE
        with pytest.raises(Stale):
            Region.attach(identity)
        region.unlink()  # it has no name, and the other one keeps its own
        with Region.attach("x") as again:
            assert again == other
        other.unlink()


def test_identities_come_never_again(daemon: Daemon, make_daemon: Callable[..., Daemon]) -> None:
    seen = set()
    for _ in range(2):
        for name in ("x", "y"):
            with Region.create(name, SIZE) as region:
                seen.add(region.identity.id)
                region.unlink()
    elsewhere = make_daemon(f"--alignment={ALIGNMENT}").start()
    os.environ["MSHARE_ROOT"] = str(elsewhere.mount)
    with Region.create("x", SIZE) as region:
        seen.add(region.identity.id)
        assert region.identity.root == str(elsewhere.mount)
        pickled = pickle.dumps(region)
        os.environ["MSHARE_ROOT"] = str(daemon.mount)
        assert pickle.loads(pickled) == region  # of the mount that it came from
        region.unlink()
    assert len(seen) == 5


def test_it_survives_the_daemon(daemon: Daemon) -> None:
    region = Region.create("x", SIZE)
    region.buf[0] = 5
    pickled = pickle.dumps(region)
    daemon.kill()
    daemon.expected.append("taking down the mount")
    daemon.start()
    assert pickle.loads(pickled).buf[0] == 5
    region.close()
    gc.collect()
    assert pickle.loads(pickled).identity == region.identity
    gc.collect()
    region.unlink()


def test_by_its_name_one_gets_what_has_it_now(spawn: Spawn, daemon: Daemon) -> None:
    with Region.create("x", SIZE) as old:
        old.buf[0] = 1
        os.unlink(daemon.mount / "x")
        with pytest.raises(libmshare.NoSuchRegion):
            Region.attach("x")
        with Region.create("x", SIZE) as new:
            assert new.start != old.start
            assert new.buf[0] == 0
            with Region.attach("x") as again:
                assert again.identity == new.identity
            new.unlink()


def test_ephemeral_regions_end_with_their_last_user(
    pool: ProcessPoolExecutor, daemon: Daemon
) -> None:
    region = Region.create(size="1M", ephemeral=True)
    region.ndarray(1000)[:] = 4
    assert [name for name in os.listdir(daemon.mount) if name.startswith("py-")] == []
    assert pool.submit(mean, region).result() == 4
    pickled = pickle.dumps(region)
    region.close()
    eventually(lambda: gone(pickled), "its memory is gone")
    child = os.fork()
    if child == 0:
        Region.create("crash", "1M", ephemeral=True).buf[0] = 1
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert "crash" not in os.listdir(daemon.mount)


def test_what_ends_between_open_and_attach_is_gone(daemon: Daemon) -> None:
    """Whoever has just opened its file is told so, and not that it has no right to it."""
    region = Region.create(size="1M", ephemeral=True)
    file = os.open(daemon.mount / f".identity-{region.identity.id}", os.O_RDONLY)
    region.close()
    eventually(lambda: daemon.shm_objects() == [], "the daemon has noticed")
    one = Bare(daemon.mount)
    try:
        assert one.call(Op.USERFAULTFD, file).error == errno.ENOENT
    finally:
        one.sock.close()
        os.close(file)


def gone(pickled: bytes) -> bool:
    try:
        pickle.loads(pickled)
    except Stale:
        return True
    return False


def test_arrays_travel_by_reference(pool: ProcessPoolExecutor) -> None:
    with Region.create(size="1M") as region:
        array = region.ndarray((100, 100), np.int64)
        for view in (array, array[10:20, ::2].T, array[::-1, 3:5], array[5, 5:6]):
            before = array.copy()
            address, held = pool.submit(add_one, view).result()
            assert address == view.ctypes.data
            assert held == 1
            changed = np.zeros_like(array)
            changed[:] = array - before
            assert changed.sum() == view.size
        assert pool.submit(set_first, region.buf[16:32], 200).result() == 16
        assert region.buf[16] == 200
        # A copy, in a pickle that may go anywhere.
        assert pickle.loads(pickle.dumps(array)).ctypes.data != array.ctypes.data
        plain = np.ones(10)
        pool.submit(add_one, plain).result()
        assert plain.sum() == 10
        region.unlink()


def test_a_readonly_array_arrives_as_one(pool: ProcessPoolExecutor) -> None:
    with Region.create("r", "1M") as region:
        region.unlink()
        array = region.ndarray(10)
        array.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            pool.submit(add_one, array).result()


def test_readonly_is_what_was_asked_for() -> None:
    with Region.create("r", SIZE) as region, Region.attach("r", readonly=True) as reader:
        assert reader.readonly
        assert reader.buf.readonly
        assert not reader.ndarray(1).flags.writeable
        region.buf[0] = 5
        assert reader.buf[0] == 5
        assert pickle.loads(pickle.dumps(reader)).readonly
        region.unlink()


def test_the_real_error_leaves_the_block() -> None:
    def work(region: Region) -> None:
        array = region.ndarray(10)
        array[0] = 1 / 0

    region = Region.create("r", SIZE)
    region.unlink()
    with pytest.raises(ZeroDivisionError), region:
        work(region)


def test_what_is_dropped_is_given_back(daemon: Daemon) -> None:
    region = Region.create("r", SIZE)
    with warnings.catch_warnings(record=True, action="always") as seen:
        del region
    assert [str(each.message).partition(" was")[2] for each in seen] == [
        " not closed: use `with`, or close()"
    ]
    seen.clear()  # a warning keeps what it is about
    eventually(lambda: daemon.sharers("r") == 0, "nobody has it")
    with warnings.catch_warnings(action="error"), Region.attach("r") as again:
        again.unlink()


def test_a_pin_keeps_addresses_good(daemon: Daemon) -> None:
    with Region.create("r", SIZE) as region:
        pin = region.pin(4096, 100)
        region.unlink()
    assert pin.address == region._hold.region.start + 4096
    import ctypes

    ctypes.memset(pin.address, 7, pin.length)
    pin.release()


def test_the_plain_functions_take_nothing_from_a_region(daemon: Daemon) -> None:
    with Region.create("r", SIZE) as region:
        array = region.ndarray(10)
        with pytest.raises(FileNotFoundError):
            libmshare.mshare_detach("r")
        libmshare.mshare_unlink("r")
        array[0] = 1
        assert not (daemon.mount / "r").exists()
    # And the other way round: who attached it first keeps it.
    del array
    there = BASE + 4 * SIZE
    libmshare.mshare("p", there, SIZE, CREATE)
    with Region.attach("p") as region:
        assert region.start == there
        libmshare.mshare_mmap(there, 4096, 3, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | 0x10)
    assert daemon.sharers("p") == 1
    libmshare.mshare_unlink("p")


def test_threads_attach_and_close_the_same_region(daemon: Daemon) -> None:
    """Who comes while another thread attaches it, or leaves it, waits for that, and has it."""
    with Region.create("r", SIZE) as region:
        identity = region.identity
        region.buf[0] = 7
    odd: list[str] = []

    def use(which: str | libmshare.Identity) -> None:
        try:
            for _ in range(25):
                with Region.attach(which) as mine:
                    assert mine.buf[0] == 7
        except (OSError, AssertionError) as error:
            odd.append(repr(error))

    threads = [threading.Thread(target=use, args=(which,)) for which in ("r", identity) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert odd == []
    assert holding.held() == []
    eventually(lambda: daemon.sharers("r") == 0, "nobody has it")
    with Region.attach("r") as region:
        region.unlink()


def test_closed_descriptors_are_had_again_without_a_name(daemon: Daemon) -> None:
    """By the region's identity: its name is gone, and then another region's."""
    program = """
        import os
        from libmshare import Region
        region = Region.create("r", 1 << 20)
        region.unlink()
        os.closerange(3, 1000)
        region.munmap(4096, 4096)
        region.mmap(4096, 4096)
        other = Region.create("r", 1 << 20)
        os.closerange(3, 1000)
        region.munmap(8192, 4096)
        region.mmap(8192, 4096)
        region.buf[8192] = 1
        assert not any(other.buf[:16384])
        other.unlink()
        other.close()
        region.close()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)
    assert not (daemon.mount / "r").exists()


def test_close_beside_buf(daemon: Daemon) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    current: list[Region] = [Region.create("r", SIZE)]
    odd: list[str] = []
    stop = threading.Event()

    def use() -> None:
        while not stop.is_set():
            try:
                view = current[0].buf
                view[0] = 1
                del view
            except ValueError as error:
                if "closed" not in str(error):
                    odd.append(str(error))
            except BaseException as error:  # noqa: BLE001 - shown below
                odd.append(repr(error))

    threads = [threading.Thread(target=use) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(100):
            region = Region.attach("r")
            current[0].close()
            current[0] = region
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert odd == []
    current[0].unlink()
    current[0].close()
    eventually(lambda: holding.held() == [], "nothing is held")


INTERRUPTED = """
import os, random, signal, sys, time
from libmshare import Region, holding

class Alarm(Exception): pass
def ring(*_): raise Alarm
signal.signal(signal.SIGALRM, ring)
dice = random.Random(5)
interrupted = 0
for number in range(150):
    region = None
    try:
        signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.00005, 0.01))
        region = Region.create(f"k{number}", "64K")
        region.buf[0] = 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Alarm:
        interrupted += 1
    while True:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if region is not None:
                region.unlink()
                region.close()
            break
        except Alarm:
            pass
del region
assert interrupted, interrupted
deadline = time.monotonic() + 30
while holding.held() and time.monotonic() < deadline:
    time.sleep(0.01)  # a call that was ended is undone by itself, if that takes long
assert holding.held() == [], holding.held()
# What is there under a name is whole.
for name in os.listdir(os.environ["MSHARE_ROOT"]):
    if name.startswith("k"):
        with Region.attach(name) as left:
            assert left.buf[0] in (0, 1)
            left.unlink()
"""


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_alarm_at_any_moment_leaves_all_or_nothing(daemon: Daemon) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [name for name in os.listdir(daemon.mount) if name.startswith("k")] == []


MANY_AND_A_CHILD = """
import os, sys
from libmshare import Region
regions = [Region.create(size="1M", ephemeral=True) for _ in range(30)]
print("ready", flush=True)
sys.stdin.readline()
child = os.fork()
print(os.waitpid(child, 0)[1] if child else "child", flush=True)
os._exit(0)
"""


@pytest.mark.timeout(120)
def test_a_child_waits_once_for_all_its_regions(daemon: Daemon) -> None:
    """fork() is one call, however many regions there are, and no daemon comes."""
    daemon.expected.append("taking down the mount")
    process = subprocess.Popen(
        [sys.executable, "-c", MANY_AND_A_CHILD],
        env={**os.environ, "MSHARE_RECONNECT_SECONDS": "2"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            daemon.kill()
            # Two seconds, and not a minute.
            assert process.communicate("go\n", timeout=30)[0] == "child\n0\n"
        finally:
            process.kill()
            daemon.start()
