"""Holds descriptors for a daemon that may die: a process of its own that does no more.

The daemon starts it as a script, `keeper.py LISTENER`, with a listening socket as that
descriptor, and connects to it (keeping.py).

One daemon at a time is served.  Its messages are one byte and a key of eight; STORE
carries a descriptor.  Only TAKE is answered: a daemon that is killed must not find its
last STORE refused because an answer was never read (unix(7): ECONNRESET).

It ends when it is told to, or when nobody can find it any more: its socket is gone.  It
imports nothing but the standard library, so that it is small.
"""

from __future__ import annotations

import _thread
import array
import contextlib
import os
import signal
import socket
import struct
import sys
import time
from typing import Final, NoReturn

STORE: Final = b"s"
REMOVE: Final = b"r"
TAKE: Final = b"t"
"""Answered with a HELD, and the descriptor, for each; and an END."""
STOP: Final = b"q"
HELD: Final = b"h"
END: Final = b"e"
MESSAGE: Final = struct.Struct("=cQ")
LOOK_SECONDS: Final = 5.0
NAP_SECONDS: Final = 0.005
"""How long messages gather: waking us costs who sends more than the message does.

What is on its way is kept as well as what is here: a descriptor in a message stays open as
long as our end of the connection, whatever becomes of its sender.
"""


def send(sock: socket.socket, kind: bytes, key: int = 0, fd: int | None = None) -> None:
    """Send one message.  Raises OSError."""
    fds = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    sock.sendmsg([MESSAGE.pack(kind, key)], fds)


def receive(sock: socket.socket, flags: int = 0) -> tuple[bytes, int, list[int]]:
    """The next message: its kind, key and descriptors; kind is empty at the end."""
    while True:
        try:
            data, ancillary, _, _ = sock.recvmsg(
                MESSAGE.size, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC | flags
            )
            break
        except ConnectionResetError:
            continue  # the peer died with something unread; what it sent is still there
    fds = [
        fd
        for level, kind, payload in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for fd in array.array("i", payload[: len(payload) - len(payload) % 4])
    ]
    if len(data) != MESSAGE.size:
        return b"", 0, fds
    kind, key = MESSAGE.unpack(data)
    return kind, key, fds


def _close(fds: list[int]) -> None:
    # The close of a file whose server hangs waits for that server.
    for fd in fds:
        _thread.start_new_thread(os.close, (fd,))


def _next(sock: socket.socket) -> tuple[bytes, int, list[int]]:
    """As `receive`, but what comes after a pause is not looked at at once."""
    try:
        return receive(sock, socket.MSG_DONTWAIT)
    except BlockingIOError:
        time.sleep(NAP_SECONDS)
        return receive(sock)


def _serve(sock: socket.socket, held: dict[int, int]) -> bool:
    """One daemon's connection to its end; whether to go on."""
    while True:
        kind, key, fds = _next(sock)
        if kind == STORE and len(fds) == 1:
            old = held.get(key)
            held[key] = fds.pop()
            if old is not None:
                _close([old])
        elif kind == REMOVE and key in held:
            _close([held.pop(key)])
        elif kind == TAKE:
            for each, fd in held.items():
                send(sock, HELD, each, fd)
            send(sock, END)
        elif kind in (STOP, b""):
            return kind != STOP
        _close(fds)


def main(listener: socket.socket) -> None:
    """Serve one daemon after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Who started us may be in a hurry (linux/priority.py), and we are not.
    os.setpriority(os.PRIO_PROCESS, 0, max(0, os.getpriority(os.PRIO_PROCESS, 0)))
    path = listener.getsockname()
    born = 0
    with contextlib.suppress(OSError):  # gone already: who has connected is served
        born = os.stat(path).st_ino
    held: dict[int, int] = {}
    while True:
        listener.settimeout(LOOK_SECONDS)
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            try:
                if os.stat(path).st_ino == born:
                    continue
            except OSError:
                pass
            return
        sock.settimeout(None)
        with sock:
            go_on = True
            with contextlib.suppress(BrokenPipeError):
                go_on = _serve(sock, held)
            if not go_on:
                return


def alone(listener: int) -> NoReturn:
    """Be a keeper, with nothing but that socket."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(null, standard)
        os.closerange(3, listener)
        os.closerange(listener + 1, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/")
        main(socket.socket(fileno=listener))
    finally:
        # Not sys.exit(): a close that hangs would hold it up.
        os._exit(0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # as above
