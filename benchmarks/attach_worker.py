"""Attach and detach shared memory from Python, by each way in turn, and take the time.

A process of its own, run by `measures.py`: what it has mapped is what a Python
program has.  Prints one JSON object: way -> list of [attach, detach] in nanoseconds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import time
from collections.abc import Callable
from multiprocessing import shared_memory
from typing import Final

import posix_ipc

from libmshare import Region, core

Cycle = Callable[[], tuple[int, int]]
"""One attach and detach; the nanoseconds that each took."""

WARM_UP = 5
"""Cycles of each way that are not counted: the first ones import, connect, start helpers."""


def _by_core(name: str) -> Cycle:
    where = core.mshare_stat(name)

    def cycle() -> tuple[int, int]:
        since = time.perf_counter_ns()
        core.mshare(name, where.start, where.size, os.O_RDWR)
        attached = time.perf_counter_ns()
        core.mshare_detach(name)
        return attached - since, time.perf_counter_ns() - attached

    return cycle


def _by_region(name: str) -> Cycle:
    def cycle() -> tuple[int, int]:
        since = time.perf_counter_ns()
        region = Region.attach(name)
        attached = time.perf_counter_ns()
        region.close()
        return attached - since, time.perf_counter_ns() - attached

    return cycle


def _by_multiprocessing(name: str) -> Cycle:
    def cycle() -> tuple[int, int]:
        since = time.perf_counter_ns()
        memory = shared_memory.SharedMemory(name=name)
        attached = time.perf_counter_ns()
        memory.close()
        return attached - since, time.perf_counter_ns() - attached

    return cycle


CREATED: Final = 1 << 20
"""Bytes of what is created and removed again."""


def _create_region() -> tuple[int, int]:
    since = time.perf_counter_ns()
    region = Region.create(size=CREATED)
    created = time.perf_counter_ns()
    region.unlink()
    region.close()
    return created - since, time.perf_counter_ns() - created


def _create_by_multiprocessing() -> tuple[int, int]:
    since = time.perf_counter_ns()
    memory = shared_memory.SharedMemory(create=True, size=CREATED)
    created = time.perf_counter_ns()
    memory.close()
    memory.unlink()
    return created - since, time.perf_counter_ns() - created


def _by_posix_ipc(name: str) -> Cycle:
    def cycle() -> tuple[int, int]:
        since = time.perf_counter_ns()
        memory = posix_ipc.SharedMemory(name)
        mapping = mmap.mmap(memory.fd, memory.size)
        memory.close_fd()
        attached = time.perf_counter_ns()
        mapping.close()
        return attached - since, time.perf_counter_ns() - attached

    return cycle


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("region", help="name of a region that another process holds")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--count", type=int, required=True, help="cycles of each way in a round")
    arguments = parser.parse_args()
    size = core.mshare_stat(arguments.region).size
    # Created here, so that this process's resource tracker sees its end too: one that
    # only attaches would, before Python 3.13, remove it at exit and complain.
    peer = shared_memory.SharedMemory(create=True, size=size)
    try:
        ways = {
            "core": _by_core(arguments.region),
            "Region": _by_region(arguments.region),
            "multiprocessing": _by_multiprocessing(peer.name),
            "posix_ipc": _by_posix_ipc(f"/{peer.name}"),
            "create Region": _create_region,
            "create multiprocessing": _create_by_multiprocessing,
        }
        samples: dict[str, list[tuple[int, int]]] = {way: [] for way in ways}
        for cycle in ways.values():
            for _ in range(WARM_UP):
                cycle()
        for _ in range(arguments.rounds):
            for way, cycle in ways.items():
                samples[way] += [cycle() for _ in range(arguments.count)]
    finally:
        peer.close()
        peer.unlink()
    print(json.dumps(samples))


if __name__ == "__main__":
    main()
