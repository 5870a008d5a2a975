"""One array, many processes, one address.

A parent creates a region, puts an array and a pointer to a text into it, and its
children, who get it by reference, work on the same array in place.

    sudo .venv/bin/msharefsd --mountpoint /run/mshare &
    MSHARE_ROOT=/run/mshare .venv/bin/python examples/shared_array.py
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os

import numpy as np
from numpy.typing import NDArray

from libmshare import Region

WORKERS = 4
NUMBERS = 1 << 20
TEXT_AT = 16 * NUMBERS


def work(numbers: NDArray[np.int64], pointers: NDArray[np.uint64], worker: int) -> None:
    """Square this worker's share of the numbers, and follow the pointer."""
    numbers **= 2
    pointer = int(pointers[0])
    text = ctypes.string_at(pointer).decode()
    print(f"worker {worker}, process {os.getpid()}, at {pointer:#x} reads: {text}", flush=True)


def main() -> None:
    """Create the region, let the workers at it, look at what they did."""
    with Region.create(size="32M", ephemeral=True) as region:
        numbers = region.ndarray(NUMBERS, np.int64)
        numbers[:] = np.arange(NUMBERS)
        text = region.start + TEXT_AT + 8
        ctypes.memmove(text, b"a pointer means the same everywhere\0", 36)
        pointers = region.ndarray(1, np.uint64, offset=TEXT_AT)
        pointers[0] = text

        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=work, args=(numbers[n::WORKERS], pointers, n))
            for n in range(WORKERS)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

        assert int(numbers[1000]) == 1_000_000
        print(f"the parent finds {numbers[:6].tolist()} ...")


if __name__ == "__main__":
    main()
