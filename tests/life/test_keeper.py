"""What keeps descriptors for a pager: looked at when its bell rings, and lost at no time."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio
from conftest import eventually

from msharefsd.life import keeper
from msharefsd.life.keeping import KEEPER_SOCKET, Keeper

pytestmark = pytest.mark.shm_only


def unread(sock: socket.socket) -> int:
    """How much of what was sent has not been received, in bytes (unix(7): SIOCOUTQ)."""
    answer = fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))
    found: int = struct.unpack("i", answer)[0]
    return found


def connect(directory: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(str(directory / KEEPER_SOCKET))
    return sock


def held(sock: socket.socket) -> dict[int, tuple[int, int]]:
    """What it has: the files' numbers by their keys."""
    keeper.send(sock, keeper.TAKE)
    found: dict[int, tuple[int, int]] = {}
    while True:
        kind, key, fds = keeper.receive(sock)
        if kind == keeper.END:
            assert key == keeper.HAS_BELL
            return found
        status = os.fstat(fds[0])
        found[key] = status.st_dev, status.st_ino
        os.close(fds[0])


@contextmanager
def running(directory: Path) -> Iterator[None]:
    """A keeper in a thread."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / KEEPER_SOCKET))
        listener.listen(1)
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        try:
            yield
        finally:
            with connect(directory) as sock:
                keeper.send(sock, keeper.STOP)
            thread.join()


def serve(listener: socket.socket) -> None:
    """main() of one that is no process, and takes no signals."""
    served: dict[int, int] = {}
    go_on = True
    while go_on:
        sock, _ = listener.accept()
        with sock, closing(keeper.Messages(sock)) as messages:
            go_on = keeper.serve(messages, served)
    for fd in served.values():
        os.close(fd)


def test_what_is_sent_wakes_nobody_and_outlives_its_sender(tmp_path: Path) -> None:
    with open(__file__, "rb") as file, running(tmp_path):
        status = os.fstat(file.fileno())
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with connect(tmp_path) as sock:
            keeper.send(sock, keeper.BELL, fd=bell)
            eventually(lambda: unread(sock) == 0, "it has its bell")
            time.sleep(0.1)  # and waits for it
            for key in range(10):
                keeper.send(sock, keeper.STORE, key, file.fileno())
                time.sleep(0.005)
            assert unread(sock) > 0
            os.eventfd_write(bell, 1)
            eventually(lambda: unread(sock) == 0, "it has looked")
            keeper.send(sock, keeper.REMOVE, 0)
            keeper.send(sock, keeper.STORE, 10, file.fileno())
        os.close(bell)
        with connect(tmp_path) as sock:
            assert held(sock) == dict.fromkeys(range(1, 11), (status.st_dev, status.st_ino))


def test_more_than_the_line_has_room_for_is_kept(tmp_path: Path) -> None:
    """The bell rings when there is no room, and not only a moment later."""
    count = 2000
    with open(__file__, "rb") as file, running(tmp_path):
        ours = Keeper(tmp_path)
        assert ours.take() == {}

        async def put_all() -> None:
            for key in range(count):
                await ours.put(key, file.fileno())

        trio.run(put_all)
        ours.close(for_good=False)
        with connect(tmp_path) as sock:
            assert held(sock).keys() == set(range(count))


def test_one_that_knows_no_bell_is_given_none(tmp_path: Path) -> None:
    """A keeper outlives the daemon that started it, and the next one may be newer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / KEEPER_SOCKET))
        listener.listen(1)
        ours = Keeper(tmp_path)
        old, _ = listener.accept()
        with old, open(__file__, "rb") as file:
            keeper.send(old, keeper.END)
            assert ours.take() == {}
            trio.run(ours.put, 7, file.fileno())
            ours.close(for_good=False)
            assert keeper.receive(old)[0] == keeper.TAKE
            kind, key, fds = keeper.receive(old)
            assert (kind, key, len(fds)) == (keeper.STORE, 7, 1)
            os.close(fds[0])
            assert keeper.receive(old)[0] == b""
