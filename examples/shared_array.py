"""One array, many processes, one address.

A parent creates a region, puts an array and a pointer to a text into it, and its
children, who get the region pickled by name, work on the same array in place.

    sudo .venv/bin/msharefsd --mountpoint /run/mshare &
    MSHARE_ROOT=/run/mshare .venv/bin/python examples/shared_array.py
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os

import numpy as np

from libmshare import Region

TIB = 1 << 40
GIB = 1 << 30
WORKERS = 4
NUMBERS = 1 << 20
TEXT_AT = 16 * NUMBERS


def work(region: Region, worker: int) -> None:
    """Square this worker's share of the numbers, and follow the pointer."""
    numbers = region.ndarray(NUMBERS, np.int64)
    numbers[worker::WORKERS] **= 2
    pointer = int(region.ndarray(1, np.uint64, offset=TEXT_AT)[0])
    text = ctypes.string_at(pointer).decode()
    print(f"worker {worker}, process {os.getpid()}, at {pointer:#x} reads: {text}", flush=True)


def main() -> None:
    """Create the region, let the workers at it, look at what they did, remove it."""
    with Region("array", create=True, exclusive=True, start=4 * TIB, size=512 * GIB) as region:
        numbers = region.ndarray(NUMBERS, np.int64)
        numbers[:] = np.arange(NUMBERS)
        text = region.start + TEXT_AT + 8
        ctypes.memmove(text, b"a pointer means the same everywhere\0", 36)
        region.ndarray(1, np.uint64, offset=TEXT_AT)[0] = text

        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=work, args=(region, n)) for n in range(WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

        assert int(numbers[1000]) == 1_000_000
        print(f"the parent finds {numbers[:6].tolist()} ...")
        del numbers  # a region with views of it is not closed
        region.unlink()


if __name__ == "__main__":
    main()
