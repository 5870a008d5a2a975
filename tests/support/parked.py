"""An attach, call by call, that stops where it is told to: `parked.py MOUNT START SIZE STEP`.

It speaks the protocol itself, because the C core cannot be stopped between two of
its system calls.  Prints "ready", waits for a line, goes on to the step, prints the
step's name and sleeps until it is killed.
"""

from __future__ import annotations

import array
import ctypes
import os
import signal
import socket
import sys
from typing import NoReturn

from msharefsd.control import wire
from msharefsd.linux import syscalls, uffd
from msharefsd.linux.uffd import Mode


def park(step: str) -> None:
    """Stop here if this is the step."""
    if step == STEP:
        print(step, flush=True)
        while True:
            signal.pause()


def send(sock: socket.socket, request: tuple[int, ...], *fds: int, objects: bytes = b"") -> None:
    op, oflags, flags, count = request
    data = wire.REQUEST.pack(
        wire.MAGIC, wire.VERSION, op, START, SIZE, oflags, flags, count, 0, 0, NUMBER
    )
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data + objects], rights)


def receive(sock: socket.socket) -> int:
    data, fds, _, _ = socket.recv_fds(sock, wire.REPLY.size, 1)
    error = wire.REPLY.unpack(data)[3]
    assert error == 0, os.strerror(error)
    return fds[0] if fds else -1


def map_window(backing: int, fd: int) -> None:
    syscalls.mmap(
        START,
        SIZE,
        syscalls.PROT_READ | syscalls.PROT_WRITE,
        syscalls.MAP_SHARED | syscalls.MAP_FIXED | syscalls.MAP_NORESERVE,
        backing,
        0,
    )
    uffd.register(fd, START, SIZE, Mode.MISSING)


def donor(sock: socket.socket, fd: int) -> NoReturn:
    region = os.open(f"{MOUNT}/new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    park("created")
    flags = wire.RequestFlag.HAS_MAPPINGS | wire.RequestFlag.MADE_FILE
    send(sock, (wire.Op.ATTACH, os.O_CREAT | os.O_EXCL | os.O_RDWR, flags, 0), region, fd)
    receive(sock)
    park("donating")
    item = wire.OBJECT.pack(
        0, SIZE, 0, syscalls.PROT_READ | syscalls.PROT_WRITE, syscalls.MAP_SHARED
    )
    send(sock, (wire.Op.COMMIT, 0, 0, 1), objects=item)
    receive(sock)
    park("committed")
    sys.exit(f"no such step: {STEP}")


def sharer(sock: socket.socket, fd: int) -> NoReturn:
    region = os.open(f"{MOUNT}/r", os.O_RDWR)
    park("opened")
    send(sock, (wire.Op.ATTACH, os.O_RDWR, 0, 0), region, fd)
    park("sent")
    backing = receive(sock)
    park("attached")
    map_window(backing, fd)
    park("mapped")
    syscalls.munmap(START, SIZE)
    send(sock, (wire.Op.DETACH, 0, 0, 0))
    receive(sock)
    park("detached")
    sys.exit(f"no such step: {STEP}")


MOUNT, START, SIZE, STEP = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(f"{MOUNT}/.control")
own = NUMBER = uffd.open_new()
# The daemon is stopped before the last call of these two, so that it cannot answer.
if STEP in ("faulted", "detaching"):
    region_fd = os.open(f"{MOUNT}/r", os.O_RDWR)
    send(connection, (wire.Op.ATTACH, os.O_RDWR, 0, 0), region_fd, own)
    map_window(receive(connection), own)
print("ready", flush=True)
sys.stdin.readline()
if STEP == "faulted":
    with open("/dev/zero", "rb", buffering=0) as source:
        source.readinto((ctypes.c_char * 1).from_address(START + SIZE - 4096))
    sys.exit("the fault was served")
if STEP == "detaching":
    syscalls.munmap(START, SIZE)
    send(connection, (wire.Op.DETACH, 0, 0, 0))
    receive(connection)
    sys.exit("the daemon answered")
park("connected")
if STEP in ("created", "donating", "committed"):
    donor(connection, own)
sharer(connection, own)
