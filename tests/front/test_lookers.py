"""Lookers that are puppets: who hangs keeps its own user from connecting, and nobody else."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import trio
import trio.testing

from msharefsd.front import lookers as module
from msharefsd.front.lookers import Lookers
from msharefsd.front.starter import Kind
from msharefsd.linux.syscalls import FileIdentity

ALICE, BOB, MALLORY = 1000, 1001, 1002
SEEN = FileIdentity(1, 2, 3, 4)


class Puppeteer:
    """Stands in for the starter: each looker is a coroutine."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.started: list[int] = []

    async def start(self, uid: int, channel: socket.socket, kind: Kind) -> tuple[int, int]:
        assert kind is Kind.LOOKER
        self.started.append(uid)
        own = trio.socket.from_stdlib_socket(channel.dup())
        self.nursery.start_soon(self._play, uid, own)
        return os.getpid(), os.pidfd_open(os.getpid())

    async def _play(self, uid: int, own: trio.socket.SocketType) -> None:
        with own:
            while True:
                data, ancillary, _, _ = await own.recvmsg(1, socket.CMSG_SPACE(4))
                if not data:
                    return
                os.close(int.from_bytes(ancillary[0][2], "little"))
                if uid == BOB and self.started.count(BOB) == 1:
                    return  # killed
                await own.send(module._ANSWER.pack(*module._fields(SEEN)))
                if uid == MALLORY:
                    await trio.sleep_forever()
                await own.send(b"x")


@pytest.fixture
async def stage(nursery: trio.Nursery) -> tuple[Lookers, Puppeteer]:
    puppeteer: Any = Puppeteer(nursery)
    lookers = Lookers(puppeteer)
    nursery.start_soon(lookers.run)
    return lookers, puppeteer


async def test_one_that_nobody_needs_ends_and_comes_again(
    stage: tuple[Lookers, Puppeteer], autojump_clock: trio.testing.MockClock
) -> None:
    lookers, puppeteer = stage
    with socket.socket() as sock:
        for _ in range(3):
            assert await lookers.first(sock, ALICE) == SEEN
        await trio.sleep(3 * module.IDLE_SECONDS)
        assert await lookers.first(sock, ALICE) == SEEN
    assert puppeteer.started == [ALICE, ALICE]


async def test_one_that_was_killed_is_replaced(
    stage: tuple[Lookers, Puppeteer], autojump_clock: trio.testing.MockClock
) -> None:
    lookers, puppeteer = stage
    with socket.socket() as sock:
        assert await lookers.first(sock, BOB) == SEEN
    assert puppeteer.started == [BOB, BOB]


async def test_who_has_one_that_hangs_gets_no_other(
    stage: tuple[Lookers, Puppeteer], autojump_clock: trio.testing.MockClock
) -> None:
    lookers, puppeteer = stage
    with socket.socket() as sock:
        assert await lookers.first(sock, MALLORY) == SEEN
        await trio.sleep(10 * module.IDLE_SECONDS)
        with trio.move_on_after(100 * module.IDLE_SECONDS) as waits:
            await lookers.first(sock, MALLORY)
        assert waits.cancelled_caught
        assert await lookers.first(sock, ALICE) == SEEN
    assert puppeteer.started == [MALLORY, ALICE]
