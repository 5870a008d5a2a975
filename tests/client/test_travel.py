"""Arrays and tensors on their way to other processes: by reference where the library allows.

joblib, loky, cloudpickle and pickle itself hold contents by design: there by_reference() says
that it is not these that are meant.  Torch is as large as everything else here, so its part is
played by a stand-in (support/standin); MSHARE_TEST_TORCH=1 has the real one, which is installed
then.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
import numpy as np
import pytest
from conftest import SUPPORT, Daemon
from inside import one_daemon_fixture as _one_daemon_fixture  # noqa: F401 - of every test here
from inside import root_fixture as _root_fixture  # noqa: F401 - the same
from joblib.externals import loky
from numpy.typing import NDArray
from pythons import OWN, Python

from libmshare import Region, Stale, by_reference, holding

Where = tuple[int, tuple[int, ...], tuple[int, ...], str]


def where(array: NDArray[Any]) -> Where:
    """What of an array is to arrive as it was."""
    return array.ctypes.data, array.shape, array.strides, array.dtype.str


def change(array: NDArray[Any]) -> Where:
    array += 1
    return where(array)


def same(array: NDArray[Any]) -> NDArray[Any]:
    return array


def views(region: Region) -> list[NDArray[Any]]:
    """What can be made of an array without a copy."""
    plain = region.ndarray((40, 50), np.int32)
    record = region.ndarray(100, [("a", "u1"), ("b", ">i4")], 1 << 15)
    return [
        plain,
        plain[3:20:2, ::-1],
        plain.T,
        plain[5, 7:8],
        plain[None, :1],
        np.broadcast_to(plain[0], (1, 50)),
        record["b"],
        record[::3]["a"],
        region.ndarray((3, 4), np.float64, 1 << 16, "F"),
        region.ndarray((), np.complex128, 1 << 17),
    ]


@pytest.fixture(name="region")
def region_fixture(root: None) -> Iterator[Region]:
    with Region.create(size="8M", ephemeral=True) as region:
        yield region


def test_every_view_travels_in_the_standard_library(region: Region) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for view in views(region):
            assert pool.submit(where, view).result() == where(view)
            assert where(pool.submit(same, view).result()) == where(view)


def is_written(array: NDArray[Any]) -> bool:
    return array.flags.writeable


def total(read: NDArray[Any], out: NDArray[Any]) -> float:
    np.add(read, 1, out=out)
    return float(out.sum())


def test_who_only_reads_one_array_writes_another(region: Region) -> None:
    """They are of one region, which a process has attached once."""
    read, out = region.ndarray(10), region.ndarray(10, offset=4096)
    read.flags.writeable = False
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert not pool.submit(is_written, read).result()
        assert pool.submit(total, read, out).result() == 10.0
        assert not pool.submit(is_written, np.broadcast_to(out[:1], 5)).result()
    assert out.tolist() == [1.0] * 10


def fill(array: Any) -> str:
    array["x"][0] = 7
    return type(array).__name__


def test_classes_of_arrays_travel_too(region: Region) -> None:
    record = region.ndarray(3, [("x", "f8")]).view(np.recarray)
    masked = np.ma.MaskedArray(
        region.ndarray(3, [("x", "f8")], 4096), mask=np.array([(0,), (1,), (0,)], [("x", "?")])
    )
    plain = np.ma.MaskedArray(region.ndarray(3, [("x", "f8")], 8192))
    square = region.ndarray((2, 2), offset=12288).view(np.matrix)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(fill, record).result() == "recarray"
        assert pool.submit(fill, masked).result() == "MaskedArray"
        assert pool.submit(fill, plain).result() == "MaskedArray"
        assert pool.submit(where, square).result() == where(square)
        found: Any = pool.submit(same, masked).result()
    assert (record.x[0], masked.data["x"][0], plain.data["x"][0]) == (7.0, 7.0, 7.0)
    assert found.mask.tolist() == masked.mask.tolist()
    assert found.fill_value == masked.fill_value
    elsewhere = np.ma.MaskedArray(np.zeros(3), mask=[False, True, False])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(same, elsewhere).result().tolist() == [0.0, None, 0.0]
        assert type(pool.submit(same, np.zeros(2).view(np.recarray)).result()) is np.recarray


View = tuple[Any, Any, bytes, bool]


def seen(view: memoryview) -> View:
    return view.shape, view.strides, view.tobytes(), view.readonly


def test_every_memoryview_travels(region: Region) -> None:
    region.buf[:64] = bytes(range(64))
    kinds = (complex, ">i4", "S5", [("a", "u1"), ("b", "<i2")], "?", "f4")
    arrays = [region.ndarray(3, kind) for kind in kinds]
    integers = (ctypes.c_int * 4).from_buffer(region.buf)
    views = [
        *(each.data for each in arrays),
        memoryview(integers),
        region.buf[:64:2],
        region.buf[63::-1],
    ]
    views += [region.ndarray((3, 4), order="F").data, region.buf[:10].toreadonly()]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for view in views:
            assert pool.submit(seen, view).result() == seen(view), view.format
        with pytest.raises(TypeError, match="does not lie in a region"):
            pool.submit(seen, memoryview(b"abc")[::2]).result()
    del integers, views, view


class Job(Region):
    """A program's own."""

    name_of_it: str

    def hello(self) -> str:
        return f"{self.name_of_it} {self[0]}"


def test_a_class_of_the_programs_own_travels(root: None) -> None:
    with Job.create(size="1M", ephemeral=True) as job:
        job.name_of_it, job[0] = "mine", 3
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(Job.hello, job).result() == "mine 3"
        with pickle.loads(pickle.dumps(job)) as again:
            assert type(again) is Job and again.identity == job.identity


def test_joblib_has_by_reference_what_is_said_to_be(region: Region) -> None:
    """Large arrays, which it would write to a file, and small ones, which it would copy."""
    for shape in (1 << 19, 100):
        array = region.ndarray(shape)
        array[:] = 1
        with joblib.Parallel(n_jobs=2) as parallel:
            parts = np.split(by_reference(array), 2)
            found = parallel(joblib.delayed(change)(part) for part in parts)
            assert found == [where(part) for part in parts]
            back = parallel([joblib.delayed(same)(by_reference(array[::2]))])
            assert where(back[0]) == where(array[::2])
            del back
        assert array.tolist() == [2.0] * shape
    loky.get_reusable_executor().shutdown(wait=True)


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_any_pickle_of_it_is_a_reference(region: Region, pickler: Any) -> None:
    for view in views(region):
        referring = by_reference(view)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            sent = pickler.dumps(referring, protocol)
            again = pickle.loads(pickle.dumps(pickle.loads(sent), protocol))
            assert where(again) == where(view)
            assert type(again) is type(referring)
    whole = pickler.dumps(by_reference(region.ndarray(1 << 19)))
    assert len(whole) < 1000
    alone = by_reference(region.ndarray(10))
    alone.flags.writeable = False
    assert not pickle.loads(pickler.dumps(alone)).flags.writeable


def test_what_is_computed_of_it_is_plain(region: Region) -> None:
    array = by_reference(region.ndarray((3, 4)))
    array[:] = 2
    assert type(array + 1) is np.ndarray
    assert isinstance(array.sum(), float)
    assert type(array.sum(axis=0)) is np.ndarray
    assert type(np.add(array, 1, out=array)) is type(array)
    assert type(array[1:]) is type(array)
    copied = pickle.loads(pickle.dumps(array.copy()))
    assert copied.tolist() == [[3.0] * 4] * 3
    assert not (region.start <= copied.ctypes.data < region.start + region.size)
    for other in (np.ones(3), array[:0], np.array([None])):
        with pytest.raises(ValueError, match="does not lie in a region"):
            by_reference(other)


def test_what_is_gone_is_stale_wherever_it_arrives() -> None:
    with Region.create(size="1M", ephemeral=True) as region:
        sent = pickle.dumps(by_reference(region.ndarray(10)))
        assert pickle.loads(sent).shape == (10,)
    with pytest.raises(Stale):
        pickle.loads(sent)


def test_threads_send_and_close(region: Region) -> None:
    """A reference is taken while the region is held, whatever another thread closes."""
    array = by_reference(region.ndarray(100))
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            with Region.attach(region.identity):
                pass

    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(churn) for _ in range(2)]
        try:
            for _ in range(50):
                assert where(pickle.loads(pickle.dumps(array))) == where(array)
        finally:
            stop.set()
        assert [each.result() for each in running] == [None, None]
    del array
    assert len(holding.held()) == 1


TENSORS = """
import gc

import numpy as np
import torch

import libmshare.tensors
from libmshare import Region, holding


def where(tensor):
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def echo(inbox, outbox):
    while (tensor := inbox.get()) is not None:
        tensor += 1
        outbox.put((where(tensor), tensor))
        del tensor


def main():
    context = torch.multiprocessing.get_context("spawn")
    inbox, outbox = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=echo, args=(inbox, outbox))
    process.start()
    with Region.create(size="1M", ephemeral=True) as region:
        array = region.ndarray((20, 30), np.int32)
        whole = torch.from_numpy(array)
        for tensor in (whole, whole[3:9, ::2], whole.t(), whole[1, 2], whole[5, :1]):
            before = array.sum()
            inbox.put(tensor)
            there, back = outbox.get()
            assert there == where(tensor) == where(back), (there, where(tensor), where(back))
            assert array.sum() - before == tensor.numel()
            del back
        other = torch.from_numpy(np.ones(5, np.int32))
        inbox.put(other)
        there, back = outbox.get()
        assert back.tolist() == [2] * 5
        assert not region.start <= there[0] < region.start + region.size
        del whole, tensor, array, back, other
    inbox.put(None)
    process.join()
    gc.collect()
    assert process.exitcode == 0
    assert holding.held() == []


if __name__ == "__main__":
    main()
"""


def test_tensors_travel_by_reference(daemon: Daemon, tmp_path: Path) -> None:
    program = tmp_path / "tensors.py"
    program.write_text(TENSORS)
    environment = Python(OWN).environment(daemon)
    if not os.environ.get("MSHARE_TEST_TORCH"):
        environment["PYTHONPATH"] = str(SUPPORT / "standin")
    done = subprocess.run(
        [sys.executable, "-X", "dev", str(program)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
