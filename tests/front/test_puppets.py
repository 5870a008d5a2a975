"""The front with pagers that are puppets: they hang, lie and die, and it goes on."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from msharefsd.errors import Refused
from msharefsd.front import pagers as module
from msharefsd.front.pagers import Pager, Pagers, State
from msharefsd.link.channel import Channel, pair
from msharefsd.link.messages import (
    Answer,
    Begin,
    Connection,
    Emptied,
    Ended,
    Established,
    Extent,
    FromFront,
    FromPager,
    Gone,
    Held,
    NameRecord,
    Question,
    Ready,
    Unlink,
)
from msharefsd.mount.names import Name, Names

ALICE, MALLORY = 1000, 1001
Puppet = Callable[[Channel[FromFront]], Awaitable[None]]


class Puppeteer:
    """Stands in for the starter: each pager is a coroutine, with a process that sleeps."""

    def __init__(self, nursery: trio.Nursery, plays: dict[int, Puppet]) -> None:
        self.nursery = nursery
        self.plays = plays
        self.started: list[int] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def ended(self, uid: int) -> None:
        assert uid in self.started

    async def start(self, uid: int, channel: socket.socket) -> tuple[int, int]:
        process = subprocess.Popen(["sleep", "60"])
        self.processes.append(process)
        self.started.append(uid)
        own = socket.socket(fileno=os.dup(channel.fileno()))
        self.nursery.start_soon(self._play, uid, own)
        return process.pid, os.pidfd_open(process.pid)

    async def _play(self, uid: int, own: socket.socket) -> None:
        channel: Channel[FromFront] = Channel(own, FromFront)
        try:
            with contextlib.suppress(OSError):
                await self.plays[uid](channel)
        finally:
            channel.close()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@asynccontextmanager
async def stage(plays: dict[int, Puppet]) -> AsyncIterator[tuple[Pagers, Names, Puppeteer]]:
    names = Names(1 << 21)
    async with trio.open_nursery() as nursery:
        puppeteer = Puppeteer(nursery, plays)
        made: Any = puppeteer
        pagers = Pagers(made, names, (0, 1))
        await nursery.start(pagers.run)
        try:
            yield pagers, names, puppeteer
        finally:
            puppeteer.close()
            nursery.cancel_scope.cancel()


async def begun(channel: Channel[FromFront]) -> list[NameRecord]:
    """Play the beginning; the names that came."""
    got = await channel.receive()
    assert got is not None
    message, fds = got
    assert isinstance(message, Begin)
    for fd in fds:
        os.close(fd)
    await channel.send(Ready([], last=True))
    return message.names


def extent_of(name: Name, inode: int = 7) -> Extent:
    return Extent(name.id, 1 << 21, 1 << 21, 0, 9, inode, -1, name.record())


async def sleeps(channel: Channel[FromFront]) -> None:
    """Ready, and then nothing any more."""
    await begun(channel)
    await trio.sleep_forever()


async def never_ready(channel: Channel[FromFront]) -> None:
    await channel.receive()
    await trio.sleep_forever()


async def answers(channel: Channel[FromFront]) -> None:
    await begun(channel)
    while (got := await channel.receive()) is not None:
        match got[0]:
            case Question(number=number, kind="metrics"):
                await channel.send(Answer(number, samples=[("msharefs_sharers", {}, 3.0)]))
            case Question(number=number):
                await channel.send(Answer(number, error=errno.EIO))
            case Connection(number=number):
                os.close(got[1][0])
                await channel.send(Ended([number]))


async def test_one_that_hangs_keeps_nobody_waiting_but_its_own() -> None:
    async with stage({ALICE: answers, MALLORY: sleeps}) as (pagers, _, _):
        for uid in (ALICE, MALLORY):
            await pagers.start(uid).ready.wait()
        assert await pagers.text(MALLORY, "info", 1, 0.05) is None
        assert await pagers.text(ALICE, "info", 1, 5) == errno.EIO
        await pagers.look(0.05)
        assert pagers.sharers() == 3
        silent = {pager.uid: pager.silent > 0 for pager in pagers.all()}
        assert silent == {ALICE: False, MALLORY: True}


async def test_connections_go_to_who_lives_and_wait_for_who_does_not() -> None:
    over: list[str] = []
    async with stage({ALICE: answers, MALLORY: never_ready}) as (pagers, _, _):
        stuck, gone = socket.socketpair(), socket.socketpair()
        with trio.move_on_after(0.05) as waiting:
            await pagers.hand_over(stuck[0], MALLORY, None, lambda: over.append("stuck"))
        assert waiting.cancelled_caught
        await pagers.hand_over(gone[0], ALICE, None, lambda: over.append("alice's"))
        with trio.fail_after(20):
            while not over:
                await trio.testing.wait_all_tasks_blocked()
        assert over == ["alice's"]
        assert gone[0].fileno() == -1, "it is the pager's"
        for each in (*stuck, *gone):
            each.close()


async def test_one_that_dies_is_started_again_and_what_waits_is_handed_to_the_next() -> None:
    lives: list[int] = []

    async def dies_once(channel: Channel[FromFront]) -> None:
        lives.append(1)
        if len(lives) == 1:
            return
        await answers(channel)

    over: list[str] = []
    async with stage({ALICE: dies_once}) as (pagers, _, _):
        ours, theirs = socket.socketpair()
        with trio.fail_after(20):
            await pagers.hand_over(ours, ALICE, None, lambda: over.append("served"))
            while not over:
                await trio.testing.wait_all_tasks_blocked()
        assert len(lives) == 2
        theirs.close()


class Hasty(Puppeteer):
    """Its pagers say why they cannot serve, and have ended before they are told anything."""

    async def start(self, uid: int, channel: socket.socket) -> tuple[int, int]:
        async def nothing(_: Channel[FromFront]) -> None:
            pass

        self.plays[uid] = nothing
        own: Channel[FromFront] = Channel(socket.socket(fileno=os.dup(channel.fileno())), FromFront)
        assert own.send_now(Held("because", for_good=True))
        own.close()
        return await super().start(uid, channel)


async def test_one_that_ends_before_it_is_told_anything_has_said_why() -> None:
    async with trio.open_nursery() as nursery:
        starter: Any = Hasty(nursery, {})
        pager = Pager(ALICE, Names(1 << 21), (0, 1))
        with trio.fail_after(20):
            await pager.run(starter)
        starter.close()
    assert pager.failed == Held("because", for_good=True)


def test_what_was_said_is_heard_though_what_was_sent_was_not_read() -> None:
    ours, theirs = pair()
    front: Channel[FromPager] = Channel(ours, FromPager)
    pager: Channel[FromFront] = Channel(theirs, FromFront)
    assert front.send_now(Begin([], last=True, device=(0, 1)))
    assert pager.send_now(Held("because", for_good=True))
    pager.close()
    assert front.receive_now() == (Held("because", for_good=True), [])
    assert front.receive_now() == (None, None)
    front.close()


async def test_one_that_lies_about_another_users_region_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[Any] = []
    names_made = trio.Event()

    async def lies(channel: Channel[FromFront]) -> None:
        await begun(channel)
        await names_made.wait()
        await channel.send(told[0])
        await trio.sleep_forever()

    for lie in (Gone, Emptied, lambda number: Unlink(0, number)):
        told.clear()
        names_made = trio.Event()
        async with stage({MALLORY: lies, ALICE: sleeps}) as (pagers, names, _):
            name = names.create(b"alices", 0o600, ALICE, ALICE)
            names.established(extent_of(name))
            told.append(lie(name.id))
            pager = pagers.start(MALLORY)
            await pager.ready.wait()
            with caplog.at_level(logging.ERROR):
                names_made.set()
                with trio.fail_after(20):
                    await pager.gone.wait()
            assert names.find(b"alices") is name
            assert name.size, "nothing of hers has changed"
        assert "a region of user 1000" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("garbage", [b"", b"\xc1", b"x" * 100, b"\x81\xa4type\xa5Nope!"])
async def test_one_that_talks_garbage_is_given_up(garbage: bytes) -> None:
    async def babbles(channel: Channel[FromFront]) -> None:
        await begun(channel)
        channel._sock.send(garbage)
        await trio.sleep_forever()

    async with stage({MALLORY: babbles}) as (pagers, _, _):
        pager = pagers.start(MALLORY)
        with trio.fail_after(20):
            await pager.gone.wait()
        assert pager.state is State.GONE


async def test_what_a_pager_has_and_no_list_gets_its_name_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = NameRecord(41, b"kept", 0o640, ALICE, 5, True, 0, 0, b"")

    async def has(channel: Channel[FromFront]) -> None:
        got = await channel.receive()
        assert got is not None
        os.close(got[1][0])
        extent = Extent(41, 1 << 21, 1 << 21, 0, 9, 7, -1, record)
        await channel.send(Ready([extent], last=True))
        await trio.sleep_forever()

    with caplog.at_level(logging.WARNING):
        async with stage({ALICE: has}) as (pagers, names, _):
            await pagers.start(ALICE).ready.wait()
            found = names.find(b"kept")
            assert found is not None
            assert (found.id, found.mode, found.gid, found.size) == (41, 0o640, 5, 1 << 21)
            assert names.of_backing(0, 9, 7) is found
            assert names.create(b"next", 0o600, 0, 0).id > 41
    assert "it has its name again" in caplog.text


async def test_a_name_that_went_while_nobody_had_its_memory_goes() -> None:
    async with stage({ALICE: answers}) as (_, names, puppeteer):
        name = names.create(b"r", 0o600, ALICE, ALICE)
        names.unlink(name)
        assert names.with_id(name.id) is None
        assert puppeteer.started == [], "no pager is started for that"


async def test_an_established_region_is_found_by_its_memory(nursery: trio.Nursery) -> None:
    names = Names(1 << 21)
    name = names.create(b"r", 0o600, ALICE, ALICE)
    pager = Pager(ALICE, names, (0, 1))
    pager._heard(Established(1, extent_of(name)), [])
    assert names.of_backing(0, 9, 7) is name
    with pytest.raises(Refused):
        names.create(b"r", 0o600, ALICE, ALICE)
    pager._heard(Gone(name.id), [])
    assert names.of_backing(0, 9, 7) is None
    assert names.find(b"r") is name, "its name was not removed"
    assert name.size == 0


async def test_one_that_is_silent_for_long_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    with caplog.at_level(logging.ERROR):
        async with stage({MALLORY: sleeps}) as (pagers, _, puppeteer):
            await pagers.start(MALLORY).ready.wait()
            (process,) = puppeteer.processes
            with trio.fail_after(20):
                while process.poll() is None:
                    await trio.sleep(0.01)
    assert "does not answer" in caplog.text
    assert f"process {process.pid}" in caplog.text
