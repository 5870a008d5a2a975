"""Random messages, and messages that are nearly right, in every state of a connection."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
from pathlib import Path

import pytest
from bare import Bare, become
from fuzzing import TIMEOUT, keep_at_it, number
from world import EVIL, KINDS, MALLORY, SIZE, World, uffd_by_device
from world import world_fixture as _world_fixture  # noqa: F401 - the test asks for `world`

from msharefsd.control import wire
from msharefsd.control.wire import Op
from msharefsd.linux import syscalls

MOST_CONNECTIONS = 40


class Talker:
    """A process with many connections that says anything on any of them."""

    def __init__(self, mount: Path, dice: random.Random) -> None:
        self.mount = mount
        self.dice = dice
        self.open: list[Bare] = []
        self.fds: list[int] = []

    def stock_up(self) -> None:
        """Some descriptors of every kind, made while that is allowed."""
        for kind in self.dice.sample(sorted(KINDS), 12):
            self.fds.append(KINDS[kind](self.mount))
        self.fds.append(os.open(self.mount / "evil", os.O_RDWR))

    def some_fds(self) -> list[int]:
        count = self.dice.choice((0, 0, 1, 1, 2, 2, 2, 3, 8))
        fds = self.dice.choices(self.fds, k=count)
        if count and self.dice.random() < 0.5:
            fds[0] = self.fds[-1]  # the region's own file
        if count > 1 and self.dice.random() < 0.5:
            fresh = uffd_by_device()
            self.fds[self.dice.randrange(len(self.fds) - 1)] = fds[1] = fresh
        return fds

    def head(self, count: int) -> bytes:
        """A request's header: right, but for what the dice say."""
        dice = self.dice
        fields: list[int] = [
            wire.MAGIC,
            wire.VERSION,
            dice.choice(tuple(Op)),
            dice.choice((EVIL, EVIL + SIZE, 1 << 40, number(dice))),
            dice.choice((SIZE, 2 << 20, number(dice))),
            dice.choice((os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT, number(dice, 32))),
            dice.choice((0, 0, 1, 2, 4, 4, 4, 7, 8, 15)),
            count,
            0,
            dice.choice((0, 1, number(dice, 32))),
            dice.choice((3, number(dice, 32))),
        ]
        if dice.random() < 0.1:
            bits = (32, 16, 16, 64, 64, 32, 32, 32, 32, 32, 32)
            which = dice.randrange(len(fields))
            fields[which] = number(dice, bits[which])
        return wire.REQUEST.pack(*fields)

    def item(self) -> bytes:
        dice, page = self.dice, syscalls.PAGE
        return wire.OBJECT.pack(
            dice.choice((dice.randrange(SIZE // page) * page, number(dice))),
            dice.choice((dice.randrange(1, 64) * page, SIZE, number(dice))),
            dice.choice((0, 0, page, number(dice))),
            dice.choice((0, 1, 2, 3, 3, 3, 7, number(dice, 32))),
            dice.choice((0x11, 0x12, 0x31, 0x32, 0x21, 1, 2, number(dice, 32))),
        )

    def message(self) -> bytes:
        dice = self.dice
        if dice.random() < 0.1:
            return dice.randbytes(dice.choice((0, 1, 39, 40, 41, 79, 80, 2000, 33000, 70000)))
        count = dice.choice((0, 0, 1, 1, 1, 2, 1024, 1025))
        body = b"".join(self.item() for _ in range(count))
        said = count if dice.random() < 0.9 else number(dice, 32)
        data = self.head(said) + body
        if dice.random() < 0.05:
            broken = bytearray(data)
            broken[dice.randrange(len(broken))] = dice.getrandbits(8)
            return bytes(broken)
        return data

    def act(self) -> None:
        """One thing."""
        dice = self.dice
        if len(self.open) < 3 or (len(self.open) < MOST_CONNECTIONS and dice.random() < 0.2):
            self.open.append(Bare(self.mount, seconds=5))
            if dice.random() < 0.6:
                self.open[-1].attach("evil", own=uffd_by_device())
        one = dice.choice(self.open)
        what = dice.random()
        if what < 0.6:
            one.sock.setblocking(dice.random() < 0.5)
            one.send(self.message(), *self.some_fds())
            if dice.random() < 0.8:
                self.read(one)
        elif what < 0.7:
            self.read(one)
        elif what < 0.75:
            one.sock.shutdown(dice.choice((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)))
        elif what < 0.8:
            with contextlib.closing(self.new_name()):
                pass
        else:
            self.open.remove(one)
            one.close()

    def new_name(self) -> Bare:
        """Create a region as a donor might, or nearly."""
        dice = self.dice
        one = Bare(self.mount, seconds=5)
        file = os.open(self.mount / f"fuzz{dice.randrange(8)}", os.O_RDWR | os.O_CREAT, 0o600)
        self.fds[0] = file
        one.send(self.head(0), file, uffd_by_device())
        if dice.random() < 0.7:
            self.read(one)
        one.send(self.message())
        return one

    @staticmethod
    def read(one: Bare) -> None:
        one.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            answer = one.receive()
            assert answer.error != errno.EIO, answer
            if answer.fd >= 0:
                os.close(answer.fd)


@pytest.mark.timeout(TIMEOUT)
def test_anything_on_the_control_socket(world: World) -> None:
    daemon = world.daemon
    daemon.expected += ["cannot (read|write back)", "no memory for a fault"]
    daemon.expected += [r"may have \d+ \w+: see", "a file did not take", "files did not take"]

    def talk(dice: random.Random) -> None:
        talker = Talker(world.mount, dice)
        talker.stock_up()
        if dice.random() < 0.8:
            become(MALLORY)
        while True:
            # What it is told is not its affair, and neither is being hung up on; but EIO is.
            with contextlib.suppress(OSError):
                talker.act()
            for fd in range(200, 1024):  # what the dice made and lost
                with contextlib.suppress(OSError):
                    os.close(fd)

    keep_at_it(world, [(0, talk)] * 3)
    for child in world.children:
        child.kill()
    world.mallory.do("munmap", EVIL, SIZE)
    for name in set(os.listdir(world.mount)) - world.baseline.regions:
        (world.mount / name).unlink()
