"""Connections that are not for the pager of who made them, with pagers that are puppets."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from bare import Bare
from conftest import ALIGNMENT, Daemon
from hostile import START
from test_puppets import ALICE, MALLORY, Puppeteer, begun, extent_of, sleeps

from msharefsd.config import LimitSettings
from msharefsd.control.wire import Op, RequestFlag
from msharefsd.front.pagers import Pagers
from msharefsd.front.router import Router
from msharefsd.link.board import Board
from msharefsd.link.channel import Channel
from msharefsd.link.messages import (
    Begin,
    Connection,
    Done,
    Established,
    Forward,
    FromFront,
    Listen,
    Moved,
    Ready,
)
from msharefsd.linux import uffd
from msharefsd.mount.names import Names
from msharefsd.region.limits import Limits
from msharefsd.region.region import INODES
from msharefsd.threads.fairness import Turns

OURS = os.getuid()
"""Whose sockets the tests' own are."""
MOUNT = (0, 77)
Heard = list[tuple[FromFront, list[int]]]


def notes(heard: Heard) -> Callable[[Channel[FromFront]], Awaitable[None]]:
    """A pager that only writes down what it is told."""

    async def play(channel: Channel[FromFront]) -> None:
        await begun(channel)
        while (got := await channel.receive()) is not None:
            heard.append(got)

    return play


@asynccontextmanager
async def routed(
    plays: dict[int, Callable[[Channel[FromFront]], Awaitable[None]]],
    limits: Limits | None = None,
) -> AsyncIterator[tuple[Router, Pagers, Names, Puppeteer]]:
    names, turns = Names(1 << 21), Turns()
    async with trio.open_nursery() as nursery:
        puppeteer = Puppeteer(nursery, plays)
        made: Any = puppeteer
        pagers = Pagers(made, names, MOUNT)
        await nursery.start(pagers.run)
        router = Router(names, pagers, limits or Limits(), turns, MOUNT)
        await nursery.start(router.run)
        nursery.start_soon(turns.run)
        try:
            yield router, pagers, names, puppeteer
        finally:
            puppeteer.close()
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(45):
        while not condition():
            await trio.sleep(0.005)


def told(heard: Heard, kind: type) -> list[Any]:
    return [message for message, _ in heard if isinstance(message, kind)]


def forwards(of: Callable[[], Forward], heard: Heard) -> Callable[..., Awaitable[None]]:
    """A pager that passes one connection on, and notes what it is told then."""

    async def play(channel: Channel[FromFront]) -> None:
        await begun(channel)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            await channel.send(of(), [theirs.fileno()])
            while (got := await channel.receive()) is not None:
                heard.append(got)

    return play


@pytest.mark.parametrize("proof", ["its file", "its memory"])
async def test_what_is_another_users_goes_to_that_users_pager(proof: str) -> None:
    mallorys: Heard = []
    alices: Heard = []
    number = 0

    def forward() -> Forward:
        if proof == "its file":
            return Forward(5, True, *MOUNT, INODES * number)
        return Forward(5, True, 0, 9, 7)

    plays = {MALLORY: forwards(forward, mallorys), ALICE: notes(alices)}
    async with routed(plays) as (_, pagers, names, _):
        name = names.create(b"alices", 0o600, ALICE, ALICE)
        number = name.id
        names.established(extent_of(name))
        pagers.start(MALLORY)
        await until(lambda: told(alices, Connection))
        (connection,) = told(alices, Connection)
        assert (connection.name.id, connection.error, connection.look) == (name.id, 0, False)
        await until(lambda: told(mallorys, Done))
        assert told(mallorys, Done) == [Done(5)]
        assert not told(mallorys, Connection)


async def test_what_nobody_knows_comes_back_and_is_not_looked_at_again() -> None:
    heard: Heard = []
    plays = {OURS: forwards(lambda: Forward(1, True, 3, 3, 3), heard)}
    async with routed(plays) as (_, pagers, _, _):
        pagers.start(OURS)
        await until(lambda: told(heard, Connection))
        (connection,) = told(heard, Connection)
        assert (connection.name, connection.error, connection.look) == (None, 0, False)


async def test_who_came_by_another_users_socket_is_looked_at_by_their_own_pager() -> None:
    mallorys: Heard = []
    own: Heard = []
    plays = {MALLORY: forwards(lambda: Forward(1, looked=False), mallorys), OURS: notes(own)}
    async with routed(plays) as (_, pagers, _, _):
        pagers.start(MALLORY)
        await until(lambda: told(own, Connection))
        (connection,) = told(own, Connection)
        assert (connection.name, connection.look) == (None, True)


async def test_who_has_too_many_connections_is_told_so_by_their_own_pager() -> None:
    heard: Heard = []
    settings = LimitSettings(user={str(OURS): {"connections": 0}})
    alices: Heard = []
    plays = {OURS: forwards(lambda: Forward(1, True, 0, 9, 7), heard), ALICE: notes(alices)}
    limits = Limits(settings)
    async with routed(plays, limits) as (_, pagers, names, _):
        names.established(extent_of(names.create(b"alices", 0o600, ALICE, ALICE)))
        pagers.start(OURS)
        await until(lambda: told(heard, Connection))
        (connection,) = told(heard, Connection)
        assert connection.error == errno.EMFILE
        assert not told(alices, Connection)


async def test_each_pager_of_a_user_accepts_from_the_same_socket(directory: Path) -> None:
    """Who connected before there was one, or between two of them, is there for the next."""
    accepted: list[bytes] = []

    async def accepts_once(channel: Channel[FromFront]) -> None:
        await begun(channel)
        while (got := await channel.receive()) is not None:
            if isinstance(got[0], Listen):
                with socket.socket(fileno=got[1][0]) as listener:
                    sock, _ = listener.accept()
                    with sock:
                        accepted.append(sock.recv(10))
                return  # and dies

    async with routed({ALICE: accepts_once}) as (router, _, _, puppeteer):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listener.bind(str(directory / "control"))
        listener.listen(5)
        router.serve(listener, ALICE)
        await trio.sleep(0.05)
        assert puppeteer.started == [], "nobody has connected"
        clients = []
        for text in (b"one", b"two", b"three"):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            client.connect(str(directory / "control"))
            client.send(text)
            clients.append(client)
        await until(lambda: len(accepted) == 3)
        assert accepted == [b"one", b"two", b"three"]
        assert puppeteer.started == [ALICE] * 3
        for client in clients:
            client.close()


async def test_one_that_accepts_is_not_idle_while_it_has_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boards: list[Board] = []

    async def serves(channel: Channel[FromFront]) -> None:
        got = await channel.receive()
        assert got is not None
        assert isinstance(got[0], Begin)
        boards.append(Board(got[1][0]))
        os.close(got[1][0])
        boards[0].connected(1)
        await channel.send(Ready([], last=True))
        await trio.sleep_forever()

    async with routed({ALICE: serves}) as (_, pagers, _, _):
        pager = pagers.start(ALICE)
        await pager.ready.wait()
        assert not pager.idle
        boards[0].connected(-1)
        assert pager.idle
        used = pager.used
        boards[0].connected(1)
        boards[0].connected(-1)
        await trio.sleep(0.01)
        assert pager.idle
        assert pager.used > used, "somebody has been there since"
        boards[0].close()


async def test_a_name_without_memory_goes_to_its_new_owners_pager() -> None:
    """And what its last one said before it had heard of that does no harm."""
    before: Heard = []
    own: list[Channel[FromFront]] = []

    async def play(channel: Channel[FromFront]) -> None:
        own.append(channel)
        await notes(before)(channel)

    async with routed({MALLORY: play, ALICE: sleeps}) as (_, pagers, names, _):
        pager = pagers.start(MALLORY)
        await pager.ready.wait()
        name = names.create(b"r", 0o600, MALLORY, MALLORY)
        names.change(name, uid=ALICE)
        await until(lambda: told(before, Moved))
        assert told(before, Moved) == [Moved(name.id)]
        with contextlib.suppress(OSError):
            await own[0].send(Established(3, extent_of(name)))
        await until(lambda: told(before, Done))
        assert told(before, Done) == [Done(3, errno.ENOTCONN)]
        assert (name.size, name.home) == (0, ALICE)
        assert pager.extents == set()


def test_who_shows_nothing_at_first_begins_with_what_it_shows_then(
    make_daemon: Callable[..., Daemon],
) -> None:
    """So does who shows what its pager had forgotten, and has heard of again meanwhile."""
    daemon = make_daemon(f"--alignment={ALIGNMENT}").start()
    path = daemon.mount / "late"
    proof = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        one = Bare(daemon.mount)
        assert one.call(Op.USERFAULTFD).error == errno.EINVAL
        answer = one.call(
            Op.ATTACH,
            proof,
            uffd.open_new(),
            start=START,
            size=ALIGNMENT,
            oflags=os.O_CREAT | os.O_RDWR,
            flags=RequestFlag.HAS_MAPPINGS,
        )
        assert (answer.error, answer.message) == (0, "")
        one.sock.close()
        other = Bare(daemon.mount)
        assert other.call(Op.USERFAULTFD).error == errno.EINVAL
        path.unlink()
        assert other.call(Op.ATTACH, proof, uffd.open_new()).error == errno.ENOENT
        other.sock.close()
    finally:
        os.close(proof)
