"""sd_notify(3): tell the service manager how we are, if there is one."""

from __future__ import annotations

import os
import socket


def notify(*assignments: str) -> None:
    """Send `assignments` (READY=1, ...) to $NOTIFY_SOCKET; nothing if it is not set.

    The protocol is promised stable; a datagram needs no library.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto("\n".join(assignments).encode(), address)
