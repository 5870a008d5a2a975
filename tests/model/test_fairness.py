"""Turns by user: who asks a hundred times does not get a hundred turns."""

from __future__ import annotations

import time

import pytest
import trio

from msharefsd.threads.fairness import SLICE_SECONDS, Turns

MANY, FEW = 1000, 2000


def work(seconds: float) -> None:
    """Use the processor for so long."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


async def test_who_has_used_nothing_waits_for_nobody() -> None:
    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        done: list[int] = []

        async def ask(uid: int) -> None:
            async with turns.turn(uid):
                work(SLICE_SECONDS / 4)
                done.append(uid)

        for _ in range(200):
            nursery.start_soon(ask, MANY)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        nursery.start_soon(ask, FEW)
        while FEW not in done:
            await trio.lowlevel.checkpoint()
        assert len(done) < 200, "and not behind all of the other's"
        while len(done) < 201:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_two_who_ask_much_have_as_much() -> None:
    turns = Turns()
    done: list[int] = []

    async def ask(uid: int) -> None:
        async with turns.turn(uid):
            work(SLICE_SECONDS / 4)
            done.append(uid)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        for _ in range(400):
            nursery.start_soon(ask, MANY)
        for _ in range(100):
            nursery.start_soon(ask, FEW)
        while done.count(FEW) < 100:
            await trio.lowlevel.checkpoint()
        assert done.count(MANY) < 250, "as long as both ask, one has not four turns of the other's"
        while len(done) < 500:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_who_gives_up_in_line_holds_nobody_up() -> None:
    turns = Turns()
    done: list[int] = []

    async def ask(uid: int) -> None:
        async with turns.turn(uid):
            work(SLICE_SECONDS)
            done.append(uid)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        with trio.CancelScope() as impatient:
            async with trio.open_nursery() as waiting:
                for _ in range(20):
                    waiting.start_soon(ask, MANY)
                while not done:
                    await trio.lowlevel.checkpoint()
                impatient.cancel()
        nursery.start_soon(ask, MANY)
        nursery.start_soon(ask, FEW)
        while FEW not in done:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_work_that_awaits_counts_for_who_has_it_done() -> None:
    turns = Turns()
    done: list[int] = []

    async def steps(uid: int, count: int) -> int:
        for _ in range(count):
            work(SLICE_SECONDS / 4)
            await trio.lowlevel.checkpoint()
        done.append(uid)
        return uid

    async def ask(uid: int, count: int) -> None:
        assert await turns.work(uid, steps, uid, count) == uid

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        for _ in range(100):
            nursery.start_soon(ask, MANY, 4)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        for _ in range(10):
            nursery.start_soon(ask, FEW, 1)
        while done.count(FEW) < 10:
            await trio.lowlevel.checkpoint()
        assert done.count(MANY) < 100, "and not behind all of the other's"
        nursery.cancel_scope.cancel()


async def test_what_it_raises_and_what_it_is_sent_pass_through() -> None:
    turns = Turns()

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("told")

    with pytest.raises(KeyError, match="told"):
        await turns.work(MANY, fail)
    with trio.move_on_after(0.01) as scope:
        await turns.work(MANY, trio.sleep_forever)
    assert scope.cancelled_caught
